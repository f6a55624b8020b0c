"""Advice: the messages for a training loop that uses DGC wrongly, each with its remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

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
    """Says that a backward pass, of this module or another, came where step() was expected."""
    return (
        "DGCState: expected optimizer.step() after the last backward pass, got another backward pass. The ways on:\n"
        "Where the loop has several passes before each step (a loss by parts, a GAN, accumulation), exchange their sum "
        "in step(), on a DDP module that is wrapped anew; the loop stays as it is:\n"
        "    state.register(model, in_step=True)  # in place of state.register(model)\n"
        "    dgc.attach(model, optimizer, config, in_step=True)  # in place of attach without it\n"
        "Or, so that the exchange overlaps with the last pass, run all but that one without exchange (Horovod: "
        "backward_passes_per_step; FSDP2: state.no_sync(), or set_requires_gradient_sync(False); without DDP: "
        f"optimizer.dgc.no_sync()):\n{NO_SYNC}\n"
        "Where this model's own gradients are not wanted, as a GAN's discriminator's in the generator's step, run that "
        "pass without its exchange, in the same way, and call zero_grad() as always.\n"
        "To leave an update out on purpose, make the state with DGCConfig(droppable=True) and, in place of step(), "
        "call state.discard(drop_gradient=True) and zero_grad().\n"
        "If step() was called: it has to find gradients, and be that of the optimizer that DGCState was made with.\n"
        "One DGCState serves one DDP module with one optimizer. If this pass was another module's, put both networks "
        "into one nn.Module and wrap that, or give each a DGCState and an optimizer of its own"
    )


def discarded() -> str:
    """Says that a bucket came for a pass that has been discarded."""
    return (
        "DGCState: expected the first bucket of a backward pass, got a later one: this pass has been discarded. Call "
        "zero_grad() and run another"
    )


def outstanding(method: str) -> str:
    """Says that a method was called between backward() and step()."""
    return (
        f"DGCState.{method}: expected to be called between optimizer.step() and the next backward(), got a call "
        "between backward() and step(): call step() first, or, to leave this update out, "
        "state.discard(drop_gradient=False)"
    )


def not_finite(found: Sequence[str], step: int) -> str:
    """Says which gradients were not finite.

    Args:
        found: descriptions of these gradients.
        step: number of the step that was left out.
    """
    return (
        f"DGCState: expected finite gradients, got Inf or NaN: {'; '.join(found)}, step {step}. Nothing was applied, "
        "and what was sent is back in the residual. Look at the loss; or leave such steps out: "
        'DGCConfig(on_nonfinite="skip"), with an optimizer of dgc; with loss scaling DGCState(grad_scaler=scaler)'
    )


def cannot_skip(optimizer: str) -> str:
    """Says that an optimizer cannot leave out a step that overflows."""
    return (
        "DGCState: expected finite gradients, got some whose average or residual overflows, so this step must not be "
        f"applied, and {optimizer} cannot leave one out: lower the loss scale or the learning rate, clip with "
        "DGCConfig(clip_norm=...), or use an optimizer of dgc's"
    )


def no_config(got: object) -> str:
    """Says what to pass as config."""
    write = "dgc.DGCConfig(**values)" if isinstance(got, Mapping) else "dgc.DGCConfig(density=0.001)"
    return f"config: expected a DGCConfig or None, got {type(got).__name__}: write {write}"


def read_only() -> str:
    """Says how to change DGCState.config, since an assignment was tried."""
    return (
        "DGCState.config: expected to be read, got an assignment. It is read-only, since all ranks have to agree on "
        "it. Call state.set_density(density) on all ranks; for another field, make a new DGCState, between "
        "state.state_dict() and load_state_dict()"
    )


def loaded_too_early() -> str:
    """Says that residuals were divided among other ranks than DDP's."""
    return (
        "DGCState: expected load_state_dict() after register(), got it before, and DDP has another process group than "
        "the default one among whose ranks the residual was divided. Make the state again, call state.register(model), "
        "then load; or make it with process_group="
    )


def displaced() -> str:
    """Says that the optimizer is now served by a DGCState that was made later."""
    return (
        "DGCState: expected to be its optimizer's only one, got a gradient while another DGCState, which was made "
        "later, serves the same optimizer. Make one DGCState an optimizer; to start again, delete the first one, wrap "
        "the module in DistributedDataParallel again and register the new one"
    )


