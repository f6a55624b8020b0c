"""What the fork server of ranks.py has imported when it forks a rank: what tests import, and what torch imports late.

It makes no tensor and asks for no GPU: a rank has to be able to start both its threads and CUDA by itself.
"""

import gc
from contextlib import suppress

import numpy  # noqa: F401
import pytest  # noqa: F401
import torch
import torch._dynamo  # DDP imports it when it is made
import torch.distributed.checkpoint
import torch.distributed.checkpoint.state_dict
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401

import dgc
import dgc.checkpoint  # noqa: F401
from support import alone, ddp_run, fsdp_run, messages, node_run, one_rank, programs, shares, training  # noqa: F401

with suppress(ImportError):  # which is not everywhere, and then its tests are skipped
    import horovod.torch  # noqa: F401

# A collection in a rank would write into the header of every object, and so copy all of this memory.
gc.collect()
gc.freeze()
