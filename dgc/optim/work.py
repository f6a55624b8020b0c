"""Work: what a rule does its accumulation on, the compressed parameters of one bucket in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgc import ops
from dgc.ops import Accumulation, Segments


class Work(NamedTuple):
    """The input and output of Rule.compress(): the compressed parameters of one bucket."""

    gradients: list[Tensor]
    """The tensors that `source` and `offset` of `receiving` refer to. They are overwritten; see dgc.ops.compress_."""
    receiving: Segments
    """The segment table of the gradients."""
    updates: list[Tensor]
    """With `fused`, the gradients. Without, one float32 tensor that receives the rule's updates of v."""
    sending: Segments
    """The segment table of the updates; with `fused`, that of the gradients."""
    kinds: Mapping[str, Tensor]
    """The rule's tensors, flat float32, by kind."""
    residual: Tensor
    """v, flat float32."""
    numbers: Tensor
    """float32 [rows, parameters], as dgc.ops.compress_ takes them: the decay of v, then Rule.factors."""
    factors: Sequence[tuple[float, ...]]
    """Rule.factors of each parameter, on the host."""
    scale: Tensor
    """float32 [1]: the factor by which gradients are multiplied first."""
    selection: Tensor
    """uint8: receives the selected entries."""
    dtype: torch.dtype
    """Type of the values in the selection."""
    workspace: Tensor
    """From dgc.ops.workspace, for `sending`."""
    sent: Mapping[str, Tensor]
    """Tensors by kind, float32 [entries], that receive the rule's values at sent entries before these values become 0.
    Empty where nothing is masked."""

    def compress(self, rule: Accumulation, *kinds: str) -> None:
        """Accumulates by a rule that an op knows, selects and packs, all in one pass; see dgc.ops.compress_.

        Args:
            rule: the op's.
            kinds: of the tensors that it keeps, in its order.
        """
        ops.compress_(
            gradients=self.gradients,
            rule=rule,
            kept=[self.kinds[kind] for kind in kinds],
            residual=self.residual,
            segments=self.receiving.table,
            numbers=self.numbers[: rule.rows],
            scale=self.scale,
            payload=self.selection,
            workspace=self.workspace,
            sent=self.sent.get(kinds[0]) if kinds else None,
            wire_dtype=self.dtype,
        )