def incomplete(missing: Sequence[str], go_on: str) -> str:
    """Says that a backward pass is not complete.

    Args:
        missing: names of parameters that have no gradient; may be empty.
        go_on: Exchange.go_on.
    """
    which = f"got none of {names(missing)}" if missing else "got only some"
    return (
        f"DGCState: expected gradients of all parameters from the backward pass, {which}. DDP is still waiting for "
        "them. Wrap the model with DistributedDataParallel(..., find_unused_parameters=True), or freeze what is "
        f"never used, requires_grad_(False), before DDP wraps it. {go_on}"
    )


def broke_off(missing: Sequence[str], go_on: str) -> str:
    """Says that the last backward pass was not complete; arguments as for incomplete()."""
    which = f" without {names(missing)}" if missing else ""
    return (
        f"DGCState: expected the last backward pass to be complete, but it broke off{which}, and what it sent is in "
        f"neither the residual nor the model. {go_on}"
    )


def nothing_reduced(registered: bool) -> str:
    """Says that step() was called without an exchanged backward pass.

    Args:
        registered: whether a DDP module has the state.
    """
    if registered:
        return (
            "DGCState: expected a backward pass since the last step(), got none that was exchanged. If it ran under "
            "no_sync(), run the last one before step() outside of it, forward pass included. If it was discarded, "
            "leave step() out and call zero_grad(). If the module was unpickled, call state.register(model) again"
        )
    return (
        "DGCState: expected a backward pass since the last step(), got none, since no model has this state registered. "
        "Call state.register(model), with DDP's module, before the first backward pass, and again when the module was "
        f"wrapped, loaded or unpickled anew. All of it:\n{REGISTER}"
    )


def not_reduced(local: Sequence[str]) -> str:
    """Says that the optimizer would apply gradients of this rank alone.

    Args:
        local: names of the parameters of these gradients.
    """
    return (
        f"optimizer: expected gradients that were exchanged, got this rank's own of {names(local)}, which the backward "
        "pass did not hand to DGC. DDP does not reduce what was frozen when it wrapped the model, is outside of that "
        "model (a loss with weights of its own), is on its ignore list or delayed, or was added later. Wrap one module "
        "that holds all of them, trainable, and make optimizer and DGCState again; or give them an optimizer of their "
        "own and average their gradients yourself"
    )


def thrown_away(without: Sequence[str]) -> str:
    """Says that compressed parameters have lost their gradient between backward() and step()."""
    return (
        f"optimizer: expected the gradient of every compressed parameter, got None or zeros for {names(without)}. What "
        "was sent for it would be lost, and what it has accumulated would come later. To freeze parameters so, name "
        "them in DGCConfig(dense_parameters=...), which costs their bytes, or set DGCConfig(droppable=True), which "
        "drops this pass for them and costs memory and time. To leave out the whole step: "
        "state.discard(drop_gradient=...) and zero_grad(), in place of step()"
    )


def no_dense() -> str:
    """Says that a model whose memory the ranks of a node divide cannot be trained dense."""
    return (
        "DGCState.dense: expected False where the ranks of a node divide momentum and residual (mesh=, nodes=), since "
        "no rank has the momentum that a dense step needs. For a dense phase use a density of 1, "
        "state.set_density(1.0), which sends every entry with its index; or leave that out"
    )


def no_masks() -> str:
    """Says that weights cannot be masked where the ranks of a node divide memory."""
    return (
        "DGCState.mask: expected ranks that each keep momentum and residual of the whole model, or FSDP2's shards, got "
        "ranks of a node that divide them (mesh=, nodes=). Leave that out; state.forget() works there"
    )


def no_auto() -> str:
    """Says that dense steps cannot be tried where the ranks of a node divide memory."""
    return (
        'exchange: expected "bytes" where the ranks of a node divide momentum and residual (mesh=, nodes=), got '
        '"auto": no rank has the momentum that a dense step needs, so there is nothing to choose. Leave that out, or '
        "shard the model by fully_shard"
    )


