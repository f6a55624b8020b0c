"""benchmarks/accuracy/sizes.py: equal tokens a parameter, what is trained, and its table."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import dgc
from benchmarks.accuracy import adam_variants, data, replicas, runs, sizes, tasks, traffic
from benchmarks.accuracy.sizes import METHODS, TRAINED


def words():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(30, (120, 9), generator=generator).cumsum(1) % 30
    return data.Data(tokens[:100, :-1], tokens[:100, 1:], tokens[100:, :-1], tokens[100:, 1:])


SMALL = replace(
    tasks.TASKS["gpt-1.5M"],
    load=words,
    network=lambda: nn.Sequential(nn.Embedding(30, 300), nn.Linear(300, 30)),
    steps=10,
)


def test_sizes_see_equally_many_tokens_a_parameter_in_less_than_a_pass():
    per_parameter, counts = [], []
    for name in TRAINED:
        task = tasks.TASKS[name]
        count = sum(p.numel() for p in task.network().parameters())
        counts.append(count)
        per_parameter.append(4 * task.batch_size * 32 * task.steps / count)
        assert sizes.tokens_of(task, task.steps) / count == per_parameter[-1]
        assert count == pytest.approx(float(name[4:-1]) * 1e6, rel=0.03)
        assert task.recipe.split("betas")[1] == tasks.TASKS[TRAINED[0]].recipe.split("betas")[1]
        width = task.network().embedding.weight.shape[1]
        assert task.lr * width == pytest.approx(2e-3 * 192, rel=0.04)
    assert per_parameter == pytest.approx([per_parameter[0]] * 3, rel=0.002)
    assert counts == sorted(counts)
    assert counts[-1] * per_parameter[-1] < 900_000


def test_small_sizes_of_all_seeds_come_first():
    plan = sizes.plan(TRAINED, 3, None)
    assert len(set(plan)) == len(plan) == 27
    assert [run.task for run in plan] == [name for name in TRAINED for _ in range(9)]
    assert [run.seed for run in plan[:9]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {run.steps for run in plan[18:]} == {1973}
    assert {run.steps for run in sizes.plan(TRAINED, 1, 40)} == {40}
    assert sizes.config("DGC 0.1 %", tasks.TASKS["gpt-4.5M"], 738).warmup_steps == 369
    assert sizes.config("DGC 1 %", tasks.TASKS["gpt-4.5M"], 738).warmup_steps == 0


def test_a_run_is_that_of_its_method_measured_at_the_end(one_thread, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "gpt-1.5M", SMALL)
    plan = sizes.plan(["gpt-1.5M"], 2, None)[3:]
    found = {run.method: sizes.perform(run) for run in plan}
    warmed = dgc.DGCConfig(0.001, 5, (0.0625, 0.0156, 0.004), clip_norm=1.0, dense_below=8192)
    expected = {
        "dense": adam_variants.DenseAdamW,
        "DGC 1 %": partial(replicas.DGC, config=dgc.DGCConfig(0.01, clip_norm=1.0, dense_below=8192)),
        "DGC 0.1 %": partial(replicas.DGC, config=warmed),
    }
    for method, make in expected.items():
        assert found[method] == [(10, replicas.train(SMALL, make, 1, 10)[-1][1])], method
    assert len({curve[0] for curve in found.values()}) == 3


def test_the_table_and_picture_have_each_size_against_its_own_dense_training(tmp_path):
    records = []
    for run in sizes.plan(TRAINED[:2], 2, None):
        score = {"dense": 80.0, "DGC 1 %": 81.0, "DGC 0.1 %": 84.0}[run.method]
        if run.task == "gpt-4.5M":
            score = score / 2 + (run.method == "DGC 1 %") * run.seed
        records.append(runs.Record(run, [(run.steps, score)], 1.0, "abc"))
    sizes.tell(TRAINED[:2], range(2), records, tmp_path)
    lines = [line for line in (tmp_path / "sizes.md").read_text().splitlines() if line.startswith("| ")]
    header, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert header == sizes.headers()
    task = tasks.TASKS["gpt-1.5M"]
    count = sum(p.numel() for p in task.network().parameters())
    sent = [
        f"{100 * traffic.share_of_dense(task.network(), sizes.config(method, task, 250), 250, 4):.1f} %"
        for method in METHODS
    ]
    assert rows[0] == [
        "gpt-1.5M",
        f"{count:,}",
        "0.002",
        "250",
        f"{250 * 4 * 2 * 32 / count:.4f}",
        "0.07",
        "80.00",
        "+1.25 % (+1.25 to +1.25)",
        sent[0],
        "+5.00 % (+5.00 to +5.00)",
        sent[1],
    ]
    # +1.25 % and +3.75 %: the mean is 2.5 %, and t of one degree of freedom 12.706.
    assert rows[1][6:8] == ["40.00", "+2.50 % (-13.38 to +18.38)"]
    raw = json.loads((tmp_path / "sizes.json").read_text())
    assert raw["differences to dense"]["gpt-4.5M"]["DGC 0.1 %"]["mean"] == pytest.approx(5.0)
    assert (tmp_path / "sizes.png").stat().st_size > 10_000


def test_the_picture_draws_intervals_against_parameters(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(sizes.pyplot, "close", kept.append)
    differences = [sizes.Difference(1.0, 0.5, 1.5), sizes.Difference(3.0, 2.0, 4.0)]
    found = {name: dict(zip(METHODS, differences, strict=True)) for name in TRAINED[:2]}
    sizes.draw(found, tmp_path / "picture.png")
    monkeypatch.undo()
    [axes] = kept[0].axes
    assert axes.get_xscale() == "log"
    assert [container.get_label() for container in axes.containers] == [*METHODS]
    for container, it in zip(axes.containers, differences, strict=True):
        line, _, [bars] = container.lines
        assert line.get_ydata().tolist() == [it.mean, it.mean]
        assert line.get_xdata()[1] / line.get_xdata()[0] == pytest.approx(4_527_024 / 1_533_120)
        assert [tuple(segment[:, 1]) for segment in bars.get_segments()] == [(it.low, it.high)] * 2
    sizes.pyplot.close(kept[0])
