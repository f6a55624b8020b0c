"""What a framework looks for in the environment of a rank that torchrun has started."""

import os


def pretend(rank, world_size):
    """Sets the variables that torchrun sets; the process group is there already."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"})
