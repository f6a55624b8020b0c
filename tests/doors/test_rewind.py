"""Rewinding: weights, optimizer, residual and the place in the warm-up go back together, to the bits of that step."""

from support import changes
from support.ddp_run import Run
from support.ranks import run_ranks


def rewind(rank, world_size):
    return [
        changes.rewind(Run(changes.REWOUND, module=changes.Layers(), optimizer=optimizer, **settings), rank)
        for optimizer, settings in changes.OPTIMIZERS.items()
    ]


def test_a_run_goes_back_to_the_bits_of_a_step_and_comes_the_same_way_again():
    for runs in run_ranks(2, rewind):
        for times in runs:
            changes.assert_rewound(times)
