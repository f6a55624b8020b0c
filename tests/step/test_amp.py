"""Loss scaling: the scaled run has the bits of the unscaled one, and a step that is left out is left out everywhere."""

import logging
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.alone import reduce
from support.ddp_run import Run
from support.models import Given, integers, normals
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_conserved, assert_replicas_equal, seed_of


class Scaled:
    """One rank without DDP, with a GradScaler whose scale doubles every other step."""

    def __init__(self, config=None, scaler=True, late=False, dtype=torch.float32, optimizer=None, **sgd):
        self.model = Given(SHAPES, dtype=dtype)
        make = optimizer or dgc.SGD
        defaults = {"lr": 0.5} if make is dgc.AdamW else {"lr": 0.5, "momentum": 0.5}
        self.optimizer = make(self.model.parameters(), **{**defaults, **sgd})
        self.scaler = GradScaler("cpu", init_scale=2.0**16, growth_interval=2, enabled=scaler)
        config = config or dgc.DGCConfig(density=0.008)
        self.state = dgc.DGCState(
            self.model.named_parameters(), self.optimizer, config, grad_scaler=self.scaler, late=late
        )

    def train(self, gradients):
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(gradients)).backward()
        reduce(self.state, self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def equals(self, other):
        return {
            "parameters": all(torch.equal(p, other.model.get_parameter(n)) for n, p in self.model.named_parameters()),
            "residual": torch.equal(self.state.memory.residual, other.state.memory.residual),
            "kinds": all(torch.equal(x, other.state.memory.kinds[kind]) for kind, x in self.state.memory.kinds.items()),
            "step": self.state.step == other.state.step,
        }


ALL = {"parameters": True, "residual": True, "kinds": True, "step": True}
RECIPES = [
    (dgc.DGCConfig(density=0.008), {}),
    (dgc.DGCConfig(density=0.008, clip_norm=30.0), {"nesterov": True, "weight_decay": 0.01}),
    (dgc.DGCConfig(density=0.008, warmup_steps=6, warmup_densities=(0.25, 0.05), wire_dtype=torch.bfloat16), {}),
    (dgc.DGCConfig(density=0.008, clip_norm=30.0), {"optimizer": dgc.AdamW, "lr": 0.01}),
]


@pytest.mark.parametrize(("config", "sgd"), RECIPES, ids=["plain", "clipped", "warm-up", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
def test_a_scale_that_changes_changes_no_bit(config, sgd, dtype, late):
    scaled, plain = Scaled(config, dtype=dtype, late=late, **sgd), Scaled(config, scaler=False, dtype=dtype, **sgd)
    for step in range(12):
        scaled.state.dense = plain.state.dense = step in (8, 9)
        gradients = {name: g.to(dtype) for name, g in normals(SHAPES, step).items()}
        scaled.train(gradients)
        plain.train(gradients)
    assert scaled.scaler.get_scale() == 2.0**22
    assert scaled.equals(plain) == ALL


def test_a_scale_that_is_no_power_of_two_changes_no_more_than_rounding():
    scaled, plain = Scaled(momentum=0.9), Scaled(scaler=False, momentum=0.9)
    scaled.scaler = GradScaler("cpu", init_scale=1000.0, growth_factor=1.3, growth_interval=1)
    scaled.state.grad_scaler = scaled.scaler
    for step in range(5):
        scaled.train(normals(SHAPES, step))
        plain.train(normals(SHAPES, step))
    for name in SHAPES:
        torch.testing.assert_close(scaled.model.get_parameter(name), plain.model.get_parameter(name))


@pytest.mark.parametrize("bad", ["a", "e", "b"])
@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
def test_skipped_steps_do_not_pile_up(bad, late, caplog):
    skipping, straight = Scaled(late=late), Scaled()
    skipping.train(normals(SHAPES, 0))
    straight.train(normals(SHAPES, 0))
    before = skipping.state.memory.residual.clone(), skipping.state.memory.momentum.clone()
    with caplog.at_level(logging.INFO, "dgc"):
        for step in range(8):
            gradients = normals(SHAPES, 1)
            gradients[bad].view(-1)[3] = (math.inf, -math.inf, math.nan)[step % 3]
            skipping.train(gradients)
        assert (
            skipping.state.state_dict()["ranks"]["0"]["step"] == 1
        )  # right after a skipped step: nothing is outstanding
    skipping.train(normals(SHAPES, 2))
    straight.train(normals(SHAPES, 2))
    assert (skipping.state.step, skipping.state.stats.skipped) == (2, 8)
    assert skipping.scaler.get_scale() == 2.0**8
    # Dense parameters took the finite steps and no other; compressed ones hold what was finite of each.
    for name in SHAPES.keys() - LARGE:
        assert torch.equal(skipping.model.get_parameter(name), straight.model.get_parameter(name))
    assert skipping.state.memory.residual.isfinite().all()
    assert not torch.equal(skipping.state.memory.residual, before[0])
    assert skipping.state.memory.momentum.isfinite().all()
    what = f"{bad} on rank 0" if bad in LARGE else f"the average of dense parameters {bad}"
    assert caplog.text.count(f"dgc: step 1 left out on all ranks, gradients not finite: {what}") == 8
    assert "WARNING" not in caplog.text


def test_momentum_and_residual_of_a_skipped_step_are_those_of_its_finite_entries():
    one = Scaled()
    one.train(normals(SHAPES, 0))
    u, v = one.state.memory.momentum_of("c").clone(), one.state.memory.residual_of("c").clone()
    gradients = normals(SHAPES, 1)
    gradients["c"][5, 6] = math.nan
    parameters = [p.detach().clone() for p in one.model.parameters()]
    one.train(gradients)
    one.state.state_dict()
    new = 0.5 * u + gradients["c"]
    finite = new.isfinite()
    assert torch.equal(one.state.memory.momentum_of("c"), torch.where(finite, new, u))
    assert torch.equal(one.state.memory.residual_of("c"), torch.where(finite, v + new, v))
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), parameters, strict=True))


