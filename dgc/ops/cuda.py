"""The workspace of the CUDA kernels, and the checks whether they can run on a device and for a bucket.

The kernels are csrc/cuda. Where setup.py found nvcc they are in the native library; where not, CuPy compiles them at
first use (cupy.py), and launch.py launches them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .segments import Segments, segments_of
from .wire import GROUP, TILE, align_up

THREADS = 256
CHUNK = 8192
CHUNKS_PER_TILE = TILE // CHUNK
BINS = 2048
STRUCT_BYTES = {"DeviceSegment": 80, "SegmentState": 48, "TileState": 16, "ChunkState": 24, "BucketState": 16}
"""Sizes of the structs of csrc/cuda/args.h that lie in a workspace."""
MIN_CAPABILITY = {"native": (8, 0), "cupy": (7, 5)}
"""The compute capability that the kernels need: the library holds code for 8.0, CUDA 13's NVRTC knows 7.5."""


def workspace_sizes(n_segments: int, n_tiles: int, n_entries: int) -> list[int]:
    """Returns the bytes of each part of a workspace, padded: csrc/cuda/args.h is its twin."""
    capacity = 2 * n_entries
    sizes = [
        STRUCT_BYTES["DeviceSegment"] * n_segments,  # the segment table
        4 * n_tiles,  # the segment of each tile
        STRUCT_BYTES["BucketState"],  # the bucket's state
        STRUCT_BYTES["SegmentState"] * n_segments,  # states
        STRUCT_BYTES["TileState"] * n_tiles,  # counts
        STRUCT_BYTES["ChunkState"] * n_tiles * CHUNKS_PER_TILE,  # candidates of each chunk
        4 * n_segments * BINS,  # histograms
        4 * n_tiles * (TILE // GROUP),  # group maxima
        4 * capacity,  # candidates
        2 * capacity,  # and their indices
    ]
    return [align_up(size) for size in sizes]


def workspace(segments: Tensor | Segments, device: torch.device) -> Tensor:
    """Returns the device's tables of a bucket and the scratch of its kernels: uint8.

    Made once a layout, and then the kernels' alone: they count on finding it as they left it.

    Args:
        segments: the table, or what is known of it.
        device: of the gradients.
    """
    known = segments_of(segments)
    starts = torch.stack(
        [known.first_tile, known.tiles, known.first_entry, known.first_upper, known.first_lower], dim=1
    )
    tables = torch.cat([known.table, starts], dim=1), known.segment_of_tile.int()
    sizes = workspace_sizes(len(known), known.n_tiles, known.n_entries)
    buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    for table, begin in zip(tables, (0, sizes[0]), strict=True):
        buffer[begin : begin + table.nbytes].copy_(table.view(-1).view(torch.uint8))
    return buffer


def check_capability(device: torch.device, backend: str) -> None:
    """Checks that the kernels can run on a device.

    Raises:
        RuntimeError: the device is older than they need.
    """
    found, needed = torch.cuda.get_device_capability(device), MIN_CAPABILITY[backend]
    if found < needed:
        way_out = "build without them, DGC_CUDA=0 pip install ." if backend == "native" else ""
        raise RuntimeError(
            f"dgc: expected compute capability {needed[0]}.{needed[1]} or later for the {backend} CUDA kernels, got "
            f"{found[0]}.{found[1]} ({torch.cuda.get_device_name(device)}): "
            f"{way_out or 'uninstall CuPy'}, and the next choice runs: CuPy from 7.5 on, else plain PyTorch"
        )
