"""The door for DistributedDataParallel: a communication hook.

No `from __future__ import annotations` here: DDP compares the hook's annotations with the types themselves.
"""

from itertools import accumulate

import torch
import torch.distributed as dist

from .bucket import Gradients
from .state import DGCState


def dgc_hook(
    state: DGCState,
    bucket: dist.GradBucket,
) -> torch.futures.Future[torch.Tensor]:
    """Reduces one DDP bucket: `model.register_comm_hook(state, dgc.dgc_hook)`.

    Args:
        state: made of this model's named_parameters().
        bucket: from DDP; its buffer receives the result.

    Returns:
        A future of the buffer.

    Raises:
        ValueError: the bucket holds a parameter that the state does not know.
        RuntimeError: a second backward pass before optimizer.step() has taken the first one's gradients.
    """
    buffer = bucket.buffer()
    if buffer.layout != torch.strided:
        raise ValueError(
            "dgc_hook: expected dense gradients, got a sparse one (nn.Embedding(sparse=True)?): use sparse=False"
        )
    parameters = bucket.parameters()
    # DDP packs a bucket without gaps.
    starts = accumulate((p.numel() for p in parameters), initial=0)
    places = [(0, start) for start, _ in zip(starts, parameters, strict=False)]
    # A rank that has left DDP's join() context early is asked for zero gradients, outside any backward pass. It keeps
    # sending its residual; no step() follows there.
    shadow = torch._C._current_graph_task_id() == -1
    gradients = Gradients(parameters, [buffer], places)
    return state.reduce(gradients, first=bucket.index() == 0, last=bucket.is_last(), shadow=shadow)
