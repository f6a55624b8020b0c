"""DGCConfig.exchange "auto" with clocks that the test sets: the choice, its figures, and what it leaves alone."""

import io
import json
import logging

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.ddp_run import Run
from support.models import Given, integers
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_conserved, assert_replicas_equal, seed_of

CONFIG = dgc.DGCConfig(density=0.008, exchange="auto")
LEAD, BLOCK, MOST = 8, 5, 30


class Clock:
    """A rank's clock, which the test moves by what a step takes."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def train(run, steps, rank, cost):
    """Trains; returns for each step whether it was dense, and the sum of the gradients of each large parameter.

    `cost` returns the seconds that a step takes on this rank, of its number and of whether it was dense.
    """
    clock = run.state._standing.auto.clock = Clock()
    dense, total = [], {name: torch.zeros(SHAPES[name]) for name in LARGE}
    for step in range(run.state.step, run.state.step + steps):
        gradients = integers(SHAPES, seed_of(step, rank))
        run.train(gradients)
        dense.append(run.state.stats.sent_density == 0)
        clock.now += cost(step, dense[-1])
        for name in LARGE:
            total[name] += gradients[name]
    return dense, total


def figures(run, dense, total):
    return {**run.result(), "dense": dense, "total": total, "auto": run.state.stats.choice}


# decisions, of two ranks and three


def dense_is_quicker(rank, step, dense):
    return 1.0 if dense else 1.3


def sparse_is_quicker(rank, step, dense):
    return 1.3 if dense else 1.0


def dense_is_much_quicker(rank, step, dense):
    return 1.0 if dense else 9.0


def one_rank_is_slow(rank, step, dense):
    """It is slow in every step, all have to wait for it, and it takes a long time every fourth step."""
    return 50.0 + sparse_is_quicker(rank, step, dense) + 300.0 * (step % 4 == 0)


def one_clock_is_wrong(rank, step, dense):
    return (1.0 if dense else 99.0) if rank == 1 else sparse_is_quicker(rank, step, dense)


COSTS = [dense_is_quicker, sparse_is_quicker, dense_is_much_quicker, one_rank_is_slow, one_clock_is_wrong]


def decide(rank, world_size):
    found = []
    for cost in COSTS[: 4 if world_size == 2 else 5]:
        run = Run(CONFIG, momentum=0.0, lr=1.0)
        found.append(figures(run, *train(run, 60, rank, lambda step, dense, cost=cost: cost(rank, step, dense))))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_quicker_exchange_is_taken_replicas_are_equal_and_nothing_is_lost(world_size):
    results = run_ranks(world_size, decide)
    for cost, *ranks in zip(COSTS, *results, strict=False):
        assert all(one["dense"] == ranks[0]["dense"] for one in ranks)
        assert all(one["auto"] == ranks[0]["auto"] for one in ranks)
        expected = cost in (dense_is_quicker, dense_is_much_quicker)
        rounds = 1 if cost is dense_is_much_quicker else 3
        before = [False] * LEAD + ([True] * BLOCK + [False] * BLOCK) * rounds
        assert ranks[0]["dense"] == before + [expected] * (60 - len(before)), cost.__name__
        choice = ranks[0]["auto"]
        assert (choice.dense, choice.step, choice.rows, choice.density) == (expected, len(before), world_size, 0.008)
        assert_replicas_equal(ranks)
        if world_size == 2:  # a third of an integer is rounded
            assert_conserved(ranks, factor=world_size)
        else:
            for name in LARGE:
                moved = Given(SHAPES).get_parameter(name).detach() - ranks[0]["parameters"][name]
                waits, total = (sum(r[kind][name] for r in ranks) for kind in ("residual", "total"))
                torch.testing.assert_close(3 * moved + waits, total, atol=1e-3, rtol=0)
    quick = results[0][0]["auto"]
    assert (quick.dense_ms, quick.sparse_ms) == pytest.approx((1000, 1300))
    assert quick.again == quick.step + 2000
    # one round of five steps that take 8 more than a dense one, in half a percent of the time
    assert results[0][2]["auto"].again - results[0][2]["auto"].step == 5 * 8 / 0.005


# later trials, hysteresis, checkpoints


def resume(rank, world_size):
    """Trains until dense is chosen, and goes on in another run with what was saved; later trials follow there."""
    first = Run(CONFIG, momentum=0.5)
    dense, _ = train(first, 50, rank, lambda step, dense: 1.0 if dense else 1.3)
    share = first.state.state_dict()
    file = io.BytesIO()
    torch.save(share, file)
    file.seek(0)
    second = Run(CONFIG, momentum=0.5)
    second.state.load_state_dict(torch.load(file, weights_only=True))
    after = [train(run, 20, rank, lambda step, dense: 1.0 if dense else 1.3) for run in (first, second)]
    text = json.dumps(share["ranks"][str(rank)]["choices"])
    # The next trial is brought forward.
    found = []
    for sparse in (0.99, 0.9):
        second.state._standing.auto.load([dgc.stats.Choice(**{**json.loads(text)[0], "again": second.state.step + 3})])
        found.append(train(second, 45, rank, lambda step, dense, sparse=sparse: 1.0 if dense else sparse)[0])
    # While the user has it dense there is no trial.
    second.state.dense = True
    off = train(second, 3, rank, lambda step, dense: 1.0)[0]
    return {
        "dense": dense[-5:],
        "after": [one for one, _ in after],
        "text": text,
        "later": found,
        "off": (off, second.state.stats.dense["a"]),
    }


def test_a_choice_is_saved_and_kept_unless_the_other_exchange_saves_a_share_of_a_step():
    results = run_ranks(2, resume)
    for one in results:
        assert one["dense"] == [True] * 5
        assert one["after"] == [[True] * 20] * 2  # no new trial after loading
        assert one["text"] == results[0]["text"]
        trial = [True] * 3 + ([False] * BLOCK + [True] * BLOCK) * 3
        kept, given_up = one["later"]
        assert kept == trial + [True] * (45 - len(trial))
        assert given_up == trial + [False] * (45 - len(trial))
        assert one["off"] == ([True] * 3, "state.dense is set")


# phases, and what there is no choice in


def phases(rank, world_size):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("dgc").addHandler(handler)
    logging.getLogger("dgc").setLevel(logging.INFO)
    config = dgc.DGCConfig(
        density=0.008, exchange="auto", warmup_steps=600, warmup_densities=(0.25, 0.05), dense_below=17000
    )
    run = Run(config, shapes=SHAPES, momentum=0.5)
    costs = {0.25: 1.3, 0.05: 0.9, 0.008: 0.8}
    dense = train(run, 680, rank, lambda step, dense: 1.0 if dense else costs[run.state.stats.density])[0]
    return dense, sorted(run.state._standing.auto.choices), lines


def test_every_phase_has_a_trial_of_its_own_and_the_log_has_its_figures():
    dense, choices, lines = run_ranks(2, phases)[0]
    at = LEAD + MOST
    assert dense[at:300] == [True] * (300 - at)
    assert dense[300:308] == [False] * 8
    assert dense[300 + at : 600] == [False] * (300 - at)
    assert dense[600 + at :] == [False] * (80 - at)
    assert choices == [(0.008, 2), (0.05, 2), (0.25, 2)]
    chosen = [line for line in lines if "next trial" in line]
    assert chosen[0] == (
        "dgc: step 38, density 25 %: a dense step takes 1e+03 ms, a compressed one 1.3e+03 ms: dense steps from here "
        "on; next trial at step 2038"
    )
    assert len(chosen) == 3
    entered = [line for line in lines if "parameters compressed" in line]
    assert [line.split(",")[0] for line in entered] == [f"dgc: step {step}" for step in (0, 38, 300, 600)]
    assert 'exchange="auto" takes dense steps' in entered[1]


def no_choice(rank, world_size):
    short = Run(dgc.DGCConfig(density=0.008, exchange="auto", warmup_steps=596), momentum=0.0)
    short = train(short, 60, rank, lambda step, dense: 1.0)[0]
    dear = Run(dgc.DGCConfig(density=0.999, exchange="auto"), momentum=0.0)  # all-gather carries more than all-reduce
    dear = train(dear, 60, rank, lambda step, dense: 1.0)[0]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = DistributedDataParallel(Given(SHAPES))
    optimizer = dgc.SGD(model.parameters(), lr=0.1)
    try:
        dgc.DGCState(model.named_parameters(), optimizer, CONFIG, mesh=mesh)
    except ValueError as error:
        return short, dear, str(error)


def test_there_is_no_trial_in_a_short_phase_or_where_bytes_decide_and_none_inside_nodes():
    for short, dear, message in run_ranks(4, no_choice):
        assert short == [False] * 60
        assert dear == [True] * 60
        assert message.startswith('exchange: expected "bytes" where the ranks of a node divide')


def test_one_rank_has_no_trial_and_local_steps_refuse_it():
    model = torch.nn.Linear(200, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match='exchange: expected "bytes" for LocalSteps, got "auto"'):
        dgc.LocalSteps(model, optimizer, CONFIG, every=4)
    optimizer = dgc.attach(model, optimizer, dgc.DGCConfig(density=0.01, exchange="auto"))
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.ones(2, 200)).sum().backward()
        optimizer.step()
        assert optimizer.dgc.stats.sent_density > 0
    assert optimizer.dgc.stats.choice is None
