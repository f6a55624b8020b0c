"""Local parts of parameters: the elements whose momentum and residual this rank keeps.

A rank keeps all of a parameter, or some of its rows, where the ranks of a node share the work: those that fully_shard
has given it, or those that DGC gives it of a parameter that every rank of the node has.
"""

from __future__ import annotations

import ctypes
import zlib
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Piece(NamedTuple):
    """The place of a rank's part in the whole parameter, whose elements are counted row after row."""

    begin: int
    """Its first element in the whole parameter."""
    whole: int
    """Number of elements of the whole parameter."""


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """Returns the ranks over which a DTensor is divided; None for a plain tensor, of which this rank holds all."""
    return getattr(tensor, "device_mesh", None)


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this rank holds, which shares its memory: of a DTensor, the plain tensor."""
    if mesh_of(tensor) is None:
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]  # a DTensor's
    return part


def gradient_of(parameter: Tensor) -> Tensor | None:
    """Returns the part of a parameter's .grad that this rank holds; None without one."""
    return None if parameter.grad is None else local(parameter.grad)


def rows_of(rows: int, place: int, places: int) -> tuple[int, int]:
    """Returns a place's first row, and that after its last, by the rule of fully_shard: ceil(rows / places) each.

    The last places get fewer, or none.
    """
    each = -(-rows // places)
    return min(rows, place * each), min(rows, (place + 1) * each)


def part_of(parameter: Tensor, place: int, places: int) -> tuple[Tensor, Piece]:
    """Returns the rows of a parameter that a place keeps, and where they lie in it.

    Args:
        parameter: a DTensor's place is that of its mesh.
        place: of this rank, among those that divide a plain parameter.
        places: their number; 1 where nobody divides it.
    """
    mesh = mesh_of(parameter)
    if mesh is not None:
        place, places = mesh.get_local_rank(), mesh.size()
    rows = parameter.shape[0] if parameter.ndim else 1
    first, last = rows_of(rows, place, places)
    part = local(parameter)
    if mesh is None and places > 1:
        part = part.detach()[first:last]
    return part, Piece(first * (parameter.numel() // max(1, rows)), parameter.numel())


def refusal_of(parameter: Tensor) -> str | None:
    """Returns why DGC cannot compress a DTensor, with the way out; None where it can, and for a plain tensor."""
    if (mesh := mesh_of(parameter)) is None:
        return None
    placements = parameter.placements  # type: ignore[attr-defined]  # a DTensor's
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names or ("replicate", "shard")
        return (
            f"expected a parameter sharded over one dimension, got one on the mesh {tuple(names)}. Over a mesh of two, "
            "FSDP2 averages all gradients densely (HSDP): shard over the node alone, and let DGC exchange between the "
            "nodes. Tensor parallelism is not supported.\n"
            f'    fully_shard(module, mesh=mesh["{names[-1]}"])\n'
            "    state = dgc.DGCState(..., mesh=mesh)"
        )
    if not placements[0].is_shard(0):
        return f"expected a parameter sharded over its first dimension, by fully_shard, got {placements[0]}"
    part, piece = part_of(parameter, 0, 1)
    if part.numel() and piece.begin + part.numel() > parameter.numel():
        return "expected rows in fully_shard's order, got another division of the first dimension"
    return None


def crc32(tensor: Tensor) -> int:
    """Returns the checksum of a plain tensor's bytes."""
    tensor = tensor.detach().cpu().contiguous()
    # Through ctypes, since numpy need not be there.
    return zlib.crc32((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())) if tensor.numel() else 0
