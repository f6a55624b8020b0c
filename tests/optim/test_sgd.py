"""dgc.SGD against torch.optim.SGD, and what it refuses."""

import copy
import gc
import weakref

import pytest
import torch

import dgc
from support.alone import Alone, reduce
from support.models import Given, normals

SHAPES = {"weight": (64, 33), "bias": (17,), "scalar": ()}


def run_both(steps: int = 60, momentum_at=lambda step: None, **sgd):
    ours = Alone(SHAPES, dgc.DGCConfig(density=1.0), **sgd)
    model = Given(SHAPES)
    theirs = torch.optim.SGD(model.parameters(), **sgd)
    for step in range(steps):
        for optimizer in (ours.optimizer, theirs):
            if momentum_at(step) is not None:
                optimizer.param_groups[0]["momentum"] = momentum_at(step)
        gradients = normals(SHAPES, step)
        ours.train(gradients)
        theirs.zero_grad()
        model(gradients).backward()
        theirs.step()
    return [(ours.parameter(name), p.detach()) for name, p in model.named_parameters()]


@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_density_one_on_one_rank_is_torch_sgd_bit_for_bit(sgd):
    for ours, theirs in run_both(lr=0.1, **sgd):
        assert torch.equal(ours, theirs)


def test_scheduled_momentum_is_followed_bit_for_bit():
    for ours, theirs in run_both(lr=0.1, momentum=0.9, momentum_at=lambda step: 0.95 - 0.01 * (step % 10)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_weight_decay_is_that_of_torch_sgd_to_rounding(sgd):
    for ours, theirs in run_both(lr=0.1, weight_decay=0.01, **sgd):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_weight_decay_of_a_compressed_parameter_is_dense():
    # Nothing else moves the parameter: the decay reaches every entry at every step.
    one = Alone({"w": (40, 50)}, dgc.DGCConfig(density=0.001, dense_below=0), lr=0.5, momentum=0.5, weight_decay=0.25)
    p = one.parameter("w").clone().double()
    u = torch.zeros_like(p)
    for _ in range(5):
        one.train({"w": torch.zeros(40, 50)})
        u = 0.5 * u + 0.25 * p
        p = p - 0.5 * u
    torch.testing.assert_close(one.parameter("w").double(), p, rtol=1e-6, atol=0)


UNSUPPORTED = [("dampening", 0.1), ("maximize", True), ("differentiable", True), ("fused", True)]
OUT_OF_RANGE = [
    ("lr", -1.0),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("lr", torch.tensor(0.1)),
    ("lr", None),
    ("momentum", -0.5),
    ("momentum", float("nan")),
    ("weight_decay", -1e-4),
]


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED + OUT_OF_RANGE)
class TestRefused:
    def test_in_the_constructor(self, name, value):
        right = torch.optim.SGD([torch.zeros(1)]).defaults[name]
        for group in ({}, {name: right}):  # a default is refused where no group uses it too
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                dgc.SGD([{"params": Given(SHAPES).parameters(), **group}], **{"lr": 0.1, name: value})

    def test_in_a_group(self, name, value):
        model = Given(SHAPES)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            dgc.SGD([{"params": [model.weight]}, {"params": [model.bias], name: value}], lr=0.1)

    def test_in_a_group_that_is_added(self, name, value):
        model = Given(SHAPES)
        optimizer = dgc.SGD([model.weight], lr=0.1)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            optimizer.add_param_group({"params": [model.bias], name: value})
        assert [group["params"] for group in optimizer.param_groups] == [[model.weight]]

    def test_in_a_state_dict_which_changes_nothing(self, name, value):
        one, other = (Alone(SHAPES, dgc.DGCConfig(), lr=0.1, momentum=0.9, weight_decay=0.1) for _ in range(2))
        one.train(normals(SHAPES, 0))
        other.train(normals(SHAPES, 1))
        before, saved = copy.deepcopy(one.optimizer.state_dict()), other.optimizer.state_dict()
        saved["param_groups"][0].update({"lr": 0.5, name: value})
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            one.optimizer.load_state_dict(saved)
        torch.testing.assert_close(one.optimizer.state_dict(), before, rtol=0, atol=0)

    def test_in_a_group_that_is_changed_in_place(self, name, value):
        one = Alone(SHAPES, dgc.DGCConfig(density=1.0), lr=0.25, momentum=0.9)
        before, g = one.parameter("weight").clone(), normals(SHAPES, 0)
        one.backward(g)
        group = one.optimizer.param_groups[0]
        right, group[name] = group[name], value
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            one.optimizer.step()
        assert torch.equal(one.parameter("weight"), before)
        assert not one.optimizer.state
        group[name] = right  # nothing was taken: the same step can still be made
        one.optimizer.step()
        assert torch.equal(one.parameter("weight"), before - 0.25 * g["weight"])


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match=r"^momentum: expected"):
        dgc.SGD(Given(SHAPES).parameters(), lr=0.1, nesterov=True)


