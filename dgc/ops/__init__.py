"""What runs: the ops, their kernels, and the bytes that travel."""

from .schema import backend, compress_, restore_, subtract_, unpack, workspace
from .segments import Segments, wire_layout
from .wire import PayloadError, WireLayout

__all__ = [
    "PayloadError",
    "Segments",
    "WireLayout",
    "backend",
    "compress_",
    "restore_",
    "subtract_",
    "unpack",
    "wire_layout",
    "workspace",
]
