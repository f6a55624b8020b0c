"""dgc.AdamW on several ranks: accumulation, ranks that differ, checkpoints, and ranks that come and go."""

import pytest
import torch
import torch.distributed as dist

import dgc
from support.alone import reduce
from support.ddp_run import Run
from support.messages import Messages
from support.models import Given, integers, normals
from support.ranks import run_ranks
from support.shares import load_all, mean, rows, save_all
from support.training import LARGE, MOMENTS, SHAPES, assert_replicas_equal, assert_resumed, kinds_of, outcome, seed_of

ADAM = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
CONFIG = dgc.DGCConfig(density=0.01)


def adamw(config=CONFIG, **settings):
    return Run(config, optimizer=dgc.AdamW, **{**ADAM, **settings})


# gradients that are accumulated first


def accumulate(rank, world_size):
    several, one = adamw(), adamw()
    for step in range(4):
        first, second = integers(SHAPES, seed_of(step, rank)), integers(SHAPES, seed_of(step + 50, rank))
        several.optimizer.zero_grad()
        with several.ddp.no_sync():
            several.ddp(first).sum().backward()
        several.ddp(second).sum().backward()
        several.optimizer.step()
        one.train({name: first[name] + second[name] for name in SHAPES})
    assert several.state.step == 4
    return several.result(), one.result()


def test_passes_under_no_sync_are_one_gradient():
    results = run_ranks(2, accumulate)
    assert_replicas_equal([several for several, _ in results])
    for several, one in results:
        for kind in kinds_of(several):
            for name, tensor in several[kind].items():
                assert torch.equal(tensor, one[kind][name]), (kind, name)


# ranks that differ


def differ(rank, world_size):
    def message(kind=dgc.AdamW, **settings):
        with pytest.raises(ValueError, match="expected the same configuration") as caught:
            Run(CONFIG, optimizer=kind, **{**ADAM, **settings})
        return str(caught.value)

    betas, eps = message(betas=(0.9, 0.99 - 0.25 * rank)), message(eps=1e-3 * (1 + rank))
    adamw(lr=0.01 * (1 + rank))  # a newcomer's follows later
    return betas, eps, message(dgc.AdamW if rank else dgc.Adam, weight_decay=0)


def test_betas_and_eps_that_differ_are_an_error_on_all_ranks_that_names_them():
    start = "(beta1, beta2, eps) by group: rank 0 has [(0.9, 0.99, 0.001)], rank 1 has "
    for betas, eps, kind in run_ranks(2, differ):
        assert start + "[(0.9, 0.74, 0.001)]" in betas
        assert start + "[(0.9, 0.99, 0.002)]" in eps
        assert "optimizer: rank 0 has 'Adam', rank 1 has 'AdamW'" in kind


# a gradient that is thrown away, in one of several buckets


def throw_away(rank, world_size):
    run = adamw(dgc.DGCConfig(density=0.01, droppable=True))
    for step in range(2):
        run.train(normals(SHAPES, seed_of(step, rank)))
    before = run.result()
    run.optimizer.zero_grad()
    run.ddp(normals(SHAPES, seed_of(2, rank))).sum().backward()
    run.net.a.grad = None  # on all ranks
    run.optimizer.step()
    steps = {n: int(run.optimizer.state[p]["step"]) for n, p in run.net.named_parameters()}
    after = run.result()
    kept = all(torch.equal(before[kind]["a"], after[kind]["a"]) for kind in ("parameters", "residual", *MOMENTS))
    run.train(normals(SHAPES, seed_of(3, rank)))
    assert len(run.state._pass.buckets) > 2
    return steps, kept, run.result()


def test_a_gradient_thrown_away_on_all_ranks_is_in_no_moment():
    results = run_ranks(2, throw_away)
    assert_replicas_equal([r for _, _, r in results])
    for steps, kept, _ in results:
        assert steps == {"a": 2, "b": 3, "c": 3, "d": 3, "e": 3}
        assert kept


# checkpoints


def resume(rank, world_size, folder):
    straight = adamw()
    for step in range(8):
        straight.train(normals(SHAPES, seed_of(step, rank)))
        if step == 3:
            save_all(straight, folder)
    resumed = adamw()
    load_all(resumed, folder)
    for step in range(4, 8):
        resumed.train(normals(SHAPES, seed_of(step, rank)))
    return straight.result(), resumed.result()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_is_resumed_bit_for_bit(world_size, tmp_path):
    for straight, resumed in run_ranks(world_size, resume, str(tmp_path)):
        assert_resumed(straight, resumed, world_size)


def train_and_save(rank, world_size, folder):
    run = adamw()
    for step in range(5):
        run.train(normals(SHAPES, seed_of(step, rank)))
    save_all(run, folder)
    whole = run.state.full_state_dict()
    if rank == 0:
        torch.save(whole, f"{folder}/whole.pt")
    return run.result()


def go_on(rank, world_size, folder, whole):
    run = adamw()
    load_all(run, folder)
    if whole:
        run.state.load_state_dict(torch.load(f"{folder}/whole.pt", weights_only=True))
    loaded = run.result()
    for step in range(5, 8):
        run.train(normals(SHAPES, seed_of(step, rank)))
    return loaded, run.result()


