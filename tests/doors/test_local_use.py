"""dgc.LocalSteps: rounds that are saved and go on, islands that leave, and wrong use."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed import new_group
from torch.nn.parallel import DistributedDataParallel

import dgc
from dgc.exchange.distributed import DistributedExchange
from support.messages import Messages, error_of
from support.models import Given, integers, normals
from support.ranks import run_ranks
from support.round_run import RoundRun
from support.shares import rows
from support.training import LARGE, SHAPES, assert_replicas_equal, seed_of

CONFIG = dgc.DGCConfig(density=0.008, residual_decay=0.95, wire_dtype="8bit")
EVERY = 4
HALF_WAY, STEPS = 6, 14
LOCAL = {
    "averaging": {},
    "DiLoCo": {"outer": partial(dgc.OuterSGD, lr=0.7, momentum=0.9)},
    "corrected": {"outer": partial(dgc.SGD, lr=0.7, momentum=0.9, nesterov=True)},
    "delayed": {"delay": 1},
}
ADAMW = {"optimizer": torch.optim.AdamW, "lr": 0.01}


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def go_on(run, rank, steps):
    for step in steps:
        run.train(normals(SHAPES, seed_of(step, rank)))


def resume(rank, world_size, names, inside=None, places=1):
    results = {}
    for name in names:
        make = partial(RoundRun, CONFIG, EVERY, inside, places, local=LOCAL[name], **ADAMW)
        run = make()
        go_on(run, rank, range(HALF_WAY))
        saved = through_a_file({"local": run.local.state_dict(), "inner": run.inner.state_dict()})
        middle = copy.deepcopy(run.result())
        go_on(run, rank, range(HALF_WAY, STEPS))
        run.local.finish()
        other = make()
        go_on(other, rank + 7, range(3))  # what it had come to is replaced
        other.local.load_state_dict(saved["local"])
        other.inner.load_state_dict(saved["inner"])
        loaded = other.result()
        go_on(other, rank, range(HALF_WAY, STEPS))
        other.local.finish()
        results[name] = (middle, loaded, run.result(), other.result()), saved
    return results


def assert_same(one, other):
    for kind in ("parameters", "start", "residual", "momentum"):
        assert one[kind].keys() == other[kind].keys()
        assert all(torch.equal(tensor, other[kind][name]) for name, tensor in one[kind].items()), kind
    assert (one["rounds"], one["position"]) == (other["rounds"], other["position"])


@pytest.fixture(scope="module")
def resumed():
    """Two islands of one rank, saved in the middle of a round, and what they went on to."""
    return run_ranks(2, resume, [*LOCAL])


def test_a_run_goes_on_in_the_middle_of_a_round_with_the_same_bits(resumed):
    for name in LOCAL:
        for result in resumed:
            middle, loaded, straight, again = result[name][0]
            assert (middle["rounds"], middle["position"]) == (1, 2)
            assert_same(middle, loaded)
            assert_same(straight, again)
            assert not torch.equal(middle["start"]["a"], straight["start"]["a"])


@pytest.mark.parametrize("inside", ["ddp", "fsdp"])
def test_so_do_islands_of_several_ranks(inside):
    for result in run_ranks(4, resume, ["DiLoCo", "corrected"], inside, 2):
        for (middle, loaded, straight, again), _ in result.values():
            assert_same(middle, loaded)
            assert_same(straight, again)


def load_all(rank, world_size, saved):
    found = {}
    for name, local in LOCAL.items():
        run = RoundRun(CONFIG, EVERY, local=local, **ADAMW)
        run.local.load_state_dict([one[name] for one in saved])
        found[name] = run.result()
        go_on(run, rank, range(EVERY))
        run.local.finish()
        assert run.local.rounds == 3
    return found


@pytest.mark.parametrize("islands", [1, 3])
def test_another_number_of_islands_takes_over_what_waits_and_what_was_begun(resumed, islands):
    saved = [{name: result[name][1]["local"] for name in LOCAL} for result in resumed]
    results = run_ranks(islands, load_all, saved)
    matrix = rows(2, islands)
    for name in LOCAL:
        before = [result[name][0][0] for result in resumed]
        after = [result[name] for result in results]
        for kind, names in (("residual", LARGE), ("parameters", SHAPES)):
            for n in names:
                for r, one in enumerate(after):
                    # Rows add up to 1, so that weights are divided as the differences to theta_0 are.
                    expected = sum(w * b[kind][n].double() for w, b in zip(matrix[r], before, strict=True))
                    torch.testing.assert_close(one[kind][n].double(), expected, rtol=1e-5, atol=1e-6)
        for one in after:
            assert all(torch.equal(one["start"][n], before[0]["start"][n]) for n in SHAPES)
            assert (one["rounds"], one["position"]) == (1, 2)


def test_what_is_saved_is_checked(resumed):
    good = [result["averaging"][1]["local"] for result in resumed]
    share = good[0]["ranks"]["0"]
    run = RoundRun(CONFIG, EVERY, **ADAMW)
    before = copy.deepcopy(run.result())

    def wrong(**changes):
        return [{"version": 2, "ranks": {"0": {**share, **changes}}}, good[1]]

    def about(**changes):
        return wrong(local_steps={**share["local_steps"], **changes})

    start = {**share["theta_0"], "a": share["theta_0"]["a"] * torch.nan}
    other = {**share["theta_0"], "a": share["theta_0"]["a"] + 1}
    missing = {n: t for n, t in share["theta_0"].items() if n != "a"}
    groups = [{**share["local_steps"]["groups"][0], "params": ["a"]}]
    only = {key: value for key, value in share.items() if key not in ("theta_0", "local_steps")}
    for state_dict, text in (
        ([], "expected at least one, got none"),
        ([None], "expected that of a DGCState, got NoneType"),
        ([{"version": 3}], "state_dict['version']: expected 1 or 2, got 3"),
        ({"version": 2, "ranks": {"0": only}}, "not of its DGCState, got one without local_steps, theta_0"),
        (wrong(local_steps=None), "state_dict['local_steps']: expected every, groups"),
        (about(position=4), "state_dict['position']: expected a number in [0, 4), got 4"),
        (about(rounds="1"), "state_dict['rounds']: expected a number"),
        (about(rounds=2), "expected one round, got 2 and 1"),
        (about(every=5), "every: expected 5, as in the round that was saved half way, got 4"),
        (about(groups=groups), "outer: expected the parameter groups that were saved, 1 of a, got 1 of a, b, c, d, e"),
        (about(groups=None), "expected groups and numbers by parameter name"),
        (wrong(theta_0=start), "a: expected finite values; the file is damaged"),
        (wrong(theta_0=other), "expected the same theta_0 of all islands"),
        (wrong(theta_0=missing), "expected this model's parameters, but it differs in a"),
        (wrong(theta_0=None), "state_dict['theta_0']: expected tensors by parameter name, got None"),
        (wrong(theta={**share["theta"], "b": torch.zeros(3)}), "b: expected numbers (100,)"),
        (wrong(**{"outer step": {"b": torch.zeros(3)}}), "state_dict['outer step']: b: expected numbers (100,)"),
        (good[0], "which is missing: expected its state_dict"),
    ):
        assert text in error_of(partial(run.local.load_state_dict, state_dict)), text
    for kind in ("parameters", "start", "residual"):
        assert all(torch.equal(tensor, before[kind][name]) for name, tensor in run.result()[kind].items())
    run.local.load_state_dict(good[0], allow_missing_ranks=True)
    assert run.local.position == 2
    # The missing island's half counts as zero.
    torch.testing.assert_close(run.result()["residual"]["a"], share["residual"]["a"].flatten() / 2)


class Failing(DistributedExchange):
    """An exchange whose second round breaks off, as where an island has gone."""

    rounds = 0

    def start(self, name, payload, gathered, dense):
        if self.rounds == 1 and name != "e":
            raise RuntimeError("Connection closed by peer")
        return super().start(name, payload, gathered, dense)


def test_a_round_that_breaks_off_is_given_up_and_nothing_is_lost():
    exchange = Failing(torch.device("cpu"))
    run = RoundRun(dgc.DGCConfig(density=0.008), EVERY, local={"exchange": exchange})
    start = copy.deepcopy(run.result()["start"])
    errors = []
    for step in range(12):
        exchange.rounds = run.local.rounds if step < 8 else 0
        errors.append(error_of(lambda step=step: run.train(integers(SHAPES, step))))
    assert [step for step, error in enumerate(errors) if error] == [7]
    assert "Connection closed by peer" in errors[7]
    run.local.finish()
    result = run.result()
    for name in SHAPES:
        waiting = result["residual"][name] if name in LARGE else 0
        total = sum(integers(SHAPES, step)[name].flatten() for step in range(12))
        assert torch.equal((start[name] - result["start"][name]).flatten() + waiting, total), name


def left_alone(rank, world_size):
    """Island 1 leaves after its first round."""
    run = RoundRun(CONFIG, EVERY, **ADAMW)
    go_on(run, rank, range(EVERY))
    if rank == 1:
        return run.local.state_dict(), "", 0
    go_on(run, rank, range(EVERY - 1))
    before = copy.deepcopy(run.result())
    moved = normals(SHAPES, 1)
    error = error_of(lambda: run.train(moved))
    assert all(torch.equal(tensor, before["start"][name]) for name, tensor in run.result()["start"].items())
    assert all(torch.equal(tensor, before["residual"][name]) for name, tensor in run.result()["residual"].items())
    return run.local.state_dict(), error, run.local.position


def test_an_island_that_is_left_alone_keeps_everything():
    (saved, error, position), _ = run_ranks(2, left_alone)
    assert "a rank has gone" in error
    assert position == EVERY
    assert saved["ranks"]["0"]["local_steps"]["rounds"] == 1


def refused(rank, world_size):
    net = Given(SHAPES)

    def local(model=net, inner=None, config=CONFIG, every=EVERY, **options):
        inner = inner or torch.optim.SGD(model.parameters(), lr=0.1)
        return error_of(lambda: dgc.LocalSteps(model, inner, config, every=every, **options))

    found = {
        "weights": local(Given(SHAPES, seed=rank)),
        "every": local(every=EVERY + rank),
        "outer": local(**LOCAL["DiLoCo" if rank else "averaging"]),
        "DDP over islands": local(DistributedDataParallel(Given(SHAPES))),
    }
    hooked = DistributedDataParallel(Given(SHAPES))
    optimizer = dgc.SGD(hooked.parameters(), lr=0.1)
    state = dgc.DGCState(hooked.named_parameters(), optimizer)
    state.register(hooked)
    found["hook"] = local(hooked, torch.optim.SGD(hooked.parameters(), lr=0.1))

    run = RoundRun(CONFIG, EVERY)
    run.local.rounds += rank
    found["rounds"] = error_of(lambda: go_on(run, rank, range(EVERY)))
    assert run.local.position == EVERY
    run.local.rounds = 0
    run.local.outer.param_groups[0]["lr"] = 1.0 - 0.5 * rank
    found["lr"] = error_of(run.local.exchange_now)
    run.local.outer.param_groups[0]["lr"] = 1.0
    run.local.exchange_now()  # and goes on
    saved = run.local.state_dict()
    saved["ranks"][str(rank)]["theta_0"]["b"] += rank
    run.local.load_state_dict(saved)
    found["theta_0"] = error_of(run.local.exchange_now)
    return found


def test_islands_that_differ_are_refused_on_all_of_them():
    results = run_ranks(2, refused)
    assert all(results[0][name] == results[1][name] for name in results[0] if name != "DDP over islands")
    for name, text in {
        "weights": "expected equal weights on all ranks",
        "every": "every: rank 0 has 4, rank 1 has 5",
        "outer": "optimizer: rank 0 has 'SGD', rank 1 has 'OuterSGD'",
        "DDP over islands": "expected DDP inside an island and the outer exchange between islands",
        "hook": "expected a model without a DGCState, got one that is registered",
        "rounds": "round: rank 0 has 0, rank 1 has 1. Nothing was exchanged",
        "lr": "lr of outer: rank 0 has [1.0], rank 1 has [0.5]",
        "theta_0": "checksum of theta_0's b: rank 0 has",
    }.items():
        assert text in results[0][name], (name, results[0][name])


def test_wrong_arguments_say_what_to_write():
    net = nn.Linear(200, 100)
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    local = partial(dgc.LocalSteps, net, inner, every=2)
    copies = [nn.Parameter(p.detach().clone()) for p in net.parameters()]
    for call, text in (
        (partial(local, every=0), "every: expected a number of steps >= 1, got 0"),
        (partial(local, every=2.0), "every: expected a number of steps >= 1, got 2.0"),
        (partial(local, every=2, delay=2), "delay: expected a number of steps in [0, 2), so that a round has arrived"),
        (partial(local, {"density": 0.01}), "config: expected a DGCConfig or None, got dict"),
        (partial(local, dgc.DGCConfig(clip_norm=1.0)), "clip_norm: expected None for LocalSteps, got 1.0"),
        (
            lambda: dgc.LocalSteps(net, dgc.AdamW(net.parameters()), every=2),
            "got dgc.AdamW, whose gradients a DGCState reduces at every step. Write torch.optim.AdamW",
        ),
        (
            lambda: dgc.LocalSteps(net, torch.optim.SGD(copies, lr=0.1), every=2),
            "hold every trainable parameter of the model, but not weight, bias. One that works on copies",
        ),
        (
            lambda: dgc.LocalSteps(net, torch.optim.SGD([*net.parameters(), *copies], lr=0.1), every=2),
            "got others of shape (100, 200), (100,)",
        ),
        (partial(local, outer=partial(dgc.OuterSGD, momentum=1.0)), "momentum: expected a number in [0, 1), got 1.0"),
        (partial(local, outer=partial(dgc.OuterSGD, lr=-1.0)), "lr: expected a number >= 0, got -1.0"),
        (partial(local, outer=partial(torch.optim.SGD, lr=0.7, momentum=0.9)), "with momentum > 0"),
        (partial(local, outer=inner), "outer: expected a function that makes the outer optimizer"),
    ):
        assert text in error_of(call), text
        assert not inner._optimizer_step_post_hooks


def test_parameters_that_are_replaced_are_noticed_before_anything_is_exchanged():
    net = nn.Linear(200, 100)
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    local = dgc.LocalSteps(net, inner, every=1)
    net.weight = nn.Parameter(torch.zeros(100, 200))
    net(torch.ones(200)).sum().backward()
    assert "expected the parameters that it was made with, but weight were replaced" in error_of(inner.step)
    assert (local.rounds, local.state.step) == (0, 0)


def test_moments_that_are_not_finite_begin_anew_and_training_goes_on():
    messages = Messages()
    run = RoundRun(dgc.DGCConfig(density=0.008, on_nonfinite="skip"), EVERY, **ADAMW)
    for step in range(12):
        gradients = normals(SHAPES, step)
        if step == 5:
            gradients["a"][0, 0] = torch.nan
        run.train(gradients)
    assert run.local.state.stats.skipped == 1
    assert all(p.isfinite().all() for p in run.net.parameters())
    assert any("the inner optimizer's state of a was not finite, and begins anew" in line for line in messages.lines)
    assert int(run.inner.state[run.net.a]["step"]) == 4
    assert int(run.inner.state[run.net.c]["step"]) == 12


def test_what_a_round_that_was_left_out_has_left_in_dense_weights_is_saved():
    config = dgc.DGCConfig(density=0.008, on_nonfinite="skip")
    run, other = RoundRun(config, 2), RoundRun(config, 2)
    gradients = integers(SHAPES, 0)
    gradients["a"][0, 0] = torch.nan
    run.train(gradients)
    run.train(integers(SHAPES, 1))
    assert (run.local.position, run.local.state.stats.skipped) == (0, 1)
    assert not torch.equal(run.net.b, run.local._start["b"])
    other.local.load_state_dict(through_a_file(run.local.state_dict()))
    assert torch.equal(other.net.b, run.net.b)
    assert torch.equal(other.net.a, run.local._start["a"])


def test_nothing_is_saved_or_loaded_while_a_round_is_under_way():
    run = RoundRun(CONFIG, EVERY, local={"delay": 2}, **ADAMW)
    saved = run.local.state_dict()
    go_on(run, 0, range(EVERY + 1))
    assert run.local.under_way
    for call in (run.local.state_dict, partial(run.local.load_state_dict, saved)):
        assert "got one that arrives 2 steps after it was sent" in error_of(call)
    go_on(run, 0, range(1))
    assert run.local.state_dict()["ranks"]["0"]["local_steps"]["rounds"] == 1


def half_precision(rank, world_size):
    """Steps too small for bfloat16 add up in theta_0."""
    net = Given({"a": (200, 100)}, dtype=torch.bfloat16)
    inner = torch.optim.SGD(net.parameters(), lr=1.0)
    local = dgc.LocalSteps(net, inner, dgc.DGCConfig(density=1.0), every=1)
    with torch.no_grad():
        net.a.fill_(1.0)
    local.exchange_now()
    for _ in range(4):
        with torch.no_grad():
            net.a[0, 0] += 2**-7 * rank  # one unit in the last place, on one island
        local.exchange_now()
    return local._start["a"].detach().clone(), net.a.detach().clone()


def test_theta_0_of_16_bit_weights_is_float32():
    for start, weights in run_ranks(2, half_precision):
        assert start.dtype == torch.float32
        assert weights.dtype == torch.bfloat16
        assert float(start[0, 0]) == 1 + 4 * 2**-8
        assert float(start[1, 1]) == 1.0
        assert torch.equal(weights, start.bfloat16())


def apart(rank, world_size):
    """Two pairs of islands that know nothing of each other."""
    groups = [new_group([0, 1]), new_group([2, 3])]
    run = RoundRun(CONFIG, EVERY, local={"process_group": groups[rank // 2]})
    go_on(run, rank, range(2 * EVERY))
    return run.result()


def test_a_process_group_says_who_the_islands_are():
    results = run_ranks(4, apart)
    assert_replicas_equal(results[:2])
    assert_replicas_equal(results[2:])
    assert not torch.equal(results[0]["parameters"]["a"], results[2]["parameters"]["a"])
