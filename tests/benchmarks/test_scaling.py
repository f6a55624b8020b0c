"""The cost model of benchmarks/cluster/ against numbers worked out by hand, and its calibration against itself."""

import json
import math
import re
import sys
from dataclasses import astuple, replace

import pytest
import torch
import torch.distributed as dist

import dgc
from benchmarks.cluster import islands, scaling
from benchmarks.cluster.calibration import Constants, Measured, calibrate, points
from benchmarks.cluster.projection import WORKLOADS, Assumptions, Projected, losses, project
from dgc.cli.cost import Cluster, Link, all_gather, all_reduce, communication, step_time
from dgc.cli.shapes import NETWORKS
from dgc.cli.traffic import Traffic, ddp_buckets, dense_traffic, dgc_traffic, node_traffic
from support.programs import run_program

FLAT = Cluster(workers=4, per_node=1, network=Link(100.0, 0.5), inside=Link(math.inf, 0.0))
NODES = Cluster(workers=32, per_node=8, network=Link(100.0, 0.5), inside=Link(1000.0, 0.01))
ONE_NODE = replace(NODES, workers=8)


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (FLAT, 3 * 200 / 100 + 3 * 0.5),
        (NODES, 31 * 200 / 100 + 3 * 0.5 + 28 * 0.01),  # 31 payloads pass each node's link; 3 of 31 hops are slow
        (ONE_NODE, 7 * 200 / 1000 + 7 * 0.01),
    ],
)
def test_all_gather(cluster, expected):
    assert all_gather(200, cluster) == pytest.approx(expected)
    assert all_gather(0, cluster) == 0


@pytest.mark.parametrize(
    ("nbytes", "cluster", "trees", "expected"),
    [
        (200, FLAT, False, 2 * 3 / 4 * 2 + 6 * 0.5),
        (200, FLAT, True, 2 * 3 / 4 * 2 + 6 * 0.5),  # 6.0 s, and the tree 2 * 2 + 4 * 0.5, the same
        (20, FLAT, True, 2 * 0.2 + 4 * 0.5),  # the tree waits less often
        (400, FLAT, True, 2 * 3 / 4 * 4 + 6 * 0.5),  # the ring carries less
        (400, NODES, True, 2 * 7 / 8 * 0.4 + 14 * 0.01 + 2 * 3 / 4 * 4 + 6 * 0.5),
        (400, ONE_NODE, True, 2 * 7 / 8 * 0.4 + 14 * 0.01),
        (0, NODES, True, 0),
    ],
)
def test_all_reduce(nbytes, cluster, trees, expected):
    assert all_reduce(nbytes, cluster, trees) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seconds", "hidden", "expected"),
    [
        ([3, 2, 1], 4.0, 10 + 0.5 + 2),  # 6 s, of which 4 are hidden
        ([3, 2, 1], 8.0, 10 + 0.5 + 1),  # the last bucket is never hidden
        ([3, 2, 1], 0.0, 10 + 0.5 + 6),
    ],
)
def test_backward_hides_all_but_the_last_bucket(seconds, hidden, expected):
    assert step_time(10, 0.5, seconds, hidden) == expected


@pytest.mark.parametrize("name", ["ResNet-50", "VGG-16", "BERT-large"])
def test_buckets_are_ddps(name):
    shapes = list(reversed(NETWORKS[name]().items()))
    tensors = [torch.empty(shape, device="meta") for _, shape in shapes]
    indices, _ = dist._compute_bucket_assignment_by_size(tensors, [2**20, 25 * 2**20])
    assert [list(bucket) for bucket in ddp_buckets(NETWORKS[name]())] == [
        [shapes[i][0] for i in bucket] for bucket in indices
    ]


