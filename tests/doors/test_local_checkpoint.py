"""dgc.checkpoint of LocalSteps: resumed in the middle of a round, on other islands, and what is refused."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch

import dgc
from support.fsdp_run import whole
from support.messages import error_of
from support.models import normals
from support.ranks import run_ranks
from support.round_run import RoundRun
from support.shares import rows
from support.training import LARGE, SHAPES, seed_of

CONFIG = dgc.DGCConfig(density=0.008, residual_decay=0.95, wire_dtype="8bit")
EVERY = 4
HALF_WAY, STEPS = 6, 14
OUTER = {
    "averaging": partial(dgc.SGD, lr=1.0),
    "DiLoCo": partial(dgc.OuterSGD, lr=0.7, momentum=0.9),
    "corrected": partial(dgc.SGD, lr=0.7, momentum=0.9, nesterov=True),
    "torch's": partial(torch.optim.SGD, lr=1.0),  # its state has numbers and None, too
}
ADAMW = {"optimizer": torch.optim.AdamW, "lr": 0.01}


def make(name, inside=None, places=1):
    return RoundRun(CONFIG, EVERY, inside, places, local={"outer": OUTER[name]}, **ADAMW)


def go_on(run, rank, steps):
    for step in steps:
        run.train(normals(SHAPES, seed_of(step, rank)))


def resume(rank, world_size, folder, names, inside=None, places=1):
    results = {}
    for name in names:
        run = make(name, inside, places)
        go_on(run, rank, range(HALF_WAY))
        dgc.checkpoint.save(run.local, f"{folder}/{name}")
        inner, middle = copy.deepcopy(run.inner.state_dict()), copy.deepcopy(run.result())
        go_on(run, rank, range(HALF_WAY, STEPS))
        run.local.finish()
        other = make(name, inside, places)
        go_on(other, rank + 7, range(3))  # what it had come to is replaced
        dgc.checkpoint.load(other.local, f"{folder}/{name}")
        other.inner.load_state_dict(inner)
        loaded = copy.deepcopy(other.result())
        go_on(other, rank, range(HALF_WAY, STEPS))
        other.local.finish()
        results[name] = middle, loaded, run.result(), other.result()
    return results


def assert_same(one, other):
    for kind in ("parameters", "start", "residual", "momentum"):
        assert one[kind].keys() == other[kind].keys()
        assert all(torch.equal(tensor, other[kind][name]) for name, tensor in one[kind].items()), kind
    assert (one["rounds"], one["position"]) == (other["rounds"], other["position"])


def assert_resumed(results):
    for result in results:
        for middle, loaded, straight, again in result.values():
            assert (middle["rounds"], middle["position"]) == (1, 2)
            assert_same(middle, loaded)
            assert_same(straight, again)
            assert not torch.equal(middle["start"]["a"], straight["start"]["a"])
            assert not torch.equal(middle["parameters"]["a"], middle["start"]["a"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders in which two islands have saved, plain, under DDP and under FSDP2, and the results of these runs."""
    found = {}
    for inside in (None, "ddp", "fsdp"):
        folder, places = tmp_path_factory.mktemp(str(inside)), 1 if inside is None else 2
        names = [*OUTER] if inside is None else ["DiLoCo", "corrected"]
        found[inside] = folder, run_ranks(2 * places, resume, str(folder), names, inside, places)
    return found


@pytest.mark.parametrize("inside", [None, "ddp", "fsdp"])
def test_a_run_goes_on_in_the_middle_of_a_round_with_the_same_bits(saved, inside):
    folder, results = saved[inside]
    assert_resumed(results)
    assert sorted(path.name for path in folder.iterdir()) == sorted(results[0])


