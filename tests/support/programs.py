"""Runs a program as `python` or torchrun would, in processes forked from one that has imported what it needs.

A process that starts from nothing imports torch for some four seconds of CPU time, most of what a short run takes.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from support.ranks import fork_server

ROOT = Path(__file__).parents[2]


def _main(folder: str, environment: dict[str, str], program: str, *arguments: str) -> None:
    """Runs the program with its output in files, as the main module of this process."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with Path(folder, name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1, which torchrun sets, would have when torch was imported
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def run_program(
    program: str, *arguments: str, ranks: int | None = None, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Runs a script (a path that ends in .py) or a module, in the root of the repository.

    Args:
        program: the script or the module.
        arguments: of its command line.
        ranks: processes that get what torchrun sets for its workers, with its store here; None: one without it.
        timeout: seconds for all of them.

    Returns:
        The first return code that is not 0, and what the processes have written, one after the other.

    Raises:
        TimeoutError: a process was still running; it has been killed.
    """
    store = None if ranks is None else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(rank)) for rank in range(ranks or 1)]
        processes = []
        for rank, folder in enumerate(folders):
            folder.mkdir()
            environment = {}
            if store is not None:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                environment.update({key: str(number) for key, number in numbers.items()})
                environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
                environment.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="none")
            processes.append(fork_server().Process(target=_main, args=(str(folder), environment, program, *arguments)))
            processes[-1].start()
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            hung = [process for process in processes if process.is_alive()]
            for process in hung:
                process.kill()
                process.join()
        out, err = ("".join((folder / kind).read_text() for folder in folders) for kind in ("stdout", "stderr"))
    if hung:
        raise TimeoutError(f"{program}: still running after {timeout} s: {out[-3000:]}{err[-3000:]}")
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    return subprocess.CompletedProcess([program, *arguments], code, out, err)
