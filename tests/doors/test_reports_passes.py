"""Public bug reports, numbers 2, 6, 12, 13 and 15: parameters that are not reduced, changed gradients, a compiled step.

The numbers are those of docs/reliability.md, "What users' loops do".
"""

import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.models import Given, normals
from support.one_rank import CONFIG, WIDE, Head, one, step

# 2: parameters that the hook never gets


@pytest.mark.parametrize("how", ["frozen when wrapped", "outside", "ignored", "added"])
def test_a_parameter_that_is_not_reduced_is_named(gloo, how):
    net, outside = Head(), nn.Linear(100, 100)
    if how == "frozen when wrapped":
        net.top.requires_grad_(False)
    if how == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["top.weight", "top.bias"])
    model = DistributedDataParallel(net)
    net.top.requires_grad_(True)
    both = [*model.named_parameters(), *((f"loss.{n}", p) for n, p in outside.named_parameters() if how == "outside")]
    optimizer = dgc.SGD([p for _, p in both], lr=0.1, momentum=0.9)
    state = dgc.DGCState(both, optimizer, CONFIG)
    model.register_comm_hook(state, dgc.dgc_hook)
    loss = model(torch.randn(4, 100))
    if how == "added":
        optimizer.add_param_group({"params": list(outside.parameters())})
    if how in ("outside", "added"):
        loss = loss + outside(torch.randn(4, 100)).square().mean()
    before = [p.detach().clone() for p in (*model.parameters(), *outside.parameters())]
    name = {"outside": "loss.weight", "added": "one of shape (100, 100)"}.get(how, "top.weight")
    if how in ("outside", "ignored"):  # seen as soon as the DDP module is
        with pytest.raises(ValueError, match=name.replace("(", r"\(")):
            loss.backward()
        with pytest.raises(ValueError, match=name):
            state.register(model)
    else:
        loss.backward()
        with pytest.raises(ValueError, match=name.replace("(", r"\(").replace(")", r"\)")):
            optimizer.step()
    after = (*model.parameters(), *outside.parameters())
    assert all(torch.equal(p, q) for p, q in zip(after, before, strict=True))


def test_what_is_frozen_after_ddp_is_named(gloo):
    net = Given(WIDE)
    model = DistributedDataParallel(net, find_unused_parameters=True)
    net.b.requires_grad_(False)
    optimizer = dgc.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    state = dgc.DGCState(net.named_parameters(), optimizer, CONFIG)
    state.register(model)
    with pytest.raises(ValueError, match=r"\(130, 130\) that was frozen.*Freeze it before DDP wraps"):
        model(normals(WIDE, 0)).backward()


# 6: gradients that are changed between backward() and step()


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def decay_data(model):
    for p in model.parameters():
        p.grad.data.add_(p.data, alpha=0.1)


def noise(model):
    for p in model.parameters():
        p.grad = p.grad + 0.01 * torch.randn_like(p.grad)