def load(rank, world_size, folder, names, inside=None, places=1):
    found = {}
    for name in names:
        run = make(name, inside, places)
        dgc.checkpoint.load(run.local, f"{folder}/{name}")
        kept = run.local.outer.state_dict()["state"]
        found[name] = {**copy.deepcopy(run.result()), "outer": [sorted(values) for values in kept.values()]}
        go_on(run, rank // places, range(EVERY))
        run.local.finish()
        assert run.local.rounds == 3
    return found


def residuals(results, places, name):
    """Returns e of each island, flat."""
    return whole(results, len(results) // places, places, "residual", name)


def assert_taken_over(before, after, before_places, places):
    """Each island has its part of e and of the way since theta_0, so that the means stay the same."""
    islands = len(after) // places
    matrix = rows(2, islands)
    for r in range(islands):
        one = after[r * places]
        assert (one["rounds"], one["position"]) == (1, 2)
        for n in SHAPES:
            assert torch.equal(one["start"][n], before[0]["start"][n])
            ways = [before[s * before_places]["parameters"][n].double() for s in range(2)]
            # Rows add up to 1, so that weights are divided as the differences to theta_0 are.
            expected = sum(w * way for w, way in zip(matrix[r], ways, strict=True))
            torch.testing.assert_close(one["parameters"][n].double(), expected, rtol=1e-5, atol=1e-6)
    for n in LARGE:
        old, new = residuals(before, before_places, n), residuals(after, places, n)
        for r in range(islands):
            expected = sum(w * e.double() for w, e in zip(matrix[r], old, strict=True))
            torch.testing.assert_close(new[r].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("before", "ranks", "inside", "places"),
    [
        (None, 1, None, 1),
        (None, 3, None, 1),
        ("ddp", 3, None, 1),
        ("fsdp", 2, None, 1),
        (None, 4, "fsdp", 2),
        (None, 4, "ddp", 2),
        ("fsdp", 3, "fsdp", 3),
    ],
)
def test_other_islands_take_over_what_waits_and_what_was_begun(saved, before, ranks, inside, places):
    folder, results = saved[before]
    names = [name for name in results[0] if inside is None or name in ("DiLoCo", "corrected")]
    after = run_ranks(ranks, load, str(folder), names, inside, places)
    for name in names:
        middle = [result[name][0] for result in results]
        assert_taken_over(middle, [one[name] for one in after], 1 if before is None else 2, places)
    assert {tuple(keys) for keys in after[0]["DiLoCo"]["outer"]} == {("momentum_buffer",)}


def wrong_use(rank, world_size, folder):
    run, other = make("averaging"), make("averaging")
    go_on(run, rank, range(HALF_WAY))
    dgc.checkpoint.save(run.local, f"{folder}/rounds")
    dgc.checkpoint.save(run.local.state, f"{folder}/state")
    before = copy.deepcopy(other.result())
    found = {
        "rounds into a state": error_of(lambda: dgc.checkpoint.load(other.local.state, f"{folder}/rounds")),
        "a state into rounds": error_of(lambda: dgc.checkpoint.load(other.local, f"{folder}/state")),
        "another outer": error_of(lambda: dgc.checkpoint.load(make("DiLoCo").local, f"{folder}/rounds")),
        "no folder": error_of(lambda: dgc.checkpoint.load(other.local, f"{folder}/other")),
    }
    delayed = RoundRun(CONFIG, EVERY, local={"delay": 2}, **ADAMW)
    go_on(delayed, rank, range(EVERY + 1))
    found["under way"] = error_of(lambda: dgc.checkpoint.save(delayed.local, f"{folder}/delayed"))
    delayed.local.finish()
    torch.distributed.barrier()
    if rank == 0:
        file = next(Path(folder, "rounds").glob("__1_*"))
        content = bytearray(file.read_bytes())
        weights = run.local.state_dict()["ranks"]["0"]["theta_0"]["c"].numpy().tobytes()
        content[content.index(weights[:64]) + 8] ^= 1
        file.write_bytes(content)
    torch.distributed.barrier()
    found["damage"] = error_of(lambda: dgc.checkpoint.load(other.local, f"{folder}/rounds"))
    assert_same(before, other.result())
    torch.distributed.barrier()
    if rank == 0:
        file.unlink()
    torch.distributed.barrier()
    found["missing"] = error_of(lambda: dgc.checkpoint.load(other.local, f"{folder}/rounds"))
    dgc.checkpoint.load(other.local, f"{folder}/rounds", allow_missing_ranks=True)
    return found, run.result(), other.result()


def test_what_does_not_fit_is_refused_on_all_islands_and_changes_nothing(tmp_path):
    results = run_ranks(2, wrong_use, str(tmp_path))
    assert not (tmp_path / "delayed").exists()
    for found, _, _ in results:
        for name, text in {
            "rounds into a state": "expected a DGCState's, got that of a LocalSteps",
            "a state into rounds": "expected that of a LocalSteps, not of its DGCState, got one without local_steps",
            "another outer": "outer: expected the optimizer that was saved, 'SGD', got OuterSGD",
            "no folder": "expected a checkpoint, but there is none",
            "under way": "expected no round under way, got one that arrives 2 steps after it was sent",
            "damage": "rank 1: theta_0.c is not what was saved: the file is damaged",
            "missing": "rank 1 of 2 takes over the residual of rank 1 of 2, which is missing",
        }.items():
            assert text in found[name], (name, found[name])
    # The island that is missing begins at theta_0, with nothing that waits, at the others' place in the round.
    (_, before, same), (_, _, without) = results
    assert_same(before, same)
    assert (without["rounds"], without["position"]) == (1, 2)
    assert all(torch.equal(without[kind][n], before["start"][n]) for kind in ("parameters", "start") for n in SHAPES)
    assert not any(tensor.any() for tensor in without["residual"].values())


def half_precision(rank, world_size, folder):
    def bfloat16():
        run = make("DiLoCo")
        run.net.bfloat16()
        run.inner = torch.optim.SGD(run.net.parameters(), lr=0.125)
        run.local = dgc.LocalSteps(run.net, run.inner, CONFIG, every=EVERY, outer=OUTER["DiLoCo"])
        return run

    run, other = bfloat16(), bfloat16()
    go_on(run, rank, range(HALF_WAY))
    before = copy.deepcopy(run.result())
    writing = dgc.checkpoint.save(run.local, f"{folder}/rounds", background=True)
    go_on(run, rank, range(HALF_WAY, STEPS))  # which is not in what is written
    writing.wait()
    dgc.checkpoint.load(other.local, f"{folder}/rounds")
    assert other.net.a.dtype == torch.bfloat16
    return before, other.result()


def test_weights_of_16_bits_keep_their_bits_where_a_thread_writes_them(tmp_path):
    for before, after in run_ranks(2, half_precision, str(tmp_path)):
        assert_same(before, after)