def test_traffic_is_what_the_package_sends():
    buckets = [{"bias": (7,), "small": (10, 10)}, {"matrix": (300, 400)}]
    assert dense_traffic(buckets, 2) == [Traffic(0, 214, 0, 0), Traffic(0, 240_000, 0, 0)]
    # 120 entries: header 32, used 16, 120 + 119,999 / 512 upper bits, 120 * 9 low ones, in whole words, values 480.
    assert dgc_traffic(buckets, 8, dgc.DGCConfig()) == [
        Traffic(0, 428, 0, 0),
        Traffic(32 + 16 + 48 + 144 + 480, 0, 120_000, 120),
    ]
    # From 8 / (0.001 * 5.494) = 1,456.1 workers on the package itself sends dense.
    assert dgc_traffic(buckets, 1456, dgc.DGCConfig())[1].compressed == 120_000
    assert dgc_traffic(buckets, 1457, dgc.DGCConfig())[1] == Traffic(0, 480_000, 0, 0)
    flat = communication([Traffic(200, 200, 1, 1)], FLAT, trees=False)
    assert flat == [pytest.approx(7.5 + 6.0)]


TRUE = Constants(share=0.8, latency=2e-4, hidden=0.4, ddp=0.7e-9, ddp_fp16=2.5e-9, dgc=1.3e-9, unpack=6e-9)
SHAPES = {
    "wide": {f"{i}.weight": (2048, 2048) for i in range(4)},
    "deep": {
        f"{i}.{kind}": (512, 512) if kind == "weight" else (512,) for i in range(40) for kind in ("weight", "bias")
    },
    "large": {"embedding": (20_000, 1024), "matrix": (4096, 1024), "bias": (4096,)},
}


def made_up():
    """Returns runs as the model itself has them with TRUE."""
    found = []
    for model, compute in (("wide", 0.05), ("deep", 0.4), ("large", 0.02)):
        for rate in (1e10, 1e9, 1e8):
            for ranks in (2, 4):
                setting = [Measured(model, rate, ranks, name, compute * ranks, 0) for name in ("no_sync", "topk")]
                blank = [Measured(model, rate, ranks, name, 1.0, 0) for name in ("ddp", "ddp fp16", "dgc")]
                runs = points([*setting, *blank], SHAPES)
                found += [*setting, *(replace(run.measured, seconds=run.predict(TRUE)) for run in runs)]
    return found


def test_calibration_recovers_the_constants():
    runs = points(made_up(), SHAPES)
    assert len(runs) == 3 * 3 * 2 * 3  # what the model does not know is left out
    assert astuple(calibrate(runs)) == pytest.approx(astuple(TRUE), rel=0.01)


def test_a_measured_step_by_hand():
    # 2 ranks at 8 Gb/s, of which 80 % are reached: 8e8 bytes a second.
    runs = points([Measured("large", 8e9, 2, name, 0.1, 0) for name in ("no_sync", "ddp", "dgc")], SHAPES)
    elements = 20_000 * 1024 + 4096 * 1024 + 4096
    seconds = [4 * (4096 * 1024 + 4096) / 8e8 + 2 * 2e-4, 4 * 20_000 * 1024 / 8e8 + 2 * 2e-4]
    exposed = max(seconds[1], sum(seconds) - 0.04)
    assert runs[0].predict(TRUE) == pytest.approx(0.1 + 0.7e-9 * elements + exposed)
    assert runs[0].bytes_sent == 4 * elements
    k = 20_480 + 4195
    # The embedding's payload: head, 20,480 + 39,999 upper bits, 9 low bits and 32 of value each.
    payload = 48 + (20_480 + 39_999) / 8 + 20_480 * (9 + 32) / 8
    assert runs[1].predict(TRUE) == pytest.approx(
        0.1 + 1.3e-9 * (elements - 4096) + 6e-9 * 2 * k + payload / 8e8 + 2e-4, rel=1e-5
    )


def test_a_setting_without_compute_time_is_refused():
    with pytest.raises(ValueError, match="no_sync"):
        points([Measured("wide", 1e9, 2, "dgc", 1.0, 0)], SHAPES)
    with pytest.raises(ValueError, match="at least 7 runs"):
        calibrate([])


