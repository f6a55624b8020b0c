"""How long entries wait, against a count of every entry."""

import pytest
import torch

import dgc
from dgc.memory.ages import EVERY, Ages
from support.alone import Alone
from support.models import normals

SHAPES = {"a": (30, 20), "b": (50, 11), "bias": (7,)}
DENSITY = 0.02


def alone(**settings):
    return Alone(SHAPES, dgc.DGCConfig(density=DENSITY, dense_below=100), lr=0.25, momentum=0.0, **settings)


def simulated(steps):
    """Returns the ages of all that is sent in one step after the other, by plain accumulation."""
    waiting = {name: torch.zeros(SHAPES[name], dtype=torch.float64).view(-1) for name in ("a", "b")}
    last = {name: torch.zeros(v.numel(), dtype=torch.int64) for name, v in waiting.items()}
    ages = []
    for step in range(steps):
        gradients = normals(SHAPES, step)
        for name, v in waiting.items():
            v += gradients[name].double().view(-1)
            sent = v.abs().topk(round(DENSITY * v.numel())).indices
            ages += (step + 1 - last[name][sent]).tolist()
            last[name][sent] = step + 1
            v[sent] = 0
    return ages


def test_with_every_entry_in_the_sample_the_figure_is_the_mean_age():
    one = alone()
    one.state.watch_ages(sample=10**6)
    for step in range(EVERY):
        assert one.state.stats.age is None
        assert "age" not in one.state.stats.scalars()
        one.train(normals(SHAPES, step))
    ages = simulated(EVERY)
    assert len(ages) == EVERY * (12 + 11)
    assert one.state.stats.age == sum(ages) / len(ages) == one.state.stats.scalars()["age"]


def test_a_sample_counts_from_its_begin_and_each_round_anew():
    ages = Ages(numel=1000, sample=300, step=5, device=torch.device("cpu"))  # every third element
    ages.note(torch.tensor([0, 1, 3]), step=5)  # two of the sample, which did not wait
    ages.note(torch.tensor([999, 998, 3]), step=9)  # 5 steps since the begin, and 4
    ages.end(99)
    assert ages.figure is None
    ages.end(100)
    assert ages.figure == (1 + 1 + 5 + 4) / 4
    ages.note(torch.tensor([0]), step=110)
    ages.end(200)
    assert ages.figure == 105
    ages.end(300)
    assert ages.figure is None


def test_a_run_that_goes_on_from_a_checkpoint_counts_from_there():
    before, one = alone(), alone()
    one.state.watch_ages()
    for step in range(60):
        before.train(normals(SHAPES, step))
    one.state.load_state_dict(before.state.state_dict())
    for step in range(60, EVERY):
        one.train(normals(SHAPES, step))
    assert 1 <= one.state.stats.age <= EVERY - 60


def test_nothing_is_watched_unless_asked_and_a_sample_of_nothing_is_refused():
    one = alone()
    for step in range(EVERY):
        one.train(normals(SHAPES, step))
    assert one.state.stats.age is None
    with pytest.raises(ValueError, match="sample: expected a number of entries > 0, got 0"):
        one.state.watch_ages(0)
