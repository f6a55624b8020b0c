"""State dicts that are damaged are refused, or fit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dgc
from support.alone import Alone, own
from support.models import normals
from support.payloads import (
    EDGES,
    fuzz,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STATE_SHAPES = {"a": (30, 7), "b": (5,), "c": (4, 4)}
scalars = st.one_of(st.none(), st.booleans(), st.sampled_from(EDGES), st.floats(), st.text(max_size=5), st.binary())


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.sampled_from([*STATE_SHAPES.values(), (), (0,), (7, 30), (1, 30, 7)]))
    dtype = draw(st.sampled_from([*[torch.float32] * 4, torch.float64, torch.float16, torch.int64, torch.complex64]))
    tensor = torch.full(shape, draw(st.sampled_from([0, 1, 3])), dtype=dtype)
    if tensor.numel() and tensor.is_floating_point():
        at = draw(st.integers(0, tensor.numel() - 1))
        tensor.view(-1)[at] = draw(st.sampled_from([1.0, np.nan, np.inf, -np.inf]))
    disguises = [
        *[lambda t: t] * 4,
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
        lambda t: torch.nested.nested_tensor([t]),
        lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
        lambda t: t[..., :1].expand(t.shape) if t.dim() else t,
    ]
    return draw(st.sampled_from(disguises))(tensor)


values = st.one_of(scalars, tensors(), st.lists(scalars, max_size=3), st.dictionaries(st.text(max_size=2), tensors()))
names = st.one_of(st.sampled_from([*STATE_SHAPES, "z"]), st.integers(0, 3))
KEYS = [
    "version",
    "ranks",
    "rank",
    "world_size",
    "step",
    "dense",
    "density",
    "diverged",
    "momentum",
    "residual",
    "other",
    "kinds",
    "exp_avg",
    "exp_avg_sq",
]
# A key, the name below it or none, and what stands there then; without a value it is deleted.
some_edits = st.lists(
    st.tuples(st.sampled_from(KEYS), st.one_of(st.none(), names), st.one_of(st.just(...), values)), max_size=3
)


def edit(state_dict: dict[str, Any], key: str, name: Any, value: Any) -> None:
    """Changes one entry, or one below it."""
    target, where = state_dict, key
    if name is not None and isinstance(state_dict.get(key), dict):
        target, where = state_dict[key], name
    if value is ...:
        target.pop(where, None)
    else:
        target[where] = value


OPTIMIZERS = [({"lr": 0.5, "momentum": 0.5}, 1500), ({"optimizer": dgc.AdamW}, 750)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("settings", "examples"), OPTIMIZERS, ids=["SGD", "AdamW"])
def test_a_damaged_state_dict_is_refused_or_fits(settings, examples):
    config = dgc.DGCConfig(density=0.1, dense_below=0)
    trained, one = (Alone(STATE_SHAPES, config, **settings) for _ in range(2))
    for step in range(3):
        trained.train(normals(STATE_SHAPES, step))
    seen: Counter[str] = Counter()

    @fuzz(max_examples=examples)
    @given(st.lists(some_edits, min_size=1, max_size=3), st.booleans())
    def run(edits_by_rank, as_before):
        state_dicts = []
        for rank, edits in enumerate(edits_by_rank):
            share = dict(own(trained.state))
            share.update(rank=rank, world_size=len(edits_by_rank))
            for key in ("momentum", "residual", *one.state.memory.kinds):
                share[key] = {name: t.clone() for name, t in share[key].items()}
            state_dict = {"version": 1, **share} if as_before else {"version": 2, "ranks": {str(rank): share}}
            for key, name, value in edits:
                edit(state_dict if as_before or key in ("version", "ranks") else share, key, name, value)
            state_dicts.append(state_dict)
        before = own(one.state)
        before = {k: {n: t.clone() for n, t in v.items()} if isinstance(v, dict) else v for k, v in before.items()}
        error = None
        try:
            one.state.load_state_dict(state_dicts)
        except ValueError as caught:
            error = str(caught)
        seen["loaded" if error is None else "refused"] += 1
        if error is not None:
            assert error.startswith("state_dict")
            after = own(one.state)
            for key, value in before.items():
                if isinstance(value, dict):
                    assert all(same_bits(after[key][n].contiguous(), t.contiguous()) for n, t in value.items())
                else:
                    assert after[key] == value
        memory = one.state.memory
        assert memory.residual.isfinite().all()
        assert all(flat.isfinite().all() for flat in memory.kinds.values())
        assert not memory.residual.requires_grad

    run()
    assert min(seen["refused"], seen["loaded"]) > 30, seen
    one.train(normals(STATE_SHAPES, 9))  # and it goes on
