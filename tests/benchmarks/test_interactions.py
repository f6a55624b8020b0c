"""benchmarks/accuracy/interactions.py: that each factor is what it says, and differences of differences by hand."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.accuracy import data, interactions, replicas, runs, tasks
from benchmarks.accuracy.interactions import DECAY, FACTORS, FactoredDense, FactoredDGC, cells, name_of

NONE = frozenset()
STEPS = 9


@pytest.fixture(autouse=True)
def _one_thread():
    """Keeps networks this small on one thread, as the program does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def samples():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 1, 14, 14, generator=generator)
    labels = images[:, 0, 4:10, 4:10].flatten(1)[:, :10].argmax(1)
    return data.Data(images[:50], labels[:50], images[50:], labels[50:])


TASK = replace(tasks.TASKS["mnist"], load=samples, batch_size=4)


class Trained:
    """A training that keeps its trainer, and the parameters after every step."""

    def __init__(self, make, *factors, watch=None):
        self.weights = []

        def start(network, task):
            self.trainer = make(network, task, cell=frozenset(factors), steps=STEPS)
            step = self.trainer.learn

            def learn(batches):
                step(batches)
                self.weights.append([p.detach().clone() for p in self.trainer.replicas[0].network.parameters()])

            self.trainer.learn = learn
            if watch:
                watch(self.trainer.replicas[0].network)
            return self.trainer

        replicas.train(TASK, start, 0, STEPS)


def furthest(one, other):
    return max((a - b).norm() / (1e-9 + b.norm()) for a, b in zip(one.weights[-1], other.weights[-1], strict=True))


