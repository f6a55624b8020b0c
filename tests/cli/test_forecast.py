"""The arithmetic of `python -m dgc plan` against numbers worked out by hand."""

import math
import re

import pytest
import torch

import dgc
from dgc.cli.checks import bytes_a_second
from dgc.cli.cost import Cluster, Line, Link, Node, Speeds, exposed, flat_seconds, node_seconds, speeds_of
from dgc.cli.forecast import (
    FLOAT32,
    HALF,
    Forecast,
    Local,
    forecasts,
    hours,
    local_steps,
    ready_by_share,
    recommended,
    undecided,
    waiting,
)
from dgc.cli.links import Probe, unsteady
from dgc.cli.paste import advice, ddp_lines, horovod_lines
from dgc.cli.ranks import Started, UsageError, places_of, started
from dgc.cli.traffic import Traffic


def test_an_exchange_is_open_where_nothing_hides_it():
    # Full at 0, 4 and 5: sent from 0 to 3, 4 to 6 and 6 to 7, which is 2 after the last was full.
    assert exposed([3, 2, 1], [0, 4, 5]) == 2
    assert exposed([3, 2, 1], [-5, -1, 0]) == 2  # on any clock
    assert exposed([6, 2, 1], [0, 4, 5]) == 4  # the first is not through when the second is full: 6, 8, 9
    assert exposed([1, 1, 1], [0, 4, 5]) == 1  # the last is never hidden


def test_what_is_hidden_counts_where_it_takes_the_processor():
    assert waiting([3, 2, 1], [0, 4, 5], overlap=1.0) == 2
    assert waiting([3, 2, 1], [0, 4, 5], overlap=0.0) == 6  # all of it
    assert waiting([3, 2, 1], [0, 4, 5], overlap=0.75) == 2 + 0.25 * 4


def test_a_line_goes_through_two_points_and_is_never_negative():
    line = Line.through((100, 2.0), (300, 3.0))
    assert (line(100), line(300), line(500), line(0)) == (2.0, 3.0, 4.0, 0.0)
    assert Line.through((100, 2.0), (300, 1.0)) == Line(2.0, 0.0)  # noise: more bytes took less
    assert Line.through((100, 1.0), (300, 4.5)) == Line(0.0, 4.5 / 300)  # it would begin below 0


def test_nodes_by_hand():
    node = Node(nodes=3, places=2, mean=Line(1, 0.01), across=Line(2, 0.1), inside=Line(4, 0.001))
    speeds = Speeds(Line(8, 0.5), Line(0, 0), Line(16, 0.25), node)
    sent = [Traffic(payload=200, dense=10, compressed=1000, entries=9), Traffic(0, 10, 0, 0)]
    # All-reduce of 10; mean of 4,000 bytes, 100 of each rank across, 3 * 100 of each inside.
    assert node_seconds(sent, speeds, node) == [pytest.approx(13 + 41 + 12 + 4.3), 13]
    assert flat_seconds(sent, speeds) == [13 + 66, 13]
    assert flat_seconds([Traffic(0, 10, 0, 0)], speeds, itemsize=2) == [0]
    # Started together, gloo waits for both at once: the lesser wait, of 8.5 for a byte, does not count.
    at_once = Speeds(Line(8, 0.5), Line(0, 0), Line(16, 0.25), at_once=True)
    assert flat_seconds(sent, at_once) == [13 + 66 - 8.5, 13]


def test_the_formulas_as_speeds():
    speeds = speeds_of(Cluster(6, 2, Link(100.0, 0.5), Link(1000.0, 0.01)))
    node = speeds.node
    # 3 nodes of 2: 5 payloads pass a link; rings among the ranks of a place share it.
    assert speeds.all_gather(200) == pytest.approx(5 * 200 / 100 + 2 * 0.5 + 3 * 0.01)
    assert node.across(100) == pytest.approx(2 * (2 * 100 / 100 + 0.5))
    assert node.mean(4000) == pytest.approx(4000 / 2 / 1000 + 0.01)
    assert node.inside(300) == pytest.approx(300 / 1000 + 0.01)
    assert speeds_of(Cluster(4, 1, Link(100.0, 0.5), Link(math.inf, 0.0))).node is None
    assert speeds_of(Cluster(4, 4, Link(100.0, 0.5), Link(math.inf, 0.0))).node is None