@pytest.mark.parametrize(("before", "now", "whole"), [(4, 2, False), (2, 3, True), (3, 1, False)])
def test_another_number_of_ranks_divides_first_moments_and_averages_second_ones(before, now, whole, tmp_path):
    old = run_ranks(before, train_and_save, str(tmp_path))
    loaded, later = zip(*run_ranks(now, go_on, str(tmp_path), whole), strict=True)
    assert_replicas_equal(loaded)
    assert_replicas_equal(later)
    matrix = rows(before, now)
    for kind in ("residual", *MOMENTS):
        for name in SHAPES if kind != "residual" else LARGE:
            if name not in LARGE:
                assert all(torch.equal(r[kind][name], old[0][kind][name]) for r in loaded), (kind, name)
                continue
            # The weights of a rank add up to 1, so what they divide they also average.
            for rank in range(now):
                expected = sum(w * r[kind][name].double() for w, r in zip(matrix[rank], old, strict=True))
                torch.testing.assert_close(loaded[rank][kind][name].double(), expected, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(mean(loaded, kind, name), mean(old, kind, name), rtol=1e-5, atol=1e-7)
    assert [r["step"] for r in later] == [8] * now


def without_two(rank, world_size, folder):
    run = adamw()
    with pytest.raises(ValueError, match="allow_missing_ranks=True"):
        load_all(run, folder)
    load_all(run, folder, allow_missing_ranks=True)
    return run.result()


def test_shares_of_missing_ranks_count_as_zero_but_not_in_second_moments(tmp_path):
    old = run_ranks(4, train_and_save, str(tmp_path))
    for rank in (1, 2, 3):
        for file in (tmp_path / "dgc").glob(f"__{rank}_*"):
            file.unlink()
    one, other = run_ranks(2, without_two, str(tmp_path))  # of ranks 0 and 1, and of 2 and 3
    for name in LARGE:
        for kind in ("residual", "exp_avg"):
            assert torch.equal(one[kind][name], 0.5 * old[0][kind][name])
            assert not other[kind][name].any()
        for result in (one, other):
            assert torch.equal(result["exp_avg_sq"][name], old[0]["exp_avg_sq"][name])


# ranks that come and go


def build(group, rank=0):
    net = Given(SHAPES, seed=rank)
    optimizer = dgc.AdamW(net.parameters(), **ADAM)
    return net, optimizer, dgc.DGCState(net.named_parameters(), optimizer, CONFIG, process_group=group)


def train(net, optimizer, state, step):
    optimizer.zero_grad()
    net(normals(SHAPES, seed_of(step, dist.get_rank()))).backward()
    reduce(state, net)
    optimizer.step()


def leave_and_come(rank, world_size):
    """Ranks 0 to 2 train; 1 leaves; then 1 and 3 come as new ones."""
    old, left, new = (dist.new_group(ranks) for ranks in ([0, 1, 2], [0, 2], [0, 1, 2, 3]))
    notes, log = {}, Messages()
    net, optimizer, state = build(old) if rank < 3 else (None, None, None)
    for step in range(4 * (rank < 3)):
        train(net, optimizer, state, step)
    if rank < 3:
        notes["of three"] = outcome(net, state)
    if rank in (0, 2):
        state.exchange.group = left
        state.regroup()
        notes["of two"] = outcome(net, state)
        for step in range(4, 6):
            train(net, optimizer, state, step)
        notes["before four"] = outcome(net, state)
        state.exchange.group = new
        state.regroup()
    else:
        net, optimizer, state = build(new, rank=rank)  # agrees with the others: a collective
    notes["of four"] = outcome(net, state)
    for p in net.parameters():  # as a framework does
        dist.broadcast(p.data, 0, group=new)
    saved = [optimizer.state_dict()]
    dist.broadcast_object_list(saved, 0, group=new)
    optimizer.load_state_dict(saved[0])
    for step in range(6, 9):
        train(net, optimizer, state, step)
    return {**notes, "end": outcome(net, state), "log": log.lines}


def test_survivors_keep_second_moments_and_newcomers_get_their_mean():
    notes = run_ranks(4, leave_and_come)
    for name in SHAPES:
        before = [notes[rank]["before four"] for rank in (0, 2)]
        for rank in (0, 2):
            three, two, old, four = (notes[rank][k] for k in ("of three", "of two", "before four", "of four"))
            factors = (2 / 3, 2) if name in LARGE else (1, 1)
            for kind in ("residual", "exp_avg") if name in LARGE else ("exp_avg",):
                assert torch.equal(two[kind][name], three[kind][name] * factors[0]), (kind, name)
                assert torch.equal(four[kind][name], old[kind][name] * factors[1]), (kind, name)
            assert torch.equal(two["exp_avg_sq"][name], three["exp_avg_sq"][name])
            assert torch.equal(four["exp_avg_sq"][name], old["exp_avg_sq"][name])
        for rank in (1, 3):
            four = notes[rank]["of four"]
            torch.testing.assert_close(four["exp_avg_sq"][name], sum(b["exp_avg_sq"][name] for b in before) / 2)
            if name in LARGE:
                assert not four["residual"][name].any()
                assert not four["exp_avg"][name].any()
                assert not torch.equal(before[0]["exp_avg_sq"][name], before[1]["exp_avg_sq"][name])
            else:
                assert torch.equal(four["exp_avg"][name], before[0]["exp_avg"][name])
        assert torch.equal(*(notes[rank]["of four"]["exp_avg_sq"][name] for rank in (1, 3)))
    assert [n["of four"]["step"] for n in notes] == [6] * 4
    assert_replicas_equal([n["end"] for n in notes])
    assert "4 ranks now, 2 before, 2 new; residuals multiplied by 4/2" in "\n".join(notes[0]["log"])
