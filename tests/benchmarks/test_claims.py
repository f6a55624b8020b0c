"""benchmarks/results/claims.py: the verdicts on the method's claims, of made-up results worked out by hand."""

import json
import math

import pytest

from benchmarks.accuracy import ablation, adamw, clipping, convergence
from benchmarks.accuracy.compare import Difference
from benchmarks.accuracy.runs import Record, Run
from benchmarks.harness import RESULTS
from benchmarks.results import claims
from benchmarks.results.claims import Compared, Evidence, Results

NOTHING = Results({}, {})


def runs_of(task, method, scores, first_seed=0):
    """Returns finished runs, whose last metric counts."""
    return [
        Record(Run(task, method, first_seed + i, 9, "a recipe"), [(3, 1.0), (9, score)], 1.0, "abc")
        for i, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("task", "interval", "claimed", "says"),
    [
        ("letters", (0.1, 0.9), "better", "for"),  # accuracy: more is better
        ("letters", (0.1, 0.9), "worse", "against"),
        ("letters", (-0.9, -0.1), "worse", "for"),
        ("letters", (-0.9, -0.1), "better", "against"),
        ("letters", (-0.1, 0.1), "better", "open"),
        ("letters", (-0.1, 0.1), "worse", "open"),
        ("gpt", (0.1, 0.9), "better", "against"),  # perplexity: less is better
        ("gpt", (0.1, 0.9), "worse", "for"),
        ("gpt", (-0.9, -0.1), "better", "for"),
        ("gpt", (-0.9, 0.1), "better", "open"),
        ("letters", (-0.4, -0.1), "as good", "for"),  # surely less than 0.5 points
        ("letters", (-0.6, 0.1), "as good", "open"),
        ("letters", (-0.6, -0.1), "as good", "against"),
        ("gpt", (-0.5, 0.9), "as good", "for"),  # surely less than 1 %
        ("gpt", (-0.5, 1.1), "as good", "open"),
        ("gpt", (0.5, 1.1), "as good", "against"),
        ("gpt", (-9.0, -8.0), "as good", "for"),
    ],
)
def test_what_an_interval_says(task, interval, claimed, says):
    low, high = interval
    assert claims.judged(task, Difference((low + high) / 2, low, high), claimed) == says


@pytest.mark.parametrize(
    ("says", "word"),
    [
        ([], "not measured"),
        (["for"], "holds"),
        (["for", "for"], "holds"),
        (["for", "open"], "holds in part (1 of 2)"),
        (["against", "for", "for"], "holds in part (2 of 3)"),
        (["open", "open"], "not reproduced"),
        (["against", "open"], "not reproduced"),
    ],
)
def test_the_word_for_a_claim(says, word):
    assert claims.verdict([Evidence("", one) for one in says]) == word


def test_differences_are_of_the_seeds_that_both_have():
    records = [
        *runs_of("letters", "with", [97.0, 98.0, 96.0, 50.0], first_seed=1),
        *runs_of("letters", "without", [10.0, 97.5, 98.0, 97.0]),  # seeds 0 to 3
        *runs_of("gpt", "with", [99.0, 202.0]),
        *runs_of("gpt", "without", [100.0, 200.0]),
        *runs_of("lstm", "with", [5.0]),
        *runs_of("lstm", "without", [6.0]),  # one seed has no interval
        *runs_of("mnist", "with", [5.0, 6.0]),
    ]
    it = Compared("ablation", "with", "without", "worse", "added")
    # -0.5, 0 and -1: mean -0.5, SD 0.5, t(0.975, 2) = 4.302653. -1 and 1 %: SD 1.414214, t(0.975, 1) = 12.706205.
    spread, wide = 4.302653 * 0.5 / math.sqrt(3), 12.706205
    assert claims.differences(records, it) == [
        Evidence(
            f"letters, added: 97.00 for 97.50, -0.50 points ({-0.5 - spread:+.2f} to {-0.5 + spread:+.2f}), 3 seeds",
            "open",
        ),
        Evidence(f"gpt, added: 150.50 for 150.00, +0.00 % ({-wide:+.2f} to {wide:+.2f}), 2 seeds", "open"),
    ]
    sure = [*runs_of("gpt", "with", [90.0, 179.0]), *runs_of("gpt", "without", [100.0, 200.0])]
    assert [one.says for one in claims.differences(sure, it)] == ["against"]  # 10 and 10.5 % better
    assert [one.says for one in claims.differences(sure, it._replace(claimed="better"))] == ["for"]


