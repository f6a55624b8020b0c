"""The native library, which setup.py builds: loading it registers its kernels."""

import warnings
from pathlib import Path

import torch


def load() -> bool:
    """Loads the native library, and returns whether there is one. The schemas have to be defined before."""
    library = next(Path(__file__).parent.parent.glob("_native*.so"), None)
    if library is None:
        warnings.warn(
            "dgc: the native library was not built, so plain PyTorch is used: correct, but some 25 times slower. "
            "Install g++ and reinstall with `pip install .`",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    torch.ops.load_library(library)
    return True


def has_cuda_kernels() -> bool:
    """Returns whether CUDA tensors have kernels of their own: where setup.py found nvcc, once the library is loaded."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("dgc::compress_", "CUDA")
