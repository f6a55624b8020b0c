"""state.rebind(): parameters that are frozen, replaced, added and removed in the middle of a run."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.models import Given, integers, normals
from support.one_rank import WIDE, memory_of, one, step
from support.ranks import run_ranks
from support.training import assert_replicas_equal, seed_of

CONFIG = dgc.DGCConfig(density=1 / 64, dense_below=1000)
SHAPES = {"a": (200, 100), "b": (130, 130), "bias": (50,)}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("unused", [True, False])
def test_a_replaced_parameter_is_found(gloo, set_to_none, unused):
    model, optimizer, _ = one(ddp={"find_unused_parameters": unused})
    step(model, optimizer, normals(WIDE, 0))
    model.module.a = nn.Parameter(model.module.a.detach().clone())
    optimizer.zero_grad(set_to_none=set_to_none)
    model(normals(WIDE, 1)).backward()
    with pytest.raises(RuntimeError, match=r"\ba\b"):
        optimizer.step()


def test_a_replaced_parameter_goes_on_with_what_the_old_one_had(gloo):
    straight, its, _ = one(lr=0.5, momentum=0.5, weight_decay=0.25)
    model, optimizer, state = one(lr=0.5, momentum=0.5, weight_decay=0.25)
    for i in range(3):
        step(model, optimizer, normals(WIDE, i))
        step(straight, its, normals(WIDE, i))
    net = model.module
    net.a = nn.Parameter(net.a.detach().clone())
    model = None
    model = DistributedDataParallel(net)
    assert state.rebind(model) == {}
    assert state.step == 3
    for i in range(3, 6):
        step(model, optimizer, normals(WIDE, i))
        step(straight, its, normals(WIDE, i))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), straight.parameters(), strict=True))


def test_what_is_wrong_changes_nothing(gloo):
    model, optimizer, state = one()
    step(model, optimizer, normals(WIDE, 0))
    before = memory_of(state)
    with pytest.raises(ValueError, match="got 'a' twice"):
        state.rebind([*model.module.named_parameters(), ("a", nn.Parameter(torch.zeros(3)))])
    with pytest.raises(ValueError, match="hold every parameter, but not c"):
        state.rebind([*model.module.named_parameters(), ("c", nn.Parameter(torch.zeros(3)))])
    with pytest.raises(ValueError, match=r"back: expected tensors of the new model's a, \(200, 100\), got \(3,\)"):
        state.rebind(model.module.named_parameters(), back={"a": {"residual": torch.zeros(3)}})
    with pytest.raises(ValueError, match="still there"):
        state.rebind(DistributedDataParallel(model.module))
    optimizer.zero_grad()
    model(normals(WIDE, 1)).backward()
    with pytest.raises(RuntimeError, match="rebind: expected to be called between"):
        state.rebind(model.module.named_parameters())
    state.discard(drop_gradient=False)
    assert all(x is not None for x in before)
    step(model, optimizer, normals(WIDE, 2))


def on_three(rank, world_size):
    """Freeze b, add c, unfreeze b, remove c: SGD without momentum, lr 1, so that sums are exact."""
    shapes = dict(SHAPES)
    net = Given(shapes)
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    given = {n: torch.zeros(shape) for n, shape in {**shapes, "c": (100, 90)}.items()}
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.05)
    optimizer = dgc.SGD(net.parameters(), lr=1.0)
    state = dgc.DGCState(ddp.named_parameters(), optimizer, CONFIG)
    state.register(ddp)
    frozen, gone, moved = {}, {}, None
    for i in range(20):
        if i in (4, 8, 12, 16):
            ddp = None
            if i == 4:
                net.b.requires_grad_(False)
            elif i == 8:
                net.c = nn.Parameter(torch.zeros(100, 90))
                optimizer.add_param_group({"params": [net.c]})
                start["c"] = torch.zeros(100, 90)
            elif i == 12:
                net.b.requires_grad_(True)
            else:
                moved = start["c"] - net.c.detach()
                del net.c
                optimizer.param_groups.pop()
            ddp = DistributedDataParallel(net, bucket_cap_mb=0.05)
            left = state.rebind(ddp, back=frozen if i == 12 else None)
            frozen, gone = (left, gone) if i == 4 else (frozen, left) if i == 16 else (frozen, gone)
            assert list(left) == {4: ["b"], 16: ["c"]}.get(i, [])
        live = {n: tuple(p.shape) for n, p in net.named_parameters() if p.requires_grad}
        gradients = {n: 6 * g for n, g in integers(live, seed_of(i, rank)).items()}
        for n, g in gradients.items():
            given[n] += g
        optimizer.zero_grad()
        ddp(gradients).backward()
        optimizer.step()
    went = {n: start[n] - p.detach() for n, p in net.named_parameters()} | {"c": moved}
    waits = {n: state.memory.residual_of(n).clone() for n in state.memory.compressed} | {"c": gone["c"]["residual"]}
    named = list(net.named_parameters())
    with pytest.raises(ValueError, match="expected the same configuration and parameters"):
        state.rebind(named[::-1] if rank == 1 else named)
    with pytest.raises(ValueError, match="expected all that the optimizer holds" if rank == 1 else "but rank 1: "):
        state.rebind([(n, p) for n, p in named if rank != 1 or n != "b"])
    gradients = integers(SHAPES, rank)
    optimizer.zero_grad()
    ddp(gradients).backward()  # goes on as before
    optimizer.step()
    parameters = {n: p.detach().clone() for n, p in net.named_parameters()}
    return {"parameters": parameters, "went": went, "waits": waits, "given": given, "step": state.step}


def test_nothing_is_lost_over_freezing_growing_and_removing():
    runs = run_ranks(3, on_three)
    assert_replicas_equal(runs)
    assert [run["step"] for run in runs] == [21] * 3
    for name in (*SHAPES, "c"):
        given = sum(run["given"][name].double() for run in runs)
        waits = sum(run["waits"][name].double() for run in runs) if name in runs[0]["waits"] else 0
        assert torch.equal(3 * runs[0]["went"][name].double() + waits, given), name
