"""Steps without network: ranks whose clocks differ take the same number of them."""

import torch
from torch import nn

from dgc.cli.forecast import FLOAT32
from dgc.cli.rehearsal import MOST, Rehearsal
from support.ranks import run_ranks


def _rehearse(rank: int, world_size: int) -> int:
    module = nn.Linear(4, 4)
    names = [name for name, _ in module.named_parameters()]
    rehearsal = Rehearsal(module, lambda model: model(torch.ones(1, 4)).sum(), torch.device("cpu"), "sgd", names)
    rehearsal.rehearse(FLOAT32, seconds=(0.0, 1000.0)[rank])
    return len(rehearsal.found[FLOAT32].durations)


def test_ranks_that_have_different_time_left_take_the_same_steps():
    assert run_ranks(2, _rehearse) == [MOST, MOST]
