"""benchmarks/training/time_to_accuracy.py: where a curve meets its target, when all ranks stop, and the report."""

import argparse
import json
import math
import sys

import pytest
import torch

from benchmarks.accuracy import runs
from benchmarks.accuracy.replicas import batches_of
from benchmarks.accuracy.tasks import TASKS
from benchmarks.training import time_to_accuracy, trainings
from benchmarks.training.links import report_time
from benchmarks.training.links.report_time import Setting, reading

FALLING = [(0, 1000.0, 0.0, 0.0), (50, 100.0, 2.0, 1e6), (100, 60.0, 4.0, 2e6), (150, 70.0, 6.0, 3e6)]


def test_the_target_is_met_on_the_line_between_two_evaluations():
    # A quarter of the way from 100 to 60.
    assert reading(FALLING, 90.0, "perplexity") == (62.5, 2.5, 1.25e6)
    assert reading(FALLING, 60.0, "perplexity") == (100.0, 4.0, 2e6)
    assert reading(FALLING, 59.9, "perplexity") is None
    assert reading(FALLING, 1000.0, "perplexity") == (0, 0.0, 0.0)
    rising = [(0, 10.0, 0.0, 0.0), (20, 90.0, 1.0, 10.0), (40, 95.0, 3.0, 30.0)]
    assert reading(rising, 94.0, "accuracy") == pytest.approx((36.0, 2.6, 26.0))
    assert reading(rising, 95.1, "accuracy") is None
    diverged = [(0, 1000.0, 0.0, 0.0), (50, math.nan, 2.0, 1e6), (100, 60.0, 4.0, 2e6)]
    assert reading(diverged, 80.0, "perplexity") == (100, 4.0, 2e6)


def made_up(**changes):
    """Returns a setting whose ddp takes 4 and 6 seconds, and ddp bf16 3 and 8."""
    seconds = {"ddp": (4.0, 6.0), "ddp bf16": (3.0, 8.0), "dgc": (2.0, 2.0), **changes}
    curves = {
        method: [[(0, 200.0, 0.0, 0.0), (100, 50.0 if s else 70.0, s or 9.0, 1e6 * (s or 9.0))] for s in of]
        for method, of in seconds.items()
    }
    return Setting("gpt-adamw", "1gbit", 2, "about", "perplexity", 50.0, curves)


def test_a_ratio_is_that_of_the_best_rival_of_the_same_seed():
    assert report_time.ratios(made_up(), "dgc", trainings.RIVALS, "seconds") == [1.5, 3.0]
    assert report_time.ratios(made_up(dgc=(2.0, None)), "dgc", trainings.RIVALS, "seconds") == [1.5, None]
    alone = made_up(ddp=(None, 6.0), **{"ddp bf16": (None, 8.0)})
    assert report_time.ratios(alone, "dgc", trainings.RIVALS, "bytes") == [None, 3.0]


def test_the_report_says_each_seed_and_what_was_missed(tmp_path, capsys):
    setting = made_up(dgc=(2.0, 2.0), **{"dgc auto": (2.0, None)})
    report_time.report_time("found", "About.", [setting], trainings.RIVALS, {"more": 1}, tmp_path)
    text = (tmp_path / "found.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    by_method = {row[0]: row[1:] for row in rows if len(row) == 7 and row[0].startswith("d")}
    assert by_method["dgc"][:3] == ["2.0, 2.0", "100, 100", "2.0, 2.0"]
    assert by_method["dgc"][3] == "2.25 (1.50 to 3.00)"
    assert by_method["dgc auto"][:4] == ["2.0, not reached", "100, not reached", "2.0, not reached", "-"]
    assert by_method["dgc auto"][5] == "50.0 after 100, 70.0 after 100"
    verdicts = {(row[3], row[4]): row[-1] for row in rows if row[0] == "gpt-adamw"}
    assert verdicts == {
        ("dgc", ">= 1.5"): "reached",
        ("dgc", ">= 0.98"): "reached",
        ("dgc auto", ">= 0.98"): "NOT REACHED",
    }
    raw = json.loads((tmp_path / "found.json").read_text())
    assert raw["more"] == 1
    assert "command" in raw["machine"]
    assert (tmp_path / "found.png").exists()
    assert "About." in capsys.readouterr().out


def test_a_run_stops_at_its_target_and_counts_only_steps(monkeypatch):
    task, seen = TASKS["mnist"], []
    data = task.load()
    run = trainings.Training("mnist", "ddp", 3, 100, "", "1gbit", 2, 90.0, 20)
    metrics = iter([10.0, 50.0, 90.0, 99.0])

    def spent(action):
        action()
        return 2.0, 5.0

    points = trainings.curve(run, seen.append, lambda: next(metrics), spent, 1)
    assert points == [(0, 10.0, 0.0, 0.0), (20, 50.0, 2.0, 5.0), (40, 90.0, 4.0, 10.0)]
    expected = [batches[1] for batches in batches_of(task, 3, 40, 2)]
    assert len(seen) == 40
    assert all(torch.equal(a[0], b[0]) for a, b in zip(seen, expected, strict=True))
    assert len(data.inputs) == 4000
    never = trainings.curve(run, seen.append, lambda: math.nan, spent, 0)
    assert [point[0] for point in never] == [0, 20, 40, 60, 80, 100]
    assert len(seen) == 140


def test_every_method_has_settings_of_its_own_and_runs_are_found_again(tmp_path):
    monkey = argparse.Namespace(
        tasks=["mnist", "gpt-adamw"],
        rates=["1gbit", "100mbit"],
        ranks=[2],
        methods=list(trainings.METHODS),
        seeds=2,
        steps=None,
        target={"mnist": 95.0},
    )
    plan = time_to_accuracy.plan(monkey)
    assert len(set(plan)) == len(plan) == 2 * 2 * 6 * 2
    assert {run.target for run in plan} == {95.0, time_to_accuracy.GOALS["gpt-adamw"].target}
    assert len({run.settings for run in plan if run.task == "mnist"}) == 6
    path = tmp_path / "runs.jsonl"
    points = [(0, 1.0, 0.0, 0.0), (20, 99.0, 1.5, 7.0)]
    line = {"run": plan[0].__dict__, "curve": points, "seconds": 30.0, "commit": "c"}
    path.write_text(json.dumps(line) + "\n")
    found = runs.read(path, trainings.Training)
    assert found[plan[0]].curve == points
    other_seed = next(run for run in plan if run.seed == 1 and run.settings == plan[0].settings)
    assert time_to_accuracy.expected([other_seed], found) == 30.0


def test_arguments_that_make_no_sense_are_refused(monkeypatch, capsys):
    assert time_to_accuracy.target_of("mnist=97.5") == ("mnist", 97.5)
    for arguments, said in (
        (["--target", "mnist=x"], "expected a task (mnist, gpt-adamw, gpt-4.5M) = a number, got 'mnist=x'"),
        (["--target", "cifar=90"], "got 'cifar=90'"),
        (["--rates", "1.5gbit"], "rate: expected a number of kbit, mbit, gbit"),
        (["--methods", "dgc", "ddp"], "expected ddp and ddp bf16 among them, without ddp bf16"),
        (["--ranks", "1"], "expected --ranks >= 2"),
    ):
        monkeypatch.setattr(sys, "argv", ["time_to_accuracy", *arguments])
        with pytest.raises(SystemExit):
            time_to_accuracy.parsed()
        assert said in capsys.readouterr().err
