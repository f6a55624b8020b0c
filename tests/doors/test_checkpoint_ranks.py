"""Checkpoints of several ranks, loaded on as many and on others; and what goes wrong on one of them."""

import copy
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dgc
from support.ddp_run import Run
from support.messages import Messages
from support.models import integers, normals
from support.ranks import run_ranks
from support.shares import load_all, mean, rows, save_all
from support.training import LARGE, SHAPES, assert_replicas_equal, assert_resumed, seed_of

CONFIG = dgc.DGCConfig(density=0.01, warmup_steps=10, warmup_densities=(0.25, 0.05))
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def resume(rank, world_size, folder):
    straight = Run(CONFIG, **SGD)
    for step in range(16):
        straight.train(normals(SHAPES, seed_of(step, rank)))
        if step == 6:
            save_all(straight, folder)
    resumed = Run(CONFIG, **SGD)
    load_all(resumed, folder)
    for step in range(7, 16):
        resumed.train(normals(SHAPES, seed_of(step, rank)))
    return straight.result(), resumed.result()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resume_in_the_middle_of_warm_up_is_bit_exact(world_size, tmp_path):
    for straight, resumed in run_ranks(world_size, resume, str(tmp_path)):
        assert_resumed(straight, resumed, world_size)
        assert straight["step"] == resumed["step"] == 16
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["dgc", "rest.pt"]


# another number of ranks


def train_and_save(rank, world_size, folder):
    run = Run(dgc.DGCConfig(density=0.01, momentum_masking=False), lr=0.25, momentum=0.5)
    for step in range(6):
        run.train(integers(SHAPES, seed_of(step, rank)))
    save_all(run, folder)
    torch.save(run.state.state_dict(), f"{folder}/{rank}.pt")
    return run.result()


def go_on(rank, world_size, folder, before, plain):
    """Loads what `before` ranks saved, and trains on with gradients that are the same on all ranks."""
    run = Run(dgc.DGCConfig(density=0.01, momentum_masking=False), lr=0.25, momentum=0.5)
    load_all(run, folder)
    if plain:
        files = [torch.load(f"{folder}/{r}.pt", weights_only=True) for r in range(before)]
        run.state.memory.residual.zero_()
        run.state.load_state_dict(files)
    loaded = run.result()
    for step in range(6, 12):
        run.train(integers(SHAPES, seed_of(step, 0)))
    return loaded, run.result()


@pytest.mark.parametrize(("before", "now", "plain"), [(4, 2, False), (2, 3, False), (3, 1, False), (2, 3, True)])
def test_another_number_of_ranks_keeps_what_is_still_to_come(before, now, plain, tmp_path):
    old = run_ranks(before, train_and_save, str(tmp_path))
    both = run_ranks(now, go_on, str(tmp_path), before, plain)
    loaded, later = [one for one, _ in both], [other for _, other in both]
    assert_replicas_equal(loaded)
    assert_replicas_equal(later)
    matrix = rows(before, now)
    for name in SHAPES:
        for kind in ("residual", "momentum"):
            if name in LARGE:
                for rank in range(now):
                    expected = sum(w * r[kind][name].double() for w, r in zip(matrix[rank], old, strict=True))
                    torch.testing.assert_close(loaded[rank][kind][name].double(), expected, rtol=1e-6, atol=1e-5)
                torch.testing.assert_close(mean(loaded, kind, name), mean(old, kind, name), rtol=1e-6, atol=1e-5)
            elif kind == "momentum":
                assert all(torch.equal(r[kind][name], old[0][kind][name]) for r in loaded)
    # Without masking, what has been applied and what still waits add up to what they would have on `before` ranks.
    for name in LARGE:
        u, v = mean(old, "momentum", name), mean(old, "residual", name)
        for step in range(6, 12):
            u = 0.5 * u + integers(SHAPES, seed_of(step, 0))[name].double()
            v += u
        moved = (old[0]["parameters"][name].double() - later[0]["parameters"][name].double()) / 0.25
        torch.testing.assert_close(moved + mean(later, "residual", name), v, rtol=1e-6, atol=1e-4)
    assert [r["step"] for r in later] == [12] * now


