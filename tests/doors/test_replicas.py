"""Replicas that part in the middle of a run: bits that flip in a parameter, in u, in v and in what was received."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from dgc.ops.codec import Codec, EliasFano
from dgc.ops.wire import PayloadError
from dgc.step.replicas import CHUNK, COLUMNS, digest
from support.ddp_run import Run
from support.models import normals
from support.ranks import run_ranks
from support.training import SHAPES, assert_replicas_equal, seed_of


def flip(tensor, at, bit):
    """Flips one bit of an element of four bytes."""
    words = tensor.detach().view(torch.int32).view(-1)
    words[at] ^= torch.tensor(-(2**31) if bit == 31 else 2**bit, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_a_digest_finds_every_bit(dtype):
    numel = 2 * COLUMNS + 100
    tensor = torch.randint(0, 2, (numel,), generator=torch.Generator().manual_seed(0)).to(dtype)
    before = digest(tensor)
    found = set()
    for at in (0, 5, COLUMNS - 1, COLUMNS + 1, numel - 1):
        for bit in range(8 * dtype.itemsize if dtype != torch.bool else 1):
            other = tensor.clone()
            other.view(torch.uint8)[at * dtype.itemsize + bit // 8] ^= 1 << bit % 8
            found.add(digest(other).item())
    assert len(found) == 5 * (8 * dtype.itemsize if dtype != torch.bool else 1)
    assert before.item() not in found


def test_a_digest_finds_what_a_sum_does_not():
    tensor = torch.randn(CHUNK + 3 * COLUMNS, generator=torch.Generator().manual_seed(0))
    before = digest(tensor)

    def after(*pairs):
        other = tensor.clone()
        for one, two in pairs:
            other[[one, two]] = other[[two, one]]
        return digest(other)

    assert after((0, 1)) != before
    assert after((COLUMNS - 1, COLUMNS)) != before
    assert after((7, CHUNK + 7)) != before  # the same column of another chunk
    negated = tensor.clone()
    negated[:2] *= -1  # two sign bits of one weight parity
    assert digest(negated) != before
    assert after((7, COLUMNS + 7)) == before  # as its docstring says


def test_a_digest_does_not_depend_on_memory_format_and_takes_what_has_no_elements():
    images = torch.randn(4, 3, 5, 5)
    assert digest(images) == digest(images.contiguous(memory_format=torch.channels_last))
    assert digest(torch.empty(0)) == 0
    assert digest(torch.tensor(1.0)) != digest(torch.tensor(2.0))


class FlipsWhatArrives(Codec):
    """The wire format, and a rank whose network flips one bit of what another rank has sent, once."""

    def __init__(self):
        self.inner = EliasFano()
        self.name, self.dtype = self.inner.name, self.inner.dtype
        self.entry_bytes, self.nbytes, self.encode = self.inner.entry_bytes, self.inner.nbytes, self.inner.encode
        self.at = None

    def decode(self, payloads, segments, workspace, selections):
        if self.at is not None:
            payloads[0, self.at] ^= 1
            self.at = None
        self.inner.decode(payloads, segments, workspace, selections)


FlipsWhatArrives.__abstractmethods__ = frozenset()


def flipped(rank, world_size, what, every):
    """Trains 16 steps; before step 5 something happens to rank 1. Returns the error, its step, and what there is."""
    codec = FlipsWhatArrives()
    config = dgc.DGCConfig(density=0.008, check_every=every)
    run = Run(config, state={"codec": codec})
    for step in range(16):
        if step == 5 and rank == 1:
            if what == "parameter":
                flip(run.net.c, 77, 3)
            elif what in ("u", "v"):
                kind = "momentum" if what == "u" else "residual"
                flip(getattr(run.state.memory, f"{kind}_of")("c"), 77, 22)
            elif what == "u of a dense parameter":
                flip(run.state.memory.momentum_of("b"), 7, 22)
            elif what == "learning rate":
                run.optimizer.param_groups[0]["lr"] = 0.25
            elif what in ("header", "values"):
                codec.at = 8 if what == "header" else -100
        try:
            run.train(normals(SHAPES, seed_of(step, rank)))
        except PayloadError as error:
            before = run.net.a.detach().clone()
            run.state.discard(drop_gradient=False)
            return str(error), step, torch.equal(before, run.net.a), run.state.step
    return "", 16, run.result(), run.state.step


@pytest.mark.parametrize(
    ("what", "step", "message"),
    [
        ("parameter", 8, "rank 1 has another value of the parameter c than rank 0, 2 (the first of 1 that differ)"),
        ("values", 8, "rank 1 has another value of the parameter "),
        ("u of a dense parameter", 8, "rank 1 has another value of the parameter b than rank 0, 2"),
        ("learning rate", 8, "rank 1 has another optimizer settings of group 0 than rank 0, 2 (the first of 6 that "),
    ],
)
def test_what_parts_replicas_is_found_at_the_next_comparison(what, step, message):
    for error, found, unchanged, at in run_ranks(3, flipped, what, 4):
        assert found == step
        assert f"replicas differ at step {step}: {message}" in error
        assert "cannot be told" not in error
        assert unchanged
        assert at == step  # the pass is taken back


def test_a_flipped_header_is_found_at_once_by_who_received_it():
    with pytest.raises(Exception, match="payload of rank 0: it is at another step"):
        run_ranks(2, only_rank_1, timeout=5)


def only_rank_1(rank, world_size):
    error, step, *_ = flipped(rank, world_size, "header", 4)
    assert not error or step == 5
    if error:
        raise RuntimeError(error)


@pytest.mark.parametrize("what", ["u", "v"])
def test_what_differs_between_ranks_anyway_is_sent_to_all_of_them_alike(what):
    results = [result for error, _, result, _ in run_ranks(2, flipped, what, 4)]
    assert_replicas_equal(results)
    plain = [result for _, _, result, _ in run_ranks(2, flipped, "nothing", 4)]
    assert not torch.equal(plain[1]["residual"]["c"], results[1]["residual"]["c"])


def test_two_ranks_cannot_tell_which_one_is_wrong_and_0_compares_never():
    for error, found, *_ in run_ranks(2, flipped, "parameter", 4):
        assert found == 8
        assert "rank 1 has another value of the parameter c than rank 0 (the first of 1 that differ). Which of" in error
    assert [error for error, *_ in run_ranks(2, flipped, "parameter", 0)] == ["", ""]


def go_on(rank, world_size):
    """Repairs the replica as the message says."""
    run = Run(dgc.DGCConfig(density=0.008, check_every=4))
    for step in range(12):
        if step == 5 and rank == 1:
            run.net.c.data.add_(1)
        try:
            run.train(normals(SHAPES, seed_of(step, rank)))
        except PayloadError:
            run.state.discard(drop_gradient=False)
            for p in run.net.parameters():
                torch.distributed.broadcast(p.data, 0)
    return run.result()


def test_a_run_goes_on_after_a_broadcast():
    results = run_ranks(2, go_on)
    assert_replicas_equal(results)
    assert [result["step"] for result in results] == [11, 11]  # the pass that was discarded does not count


def every_step(rank, world_size, batches):
    """Compares at every step, in dense steps, and while rank 1 has run out of data."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(200, 200))
    optimizer = dgc.SGD(model.parameters(), lr=0.1)
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=0.01, check_every=1))
    state.register(model)
    with model.join():
        for step in range(batches[rank]):
            state.dense = step == 2
            optimizer.zero_grad()
            model(torch.randn(4, 200)).square().mean().backward()
            optimizer.step()
    return {"parameters": {n: p.detach().clone() for n, p in model.module.named_parameters()}}


def test_dense_steps_are_compared_and_a_rank_without_data_is_not():
    assert_replicas_equal(run_ranks(3, every_step, [6, 4, 6]))


def parted_under_horovod():
    from support.horovod_run import Run as HorovodRun
    from support.horovod_run import hvd

    run = HorovodRun(dgc.DGCConfig(density=0.008, check_every=4))
    for step in range(9):
        if step == 5 and hvd.rank() == 1:
            flip(run.net.c, 77, 3)
        try:
            run.train(normals(SHAPES, seed_of(step, hvd.rank())))
        except PayloadError as error:
            return str(error), step
    return "no error"


def test_replicas_that_part_are_found_under_horovod(horovod):
    pytest.importorskip("horovod.torch", reason="needs Horovod: ./launch/install_horovod.sh")
    for error, step in horovod(3, parted_under_horovod):
        assert step == 8
        assert "rank 1 has another value of the parameter c than rank 0, 2 (the first of 1 that differ)" in error
