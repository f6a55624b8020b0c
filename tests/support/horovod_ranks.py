"""Horovod processes that call functions for the tests: started once by horovodrun, since a start takes seconds."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

process_set: Any = None
"""In a process of a Pool: its process set besides the global one."""


class Pool:
    """Processes of one `horovodrun -np N`, which wait for functions to call.

    Args:
        num_proc: N.
        process_set: ranks of a process set besides the global one.
        outlived: whether a shell outlives each process, so that horovodrun does not kill the others when one dies.
        timeout: seconds for each call.
    """

    def __init__(
        self, num_proc: int, process_set: Sequence[int] = (), outlived: bool = False, timeout: float = 120
    ) -> None:
        self.num_proc = num_proc
        self.timeout = timeout
        self.tasks = 0
        self.folder = Path(tempfile.mkdtemp())
        python = [sys.executable, __file__, str(self.folder), ",".join(map(str, process_set)), str(os.getpid())]
        if outlived:
            python = ["sh", "-c", '"$@"; until [ -e "$0" ]; do sleep 0.2; done', str(self.folder / "closed"), *python]
        scripts = Path(sys.executable).parent
        path = os.pathsep.join(sys.path)  # what is imported here can be imported there
        self.log = (self.folder / "log").open("w+")
        self.process = subprocess.Popen(
            [scripts / "horovodrun", "--gloo", "-np", str(num_proc), "-H", f"localhost:{num_proc}", *python],
            env={**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def send(self, body: Callable[..., Any], *args: Any) -> list[Path]:
        """Has every process call body(*args); returns the files of the results, by rank."""
        torch.save((body.__module__, body.__name__, args), self.folder / "writing")
        (self.folder / "writing").rename(self.folder / f"{self.tasks}.task")
        paths = [self.folder / f"{self.tasks}.{rank}" for rank in range(self.num_proc)]
        self.tasks += 1
        return paths

    def __call__(self, body: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls body(*args) in every process and returns the results by rank; an error is raised with its traceback."""
        return self.results(self.send(body, *args))

    def results(self, paths: Sequence[Path]) -> list[Any]:
        """Waits for files of send() and returns what the calls returned; an error is raised with its traceback."""
        deadline = time.monotonic() + self.timeout
        while not all(path.exists() for path in paths):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.log.seek(0)
                raise RuntimeError(f"the processes ended or hang:\n{self.log.read()[-4000:]}")
            time.sleep(0.02)
        results = [torch.load(path, weights_only=False) for path in paths]
        for path, (error, _) in zip(paths, results, strict=True):
            assert error is None, f"rank {path.suffix[1:]}: {error}"
        return [value for _, value in results]

    def close(self) -> None:
        """Ends the processes."""
        (self.folder / f"{self.tasks}.task").touch()
        (self.folder / "closed").touch()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # horovodrun passes it on
            self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder)


def _serve(folder: Path, ranks: Sequence[int]) -> None:
    import horovod.torch as hvd

    from support import horovod_ranks  # this file is __main__ here, but not for the functions' modules

    torch.set_num_threads(1)
    horovod_ranks.process_set = hvd.ProcessSet(list(ranks)) if ranks else hvd.global_process_set
    hvd.init(process_sets=[horovod_ranks.process_set] if ranks else [])
    task = 0
    while True:
        path = folder / f"{task}.task"
        while not path.exists():
            time.sleep(0.02)
        if path.stat().st_size == 0:
            return
        module, name, args = torch.load(path, weights_only=False)
        try:
            result = None, getattr(importlib.import_module(module), name)(*args)
        except Exception:
            result = traceback.format_exc(), None
        mine = folder / f"{task}.{hvd.rank()}"
        torch.save(result, mine.with_suffix(f".writing{hvd.rank()}"))
        mine.with_suffix(f".writing{hvd.rank()}").rename(mine)
        task += 1


def _end_with(pid: int) -> None:
    """Ends this process when the tests are gone, even while it hangs in a collective."""
    while Path(f"/proc/{pid}").exists():
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv[3]),), daemon=True).start()
    _serve(Path(sys.argv[1]), [int(rank) for rank in sys.argv[2].split(",") if rank])
