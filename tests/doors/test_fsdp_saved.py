"""Checkpoints of shards: resumed to the bit, on other divisions of the model, from DDP and for DDP."""

from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import dgc
from support.ddp_run import Run
from support.fsdp_run import IslandRun, shares_of
from support.messages import error_of
from support.models import integers, normals
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, seed_of

CONFIG = dgc.DGCConfig(density=0.01, momentum_masking=False)
ODD = {**SHAPES, "f": (1, 20000), "g": (5, 4000)}
SETTINGS = {"lr": 0.25, "momentum": 0.5}
KINDS = ("parameters", "residual", "momentum")


def resume(rank, world_size, folder, optimizer):
    def fresh():
        return IslandRun(2, CONFIG, optimizer=optimizer, lr=0.05, weight_decay=0.1)

    straight = fresh()
    for step in range(8):
        straight.train(normals(SHAPES, seed_of(step, rank)))
        if step == 3:
            model, optim = get_state_dict(straight.net, straight.optimizer)
            dcp.save({"model": model, "optimizer": optim}, checkpoint_id=f"{folder}/torch")
            dgc.checkpoint.save(straight.state, f"{folder}/dgc")
    resumed = fresh()
    model, optim = get_state_dict(resumed.net, resumed.optimizer)
    dcp.load({"model": model, "optimizer": optim}, checkpoint_id=f"{folder}/torch")
    set_state_dict(resumed.net, resumed.optimizer, model_state_dict=model, optim_state_dict=optim)
    dgc.checkpoint.load(resumed.state, f"{folder}/dgc")
    for step in range(4, 8):
        resumed.train(normals(SHAPES, seed_of(step, rank)))
    return straight.result(), resumed.result()


@pytest.mark.parametrize("optimizer", [dgc.SGD, dgc.AdamW])
def test_model_optimizer_and_residual_in_one_directory_resume_to_the_bit(optimizer, tmp_path):
    for straight, resumed in run_ranks(4, resume, str(tmp_path), optimizer):
        assert resumed["step"] == straight["step"] == 8
        for kind in straight.keys() - {"stats", "step", "pieces"}:
            assert all(torch.equal(tensor, resumed[kind][name]) for name, tensor in straight[kind].items()), kind


def make(places):
    """Returns a run of DDP, for places None, or of FSDP2 on nodes of so many ranks."""
    return Run(CONFIG, ODD, **SETTINGS) if places is None else IslandRun(places, CONFIG, ODD, **SETTINGS)


def save(rank, world_size, folder, places):
    run = make(places)
    for step in range(5):
        run.train(integers(ODD, seed_of(step, rank)))
    dgc.checkpoint.save(run.state, folder)
    return run.result()


def load(rank, world_size, folder, places):
    run = make(places)
    dgc.checkpoint.load(run.state, folder)
    return run.result()


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((4, 2), (2, None)),
        ((2, None), (4, 2)),
        ((4, 2), (2, 2)),
        ((2, 2), (4, 1)),
        ((2, 2), (3, 3)),
        ((4, 1), (3, None)),
    ],
)
def test_another_division_of_the_model_keeps_every_entry_and_the_mean_of_what_waits(before, now, tmp_path):
    old = run_ranks(before[0], save, str(tmp_path / "dgc"), before[1])
    new = run_ranks(now[0], load, str(tmp_path / "dgc"), now[1])
    assert all(r["step"] == 5 for r in new)
    for kind, names in (("residual", LARGE | {"f", "g"}), ("momentum", ODD)):
        for name in names:
            first, then = (shares_of(r, p, kind, name) for r, (_, p) in ((old, before), (new, now)))
            torch.testing.assert_close(sum(then) / len(then), sum(first) / len(first), rtol=1e-6, atol=1e-5)
            if len(first) == len(then):
                assert all(torch.equal(a, b) for a, b in zip(first, then, strict=True)), (kind, name)


def load_wrongly(rank, world_size, folder):
    run = IslandRun(2, CONFIG, ODD, **SETTINGS)
    own = run.state.state_dict()
    flat = torch.load(f"{folder}/flat.pt", weights_only=True)
    misplaced = {"version": 2, "ranks": {"0": own["ranks"].get("0.0", own["ranks"].get("1.1"))}}
    calls = [
        partial(run.state.load_state_dict, misplaced),
        partial(run.state.load_state_dict, flat),
        run.state.full_state_dict,
        partial(dgc.checkpoint.load, run.state, f"{folder}/dgc"),
    ]
    return [message for call in calls if (message := error_of(call))]


def save_flat(rank, world_size, folder):
    run = Run(CONFIG, ODD, **SETTINGS)
    run.train(integers(ODD, seed_of(0, rank)))
    if rank == 0:
        torch.save(run.state.state_dict(), f"{folder}/flat.pt")


def test_what_does_not_fit_is_refused(tmp_path):
    run_ranks(2, save_flat, str(tmp_path))
    run_ranks(4, save, str(tmp_path / "dgc"), 2)
    for file in (tmp_path / "dgc").glob("__3_*.distcp"):
        file.unlink()  # the second part of the second node's share
    errors = run_ranks(4, load_wrongly, str(tmp_path))
    for rank, found in enumerate(errors):
        assert len(found) == (4 if rank >= 2 else 3), found  # a flat rank's share has all elements
        assert "use dgc.checkpoint.save(state, dir)" in found[-2]
        assert "rank 1 of 2 takes over the residual of rank 1 of 2, which is missing" in found[-1]
