"""benchmarks/accuracy/clipping.py and its task: what is trained, on what, and what is said of it."""

import sys
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy
import pytest
import torch

import dgc
from benchmarks.accuracy import clipping, data, replicas, tasks
from benchmarks.accuracy.runs import Record, Run
from benchmarks.accuracy.variants import Technique


def test_sequences_end_together_and_coefficients_are_alike(monkeypatch):
    # Two coefficients: 1, 2, 3 and 0, 0, 6 over all frames to train on: means 2 and 2, variances 1 and 12.
    splits = {
        "train": ([numpy.array([[1.0, 2.0], [0.0, 0.0]]), numpy.array([[3.0], [6.0]])], numpy.array(["2", "9"])),
        "test": ([numpy.array([[2.0, 4.0, 1.0], [2.0, 2.0, 0.0]])], numpy.array(["1"])),
    }
    monkeypatch.setitem(sys.modules, "aeon", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "aeon.datasets", SimpleNamespace(load_japanese_vowels=lambda name: splits[name]))
    found = data.vowels.__wrapped__()
    low, high = -2 / 12**0.5, 4 / 12**0.5
    inputs = torch.tensor([[[0, 0], [-1, low], [0, low]], [[0, 0], [0, 0], [1, high]]])
    torch.testing.assert_close(found.inputs, inputs)
    torch.testing.assert_close(found.test_inputs, torch.tensor([[[0, 0], [2, 0], [-1, low]]]))
    assert found.targets.tolist() == [1, 8]
    assert found.test_targets.tolist() == [0]


def test_without_the_package_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "aeon"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModuleNotFoundError, match=r"vowels: expected the package aeon.*pip install '\.\[vowels\]'"):
        data.vowels.__wrapped__()


def test_the_recordings_are_those_that_the_package_ships():
    pytest.importorskip("aeon", reason="NOT CHECKED: aeon is not installed, so its recordings were not read")
    found = data.vowels()
    assert found.inputs.shape == (270, 29, 12)
    assert found.test_inputs.shape == (370, 29, 12)
    assert found.targets.bincount().tolist() == [30] * 9
    assert found.inputs[:, -1].abs().min() > 0  # each has a last frame


def test_three_matrices_are_large_enough_for_our_defaults():
    sizes = [p.numel() for p in tasks.TASKS["vowels"].network().parameters() if p.ndim > 1]
    assert sum(size >= dgc.DGCConfig().dense_below for size in sizes) == 3
    assert sizes == [256 * 12, 256 * 64, 256 * 64, 256 * 64, 9 * 64]


def test_methods_are_exchanges_with_clipping_and_without_at_three_learning_rates():
    high = {name: method.technique(1000) for name, method in clipping.METHODS.items() if name.endswith(", lr 4")}
    whole = {"warmup_steps": 100, "density": 0.001}
    assert high == {
        "dense, clipped, lr 4": None,
        "dense, not clipped, lr 4": None,
        "DGC 1 %, clipped, lr 4": Technique(clip_norm=0.25, warmup_steps=100, density=0.01),
        "DGC 1 %, not clipped, lr 4": Technique(warmup_steps=100, density=0.01),
        "DGC 0.1 %, clipped, lr 4": Technique(clip_norm=0.25, **whole),
        "DGC 0.1 %, not clipped, lr 4": Technique(**whole),
        "DGC 0.1 %, no masking, clipped, lr 4": Technique(clip_norm=0.25, masking=False, **whole),
        "DGC 0.1 %, no masking, not clipped, lr 4": Technique(masking=False, **whole),
        "DGC 0.1 %, no momentum correction, clipped, lr 4": Technique(
            clip_norm=0.25, masking=False, correction=False, **whole
        ),
        "DGC 0.1 %, no momentum correction, not clipped, lr 4": Technique(masking=False, correction=False, **whole),
    }
    others = [name for name in clipping.METHODS if name not in high]
    parts = [("lr 0.1", "lr 2"), ("dense", "DGC 1 %", "DGC 0.1 %"), ("clipped", "not clipped")]
    assert others == [f"{exchange}, {how}, {lr}" for lr, exchange, how in product(*parts)]
    for name, method in clipping.METHODS.items():
        assert method.task.clip_norm == (None if "not clipped" in name else 0.25)
        assert method.task.lr == float(name.split("lr ")[1])
    plan = clipping.plan(clipping.TRAINED, 2, 100)
    assert len({(run.settings, run.seed) for run in plan}) == len(plan) == 44
    assert [run.seed for run in plan[:22]] == [0] * 22


@pytest.mark.parametrize("exchange", ["dense", "DGC 0.1 %"])
def test_clipping_is_all_that_differs(monkeypatch, exchange):
    def samples():
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(64, 5, 12, generator=generator)
        return tasks.Data(inputs, inputs[:, -1, :9].argmax(1), inputs[:32], inputs[:32, -1, :9].argmax(1))

    kept = []
    train = replicas.train

    def keep(task, make, seed, steps):
        return train(task, lambda *given: kept.append(make(*given)) or kept[-1], seed, steps)

    monkeypatch.setattr(clipping, "train", keep)
    # At its first step a network has gradients of norm 0.1 to 1: 9 is no limit, 0.01 is one.
    for clip_norm, equal in ((9.0, True), (0.01, False)):
        task = replace(tasks.TASKS["vowels"], load=samples, clip_norm=clip_norm, batch_size=4)
        monkeypatch.setitem(tasks.TASKS, "vowels", task)
        for how in ("clipped", "not clipped"):
            [*_, (last, _)] = clipping.perform(Run("vowels", f"{exchange}, {how}, lr 0.1", 0, 5, ""))
            assert last == 5
        clipped, free = ([*one.network.parameters()] for one in kept[-2:])
        assert all(torch.equal(a, b) for a, b in zip(clipped, free, strict=True)) == equal


def test_runs_that_fail_are_counted(tmp_path):
    ends = {True: [97.0, 98.0, 96.0], False: [89.9, 90.0, 7.0]}
    plan = clipping.plan(clipping.TRAINED, 3, None)
    records = [Record(r, [(9, ends[clipping.METHODS[r.method].clipped][r.seed])], 1.0, "abc") for r in plan]
    clipping.tell(range(3), records, tmp_path)
    rows = {}
    for line in (tmp_path / "clipping.md").read_text().splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name] = cells
    for lr in ("0.1", "2", "4"):
        assert rows[f"dense, clipped, lr {lr}"] == ["97.00", "1.00", "", "", "96.00", "0 of 3"]
        mean, _, difference, _, *rest = rows[f"DGC 1 %, not clipped, lr {lr}"]
        assert (mean, difference, rest) == ("62.30", "-34.70", ["7.00", "2 of 3"])
    assert (tmp_path / "clipping.png").stat().st_size > 10_000


def test_replicas_are_compared_as_bits():
    task = replace(tasks.TASKS["vowels"], network=lambda: torch.nn.Linear(3, 2))
    trainer = replicas.Dense(task.network(), task)
    first, other = (replica.network.weight.data for replica in trainer.replicas[:2])
    for replica in trainer.replicas:
        replica.network.weight.data[0, 0] = float("nan")
    trainer.check()  # a run that diverged is equal on all workers
    other[1, 1] = first[1, 1].nextafter(torch.tensor(9.0))
    with pytest.raises(RuntimeError, match="equal to the bit"):
        trainer.check()
