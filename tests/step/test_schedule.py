"""The density of each step: warm-up, the number of entries, and where all-reduce is cheaper."""

from fractions import Fraction

import pytest

from dgc.config import DGCConfig
from dgc.step.schedule import DensitySchedule, dense_is_cheaper, entries, least_entries


def densities(steps, **fields):
    schedule = DensitySchedule(DGCConfig(**fields))
    return [schedule.density(step) for step in range(steps)]


def test_warm_up_has_the_papers_densities_in_equal_phases():
    assert densities(10, warmup_steps=8) == [0.25] * 2 + [0.0625] * 2 + [0.015625] * 2 + [0.004] * 2 + [0.001] * 2


def test_phases_not_above_the_final_density_are_left_out():
    assert densities(7, density=0.0625, warmup_steps=4) == [0.25] * 4 + [0.0625] * 3
    schedule = DensitySchedule(DGCConfig(density=0.5, warmup_steps=4))
    assert not schedule.warming_up(0)
    assert schedule.density(0) == 0.5


def test_without_warm_up_the_first_step_has_the_final_density():
    assert densities(1) == [0.001]


def test_a_warm_up_shorter_than_its_phases_still_falls():
    assert densities(4, warmup_steps=2) == [0.25, 0.015625, 0.001, 0.001]


@pytest.mark.parametrize(
    ("density", "share"), [(0.001, Fraction(1, 1000)), (0.01, Fraction(1, 100)), (0.25, Fraction(1, 4))]
)
def test_entries_is_the_ceiling_at_multiples_and_beside_them(density, share):
    wrong = [
        n
        for base in range(1, 30_000, 7)
        for n in (1000 * base - 1, 1000 * base, 1000 * base + 1)
        if entries(density, n) != -(-share.numerator * n // share.denominator)
    ]
    assert wrong == []


def test_at_least_one_entry_and_at_most_all():
    assert entries(0.001, 1) == 1
    assert entries(1.0, 7) == 7


def test_a_least_number_of_entries_holds_where_there_are_so_many():
    assert entries(0.001, 20_000, least=32) == 32
    assert entries(0.001, 40_000, least=32) == 40
    assert entries(0.001, 20, least=32) == 20


def test_pieces_of_a_parameter_divide_the_least_number():
    config = DGCConfig(min_entries=32)
    assert least_entries(config, 20_000, 20_000) == 32
    assert [least_entries(config, n, 20_000) for n in (5_000, 10_000, 1)] == [8, 16, 1]
    assert least_entries(DGCConfig(), 1, 20_000) == 1
    assert least_entries(config, 10, 20) == 10


def test_all_gather_is_weighed_against_all_reduce():
    # N * d * (4 + 2) >= 2 * 4: break-even at N * d = 4/3.
    assert dense_is_cheaper(0.25, ranks=6, gradient_bytes=4, entry_bytes=6)
    assert not dense_is_cheaper(0.25, ranks=5, gradient_bytes=4, entry_bytes=6)
    assert dense_is_cheaper(0.25, ranks=3, gradient_bytes=2, entry_bytes=6)
    assert not dense_is_cheaper(0.25, ranks=2, gradient_bytes=2, entry_bytes=4)
    assert not dense_is_cheaper(0.999, ranks=1, gradient_bytes=4, entry_bytes=6)
    assert dense_is_cheaper(1.0, ranks=1, gradient_bytes=4, entry_bytes=6)