@pytest.mark.parametrize("change", [clip, decay_data, noise])
@pytest.mark.parametrize("bucket_view", [True, False])
def test_a_changed_gradient_is_noticed_once_and_the_line_named(gloo, change, bucket_view):
    model, optimizer, state = one(ddp={"gradient_as_bucket_view": bucket_view})
    with pytest.warns(UserWarning, match=r"got others for .*DGCConfig\(clip_norm=\.\.\.\).*weight_decay"):
        step(model, optimizer, normals(WIDE, 0), lambda: change(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, normals(WIDE, 1), lambda: change(model))
    assert state.step == 2


@pytest.mark.parametrize("late", [False, True])
def test_a_changed_gradient_is_an_error_on_request(gloo, late):
    model, optimizer, state = one(dataclasses.replace(CONFIG, on_changed_gradient="raise"), late=late)
    step(model, optimizer, normals(WIDE, 0))
    before = [p.detach().clone() for p in model.parameters()]
    if late:
        step(model, optimizer, normals(WIDE, 1), lambda: clip(model))
        with pytest.raises(RuntimeError, match="clip_norm"):
            step(model, optimizer, normals(WIDE, 2))
    else:
        total = state.memory.residual_of("a") + 0.5 * state.memory.momentum_of("a") + normals(WIDE, 1)["a"]
        with pytest.raises(RuntimeError, match="clip_norm"):
            step(model, optimizer, normals(WIDE, 1), lambda: clip(model))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        torch.testing.assert_close(state.memory.residual_of("a"), total)  # what was sent is back
        step(model, optimizer, normals(WIDE, 2))


def test_what_changes_no_value_is_no_change(gloo):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, _ = one()
        for i in range(3):
            step(model, optimizer, normals(WIDE, i), lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e9))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        net = DistributedDataParallel(Given(WIDE))
        optimizer = dgc.SGD(net.parameters(), lr=0.1, momentum=0.5)
        dgc.DGCState(net.named_parameters(), optimizer, CONFIG, grad_scaler=scaler).register(net)
        for i in range(3):
            optimizer.zero_grad()
            scaler.scale(net(normals(WIDE, i))).backward()
            scaler.step(optimizer)
            scaler.update()
        ignoring, optimizer, _ = one(dataclasses.replace(CONFIG, on_changed_gradient="ignore"))
        step(ignoring, optimizer, normals(WIDE, 0), lambda: clip(ignoring))
    optimizer = dgc.SGD(net.parameters(), lr=0.1, momentum=0.5)
    net = DistributedDataParallel(net.module)
    dgc.DGCState(net.named_parameters(), optimizer, CONFIG, grad_scaler=scaler).register(net)
    scaler.scale(net(normals(WIDE, 5))).backward()
    scaler.unscale_(optimizer)
    clip(net)
    with pytest.warns(UserWarning, match="clip_norm"):  # unscaled and clipped is changed
        scaler.step(optimizer)


def test_a_step_that_is_left_out_is_not_compared(gloo):
    config = dataclasses.replace(CONFIG, on_nonfinite="skip", on_changed_gradient="raise")
    model, optimizer, state = one(config)
    bad = normals(WIDE, 1)
    bad["a"][0, 0] = float("nan")
    step(model, optimizer, normals(WIDE, 0))
    step(model, optimizer, bad, lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e9))  # to log the norm: NaN
    assert (state.step, state.stats.skipped) == (1, 1)


# 12, 13: passes that are not complete


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(100, 100), nn.Linear(100, 100)

    def forward(self, x):
        return self.used(x).square().mean()


@pytest.mark.parametrize("bucket_cap_mb", [25, 0.01])
def test_an_unused_parameter_is_named_with_the_remedy(gloo, bucket_cap_mb):
    model, optimizer, state = one(module=Branches(), ddp={"bucket_cap_mb": bucket_cap_mb})
    message = "got none of unused.weight, unused.bias.*find_unused_parameters=True"
    model(torch.randn(4, 100)).backward()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    state.discard(drop_gradient=False)
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):  # DDP's own, in the next forward pass
        model(torch.randn(4, 100)).backward()


def test_no_sync_around_backward_alone_gets_the_whole_line(gloo):
    model, _, _ = one()
    loss = model(normals(WIDE, 0))
    with model.no_sync():
        loss.backward()
    with pytest.raises(RuntimeError, match=r"with model\.no_sync\(\):  # the forward pass as well"):
        model(normals(WIDE, 1)).backward()


def test_a_state_that_is_registered_nowhere_says_so(gloo):
    model = DistributedDataParallel(Given(WIDE))
    optimizer = dgc.SGD(model.parameters(), lr=0.1, momentum=0.5)
    state = dgc.DGCState(model.named_parameters(), optimizer)
    model(normals(WIDE, 0)).backward()
    with pytest.raises(RuntimeError, match=r"state\.register\(model\)"):
        optimizer.step()
    assert "rank 0 of 1" in repr(state)


# 15: the whole step compiled


def test_a_compiled_step_has_the_same_bits(gloo):
    def run(compiled):
        torch.manual_seed(0)
        model, optimizer, _ = one(module=Head(), lr=0.05, momentum=0.9)

        def train(x):
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()

        train = torch.compile(train, backend="aot_eager") if compiled else train
        for i in range(3):
            train(torch.full((4, 100), 0.1 * (i + 1)))
        return [p.detach() for p in model.parameters()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's, of graphs that break
        compiled = run(True)
    for p, q in zip(compiled, run(False), strict=True):
        assert torch.equal(p, q)