def test_ratios_are_held_against_the_papers():
    raw = {"machine": {}}
    raw["A"] = {"paper": 277, "formula": 276.67, "ratio": {"fp32": 283.4, "default": 1}}
    raw["B"] = {"paper": 597, "formula": 597.7, "ratio": {"fp32": 596.4, "default": 999}}
    found = claims.ratios(Results({}, {"wire_ratio": raw}))
    assert found == [
        Evidence("A: 283 counted, 277 by the paper's format, exact", "for"),
        Evidence("B: 596 counted, 598 by the paper's format, exact", "against"),
    ]
    assert claims.ratios(NOTHING) == []


def test_speed_is_that_over_the_faster_dense_exchange_in_the_same_rounds():
    def run(dgc, ddp, half):
        times = {"no_sync": {"0": 1.0}, "dgc": dgc, "ddp": ddp, "ddp fp16": half}
        return {"model": "mlp", "ranks": 2, "rates": {"1gbit": times, "10gbit": {}}}

    # Rounds 0 and 2 have both: 2 and 4 by float32, 1.5 and 1.7 by 16 bits: mean 1.6, SD 0.141421.
    dgc = {"0": 1.0, "1": 50.0, "2": 2.0}
    one = run(dgc, {"0": 2.0, "2": 8.0}, {"0": 1.5, "2": 3.4, "3": 0.1})
    slow = run({"0": 2.0, "1": 2.0, "2": 2.0}, {}, {"0": 1.0, "1": 1.01, "2": 1.02})
    found = claims.speed("1gbit")(Results({}, {"network": {"runs": [one, slow]}}))
    spread = 12.706205 * 0.1
    assert found[0] == Evidence(
        f"mlp, 2 ranks: 1.60 ({1.6 - spread:.2f} to {1.6 + spread:.2f}) times as fast, 2 rounds", "open"
    )
    assert found[1].text.startswith("mlp, 2 ranks: 0.51 (0.49 to 0.52) times as fast, 3 rounds")
    assert found[1].says == "against"
    fast = run({"0": 1.0, "1": 1.0, "2": 1.0}, {"0": 3.0, "1": 3.01, "2": 3.02}, {})
    assert [one.says for one in claims.speed("1gbit")(Results({}, {"network": {"runs": [fast]}}))] == ["for"]
    assert claims.speed("10gbit")(Results({}, {"network": {"runs": [one]}})) == []
    assert claims.speed("1gbit")(NOTHING) == []


def test_ages_are_held_against_600_to_1000():
    left = {"few": [0.1, 0.3, 0.4, 0.2], "many": [0.5, 0.1, 0.1, 0.3]}
    raw = {"steps": 2000, "seeds": 1, "ages from": [0, 512, 724, 1024]}
    raw["shares"] = {task: {"0.01": {}, "0.001": {"sent": [], "left": shares}} for task, shares in left.items()}
    few, many = claims.waits(Results({}, {"staleness": raw}))
    assert few == Evidence(
        "few: half of the elements up to 724 to 1,023 steps, 20 % 1,024 or more; 1 seed, no interval", "for"
    )
    assert many.text.startswith("many: half of the elements up to 0 to 511 steps, 30 % 1,024 or more")
    assert many.says == "against"
    assert claims.waits(NOTHING) == []


