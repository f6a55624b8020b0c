"""Checkpoints that are written while the run goes on, with a residual in 16 bits, and a crash in the middle."""

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import dgc
from support.ddp_run import Run
from support.messages import Messages, error_of
from support.models import normals
from support.ranks import run_ranks
from support.shares import load_all
from support.training import LARGE, SHAPES, assert_equal, assert_replicas_equal, seed_of

CONFIG = dgc.DGCConfig(density=0.01)


def held_back(monkeypatch):
    """Has DCP write only when the event that is returned is set."""
    may_write = threading.Event()

    class Writer(dcp.FileSystemWriter):
        def write_data(self, plan, planner):
            assert may_write.wait(30)
            return super().write_data(plan, planner)

    monkeypatch.setattr(dcp, "FileSystemWriter", Writer)
    return may_write


def train(run, rank, steps):
    for step in steps:
        run.train(normals(SHAPES, seed_of(step, rank)))


def rest(run, folder):
    if dist.get_rank() == 0:
        Path(folder).mkdir(exist_ok=True)
        torch.save({"model": run.net.state_dict(), "optimizer": run.optimizer.state_dict()}, f"{folder}/rest.pt")


def go_on_meanwhile(rank, world_size, folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        may_write = held_back(monkeypatch)
        run = Run(CONFIG)
        train(run, rank, range(5))
        rest(run, folder)
        at_five = run.result()
        saving = dgc.checkpoint.save(run.state, f"{folder}/dgc", background=True)
        train(run, rank, range(5, 9))  # all ranks, while nothing is written
        notes = [saving.done, Path(folder, "dgc").exists()]
        may_write.set()
        saving.wait()
        notes += [saving.done, Path(folder, "dgc").exists()]
        # The second one waits for the first, and takes its name.
        may_write.clear()
        dgc.checkpoint.save(run.state, f"{folder}/later", background=True)
        threading.Timer(0.2, may_write.set).start()
        dgc.checkpoint.save(run.state, f"{folder}/later", background=True).wait()
    resumed = Run(CONFIG)
    load_all(resumed, folder)
    loaded = resumed.result()
    train(resumed, rank, range(5, 9))
    return notes, at_five, loaded, run.result(), resumed.result()


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_run_goes_on_while_its_copy_is_written(world_size, tmp_path):
    results = run_ranks(world_size, go_on_meanwhile, str(tmp_path))
    for notes, at_five, loaded, straight, resumed in results:
        assert notes == [False, False, True, True]
        assert_equal([at_five], [loaded])
        assert_equal([straight], [resumed])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dgc", "later", "rest.pt"]


def die_while_saving(rank, world_size, folder):
    run = Run(CONFIG)
    train(run, rank, range(5))
    rest(run, folder)
    dgc.checkpoint.save(run.state, f"{folder}/dgc", background=True).wait()
    torch.save(run.result(), f"{folder}/{rank}.result")
    train(run, rank, range(5, 8))
    with pytest.MonkeyPatch.context() as monkeypatch:
        may_write = held_back(monkeypatch)
        dgc.checkpoint.save(run.state, f"{folder}/dgc", background=True)
        if rank == 1:
            os._exit(0)
        may_write.set()
        error = error_of(lambda: dgc.checkpoint.save(run.state, f"{folder}/dgc"))
    torch.save(error, f"{folder}/error")
    os._exit(0)


def load(rank, world_size, folder):
    run = Run(CONFIG)
    load_all(run, folder)
    return run.result()


def test_a_crash_in_the_middle_leaves_the_last_complete_one(tmp_path):
    with pytest.raises(Exception, match=r"No such file"):
        run_ranks(2, die_while_saving, str(tmp_path), timeout=5)
    assert torch.load(tmp_path / "error").startswith("RuntimeError: dgc: the comparison of the ranks failed")
    assert (tmp_path / "dgc.partial").exists()
    before = [torch.load(tmp_path / f"{rank}.result", weights_only=False) for rank in range(2)]
    assert_equal(before, run_ranks(2, load, str(tmp_path)))


def fail_on_one_rank(rank, world_size, folder):
    messages = Messages()
    run = Run(CONFIG)
    train(run, rank, range(2))

    class Full(dcp.FileSystemWriter):
        def write_data(self, plan, planner):
            raise OSError("no space left")

    with pytest.MonkeyPatch.context() as monkeypatch:
        if rank == 1:
            monkeypatch.setattr(dcp, "FileSystemWriter", Full)
        saving = dgc.checkpoint.save(run.state, f"{folder}/dgc", background=True)
        train(run, rank, range(2, 4))
        waited = error_of(saving.wait)
        again = error_of(lambda: dgc.checkpoint.save(run.state, f"{folder}/dgc"))
    dgc.checkpoint.save(run.state, f"{folder}/dgc")
    return waited, again, messages.lines


def test_what_goes_wrong_later_is_raised_on_every_rank_and_logged(tmp_path):
    for waited, again, lines in run_ranks(2, fail_on_one_rank, str(tmp_path)):
        assert "dgc: rank 1: OSError: no space left" in waited
        assert waited == again
        assert [line for line in lines if "was not written" in line and "no space left" in line]
    assert [path.name for path in tmp_path.iterdir()] == ["dgc"]


def in_16_bits(rank, world_size, folder):
    messages = Messages()
    run = Run(CONFIG)
    train(run, rank, range(5))
    rest(run, folder)
    error = error_of(lambda: dgc.checkpoint.save(run.state, f"{folder}/dgc", residual_dtype=torch.float16))
    dgc.checkpoint.save(run.state, f"{folder}/whole")
    dgc.checkpoint.save(run.state, f"{folder}/dgc", residual_dtype=torch.bfloat16)
    saved = run.result()
    loaded = Run(CONFIG)
    load_all(loaded, folder)
    return error, saved, loaded.result(), [line for line in messages.lines if "bfloat16" in line]


def test_a_residual_in_16_bits_says_what_it_loses(tmp_path):
    results = run_ranks(2, in_16_bits, str(tmp_path))
    assert_replicas_equal([loaded for _, _, loaded, _ in results])
    for rank, (error, saved, loaded, lines) in enumerate(results):
        assert error == "ValueError: residual_dtype: expected torch.float32 or torch.bfloat16, got torch.float16"
        lost = whole = 0.0
        for name in LARGE:
            assert torch.equal(loaded["residual"][name], saved["residual"][name].bfloat16().float())
            assert torch.equal(loaded["momentum"][name], saved["momentum"][name])
            lost += float((loaded["residual"][name] - saved["residual"][name]).double().square().sum())
            whole += float(saved["residual"][name].double().square().sum())
        share = (lost / whole) ** 0.5
        assert 0.001 < share < 0.004
        assert lines == [
            f"dgc: rank {rank}: the residual is saved in torch.bfloat16, and loses {share:.2g} of its norm"
        ]
    size = {f: sum(file.stat().st_size for file in (tmp_path / f).iterdir()) for f in ("dgc", "whole")}
    elements = 2 * sum(torch.Size(SHAPES[name]).numel() for name in LARGE)
    assert abs(size["whole"] - size["dgc"] - 2 * elements) < 3000
