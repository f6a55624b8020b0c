"""Choice of what runs the ops on a device. Importing this module loads the native library and registers all ops."""

import logging

import torch
from torch import Tensor

from . import cuda, cupy, native, reference, schema, schema_wire  # noqa: F401 the last two define the ops
from .library import LIBRARY, OPS
from .segments import Segments, segments_of
from .wire import GROUP, div_up

# The reference serves every device that has no kernel of its own.
for _name in OPS:
    LIBRARY.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
_NATIVE = native.load()
_NATIVE_CUDA = native.has_cuda_kernels()
_CUPY = not _NATIVE_CUDA and cupy.has_cupy()
if _CUPY:
    cupy.register_cupy(LIBRARY, OPS)


def backend(device: str | torch.device) -> str:
    """Returns what runs the ops on a device.

    "native": built by setup.py; "cupy", on CUDA only: the same kernels, compiled by CuPy at first use; "reference":
    plain PyTorch.
    """
    kind = torch.device(device).type
    if (kind == "cpu" and _NATIVE) or (kind == "cuda" and _NATIVE_CUDA):
        return "native"
    return "cupy" if kind == "cuda" and _CUPY else "reference"


def workspace(segments: Tensor | Segments, device: torch.device) -> Tensor:
    """Returns what the ops need besides their arguments, for these segments: uint8.

    On the CPU it is scratch, 4 bytes for every 32 elements. On CUDA it holds tables too, and must be left as it is.

    Raises:
        RuntimeError: a CUDA device older than the kernels need, or segments that they cannot select from.
    """
    choice = backend(device)
    if device.type == "cuda" and choice != "reference":
        cuda.check_capability(device, choice)
        return cuda.workspace(segments, device)
    groups = sum(div_up(numel, GROUP) for numel in segments_of(segments).tile_numel.tolist())
    return torch.empty(4 * groups, dtype=torch.uint8, device=device)


logging.getLogger("dgc").debug("ops on the CPU: %s", backend("cpu"))
