"""Slots of pieces: a parameter cut in three, one of them empty, goes through a state with the bits of the whole."""

import pytest
import torch
from torch import nn

import dgc
from dgc.memory.slots import Gradients

ROWS, COLUMNS = 90, 100
CUTS = [(0, 45), (45, 45), (45, 90)]
K = 90  # 1 % of the elements, half of them in each piece


class Holder(nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))


def gradient(step: int) -> torch.Tensor:
    """Returns small integers, and in each half of the rows as many large ones as are sent of it."""
    generator = torch.Generator().manual_seed(step)
    g = torch.randint(-3, 4, (ROWS * COLUMNS,), generator=generator).float()
    for half in range(2):
        chosen = torch.randperm(ROWS * COLUMNS // 2, generator=generator)[: K // 2] + half * ROWS * COLUMNS // 2
        g[chosen] = 1000.0 + torch.randint(0, 500, (K // 2,), generator=generator)
    return g.view(ROWS, COLUMNS)


def drive(tensors, places, step_of_dense, config):
    """Trains six steps on one buffer that holds all pieces; returns parameters, u and v in the order of the rows."""
    model = Holder(tensors)
    optimizer = dgc.SGD(model.parameters(), lr=0.25, momentum=0.5, nesterov=True, weight_decay=0.125)
    state = dgc.DGCState(model.named_parameters(), optimizer, config)
    parameters = dict(model.named_parameters())
    for step in range(6):
        if step == step_of_dense:
            state.dense = True
        buffer = gradient(step).flatten()
        slots = [state.slot(p) for p in parameters.values()]
        state.begin()
        future = state.reduce(Gradients(slots, [buffer], places))
        state.end()
        future.wait()
        for p, (_, begin) in zip(parameters.values(), places, strict=True):
            p.grad = buffer[begin : begin + p.numel()].view(p.shape).clone()
        optimizer.step()
    found = {"p": torch.cat([p.detach().flatten() for p in parameters.values()])}
    found["u"] = torch.cat([state.memory.momentum_of(name).flatten() for name in parameters])
    waiting = [state.memory.residual_of(name) for name in parameters]
    found["v"] = torch.cat([v.flatten() for v in waiting if v is not None])
    return found, state


@pytest.mark.parametrize("step_of_dense", [None, 4])
@pytest.mark.parametrize("droppable", [False, True])
def test_a_parameter_in_three_pieces_has_the_bits_of_the_whole(step_of_dense, droppable):
    config = dgc.DGCConfig(density=0.01, dense_below=0, momentum_masking=True, droppable=droppable)
    whole = gradient(99)
    pieces = {f"w{i}": whole[begin:end] for i, (begin, end) in enumerate(CUTS)}
    assert [p.numel() for p in pieces.values()] == [4500, 0, 4500]
    expected, one = drive({"w": whole}, [(0, 0)], step_of_dense, config)
    found, state = drive(pieces, [(0, COLUMNS * begin) for begin, _ in CUTS], step_of_dense, config)
    for what in expected:
        assert torch.equal(found[what], expected[what]), what
    assert expected["v"].any()
    assert state.slot(state.parameters.by_name["w1"]).numel == 0
    assert one.stats.sent_density == state.stats.sent_density
    saved = state.state_dict()
    state.load_state_dict(saved)


def test_a_bucket_of_an_empty_piece_alone_goes_through():
    model = Holder({"w": torch.zeros(0, COLUMNS), "x": torch.zeros(200, COLUMNS)})
    optimizer = dgc.SGD(model.parameters(), lr=0.25)
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=0.01))
    buffers = {"w": torch.zeros(0), "x": torch.ones(200 * COLUMNS)}
    state.begin()
    futures = [
        state.reduce(Gradients([state.slot(p)], [buffers[name]], [(0, 0)])) for name, p in model.named_parameters()
    ]
    state.end()
    for future in futures:
        future.wait()
    assert int((buffers["x"] != 0).sum()) == 200
