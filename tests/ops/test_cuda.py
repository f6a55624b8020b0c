"""Tests on a real GPU: stream order, CUDA graphs, no waiting in the hook, and the same bits as on the CPU.

That the kernels are right is tested in tests/ops/kernels, there on every road, this GPU's among them.
"""

import math
import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dgc
from dgc import ops
from support.buckets import make
from support.models import Given, integers, normals
from support.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT CHECKED: no GPU. launch/gpu_check.sh runs these on one"
)

# The hook's real work: buckets of 0.5 MB, dense and compressed parameters, one of an odd size.
SHAPES = {"a": (700, 701), "b": (100,), "c": (130, 131), "d": (60, 20), "e": (1200, 900)}
LARGE = ("a", "c", "e")


def on_gpu(args):
    """Returns compress_'s arguments on the GPU."""
    moved = [x.cuda() if isinstance(x, torch.Tensor) and i not in (4, 8) else x for i, x in enumerate(args.list())]
    moved[0], moved[2] = [g.cuda() for g in args.gradients], [x.cuda() for x in args.kept]
    moved[8] = ops.workspace(args.segments, torch.device("cuda", 0))
    return moved


def test_there_are_kernels():
    assert dgc.backend("cuda") == os.environ.get("DGC_EXPECT", "native")


def train(rank, world_size, device, steps, config, sgd):
    """Trains on one device; returns all that training changes, on the CPU."""
    net = Given(SHAPES).to(device)
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.5, gradient_as_bucket_view=True)
    optimizer = dgc.SGD(ddp.parameters(), **sgd)
    state = dgc.DGCState(ddp.named_parameters(), optimizer, config)
    ddp.register_comm_hook(state, dgc.dgc_hook)
    for step in range(steps):
        optimizer.zero_grad()
        gradients = {name: g.to(device) for name, g in integers(SHAPES, 1000 * step + rank).items()}
        ddp(gradients).backward()
        optimizer.step()
    return {
        **{name: p.detach().cpu() for name, p in net.named_parameters()},
        "residual": state.memory.residual.cpu(),
        "momentum": torch.zeros(0) if state.memory.momentum is None else state.memory.momentum.cpu(),
    }


def both(rank, world_size, config, sgd):
    torch.cuda.set_device(0)
    return [train(rank, world_size, device, 10, config, sgd) for device in ("cpu", "cuda:0")]


@pytest.mark.parametrize("wire_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sgd", [{"lr": 0.5}, {"lr": 0.5, "momentum": 0.5}], ids=str)
def test_two_gloo_ranks_on_one_gpu_give_the_bits_of_the_cpu(wire_dtype, sgd):
    # Small integers, halved a few times: exact, so both devices' order of a sum does not matter.
    config = dgc.DGCConfig(density=0.008, wire_dtype=wire_dtype, warmup_steps=4, warmup_densities=(0.1,))
    results = run_ranks(2, both, config, sgd, timeout=120)
    for on_cpu, on_cuda in results:
        for name, tensor in on_cpu.items():
            assert torch.equal(tensor, on_cuda[name]), name
    for name in SHAPES:
        assert torch.equal(results[0][1][name], results[1][1][name]), name


def under_nccl(rank, world_size):
    torch.cuda.set_device(0)
    config, sgd = dgc.DGCConfig(density=0.008), {"lr": 0.5, "momentum": 0.5}
    return train(rank, world_size, "cuda:0", 10, config, sgd)


def alone_on_the_cpu(rank, world_size):
    return train(rank, world_size, "cpu", 10, dgc.DGCConfig(density=0.008), {"lr": 0.5, "momentum": 0.5})


def test_one_nccl_rank_gives_the_bits_of_the_cpu():
    [expected] = run_ranks(1, alone_on_the_cpu)
    [result] = run_ranks(1, under_nccl, backend="nccl", timeout=120)
    for name, tensor in expected.items():
        assert torch.equal(tensor, result[name]), name


