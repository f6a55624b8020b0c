"""A worker of examples/elastic_mnist.py that dies where a test says: mortal_worker.py FOLDER [options of the example].

FOLDER has kills.json, a list of [rank, step, place]: at the n-th start, which worker dies where: at the beginning of
"backward"'s exchange, at that of "save", or when it has "sent" or "saved". After the last kill nobody dies.
"""

import functools
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import dgc

folder = Path(sys.argv[1])
kills = json.loads((folder / "kills.json").read_text())
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
kill = kills[attempt] if attempt < len(kills) else None


def die_at(state, place):
    """Kills this process if it is its turn."""
    if [int(os.environ["RANK"]), state.step, place] == kill:
        os.kill(os.getpid(), signal.SIGKILL)


def deadly(function, before, after):
    """Returns the function, of a DGCState, in front of which or behind which this process may die."""

    @functools.wraps(function)
    def wrapper(state, *args):
        die_at(state, before)
        result = function(state, *args)
        die_at(state, after)
        return result

    return wrapper


if __name__ == "__main__":
    dgc.ddp.dgc_hook = deadly(dgc.ddp.dgc_hook, "backward", "sent")  # what register() registers
    dgc.checkpoint.save = deadly(dgc.checkpoint.save, "save", "saved")
    script = Path(__file__).parents[2] / "examples" / "elastic_mnist.py"
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
