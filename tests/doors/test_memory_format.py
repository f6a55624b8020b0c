"""Parameters whose memory format changes after the state was made: values keep their index, and nothing is lost."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.alone import own


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3)

    def forward(self, x):
        return self.second(self.first(x).relu()).square().mean()


def train(convert_first, kind, settings):
    """Trains nine steps, the last three dense; the model becomes channels_last before the state is made, or after."""
    net = Net()
    if convert_first:
        net = net.to(memory_format=torch.channels_last)
    optimizer = kind(net.parameters(), **settings)
    state = dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(density=0.05, dense_below=0))
    if not convert_first:
        net = net.to(memory_format=torch.channels_last)
    model = DistributedDataParallel(net)
    state.register(model)
    generator = torch.Generator().manual_seed(1)
    for step in range(9):
        if step == 6:
            state.dense = True
        optimizer.zero_grad()
        x = torch.randn(4, 8, 12, 12, generator=generator).to(memory_format=torch.channels_last)
        model(x).backward()
        optimizer.step()
    share = own(state)
    found = [share[kind] for kind in ("residual", *state.memory.kinds)]
    return [{n: p.detach().clone() for n, p in net.named_parameters()}, *found]


KINDS = [(dgc.SGD, {"lr": 0.1, "momentum": 0.9}), (dgc.AdamW, {"lr": 0.01})]


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=["SGD", "AdamW"])
def test_a_model_converted_after_the_state_trains_like_one_converted_before(gloo, kind, settings):
    for one, other in zip(train(True, kind, settings), train(False, kind, settings), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=["SGD", "AdamW"])
def test_what_has_accumulated_keeps_its_index(gloo, kind, settings):
    net = Net()
    optimizer = kind(net.parameters(), **settings)
    state = dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(density=0.05, dense_below=0))
    model = DistributedDataParallel(net)
    state.register(model)
    x = torch.randn(4, 8, 12, 12)
    model(x).backward()
    optimizer.step()
    before = copy.deepcopy(own(state))
    net.to(memory_format=torch.channels_last)
    state._standing.refresh()
    after = own(state)
    for what in ("residual", *state.memory.kinds):
        for name, tensor in before[what].items():
            assert torch.equal(after[what][name], tensor), (what, name)
    assert after["residual"]["first.weight"].stride() == net.first.weight.stride()
    assert after["residual"]["first.weight"].any()
    with pytest.raises(ValueError, match="expected that of this model"):
        state.load_state_dict({"version": 2, "ranks": {"0": {**before, "residual": {}}}})
