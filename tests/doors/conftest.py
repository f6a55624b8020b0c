"""Fixtures: one gloo rank in this process, and processes of Horovod."""

import pytest
import torch.distributed as dist

from support import horovod_ranks


@pytest.fixture
def gloo():
    """One gloo rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def horovod():
    """Calls a function in the given number of Horovod processes; four of them are two nodes of two."""
    pools = {}

    def call(num_proc, body, *args):
        if num_proc not in pools:
            sets = {3: [[0, 2]], 4: "dynamic"}
            nodes = 2 if num_proc == 4 else 1
            pools[num_proc] = horovod_ranks.Pool(num_proc, sets.get(num_proc, ()), nodes=nodes)
        return pools[num_proc](body, *args)

    yield call
    for pool in pools.values():
        pool.close()
