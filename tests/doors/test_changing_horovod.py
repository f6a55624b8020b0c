"""Models that change behind Horovod: rebind(), forget(), mask() and rewinding."""

from support import changes
from support.horovod_run import Run, hvd
from support.training import assert_replicas_equal


def change():
    run = Run(changes.CONFIG, module=changes.Layers(), **changes.SETTINGS)
    return changes.change(run, hvd.rank())


def test_nothing_is_lost_but_what_was_asked_to_go(horovod):
    runs = horovod(3, change)
    assert_replicas_equal(runs)
    changes.assert_nothing_lost(runs)
