"""LocalSteps: islands that take H steps each by themselves, and then exchange how far they have come, sparsely.

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    local = dgc.LocalSteps(model, optimizer, every=15)
    for x, y in loader:              # the loop does not change
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    local.finish()

An outer optimizer of dgc moves a second set of weights, theta_0, equal on all islands. Its gradient is the difference
theta_0 - theta, and a DGCState reduces it as it reduces any gradient. docs/local_steps.md has equations and sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer

from .config import DGCConfig
from .exchange.base import Exchange
from .local import local
from .memory.names import by_name
from .memory.refusals import unwrapped
from .optim.sgd import SGD
from .rounds import checks, saved
from .rounds.rounds import Rounds
from .state import DGCState
from .step import log

Outer = Callable[[list[nn.Parameter]], Optimizer]
"""Makes the outer optimizer of theta_0."""

AVERAGING: Outer = partial(SGD, lr=1.0)
"""theta_0 moves by the mean of what islands have sent: SparseLoCo."""
SPARSELOCO = DGCConfig(density=0.03, residual_decay=0.95, wire_dtype="8bit")
"""The configuration of LocalSteps where none is given."""


class LocalSteps(Rounds):
    """Exchanges the weights' way of H local steps by Deep Gradient Compression; the inner optimizer stays as it is.

    After every H-th step() of the inner optimizer, for each island r and each compressed parameter:

        e_r <- residual_decay * e_r + (theta_0 - theta_r);  q_r = the k largest entries of e_r;  e_r <- e_r - q_r
        theta_0 <- outer(theta_0, mean of all q_r);  theta_r <- theta_0

    Of other parameters the whole difference is averaged. Buffers, as BatchNorm's, stay each island's own. The weights
    of all islands are compared when this is made, which is a collective. Memory: 8 bytes a parameter for theta_0 and e.

    Args:
        model: a plain module; one in DistributedDataParallel whose process group is the island; or one that fully_shard
            has sharded inside the island.
        inner_optimizer: torch's or any other, that holds all trainable parameters of the model. A hook counts its
            steps, so one that GradScaler leaves out is no step.
        config: of the outer exchange. A step of it is a round, in warmup_steps too. None for SPARSELOCO: 3 %, 8 bits a
            value, residual decay 0.95.
        every: H, steps between two rounds; the same on all islands.
        delay: steps for which a round travels while the next steps run, below H. Then weights become theta_0 plus what
            they have moved since. 0: a round is waited for.
        outer: makes the outer optimizer. Plain averaging (default) is partial(dgc.SGD, lr=1.0); DiLoCo's Nesterov
            momentum on the mean is dgc.OuterSGD; dgc.SGD with momentum corrects and masks it on each island (paper,
            section 3).
        process_group: the ranks that exchange: one of each island. None: all ranks, each an island.
        mesh: as DGCState's: islands of several ranks, which divide e and the outer exchange among themselves.
        exchange: as DGCState's.

    Raises:
        ValueError: weights differ between islands, or every does; a DGC hook is on the model; DDP averages over ranks
            that are to be islands; or the inner optimizer has other parameters than the model.
        TypeError: the inner optimizer is dgc's, or none; or outer is an optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_optimizer: Optimizer,
        config: DGCConfig | None = None,
        *,
        every: int,
        delay: int = 0,
        outer: Outer = AVERAGING,
        process_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | Literal["auto"] | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """Checks the arguments, copies the weights and compares them with all islands'; see the class."""
        if exchange is None:
            log.log_alone()
        config = config or SPARSELOCO
        inner = unwrapped(inner_optimizer)
        checks.check_arguments(model, inner, config, every, delay)
        weights = by_name(model.named_parameters())
        checks.check_optimizer(inner, weights)
        # In float32, since a round may move a weight by less than a 16-bit type can say.
        start = {name: nn.Parameter(p.detach().to(torch.float32, copy=True)) for name, p in weights.items()}
        if not callable(outer):
            raise TypeError(
                f"outer: expected a function that makes the outer optimizer, as partial(dgc.SGD, lr=1.0), got "
                f"{type(outer).__name__}"
            )
        outer_optimizer = outer([*start.values()])
        # A round has time to wait for the verdict, and weights go back at once where it is bad: not late.
        state = DGCState(
            start.items(),
            outer_optimizer,
            config,
            process_group=process_group,
            mesh=mesh,
            exchange=exchange,
            late=False,
        )
        checks.check_islands(model, state.exchange)
        state.exchange_in_step()
        state.exchange.agree({"every": int(every), "delay": int(delay)})
        super().__init__(model, inner, weights, start, outer_optimizer, state, int(every), int(delay))
        self._hook = inner.register_step_post_hook(self._stepped)

    def __repr__(self) -> str:
        """Says where the run stands."""
        return f"LocalSteps(every {self.every}, round {self.rounds}, step {self.position} of it, {self.state})"

    def remove(self) -> None:
        """Removes the hook from the inner optimizer, which then takes its steps alone."""
        self._hook.remove()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Returns this island's theta_0, e, outer optimizer and place in the round; each island saves its own.

        Where the weights have left theta_0 it has them too. Tensors are views, not copies. Save the inner
        optimizer and buffers beside it, of each island, since they differ. torch.load(weights_only=True) reads it back.

        Raises:
            RuntimeError: a round is under way, as for `delay` steps after it was sent.
        """
        self._check_between("state_dict")
        return {
            "version": saved.VERSION,
            "every": self.every,
            "rounds": self.rounds,
            "position": self.position,
            "start": {name: local(p.detach()) for name, p in self._start.items()},
            "weights": {name: local(p.detach()) for name, p in self._weights.items()} if self.moved else {},
            "outer": self.outer.state_dict(),
            "dgc": self.state.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(
        self, state_dict: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, allow_missing_ranks: bool = False
    ) -> None:
        """Continues from a saved state_dict(), and sets the model's weights; changes nothing unless all of it fits.

        Args:
            state_dict: this island's; or those of all islands, for any number of islands. Then this one takes over its
                part of e and of a round that had begun, so that the mean over the islands stays the same
                (docs/reliability.md).
            allow_missing_ranks: whether what missing islands have not sent counts as zero, which is logged.

        Raises:
            ValueError: it is of another model or version, islands are missing, or values are damaged.
            RuntimeError: a round is under way.
        """
        self._check_between("load_state_dict")
        several = [state_dict] if isinstance(state_dict, Mapping) else list(state_dict)
        found = saved.read(several, self._start, self.every)
        choice = self.state.choose(found.shares, allow_missing_ranks)
        self.outer.load_state_dict(found.outer)
        self.state.take_up(choice)
        topology = self.state.exchange.topology
        self.rounds, self.position = found.rounds, found.position_of(topology.share, topology.shares)
        for name, start in self._start.items():
            local(start).copy_(found.start[name])
            local(self._weights[name]).copy_(found.weights_of(name, topology.share, topology.shares))
        self._compare_weights = True

    def _check_between(self, method: str) -> None:
        if self.under_way:
            raise RuntimeError(
                f"LocalSteps.{method}: expected no round under way, got one that arrives {self.delay} steps after it "
                "was sent: call it where local.under_way is False, on all islands at the same step"
            )
