"""Advice: what to tell a training loop that does not do what DGC needs, and the line that mends it."""

from __future__ import annotations

from collections.abc import Sequence

REGISTER = (
    "    state = dgc.DGCState(model.named_parameters(), optimizer, config)\n"
    "    state.register(model)  # with Horovod: dgc.horovod.DistributedOptimizer in place of both"
)
NO_SYNC = (
    "    with model.no_sync():  # the forward pass as well\n"
    "        loss = loss_fn(model(x), y)\n"
    "        loss.backward()"
)


def names(parameters: Sequence[str]) -> str:
    """Returns a few names for a message."""
    more = f" and {len(parameters) - 5} more" if len(parameters) > 5 else ""
    return ", ".join(parameters[:5]) + more


def second_pass() -> str:
    """Says that a backward pass came where step() should have."""
    return (
        "DGCState: expected optimizer.step() after the last backward pass, got another backward pass. Three ways on:\n"
        "To accumulate over several passes, run all but the last without exchange (Horovod: "
        f"backward_passes_per_step):\n{NO_SYNC}\n"
        "Where this model only hands gradients on, as a GAN's discriminator does in the generator's step, run that "
        "pass without its exchange, in the same way, and call zero_grad() as always.\n"
        "To leave an update out on purpose, make the state with DGCConfig(droppable=True) and call "
        "state.discard(drop_gradient=True) and zero_grad()"
    )


def second_module() -> str:
    """Says that a backward pass of another DDP module came."""
    return (
        "DGCState: expected one DDP module, got a backward pass of another one before optimizer.step(). One state "
        "serves one DDP module with one optimizer: put both networks into one nn.Module and wrap that, or give each a "
        "DGCState and an optimizer of its own"
    )


def incomplete(missing: Sequence[str]) -> str:
    """Says that a backward pass is not complete.

    Args:
        missing: parameters that have no gradient; perhaps none.
    """
    which = f"got none of {names(missing)}" if missing else "got only some"
    return (
        f"DGCState: expected gradients of all parameters from the backward pass, {which}. DDP waits for them, and has "
        "reduced nothing, or only a part. Wrap the model with DistributedDataParallel(..., "
        "find_unused_parameters=True), or set requires_grad=False, before wrapping, on what is never used. To go on "
        "after an exception in backward(), call state.discard(drop_gradient=False) and zero_grad()"
    )


def broke_off(missing: Sequence[str]) -> str:
    """Says that the pass before this one was not complete."""
    which = f" without {names(missing)}" if missing else ""
    return (
        f"DGCState: expected the last backward pass to be complete, but it broke off{which}, and what it sent is in "
        "neither the residual nor the model. Call state.discard(drop_gradient=False), which takes it back, and "
        "zero_grad(). If no exception ended it, parameters were unused: find_unused_parameters=True"
    )


def nothing_reduced(registered: bool) -> str:
    """Says that step() came without a backward pass that was exchanged."""
    if registered:
        return (
            "DGCState: expected a backward pass since the last step(), got none that was exchanged. If it ran under "
            "no_sync(), run the last one before step() outside of it, forward pass included"
        )
    return (
        "DGCState: expected a backward pass since the last step(), got none, since no model has this state registered. "
        f"Write\n{REGISTER}"
    )


def not_reduced(local: Sequence[str]) -> str:
    """Says that the optimizer would apply gradients of this rank alone.

    Args:
        local: the names of their parameters.
    """
    return (
        f"optimizer: expected gradients that were exchanged, got this rank's own of {names(local)}, which the backward "
        "pass did not hand to DGC. DDP does not reduce what was frozen when it wrapped the model, is outside of that "
        "model (a loss with weights of its own), is on its ignore list or delayed, or was added later. Wrap one module "
        "that holds all of them, trainable, and make optimizer and DGCState again; or take them out of this optimizer"
    )


def thrown_away(without: Sequence[str]) -> str:
    """Says that compressed parameters have lost their gradient between backward() and step()."""
    return (
        f"optimizer: expected the gradient of every compressed parameter, got None for {names(without)}. What was sent "
        "for it would be lost, and what it has accumulated would come later. To freeze parameters in this way, name "
        "them in DGCConfig(dense_parameters=...), which costs their bytes, or set DGCConfig(droppable=True), which "
        "drops this pass for them and costs memory and time. To leave out the whole step, call state.discard()"
    )


def not_droppable() -> str:
    """Says that nothing was kept to return to."""
    return (
        "DGCState.discard: expected DGCConfig(droppable=True) with drop_gradient=True, got False: u and v as they were "
        "before the pass are not kept, since that costs 8 bytes a parameter and a copy at every pass. "
        "discard(drop_gradient=False) keeps the gradient in u and v, for later steps"
    )


def kept() -> str:
    """Says what discard() does where nobody has said which."""
    return (
        "dgc: state.discard() takes back what was sent, and keeps the gradient in momentum and residual: it arrives "
        "with later steps. Say which you want: discard(drop_gradient=False) is this; discard(drop_gradient=True), "
        "with DGCConfig(droppable=True), throws it away, for a loss spike or a gradient that is not this model's"
    )


def changed(which: Sequence[str]) -> str:
    """Says that somebody has changed gradients between backward() and step()."""
    return (
        f"dgc: expected gradients as backward() left them, got others for {names(which)} in step(). Clipping, weight "
        "decay or noise there acts on the few entries that were sent, which are sums of many steps, and what it cuts "
        "is lost. Take it out (a Trainer's max_grad_norm or gradient_clip_val: set it to 0) and write instead: "
        "DGCConfig(clip_norm=...) to clip, dgc.SGD(weight_decay=...) to decay. Other changes belong before the "
        'exchange, into the loss. DGCConfig(on_changed_gradient="ignore") says that it is meant'
    )


def residual_missing(steps: int) -> str:
    """Says that an optimizer goes on, and its DGCState does not."""
    return (
        f"dgc: the optimizer has taken {steps} steps, and this DGCState none: what the run had not sent yet is gone, "
        "and warm-up begins again. Save and load the state too: dgc.checkpoint.save(state, dir) and "
        "dgc.checkpoint.load(state, dir) on all ranks; or, where rank 0 writes one file, state.full_state_dict() and "
        "state.load_state_dict(). To begin anew on purpose, ignore this"
    )
