"""The arithmetic of trials: which steps take the other exchange, what their times decide, and when the next one is."""

import json
import math

import pytest

from dgc.config import DGCConfig
from dgc.stats import Choice
from dgc.step import trials
from dgc.step.schedule import DensitySchedule
from dgc.step.trials import Round


def test_a_round_is_five_steps_of_the_other_exchange_and_five_of_the_chosen_one():
    assert [trials.is_other(step) for step in range(20)] == ([True] * 5 + [False] * 5) * 2


@pytest.mark.parametrize("chosen_dense", [False, True])
def test_a_rank_reports_the_medians_of_the_timed_steps(chosen_dense):
    times = {10: 900, 11: 900, 12: 3.0, 13: 100.0, 14: 2.0, 15: 900, 16: 900, 17: 7.0, 18: 5.0, 19: 0.1}
    other, chosen = 3.0, 5.0
    expected = [chosen, other] if chosen_dense else [other, chosen]
    assert json.loads(trials.report(times, 1, chosen_dense)) == expected
    del times[18]
    assert json.loads(trials.report(times, 1, chosen_dense)) is None


def test_ranks_are_put_together_by_their_median():
    assert trials.together(["[3.0, 1.0]", "[5.0, 2.0]", "[400.0, 0.5]"]) == Round(5.0, 1.0)
    assert trials.together(["[3.0, 1.0]", "[5.0, 2.0]"]) == Round(4.0, 1.5)
    assert trials.together(["[3.0, 1.0]", "null"]) is None


@pytest.mark.parametrize("wrong", ["[1.0]", "[1.0, 0.0]", "[1.0, NaN]", "[1.0, Infinity]", "[1.0, -1]", '"ab"', "{}"])
def test_what_is_no_time_is_refused_with_its_rank(wrong):
    with pytest.raises(ValueError, match="expected seconds of a dense and of a compressed step from rank 1, got"):
        trials.together(["[3.0, 1.0]", wrong])


@pytest.mark.parametrize(
    ("ratios", "over"),
    [
        ([3.9], False),
        ([4.1], True),
        ([0.24], True),
        ([2.1, 2.0], True),
        ([1.1, 1.2], False),
        ([0.5, 9.0], False),
        ([1.1, 0.9, 1.0], True),
    ],
)
def test_a_trial_ends_early_where_all_rounds_say_the_same_clearly(ratios, over):
    assert trials.is_over([Round(ratio, 1.0) for ratio in ratios]) is over


def test_a_disturbed_round_does_not_decide():
    found = trials.figures([Round(1.2, 1.0), Round(1.2, 50.0), Round(2.4, 2.0)])
    assert found.sparse == 2.0
    assert found.ratio == pytest.approx(1.2)


def test_the_quicker_one_is_taken_first_and_given_up_only_for_a_share_of_a_step():
    def ratio(dense):
        return Round(dense, 1.0)

    assert [trials.dense_is_quicker(ratio(d), None) for d in (0.999, 1.001)] == [True, False]
    assert [trials.dense_is_quicker(ratio(d), False) for d in (0.97, 0.99, 1.2)] == [True, False, False]
    assert [trials.dense_is_quicker(ratio(d), True) for d in (0.97, 1.01, 1.03)] == [True, True, False]


def test_slowness_that_both_have_in_common_does_not_change_who_wins():
    for slow in (0.0, 1.0, 100.0):
        assert not trials.dense_is_quicker(Round(1.5 + slow, 1.0 + slow), None)
        assert not trials.dense_is_quicker(Round(1.5 + slow, 1.0 + slow), False)


@pytest.mark.parametrize(("ratio", "rounds"), [(1.1, 3), (2.0, 2), (36.0, 1), (1 / 36, 1)])
def test_trials_lose_half_a_percent_of_the_time_at_most(ratio, rounds):
    between = trials.steps_between(Round(ratio, 1.0), rounds)
    lost = rounds * 5 * (max(ratio, 1 / ratio) - 1)  # in steps of the quicker exchange
    assert between >= 2000
    assert lost / between <= 0.005 * 1.000001
    assert between == 2000 or lost / between > 0.00499


def test_a_phase_knows_how_long_it_lasts():
    schedule = DensitySchedule(DGCConfig(warmup_steps=10))
    # Four phases of 2.5 steps, which begin at 0, 3, 5 and 8.
    assert [schedule.steps_left(step) for step in range(11)] == [3, 2, 1, 2, 1, 3, 2, 1, 2, 1, math.inf]
    for steps in (1, 3, 10, 1001):
        schedule = DensitySchedule(DGCConfig(warmup_steps=steps))
        for step in range(steps):
            ends = step + schedule.steps_left(step)
            assert schedule.density(ends) < schedule.density(step) == schedule.density(ends - 1)


CHOICE = {"density": 0.1, "rows": 2, "dense": True, "dense_ms": 1.0, "sparse_ms": 2.0, "step": 38, "again": 2038}


@pytest.mark.parametrize("change", [{"rows": 2.0}, {"dense": 1}, {"dense_ms": math.nan}, {"again": -1}, {"more": 1}])
def test_a_choice_is_read_only_where_all_of_it_is_right(change):
    assert Choice.of(CHOICE) == Choice(**CHOICE)
    with pytest.raises(ValueError, match="choices"):
        Choice.of({**CHOICE, **change})