@pytest.mark.parametrize("make", [FactoredDense, FactoredDGC])
def test_factors_that_change_no_value_leave_the_weights(make, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = Trained(make)
    for factor in ("recomputation", "torch.compile", "EMA"):
        one = Trained(make, factor)
        assert all(torch.equal(a, b) for a, b in zip(one.weights[-1], plain.weights[-1], strict=True)), factor
    last = Trained(make, "channels_last")
    assert furthest(last, plain) < 1e-3  # sums in another order
    for factor in ("bf16 autocast", "label smoothing", "progressive resizing"):
        assert furthest(Trained(make, factor), plain) > 1e-3, factor
    # All at once, a step of each kind.
    assert all(p.isfinite().all() for p in Trained(make, *FACTORS).weights[-1])


def test_channels_last_is_the_layout_of_weights_gradients_and_what_waits():
    run = Trained(FactoredDGC, "channels_last")
    weight = run.trainer.replicas[0].network[4].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
    slot = run.trainer.states[0].slot(weight)
    assert slot.strides == weight.stride() != torch.empty(weight.shape).stride()
    assert slot.name == "4.weight"
    assert slot.name not in run.trainer.states[0].stats.dense  # compressed, so that u and v are laid out so too


def test_recomputation_runs_the_forward_pass_twice():
    calls = {}
    for factors in ((), ("recomputation",)):
        calls[factors] = 0

        def watch(network, factors=factors):
            def count(*_):
                calls[factors] += 1

            network[0].register_forward_pre_hook(lambda module, _: count() if module.training else None)

        Trained(FactoredDense, *factors, watch=watch)
    assert calls == {(): STEPS, ("recomputation",): 2 * STEPS}


def test_images_grow_over_the_run_and_are_measured_whole():
    seen = []

    def watch(network):
        network[0].register_forward_pre_hook(lambda module, given: seen.append((module.training, given[0].shape[-1])))

    Trained(FactoredDense, "progressive resizing", watch=watch)
    assert [side for training, side in seen if training] == [8] * 3 + [11] * 3 + [14] * 3
    assert {side for training, side in seen if not training} == {14}


def test_autocast_is_bfloat16_with_parameters_in_float32():
    types = []

    def watch(network):
        network[0].register_forward_hook(lambda module, _, out: types.append((module.training, out.dtype)))

    run = Trained(FactoredDense, "bf16 autocast", watch=watch)
    assert {dtype for training, dtype in types if training} == {torch.bfloat16}
    assert {dtype for training, dtype in types if not training} == {torch.float32}
    assert {p.dtype for p in run.weights[-1]} == {torch.float32}


def test_smoothed_labels_by_hand():
    torch.manual_seed(0)
    network = TASK.network()
    one = FactoredDense(network, TASK, cell=frozenset({"label smoothing"}), steps=1)
    images, labels = samples().inputs, samples().targets
    logs = network(images).log_softmax(1)
    target = torch.full_like(logs, 0.01) + 0.9 * nn.functional.one_hot(labels, 10)
    expected = -(target * logs).sum(1).mean()
    torch.testing.assert_close(one.loss(one.replicas[0].network, images, labels), expected)


def test_what_is_measured_is_the_average_of_the_weights():
    run = Trained(FactoredDGC, "EMA")
    expected = [w.clone() for w in run.weights[0]]
    for weights in run.weights[1:]:
        expected = [DECAY * a + (1 - DECAY) * w for a, w in zip(expected, weights, strict=True)]
    averaged = [*run.trainer.network.parameters()]
    for a, b, last in zip(averaged, expected, run.weights[-1], strict=True):
        torch.testing.assert_close(a.detach(), b)
        assert not torch.equal(a, last)
    assert run.trainer.network is not run.trainer.replicas[0].network


def test_cells_and_the_runs_of_a_plan(monkeypatch):
    three = ["EMA", "channels_last", "bf16 autocast"]
    assert [name_of(cell) for cell in cells(three, full=False)] == [
        *("none", "EMA", "channels_last", "bf16 autocast", "channels_last + bf16 autocast + EMA")
    ]
    assert len(set(cells(three, full=True))) == 8
    assert cells(["EMA"], full=False) == [NONE, frozenset({"EMA"})]
    plan = interactions.plan([*FACTORS], 2, 100, full=False)
    assert len(set(plan)) == len(plan) == 2 * (len(FACTORS) + 2) * 2
    assert len({run.settings for run in plan}) == len(plan) // 2  # of one seed all differ
    made = []
    monkeypatch.setattr(interactions, "train", lambda task, make, seed, steps: made.append(make) or [(steps, 0.0)])
    for run in plan[: len(plan) // 2]:
        interactions.perform(run)
    chosen = cells([*FACTORS], full=False)
    assert [(make.func, make.keywords["cell"]) for make in made] == [
        (kind, cell) for cell in chosen for kind in (FactoredDense, FactoredDGC)
    ]


A, B = "channels_last", "EMA"


def test_differences_of_differences_by_hand():
    none, a, b, both = [-0.1, -0.3], [-0.6, -0.8], [0.1, -0.1], [-1.0, -1.6]
    costs = {NONE: none, frozenset({A}): a, frozenset({B}): b, frozenset({A, B}): both}
    found = interactions.interactions(costs, [A, B])
    # Over both levels of the other. A: (a - none + both - b) / 2 = (-0.5 - 1.1) / 2, (-0.5 - 1.5) / 2.
    assert found[A].mean == pytest.approx((-0.8 - 1.0) / 2)
    # B: (0.2 - 0.4) / 2 and (0.2 - 0.8) / 2.
    assert found[B].mean == pytest.approx((-0.1 - 0.3) / 2)
    assert found["all"].mean == pytest.approx((-0.9 - 1.3) / 2)
    # t(0.975, 1) = 12.7062; the two values are 0.2 apart, so the half-width is t * 0.1.
    assert found[A].high - found[A].mean == pytest.approx(12.7062 * 0.1, abs=1e-4)


def test_a_factor_is_compared_with_the_cell_without_it_where_not_all_are_there():
    costs = {NONE: [0.0, 0.2], **{frozenset({name}): [0.5, 0.5] for name in FACTORS}, frozenset(FACTORS): [1.0, 3.0]}
    found = interactions.interactions(costs, [*FACTORS])
    assert [*found] == [*FACTORS, "all"]
    assert found[A].mean == pytest.approx(0.4)
    assert found["all"].mean == pytest.approx(1.9)


def test_the_report_says_what_interacts(tmp_path):
    none, last, ema, both = "none", A, B, f"{A} + {B}"
    made = {  # by cell: dense, and DGC, for three seeds
        none: ([97.0, 97.2, 97.4], [96.9, 97.0, 97.3]),
        last: ([97.1, 97.2, 97.3], [97.1, 97.0, 97.2]),
        ema: ([97.0, 97.0, 97.0], [95.0, 94.9, 95.0]),
        both: ([97.0, 97.0, 97.0], [95.1, 94.9, 94.9]),
    }
    records = [
        runs.Record(runs.Run("mnist", f"{method}, {cell}", seed, 100, ""), [(100, score)], 1.0, "abc")
        for cell, of in made.items()
        for method, scores in zip(("dense", "DGC 1 %"), of, strict=True)
        for seed, score in enumerate(scores)
    ]
    interactions.tell([A, B], range(3), 100, False, records, tmp_path)
    lines = (tmp_path / "interactions.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    words = {row[0]: (row[2], row[4]) for row in rows[1:4]}
    # Costs: -0.1, -0.2, -0.1 of none; 0, -0.2, -0.1 of channels_last; -2, -2.1, -2 of EMA; -1.9, -2.1, -2.1 of both.
    # channels_last, the mean of alone and beside EMA: 0.1, 0, -0.05. EMA likewise: -1.9, -1.9, -1.95.
    assert words == {A: ("+0.02", "no sign of it"), B: ("-1.92", "interacts"), "all": ("-1.90", "interacts")}
    assert rows[5][:4] == [none, "97.20", "97.07", "-0.13"]
    assert (tmp_path / "interactions.png").stat().st_size > 5000
