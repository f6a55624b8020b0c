"""Arguments, groups and states that dgc.AdamW and dgc.Adam refuse."""

import copy
import math

import pytest
import torch

import dgc
from support.alone import Alone
from support.models import Given, normals

SHAPES = {"weight": (64, 33), "bias": (17,), "scalar": ()}
MIXED = {"big": (300, 300), "small": (20, 20), "bias": (300,)}
UNSUPPORTED = [("amsgrad", True), ("maximize", True), ("capturable", True), ("differentiable", True)]
OUT_OF_RANGE = [
    ("lr", -1.0),
    ("lr", math.nan),
    ("lr", torch.tensor(0.1)),
    ("weight_decay", -1e-4),
    ("weight_decay", math.inf),
    ("betas", (1.0, 0.9)),
    ("betas", (0.9, -0.1)),
    ("betas", (0.9, math.nan)),
    ("betas", (0.9,)),
    ("betas", 0.9),
    ("betas", (torch.tensor(0.9), 0.99)),
    ("eps", 0.0),
    ("eps", 1e-40),
    ("eps", math.nan),
    ("eps", None),
]
BOTH = pytest.mark.parametrize("kind", [dgc.AdamW, dgc.Adam])


@BOTH
@pytest.mark.parametrize(("name", "value"), UNSUPPORTED + OUT_OF_RANGE, ids=str)
class TestRefused:
    def test_in_the_constructor(self, kind, name, value):
        right = torch.optim.AdamW([torch.zeros(1)]).defaults[name]
        for group in ({}, {name: right}):  # a default is refused where no group uses it too
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                kind([{"params": Given(SHAPES).parameters(), **group}], **{name: value})

    def test_in_a_group(self, kind, name, value):
        model = Given(SHAPES)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            kind([{"params": [model.weight]}, {"params": [model.bias], name: value}])

    def test_in_a_group_that_is_added(self, kind, name, value):
        model = Given(SHAPES)
        optimizer = kind([model.weight])
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            optimizer.add_param_group({"params": [model.bias], name: value})
        assert [group["params"] for group in optimizer.param_groups] == [[model.weight]]

    def test_in_a_state_dict_which_changes_nothing(self, kind, name, value):
        one, other = (Alone(SHAPES, dgc.DGCConfig(), optimizer=kind) for _ in range(2))
        one.train(normals(SHAPES, 0))
        before, saved = copy.deepcopy(one.optimizer.state_dict()), other.optimizer.state_dict()
        saved["param_groups"][0].update({"lr": 0.5, name: value})
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            one.optimizer.load_state_dict(saved)
        torch.testing.assert_close(one.optimizer.state_dict(), before, rtol=0, atol=0)

    def test_in_a_group_that_is_changed_in_place(self, kind, name, value):
        one, other = (Alone(MIXED, dgc.DGCConfig(density=0.01), optimizer=kind, lr=0.25) for _ in range(2))
        gradients = normals(MIXED, 0)
        one.backward(gradients)
        before = one.parameter("big").clone()
        group = one.optimizer.param_groups[0]
        right, group[name] = group[name], value
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            one.optimizer.step()
        assert torch.equal(one.parameter("big"), before)
        group[name] = right  # nothing was taken: the same step can still be made
        one.optimizer.step()
        other.train(gradients)
        for parameter in MIXED:
            assert torch.equal(one.parameter(parameter), other.parameter(parameter))
        group[name] = value
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            one.backward(normals(MIXED, 1))


def test_coupled_weight_decay_is_refused_everywhere():
    message = r"^weight_decay: expected 0, got 0\.1, which torch\.optim\.Adam adds to gradients.*use dgc\.AdamW"
    model = Given(SHAPES)
    with pytest.raises(ValueError, match=message):
        dgc.Adam(model.parameters(), weight_decay=0.1)
    optimizer = dgc.Adam([model.weight])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [model.bias], "weight_decay": 0.1})
    saved = torch.optim.Adam(model.parameters(), weight_decay=0.1).state_dict()
    for kind in (dgc.Adam, dgc.AdamW):
        with pytest.raises(ValueError, match=message):
            kind(model.parameters()).load_state_dict(saved)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=message):
        optimizer.step()


def test_gradients_that_no_state_has_reduced_are_refused():
    model = Given(SHAPES)
    optimizer = dgc.AdamW(model.parameters())
    model(normals(SHAPES, 0)).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"dgc\.AdamW: expected a DGCState.*use torch\.optim\.AdamW"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