def test_nesterov_whose_momentum_comes_to_zero_is_plain_sgd_bit_for_bit():
    for ours, theirs in run_both(lr=0.1, momentum=0.9, nesterov=True, momentum_at=lambda s: 0.0 if s == 5 else 0.9):
        assert torch.equal(ours, theirs)


def test_nesterov_of_one_group_only_is_refused():
    model = Given(SHAPES)
    optimizer = dgc.SGD([{"params": [p]} for p in model.parameters()], lr=0.1, momentum=0.9)
    saved = optimizer.state_dict()
    saved["param_groups"][1]["nesterov"] = True
    with pytest.raises(ValueError, match=r"^nesterov: expected the same"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"^nesterov: expected the same"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "nesterov": True})
    optimizer.step()
    optimizer.param_groups[1]["nesterov"] = True
    with pytest.raises(ValueError, match=r"^nesterov: expected the same"):
        optimizer.step()


def test_momentum_without_a_state_is_refused():
    model = Given(SHAPES)
    optimizer = dgc.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(normals(SHAPES, 0)).backward()
    with pytest.raises(RuntimeError, match=r"state\.register"):
        optimizer.step()


def test_a_forgotten_hook_is_noticed():
    one = Alone(SHAPES, dgc.DGCConfig(), lr=0.1, momentum=0.9)
    one.train(normals(SHAPES, 0))
    one.optimizer.zero_grad()
    one.model(normals(SHAPES, 1)).backward()  # reduced by nobody
    before = one.parameter("bias").clone()
    with pytest.raises(RuntimeError, match="expected a backward pass since the last step"):
        one.optimizer.step()
    assert torch.equal(one.parameter("bias"), before)


def test_without_momentum_and_state_it_is_plain_sgd():
    model = Given({"w": (3,)})
    before = model.w.detach().clone()
    optimizer = dgc.SGD(model.parameters(), lr=0.5)
    model({"w": torch.tensor([1.0, 2.0, 3.0])}).backward()
    optimizer.step()
    assert torch.equal(model.w.detach(), before - 0.5 * torch.tensor([1.0, 2.0, 3.0]))


def test_a_step_without_any_gradient_does_nothing():
    one = Alone(SHAPES, dgc.DGCConfig(), lr=0.1, momentum=0.9)
    before = one.parameter("weight").clone()
    one.optimizer.step()
    assert torch.equal(one.parameter("weight"), before)


def test_a_closure_is_called_and_its_loss_returned():
    one = Alone(SHAPES, dgc.DGCConfig(density=1.0), lr=0.1, momentum=0.9)
    before = one.parameter("bias").clone()
    gradients = normals(SHAPES, 0)

    def closure():
        one.backward(gradients)
        return 1.25

    assert one.optimizer.step(closure) == 1.25
    assert torch.equal(one.parameter("bias"), before - 0.1 * gradients["bias"])


def test_a_scheduler_changes_lr_and_momentum_of_compressed_updates():
    # OneCycleLR moves both; v must follow mu as it was at each backward pass.
    one = Alone(
        {"w": (10, 10)}, dgc.DGCConfig(density=0.01, dense_below=0, momentum_masking=False), lr=0.1, momentum=0.9
    )
    u = v = torch.zeros(100)
    p = one.parameter("w").view(-1).clone()
    for step in range(6):
        group = one.optimizer.param_groups[0]
        group["momentum"], group["lr"] = 0.9 - 0.1 * step, 0.1 * (step + 1)
        g = normals({"w": (10, 10)}, step)
        one.train(g)
        u = u * (0.9 - 0.1 * step) + g["w"].view(-1)
        v = v + u
        largest = v.abs().argmax()
        p[largest] -= 0.1 * (step + 1) * v[largest]
        v[largest] = 0
    torch.testing.assert_close(one.parameter("w").view(-1), p)
    torch.testing.assert_close(one.state.memory.residual_of("w").view(-1), v)


def test_bfloat16_parameters_keep_float32_momentum():
    one = Alone(SHAPES, dgc.DGCConfig(density=0.01, dense_below=0), dtype=torch.bfloat16, lr=0.01, momentum=0.9)
    for step in range(3):
        one.train({name: g.bfloat16() for name, g in normals(SHAPES, step).items()})
    assert one.parameter("weight").dtype == torch.bfloat16
    assert one.state.memory.momentum_of("bias").dtype == torch.float32
    g = [normals(SHAPES, step)["bias"].bfloat16().float() for step in range(3)]
    expected = (0.9 * 0.9 * g[0]) + 0.9 * g[1] + g[2]
    torch.testing.assert_close(one.state.memory.momentum_of("bias"), expected)


