"""benchmarks/accuracy/local_steps.py: islands in threads against training by hand, bytes by hand, and its tables."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import dgc
from benchmarks.accuracy import data, local_steps, replicas, runs, tasks
from benchmarks.accuracy.local_steps import DENSE, Local, Method

N = replicas.WORKERS


def regression():
    """Samples of three classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 40, generator=generator)
    targets = (inputs[:, :3] + 0.3 * torch.randn(300, 3, generator=generator)).argmax(1)
    return data.Data(inputs[:200], targets[:200], inputs[200:], targets[200:])


TASK = tasks.Task(
    "test",
    "accuracy",
    regression,
    lambda: nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 3)),
    lr=0.1,
    clip_norm=0.5,
    optimizer="SGD",
    momentum=0.0,
)


def trained(make, steps=12):
    """Returns the trainer, after a run."""
    kept = []

    def keep(network, task):
        kept.append(make(network, task))
        return kept[0]

    replicas.train(TASK, keep, 1, steps)
    return kept[0]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.network.parameters()])


def test_a_round_at_every_step_that_sends_all_is_the_mean_of_clipped_gradients(one_thread):
    method = Method(1, False, dgc.DGCConfig(density=1.0))
    found = weights(trained(lambda network, task: Local(network, task, method, 12)))

    torch.manual_seed(1)
    network = TASK.network()
    schedule = [0.1 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)]
    for lr, batches in zip(schedule, replicas.batches_of(TASK, 1, 12), strict=True):
        means = [torch.zeros_like(p) for p in network.parameters()]
        for inputs, targets in batches:
            network.zero_grad()
            tasks.loss_of(network(inputs), targets).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            for mean, p in zip(means, network.parameters(), strict=True):
                mean += p.grad / N
        with torch.no_grad():
            for mean, p in zip(means, network.parameters(), strict=True):
                p -= lr * mean
    expected = torch.cat([p.detach().flatten() for p in network.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["H = 5, DiLoCo", "H = 5, 1 %"])
def test_islands_in_threads_give_the_same_bits_again_and_are_equal_at_the_end(name, one_thread):
    method = replace(Method.of(name, 12), config=replace(Method.of(name, 12).config, dense_below=1000))
    first, second = (trained(lambda network, task: Local(network, task, method, 12)) for _ in range(2))
    first.check()
    assert torch.equal(weights(first), weights(second))
    assert first.islands[0].rounds == 3  # two, and the steps that were left
    assert (first.islands[0].state.stats.sent_density > 0) == (name != "H = 5, DiLoCo")


def test_a_name_says_what_is_run():
    assert len(local_steps.methods(local_steps.EVERY)) == 13 + 3
    sparse, dense = Method.of("H = 15, 3 %", 1500), Method.of("H = 50, DiLoCo", 1500)
    warm = Method.of("H = 15, 3 %, no decay, warm-up", 1500)
    assert (warm.diloco, warm.config.density, warm.config.residual_decay) == (False, 0.03, 1.0)
    assert (warm.config.warmup_steps, warm.config.warmup_densities) == (25, (0.25, 0.0625))
    assert (sparse.every, sparse.diloco, sparse.config.density, sparse.config.residual_decay) == (15, False, 0.03, 0.95)
    assert (dense.every, dense.diloco, dense.config.density, dense.config.residual_decay) == (50, True, 1.0, 1.0)


def test_bytes_are_those_of_a_round_divided_by_its_steps():
    assert local_steps.share(TASK, DENSE, 100) == 1
    assert local_steps.share(TASK, "H = 50, DiLoCo", 100) == 1 / 50
    # 12,000 of 13,203 elements are compressed: 360 entries of a byte and 7.04 bits of an index.
    sent = local_steps.share(TASK, "H = 5, 3 %", 100) * 5 * 2 * (N - 1) / N * 4 * 13_203
    dense = 2 * (N - 1) / N * 4 * 1_203
    assert (N - 1) * (360 + 317) + dense < sent < (N - 1) * (360 + 317 + 120) + dense


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_table_compares_with_synchronous_training_and_with_diloco(seeds):
    records = []
    for seed in range(seeds):
        for place, method in enumerate(local_steps.methods(local_steps.EVERY)):
            run = runs.Run("gpt-adamw", method, seed, 10, "")
            records.append(runs.Record(run, [(10, 100.0 + place + 0.01 * seed)], 1.0, "abc"))
    table = {row[0]: row[1:] for row in local_steps.rows_of(records, "gpt-adamw", local_steps.EVERY, range(seeds))}
    assert table[DENSE][2:] == ["", "", "", "100.0 %"]
    mean, _, synchronous, diloco, within, sent = table["H = 1, 3 %"]
    assert mean == f"{102 + 0.005 * (seeds - 1):.2f}"
    assert synchronous.startswith("+2.00 %")
    assert diloco.startswith("+0.99 %")
    assert within == ("yes" if seeds == 3 else "")
    assert sent.endswith(" %")
    assert table["H = 1, 1 %"][4] == ("no" if seeds == 3 else "")
