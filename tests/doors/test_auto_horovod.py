"""DGCConfig.exchange "auto" behind Horovod: the steps, the choice and the bits that the DDP hook has."""

import dgc
from support import ddp_run
from support.horovod_run import Run, hvd
from support.models import integers
from support.ranks import run_ranks
from support.training import SHAPES, assert_equal, assert_replicas_equal, seed_of


def train(run, rank):
    now = 0.0
    run.state._standing.auto.clock = lambda: now
    dense = []
    for step in range(45):
        run.train(integers(SHAPES, seed_of(step, rank)))
        dense.append(run.state.stats.sent_density == 0)
        now += 1.0 if dense[-1] else 1.1
    return {**run.result(), "dense": dense}


CONFIG = dgc.DGCConfig(density=0.008, exchange="auto")


def behind_horovod():
    return train(Run(CONFIG), hvd.rank())


def behind_ddp(rank, world_size):
    return train(ddp_run.Run(CONFIG), rank)


def test_a_trial_behind_horovod_has_the_bits_of_the_ddp_hook(horovod):
    results = horovod(2, behind_horovod)
    assert_replicas_equal(results)
    assert results[0]["dense"] == [False] * 8 + ([True] * 5 + [False] * 5) * 3 + [True] * 7
    assert results[0]["stats"].choice == results[1]["stats"].choice
    assert_equal(results, run_ranks(2, behind_ddp))
