"""The memory of momentum and residual: where each parameter lies, what is saved, and what does not fit."""

import math

import pytest
import torch

from dgc.memory.memory import Memory
from dgc.memory.slots import dense_strides, lay_out
from support.models import Given

SHAPES = {"a": (30, 3), "bias": (7,), "c": (5, 5, 2)}


def memory(shapes=SHAPES, compressed=("a", "c"), memory_format=torch.preserve_format) -> Memory:
    parameters = {n: p.detach().to(memory_format=memory_format) for n, p in Given(shapes).named_parameters()}
    return Memory(lay_out(parameters, compressed), compressed, torch.device("cpu"))


def filled() -> Memory:
    m = memory()
    m.allocate(["momentum"])
    m.momentum.normal_()
    m.residual.normal_()
    m.diverged = {"a"}
    return m


def test_every_parameter_has_a_place_of_its_own():
    m = memory()
    m.allocate(["momentum"])
    for i, name in enumerate(SHAPES):
        m.momentum_of(name).fill_(i + 1)
    assert [float(m.momentum_of(name).mean()) for name in SHAPES] == [1, 2, 3]
    assert {name: tuple(m.momentum_of(name).shape) for name in SHAPES} == SHAPES


def test_only_compressed_parameters_have_a_residual():
    m = memory()
    assert m.residual_of("bias") is None
    assert m.residual_of("a").shape == (30, 3)
    assert m.residual.numel() == 96 + 64


def test_without_momentum_none_is_allocated():
    m = memory()
    assert m.momentum is None
    assert m.momentum_of("a") is None
    assert m.state_dict()["momentum"] == {}


def test_a_state_dict_returns_every_bit():
    before, after = filled(), memory()
    after.load([(1.0, before.state_dict())], ["momentum"], ["a"])
    for name in SHAPES:
        assert torch.equal(after.momentum_of(name), before.momentum_of(name))
    assert torch.equal(after.residual_of("c"), before.residual_of("c"))
    assert after.diverged == {"a"}


def test_a_state_dict_means_values_by_index_whatever_the_memory_format():
    shape = {"conv": (4, 3, 2, 2)}
    plain = memory(shape, ["conv"])
    last = memory(shape, ["conv"], torch.channels_last)
    plain.residual.normal_()
    last.load([(1.0, plain.state_dict())], [], [])
    assert last.residual_of("conv").stride() == last.slots["conv"].strides
    assert torch.equal(last.residual_of("conv"), plain.residual_of("conv"))
    assert not torch.equal(last.residual, plain.residual)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["residual"].pop("a"), "residual of a is missing"),
        (lambda s: s["momentum"].pop("bias"), "momentum of bias is missing"),
        (lambda s: s["residual"].update(x=torch.zeros(3)), "residual has x, which this model does not"),
        (
            lambda s: s["momentum"].update(a=torch.zeros(3, 30)),
            r"momentum of a has shape \(3, 30\), expected \(30, 3\)",
        ),
        (lambda s: s.update(residual=[1]), "residual is no dict of tensors by parameter name, but list"),
        (lambda s: s["residual"].update(a=3), "residual of a is no tensor, but int"),
        (lambda s: s["residual"].update(a=torch.zeros(30, 3).half()), "residual of a is torch.float16"),
        (lambda s: s["residual"].update(a=torch.zeros(30, 3, device="meta")), "residual of a is .* on meta"),
        (lambda s: s["residual"].update(a=torch.zeros(30, 3).to_sparse()), "residual of a is .*torch.sparse_coo"),
        (lambda s: s["momentum"]["bias"].fill_(math.nan), "momentum of bias has values that are not finite"),
        (lambda s: s["residual"]["c"].fill_(-math.inf), "residual of c has values that are not finite"),
    ],
)
def test_what_does_not_fit_is_listed(change, message):
    state = filled().state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        memory().check([filled().state_dict(), state], ["momentum"], ["a"])
    memory().check([filled().state_dict()] * 2, ["momentum"], ["a"])
    with pytest.raises(ValueError, match=r"'diverged'\]: expected parameters of this model, got z"):
        memory().check([filled().state_dict()], ["momentum"], ["a", "z"])


def test_parts_are_weighted_but_for_momentum_that_is_the_same_on_all_ranks():
    one, two, m = filled(), filled(), memory()
    m.load([(0.75, one.state_dict()), (0.25, two.state_dict())], ["momentum"], ["a"])
    assert torch.equal(m.residual_of("c"), 0.75 * one.residual_of("c") + 0.25 * two.residual_of("c"))
    assert torch.equal(m.momentum_of("a"), 0.75 * one.momentum_of("a") + 0.25 * two.momentum_of("a"))
    assert torch.equal(m.momentum_of("c"), one.momentum_of("c"))
    assert m.diverged == {"a"}


def test_strides_are_the_parameters_own_unless_it_has_gaps():
    conv = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    assert dense_strides(conv) == conv.stride()
    assert dense_strides(torch.zeros(4, 6).t()) == (1, 6)
    assert dense_strides(torch.zeros(4, 6)[:, ::2]) == (3, 1)
    assert dense_strides(torch.zeros(1).expand(5)) == (1,)