def test_a_residual_that_overflows_skips_too():
    one = Scaled()
    one.train(normals(SHAPES, 0))
    one.state.memory.residual_of("e").view(-1)[9] = 3.4e38
    one.state.memory.momentum_of("e").view(-1)[9] = 3.4e38
    one.train({**normals(SHAPES, 1), "e": torch.zeros(SHAPES["e"])})
    one.state.state_dict()  # reads what the scaler has left out
    assert one.state.stats.skipped == 1
    assert one.state.memory.residual_of("e").view(-1)[9] == 3.4e38


def test_an_average_that_overflows_at_the_scale_skips_everywhere():
    one = Scaled(momentum=0.0, optimizer=torch.optim.SGD)
    one.train(integers(SHAPES, 0))
    start = [p.detach().clone() for p in one.model.parameters()]
    one.state.memory.residual_of("a").view(-1)[7] = 3e36  # times 2**16 is more than a float32 holds
    one.train(integers(SHAPES, 1))
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), start, strict=True))
    assert (one.state.stats.skipped, one.state.pending) == (0, True)  # reading changes nothing
    one.state.state_dict()  # reads what the scaler has left out
    assert one.state.stats.skipped == 1
    assert one.state.memory.residual_of("a").view(-1)[7] == 3e36


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_of_torch_skip_too(make):
    model = Given(SHAPES)
    optimizer = make(model.parameters(), lr=0.5)
    scaler = GradScaler("cpu", init_scale=8.0)
    with pytest.warns(UserWarning, match="gets averages") if make is torch.optim.Adagrad else nullcontext():
        state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=0.008), grad_scaler=scaler)
    before = model.a.detach().clone()
    for step in range(3):
        gradients = integers(SHAPES, step)
        if step == 0:
            gradients["a"][0, 0] = math.nan
        optimizer.zero_grad()
        scaler.scale(model(gradients)).backward()
        reduce(state, model)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model.a, before) == (step == 0)
    assert (state.step, state.stats.skipped) == (2, 1)


