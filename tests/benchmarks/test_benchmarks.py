"""The benchmarks that give a verdict: that they can pass, and that they can fail."""

import pytest
import torch

from benchmarks.soak.checks import check_conservation, check_counts, check_memory, check_replicas, check_restarts
from benchmarks.soak.ledger import ledger_of
from benchmarks.soak.run import COMPRESSED, GROUPS, SHAPES, Given, Run, event_of, gradients
from benchmarks.soak.supervisor import Kill
from benchmarks.soak.worker import Record
from support.programs import run_program


@pytest.mark.parametrize(
    ("options", "processes"), [([], "3 gloo processes"), (["--nodes", "2"], "4 gloo processes in 2 nodes")]
)
def test_a_short_soak_passes(options, processes):
    result = run_program("benchmarks.soak", "--smoke", *options)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert f"Soak: 300 steps on {processes}, 2 of them killed, seed 0" in result.stdout
    assert result.stdout.count("| pass ") == 11


@pytest.fixture(scope="module")
def run_and_ledger():
    run = Run(steps=60, ranks=3, kills=1, seed=0, save_every=20)
    return run, ledger_of(run)


def perfect(run, ledger):
    """Returns what all ranks have where everything has been sent."""
    start = dict(Given().named_parameters())
    lr = {name: sgd["lr"] for names, sgd in GROUPS.items() for name in names}
    parameters = {n: (p.detach() - lr[n] / run.ranks * ledger.total[n]).float() for n, p in start.items()}
    residual = {name: torch.zeros(SHAPES[name]) for name in COMPRESSED}
    about = {"applied": ledger.applied, "scale": ledger.scale}
    return [{"parameters": dict(parameters), "residual": dict(residual), **about} for _ in range(run.ranks)]


def failed(checks):
    return [about.split(",")[0] for about, *_, good in checks if not good]


def test_the_soak_sees_one_entry_that_is_lost(run_and_ledger):
    run, ledger = run_and_ledger
    results = perfect(run, ledger)
    assert failed(check_conservation(run, results, ledger)) == []
    residual = results[1]["residual"]["integers"] = torch.zeros(SHAPES["integers"])
    residual[3, 4] = 3
    checks = check_conservation(run, results, ledger)
    assert failed(checks) == ["conservation of integers"]
    assert "33,699 of 33,700 exact" in checks[0]
    for result in results:
        result["parameters"]["bias"] = result["parameters"]["bias"] + 0.25
    assert failed(check_conservation(run, results, ledger)) == ["conservation of integers"] * 2
    results[2]["residual"]["normals"] = torch.full(SHAPES["normals"], 1e-3)
    assert failed(check_conservation(run, results, ledger))[2:] == ["conservation of normal gradients"]


def test_the_soak_sees_what_a_rank_of_a_node_loses():
    run = Run(steps=60, ranks=4, kills=1, seed=0, save_every=20, nodes=2)
    ledger = ledger_of(run)
    results = perfect(run, ledger)
    for result in results:
        result["residual"] = {name: whole.flatten()[: whole.numel() // 2] for name, whole in result["residual"].items()}
    assert failed(check_conservation(run, results, ledger)) == []
    results[3]["residual"]["integers"] = results[3]["residual"]["integers"] + 1
    checks = check_conservation(run, results, ledger)
    assert failed(checks) == ["conservation of integers"]
    assert "25,250 of 33,700 exact" in checks[0]


def test_the_soak_sees_replicas_and_counts_that_differ(run_and_ledger):
    run, ledger = run_and_ledger
    results = perfect(run, ledger)
    assert check_replicas(results)[-1]
    assert check_counts(results, ledger)[-1]
    results[2]["parameters"]["small"] = torch.nextafter(results[2]["parameters"]["small"], torch.tensor(9.0))
    results[1]["scale"] *= 2
    assert check_replicas(results)[2:] == ("small", False)
    assert not check_counts(results, ledger)[-1]


@pytest.mark.parametrize(
    ("resumed", "digest", "hung", "expected"),
    [
        (20, 5, 0, []),
        (0, 5, 0, ["restarts from the last complete checkpoint"]),
        (20, 6, 0, ["parameters"]),
        (20, 5, 1, ["survivors of a kill end by themselves"]),
    ],
)
def test_the_soak_sees_a_restart_that_goes_wrong(run_and_ledger, resumed, digest, hung, expected):
    run, _ = run_and_ledger
    record = lambda attempt, step, digest: Record(attempt, step, digest, 1, 1, 0.0)  # noqa: E731
    log = [record(0, step, 5) for step in range(26)]
    log += [record(1, step, digest if step == 23 else 5) for step in range(resumed, 61)]
    kill = Kill(0, 25.0, 0.1, hung, resumed, "")
    assert failed(check_restarts(run, [log] * 3, [kill])) == expected


@pytest.mark.parametrize(("grows", "expected"), [(0, 0), (200, 1), (2000, 2)])
def test_the_soak_sees_memory_that_grows(grows, expected):
    records = [Record(0, step, 0, 10**8 + grows * step, 10**7 + grows * step, 0.0) for step in range(2001)]
    assert len(failed(check_memory([records]))) == expected


def test_the_soak_is_a_function_of_seed_step_and_rank(run_and_ledger):
    run, _ = run_and_ledger
    for step in range(run.steps):
        for first, second in zip(gradients(run, step, 1), gradients(run, step, 1), strict=True):
            assert all(torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in first)
    assert event_of(run, 7) == event_of(run, 7)
    assert not torch.equal(gradients(run, 7, 0)[0]["normals"], gradients(run, 7, 1)[0]["normals"])
