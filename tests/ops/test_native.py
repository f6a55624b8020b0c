"""The native library on the CPU: schemas, threads, and a second choice of instructions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgc import backend, ops
from support.buckets import compress_both, make

TESTS = Path(__file__).with_name("kernels")


def test_the_native_library_is_what_is_tested():
    assert backend("cpu") == "native"


def test_schemas_name_what_is_mutated():
    args = make([1000, 64], 0.01)
    torch.library.opcheck(torch.ops.dgc.compress_, tuple(args.list()), test_utils=("test_schema", "test_faketensor"))
    payloads = torch.stack([args.payload] * 2)
    status = torch.zeros(3, dtype=torch.int32)
    call = (payloads, 0, args.segments, args.workspace, args.scale, torch.float32, [torch.zeros(1064)], status)
    torch.library.opcheck(torch.ops.dgc.unpack, call, test_utils=("test_schema", "test_faketensor"))
    which = torch.ones(2, dtype=torch.uint8)
    call = (args.payload, which, args.segments, args.workspace, args.sent, args.momentum, args.residual)
    call = (*call, torch.float32)
    torch.library.opcheck(torch.ops.dgc.restore_, call, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_does_not_matter(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compress_both(make([1_500_000, 70_000, 20_000], 0.001))
    finally:
        torch.set_num_threads(before)


def test_the_portable_path_gives_the_same_bits():
    # The choice is made once a process, so the other path needs another process.
    tests = "native and (random_shapes or (hard_data and 0.02) or non_finite or adam or subtract)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", tests, "-p", "no:cacheprovider", str(TESTS)]
    result = subprocess.run(command, env={**os.environ, "DGC_CPU": "portable"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_subtract_tells_autograd():
    p = torch.ones(3, requires_grad=True)
    loss = (p * p).sum()
    with torch.no_grad():
        ops.subtract_([p], [torch.ones(3)], 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
