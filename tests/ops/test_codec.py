"""Codecs: one that sends each value as two bfloat16 needs nothing outside its own class, and loses nothing."""

import pickle

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import dgc
from dgc.ops.codec import Codec, EliasFano
from dgc.ops.segments import Segments
from dgc.ops.selection import Entries, entries_of, positions
from support.alone import reduce
from support.models import Given, integers, normals
from support.ranks import run_ranks

SHAPES = {"big": (300, 300), "other": (200, 400), "bias": (300,)}


class Halves(Codec):
    """A value as the nearest bfloat16 and the nearest one to the rest: 16 bits of mantissa, in three sections."""

    name = "two bfloat16"
    dtype = torch.float32

    def entry_bytes(self, density):
        return 6

    def _sections(self, payload, segments):
        at = segments.wire(torch.float32).ends
        ends, n = 4 * segments.n_tiles, segments.n_entries
        return payload[at:].split([ends, 2 * n, 4 * n, len(payload) - at - ends - 6 * n])[:3]

    def nbytes(self, segments):
        return -(-(segments.wire(torch.float32).ends + 4 * segments.n_tiles + 6 * segments.n_entries) // 16) * 16

    def encode(self, selection, segments, workspace, residual, payload):
        head = segments.wire(torch.float32).ends
        payload[:head].copy_(selection[:head])
        entries = entries_of(selection, segments, torch.float32)
        high = entries.values.bfloat16()
        low = (entries.values - high.float()).bfloat16()
        ends, indices, values = self._sections(payload, segments)
        ends.copy_(entries.ends.view(torch.uint8))
        indices.copy_(entries.indices.view(torch.uint8))
        values.copy_(torch.cat([high, low]).view(torch.uint8))
        where, before = positions(selection, segments, torch.float32)
        residual[where] += before - (high.float() + low.float())
        entries.values.copy_(high.float() + low.float())

    def decode(self, payloads, segments, workspace, selections):
        head = segments.wire(torch.float32).ends
        for payload, selection in zip(payloads, selections, strict=True):
            selection[:head].copy_(payload[:head])
            entries = entries_of(selection, segments, torch.float32)
            ends, indices, values = self._sections(payload, segments)
            entries.ends.copy_(ends.clone().view(torch.int32))
            entries.indices.copy_(indices.clone().view(torch.int16))
            high, low = values.clone().view(torch.bfloat16).float().chunk(2)
            entries.values.copy_(high + low)


class Run:
    def __init__(self, codec, momentum=0.5, **config):
        self.model = Given(SHAPES)
        self.optimizer = dgc.SGD(self.model.parameters(), lr=0.25, momentum=momentum)
        config = dgc.DGCConfig(**{"density": 0.01, "momentum_masking": True, **config})
        self.state = dgc.DGCState(self.model.named_parameters(), self.optimizer, config, codec=codec)

    def train(self, gradients):
        self.optimizer.zero_grad()
        self.model(gradients).backward()
        reduce(self.state, self.model)
        self.optimizer.step()


def test_where_nothing_is_rounded_the_bits_are_those_of_the_wire_format():
    plain, halves = Run(EliasFano()), Run(Halves())
    for step in range(6):
        gradients = integers(SHAPES, step)
        plain.train(gradients)
        halves.train(gradients)
        assert torch.equal(plain.state.memory.residual, halves.state.memory.residual)
        assert torch.equal(plain.state.memory.momentum, halves.state.memory.momentum)
        for p, q in zip(plain.model.parameters(), halves.model.parameters(), strict=True):
            assert torch.equal(p, q)


def test_what_rounding_takes_stays_in_the_residual():
    run = Run(Halves(), momentum=0.0)
    g = {name: 1 + 2.0**-20 * torch.arange(x.numel()).view(x.shape) for name, x in normals(SHAPES, 0).items()}
    run.model(g).backward()
    reduce(run.state, run.model)
    for name in ("big", "other"):
        average = run.model.get_parameter(name).grad
        residual = run.state.memory.residual_of(name)
        sent = average != 0
        assert int(sent.sum()) == -(-g[name].numel() // 100)
        assert torch.equal(average.double() + residual.double(), g[name].double())
        assert residual[sent].any()  # 20 bits do not fit into 16
        assert residual[sent].abs().max() <= 2.0**-16


def test_discard_gives_back_what_was_sent():
    run = Run(Halves(), momentum=0.0)
    g = normals(SHAPES, 3)
    run.model(g).backward()
    reduce(run.state, run.model)
    run.state.discard(drop_gradient=False)
    for name in ("big", "other"):
        assert torch.equal(run.state.memory.residual_of(name), g[name])


def train(rank, world_size, corrupt):
    model = DistributedDataParallel(Given(SHAPES))
    optimizer = dgc.SGD(model.parameters(), lr=0.25, momentum=0.5)
    codec = EliasFano() if corrupt == "codec" and rank else Halves()
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=0.01), codec=codec)
    if corrupt == "codec":
        with pytest.raises(ValueError, match="codec: rank 0 has 'two bfloat16', rank 1 has 'float32'"):
            state.register(model)
        return None
    state.register(model)
    start = state.exchange.start

    def spoil(name, payload, gathered, dense):
        if rank == 1 and payload is not None:
            payload[-len(payload) // 2 :] = 0xFF  # NaN
        return start(name, payload, gathered, dense)

    for step in range(4):
        if corrupt == "bytes" and step == 2:
            state.exchange.start = spoil
            with pytest.raises(RuntimeError, match=r"payload of rank 1: (a value is not finite|an index is out)"):
                model(normals(SHAPES, 10 * step + rank)).backward()
            return None
        optimizer.zero_grad()
        model(normals(SHAPES, 10 * step + rank)).backward()
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.module.named_parameters()}, state.stats.bytes_sent


@pytest.mark.parametrize("corrupt", ["", "bytes", "codec"])
def test_two_ranks_agree_and_wrong_bytes_are_refused(corrupt):
    one, other = run_ranks(2, train, corrupt)
    if not corrupt:
        assert all(torch.equal(one[0][n], other[0][n]) for n in SHAPES)
        segments = Segments.from_rows([(0, 0, 0, 90000, 900), (0, 90000, 90016, 80000, 800)])
        assert one[1] == Halves().nbytes(segments) + 4 * 300


def test_a_selection_s_sections_are_views():
    segments = Segments.from_rows([(0, 0, 0, 70000, 3)])
    selection = torch.zeros(segments.wire(torch.float32).nbytes, dtype=torch.uint8)
    entries = entries_of(selection, segments, torch.float32)
    assert isinstance(entries, Entries)
    assert [len(part) for part in entries] == [2, 3, 3]
    entries.values.fill_(1.0)
    assert selection.any()


def test_a_pickled_state_keeps_its_codec_and_when_its_verdict_is_read():
    run = Run(Halves())
    run.train(normals(SHAPES, 0))
    late = dgc.DGCState(run.model.named_parameters(), run.optimizer, run.state.config, codec=Halves(), late=True)
    for state in (run.state, late):
        again = pickle.loads(pickle.dumps(state))
        assert type(again._standing.codec) is Halves
        assert again._late is state._late