def test_a_scaler_of_which_dgc_does_not_know_is_refused():
    one = Scaled(scaler=False)
    scaler = GradScaler("cpu")
    scaler.scale(one.model(normals(SHAPES, 0))).backward()
    reduce(one.state, one.model)
    with pytest.raises(RuntimeError, match=r"DGCState\(\.\.\., grad_scaler=scaler\)"):
        scaler.step(one.optimizer)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.filterwarnings("ignore:dgc. Adagrad gets averages")
def test_a_fused_optimizer_would_step_anyway_and_is_refused(make):
    model = Given(SHAPES)
    optimizer = make(model.parameters(), lr=0.1, fused=True)
    with pytest.raises(ValueError, match=r"expected (SGD|Adagrad)\(fused=False\) with a GradScaler"):
        dgc.DGCState(model.named_parameters(), optimizer, grad_scaler=GradScaler("cpu"))


def test_unscaling_first_and_gradient_accumulation_change_no_bit():
    scaled, plain = Scaled(), Scaled(scaler=False)
    for step in range(6):
        for one in (scaled, plain):
            one.optimizer.zero_grad()
            one.scaler.scale(one.model(normals(SHAPES, 2 * step))).backward()  # as under no_sync()
            one.scaler.scale(one.model(normals(SHAPES, 2 * step + 1))).backward()
            reduce(one.state, one.model)
            one.scaler.unscale_(one.optimizer)
            one.scaler.step(one.optimizer)
            one.scaler.update()
    assert scaled.equals(plain) == ALL


def test_grad_scaler_has_to_be_one():
    model = Given(SHAPES)
    with pytest.raises(TypeError, match=r"grad_scaler: expected a torch\.amp\.GradScaler or None, got float"):
        dgc.DGCState(model.named_parameters(), dgc.SGD(model.parameters()), grad_scaler=65536.0)


def test_a_forgotten_step_is_still_an_error():
    one = Scaled()
    one.model(normals(SHAPES, 0)).backward()
    reduce(one.state, one.model)
    with pytest.raises(RuntimeError, match=r"no_sync\(\)"):
        reduce(one.state, one.model)


# several ranks


SIGNS = {"optimizer": dgc.AdamW, "betas": (0.0, 0.0), "eps": 2.0**-60, "weight_decay": 0.0}


def overflow(rank, world_size, where, late, settings):
    scaler = GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    run = Run(lr=0.25, state={"grad_scaler": scaler, "late": late}, **settings)
    total = {n: torch.zeros(s) for n, s in SHAPES.items()}
    scales = []
    for step in range(14):
        g = integers(SHAPES, seed_of(step, rank))
        bad = rank == 1 and step in (0, 4, 5, 11)
        for n in LARGE:
            added = 0.25 * g[n].sign() if "betas" in settings else g[n].clone()
            if bad and n == where:
                added.view(-1)[7] = 0
            total[n] += added
        if bad:
            g[where].view(-1)[7] = math.inf
        run.optimizer.zero_grad()
        scaler.scale(run.ddp(g)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    run.state.state_dict()
    return {**run.result(), "total": total, "scales": scales}


@pytest.mark.parametrize("where", ["a", "c", "e", "b"])
@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
def test_an_overflow_on_one_rank_skips_on_all_and_loses_nothing(where, late):
    results = run_ranks(2, overflow, where, late, {"momentum": 0.0})
    assert_conserved(results)
    assert results[0]["scales"] == results[1]["scales"]
    assert results[0]["scales"][-1] != 2.0**16
    assert [(r["step"], r["stats"].skipped) for r in results] == [(10, 4)] * 2


@pytest.mark.parametrize(("where", "late"), [("a", True), ("b", False)])
def test_an_overflow_loses_no_direction_of_adamw(where, late):
    results = run_ranks(2, overflow, where, late, SIGNS)
    assert_conserved(results, factor=2)  # lr is in what waits
    assert all(r[kind][n].isfinite().all() for r in results for kind in ("exp_avg", "exp_avg_sq") for n in SHAPES)
    assert [(r["step"], r["stats"].skipped) for r in results] == [(10, 4)] * 2


def scale_differently(rank, world_size):
    run = Run()
    run.state.grad_scaler = scaler = GradScaler("cpu", init_scale=2.0 ** (8 + rank))
    before = run.net.a.detach().clone()
    try:
        scaler.scale(run.ddp(normals(SHAPES, rank))).backward()
    except RuntimeError as error:
        run.state.discard(drop_gradient=False)
        return str(error), torch.equal(before, run.net.a)
    return "no error", False


def test_ranks_that_scale_differently_are_named():
    for rank, (message, unchanged) in enumerate(run_ranks(2, scale_differently)):
        assert f"payload of rank {1 - rank}: " in message
        assert "its DGC configuration or its loss scale differ" in message
        assert unchanged


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(150, 200), nn.ReLU(), nn.Linear(200, 150))


