"""Clipping of local gradients: the norm, the scale for N ranks, and small gradients that stay as they are."""

import math

import pytest
import torch

from dgc.step.clip import clip_scale, squared_norm


def test_the_norm_is_that_of_all_gradients_in_float64():
    a, b = torch.full((1000,), 0.1), torch.full((3, 4), -2.0)
    total = squared_norm(a) + squared_norm(b)
    assert total.dtype == torch.float64
    assert float(total) == pytest.approx(1000 * float(torch.tensor(0.1)) ** 2 + 12 * 4, rel=1e-12)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_the_norm_counts_finite_entries_only(bad):
    assert float(squared_norm(torch.tensor([3.0, bad, 4.0]))) == pytest.approx(25)


@pytest.mark.parametrize("world_size", [1, 2, 4, 9])
def test_a_local_gradient_is_clipped_at_root_n_times_the_threshold(world_size):
    g = torch.tensor([30.0, 40.0])
    scale = clip_scale(torch.stack([squared_norm(g)]), 2.0, world_size)
    assert scale.dtype == torch.float32
    assert scale.shape == (1,)
    assert float((g * scale).norm()) == pytest.approx(2.0 * math.sqrt(world_size), rel=1e-6)


def test_a_small_gradient_is_left_exactly_as_it_is():
    assert float(clip_scale(torch.stack([squared_norm(torch.tensor([0.3, 0.4]))]), 1.0, 1)) == 1.0
    assert float(clip_scale(torch.stack([squared_norm(torch.zeros(3))]), 1.0, 1)) == 1.0


def test_averages_of_clipped_independent_gradients_have_the_threshold_as_norm():
    # The point of the rule: N orthogonal clipped gradients average to clip_norm.
    n, c = 4, 1.5
    g = [10 * torch.eye(n)[i] for i in range(n)]
    average = sum(x * clip_scale(torch.stack([squared_norm(x)]), c, n) for x in g) / n
    assert float(average.norm()) == pytest.approx(c, rel=1e-6)