def without_a_file(rank, world_size, folder):
    messages = Messages()
    run = Run(dgc.DGCConfig(density=0.01, momentum_masking=False), lr=0.25, momentum=0.5)
    before = run.state.memory.residual.clone()
    with pytest.raises(ValueError, match="dgc") as caught:
        load_all(run, folder)
    assert torch.equal(run.state.memory.residual, before)
    load_all(run, folder, allow_missing_ranks=True)
    return run.result(), str(caught.value), messages.lines


def test_a_missing_rank_is_an_error_unless_allowed_and_then_what_is_lost_is_logged(tmp_path):
    old = run_ranks(3, train_and_save, str(tmp_path))
    for file in (tmp_path / "dgc").glob("__1_*"):
        file.unlink()
    results = run_ranks(3, without_a_file, str(tmp_path))
    for rank, (result, message, lines) in enumerate(results):
        assert "rank 1: ValueError: state_dict: rank 1 of 3 takes over the residual of rank 1 of 3" in message
        assert "allow_missing_ranks=True" in message
        assert "No rank's state has changed" in message
        lost = "dgc: rank 1 of 3 left: what it had not sent is lost, 1/3 of all that waited"
        assert (lost in lines) == (rank == 1)
        for name in SHAPES:
            share = name in LARGE and rank == 1
            expected = torch.zeros(SHAPES[name]) if share else old[rank]["momentum"][name]
            assert torch.equal(result["momentum"][name], expected), name
            if name in LARGE:
                assert torch.equal(
                    result["residual"][name], 0 * old[1]["residual"][name] if share else old[rank]["residual"][name]
                )


def dcp_itself(rank, world_size, folder):
    run = Run(CONFIG, **SGD)
    for step in range(3):
        run.train(normals(SHAPES, seed_of(step, rank)))
    dcp.save({"dgc": run.state, "as dict": run.state.state_dict()}, checkpoint_id=f"{folder}/both")
    fresh, other = Run(CONFIG, **SGD), Run(CONFIG, **SGD)
    dcp.load({"dgc": fresh.state}, checkpoint_id=f"{folder}/both")
    loaded = {"as dict": other.state.state_dict()}
    dcp.load(loaded, checkpoint_id=f"{folder}/both")
    other.state.load_state_dict(loaded["as dict"])
    saved = run.result()
    for resumed in (fresh.result(), other.result()):
        assert resumed["step"] == saved["step"] == 3
        for kind in ("residual", "momentum"):
            for name, tensor in saved[kind].items():
                assert torch.equal(tensor, resumed[kind][name]), (kind, name)
    return saved["residual"]["a"]


def test_dcp_keeps_every_rank_s_residual(tmp_path):
    # It keeps one of the entries that ranks have by equal names: so they must not have any.
    one, other = run_ranks(2, dcp_itself, str(tmp_path))
    assert not torch.equal(one, other)


def another_directory_on_each_rank(rank, world_size, folder):
    run = Run(CONFIG, **SGD)
    for step in range(2):
        run.train(normals(SHAPES, seed_of(step, rank)))
        dgc.checkpoint.save(run.state, f"{folder}/{step}")
    fresh = Run(CONFIG, **SGD)
    with pytest.raises(ValueError, match="expected the same checkpoint on all ranks") as caught:
        dgc.checkpoint.load(fresh.state, f"{folder}/{rank}")
    return str(caught.value), fresh.state.step


def test_ranks_that_load_different_checkpoints_are_refused(tmp_path):
    for message, step in run_ranks(2, another_directory_on_each_rank, str(tmp_path)):
        assert "that of rank 0 was rank 0 of 2 at step 1; that of rank 1 was rank 1 of 2 at step 2" in message
        assert step == 0


def outstanding_on_one_rank(rank, world_size, folder):
    run = Run(CONFIG, **SGD)
    run.train(normals(SHAPES, seed_of(0, rank)))
    run.ddp(normals(SHAPES, seed_of(1, rank))).sum().backward()
    if rank == 0:
        run.optimizer.step()
    with pytest.raises(RuntimeError, match=r"rank 1: RuntimeError: .*between optimizer\.step") as caught:
        dgc.checkpoint.save(run.state, f"{folder}/dgc")
    if rank == 1:
        run.optimizer.step()
    dgc.checkpoint.save(run.state, f"{folder}/dgc")
    return str(caught.value)