def test_a_projection_by_hand():
    resnet = WORKLOADS[0]
    at = {(p.workers, p.per_node, p.gbits): p for p in project(resnet, 1.0, (8, 64, 2048))}
    # 64 nodes of one, 1 Gb/s: 102 MB pass a link nearly twice; the backward pass, 142 ms, hides little.
    slow = at[64, 1, 1]
    gradient = 4 * 25_557_032 / 125e6
    assert slow.fp32 == pytest.approx(256 / 1200 * (1 - 2 / 3) + 2 * 63 / 64 * gradient, rel=0.02)
    assert slow.fp16 == pytest.approx(256 / 1200 * (1 - 2 / 3) + 2 * 63 / 64 * gradient / 2, rel=0.02)
    assert slow.speedup == slow.fp16 / slow.dgc > 3.9
    # 25 bytes for each of the compressed parameters, at 80 % of 900 GB/s.
    free = project(resnet, 1.0, (64,), Assumptions(compress_bytes=0))
    cost = 25 * 25_489_408 / 720e9
    assert [a.dgc - b.dgc for a, b in zip(project(resnet, 1.0, (64,)), free, strict=True)] == [pytest.approx(cost)] * 8
    # The 16-bit hook's casts, 12 bytes a parameter; and 5.494 bytes for each entry that one of 8 workers receives.
    uncast = project(resnet, 1.0, (8,), Assumptions(cast_bytes=0))[0]
    assert at[8, 8, 1].fp16 - uncast.fp16 == pytest.approx(12 * 25_557_032 / 720e9)
    only_entries = project(replace(resnet, seconds=1.0), 1.0, (8,), Assumptions(0, 0, 0.8, 1.0, 0))[0]
    last = dgc_traffic(ddp_buckets(NETWORKS["ResNet-50"]()), 8, dgc.DGCConfig())[-1]
    exposed = 7 * last.payload / 120e9 + 2 * 7 / 8 * last.dense / 120e9
    assert only_entries.dgc - 1 - exposed == pytest.approx(5.494 * 8 * 25_513 / 720e9, rel=1e-3)
    # With more than 1,456 workers DGC sends float32 dense: as plain DDP, half as fast as 16 bits at best.
    assert at[2048, 8, 1].all_dense
    assert at[2048, 8, 1].dgc == at[2048, 8, 1].fp32
    # Within a node there is nothing to win, and the rate of the network does not matter.
    assert at[8, 8, 1].speedup == at[8, 8, 100].speedup < 1


def test_what_nodes_as_workers_carry_by_hand():
    buckets = [{"bias": (7,), "small": (10, 10)}, {"matrix": (300, 400)}, {"wide": (4, 20_000)}]
    first, matrix, wide = node_traffic(buckets, 8, dgc.DGCConfig())
    assert first == Traffic(0, 428, 0, 0)
    # 38 rows for each of 7 ranks and 34 for the last: 15,200 elements and 16 entries, 13,600 and 14.
    # Header 32, used 16, upper bits 16, 9 low bits an entry to the next 16 bytes, values of 4.
    assert matrix == Traffic(7 * (48 + 16 + 32 + 64) + 48 + 16 + 16 + 64, 0, 120_000, 7 * 16 + 14)
    # A row of 20,000 for each of 4 ranks, and none for the others: 20 entries, 180 low bits.
    assert wide == Traffic(4 * (48 + 16 + 32 + 80), 0, 80_000, 80)

    sent = islands.Exchanges([Traffic(0, 400, 0, 0)], [Traffic(50, 40, 100, 5)], [Traffic(80, 40, 100, 8)])
    # 4 nodes of 8. A ring carries 2 * 3 / 4 of what is dense; 31 payloads of ranks, or 3 of nodes.
    assert sent.link_bytes(NODES) == pytest.approx((600, 31 * 50 + 60, 3 * 80 + 60))
    dense = 2 * 7 / 8 * 40 / 1000 + 14 * 0.01 + min(2 * 3 / 4 * 40 / 100 + 6 * 0.5, 2 * 40 / 100 + 4 * 0.5)
    inside = 7 / 8 * (4 * 100 + 4 * 80) / 1000 + 14 * 0.01
    assert islands.island_communication(sent.islands, NODES) == [pytest.approx(dense + inside + 3 * (0.8 + 0.5))]
    assert sent.seconds(NODES)[2] == pytest.approx(dense + inside + 3 * 1.3)


def test_from_how_many_nodes_dense_is_faster_by_hand():
    network, inside = Link(100.0, 0.0), Link(math.inf, 0.0)
    dense, ours = [Traffic(0, 1000, 0, 0)], [Traffic(42, 0, 4, 4)]
    # n - 1 payloads of 42 bytes are more than 2 (n - 1) / n times 1,000 bytes where n > 2,000 / 42 = 47.6.
    assert islands.dense_from(dense, ours, network, inside) == 48
    assert islands.dense_from([Traffic(0, 10**6, 0, 0)], ours, network, inside) is None
    # With latency a tree waits less often: 20 + 2 * 5 s, which 21 * 1.42 s are less than, and 22 * 1.42 s more.
    assert islands.dense_from(dense, ours, replace(network, latency=1.0), inside) == 23


