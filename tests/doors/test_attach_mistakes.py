"""What goes wrong between a model, its optimizer and attach(): each is caught once, with the way out."""

import os
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import dgc
from dgc.needs import needs
from support.messages import Messages, error_of
from support.models import Given
from support.ranks import run_ranks

CONFIG = dgc.DGCConfig(density=0.01, dense_below=100)
SGD = {"lr": 0.1, "momentum": 0.9}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 60))


def attached(wrapped, **arguments):
    net = network()
    model = DistributedDataParallel(net) if wrapped else net
    return net, model, dgc.attach(model, torch.optim.SGD(net.parameters(), **SGD), CONFIG, **arguments)


def backward(model, seed=0):
    model(torch.randn(4, 60, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def replaced(wrapped, everything):
    net, model, optimizer = attached(wrapped)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    if everything:
        net.load_state_dict(network().state_dict(), assign=True)
    else:
        net[2].weight = nn.Parameter(torch.zeros(60, 60))
    backward(model)
    return error_of(optimizer.step)


def wrapped_twice():
    net = network()
    ddp = DistributedDataParallel(net)
    inside = error_of(lambda: dgc.attach(net, torch.optim.SGD(net.parameters(), **SGD), CONFIG))
    del ddp
    gone = error_of(lambda: dgc.attach(net, torch.optim.SGD(net.parameters(), **SGD), CONFIG))
    net, _, optimizer = attached(False)
    late = DistributedDataParallel(net)
    backward(late)
    return inside, gone, error_of(optimizer.step)


def built_in_hook():
    net = network()
    ddp = DistributedDataParallel(net)
    ddp._register_builtin_comm_hook(torch.distributed.BuiltinCommHookType.FP16_COMPRESS)
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    return error_of(lambda: dgc.attach(ddp, optimizer, CONFIG)), ddp._comm_hooks


def python_reducer():
    torch._dynamo.config.optimize_ddp = "python_reducer"
    try:
        return error_of(lambda: attached(True))
    finally:
        torch._dynamo.config.optimize_ddp = True


def other_order(rank):
    shapes = {"a": (60, 60), "b": (60, 60)}
    net = Given(dict(reversed(shapes.items())) if rank else shapes)
    return error_of(lambda: dgc.attach(net, torch.optim.SGD(net.parameters(), **SGD), CONFIG))


def after_a_backward(rank, wrapped):
    """Gradients of a pass before attach(): nothing to apply alone, and part of the mean of the next pass."""
    net = Given({"a": (60, 60)})
    model = DistributedDataParallel(net) if wrapped else net
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    gradient = torch.full((60, 60), 4.0 + 2 * rank)
    model({"a": gradient}).backward()
    start = net.a.detach().clone()
    dgc.attach(model, optimizer, dgc.DGCConfig(density=1.0, dense_below=100))
    error = error_of(optimizer.step)
    model({"a": gradient}).backward()
    optimizer.step()
    return error, (start - net.a.detach()).unique().tolist()


def added_later(wrapped):
    net = network()
    net[2].requires_grad_(False)
    model = DistributedDataParallel(net) if wrapped else net
    optimizer = dgc.attach(model, torch.optim.SGD(net[0].parameters(), **SGD), CONFIG)
    net[2].requires_grad_(True)
    optimizer.add_param_group({"params": net[2].parameters()})
    backward(model)
    return error_of(optimizer.step)


def never_ran():
    """Registered on a model that is not the one that trains."""
    other = network()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    state = dgc.DGCState(other.named_parameters(), optimizer, CONFIG)
    backward(other)
    return error_of(optimizer.step), state


def saved_alone(rank, how):
    """An optimizer that is saved by a trainer that knows nothing of what waits."""
    _, model, optimizer = attached(True)
    optimizer.state_dict()  # before the first step there is nothing to lose
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                optimizer.state_dict()
                if how == "both":
                    optimizer.dgc.state_dict()
    return [str(w.message) for w in caught if "what waits on each rank was not saved" in str(w.message)]


def everything(rank, world_size):
    messages = Messages()
    found = {
        "replaced": [replaced(wrapped, everything) for wrapped in (True, False) for everything in (True, False)],
        "wrapped": wrapped_twice(),
        "built-in": built_in_hook(),
        "python reducer": python_reducer(),
        "order": other_order(rank),
        "after backward": [after_a_backward(rank, wrapped) for wrapped in (True, False)],
        "added": [added_later(wrapped) for wrapped in (True, False)],
        "never ran": never_ran()[0],
        "saved alone": saved_alone(rank, "alone"),
        "saved both": saved_alone(rank, "both"),
    }
    return {**found, "lines": messages.lines}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, everything)


def test_parameters_that_were_replaced_are_named(ranks):
    for r in ranks:
        for i, error in enumerate(r["replaced"]):
            everything = i in (0, 2)
            names = "0.weight, 0.bias, 2.weight, 2.bias" if everything else "2.weight"
            assert f"got others for {names}, which have been replaced" in error, i


def test_a_model_that_ddp_exchanges_too_is_refused(ranks):
    for inside, gone, late in (r["wrapped"] for r in ranks):
        assert "DistributedDataParallel has wrapped it: gradients would be averaged twice" in inside
        assert gone == ""
        assert "DistributedDataParallel has wrapped it since" in late


def test_a_second_hook_is_refused(ranks):
    for error, hooks in (r["built-in"] for r in ranks):
        assert "leave out _register_builtin_comm_hook()" in error
        assert hooks == []  # not listed as registered


def test_ddp_s_python_reducer_is_refused_before_the_first_pass(ranks):
    for r in ranks:
        assert 'made under optimize_ddp="python_reducer"' in r["python reducer"]


def test_parameters_in_another_order_are_named(ranks):
    for r in ranks:
        assert "parameter a: rank 0 has ((60, 60), torch.float32, 'number 0'), rank 1 has" in r["order"]


def test_a_backward_before_attach_loses_nothing(ranks):
    for r in ranks:
        for error, moved in r["after backward"]:
            assert "expected a backward pass since the last step(), got none that was exchanged" in error
            assert moved == [10.0]  # the mean of both passes, each 4 and 6


def test_parameters_that_were_added_later_are_an_error(ranks):
    for r in ranks:
        for error in r["added"]:
            assert "got this rank's own of one of shape (60, 60), one of shape (60,)" in error
            assert "added later" in error


def test_a_hook_that_never_ran_is_an_error_at_the_first_step_of_torch_s_optimizer(ranks):
    for r in ranks:
        assert "no model has this state registered" in r["never ran"]


def test_an_optimizer_that_is_saved_alone_is_told_of_once(ranks):
    assert len(ranks[0]["saved alone"]) == 1
    assert "dgc.checkpoint.save(state, dir) on all ranks" in ranks[0]["saved alone"][0]
    assert ranks[1]["saved alone"] == ranks[0]["saved both"] == ranks[1]["saved both"] == []


def test_the_log_says_how_a_plain_module_is_exchanged(ranks):
    assert "dgc: exchanging gradients of a plain module without DDP over 2 ranks" in ranks[0]["lines"]


def test_a_process_that_trains_alone_though_several_were_started_is_warned_of(monkeypatch):
    messages = Messages()
    for ranks, expected in (("2", 1), ("1", 1)):
        monkeypatch.setitem(os.environ, "WORLD_SIZE", ranks)
        net = network()
        dgc.attach(net, torch.optim.SGD(net.parameters(), **SGD), CONFIG)
        told = [line for line in messages.lines if "each process trains alone" in line]
        assert len(told) == expected
    assert told[0].startswith("dgc: WORLD_SIZE is 2, but torch.distributed is not initialised")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    net = network()
    dgc.LocalSteps(net, torch.optim.SGD(net.parameters(), **SGD), every=2)
    assert len([line for line in messages.lines if "each process trains alone" in line]) == 2


def test_fsdp1_is_refused(gloo):
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"without FullyShardedDataParallel \(FSDP1\)"):
        dgc.attach(model, torch.optim.SGD(model.parameters(), **SGD), CONFIG)


def test_a_lazy_module_has_to_be_made_real_first(gloo):
    net = nn.LazyLinear(5)
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    with pytest.raises(ValueError, match=r"lazy module. Make it real first: .* a forward pass"):
        dgc.attach(net, optimizer, CONFIG)
    net(torch.ones(2, 60))
    dgc.attach(net, optimizer, CONFIG)
    backward(net)
    optimizer.step()
    assert optimizer.dgc.step == 1


def test_a_framework_that_is_too_old_is_named():
    needs("2.10", "torch")
    needs("2.10", "no-such-package", "torch")
    with pytest.raises(ImportError, match=r"expected torch 99.1 or later, got 2\."):
        needs("99.1", "torch")
    with pytest.raises(ImportError, match="expected no-such-package 1 or later, got none"):
        needs("1", "no-such-package")
