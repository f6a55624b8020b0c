"""Local steps of a model on a GPU, with theta_0 and e there and in pinned host memory. It needs a GPU."""

from functools import partial

import pytest
import torch

import dgc
from support.models import Given, normals
from support.training import SHAPES

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT TESTED: local steps on a GPU, and pinned host memory, since none is here"
)

CONFIG = dgc.DGCConfig(density=0.008, residual_decay=0.95, wire_dtype="8bit", on_nonfinite="skip")
EVERY, STEPS = 4, 14
BAD = 5  # this step's gradient is not finite


def train(delay, cpu_offload):
    """Returns weights, theta_0 and e on the CPU, and the bytes of the GPU that LocalSteps holds between rounds."""
    net = Given(SHAPES).cuda()
    inner = torch.optim.SGD(net.parameters(), lr=0.01)
    before = torch.cuda.memory_allocated()
    outer = partial(dgc.OuterSGD, lr=0.7, momentum=0.9)
    local = dgc.LocalSteps(net, inner, CONFIG, every=EVERY, delay=delay, outer=outer, cpu_offload=cpu_offload)
    for step in range(STEPS):
        gradients = {name: g.cuda() for name, g in normals(SHAPES, step).items()}
        if step == BAD:
            gradients["a"][0, 0] = torch.nan
        net(gradients).backward()
        inner.step()
        inner.zero_grad()
    local.finish()
    assert local.state.stats.skipped == 1
    held = torch.cuda.memory_allocated() - before
    if cpu_offload:
        assert all(start.is_pinned() for start in local._start.values())
    tensors = {"theta_0": dict(local._start), "theta": dict(net.named_parameters())}
    found = {kind: {n: t.detach().cpu() for n, t in of.items()} for kind, of in tensors.items()}
    return {**found, "e": {"": local.state.memory.residual.cpu()}}, held


@pytest.mark.parametrize("delay", [0, 2])
def test_the_bits_are_the_same_and_nothing_is_on_the_gpu(delay):
    there, held = train(delay, cpu_offload=False)
    on_host, held_on_host = train(delay, cpu_offload=True)
    for kind, tensors in there.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, on_host[kind][name]), (kind, name)
    numel = sum(p.numel() for p in Given(SHAPES).parameters())
    assert held > 12 * numel
    assert held_on_host == 0
