"""LocalSteps(cpu_offload=True): the same bits, and nothing of it on the device of the model."""

from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dgc
from dgc.memory.memory import Memory
from dgc.rounds import host
from support.messages import error_of
from support.models import normals
from support.ranks import run_ranks
from support.round_run import RoundRun
from support.training import SHAPES, seed_of

CONFIG = dgc.DGCConfig(density=0.008, residual_decay=0.95, wire_dtype="8bit", on_nonfinite="skip")
EVERY, STEPS = 4, 18
BAD = 6  # this step's gradient is not finite on one rank
LOCAL = {
    "averaging": {},
    "delayed": {"delay": 1},
    "DiLoCo": {"outer": partial(dgc.OuterSGD, lr=0.7, momentum=0.9)},
    "corrected": {"outer": partial(dgc.SGD, lr=0.7, momentum=0.9, nesterov=True)},
}


def train(rank, world_size, inside=None, places=1):
    results = {}
    for name, local in LOCAL.items():
        for offload in (False, True):
            local = {**local, "cpu_offload": offload}
            run = RoundRun(CONFIG, EVERY, inside, places, optimizer=torch.optim.AdamW, lr=0.01, local=local)
            for step in range(STEPS):
                gradients = normals(SHAPES, seed_of(step, rank))
                if (step, rank) == (BAD, 0):
                    gradients["a"][0, 0] = torch.nan
                run.train(gradients)
            run.local.finish()
            results[name, offload] = run.result()
    return results


@pytest.mark.parametrize(("inside", "places"), [(None, 1), ("ddp", 2), ("fsdp", 2)])
def test_the_bits_are_the_same(inside, places):
    for result in run_ranks(2 * places, train, inside, places):
        for name in LOCAL:
            one, other = result[name, False], result[name, True]
            assert one["stats"].skipped == other["stats"].skipped == 1
            for kind in ("parameters", "start", "residual", "momentum"):
                assert one[kind].keys() == other[kind].keys()
                assert all(torch.equal(tensor, other[kind][n]) for n, tensor in one[kind].items()), (name, kind)


def differ(rank, world_size):
    return error_of(lambda: RoundRun(CONFIG, EVERY, local={"cpu_offload": rank == 1}))


def test_islands_of_which_one_offloads_are_refused():
    # One would wait for the others on another backend.
    for error in run_ranks(2, differ):
        assert "cpu_offload: rank 0 has False, rank 1 has True" in error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_model_on_a_gpu_nothing_is_on_the_gpu(dtype):
    """On tensors without values, whose devices are checked by every op: none of them may mix two."""
    without_values = [mock.patch("dgc.door.crc32", return_value=0), mock.patch.object(Memory, "empty", True)]
    with FakeTensorMode(allow_non_fake_inputs=True), without_values[0], without_values[1]:
        net = nn.Module()
        net.weight = nn.Parameter(torch.empty(100, 200, device="cuda", dtype=dtype))
        inner = torch.optim.SGD(net.parameters(), lr=0.1)
        outer = partial(dgc.SGD, lr=0.7, momentum=0.9)
        local = dgc.LocalSteps(net, inner, CONFIG, every=2, delay=1, outer=outer, cpu_offload=True)
        memory = local.state.memory
        local._sent_at = {name: host.copy_of(p.detach(), True) for name, p in net.named_parameters()}
        held = {
            **local._start,
            "e": memory.residual,
            "u": memory.momentum,
            "the way": host.way_of(net.weight, local._start["weight"], True),
            **{f"{name} as it was sent": tensor for name, tensor in local._sent_at.items()},
        }
        assert {name: tensor.device.type for name, tensor in held.items()} == dict.fromkeys(held, "cpu")
        assert local._start["weight"].dtype == held["the way"].dtype == torch.float32
        assert memory.residual.numel() == 200 * 100
        # A torch without CUDA has no copy_ to it, which may mix devices anyway.
        with torch.no_grad(), mock.patch.object(torch.Tensor, "copy_", lambda tensor, other: tensor):
            for sent_at in (local._sent_at, {}):
                local._sent_at = sent_at
                local._go_on_from_start("weight")
        assert {(p.device.type, p.dtype) for p in net.parameters()} == {("cuda", dtype)}


def without_a_backend(rank, world_size):
    with mock.patch("torch.distributed.get_backend_config", return_value="cuda:nccl"):
        return error_of(lambda: RoundRun(CONFIG, EVERY, local={"cpu_offload": True}))


def test_what_cannot_be_offloaded_is_refused_with_what_to_write():
    (error,) = run_ranks(1, without_a_backend)
    assert "got one of cuda:nccl. Write init_process_group(" in error
    with FakeTensorMode():
        shard = torch.empty(3, device="cuda")
    shard.device_mesh = object()
    assert "got one that fully_shard has sharded on a GPU" in error_of(partial(host.check_weights, {"a": shard}))