def autocast(rank, world_size, dtype, parameters):
    """Trains with autocast, and where that is float16 with a scale that overflows at first."""
    net = Net().to(parameters)
    ddp = DistributedDataParallel(net)
    optimizer = dgc.SGD(ddp.parameters(), lr=0.5, momentum=0.9)
    scaler = GradScaler("cpu", init_scale=2.0**30, growth_interval=10, enabled=dtype == torch.float16)
    config = dgc.DGCConfig(density=0.05)
    state = dgc.DGCState(ddp.named_parameters(), optimizer, config, grad_scaler=scaler)
    ddp.register_comm_hook(state, dgc.dgc_hook)
    torch.manual_seed(1 + rank)
    x = torch.randn(64, 150, dtype=parameters)
    losses, scales = [], []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = (ddp(x) - x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
        scales.append(scaler.get_scale())
    state.state_dict()
    waiting = bool(state.memory.residual.isfinite().all())
    parts = {n: p.detach() for n, p in net.named_parameters()}
    return {"parameters": parts, "losses": losses, "scales": scales, "skipped": state.stats.skipped, "finite": waiting}


@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["float16", "bfloat16", "bfloat16 parameters"],
)
def test_autocast(dtype, parameters):
    results = run_ranks(2, autocast, dtype, parameters)
    assert_replicas_equal(results)
    assert results[0]["scales"] == results[1]["scales"]
    assert all(r["finite"] for r in results)
    assert results[0]["losses"][-1] < 0.5 * results[0]["losses"][0]
    assert (results[0]["skipped"] > 3) == (dtype == torch.float16)


def two_models(rank, world_size):
    """A scaler for two models with an optimizer each, as of a GAN; one of them gets a NaN on one rank."""
    scaler = GradScaler("cpu", init_scale=8.0)
    runs = [Run(momentum=0.0, lr=0.25) for _ in range(2)]
    for run in runs:
        run.state.grad_scaler = scaler
    moved = []
    for step in range(3):
        before = [run.net.a.detach().clone() for run in runs]
        losses = []
        for i, run in enumerate(runs):
            g = integers(SHAPES, seed_of(step, rank) + 500 * i)
            if (rank, step, i) == (1, 1, 0):
                g["e"][0, 0] = math.nan
            run.optimizer.zero_grad()
            losses.append(run.ddp(g))
        for run, loss in zip(runs, losses, strict=True):
            scaler.scale(loss).backward()
            scaler.step(run.optimizer)
        scaler.update()
        moved.append([not torch.equal(run.net.a, a) for run, a in zip(runs, before, strict=True)])
    return {"moved": moved, "parameters": dict(runs[0].net.named_parameters()), "scale": scaler.get_scale()}


def test_each_optimizer_of_a_scaler_skips_for_itself_on_all_ranks_alike():
    results = run_ranks(2, two_models)
    assert_replicas_equal(results)
    assert [r["moved"] for r in results] == [[[True, True], [False, True], [True, True]]] * 2
    assert [r["scale"] for r in results] == [4.0, 4.0]
