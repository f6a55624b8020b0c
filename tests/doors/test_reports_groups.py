"""Public bug reports, numbers 3 and 9: rank, world size and process group, and join().

The numbers are those of docs/reliability.md, "What users' loops do".
"""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.ddp_run import Run
from support.models import Given, integers, normals
from support.one_rank import CONFIG, WIDE, step
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_replicas_equal, seed_of

# 3: rank, world size and group


def made_too_early(rank, world_size, registered):
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()  # a rank that goes while another connects would end that one
    dist.destroy_process_group()
    net = Given(SHAPES)
    optimizer = dgc.SGD(net.parameters(), lr=0.5, momentum=0.5)
    state = dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=world_size)
    ddp = DistributedDataParallel(net)
    if registered:
        state.register(ddp)
        assert state.exchange.world_size == world_size
    else:
        ddp.register_comm_hook(state, dgc.dgc_hook)
    for i in range(5):
        step(ddp, optimizer, normals(SHAPES, seed_of(i, rank)))
    return {"parameters": {n: p.detach() for n, p in net.named_parameters()}, "sent": state.stats.bytes_sent}


@pytest.mark.parametrize("registered", [True, False])
def test_a_state_made_before_the_process_group_finds_it(registered):
    results = run_ranks(2, made_too_early, registered)
    assert_replicas_equal(results)
    assert results[0]["sent"] > 0


