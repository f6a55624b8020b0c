"""The package without its native library, Horovod or numpy: one loud warning and the same results, or an error."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import dgc

SCRIPT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dgc
    import dgc.ddp
assert [w.category for w in caught if "native library" in str(w.message)] == [RuntimeWarning], caught
assert dgc.backend("cpu") == "reference"

from support.alone import Alone
from support.models import normals
shapes = {"w": (300, 300), "b": (10,)}
one = Alone(shapes, dgc.DGCConfig(density=0.01), lr=0.1, momentum=0.9)
for step in range(5):
    one.train(normals(shapes, step))
print(repr(float(one.parameter("w").double().sum())), repr(float(one.state.memory.residual.double().sum())))
"""


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=environment, cwd=folder, capture_output=True, text=True)


def test_plain_pytorch_takes_over_with_one_warning(tmp_path):
    shutil.copytree(Path(dgc.__file__).parent, tmp_path / "dgc", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr
    from support.alone import Alone
    from support.models import normals

    shapes = {"w": (300, 300), "b": (10,)}
    one = Alone(shapes, dgc.DGCConfig(density=0.01), lr=0.1, momentum=0.9)
    for step in range(5):
        one.train(normals(shapes, step))
    w, residual = map(float, result.stdout.split())
    assert float(one.parameter("w").double().sum()) == w
    assert float(one.state.memory.residual.double().sum()) == residual


def test_without_horovod_its_door_says_what_installs_it():
    script = "import sys, dgc; sys.modules['horovod'] = None; import dgc.horovod"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    assert "ImportError: dgc.horovod: expected Horovod with support for this torch" in result.stderr
    assert "launch/install_horovod.sh" in result.stderr


def test_ranks_compare_themselves_without_numpy():
    script = """
import sys
sys.modules["numpy"] = None
import dgc, torch.distributed as dist
from dgc.exchange.distributed import everyone_of
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
assert [everyone_of(None, text) for text in ("", "größer", "x" * 300)] == [[""], ["größer"], ["x" * 300]]
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_dgc_imports_no_framework():
    names = {"accelerate", "horovod", "lightning", "pytorch_lightning", "transformers"}
    script = f"import sys, dgc, dgc.checkpoint; print(sorted({names} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
