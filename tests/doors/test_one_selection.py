"""One selection over all parameters behind each door: what ranks share, what is saved, and where it is refused."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import dgc
from dgc.step.allotment import EVERY
from support import ddp_run, horovod_run
from support.alone import reduce
from support.fsdp_run import IslandRun
from support.messages import error_of
from support.models import Given, integers, normals
from support.node_run import NodeRun
from support.ranks import run_ranks
from support.training import SHAPES, assert_equal, assert_replicas_equal, seed_of

CONFIG = dgc.DGCConfig(density=0.008, selection="global", min_entries=32, clip_norm=20.0)
SGD = {"lr": 0.1, "momentum": 0.9}
BEFORE, AFTER = 2 * EVERY + 3, 2 * EVERY


def loud(shapes, seed):
    """Returns gradients that differ by scale."""
    return {name: g * (5.0 if name == "a" else 1.0) for name, g in normals(shapes, seed).items()}


def islands(rank, world_size, folder):
    """Trains shards, saves, goes on; and goes on from what was saved."""

    def fresh():
        return IslandRun(2, CONFIG, **SGD)

    straight, seen = fresh(), []
    for step in range(BEFORE + AFTER):
        if step == BEFORE:
            model, optim = get_state_dict(straight.net, straight.optimizer)
            dcp.save({"model": model, "optimizer": optim}, checkpoint_id=f"{folder}/torch")
            dgc.checkpoint.save(straight.state, f"{folder}/dgc")
        straight.train(loud(SHAPES, seed_of(step, rank)))
        seen.append(straight.state.stats.entries)
    resumed = fresh()
    model, optim = get_state_dict(resumed.net, resumed.optimizer)
    dcp.load({"model": model, "optimizer": optim}, checkpoint_id=f"{folder}/torch")
    set_state_dict(resumed.net, resumed.optimizer, model_state_dict=model, optim_state_dict=optim)
    dgc.checkpoint.load(resumed.state, f"{folder}/dgc")
    for step in range(BEFORE, BEFORE + AFTER):
        resumed.train(loud(SHAPES, seed_of(step, rank)))
    return straight.result(), resumed.result(), seen, error_of(lambda: NodeRun(2, CONFIG))


def test_shards_choose_for_themselves_and_resume_and_nodes_under_ddp_refuse(tmp_path):
    results = run_ranks(4, islands, str(tmp_path))
    assert_replicas_equal([straight for straight, *_ in results])
    seen = [ks for _, _, ks, _ in results]
    # Ranks 0 and 2 hold the same shards, 1 and 3 the others, with half of the elements and of the 32 entries.
    assert seen[0] == seen[2]
    assert seen[1] == seen[3]
    assert {sum(ks.values()) for ks in seen[0]} == {80 + 68 + 271}
    assert all(min(ks.values()) >= 16 for ks in seen[0])
    assert seen[0][0] == {"a": 80, "c": 68, "e": 271}
    assert seen[0][-1]["a"] > 2 * 80
    for straight, resumed, *_ in results:
        assert straight["stats"].entries == resumed["stats"].entries
        for kind in ("parameters", "residual", "momentum"):
            assert all(torch.equal(tensor, resumed[kind][name]) for name, tensor in straight[kind].items())
    assert all('expected DGCConfig(selection="parameter")' in refused for *_, refused in results)


def test_horovod_has_the_bits_of_the_ddp_hook(horovod):
    kwargs = {"config": CONFIG, **SGD}
    results = horovod(2, horovod_run.train_given, 3 * EVERY + 1, loud, kwargs)
    assert_equal(results, run_ranks(2, ddp_run.train_given, 3 * EVERY + 1, loud, kwargs), dense_too=True)
    assert results[0]["stats"].entries == results[1]["stats"].entries
    assert results[0]["stats"].entries["a"] > 2 * 160


def nodes(rank, world_size):
    run = NodeRun(2, dgc.DGCConfig(density=0.001, min_entries=64), **SGD)
    run.train(integers(SHAPES, seed_of(0, rank)))
    return run.state.stats.entries


def test_the_ranks_of_a_node_divide_the_least_number():
    # a has 200 rows and 100 of them on each rank, c 130 and 65; 0.1 % of 33,800 elements of e is more than 32.
    assert run_ranks(4, nodes) == [{"a": 32, "c": 32, "e": 34}] * 4


def come(rank, world_size):
    """Rank 0 and 1 train; then 2 comes."""
    old, new = (dist.new_group(ranks) for ranks in ([0, 1], [0, 1, 2]))
    config = dgc.DGCConfig(density=0.008, selection="global")

    def build(group):
        net = Given(SHAPES)
        optimizer = dgc.SGD(net.parameters(), **SGD)
        return net, optimizer, dgc.DGCState(net.named_parameters(), optimizer, config, process_group=group)

    def train(step):
        optimizer.zero_grad()
        net(loud(SHAPES, seed_of(step, rank))).backward()
        reduce(state, net)
        optimizer.step()

    if rank < 2:
        net, optimizer, state = build(old)
        for step in range(BEFORE):
            train(step)
        state.exchange.group = new
        state.regroup()
    else:
        net, optimizer, state = build(new)
    for p in net.parameters():
        dist.broadcast(p.data, 0, group=new)
    seen = []
    for step in range(BEFORE, BEFORE + AFTER):
        train(step)
        seen.append(state.stats.entries)
    return seen


def test_a_rank_that_comes_takes_over_the_entries():
    seen = run_ranks(3, come)
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0]["a"] > 1.5 * 160


@pytest.mark.parametrize("field", ["selection", "min_entries"])
def test_ranks_with_another_setting_are_told(field):
    other = {"selection": "global", "min_entries": 2}[field]
    messages = run_ranks(2, differ, field, other)
    assert all(f"{field}" in message and repr(other) in message for message in messages)


def differ(rank, world_size, field, other):
    config = dgc.DGCConfig(**({field: other} if rank else {}))
    return error_of(lambda: ddp_run.Run(config).train(normals(SHAPES, rank)))
