"""The ops, the kernels that run them, and the bytes that travel."""

from .accumulation import Accumulation
from .choice import backend, workspace
from .schema import compress_, restore_, subtract_, unpack
from .schema_wire import decode, encode_
from .segments import Segments, wire_layout
from .wire import PayloadError, WireLayout

__all__ = [
    "Accumulation",
    "PayloadError",
    "Segments",
    "WireLayout",
    "backend",
    "compress_",
    "decode",
    "encode_",
    "restore_",
    "subtract_",
    "unpack",
    "wire_layout",
    "workspace",
]