def two_subgroups(rank, world_size, registered):
    """Ranks 0 and 1 train one model, rank 2 (and 3) another; nobody names a process_group to the state."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    ddp = DistributedDataParallel(Given(SHAPES, seed=rank // 2), process_group=groups[rank // 2])
    optimizer = dgc.SGD(ddp.parameters(), lr=0.25)
    state = dgc.DGCState(ddp.named_parameters(), optimizer, dgc.DGCConfig(density=1.0))
    if registered:
        state.register(ddp)
    else:
        ddp.register_comm_hook(state, dgc.dgc_hook)
    step(ddp, optimizer, integers(SHAPES, rank))
    return {n: p.detach() for n, p in ddp.module.named_parameters()}


@pytest.mark.parametrize("registered", [True, False])
def test_ddp_in_a_subgroup_is_reduced_in_that_group(registered):
    results = run_ranks(4, two_subgroups, registered)
    for rank, result in enumerate(results):
        start = dict(Given(SHAPES, seed=rank // 2).named_parameters())
        pair = (0, 1) if rank < 2 else (2, 3)
        for name, p in result.items():
            mean = sum(integers(SHAPES, r)[name] for r in pair) / 2
            assert torch.equal(p, start[name].detach() - 0.25 * mean), name


def loaded_before_register(rank, world_size, early):
    groups = [dist.new_group([r]) for r in range(2)]
    ddp = DistributedDataParallel(Given(SHAPES), process_group=groups[rank])
    optimizer = dgc.SGD(ddp.parameters(), lr=0.25)
    state = dgc.DGCState(ddp.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    state.register(ddp)
    step(ddp, optimizer, normals(SHAPES, rank))
    saved = copy.deepcopy(state.state_dict())
    ddp = DistributedDataParallel(ddp.module, process_group=groups[rank])
    fresh = dgc.DGCState(ddp.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    if early:
        for _ in range(early):
            fresh.load_state_dict(saved)
        with pytest.raises(RuntimeError, match=r"expected load_state_dict\(\) after register\(\)"):
            fresh.register(ddp)
    else:
        fresh.register(ddp)
        fresh.load_state_dict(saved)
        assert torch.equal(fresh.memory.residual, state.memory.residual)


@pytest.mark.parametrize("early", [1, 2, 0])
def test_a_residual_is_not_divided_among_other_ranks_than_ddp_s(early):
    run_ranks(2, loaded_before_register, early)


def test_another_group_than_ddp_s_is_refused(gloo):
    model = DistributedDataParallel(Given(WIDE))
    optimizer = dgc.SGD(model.parameters(), lr=0.1)
    state = dgc.DGCState(model.named_parameters(), optimizer, CONFIG, process_group=dist.new_group([0]))
    with pytest.raises(ValueError, match="process_group: expected DDP's, of ranks"):
        state.register(model)


def again(rank, world_size, registered):
    """torch.distributed is shut down and initialised again; the run goes on with its residual."""
    run = Run(dgc.DGCConfig(density=0.008), momentum=0.0, lr=0.25)
    for i in range(4):
        run.train(integers(SHAPES, seed_of(i, rank)))
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()  # a rank that goes while another connects would end that one
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=world_size)
    run.ddp = DistributedDataParallel(run.net)
    if registered:
        run.state.register(run.ddp)
    else:
        run.ddp.register_comm_hook(run.state, dgc.dgc_hook)
    for i in range(4, 8):
        run.train(integers(SHAPES, seed_of(i, rank)))
    assert run.state.exchange.group is run.ddp.process_group
    return run.result()


@pytest.mark.parametrize("registered", [True, False])
def test_after_another_initialisation_the_run_goes_on(registered):
    results = run_ranks(2, again, registered)
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = sum(integers(SHAPES, seed_of(i, r))[name] for i in range(8) for r in range(2))
        moved = start[name].detach() - results[0]["parameters"][name]
        assert torch.equal(8 * moved + sum(r["residual"][name] for r in results), total), name


def differ_unregistered(rank, world_size):
    ddp = DistributedDataParallel(Given(SHAPES))
    optimizer = dgc.SGD(ddp.parameters(), lr=0.1)
    state = dgc.DGCState(ddp.named_parameters(), optimizer, dgc.DGCConfig(density=0.01 * (1 + rank)))
    ddp.register_comm_hook(state, dgc.dgc_hook)
    with pytest.raises(ValueError, match=r"density: rank 0 has 0\.01, rank 1 has 0\.02"):
        ddp(normals(SHAPES, rank)).backward()


def test_ranks_that_differ_are_found_in_the_first_pass_without_register():
    run_ranks(2, differ_unregistered)


def newcomer(rank, world_size):
    """Rank 0 trains alone, at another density; then rank 1 joins."""
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()  # a rank that goes while another connects would end that one
    dist.destroy_process_group()
    net = Given(SHAPES)
    optimizer = dgc.SGD(net.parameters(), lr=0.25, momentum=0.5)
    state = dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    if rank == 0:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        alone = DistributedDataParallel(net)
        state.register(alone)
        step(alone, optimizer, normals(SHAPES, 0))
        state.set_density(0.05)
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=world_size)
    ddp = DistributedDataParallel(net)
    state.register(ddp)
    assert (state.step, state.density) == (1, 0.05)
    step(ddp, optimizer, normals(SHAPES, rank))
    return {"parameters": {n: p.detach() for n, p in net.named_parameters()}, "density": state.stats.density}


def test_a_newcomer_goes_by_what_was_set_before():
    results = run_ranks(2, newcomer)
    assert_replicas_equal(results)
    assert [r["density"] for r in results] == [0.05, 0.05]


def trained_alone(rank, world_size):
    net = Given(SHAPES)
    optimizer = dgc.SGD(net.parameters(), lr=0.5)
    state = dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    state.load_state_dict(state.state_dict())  # this process's own, of rank 0 or 1
    copied = pickle.loads(pickle.dumps(state)) if rank == 0 else None
    files = [copied and pickle.dumps(copied)]
    dist.broadcast_object_list(files)
    loaded = pickle.loads(files[0])  # rank 0's on every rank
    ddp = DistributedDataParallel(Given(SHAPES))
    ours = dict(ddp.module.named_parameters())
    for name, p in loaded.parameters.by_name.items():
        ddp.module.register_parameter(name, p)
    del ours
    ddp = DistributedDataParallel(ddp.module)
    with pytest.raises(RuntimeError, match="each rank to bring a share of its own, but rank 0 was rank 0 of 2; rank 1"):
        loaded.register(ddp)


def test_rank_0_s_state_on_every_rank_is_refused():
    run_ranks(2, trained_alone)


def density_first(rank, world_size, densities, folder):
    dist.barrier()  # a rank that goes while another connects would end that one
    dist.destroy_process_group()
    net = Given(SHAPES)
    optimizer = dgc.SGD(net.parameters(), lr=0.25)
    state = dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(density=0.1))
    state.set_density(densities[rank])
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=world_size)
    model = DistributedDataParallel(net)
    if densities[0] != densities[1]:
        with pytest.raises(ValueError, match=r"density of set_density\(\): rank 0 has 0\.01, rank 1 has 0\.02"):
            state.register(model)
        return None
    state.register(model)
    for i in range(2):
        step(model, optimizer, normals(SHAPES, seed_of(i, rank)))
    return state.density, state.step, {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("densities", [(0.01, 0.01), (0.01, 0.02)], ids=["alike", "apart"])
def test_a_density_set_before_the_process_group_holds_in_it(tmp_path, densities):
    results = run_ranks(2, density_first, densities, str(tmp_path))
    if densities[0] == densities[1]:
        assert [r[:2] for r in results] == [(0.01, 2)] * 2
        assert all(torch.equal(results[0][2][n], results[1][2][n]) for n in SHAPES)


# 9: join


def uneven(rank, world_size, registered, optimizer):
    ddp = DistributedDataParallel(Given(SHAPES))
    optimizer = {
        "dgc": lambda: dgc.SGD(ddp.parameters(), lr=0.1, momentum=0.5),
        "adamw": lambda: dgc.AdamW(ddp.parameters(), lr=0.1),
        "adagrad": lambda: torch.optim.Adagrad(ddp.parameters(), lr=0.1),
    }[optimizer]()
    state = dgc.DGCState(ddp.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    if registered:
        state.register(ddp)
    else:
        ddp.register_comm_hook(state, dgc.dgc_hook)

    def epoch():
        with ddp.join():
            for i in range(2 + rank):
                step(ddp, optimizer, normals(SHAPES, seed_of(i, rank)))

    with pytest.raises(ValueError, match="state of dense parameters stays behind") as caught:
        epoch()
    return str(caught.value), state.step


@pytest.mark.filterwarnings("ignore:dgc. Adagrad gets averages")
@pytest.mark.parametrize(
    ("registered", "optimizer"), [(True, "dgc"), (False, "dgc"), (True, "adamw"), (True, "adagrad")]
)
def test_join_with_momentum_is_refused_on_all_ranks_at_once(registered, optimizer):
    for message, steps in run_ranks(2, uneven, registered, optimizer):
        assert "join(throw_on_early_termination=True)" in message
        assert steps == 0
