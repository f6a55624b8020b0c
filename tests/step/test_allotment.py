"""One selection over all parameters: how the k's move, to which fixed point, and that they always add up."""

import io
import math
import random

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import dgc
from dgc.ops.selection import values_of_all
from dgc.step.allotment import EVERY, Allotment, Evidence, Part, filled, moved, scaled
from support.alone import Alone
from support.models import Given, integers, normals
from support.ranks import run_ranks

SHAPES = {"loud": (100, 200), "quiet": (150, 200), "small": (20, 30), "bias": (7,)}
LOUDNESS = {"loud": 4.0, "quiet": 1.0, "small": 2.0, "bias": 1.0}
GLOBAL = dgc.DGCConfig(density=0.01, selection="global", min_entries=2, dense_below=0)


def loud(seed, shapes=SHAPES):
    return {name: LOUDNESS[name] * g for name, g in normals(shapes, seed).items()}


def alone(config=GLOBAL, **settings):
    return Alone(SHAPES, config, lr=0.25, momentum=0.0, **settings)


def bits(value):
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def evidence(values, rows=1):
    """Returns the evidence of `rows` ranks that all send these magnitudes."""
    each = [bits(v) for v in values]
    return Evidence(rows * min(each), rows * sum(each), used=True)


def random_case(seed):
    numbers = random.Random(seed)
    parts, found = [], []
    for _ in range(numbers.randint(1, 12)):
        numel = numbers.randint(1, 5000)
        least = numbers.randint(1, min(numel, 32))
        k = numbers.randint(least, numel)
        parts.append(Part(k, least, numel))
        zeros = numbers.choice([0, 0, k // 2, k])
        scale = 10.0 ** numbers.randint(-40, 30)
        values = [0.0] * zeros + [scale * numbers.paretovariate(2) for _ in range(k - zeros)]
        what = evidence(values, rows=3)
        found.append(numbers.choice([what, what, what, what._replace(used=False), None]))
    return parts, found


@pytest.mark.parametrize("seed", range(40))
def test_entries_move_and_add_up(seed):
    parts, found = random_case(seed)
    ks = moved(parts, found, rows=3)
    assert sum(ks) == sum(p.entries for p in parts)
    for k, p, e in zip(ks, parts, found, strict=True):
        assert max(p.least, p.entries // 2) <= k <= min(p.numel, 2 * p.entries)
        if e is None or not e.used:
            assert k == p.entries


@pytest.mark.parametrize("seed", range(40))
def test_another_budget_keeps_the_proportions_and_adds_up(seed):
    parts, _ = random_case(seed)
    least, most = sum(p.least for p in parts), sum(p.numel for p in parts)
    for budget in {least, (least + most) // 2, most}:
        ks = scaled(parts, budget)
        assert sum(ks) == budget
        assert all(p.least <= k <= p.numel for k, p in zip(ks, parts, strict=True))
    free = [Part(30, 1, 10**6), Part(10, 1, 10**6), Part(60, 1, 10**6)]
    assert scaled(free, 1000) == [300, 100, 600]


def test_filled_takes_what_is_left_from_the_next_argument():
    assert filled(lambda x: [x, 10 * x, 3], 0, 100, 23) == [2, 18, 3]
    assert filled(lambda x: [x // 2, x // 2], 0, 8, 8) == [4, 4]


def test_nothing_moves_where_one_threshold_holds():
    values = [1.0, 1.5, 2.0, 3.0]
    parts = [Part(400, 1, 9999), Part(4, 1, 9999), Part(40, 1, 9999)]
    assert moved(parts, [evidence(values * (p.entries // 4)) for p in parts], 1) == [400, 4, 40]


def test_half_of_the_way_to_one_threshold():
    # Pareto tails of exponent 1 / e with means of the bits' excess e, 2^21 of each, thresholds 2^20 apart: the common
    # one is in the middle, as all slopes k / e are equal, and k (1 +- 2^19 / 2^21) lie above it: 1250 and 750.
    e, t = 2**21, 2**30
    found = [Evidence(t + 2**20, 1000 * (t + 2**20 + e), used=True), Evidence(t, 1000 * (t + e), used=True)]
    ks = moved([Part(1000, 1, 10**6)] * 2, found, rows=1)
    assert ks[0] == pytest.approx(1125, abs=1)
    assert sum(ks) == 2000


def test_the_fixed_point_has_one_threshold_over_two_scales():
    # The j-th largest of n values of a Pareto tail with exponent 2 is s (n / j)^(1/2), so n s^2 / x^2 lie above x: with
    # scales 1 and 3, equal n and 1000 entries in all, 100 and 900.
    def largest(scale, k, n=100_000):
        return [scale * math.sqrt(n / j) for j in range(1, k + 1)]

    ks = [500, 500]
    for _ in range(40):
        parts = [Part(k, 1, 100_000) for k in ks]
        ks = moved(parts, [evidence(largest(1, ks[0])), evidence(largest(3, ks[1]))], 1)
    # Rounding leaves k alone where it would move by less than one half, at 1 % here.
    assert ks[0] == pytest.approx(100, abs=1)
    assert sum(ks) == 1000


def thresholds(one):
    """Returns the smallest sent magnitude of each parameter."""
    sparse = one.state.last_pass.buckets[0].sparse
    values = values_of_all(sparse.selections, sparse.receiving, torch.float32)[0].abs()
    smallest = values.split([m.entries for m in sparse.members])
    return {m.slot.name: float(v.min()) for m, v in zip(sparse.members, smallest, strict=True)}


def test_one_threshold_comes_to_hold_where_gradients_differ_by_scale():
    each, together = alone(dgc.DGCConfig(density=0.01, dense_below=0)), alone()
    for step in range(30 * EVERY):
        each.train(loud(step))
        together.train(loud(step))
    apart, close = thresholds(each), thresholds(together)
    assert apart["loud"] / apart["quiet"] > 3.5
    assert close["loud"] / close["quiet"] == pytest.approx(1, abs=0.1)
    sent = together.state.stats.entries
    assert sum(sent.values()) == sum(each.state.stats.entries.values()) == 200 + 300 + 6
    assert sent["loud"] > 2 * sent["quiet"]


def test_the_entries_of_each_phase_are_its_budget_and_keep_their_proportions():
    config = dgc.DGCConfig(
        density=0.01,
        warmup_steps=44,
        warmup_densities=(0.2, 0.05),
        selection="global",
        min_entries=4,
        dense_below=0,
    )
    one, seen = alone(config), []
    for step in range(60):
        one.train(loud(step))
        seen.append(one.state.stats.entries)
    budgets = [sum(ks.values()) for ks in seen]
    assert budgets == [10_120] * 22 + [2_530] * 22 + [506] * 16
    assert all(min(ks.values()) >= 4 for ks in seen)
    assert seen[0] == {"loud": 4000, "quiet": 6000, "small": 120}
    last, first = seen[43], seen[44]  # neither of them a step after which entries move
    assert last["loud"] > 1.4 * last["quiet"]
    assert first["loud"] / first["quiet"] == pytest.approx(last["loud"] / last["quiet"], rel=0.02)


def test_the_ks_change_after_every_eighth_step_only():
    one, seen = alone(), []
    for step in range(3 * EVERY):
        one.train(loud(step))
        seen.append(one.state.stats.entries)
    changed = [step for step in range(1, 3 * EVERY) if seen[step] != seen[step - 1]]
    assert changed == [EVERY, 2 * EVERY]


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_is_left_out_moves_nothing(late):
    config = dgc.DGCConfig(density=0.01, selection="global", dense_below=0, on_nonfinite="skip", droppable=True)
    one = alone(config, late=late)
    for step in range(EVERY - 1):
        one.train(loud(step))
    before = one.state.stats.entries
    bad = loud(90)
    bad["loud"][3] = math.inf
    one.train(bad)
    one.backward(loud(91))
    one.state.discard(drop_gradient=True)
    one.train(loud(92))
    assert one.state.stats.entries == before
    one.train(loud(93))
    assert one.state.stats.entries != before


def test_a_parameter_without_gradient_keeps_its_entries():
    one = alone()
    for step in range(2 * EVERY):
        one.train({**loud(step), "small": torch.zeros(SHAPES["small"])})
    one.train(loud(99))
    assert one.state.stats.entries["small"] == 6
    assert one.state.stats.entries["loud"] > 200


def test_a_run_goes_on_with_the_same_bits():
    def fresh():
        return alone(dgc.DGCConfig(density=0.01, selection="global", dense_below=0, warmup_steps=50))

    whole = fresh()
    for step in range(2 * EVERY + 3):
        whole.train(loud(step))
    file = io.BytesIO()
    saved = {"model": whole.model.state_dict(), "dgc": whole.state.state_dict()}
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed = fresh()
    resumed.model.load_state_dict(loaded["model"])
    resumed.state.load_state_dict(loaded["dgc"])
    for step in range(2 * EVERY + 3, 70):
        for one in (whole, resumed):
            one.train(loud(step))
        assert resumed.state.stats.entries == whole.state.stats.entries
    assert torch.equal(resumed.state.memory.residual, whole.state.memory.residual)
    assert all(torch.equal(resumed.parameter(name), whole.parameter(name)) for name in SHAPES)


def test_what_was_saved_with_another_selection_loads():
    plain = alone(dgc.DGCConfig(density=0.01, dense_below=0))
    together = alone()
    for step in range(EVERY + 1):
        plain.train(loud(step))
        together.train(loud(step))
    saved = together.state.state_dict()
    together.state.load_state_dict(plain.state.state_dict())
    plain.state.load_state_dict(saved)
    for one in (plain, together):
        one.train(loud(50))
        assert one.state.stats.entries == {"loud": 200, "quiet": 300, "small": 6}


def test_set_density_scales_the_entries():
    one = alone()
    for step in range(4 * EVERY + 1):
        one.train(loud(step))
    before = one.state.stats.entries
    one.state.set_density(0.02)
    one.train(loud(60))
    assert sum(one.state.stats.entries.values()) == 400 + 600 + 12
    assert one.state.stats.entries["loud"] == pytest.approx(2 * before["loud"], abs=4)


def test_a_dense_phase_leaves_them():
    kept = Allotment()
    kept.enter({"a": 3, "b": 5}, {"a": (1, 90), "b": (1, 90)})
    kept.entries = {"a": 6, "b": 2}
    kept.enter({}, {})
    kept.enter({"a": 3, "b": 5}, {"a": (1, 90), "b": (1, 90)})
    assert kept.entries == {"a": 6, "b": 2}
    kept.enter({"a": 3, "c": 5}, {"a": (1, 90), "c": (1, 90)})  # other parameters: 6 and 5 were 8
    assert sum(kept.entries.values()) == 8
    assert kept.entries.keys() == {"a", "c"}


def train_with_ddp(rank, world_size):
    """Two buckets, gradients that differ between ranks, and are integers."""
    config = dgc.DGCConfig(density=0.01, selection="global", min_entries=2, dense_below=0)
    model = DistributedDataParallel(Given(SHAPES), bucket_cap_mb=0.05)
    optimizer = dgc.SGD(model.parameters(), lr=0.25, momentum=0.0)
    state = dgc.DGCState(model.named_parameters(), optimizer, config)
    state.register(model)
    start = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    total = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    seen, buckets = [], set()
    for step in range(5 * EVERY):
        gradients = integers(SHAPES, 1000 * rank + step)
        gradients["loud"] *= 4
        for name in SHAPES:
            total[name] += gradients[name]
        optimizer.zero_grad()
        model(gradients).backward()
        optimizer.step()
        seen.append(state.stats.entries)
        buckets.add(len(state.last_pass.buckets))
    moved_by = {name: (start[name] - p.detach()) / 0.25 for name, p in model.module.named_parameters()}
    waits = {name: state.memory.residual_of(name).clone() for name in state.memory.waiting}
    return {"seen": seen, "total": total, "moved": moved_by, "waits": waits, "buckets": buckets}


def test_ranks_agree_over_buckets_and_nothing_is_lost():
    ranks = run_ranks(2, train_with_ddp)
    assert ranks[0]["seen"] == ranks[1]["seen"]
    assert max(ranks[0]["buckets"]) > 1
    assert {sum(ks.values()) for ks in ranks[0]["seen"]} == {506}
    assert ranks[0]["seen"][-1]["loud"] > 250
    for name in ("loud", "quiet", "small"):
        assert torch.equal(ranks[0]["moved"][name], ranks[1]["moved"][name])
        sent = ranks[0]["moved"][name]
        waiting = (ranks[0]["waits"][name] + ranks[1]["waits"][name]) / 2
        assert torch.equal(sent + waiting, (ranks[0]["total"][name] + ranks[1]["total"][name]) / 2)


def test_masked_parameters_send_no_more_than_what_is_alive():
    one = alone()
    for step in range(2 * EVERY + 1):
        one.train(loud(step))
    assert one.state.stats.entries["loud"] > 250
    alive = torch.zeros(SHAPES["loud"], dtype=torch.bool)
    alive[0, :50] = True
    one.state.mask("loud", alive)
    for step in range(2 * EVERY + 1):
        one.train(loud(step))
        sent = one.state.stats.entries
        assert sent["loud"] <= 50
        assert sum(sent.values()) == 2 + 300 + 6  # min_entries of what is alive of "loud"
