"""Public bug reports, numbers 10, 11, 16, 20 and 22: runs that are saved, copied, resumed and dropped.

The numbers are those of docs/reliability.md, "What users' loops do".
"""

import copy
import dataclasses
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.alone import Alone
from support.ddp_run import Run
from support.models import normals
from support.one_rank import CONFIG, WIDE, one, step
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, seed_of

# 10: a run that is resumed without its residual


def test_an_optimizer_that_goes_on_without_its_state_is_warned_of_once(gloo):
    model, optimizer, state = one()
    for i in range(3):
        step(model, optimizer, normals(WIDE, i))
    saved, residual = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(state.state_dict())
    model, optimizer, state = one()
    optimizer.load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"has taken 3 steps, and this DGCState none.*dgc\.checkpoint\.save"):
        step(model, optimizer, normals(WIDE, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, normals(WIDE, 4))
        model, optimizer, state = one()
        optimizer.load_state_dict(saved)
        state.load_state_dict(residual)
        step(model, optimizer, normals(WIDE, 3))
    assert state.step == 4


# 11: one file of all ranks


def one_file(rank, world_size, folder):
    run = Run(dgc.DGCConfig(density=0.008), lr=0.1, momentum=0.9)
    for i in range(3):
        run.train(normals(SHAPES, seed_of(i, rank)))
    full = run.state.full_state_dict()
    assert bool(full) == (rank == 0)
    if rank == 0:
        torch.save(full, f"{folder}/all.pt")
        numbers = sum(
            t.numel() for share in full["ranks"].values() for k in ("momentum", "residual") for t in share[k].values()
        )
        pickled = [pickle.dumps(t) for t in full["ranks"]["0"]["residual"].values()]
        assert sum(map(len, pickled)) < 1.1 * run.state.memory.residual.nbytes
        buffer = io.BytesIO()
        torch.save(full, buffer)
        assert len(buffer.getvalue()) < 4.2 * numbers
    dist.barrier()
    loaded = torch.load(f"{folder}/all.pt", weights_only=True)
    fresh = Run(dgc.DGCConfig(density=0.008), lr=0.1, momentum=0.9)
    fresh.state.load_state_dict(loaded)
    for i in (3, 4):
        fresh.net.load_state_dict(run.net.state_dict())
        run.train(normals(SHAPES, seed_of(i, rank)))
        fresh.train(normals(SHAPES, seed_of(i, rank)))
        assert torch.equal(run.state.memory.residual, fresh.state.memory.residual)
    return run.result()


def test_one_file_of_all_ranks_loads_on_any_number(tmp_path):
    run_ranks(3, one_file, str(tmp_path))
    loaded = torch.load(tmp_path / "all.pt", weights_only=True)
    alone = Alone(SHAPES, dgc.DGCConfig(density=0.008), lr=0.1, momentum=0.9)
    alone.state.load_state_dict(loaded)
    shares = [loaded["ranks"][str(rank)] for rank in range(3)]
    for name in LARGE:
        mean = sum(share["residual"][name] for share in shares) / 3
        torch.testing.assert_close(alone.state.memory.residual_of(name), mean)
    assert alone.state.step == 3
    with pytest.raises(ValueError, match="expected at least one, got none"):
        alone.state.load_state_dict({"version": 2, "ranks": {}})
    with pytest.raises(ValueError, match=r"\['ranks'\]\['1'\]: expected the share of that rank, got 0"):
        alone.state.load_state_dict({"version": 2, "ranks": {"1": shares[0]}})
    with pytest.raises(ValueError, match=r"\['ranks'\]: expected shares by rank, got 7"):
        alone.state.load_state_dict({"version": 2, "ranks": 7})


# 16: copies


def saved_whole(rank, world_size, folder):
    run = Run(dgc.DGCConfig(density=0.008), lr=0.1, momentum=0.9)
    for i in range(3):
        run.train(normals(SHAPES, seed_of(i, rank)))
    torch.save({"model": run.net, "optimizer": run.optimizer, "state": run.state}, f"{folder}/{rank}.pt")
    loaded = torch.load(f"{folder}/{rank}.pt", weights_only=False)
    other = Run.__new__(Run)
    other.net, other.optimizer, other.state = loaded["model"], loaded["optimizer"], loaded["state"]
    other.ddp = DistributedDataParallel(other.net, bucket_cap_mb=0.05)
    other.state.register(other.ddp)
    for i in range(3, 6):
        run.train(normals(SHAPES, seed_of(i, rank)))
        other.train(normals(SHAPES, seed_of(i, rank)))
    assert run.state.step == other.state.step == 6
    for name in LARGE:
        assert torch.equal(run.net.get_parameter(name), other.net.get_parameter(name))
        assert torch.equal(run.state.memory.residual_of(name), other.state.memory.residual_of(name))


def test_model_optimizer_and_state_pickle_together(tmp_path):
    run_ranks(2, saved_whole, str(tmp_path))


def test_an_unpickled_ddp_module_is_registered_again(gloo):
    """DDP pickles the list of its hooks, and unpickles without them."""
    model, optimizer, state = one()
    step(model, optimizer, normals(WIDE, 0))
    file = io.BytesIO()
    torch.save((model, optimizer, state), file)
    file.seek(0)
    model, optimizer, state = torch.load(file, weights_only=False)
    for i in range(2):
        state.register(model)  # the second time there is nothing to do
        step(model, optimizer, normals(WIDE, 1 + i))
    assert state.step == 3
    assert len(model._comm_hooks) == 1


def test_a_copy_of_a_model_carries_no_second_memory(gloo):
    model, optimizer, state = one()
    step(model, optimizer, normals(WIDE, 0))
    torch.save(model, io.BytesIO())  # with the hook, as torch's own tests do
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    (_, its) = averaged.module._comm_hooks[0]
    assert its is not state
    assert vars(its) == {}
    with pytest.raises(RuntimeError, match=r"copy\.deepcopy\(state\.state_dict\(\)\)"):
        its.residual_norm  # noqa: B018
    with pytest.raises(RuntimeError, match=r"make a DGCState of its parameters"):
        dgc.dgc_hook(its, None)
    step(model, optimizer, normals(WIDE, 1))
    assert state.step == 2


# 20: memory of states that are dropped


@pytest.mark.parametrize("optimizer", [dgc.SGD, torch.optim.SGD])
def test_a_dropped_state_frees_its_memory_without_the_garbage_collector(gloo, optimizer):
    sgd = {"lr": 0.1, "momentum": 0.5} if optimizer is dgc.SGD else {"lr": 0.1}
    gc.collect()
    gc.disable()
    try:
        model, optimizer, state = one(optimizer=optimizer, **sgd)
        for i in range(2):
            step(model, optimizer, normals(WIDE, i))
        residual = weakref.ref(state.memory.residual)
        del model
        assert residual() is not None
        del state
        assert residual() is None
        del optimizer
    finally:
        gc.enable()


# 22: plain figures


def test_stats_are_plain_numbers(gloo):
    model, optimizer, state = one()
    step(model, optimizer, normals(WIDE, 0))
    figures = dataclasses.asdict(state.stats)
    assert len(pickle.dumps(figures)) < 2000
    assert state.residual_norm == pytest.approx(float(state.memory.residual.double().norm()))


def test_a_second_state_of_an_optimizer_is_noticed_and_a_dropped_one_is_not(gloo):
    model, optimizer, state = one()
    step(model, optimizer, normals(WIDE, 0))
    second = dgc.DGCState(model.named_parameters(), optimizer, CONFIG)
    with pytest.raises(RuntimeError, match="another DGCState, which was made later"):
        model(normals(WIDE, 1)).backward()
    del second
    model = DistributedDataParallel(model.module)
    state.register(model)
    step(model, optimizer, normals(WIDE, 2))
    assert state.step == 2


def test_loading_a_state_forgets_the_momentum_of_a_dense_run(gloo):
    """The optimizer's file is of a dense run, the state's of a later one with DGC: the later one counts."""
    model, optimizer, state = one()
    step(model, optimizer, normals(WIDE, 0))
    saved = copy.deepcopy(state.state_dict())
    dense = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    model.module.a.grad = normals(WIDE, 7)["a"]
    dense.step()
    optimizer.load_state_dict(dense.state_dict())
    state.load_state_dict(saved)
    assert torch.equal(state.state_dict()["ranks"]["0"]["momentum"]["a"], saved["ranks"]["0"]["momentum"]["a"])