def never_waits(rank, world_size):
    torch.cuda.set_device(0)
    net = Given(SHAPES).cuda()
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.5, gradient_as_bucket_view=True)
    optimizer = dgc.SGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
    state = dgc.DGCState(ddp.named_parameters(), optimizer, dgc.DGCConfig(density=0.008, clip_norm=5.0))
    calls = []

    def hook(state: dgc.DGCState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        # DDP itself reads the device now and then; only the hook is on trial.
        calls.append(bucket.index())
        torch.cuda.set_sync_debug_mode("error" if step > 10 else "default")
        try:
            return dgc.dgc_hook(state, bucket)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    hook.__annotations__ = dgc.dgc_hook.__annotations__
    ddp.register_comm_hook(state, hook)
    gradients = {name: g.cuda() for name, g in normals(SHAPES, rank).items()}
    for step in range(20):
        optimizer.zero_grad()
        ddp(gradients).backward()
        torch.cuda.set_sync_debug_mode("error" if step > 10 else "default")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
    return len(calls)


def test_neither_the_hook_nor_the_optimizer_waits_for_the_device():
    [calls] = run_ranks(1, never_waits, backend="nccl", timeout=120)
    assert calls >= 20


def test_compress_and_unpack_in_a_cuda_graph_follow_what_changes_in_memory():
    args = on_gpu(make([300_000, 70_000, 33], 0.01, torch.bfloat16))
    eager = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    eager[0], eager[2] = [g.clone() for g in args[0]], [x.clone() for x in args[2]]
    eager[8] = ops.workspace(args[4], torch.device("cuda", 0))
    results = []
    for a in (args, eager):
        out = torch.zeros(370_033, device="cuda")
        status = torch.full((3,), 9, dtype=torch.int32, device="cuda")
        payloads = torch.zeros(2, len(a[7]), dtype=torch.uint8, device="cuda")
        results.append((a, out, status, payloads))

    def step(a, out, status, payloads):
        ops.compress_(*a)
        payloads.copy_(a[7].expand_as(payloads))
        ops.unpack(payloads, 0, a[4], a[8], a[6], a[10], [out], status)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*results[0])  # CuPy compiles at first use
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*results[0])
    step(*results[1])
    for round_index in range(5):
        for a, *_ in results:
            generator = torch.Generator(device="cuda").manual_seed(round_index)
            a[0][0].copy_(torch.randn(a[0][0].shape, device="cuda", generator=generator))
            a[5][1].fill_(0.1 * round_index)  # mu
            a[6].fill_(1.0 + round_index)  # scale
        graph.replay()
        step(*results[1])
        assert torch.equal(args[2][0], eager[2][0])
        for i in (3, 7, 9):
            assert torch.equal(results[0][0][i].view(torch.uint8), results[1][0][i].view(torch.uint8)), i
        assert torch.equal(results[0][1], results[1][1])
        assert results[0][2].tolist() == results[1][2].tolist() == [0, 0]


def test_a_large_bucket_of_many_segments_has_exactly_the_largest():
    sizes = [20_000_000, 16_384, 4_000_000, 65_536, 65_537, 1_000_001] + [20_000] * 100
    args = on_gpu(make(sizes, 0.001))
    before = [args[3][state : state + n].clone() for _, _, state, n, *_ in args[4].tolist()]
    for row, (_, offset, state, n, *_) in enumerate(args[4].tolist()):
        before[row] += args[5][1, row] * args[2][0][state : state + n] + args[0][0][offset : offset + n]
    ops.compress_(*args)
    for row, (_, _, state, n, k) in enumerate(args[4].tolist()):
        sent = before[row] != args[3][state : state + n]
        assert int(sent.sum()) == k
        assert before[row][sent].abs().min() >= before[row][~sent].abs().max()


def test_a_non_finite_gradient_changes_nothing_and_the_next_step_raises():
    net = Given(SHAPES).cuda()
    optimizer = dgc.SGD(net.parameters(), lr=0.5, momentum=0.5, weight_decay=0.1)
    state = dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    from support.alone import reduce

    def step(gradients):
        optimizer.zero_grad()
        net({name: g.cuda() for name, g in gradients.items()}).backward()
        reduce(state, net)
        optimizer.step()

    step(normals(SHAPES, 0))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    gradients = normals(SHAPES, 1)
    gradients["e"][3, 4] = math.nan
    step(gradients)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    with pytest.raises(FloatingPointError, match="rank 0, step 1"):
        step(normals(SHAPES, 2))
    step(normals(SHAPES, 2))
    assert state.step == 2


def test_gradients_and_state_on_different_devices_are_refused():
    args = on_gpu(make([1000], 0.01))
    args[0] = [args[0][0].cpu()]
    with pytest.raises(RuntimeError, match="gradients: expected"):
        ops.compress_(*args)


def test_a_residual_that_is_not_aligned_is_refused():
    args = on_gpu(make([1000], 0.01))
    args[3] = torch.zeros(2001, device="cuda")[1:]
    with pytest.raises(RuntimeError, match="residual: expected memory aligned"):
        ops.compress_(*args)
