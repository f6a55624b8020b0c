"""dgc.SGD against torch.optim.SGD, and what it refuses."""

import pytest
import torch
from alone import Alone
from models import Given, normals

import dgc

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


@pytest.mark.parametrize(
    ("argument", "value"),
    [("dampening", 0.1), ("maximize", True), ("differentiable", True), ("fused", True)],
)
def test_arguments_that_cannot_be_honoured_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: .*{value}"):
        dgc.SGD(Given(SHAPES).parameters(), lr=0.1, **{argument: value})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": torch.tensor(0.1)}, "lr"),
        ({"momentum": -0.5}, "momentum"),
        ({"weight_decay": -1e-4}, "weight_decay"),
        ({"nesterov": True}, "momentum"),
    ],
)
def test_values_out_of_range_are_refused(arguments, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        dgc.SGD(Given(SHAPES).parameters(), **{"lr": 0.1, **arguments})


def test_momentum_without_a_state_is_refused():
    model = Given(SHAPES)
    optimizer = dgc.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(normals(SHAPES, 0)).backward()
    with pytest.raises(RuntimeError, match="register_comm_hook"):
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


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_on_zero_gradients_makes_the_state_that_other_steps_make(weight_decay):
    # hvd.broadcast_optimizer_state() needs the same on all ranks, whether they have taken a step or not.
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": weight_decay}
    used, fresh = (Alone(SHAPES, dgc.DGCConfig(), **sgd) for _ in range(2))
    for step in range(3):
        used.train(normals(SHAPES, step))
    before = [p.detach().clone() for p in fresh.model.parameters()]
    for p in fresh.model.parameters():
        p.grad = torch.zeros_like(p)
    fresh.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(fresh.model.parameters(), before, strict=True))
    ours, theirs = used.optimizer.state_dict()["state"], fresh.optimizer.state_dict()["state"]
    assert {i: list(s) for i, s in ours.items()} == {i: list(s) for i, s in theirs.items()}
    assert (ours[0]["step"].item(), theirs[0]["step"].item()) == (3, 0)
