"""DDP with nodes as workers: checkpoints, and the one file that rank 0 writes."""

import os
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dgc
from support.ddp_run import Run
from support.fsdp_run import IslandRun, shares_of
from support.messages import error_of
from support.models import integers
from support.node_run import NodeRun
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_replicas_equal, assert_same, seed_of

CONFIG = dgc.DGCConfig(density=0.01, momentum_masking=False)
SETTINGS = {"lr": 0.25, "momentum": 0.5}


def make(kind, places):
    return Run(CONFIG, **SETTINGS) if places is None else kind(places, CONFIG, **SETTINGS)


def save(rank, world_size, folder, kind, places):
    run = make(kind, places)
    for step in range(5):
        run.train(integers(SHAPES, seed_of(step, rank)))
    dgc.checkpoint.save(run.state, folder)
    return run.result()


def load(rank, world_size, folder, kind, places):
    run = make(kind, places)
    dgc.checkpoint.load(run.state, folder)
    loaded = run.result()
    for step in range(5, 8):
        run.train(integers(SHAPES, seed_of(step, rank)))
    return loaded, run.result()


@pytest.mark.parametrize(
    ("before", "now"),
    [((4, NodeRun, 2), (4, IslandRun, 2)), ((4, NodeRun, 2), (3, Run, None)), ((2, Run, None), (4, NodeRun, 2))],
    ids=["to FSDP2", "to DDP", "from DDP"],
)
def test_checkpoints_go_between_nodes_shards_and_flat_ranks(before, now, tmp_path):
    old = run_ranks(before[0], save, str(tmp_path / "dgc"), *before[1:])
    both = run_ranks(now[0], load, str(tmp_path / "dgc"), *now[1:])
    new = [loaded for loaded, _ in both]
    assert_replicas_equal([later for _, later in both])
    for kind in ("residual", "momentum"):
        for name in LARGE:
            first, then = shares_of(old, before[2], kind, name), shares_of(new, now[2], kind, name)
            torch.testing.assert_close(sum(then) / len(then), sum(first) / len(first), rtol=1e-6, atol=1e-5)
            if len(first) == len(then):
                assert all(torch.equal(a, b) for a, b in zip(first, then, strict=True)), (kind, name)


def save_whole(rank, world_size, file):
    run = NodeRun(2, CONFIG, optimizer=dgc.AdamW, lr=0.05)
    for step in range(3):
        run.train(integers(SHAPES, seed_of(step, rank)))  # whose sums are the same in any order of DDP's buckets
    torch.set_default_dtype(torch.bfloat16)  # which is not that of memory
    whole = run.state.full_state_dict()
    torch.set_default_dtype(torch.float32)
    assert bool(whole) == (rank == 0)
    if rank == 0:
        torch.save({"dgc": whole, "net": run.net.state_dict(), "optimizer": run.optimizer.state_dict()}, file)
    run.train(integers(SHAPES, seed_of(3, rank)))
    return run.result()


def load_whole(rank, world_size, file, make):
    saved = torch.load(file, weights_only=True)
    run = make()
    run.net.load_state_dict(saved["net"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.state.load_state_dict(saved["dgc"])
    before = run.result()
    run.train(integers(SHAPES, seed_of(3, rank)))
    return before, run.result()


def test_one_file_of_rank_0_has_all_nodes(tmp_path):
    file = str(tmp_path / "whole.pt")
    went_on = run_ranks(4, save_whole, file)
    again = partial(NodeRun, 2, CONFIG, optimizer=dgc.AdamW, lr=0.05)
    assert_same(went_on, [after for _, after in run_ranks(4, load_whole, file, again)])
    # Where each rank is a worker, the mean of what waits is the same.
    saved = torch.load(file, weights_only=True)["dgc"]["ranks"]
    assert sorted(saved) == ["0.0", "0.1", "1.0", "1.1"]
    flat = run_ranks(4, load_whole, file, partial(Run, CONFIG, optimizer=dgc.AdamW, lr=0.05))
    assert_replicas_equal([after for _, after in flat])
    for name in LARGE:
        nodes = [torch.cat([saved[f"{node}.{place}"]["residual"][name] for place in range(2)]) for node in range(2)]
        waits = sum(before["residual"][name] for before, _ in flat) / 4
        torch.testing.assert_close(waits, sum(nodes) / 2, rtol=1e-6, atol=1e-6)
        assert waits.any()


def die_while_saving(rank, world_size, folder):
    """Rank 0 dies when all parts are written, and the other ranks wait for its word."""
    run = NodeRun(2, CONFIG, **SETTINGS)
    run.train(integers(SHAPES, seed_of(0, rank)))
    if rank == 0:
        dcp.FileSystemWriter.finish = lambda *args, **kwargs: os._exit(0)
    begin = time.monotonic()
    error = error_of(lambda: dgc.checkpoint.save(run.state, Path(folder, "dgc")))
    Path(folder, str(rank)).write_text(f"{time.monotonic() - begin:.1f} {error}")
    os._exit(0)  # nothing can be said over a group that has lost a rank


def test_a_rank_that_dies_while_all_save_is_an_error_on_the_others(tmp_path):
    with suppress(FileNotFoundError):
        run_ranks(4, die_while_saving, str(tmp_path))
    for rank in (1, 2, 3):
        seconds, error = (tmp_path / str(rank)).read_text().split(" ", 1)
        assert float(seconds) < 10
        assert "a rank has gone" in error
