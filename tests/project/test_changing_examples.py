"""The examples of models that change, a few steps of each, dense and with DGC, in forked ranks."""

import re
from pathlib import Path

import pytest

from benchmarks.accuracy.examples import EXAMPLES, OWN, RESULT, row
from benchmarks.accuracy.runs import Record, Run
from support.programs import run_program

ROOT = Path(__file__).parents[2]


def result_of(*arguments: str) -> tuple[float, int, str]:
    result = run_program(*arguments, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    found = RESULT.search(result.stdout)
    assert found, result.stdout
    return float(found[1]), int(found[2].replace(",", "")), result.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_dense_and_sends_less_with_dgc(name):
    script = f"examples/{name}.py"
    _, dense, _ = result_of(script, "--steps", "12", "--dense")
    _, sent, output = result_of(script, "--steps", "12")
    assert 0 < sent < dense
    if name == "lottery_ticket":
        assert re.search(r"round 4: 6\.\d % of the weights left", output), output


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_rigl_stays_90_percent_sparse_over_a_change(grow):
    for kind in ([], ["--dense"]):
        *_, output = result_of("examples/rigl.py", "--steps", "70", "--grow", grow, *kind)
        sparse = float(re.search(r"([0-9.]+) % sparse", output)[1])
        assert 89.9 < sparse < 90.1


def test_the_examples_are_short_and_in_the_table():
    table = (ROOT / "examples/README.md").read_text()
    for name in EXAMPLES:
        text = (ROOT / "examples" / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 120
        assert f"examples/{name}.py --quick" in text
        assert f"`examples/{name}.py --quick`" in table


def test_the_benchmark_writes_differences_of_the_same_seeds():
    dense, ours = records((90.0, 4_000_000), (91.0, 4_000_000)), records((91.0, 1_000_000), (90.5, 2_000_000))
    # Differences of +1 and -0.5: a standard error of 0.75, times 12.706 of Student's t with one degree of freedom.
    found = "+0.25 (-9.28 to +9.78)"
    assert row("gan", dense, ours) == ["gan", "2", "90.50 %", "90.75 %", found, "4.0", "1.5"]
    assert row("rigl", dense, ours)[4] == f"{found}, NOT REACHED"
    near = records((90.0, 0), (91.0, 0)), records((90.0, 0), (91.01, 0))
    assert row("rigl", *near)[4].endswith(", reached")


def records(*results):
    return [Record(Run("rigl", "", seed, OWN, ""), [(OWN, *of)], 1.0, "") for seed, of in enumerate(results)]