BUCKETS = [{"bias": (100,)}, {"matrix": (300, 400)}]
SPEEDS = Speeds(Line(0.001, 1e-6), Line(0.002, 1e-6), Line(0.003, 1e-6))


def test_forecasts_by_hand():
    assert ready_by_share([{"a": (30,)}, {"b": (10, 2), "c": (50,)}], backward=2.0) == [2.0 * (0.3 - 1), 0.0]
    local = {FLOAT32: Local(1.0, [-0.5, 0.0]), HALF: Local(1.1, [-0.5, 0.0]), 0.01: Local(1.2, [-0.5, 0.0])}
    local[0.001] = Local(1.3, [-0.5, 0.0])
    by_name = {f.name: f for f in forecasts(BUCKETS, 4, SPEEDS, local, 1.0)}
    assert [*by_name] == ["dense, float32", "dense, 16 bits", "dgc 1 %", "dgc 0.1 %"]
    # The bucket of 100 is hidden; that of 120,000 is not.
    assert by_name["dense, float32"].seconds == pytest.approx(1.0 + 0.001 + 0.48)
    assert by_name["dense, 16 bits"].seconds == pytest.approx(1.1 + 0.002 + 0.24)
    assert by_name["dense, float32"].nbytes == 2 * 3 * 480_400 // 4
    # 120 entries: header 32, used 16, 120 + 119,999 / 512 upper bits 48, 9 low bits each 144, values 480.
    assert by_name["dgc 0.1 %"].seconds == pytest.approx(1.3 + 0.003 + 720e-6)
    assert by_name["dgc 0.1 %"].nbytes == 3 * 720 + 2 * 3 * 400 // 4
    node = Node(nodes=2, places=2, mean=Line(0, 0), across=Line(0, 0), inside=Line(0, 0))
    in_nodes = forecasts(BUCKETS, 4, Speeds(*[Line(0, 0)] * 3, node), local, 1.0)
    # Of what compression adds to a step of 1.0, a rank of two does half.
    assert [(f.name, f.seconds) for f in in_nodes[4:]] == [("dgc 1 %, nodes", 1.1), ("dgc 0.1 %, nodes", 1.15)]
    assert hours(by_name["dense, float32"], 36_000) == pytest.approx(14.81)


def test_memory_traffic_by_hand():
    local = local_steps(BUCKETS, 4, step=1.0, backward=0.5, memory=1e6)
    assert local[FLOAT32].seconds == 1.0
    assert local[HALF].seconds == pytest.approx(1.0 + 12 * 120_100 / 1e6)
    bits = 32 + 9 + 1 + 1000 / 512  # of a received entry: its value, and its index in Elias-Fano form
    assert local[0.001].seconds == pytest.approx(1.0 + (25 * 120_000 + 4 * 120 * bits / 8) / 1e6)
    assert local[0.01].ready == [pytest.approx(0.5 * (100 / 120_100 - 1)), 0.0]


def of(name, density, seconds, nodes=False, waiting=0.0):
    return Forecast(name, density, nodes, seconds - waiting, waiting, 0)


