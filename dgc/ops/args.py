"""The arguments of the CUDA kernels, as ctypes has them: the structs of csrc/cuda/args.h.

tests/ops/test_twins.py compares fields and sizes.
"""

import ctypes

import torch

MAX_SOURCES = 256
MAX_PAIRS = 120
MAX_KEPT = 2
FLOAT_TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The FloatType of each dtype."""


class Sources(ctypes.Structure):
    """The tensors that hold a bucket's gradients."""

    _fields_ = (("data", ctypes.c_void_p * MAX_SOURCES), ("type", ctypes.c_uint8 * MAX_SOURCES))


class BucketArgs(ctypes.Structure):
    """The counts and the workspace that all kernels of a bucket need."""

    _fields_ = (
        ("segments", ctypes.c_int64),
        ("tiles", ctypes.c_int64),
        ("entries", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        ("wire_type", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class CompressArgs(ctypes.Structure):
    """The argument of the kernels of compress_."""

    _fields_ = (
        ("bucket", BucketArgs),
        ("kept", ctypes.c_void_p * MAX_KEPT),
        ("residual", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("payload", ctypes.c_void_p),
        ("sent", ctypes.c_void_p),
        ("rule", ctypes.c_int64),
        ("gradients", Sources),
    )


class UnpackArgs(ctypes.Structure):
    """The argument of the kernels of unpack."""

    _fields_ = (
        ("bucket", BucketArgs),
        ("payloads", ctypes.c_void_p),
        ("ranks", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("out", Sources),
    )


class RestoreArgs(ctypes.Structure):
    """The argument of the kernel of restore_."""

    _fields_ = (
        ("bucket", BucketArgs),
        ("payload", ctypes.c_void_p),
        ("which", ctypes.c_void_p),
        ("sent", ctypes.c_void_p),
        ("momentum", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
    )


class CodecArgs(ctypes.Structure):
    """The argument of the kernels of encode_ and decode."""

    _fields_ = (
        ("bucket", BucketArgs),
        ("selections", ctypes.c_void_p),
        ("payloads", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("ranks", ctypes.c_int64),
        ("uppers", ctypes.c_int64),
        ("lowers", ctypes.c_int64),
        ("value_bits", ctypes.c_int64),
    )


class Pair(ctypes.Structure):
    """A parameter and its update."""

    _fields_ = (
        ("parameter", ctypes.c_void_p),
        ("update", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("first_block", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
    )


class SubtractArgs(ctypes.Structure):
    """The argument of the kernel of subtract_."""

    _fields_ = (
        ("skip", ctypes.c_void_p),
        ("minus_lr", ctypes.c_float),
        ("shrink", ctypes.c_float),
        ("count", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("pairs", Pair * MAX_PAIRS),
    )
