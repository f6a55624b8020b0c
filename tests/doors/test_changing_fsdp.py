"""Models that change behind FSDP2: masks, forget(), rebind() and rewinding, on shards."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import dgc
from support import changes
from support.ddp_run import Run
from support.fsdp_run import IslandRun
from support.models import normals
from support.ranks import run_ranks
from support.training import assert_replicas_equal, seed_of

SGD = changes.OPTIMIZERS[dgc.SGD]
ALIVE = changes.NUMBERS % 4 == 0


def change(rank, world_size, places):
    run = IslandRun(places, changes.CONFIG, module=changes.Layers(), **changes.SETTINGS)
    account = changes.change(run, rank, prepare=lambda layer: fully_shard(layer, mesh=run.mesh["shard"]))
    rewinding = IslandRun(places, changes.REWOUND, module=changes.Layers(), **SGD)
    return account, changes.rewind(rewinding, rank)


@pytest.mark.parametrize("places", [1, 2])
def test_nothing_is_lost_but_what_was_asked_to_go(places):
    accounts, rewound = zip(*run_ranks(2 * places, change, places), strict=True)
    assert_replicas_equal(accounts)
    changes.assert_nothing_lost(accounts, places)
    for times in rewound:
        changes.assert_rewound(times)


def masked(run, rank, is_sharded):
    """Prunes, looks at all gradients, forgets and grows; returns how many entries of a gradient were not zero."""
    counts = []
    for i in range(8):
        if i == 2:
            run.state.mask("a.weight", ALIVE)
            with torch.no_grad():
                weight = run.net.a.weight
                alive = distribute_tensor(ALIVE, weight.device_mesh, weight.placements) if is_sharded else ALIVE
                weight.mul_(alive)
        elif i == 4:
            run.state.dense_step()
        elif i == 5:
            assert run.state.forget("b.weight").entries > 100
        elif i == 6:
            run.state.mask(run.net.a.weight, changes.NUMBERS % 4 < 2)
        run.train(normals(changes.SHAPES, seed_of(i, rank)))
        counts.append(int(changes.full(run.net.a.weight.grad).count_nonzero()))
    return changes.standing(run), counts, run.state.stats.forgotten


def sharded(rank, world_size):
    return masked(IslandRun(1, changes.CONFIG, module=changes.Layers(), bucket_cap_mb=25, **SGD), rank, True)


def plain(rank, world_size):
    return masked(Run(changes.CONFIG, module=changes.Layers(), ddp={"bucket_cap_mb": 25}, **SGD), rank, False)


def test_masks_on_nodes_of_one_rank_have_the_bits_of_ddp():
    for (one, counts, forgotten), (other, its_counts, its) in zip(
        run_ranks(2, sharded), run_ranks(2, plain), strict=True
    ):
        assert changes.differing(one, other) == []
        assert (counts, forgotten) == (its_counts, its)
        assert counts[4] == 5000  # the dense step has applied those alive
        assert max(counts[2:4]) <= 2 * 79  # 1/64 of 5,000, rounded up, of two ranks
        assert forgotten > 1000


def refused(rank, world_size):
    """Mistakes on two nodes of two ranks, and the same run without them."""
    messages = {}
    undisturbed, run = (IslandRun(2, changes.CONFIG, module=changes.Layers(), **SGD) for _ in range(2))
    for one in (undisturbed, run):
        one.train(normals(changes.SHAPES, rank))
    state, net = run.state, run.net
    other = ALIVE.clone()
    other[150, 7] ^= rank == 3

    def added(weight, sharded):
        net.c = changes.Layer(weight)
        if sharded:
            fully_shard(net.c, mesh=run.mesh["shard"])
        run.optimizer.add_param_group({"params": [net.c.weight]})
        state.rebind(net)

    for what, call in {
        "sharded mask": lambda: state.mask("a.weight", net.a.weight.detach() > 0),
        "shard's shape": lambda: state.forget("a.weight", keep=ALIVE[:100]),
        "another mask": lambda: state.mask("a.weight", other),
        "plain layer": lambda: added(torch.zeros(100, 90), sharded=False),
        "another weight": lambda: added(torch.full((100, 90), float(rank // 2)), sharded=True),
    }.items():
        with pytest.raises(ValueError, match="expected") as error:
            call()
        messages[what] = str(error.value)
        if hasattr(net, "c"):
            del net.c
            run.optimizer.param_groups.pop()
    for one in (undisturbed, run):
        one.train(normals(changes.SHAPES, 10 + rank))
    return messages, changes.differing(changes.standing(undisturbed), changes.standing(run))


def test_what_is_wrong_is_said_and_changes_nothing():
    for messages, differing in run_ranks(4, refused):
        for what, expected in {
            "sharded mask": "got a DTensor: pass mask.full_tensor()",
            "shard's shape": "expected the parameter's shape (200, 100), got (100, 100)",
            "another mask": "got another value at (150, 7): ",
            "plain layer": "expected parameters that fully_shard has sharded, got c.weight",
            "another weight": "got others on rank 2 than on the first: c.weight",
        }.items():
            assert expected in messages[what], (what, messages[what])
        assert differing == []