def test_what_is_recommended():
    dense = [of("dense, float32", None, 2.0), of("dense, bf16", None, 1.04)]
    assert recommended([*dense, of("dgc 1 %", 0.01, 1.0)]).name == "dense, bf16"  # 4 % is no reason
    slow = [of("dense, float32", None, 2.0), of("dense, bf16", None, 1.5)]
    near, fast = of("dgc 1 %", 0.01, 1.04), of("dgc 0.1 %", 0.001, 1.0)
    assert recommended([*slow, near, fast]) is near
    assert recommended([*slow, of("dgc 1 %", 0.01, 1.06), fast]) is fast
    assert recommended([*slow, near, fast, of("dgc 1 %, nodes", 0.01, 1.0, nodes=True)]) is near
    assert recommended([*slow, of("dgc 1 %", 0.01, 1.3), of("dgc 1 %, nodes", 0.01, 1.0, nodes=True)]).nodes


def test_auto_decides_where_plan_cannot():
    def decided(*found):
        chosen = recommended(found)
        return chosen.name, undecided(found, chosen)

    def all_of(half, one, tenth, *nodes, waits=0.2):
        dense = [of("dense, float32", None, 2.0, waiting=1.0), of("dense, bf16", None, half, waiting=waits)]
        nodes = [of("dgc 1 %, nodes", 0.01, t, nodes=True, waiting=0.1) for t in nodes]
        return [
            *dense,
            of("dgc 1 %", 0.01, one, waiting=waits / 4),
            of("dgc 0.1 %", 0.001, tenth, waiting=waits / 8),
            *nodes,
        ]

    assert decided(*all_of(1.04, 1.03, 1.0)) == ("dgc 1 %", True)  # 4 %
    assert decided(*all_of(1.0, 1.06, 1.04)) == ("dgc 0.1 %", True)  # dense is faster, by as little
    assert decided(*all_of(1.0, 1.2, 1.06)) == ("dense, bf16", False)  # by more
    assert decided(*all_of(1.1, 1.3, 1.0)) == ("dgc 0.1 %", False)
    assert decided(*all_of(1.06, 1.04, 1.0)) == (
        "dgc 1 %",
        True,
    )  # as good as the fastest, and not surely faster than dense
    # Nothing waits: whatever the trial says, there is nothing to gain.
    assert decided(*all_of(1.0, 1.02, 1.01, waits=0.04)) == ("dense, bf16", False)
    # Nodes as workers refuse it.
    assert decided(*all_of(1.2, 1.3, 1.3, 1.0)) == ("dgc 1 %, nodes", False)
    assert decided(*all_of(1.04, 1.3, 1.3, 1.0)) == ("dense, bf16", False)
    assert decided(*all_of(1.04, 1.3, 1.02, 1.0)) == ("dgc 0.1 %", True)
    close = [*all_of(1.06, 1.3, 1.3, 1.04), of("dgc 0.1 %, nodes", 0.001, 1.0, nodes=True)]
    assert decided(*close) == ("dgc 1 %, nodes", False)


def test_auto_in_the_lines_and_below_them():
    half, whole = of("dense, fp16", None, 1), of("dense, float32", None, 1)
    thousandth, nodes = of("dgc 0.1 %", 0.001, 1), of("dgc 1 %, nodes", 0.01, 1, nodes=True)
    attach = "dgc.attach(model, optimizer, dgc.DGCConfig(density=0.001, warmup_steps=400, "
    assert ddp_lines(thousandth, 10_000, "fp16", half).endswith(
        f'{attach}exchange="auto", dense_wire_dtype="float16"))'
    )
    assert ddp_lines(thousandth, 10_000, "fp16", whole).endswith(f'{attach}exchange="auto"))')
    given = re.search(r"(dgc\.DGCConfig\(.*\))\)", ddp_lines(thousandth, None, "bf16", of("dense, bf16", None, 1)))
    config = eval(given[1], {"dgc": dgc})
    assert (config.exchange, config.dense_wire_dtype) == ("auto", torch.bfloat16)
    assert "auto" not in ddp_lines(thousandth, None)
    assert "while you train" in advice(thousandth, auto=True)
    assert 'may be faster at times, exchange="auto" in DGCConfig' in advice(thousandth, auto=False)
    assert 'may be slower at times, dgc.DGCConfig(exchange="auto")' in advice(half, auto=False)
    assert advice(nodes, auto=False) == ""