def dense_in_16_bits(dtype: torch.dtype) -> str:
    """Says that dense gradients travel in float32 where nodes are the workers under DDP."""
    return (
        "DGCState: expected DGCConfig(dense_wire_dtype=torch.float32) where the ranks of a node divide momentum and "
        f"residual (mesh=, nodes=), got {dtype}: what rounding takes would be one rank's, and memory is the node's. "
        "Set float32, leave that out, or shard the model by fully_shard"
    )


def not_droppable() -> str:
    """Says that a pass can be dropped only with DGCConfig(droppable=True)."""
    return (
        "DGCState.discard: expected DGCConfig(droppable=True) with drop_gradient=True, got False: u and v as they were "
        "before the pass are not kept, since that costs 8 bytes a parameter and a copy at every pass. Make the state "
        "with it to drop passes; discard(drop_gradient=False) takes back what this pass sent, and keeps its gradient "
        "in u and v, for later steps"
    )


def kept() -> str:
    """Says what discard() does where drop_gradient is left out."""
    return (
        "dgc: state.discard() takes back what was sent, and keeps the gradient in momentum and residual: it arrives "
        "with later steps. Say which you want: discard(drop_gradient=False) is this; discard(drop_gradient=True), "
        "with DGCConfig(droppable=True), throws it away, for a loss spike or a gradient that is not this model's"
    )


def changed(which: Sequence[str]) -> str:
    """Says that gradients were changed between backward() and step()."""
    return (
        f"dgc: expected gradients as backward() left them, got others for {names(which)} in step(). Clipping, weight "
        "decay or noise there acts on the few entries that were sent, which are sums of many steps, and what it cuts "
        "is lost. Take it out (a Trainer's max_grad_norm or gradient_clip_val: set it to 0) and write instead: "
        "DGCConfig(clip_norm=...) to clip, weight_decay of dgc.SGD or dgc.AdamW to decay. A backward() after the "
        "exchanged one adds this rank's gradient alone: add the losses, and call backward() once. "
        'If the change is intended: DGCConfig(on_changed_gradient="ignore")'
    )


def replaced(which: Sequence[str]) -> str:
    """Says that the model has other parameters than the optimizer and its DGCState."""
    return (
        f"DGCState: expected the model to have the parameters that the optimizer holds, got others for {names(which)}, "
        "which have been replaced since: by load_state_dict(assign=True), an assignment, or a swap of weights. Nobody "
        "would train the new ones. state.rebind(model) goes on with them, with what was accumulated; or copy values "
        "into the old ones, load_state_dict() without assign"
    )


def wrapped(how: str) -> str:
    """Says that DDP exchanges the gradients of a module that was attached as a plain one."""
    return (
        f"attach: expected a module whose gradients nobody exchanges, or the DDP module itself, got one, and {how}: "
        "gradients would be averaged twice. Pass what DistributedDataParallel returned: "
        "dgc.attach(ddp_model, optimizer, config); or leave DDP out"
    )


def detached() -> str:
    """Says that a DGCState was used after detach()."""
    return (
        "DGCState: expected one that is attached, got one after detach(), which has given its memory away. Make "
        "another, optimizer = dgc.attach(model, optimizer, config), and give it what detach() returned: "
        "optimizer.dgc.load_state_dict(waiting)"
    )


def unsaved() -> str:
    """Says that the optimizer was saved, and what waits was not."""
    return (
        "dgc: optimizer.state_dict() was called, and what waits on each rank was not saved: a run that is resumed from "
        "there loses it. Save it too, between step() and the next backward(): dgc.checkpoint.save(state, dir) on all "
        "ranks; or, where rank 0 writes one file, state.full_state_dict(), called on all ranks"
    )


def residual_missing(steps: int) -> str:
    """Says that the optimizer continues a run, while its DGCState is new."""
    return (
        f"dgc: the optimizer has taken {steps} steps, and this DGCState none: if the run trained with DGC "
        "before, what it had not sent is gone, and warm-up begins again. Save and load the state too: "
        "dgc.checkpoint.save(state, dir) and dgc.checkpoint.load(state, dir) on all ranks; or, "
        "where rank 0 writes one file, state.full_state_dict() and state.load_state_dict(). If it was "
        "dense until now, all is well"
    )
