"""dgc.attach: one call for DDP, for FSDP2 and for plain modules, with torch's optimizers or ours."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dgc
import dgc.door
from support.ddp_run import Run
from support.messages import Messages, error_of
from support.models import Given, normals
from support.ranks import run_ranks
from support.training import SHAPES, assert_replicas_equal, outcome, seed_of

CONFIG = dgc.DGCConfig(density=0.01, warmup_steps=4, warmup_densities=(0.25,))
ADAMW = {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}
SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
KINDS = ("parameters", "residual", "momentum", "exp_avg", "exp_avg_sq")


def assert_same(results, others):
    for one, other in zip(results, others, strict=True):
        for kind in KINDS:
            assert all(torch.equal(t, other[kind][name]) for name, t in one.get(kind, {}).items()), kind


def loop(model, optimizer, rank, steps):
    for step in steps:
        optimizer.zero_grad()
        model(normals(SHAPES, seed_of(step, rank))).backward()
        optimizer.step()


def by_hand(rank, world_size, name, settings):
    run = Run(CONFIG, optimizer=getattr(dgc, name), **settings)
    loop(run.ddp, run.optimizer, rank, range(8))
    return run.result()


def attached(rank, world_size, name, settings, wrapped, in_step):
    dgc.door.BUCKET_CAP_MB = 0.05
    net = Given(SHAPES, seed=0 if wrapped or rank == 0 else 7)  # rank 0's weights are broadcast
    model = DistributedDataParallel(net) if wrapped else net
    optimizer = getattr(torch.optim, name)(model.parameters(), **settings)
    given = optimizer
    optimizer = dgc.attach(model, optimizer, CONFIG, in_step=in_step)
    assert optimizer is given
    assert type(optimizer) is getattr(dgc, name)
    state = optimizer.dgc
    assert dgc.attach(model, optimizer, CONFIG).dgc is state  # again, and nothing changes
    loop(model, optimizer, rank, range(8))
    return outcome(net, state)


@pytest.mark.parametrize(("name", "settings"), [("SGD", SGD), ("AdamW", ADAMW), ("Adam", {"lr": 0.01})])
def test_torchs_optimizers_behind_ddp_and_without_it_have_the_bits_of_the_three_lines(name, settings):
    expected = run_ranks(2, by_hand, name, settings)
    for wrapped, in_step in ((True, False), (False, False), *([(True, True), (False, True)] if name == "SGD" else [])):
        assert_same(expected, run_ranks(2, attached, name, settings, wrapped, in_step))


def sharded(rank, world_size):
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 8))
    fully_shard(net, mesh=mesh["shard"])
    optimizer = dgc.attach(net, torch.optim.AdamW(net.parameters(), lr=0.01), CONFIG, mesh=mesh)
    torch.manual_seed(rank)
    x, y = torch.randn(64, 64), torch.randint(0, 8, (64,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"parameters": {n: p.full_tensor().detach() for n, p in net.named_parameters()}, "losses": losses}


def test_a_sharded_model():
    results = run_ranks(4, sharded)
    assert_replicas_equal(results)
    assert all(r["losses"][-1] < 0.3 * r["losses"][0] for r in results)


def scheduled(rank, world_size, early):
    """Schedulers that were made before and after attach, on a run that begins without DGC."""
    messages = Messages()
    net = Given(SHAPES)
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    for step in range(2):  # equal gradients on all ranks
        optimizer.zero_grad()
        net(normals(SHAPES, step)).backward()
        optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) if early else None
    dgc.attach(net, optimizer, CONFIG)
    scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for step in range(3):
            loop(net, optimizer, rank, [step])
            scheduler.step()
    assert [str(w.message) for w in warned] == []  # such as that step() of the scheduler came first
    assert optimizer.param_groups[0]["lr"] == 0.1 / 8
    return outcome(net, optimizer.dgc), messages.lines


def test_schedulers_go_on_and_momentum_is_taken_over():
    early, late = run_ranks(2, scheduled, True), run_ranks(2, scheduled, False)
    assert_same([result for result, _ in early], [result for result, _ in late])
    result, lines = early[0]
    assert "dgc: torch.optim.SGD has become dgc.SGD: the same object, groups and state" in lines
    assert any("2 of 5 parameters compressed" in line or "3 of 5 parameters compressed" in line for line in lines)
    assert result["momentum"]["b"].any()


def micro_batches(rank, world_size):
    net = Given(SHAPES)
    optimizer = dgc.attach(net, dgc.SGD(net.parameters(), **SGD), CONFIG)
    for step in range(4):
        optimizer.zero_grad()
        gradients = normals(SHAPES, seed_of(step, rank))
        with optimizer.dgc.no_sync():
            net({name: g / 2 for name, g in gradients.items()}).backward()
        net({name: g / 2 for name, g in gradients.items()}).backward()
        optimizer.step()
    return outcome(net, optimizer.dgc)


def whole_batches(rank, world_size):
    net = Given(SHAPES)
    optimizer = dgc.attach(net, dgc.SGD(net.parameters(), **SGD), CONFIG)
    loop(net, optimizer, rank, range(4))
    return outcome(net, optimizer.dgc)


def test_a_plain_module_accumulates_under_no_sync():
    assert_same(run_ranks(2, whole_batches), run_ranks(2, micro_batches))


def partly_used(rank, world_size):
    """In each step another rank uses another parameter; the rest has no gradient."""
    net = Given({"x": (200, 200), "y": (200, 200), "z": (50,)})
    optimizer = dgc.attach(net, dgc.SGD(net.parameters(), lr=0.5, momentum=0.0), dgc.DGCConfig(density=0.01))
    for step in range(6):
        optimizer.zero_grad()
        name = "xyz"[(step + rank) % 3]
        net({name: torch.ones_like(net.get_parameter(name))}).backward()
        optimizer.step()
    return outcome(net, optimizer.dgc)


def test_parameters_without_a_gradient_count_as_zero():
    results = run_ranks(2, partly_used)
    assert_replicas_equal(results)
    start = dict(Given({"x": (200, 200), "y": (200, 200), "z": (50,)}).named_parameters())
    for name in ("x", "y"):
        moved = (start[name].detach() - results[0]["parameters"][name]) / 0.5
        waiting = sum(r["residual"][name] for r in results) / 2
        assert torch.equal(moved + waiting, torch.full((200, 200), 2.0)), name  # each rank used it in two of six steps


def misuse(rank, world_size):

    def linear():
        torch.manual_seed(0)
        return nn.Linear(200, 200)

    one, other = linear(), linear()
    optimizer = dgc.attach(one, torch.optim.SGD(one.parameters(), lr=0.1), CONFIG)
    amsgrad = torch.optim.AdamW(other.parameters(), amsgrad=True)
    groups = [dict(group) for group in amsgrad.param_groups]
    mine = torch.optim.SGD([*other.parameters()][:1], lr=0.1, momentum=0.5)  # without the bias: refused once converted
    schedule = torch.optim.lr_scheduler.StepLR(mine, 1)
    before = repr(mine), mine.step, dict(mine.defaults)
    return {
        "half of it": error_of(lambda: dgc.attach(other, mine)),
        "torch's again": type(mine) is torch.optim.SGD and (repr(mine), mine.step, mine.defaults) == before,
        "no trace": schedule.optimizer is mine and not hasattr(mine, "dgc"),
        "another model": error_of(lambda: dgc.attach(other, optimizer)),
        "another density": error_of(lambda: dgc.attach(one, optimizer, replace(CONFIG, density=0.5))),
        "a number": error_of(lambda: dgc.attach(one, optimizer, 0.01)),
        "amsgrad": error_of(lambda: dgc.attach(other, amsgrad)),
        "nothing changed": type(amsgrad) is torch.optim.AdamW and groups == amsgrad.param_groups,
        "foreign": error_of(lambda: dgc.attach(other, torch.optim.SGD(linear().parameters(), lr=0.1))),
        "the same again": error_of(lambda: dgc.attach(one, torch.optim.SGD(one.parameters(), lr=0.1))),
    }


def test_each_wrong_use_says_what_to_do():
    for found in run_ranks(2, misuse):
        assert "attached to another model. Make an optimizer for this one" in found["another model"]
        assert f"density 0.5 in place of {CONFIG.density}" in found["another density"]
        assert "set_density" in found["another density"]
        assert "write dgc.DGCConfig" in found["a number"]
        assert "amsgrad" in found["amsgrad"]
        assert found["nothing changed"]
        assert "bias" in found["half of it"]
        assert found["torch's again"]
        assert found["no trace"]
        assert "named_parameters" in found["foreign"] or "optimizer: expected" in found["foreign"]
        assert "one DGCState serves a model" in found["the same again"]
