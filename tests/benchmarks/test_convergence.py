"""benchmarks/accuracy/convergence.py and ablation.py: that they train what they say, and count right."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import dgc
from benchmarks.accuracy import ablation, compare, convergence, replicas, runs, tasks, variants


def regression():
    """Samples of three classes that a small network does not learn at once."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 40, generator=generator)
    targets = (inputs[:, :3] + 0.3 * torch.randn(300, 3, generator=generator)).argmax(1)
    return tasks.Data(inputs[:200], targets[:200], inputs[200:], targets[200:])


def network():
    return nn.Sequential(nn.Linear(40, 500), nn.Tanh(), nn.Linear(500, 3))


def small(**changes):
    recipe = {"metric": "accuracy", "lr": 0.05, "weight_decay": 1e-3, **changes}
    return tasks.Task(about="test", load=regression, network=network, **recipe)


def trained(task, make, steps=40):
    """Returns the parameters of the first replica."""
    kept = []

    def keep(network, task):
        kept.append(make(network, task))
        return kept[0]

    curve = replicas.train(task, keep, 1, steps)
    assert [step for step, _ in curve] == [steps * i // 5 for i in range(1, 6)]
    return [p.detach() for p in kept[0].replicas[0].network.parameters()]


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("masking", [True, False, "auto"])
@pytest.mark.parametrize("dense_below", [0, 16384])
def test_variants_with_the_packages_techniques_are_the_package(clip_norm, masking, dense_below):
    task = small(clip_norm=clip_norm)
    same = {"momentum_masking": masking, "dense_below": dense_below, "clip_norm": clip_norm, "warmup_steps": 12}
    config = dgc.DGCConfig(0.01, **same)
    technique = variants.Technique(
        masking=masking, dense_below=dense_below, clip_norm=clip_norm, warmup_steps=12, density=0.01
    )
    core = trained(task, partial(replicas.DGC, config=config))
    switches = trained(task, partial(variants.Variant, technique=technique))
    torch.manual_seed(1)
    for start, ours, theirs in zip(task.network().parameters(), core, switches, strict=True):
        # Sums in another order decide some ties in another way; another technique would be a hundred times as far.
        assert (ours - theirs).norm() <= 1e-3 * (ours - start.detach()).norm()


@pytest.mark.parametrize("correction", [True, False])
def test_a_variant_that_sends_everything_is_dense_training(correction):
    task = small(clip_norm=None)
    technique = variants.Technique(correction=correction, masking=False, density=1.0)
    dense = trained(task, replicas.Dense)
    for one, other in zip(dense, trained(task, partial(variants.Variant, technique=technique)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_each_technique_changes_the_result():
    task, found = small(), {}
    for method in [*ablation.ADDED, *ablation.CHANGED]:
        technique = ablation.technique(method, 40)
        found[method] = trained(task, partial(variants.Variant, technique=technique))[0]
    names = [*found]
    same = [(a, b) for i, a in enumerate(names) for b in names[:i] if torch.equal(found[a], found[b])]
    one_unit = "units of 32 elements, 1.36 times as many", "units of 32 elements"  # the task is too small for two
    assert same == [("without warm-up", "+ clipping"), one_unit]


def test_what_is_not_sent_is_kept_or_dropped_as_the_technique_says():
    task = small()
    for residual in (True, False):
        technique = variants.Technique(residual=residual, correction=False, masking=False, density=0.01)
        torch.manual_seed(0)
        one = variants.Variant(task.network(), task, technique)
        h = torch.randn(replicas.WORKERS, 20000)
        sent = one._send(0, h.clone())
        k = 200
        expected = torch.zeros_like(h)
        for worker in range(replicas.WORKERS):
            largest = h[worker].abs().argsort(descending=True)[:k]
            expected[worker, largest] = h[worker, largest]
        assert torch.equal(sent, expected.mean(0))
        assert torch.equal(one.v[0], h - expected if residual else torch.zeros_like(h))


def test_with_step_ahead_a_worker_looks_from_where_its_waiting_update_leads():
    task, looked = small(clip_norm=None), []

    class Watched(variants.Variant):
        def loss(self, network, inputs, targets):
            looked.append([p.detach().clone() for p in network.parameters()])
            return super().loss(network, inputs, targets)

    torch.manual_seed(0)
    one = Watched(task.network(), task, variants.Technique(density=0.01, ahead=0.5))
    for batches in replicas.batches_of(task, 0, 3):
        here = [p.detach().clone() for p in one.network.parameters()]
        waiting = {j: one.v[i].clone() for i, [j] in enumerate(one.selections)}
        looked.clear()
        one.learn(batches)
        for worker in range(replicas.WORKERS):
            for j, p in enumerate(here):
                step = task.lr * 0.5 * waiting[j][worker].view_as(p) if j in waiting else 0
                torch.testing.assert_close(looked[worker][j], p - step, rtol=1e-6, atol=1e-7)
        one.check()
    assert all(v.any() for v in waiting.values())


def test_whole_units_are_chosen_by_their_largest_element():
    v = torch.zeros(2, 11)
    v[0, [0, 1, 7]], v[1, [4, 10]] = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.5, 9.0])
    assert variants.largest(v, 4, 4).sort(1).values.tolist() == [[4, 5, 6, 7], [4, 5, 6, 7]]  # the last three are none
    assert variants.largest(v, 8, 4)[0].sort().values.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert variants.largest(v, 1, 1).tolist() == [[7], [10]]


def test_samples_are_those_of_an_epoch_each_once():
    task = small(batch_size=10)
    seen = [inputs for batches in replicas.batches_of(task, 3, 5) for inputs, _ in batches]
    assert len(seen) == 5 * replicas.WORKERS
    assert len(torch.unique(torch.cat(seen), dim=0)) == 5 * replicas.WORKERS * 10 == len(regression().inputs)


def test_differences_and_their_intervals():
    tasks.TASKS["accuracy"], tasks.TASKS["words"] = small(), small(metric="perplexity")
    try:
        found = compare.difference("accuracy", [97.0, 98.0, 96.0], [97.5, 98.0, 97.0])
        # Differences -0.5, 0, -1: mean -0.5, SD 0.5, t(0.975, 2) = 4.3027.
        assert found.mean == pytest.approx(-0.5)
        assert found.high == pytest.approx(-0.5 + 4.302653 * 0.5 / math.sqrt(3), abs=1e-6)
        assert not compare.reaches("accuracy", found)
        assert compare.reaches("accuracy", compare.Difference(-0.3, -0.49, 0))
        assert not compare.reaches("accuracy", compare.Difference(-0.3, -0.51, 9))
        words = compare.difference("words", [101.0, 204.0], [100.0, 200.0])
        assert words.mean == pytest.approx(1.5)
        assert not compare.reaches("words", words)
        assert compare.reaches("words", compare.Difference(-5, -9, 0.9))
    finally:
        del tasks.TASKS["accuracy"], tasks.TASKS["words"]


def test_finished_runs_are_not_done_again_unless_their_settings_change(tmp_path):
    path = tmp_path / "runs.jsonl"
    plan = [runs.Run("digits", "dense", seed, 30, "a recipe") for seed in range(2)]
    found = runs.gather(plan, half, path, 1, math.inf)
    assert [found[run].score for run in plan] == [0.5, 1.5]
    assert len(path.read_text().splitlines()) == 2
    found = runs.gather([*plan, runs.Run("digits", "dense", 2, 30, "a recipe")], half, path, 1, 0)
    assert set(found) == set(plan)  # no time for a third
    changed = runs.Run("digits", "dense", 0, 30, "another recipe")
    assert set(runs.gather([changed], half, path, 1, math.inf)) == {changed}
    assert len(path.read_text().splitlines()) == 3


def half(run):
    """Stands in for training."""
    return [(run.steps, run.seed + 0.5)]


def test_every_run_of_both_plans_can_be_made():
    for module, (first, other) in ((convergence, ("mnist", "lstm")), (ablation, ("letters", "gpt"))):
        plan = module.plan([first, other], 2, 100)
        assert len(set(plan)) == len(plan)
        assert {run.task for run in plan} == {first, other}
        assert len({run.settings for run in plan if run.seed == 0 and run.task == first}) == len(
            {run.method for run in plan if run.task == first}
        )
