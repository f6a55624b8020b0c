"""dgc.attach under real Ray Train: the bits of the same loop on two gloo ranks, also from a checkpoint on."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.ranks import run_ranks

pytest.importorskip("ray.train.torch", reason="NOT TESTED: Ray Train, since it is not installed: '.[ray]'")

ROOT = Path(__file__).parents[2]
EPOCHS = 3


def example():
    spec = importlib.util.spec_from_file_location("ray_mlp", ROOT / "examples" / "ray_mlp.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ray_mlp"] = module  # where cloudpickle looks
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cluster():
    import ray

    os.environ.update(RAY_TRAIN_V2_ENABLED="1", RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # on a busy machine
    paths = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"}}
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


def fit(folder, epochs):
    """Returns the last checkpoint, and the metrics with it."""
    import ray.cloudpickle
    import ray.train
    from ray.train.torch import TorchTrainer

    module = example()
    ray.cloudpickle.register_pickle_by_value(module)
    result = TorchTrainer(
        module.train,
        train_loop_config={"seed": 0, "dense": False, "epochs": epochs},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(name="run", storage_path=str(folder)),
    ).fit()
    with result.checkpoint.as_directory() as saved:
        return torch.load(Path(saved, "run.pt"), weights_only=True), result.metrics


def by_hand(rank, world_size):
    """The loop of the example, without Ray."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 512),
        torch.nn.ReLU(),
        torch.nn.Linear(512, 512),
        torch.nn.ReLU(),
        torch.nn.Linear(512, 10),
    )
    model = DistributedDataParallel(net)
    optimizer = dgc.SGD(model.parameters(), lr=0.05, momentum=0.9)
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=0.01, warmup_steps=30))
    state.register(model)
    x = torch.randn(8192, 64)
    y = (x @ torch.randn(64, 10)).argmax(1)
    for epoch in range(1, EPOCHS + 1):
        order = torch.randperm(4096, generator=torch.Generator().manual_seed(epoch))
        for batch in order[rank::world_size].split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return {"model": net.state_dict(), "dgc": state.full_state_dict(), "bytes": state.stats.bytes_sent}


def assert_same(one, other):
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    for share, theirs in zip(one["dgc"]["ranks"].values(), other["dgc"]["ranks"].values(), strict=True):
        for kind in ("residual", "momentum"):
            for name, tensor in share[kind].items():
                assert torch.equal(tensor, theirs[kind][name]), (kind, name)


@pytest.mark.timeout(900)  # Ray starts a dozen processes, each of which imports torch
def test_two_workers_that_go_on_from_a_checkpoint_have_the_bits_of_two_ranks_that_went_on(cluster, tmp_path):
    _, first = fit(tmp_path, 1)
    resumed, last = fit(tmp_path, EPOCHS)
    expected = run_ranks(2, by_hand)[0]
    assert_same(resumed, expected)
    assert last["bytes a step"] == expected["bytes"]
    assert last["test loss"] < first["test loss"]