def test_a_step_on_zero_gradients_makes_the_state_that_other_steps_make():
    # hvd.broadcast_optimizer_state() needs the same on all ranks, whether they have taken a step or not.
    used, fresh = (given_groups({"weight_decay": 0.1}, {}, {"momentum": 0.0, "weight_decay": 0.1}) for _ in range(2))
    for step in range(3):
        train_given(*used, step)
    model, optimizer, _ = fresh
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    ours, theirs = used[1].state_dict()["state"], optimizer.state_dict()["state"]
    assert {i: {name: u.shape for name, u in s.items()} for i, s in ours.items()} == {
        i: {name: u.shape for name, u in s.items()} for i, s in theirs.items()
    }
    assert [s["decay_momentum"].numel() for s in ours.values()] == [64 * 33, 0, 0]
    assert [(ours[i]["step"].item(), theirs[i]["step"].item()) for i in range(3)] == [(3, 0)] * 3
    assert (used[1].steps, optimizer.steps) == (3, 0)


def given_groups(*groups):
    """Returns a model, an optimizer with a group for each parameter, and the DGCState."""
    model = Given(SHAPES)
    groups = [{"params": [p], **group} for p, group in zip(model.parameters(), groups, strict=True)]
    optimizer = dgc.SGD(groups, lr=0.1, momentum=0.9)
    return model, optimizer, dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=1.0))


def train_given(model, optimizer, state, seed):
    optimizer.zero_grad()
    model(normals(SHAPES, seed)).backward()
    reduce(state, model)
    optimizer.step()


def test_steps_are_counted_of_every_parameter_that_gets_one():
    model = Given(SHAPES)
    optimizer = dgc.SGD(model.parameters(), lr=0.1)
    assert optimizer.steps == 0
    for names in (["weight"], ["weight", "bias"]):
        optimizer.zero_grad()
        model({name: normals(SHAPES, 0)[name] for name in names}).backward()
        optimizer.step()
    steps = {name: optimizer.state[p]["step"] for name, p in model.named_parameters() if p in optimizer.state}
    assert {name: step.item() for name, step in steps.items()} == {"weight": 2, "bias": 1}
    assert all((step.dtype, step.shape, step.device.type) == (torch.float32, (), "cpu") for step in steps.values())
    assert optimizer.steps == 2


def test_a_first_group_may_be_empty_or_gone():
    model = Given(SHAPES)
    before = model.weight.detach().clone()
    optimizer = dgc.SGD([{"params": []}, {"params": model.parameters()}], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model({"weight": torch.ones(64, 33)}).backward()
        optimizer.step()
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    assert torch.equal(model.weight.detach(), before - 1)
    optimizer.param_groups.pop(0)
    optimizer.step()
    assert torch.equal(model.weight.detach(), before - 1)
    assert optimizer.steps == 2


def test_the_optimizer_does_not_keep_its_state_alive():
    one = Alone(SHAPES, dgc.DGCConfig(), lr=0.1, momentum=0.9)
    one.train(normals(SHAPES, 0))
    memory = weakref.ref(one.state.memory)
    gc.disable()
    try:
        del one.state
        assert memory() is None
    finally:
        gc.enable()
    one.optimizer.zero_grad()
    one.model(normals(SHAPES, 1)).backward()
    before = one.parameter("bias").clone()
    with pytest.raises(RuntimeError, match="expected a DGCState to have reduced"):
        one.optimizer.step()
    assert torch.equal(one.parameter("bias"), before)


def test_a_copy_has_no_state_and_says_so():
    one = Alone(SHAPES, dgc.DGCConfig(), lr=0.1, momentum=0.9)
    one.train(normals(SHAPES, 0))
    optimizer = copy.deepcopy(one.optimizer)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="expected a DGCState to have reduced"):
        optimizer.step()
    assert optimizer.steps == one.optimizer.steps == 1


@pytest.mark.parametrize("make", [dgc.SGD, dgc.AdamW])
def test_a_learning_rate_in_a_tensor_is_refused_with_the_line_to_write(make):
    with pytest.raises(ValueError, match=r'lr: expected a finite number.*group\["lr"\] = float\(group\["lr"\]\)'):
        make([torch.nn.Parameter(torch.ones(3))], lr=torch.tensor(0.1))
