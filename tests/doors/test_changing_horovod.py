"""Models that change behind Horovod: rebind(), forget(), mask() and rewinding."""

import pytest
import torch
from torch import nn

import dgc
from support import changes
from support.horovod_run import Run, dgc_hvd, hvd
from support.models import normals
from support.training import assert_replicas_equal, seed_of

SGD = changes.OPTIMIZERS[dgc.SGD]


def change():
    return changes.change(Run(changes.CONFIG, module=changes.Layers(), **changes.SETTINGS), hvd.rank())


def test_nothing_is_lost_but_what_was_asked_to_go(horovod):
    runs = horovod(3, change)
    assert_replicas_equal(runs)
    changes.assert_nothing_lost(runs)


def rewind():
    return [
        changes.rewind(Run(changes.REWOUND, module=changes.Layers(), optimizer=optimizer, **settings), hvd.rank())
        for optimizer, settings in changes.OPTIMIZERS.items()
    ]


def test_a_run_goes_back_to_the_bits_of_a_step_and_comes_the_same_way_again(horovod):
    for runs in horovod(3, rewind):
        for times in runs:
            changes.assert_rewound(times)


def beside(how, passes, groups):
    """A run that is rebound under way, and one that goes straight on; the losses of the first are still held."""
    runs, losses = [], []
    for _ in range(2):
        net = changes.Layers()
        chosen = [[net.b.weight, net.a.weight]] if groups == "list" else groups
        horovod = {"backward_passes_per_step": passes, "groups": chosen}
        runs.append(Run(changes.CONFIG, module=net, horovod=horovod, **SGD))
    straight, run = runs
    for i in range(6):
        if i == 3 and how == "replaced":
            run.net.a.weight = nn.Parameter(run.net.a.weight.detach().clone())
            assert run.rebind() == {}
        elif i == 3:
            run.horovod = {"backward_passes_per_step": passes}  # the list has the tensors of the first time
            assert run.rebind(dgc.SGD(run.net.parameters(), **SGD)) == {}
            assert run.optimizer.dgc_state is run.state
        for one in (straight, run):
            one.optimizer.zero_grad()
            for part in range(passes):
                losses.append(one.net(normals(changes.SHAPES, seed_of(passes * i + part, hvd.rank()))))
                losses[-1].backward()
            one.optimizer.step()
    sizes = [[len(group) for group in one.optimizer._fusion._groups] for one in runs]
    return changes.standing(straight), changes.standing(run), sizes


@pytest.mark.parametrize(
    ("how", "passes", "groups"),
    [("replaced", 1, None), ("replaced", 2, "list"), ("replaced", 1, 2), ("wrapped", 1, None), ("wrapped", 2, None)],
)
def test_a_rebound_run_has_the_bits_of_one_that_goes_straight_on(horovod, how, passes, groups):
    for straight, rebound, sizes in horovod(2, beside, how, passes, groups):
        assert changes.differing(straight, rebound) == []
        assert sizes[0] == sizes[1]
        assert straight["step"] == 6


def message(call):
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return "no error"


def refused():
    """Mistakes in the middle of a run, and the same run without them."""
    rank, messages = hvd.rank(), {}
    undisturbed, run = (Run(changes.CONFIG, module=changes.Layers(), **SGD) for _ in range(2))
    net, state = run.net, run.state
    for one in (undisturbed, run):
        one.train(normals(changes.SHAPES, rank))
    named = list(net.named_parameters())

    def wrapped(config=changes.CONFIG, **horovod):
        compressor = dgc_hvd.DGCCompressor(config, bucket_cap_mb=0.1)
        return dgc_hvd.DistributedOptimizer(dgc.SGD(net.parameters(), **SGD), named, compressor, **horovod)

    def other_groups():
        held = run.optimizer.param_groups[0]["params"]
        if rank:
            held.reverse()
        try:
            run.rebind()
        finally:
            held[:] = [p for _, p in named]

    extra = nn.Parameter(torch.zeros(3))
    for what, call in {
        "plain": lambda: state.rebind(net, dgc.SGD(net.parameters(), **SGD)),
        "config": lambda: state.rebind(net, wrapped(dgc.DGCConfig(density=0.5))),
        "op": lambda: state.rebind(net, wrapped(op=hvd.Sum)),
        "twice": lambda: state.rebind([*named, ("a.weight", extra)]),
        "not held": lambda: state.rebind([*named, ("extra", extra)]),
        "order": lambda: state.rebind(named[::-1] if rank else named),
        "groups": other_groups,
        "one rank": lambda: state.rebind(named[1:] if rank else named),
        "back": lambda: state.rebind(net, back={"a.weight": {"residual": torch.zeros(3)}}),
    }.items():
        messages[what] = message(call)
    for one in (undisturbed, run):
        one.optimizer.zero_grad()
        one.net(normals(changes.SHAPES, 10 + rank)).backward()
        if one is run:
            messages["in a pass"] = message(run.rebind)
        one.optimizer.step()
    same = changes.differing(changes.standing(undisturbed), changes.standing(run))
    run.rebind()
    net.a.weight = nn.Parameter(net.a.weight.detach().clone())
    messages["replaced"] = message(lambda: run.train(normals(changes.SHAPES, rank)))
    noname = dgc_hvd.DistributedOptimizer(dgc.SGD(changes.Layers().parameters(), lr=1.0))
    messages["no names"] = message(lambda: noname.dgc_state.rebind(net))
    return messages, same


def test_what_is_wrong_is_said_and_changes_nothing(horovod):
    for rank, (messages, same) in enumerate(horovod(2, refused)):
        for what, expected in {
            "plain": "expected one that dgc.horovod.DistributedOptimizer has made, got SGD",
            "config": "expected one wrapped as the present one was, got config DGCConfig(density=0.5",
            "op": "got op hvd.Sum, not hvd.Average",
            "twice": "got 'a.weight' twice",
            "not held": "hold every parameter, but not extra",
            "order": "expected the same configuration and parameters",
            "groups": "group of ",
            "one rank": "expected all that the optimizer holds"
            if rank
            else "but rank 1: named_parameters: expected all",
            "back": "expected tensors of the new model's a.weight, (200, 100), got (3,)",
            "in a pass": "rebind: expected to be called between",
            "replaced": "got others for a.weight",
            "no names": "an optimizer that was wrapped without",
        }.items():
            assert expected in messages[what], (what, messages[what])
        assert same == []
