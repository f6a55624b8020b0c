"""The reader of dgc.checkpoint's directories, which believes nothing: neither the pickled metadata, nor the bytes."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from .local import crc32
from .memory import share as shares

_KEY = re.compile(r"rank(\d+)\.(?:about|[^.]+\.(.+))", re.DOTALL)
_IN_METADATA = {
    *(("torch.distributed.checkpoint.metadata", name) for name in dcp.metadata.__all__),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in ("Size", "float32", "bfloat16", "float16", "uint8")),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
}
"""All that the metadata of our checkpoints is pickled from."""


class Reader(dcp.FileSystemReader):
    """Reads our checkpoints, believing nothing: neither the pickled metadata, nor the bytes."""

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory))
        self._directory = directory
        with (directory / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f".metadata: expected DCP's, got {type(metadata).__name__}")
        self._metadata = metadata
        self._keys: dict[int, list[str]] = {}
        for key in metadata.state_dict_metadata:
            match = _KEY.fullmatch(key)
            if match is None:
                raise ValueError(f".metadata: expected what dgc.checkpoint.save() writes, got an entry {key!r:.100}")
            self._keys.setdefault(int(match[1]), []).append(key)
        if sorted(self._keys) != list(range(len(self._keys))):
            raise ValueError(f".metadata: expected entries of ranks from 0 on, got those of {sorted(self._keys)}")
        self._files: dict[str, tuple[Path, int]] = {}  # by key: the file, and where the entry ends there
        for index, info in metadata.storage_data.items():
            self._files[index.fqn] = directory / Path(info.relative_path).name, info.offset + info.length

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the metadata that has been checked."""
        self._metadata.storage_meta = dcp.metadata.StorageMeta(load_id=self.load_id)
        return self._metadata

    def complete(self) -> dict[int, bool]:
        """Returns for each rank whether its part is there.

        Raises:
            ValueError: a file is shorter than it should be.
        """
        there = {}
        for rank, keys in sorted(self._keys.items()):
            if unknown := [key for key in keys if key not in self._files]:
                raise ValueError(f".metadata: expected a file for every entry, got none for {unknown[0]}")
            files = [self._files[key] for key in keys]
            there[rank] = all(file.exists() for file, _ in files)
            for file, end in files:
                if there[rank] and file.stat().st_size < end:
                    raise ValueError(f"{file.name}: expected {end} bytes or more, got {file.stat().st_size}: truncated")
        return there

    def places(self) -> int:
        """Returns the number of ranks that held a model together: 1 where each held a whole one.

        Raises:
            ValueError: no rank's part is there, or it is damaged.
        """
        there = [rank for rank, is_there in self.complete().items() if is_there]
        if not there:
            raise ValueError(f"{self._directory}: expected the part of at least one rank, got none")
        about = self._about(self._load([f"rank{there[0]}.about"])[f"rank{there[0]}.about"])
        places = about.get("places", 1)
        if type(places) is not int or places < 1 or len(self._keys) % places:
            raise ValueError(f"rank {there[0]}: expected places that divide {len(self._keys)} ranks, got {places!r}")
        return places

    def state_dict_of(self, rank: int) -> dict[str, Any]:
        """Returns what a rank's state_dict() was."""
        template = self._load(self._keys[rank])
        prefix = f"rank{rank}."
        tensors = {key[len(prefix) :]: tensor for key, tensor in template.items()}
        about = self._about(tensors.pop("about"))
        expected = about.pop("crc32")
        if damaged := [name for name, tensor in tensors.items() if crc32(tensor) != expected.get(name)]:
            raise ValueError(f"rank {rank}: {', '.join(damaged)} is not what was saved: the file is damaged")
        kinds: dict[str, dict[str, Tensor]] = {"momentum": {}, "residual": {}}
        for key, tensor in tensors.items():
            kind, name = key.split(".", 1)
            kinds.setdefault(kind, {})[name] = tensor.float()  # save() may have rounded the residual
        version = about.pop("version", None)
        if version not in (1, shares.VERSION):
            raise ValueError(
                f"rank {rank}: expected version 1 or {shares.VERSION} of dgc's checkpoints, got {version!r}"
            )
        return {**about, **kinds}

    @staticmethod
    def _about(tensor: Tensor) -> dict[str, Any]:
        about = json.loads(bytes(tensor.tolist()))
        if not isinstance(about, dict):
            raise ValueError(f"about: expected what dgc.checkpoint.save() writes, got {type(about).__name__}")
        return about

    def _load(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Returns some entries, checked against the sizes of their files."""
        template = {}
        for key in keys:
            entry = self._metadata.state_dict_metadata[key]
            file, _ = self._files[key]
            # What a damaged size asks for might be more memory than there is.
            if not isinstance(entry, dcp.metadata.TensorStorageMetadata) or entry.size.numel() > file.stat().st_size:
                raise ValueError(f"{key}: expected a tensor that fits into {file.name}, got {entry!r:.100}")
            template[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with without_process_group():
            dcp.load(template, storage_reader=self, no_dist=True)
        return template


class _MetadataUnpickler(pickle.Unpickler):
    """DCP reads its metadata with plain pickle, which runs whatever a file says."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns a class that metadata is made of.

        Raises:
            pickle.UnpicklingError: another one is asked for.
        """
        if (module, name) not in _IN_METADATA:
            raise pickle.UnpicklingError(f".metadata: expected what dgc.checkpoint.save() writes, got {module}.{name}")
        return super().find_class(module, name)


@contextmanager
def without_process_group() -> Iterator[None]:
    """Keeps DCP from warning where it is told to work without a process group, as we mean it to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