def test_an_update_outstanding_on_one_rank_is_an_error_on_all(tmp_path):
    run_ranks(2, outstanding_on_one_rank, str(tmp_path))
    assert (tmp_path / "dgc" / ".metadata").exists()


def load_while_under_way(rank, world_size):
    """A backward pass breaks off with its first buckets sent, while the other rank is late; then this one loads."""
    run = Run(dgc.DGCConfig(density=0.01), ddp={"find_unused_parameters": True, "bucket_cap_mb": 0.02})
    for step in range(3):
        run.train(normals(SHAPES, seed_of(step, rank)))
    saved = copy.deepcopy(run.state.state_dict())
    torch.distributed.barrier()
    if rank == 1:
        time.sleep(1)
    # What was sent for parameters whose gradient is zero everywhere comes back when the exchange is through.
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    run.optimizer.zero_grad()
    run.net.a.register_hook(lambda _: (_ for _ in ()).throw(KeyError("broken off")))
    with pytest.raises(KeyError):
        run.ddp(zeros).backward()
    assert run.state._pass.sent
    run.state.load_state_dict(saved)
    after = run.state.memory.residual.clone()
    time.sleep(2 - rank)
    return bool((after == run.state.memory.residual).all()), len(saved["ranks"][str(rank)]["residual"])


def test_what_is_under_way_while_a_state_is_loaded_does_not_come_later():
    assert run_ranks(2, load_while_under_way) == [(True, 3)] * 2


def one_rank_finds_damage(rank, world_size, folder):
    run = Run(CONFIG, **SGD)
    run.train(normals(SHAPES, seed_of(0, rank)))
    save_all(run, folder)
    if rank == 0:
        file = next(Path(folder, "dgc").glob("__1_*"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    torch.distributed.barrier()
    fresh = Run(CONFIG, **SGD)
    with pytest.raises(ValueError, match="damaged") as caught:
        dgc.checkpoint.load(fresh.state, f"{folder}/dgc")
    return str(caught.value), fresh.state.step, int(fresh.state.memory.residual.count_nonzero())


def test_damage_that_one_rank_finds_stops_all(tmp_path):
    for message, step, waiting in run_ranks(2, one_rank_finds_damage, str(tmp_path)):
        assert "rank 1: ValueError: rank 1: " in message
        assert (step, waiting) == (0, 0)


def one_disk_is_full(rank, world_size, folder):
    run = Run(CONFIG, **SGD)
    run.train(normals(SHAPES, seed_of(0, rank)))
    if rank == 2:
        dcp.FileSystemWriter.write_data = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(RuntimeError, match="No space left") as caught:
        dgc.checkpoint.save(run.state, f"{folder}/dgc")
    return str(caught.value)


def test_an_error_of_a_rank_that_saves_is_raised_on_all_with_its_rank(tmp_path):
    for message in run_ranks(3, one_disk_is_full, str(tmp_path)):
        assert "dgc: rank 2: OSError: [Errno 28] No space left on device" in message
    assert not (tmp_path / "dgc").exists()


def write_elsewhere(rank, world_size, folder):
    run = Run(CONFIG, **SGD)
    run.train(normals(SHAPES, seed_of(0, rank)))
    if rank == 1:  # as on a machine that does not share the disk
        writer = dcp.FileSystemWriter
        dgc.checkpoint.dcp.FileSystemWriter = lambda path: writer(f"{path}.elsewhere")
    with pytest.raises(RuntimeError, match="a file system that all ranks share") as caught:
        dgc.checkpoint.save(run.state, f"{folder}/dgc")
    return str(caught.value)


def test_ranks_that_do_not_share_a_disk_are_found_when_saving(tmp_path):
    for message in run_ranks(2, write_elsewhere, str(tmp_path)):
        assert "rank [1]" in message
    assert not (tmp_path / "dgc").exists()
    shutil.rmtree(tmp_path)