def test_the_lines_to_paste():
    assert "bf16_compress_hook" in ddp_lines(of("dense, bf16", None, 1), None)
    assert "fp16_compress_hook" in ddp_lines(of("dense, fp16", None, 1), None, "fp16")
    assert "compress_hook" not in ddp_lines(of("dense, float32", None, 1), None)
    attach = "optimizer = dgc.attach(model, optimizer, dgc.DGCConfig("
    assert ddp_lines(of("dgc 1 %", 0.01, 1), None).endswith(f"{attach}density=0.01))")
    slow = ddp_lines(of("dgc 0.1 %, nodes", 0.001, 1, nodes=True), 50_000)
    assert slow.endswith(f'{attach}density=0.001, warmup_steps=2000), mesh="auto")')


def test_the_lines_to_paste_into_a_script_of_horovod():
    dense = "optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters()"
    assert horovod_lines(of("dense, fp16", None, 1), "sgd", None) == f"{dense}, compression=hvd.Compression.fp16)"
    assert horovod_lines(of("dense, float32", None, 1), "sgd", None).startswith(f"{dense})")
    flat = horovod_lines(of("dgc 0.1 %", 0.001, 1), "sgd", 50_000, of("dense, fp16", None, 1))
    config = 'dgc.DGCConfig(density=0.001, warmup_steps=2000, exchange="auto", dense_wire_dtype="float16")'
    assert f"compressor = dgc.horovod.DGCCompressor({config})\n" in flat
    assert "hvd.init()\noptimizer = dgc.SGD(" in flat
    assert "nodes" not in flat
    nodes = horovod_lines(of("dgc 1 %, nodes", 0.01, 1, nodes=True), "adamw", None)
    assert 'hvd.init(process_sets="dynamic")\noptimizer = dgc.AdamW(' in nodes
    assert nodes.endswith('DistributedOptimizer(optimizer, model.named_parameters(), compressor, nodes="auto")')


def test_rates_are_read():
    assert [bytes_a_second(rate) for rate in ("1gbit", "2.5Gbit", "100mbit", "8kbit")] == [125e6, 312.5e6, 12.5e6, 1000]
    for rate in ("1", "1gb", "0mbit", "-1gbit", "fast"):
        with pytest.raises(UsageError, match="such as 1gbit"):
            bytes_a_second(rate)


def test_who_started_this_process():
    assert started({}) is None
    assert started({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Started("torchrun", 3, 8, 1)
    horovod = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0"}
    assert started(horovod) == Started("horovodrun", 1, 2, 0)
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert started(slurm) is None  # sbatch's own script
    assert started({**slurm, "SLURM_STEP_NUM_TASKS": "4"}) == Started("srun", 0, 4, 0)


@pytest.mark.parametrize(
    ("machines", "places"),
    [("aabb", 2), ("aaaa", 4), ("abcd", 1), ("aaab", 1), ("abab", 1), ("aabbaa", 1), ("aabbc", 1)],
)
def test_ranks_of_a_node(machines, places):
    assert places_of(machines) == places


def test_a_link_that_changes_is_said_with_its_spread():
    steady = Probe(lambda _: lambda: None, few=64, most=1000, seconds={64: [0.1] * 4, 1000: [1.0, 1.1, 1.4, 9.0]})
    changing = Probe(lambda _: lambda: None, few=64, most=1000, seconds={64: [0.1] * 4, 1000: [1.0, 1.1, 1.6, 1.7]})
    assert unsteady({"all-gather": steady}) == ""  # one that is slow may be anything
    said = unsteady({"all-gather": steady, "all-reduce": changing})
    assert "all-reduce of 1,000 bytes took 1000.0 to 1700.0 ms, median 1350.0" in said
    assert "all-gather" not in said
    assert changing.line == Line.through((64, 0.1), (1000, 1.35))
