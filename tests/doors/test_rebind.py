"""state.rebind(): parameters that are frozen, replaced, added and removed in the middle of a run."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from support import changes
from support.ddp_run import Run
from support.models import integers, normals
from support.one_rank import WIDE, memory_of, one, step
from support.ranks import run_ranks
from support.training import assert_replicas_equal


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
    run = Run(changes.CONFIG, module=changes.Layers(), **changes.SETTINGS)
    account = changes.change(run, rank)
    named = list(run.net.named_parameters())
    with pytest.raises(ValueError, match="expected the same configuration and parameters"):
        run.state.rebind(named[::-1] if rank == 1 else named)
    wrong = "expected all that the optimizer holds" if rank == 1 else "but rank 1: "
    with pytest.raises(ValueError, match=wrong):
        run.state.rebind([(n, p) for n, p in named if rank != 1 or n != "b.weight"])
    run.train(integers(changes.SHAPES, rank))  # goes on as before
    return account, run.result()


def test_nothing_is_lost_but_what_was_asked_to_go():
    accounts, runs = zip(*run_ranks(3, on_three), strict=True)
    assert_replicas_equal(accounts)
    changes.assert_nothing_lost(accounts)
    assert_replicas_equal(runs)
