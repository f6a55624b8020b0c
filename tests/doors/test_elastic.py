"""Ranks that come and go: whose share of momentum and residual goes where."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dgc
from support import horovod_ranks
from support.alone import Alone, reduce
from support.messages import Messages
from support.models import Given, integers, normals
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_equal, assert_replicas_equal, outcome, seed_of


def train(net, optimizer, state, step):
    optimizer.zero_grad()
    net(normals(SHAPES, seed_of(step, dist.get_rank()))).backward()
    reduce(state, net)
    optimizer.step()


def build(group, rank=0, **sgd):
    net = Given(SHAPES, seed=rank)
    optimizer = dgc.SGD(net.parameters(), **{"lr": 0.5, "momentum": 0.5, **sgd})
    return net, optimizer, dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(0.008), process_group=group)


def leave_and_come(rank, world_size):
    """Ranks 0 to 2 train; 1 leaves; then 1 and 3 come as new ones."""
    old, left, new = (dist.new_group(ranks) for ranks in ([0, 1, 2], [0, 2], [0, 1, 2, 3]))
    notes = {}
    log = Messages()
    net, optimizer, state = build(old) if rank < 3 else (None, None, None)
    for step in range(5 * (rank < 3)):
        train(net, optimizer, state, step)
    if rank < 3:
        notes["of three"] = outcome(net, state)
    if rank in (0, 2):
        state.exchange.group = left
        state.regroup()
        notes["of two"] = outcome(net, state)
        for step in range(5, 8):
            train(net, optimizer, state, step)
        notes["before four"] = outcome(net, state)
        state.exchange.group = new
        state.regroup()
    else:
        net, optimizer, state = build(new, rank=rank)  # agrees with the others: a collective
    notes["of four"] = outcome(net, state)
    for p in net.parameters():
        dist.broadcast(p.data, 0, group=new)  # as a framework does
    for step in range(8, 12):
        train(net, optimizer, state, step)
    notes["end"] = outcome(net, state)
    notes["log"] = log.lines
    return notes


def test_shares_are_rescaled_newcomers_start_at_zero_and_losses_are_logged():
    notes = run_ranks(4, leave_and_come)
    for name in SHAPES:
        for rank in (0, 2):
            three, two, before, four = (notes[rank][k] for k in ("of three", "of two", "before four", "of four"))
            # A compressed parameter's momentum is a share, a dense one's is the same everywhere.
            factor = 2 / 3 if name in LARGE else 1
            assert torch.equal(two["momentum"][name], three["momentum"][name] * factor)
            assert torch.equal(four["momentum"][name], before["momentum"][name] * (2 if name in LARGE else 1))
            if name in LARGE:
                assert torch.equal(two["residual"][name], three["residual"][name] * (2 / 3))
                assert torch.equal(four["residual"][name], before["residual"][name] * 2)
        for rank in (1, 3):
            four = notes[rank]["of four"]
            if name in LARGE:
                assert not four["residual"][name].any()
                assert not four["momentum"][name].any()
            else:
                assert torch.equal(four["momentum"][name], notes[0]["of four"]["momentum"][name])
    assert [n["of four"]["step"] for n in notes] == [8] * 4
    assert_replicas_equal([n["end"] for n in notes])
    log = "\n".join(notes[0]["log"])
    assert "2 ranks now, 3 before, 0 new; residuals multiplied by 2/3" in log
    assert "rank 1 of 3 left: what it had not sent is lost, 1/3 of all that waited" in log
    assert "4 ranks now, 2 before, 2 new; residuals multiplied by 4/2" in log
    assert not any("left:" in line for n in notes[1:] for line in n["log"])  # rank 0 speaks


def disagree(rank, world_size, how):
    group = dist.new_group([0, 1])
    net, optimizer, state = build(None)
    train(net, optimizer, state, 0)
    if how == "pending":
        optimizer.zero_grad()
        net(integers(SHAPES, 0)).backward()
        reduce(state, net)
    state._standing.step += rank
    state.exchange.group = group
    with pytest.raises(RuntimeError) as caught:
        state.regroup()
    return str(caught.value), state.memory.residual.count_nonzero().item()


def test_survivors_of_different_steps_are_refused_and_keep_what_they_have():
    for message, waiting in run_ranks(2, disagree, "step"):
        assert "rank 0 was rank 0 of 2 at step 1; rank 1 was rank 1 of 2 at step 2" in message
        assert waiting > 80_000


def fail_then_regroup(rank, world_size):
    old, new = dist.new_group([0, 1, 2]), dist.new_group([0, 1])
    net, optimizer, state = build(old)
    train(net, optimizer, state, 0)
    before = outcome(net, state)
    if rank == 2:
        return None
    state.exchange.group = new
    state._standing.step += rank
    with pytest.raises(RuntimeError):
        state.regroup()
    state._standing.step -= rank
    kept = state.exchange.rank, state.exchange.world_size
    state.regroup()
    return kept, before, outcome(net, state)


def test_a_regroup_that_fails_can_be_tried_again():
    for rank, (kept, before, after) in enumerate(run_ranks(3, fail_then_regroup)[:2]):
        assert kept == (rank, 3)
        assert torch.equal(after["residual"]["a"], before["residual"]["a"] * (2 / 3))


def test_regroup_counts_a_step_that_the_device_has_left_out():
    one = Alone(SHAPES, dgc.DGCConfig(0.008, on_nonfinite="skip"), lr=0.5, late=True)
    one.train(normals(SHAPES, 0))
    one.train({**normals(SHAPES, 1), "a": torch.full(SHAPES["a"], torch.nan)})
    shares = []
    one.state.exchange.everyone = lambda text: shares.append(text) or [text]
    one.state.regroup()
    assert '"step": 1' in shares[-1]


def test_regroup_with_an_update_outstanding_is_refused():
    for message, _ in run_ranks(2, disagree, "pending"):
        assert "call step() first, or, to leave this update out, state.discard(drop_gradient=False)" in message


# in Horovod


def commit_and_restore(settings):
    """Commits after 4 of 8 steps, trains on, restores and repeats these steps."""
    from support.horovod_run import Run, hvd

    run = Run(dgc.DGCConfig(0.008, warmup_steps=6, warmup_densities=(0.25,)), weight_decay=0.1, **settings)
    with pytest.raises(ValueError, match=r"dgc=optimizer\.dgc_state"):
        hvd.elastic.TorchState(model=run.net, optimizer=run.optimizer)
    elastic = hvd.elastic.TorchState(model=run.net, optimizer=run.optimizer, dgc=run.state, batch=0)
    fresh = outcome(run.net, run.state)
    results = []
    for step in range(8):
        if step == 4:
            elastic.batch = step
            elastic.commit()
        run.train(normals(SHAPES, seed_of(step, hvd.rank())))
    results.append(outcome(run.net, run.state))
    run.net(normals(SHAPES, 99)).backward()  # a step that breaks off
    elastic.restore()
    elastic.sync()
    assert elastic.batch == 4
    assert run.state.memory.residual.any()
    for step in range(4, 8):
        run.train(normals(SHAPES, seed_of(step, hvd.rank())))
    results.append(outcome(run.net, run.state))
    run.state.restore(run.state.state_dict(), joined=False)  # as before the first sync of an elastic run
    other = hvd.elastic.TorchState(model=run.net, dgc=run.state)
    other.sync()
    assert run.state.joined
    other.restore()  # a worker that came and never committed is new again
    assert not run.state.joined
    other.sync()
    run.net(normals(SHAPES, 99)).backward()
    run.optimizer.synchronize()
    try:
        other.commit()
    except RuntimeError as error:
        message = str(error)
    run.state.discard(drop_gradient=False)
    return results, fresh, message


def test_commit_and_restore_bring_back_each_workers_own():
    pytest.importorskip("horovod.torch", reason="needs Horovod: ./launch/install_horovod.sh")
    pool = horovod_ranks.Pool(2)
    try:
        ranks = pool(commit_and_restore, {})
        adam = pool(commit_and_restore, {"optimizer": dgc.AdamW, "lr": 0.01})
    finally:
        pool.close()
    for (straight, again), fresh, message in [*ranks, *adam]:
        assert_equal([straight], [again])
        assert straight["step"] == again["step"] == 8
        assert not fresh["residual"]["a"].any()
        assert "between optimizer.step() and the next backward()" in message
    assert not torch.equal(ranks[0][0][0]["residual"]["a"], ranks[1][0][0]["residual"]["a"])


def test_a_real_elastic_run_gains_a_worker_and_loses_another(tmp_path):
    pytest.importorskip("horovod.torch", reason="needs Horovod: ./launch/install_horovod.sh")
    # Two names of this machine, since Horovod gives up a whole host when a worker dies there.
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    discover = tmp_path / "discover.sh"
    discover.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discover.chmod(discover.stat().st_mode | stat.S_IEXEC)
    tests, scripts = Path(__file__).parents[1], Path(sys.executable).parent
    path = os.pathsep.join(filter(None, [str(tests), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [
            *(scripts / "horovodrun", "--gloo", "-np", "2", "--min-np", "2", "--max-np", "3"),
            *("--host-discovery-script", discover, sys.executable),
            *(tests / "support/elastic_worker.py", tmp_path, hosts),
        ],
        env={
            **os.environ,
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": path,
            "HOROVOD_GLOO_TIMEOUT_SECONDS": "20",  # after the death the others wait as long; 30 is the default
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    log = run.stdout + run.stderr
    assert run.returncode == 0, log[-4000:]
    records = [torch.load(path, weights_only=False) for path in tmp_path.glob("*.pt")]
    by_groups = {tuple(size for size, _, _ in record): record for record in records}
    assert len(records) == 3
    first, dead, newcomer = by_groups[2, 3, 2], by_groups[2, 3], by_groups[3, 2]

    # In the group of three: both old workers' shares are rescaled, the newcomer has none.
    for old in (first, dead):
        (_, _, before), (_, after, _) = old[:2]
        for name in LARGE:
            assert before["residual"][name].any()
            assert torch.equal(after["residual"][name], before["residual"][name] * 1.5)
            assert torch.equal(after["momentum"][name], before["momentum"][name] * 1.5)
    came, beside = newcomer[0][1], first[1][1]
    assert came["step"] == beside["step"] == first[0][2]["step"]
    for name in SHAPES:
        assert torch.equal(came["parameters"][name], beside["parameters"][name])
        if name in LARGE:
            assert not came["residual"][name].any()
            assert not came["momentum"][name].any()
        else:
            assert torch.equal(came["momentum"][name], beside["momentum"][name])

    # After the death: the step that broke off is gone, and the share of the dead.
    for survivor in (first, newcomer):
        committed, after, end = survivor[-2][2], survivor[-1][1], survivor[-1][2]
        assert after["step"] == committed["step"] == beside["step"] + 5
        assert end["step"] == after["step"] + 5
        for name in SHAPES:
            assert torch.equal(after["parameters"][name], committed["parameters"][name])
            factor = 2 / 3 if name in LARGE else 1
            assert torch.equal(after["momentum"][name], committed["momentum"][name] * factor)
            if name in LARGE:
                assert torch.equal(after["residual"][name], committed["residual"][name] * factor)
    assert_replicas_equal([first[-1][2], newcomer[-1][2]])
    assert "3 ranks now, 2 before, 1 new; residuals multiplied by 3/2" in log
    assert "of 3 left: what it had not sent is lost, 1/3 of all that waited" in log
