"""What runs: the ops, their kernels, and the bytes that travel."""

from .schema import backend, compress_, restore_, subtract_, unpack, workspace
from .wire import PayloadError, WireLayout, wire_layout

__all__ = [
    "PayloadError",
    "WireLayout",
    "backend",
    "compress_",
    "restore_",
    "subtract_",
    "unpack",
    "wire_layout",
    "workspace",
]