def test_without_results_nothing_is_measured_and_each_claim_says_by_what_it_would_be():
    table = claims.rows(NOTHING)
    assert len(table) == len(claims.CLAIMS) == 13
    for (text, source, measured, word), claim in zip(table, claims.CLAIMS, strict=True):
        assert (text, source, word) == (claim.text, claim.source, "**not measured**")
        assert measured.startswith(f"nothing; it takes `{claim.programs[0]}`")


def test_a_row_has_its_comparisons_and_their_verdict():
    records = [
        *runs_of("letters", ablation.DENSE, [97.0, 98.0, 99.0]),
        *runs_of("letters", "+ residual (gradient dropping)", [96.0, 97.1, 98.0]),
        *runs_of("mnist", ablation.DENSE, [97.0, 98.0, 99.0]),
        *runs_of("mnist", "+ residual (gradient dropping)", [97.1, 97.9, 99.0]),
    ]
    by_text = {row[0]: row for row in claims.rows(Results({"ablation": records}, {}))}
    _, source, measured, word = by_text["Accumulation alone (gradient dropping) still loses"]
    assert "-1.6 points" in source
    letters, mnist, by = measured.split("<br>")
    # -1, -0.9, -1: mean -0.966667, SD 0.057735.
    spread = 4.302653 * 0.057735 / math.sqrt(3)
    low, high = -0.966667 - spread, -0.966667 + spread
    assert letters == (
        f"letters, against dense: 97.03 for 98.00, -0.97 points ({low:+.2f} to {high:+.2f}), 3 seeds: *for*"
    )
    assert mnist.startswith("mnist, against dense: 98.00 for 98.00, +0.00 points")
    assert mnist.endswith(": *open*")
    assert by == "`accuracy.ablation`"
    assert word == "**holds in part (1 of 2)**"
    assert by_text["Momentum factor masking helps"][3] == "**not measured**"


def test_comparisons_are_of_methods_that_there_are():
    names = {
        "ablation": {ablation.DENSE, *ablation.ADDED, *ablation.CHANGED},
        "clipping": set(clipping.METHODS),
        "convergence": set(convergence.METHODS),
        "adamw": set(adamw.METHODS),
    }
    asked = []

    class Asked(dict):
        """Notes the methods that comparisons look for, which all runs seem to be of."""

        def get(self, program, default):
            asked.append(program)
            return default

    for claim in claims.CLAIMS:
        claim.evidence(Results(Asked(), {}))
    assert {"ablation", "clipping", "convergence", "adamw"} == set(asked)
    # A method that is misspelt would be "not measured": with two runs of every method, each comparison finds some.
    records = {
        program: [one for method in methods for one in runs_of("gpt", method, [5.0, 6.0])]
        for program, methods in names.items()
    }
    found = sum(len(claim.evidence(Results(records, {}))) for claim in claims.CLAIMS)
    assert found == len(asked)


def test_runs_of_an_older_recipe_do_not_count(tmp_path):
    runs = ablation.plan(["letters"], 2, None)[:2]
    lines = [
        {"run": vars(run) | change, "curve": [[9, 97.0]], "seconds": 1.0, "commit": "abc"}
        for run, change in zip(runs, ({}, {"settings": "older"}), strict=True)
    ]
    (tmp_path / "ablation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "wire_ratio.json").write_text('{"machine": {}}')
    results = claims.load(tmp_path)
    assert [record.run for record in results.records["ablation"]] == [runs[0]]
    assert results.records["adamw"] == []
    assert results.raw == {"wire_ratio": {"machine": {}}}


def test_the_table_has_the_figures_that_the_programs_published():
    raw = json.loads((RESULTS / "ablation.json").read_text())["differences to dense"]["letters"]
    it = raw["+ residual (gradient dropping)"]
    text = claims.section(claims.load(RESULTS))
    assert f"{it['mean']:+.2f} points ({it['low']:+.2f} to {it['high']:+.2f}), 5 seeds" in text
    assert text.count("\n| ") == len(claims.CLAIMS) + 2