def test_latency_slows_a_flat_ring_down():
    slow, fast = (project(WORKLOADS[0], 1.0, (512,), Assumptions(latency=latency)) for latency in (1e-3, 0.0))
    assert all(a.dgc > b.dgc for a, b in zip(slow, fast, strict=True))


def test_losses_are_said_in_words():
    won = Projected("A", 8, 64, 1, 4.0, 3.0, 2.0, False)
    lost = replace(won, gbits=100, dgc=4.0)
    assert won.speedup == 1.5
    settings = [
        won,
        lost,
        replace(lost, workers=4096, all_dense=True),
        replace(lost, workers=8),
        replace(won, network="B"),
    ]
    assert losses(settings) == [
        "DGC is slower than the better dense exchange in 3 of 5 settings, by more than 5 % in 3.",
        "All workers in one node, no network: slower in 1 of 1 settings, 0.750 to 0.750 times as fast.",
        "DGC sends everything dense, in float32, since all-gather would carry more: slower in 1 of 1 settings, "
        "0.750 to 0.750 times as fast.",
        "Otherwise A: slower with 64 workers, 8 a node, 100 Gb/s (0.750).",
        "Otherwise B: slower with none of these settings.",
    ]


def written(measured):
    """Returns what network.py writes of such runs."""
    runs = []
    for m in measured:
        rate = f"{round(m.rate_bits / 1e6)}mbit"
        runs.append(
            {
                "model": m.model,
                "ranks": m.ranks,
                "shapes": SHAPES[m.model],
                "reached": {rate: m.rate_bits / 1e6},
                "bytes": {m.competitor: m.bytes_sent},
                "rates": {rate: {m.competitor: {"0": m.seconds + 1, "1": m.seconds, "5": m.seconds / 2}}},
            }
        )
    return json.dumps({"runs": runs})


def test_the_script_reads_what_it_documents_and_says_what_is_missing(tmp_path):
    path = tmp_path / "network.json"
    command = ["benchmarks.cluster.scaling", "--network", str(path)]
    result = run_program(*command)
    assert result.returncode == 2
    assert "Run `python -m benchmarks.training.network` first" in result.stderr
    runs = made_up()
    loopback = json.loads(written(runs))
    loopback["runs"][-1]["reached"] = {}
    path.write_text(json.dumps(loopback))
    result = run_program(*command)
    assert result.returncode == 2
    assert "expected runs with limits, got some on a loopback: run network.py as root" in result.stderr
    assert "Traceback" not in result.stderr
    path.write_text(written(runs))
    assert scaling.read(path) == (runs, SHAPES)
    slow = json.loads(written(runs))
    [rate] = slow["runs"][0]["reached"]
    slow["runs"][0]["reached"][rate] = 4.5
    path.write_text(json.dumps(slow))
    assert scaling.read(path)[0][0].rate_bits == 4.5e6


def test_the_script_reports_and_draws(tmp_path, monkeypatch):
    path = tmp_path / "network.json"
    path.write_text(written(made_up()))
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--network", str(path)])
    for module in (scaling, sys.modules["benchmarks.harness"]):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    scaling.main()
    raw = json.loads((tmp_path / "scaling.json").read_text())
    assert len(raw["projected"]) == 4 * 4 * 4 * 2
    assert max(raw["errors"]) < 0.01
    assert raw["constants"]["share"] == pytest.approx(TRUE.share, rel=0.01)
    lost = sum(p["speedup"] < 1 for p in raw["projected"])
    assert raw["losses"][0].startswith(f"DGC is slower than the better dense exchange in {lost} of 128 settings")
    text = (tmp_path / "scaling.md").read_text()
    assert len(re.findall(r"\d loses", text)) == lost
    assert all(sentence in text for sentence in raw["losses"])
    assert [len(raw["islands"][name]) for name in ("exchanges", "dense_from")] == [4 * 4, 4]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
