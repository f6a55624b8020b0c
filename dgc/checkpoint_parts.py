"""What one rank writes for dgc.checkpoint, and the names of the directory."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .local import crc32
from .memory import share as shares

logger = logging.getLogger("dgc")


def on_the_host(share: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a share with copies of its tensors in the host's memory, which the run does not write to."""
    return {
        key: {name: x.to("cpu", copy=True) if isinstance(x, Tensor) else x for name, x in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in share.items()
    }


def entries(state_dict: Mapping[str, Any], residual_dtype: torch.dtype, rank: int) -> dict[str, Tensor]:
    """Returns a rank's share as tensors alone, by name: DCP would pickle everything else."""
    if residual_dtype != torch.float32:
        state_dict = {**state_dict, "residual": rounded(state_dict["residual"], residual_dtype, rank)}
    kinds = {kind: named for kind, named in state_dict.items() if _are_tensors(named)}
    tensors = {f"{kind}.{name}": tensor for kind, named in kinds.items() for name, tensor in named.items()}
    about = {key: value for key, value in state_dict.items() if key not in kinds}
    about["version"] = shares.VERSION
    about["crc32"] = {name: crc32(tensor) for name, tensor in tensors.items()}
    tensors["about"] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    return tensors


def _are_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(tensor, Tensor) for tensor in value.values())


def rounded(residual: Mapping[str, Tensor], dtype: torch.dtype, rank: int) -> dict[str, Tensor]:
    """Returns the residual in another type, and logs what that loses."""
    most = torch.finfo(dtype).max  # what rounds to Inf would be refused when it is loaded
    rounded = {name: v.clamp(-most, most).to(dtype) for name, v in residual.items()}
    lost = sum(float((v - rounded[name]).double().square().sum()) for name, v in residual.items()) ** 0.5
    whole = sum(float(v.double().square().sum()) for v in residual.values()) ** 0.5
    share = lost / whole if whole else 0.0
    logger.info("dgc: rank %d: the residual is saved in %s, and loses %.2g of its norm", rank, dtype, share)
    return rounded


def check_replaceable(whole: Path) -> None:
    """Checks that a checkpoint's name is free, or is that of another checkpoint.

    Raises:
        FileExistsError: something else has that name.
    """
    if not whole.exists():
        return
    found = list(whole.iterdir()) if whole.is_dir() else [whole]
    if others := [path for path in found if path.name != ".metadata" and path.suffix != ".distcp"]:
        raise FileExistsError(
            f"expected a name for this alone, since it is replaced, got one where {others[0].name} is. "
            f"Give it another, such as {whole / 'dgc'}"
        )


def replace(whole: Path, partial: Path) -> None:
    """Gives a completed checkpoint its name. Between the two renames the one before is called <directory>.replaced."""
    replaced = Path(f"{whole}.replaced")
    remove(replaced)
    if whole.exists():
        whole.rename(replaced)
    partial.rename(whole)
    remove(replaced)


def remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
