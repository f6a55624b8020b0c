"""benchmarks/accuracy/adamw.py and adam_candidates.py: rules by hand, bytes by hand, and what is measured."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import dgc
from benchmarks.accuracy import adam_candidates, adam_variants, adamw, data, replicas, runs, tasks, traffic
from benchmarks.accuracy.adam_variants import AdamVariant, Candidate, DenseAdamW

N = replicas.WORKERS


@pytest.fixture(autouse=True)
def _one_thread():
    """Keeps networks this small on one thread, as the programs do: on a busy machine threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def regression():
    """Samples of three classes that a small network does not learn at once."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 40, generator=generator, dtype=torch.float64)
    targets = (inputs[:, :3] + 0.3 * torch.randn(300, 3, generator=generator)).argmax(1)
    return data.Data(inputs[:200], targets[:200], inputs[200:], targets[200:])


def network():
    return nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3)).double()


TASK = tasks.Task(
    "test",
    "accuracy",
    regression,
    network,
    lr=0.01,
    weight_decay=0.1,
    clip_norm=0.5,
    optimizer="AdamW",
    betas=(0.9, 0.95),
)


def trained(make, task=TASK, steps=20):
    """Returns the parameters at the end."""
    kept = []

    def keep(network, task):
        kept.append(make(network, task))
        return kept[0]

    replicas.train(task, keep, 1, steps)
    return [p.detach() for p in kept[0].network.parameters()]


def candidate(steps=20, **switches):
    return partial(AdamVariant, candidate=Candidate(**{"dense_below": 0, **switches}), steps=steps)


def distance(one, other):
    return sum(float((a - b).norm()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("rule", ["local direction", "naive", "SCAPE", "AdamS"])
def test_where_everything_is_dense_a_candidate_is_adamw(rule):
    task = replace(TASK, clip_norm=None)  # DGC clips before averaging
    dense = trained(DenseAdamW, task)
    ours = trained(candidate(rule=rule, density=1.0, warmup=0.0, dense_below=151), task)
    for one, other in zip(dense, ours, strict=True):
        torch.testing.assert_close(one, other)


def test_dense_adamw_clips_the_average():
    torch.manual_seed(0)
    one, other = DenseAdamW(TASK.network(), TASK), DenseAdamW(TASK.network(), TASK)
    other.network.load_state_dict(one.network.state_dict())
    batches = next(replicas.batches_of(TASK, 0, 1))
    one.learn(batches)
    average = [torch.zeros_like(p) for p in other.network.parameters()]
    for inputs, targets in batches:
        other.network.zero_grad()
        tasks.loss_of(other.network(inputs), targets).backward()
        torch._foreach_add_(average, [p.grad / N for p in other.network.parameters()])
    norm = math.sqrt(sum(float(g.square().sum()) for g in average))
    assert norm > TASK.clip_norm
    for p, g in zip(other.network.parameters(), average, strict=True):
        p.grad = g * TASK.clip_norm / (norm + 1e-6)
    other.optimizer.step()
    for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def by_hand(p, gradients, rates, share, arrival):
    """Returns parameters and residuals after these gradients [steps, workers, elements], an entry sent each time."""
    b1, b2, eps = 0.9, 0.95, 1e-8
    m, s, v = (torch.zeros_like(gradients[0]) for _ in range(3))
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        mh = m / (1 - b1**t)
        s = b2 * s + (1 - b2) * (share * g**2 + (1 - share) * mh**2)
        v = v + (1 if arrival else lr) * mh / ((s / (1 - b2**t)).sqrt() + eps)
        p = p * (1 - lr * 0.1)
        for worker in range(N):
            largest = int(v[worker].abs().argmax())
            p[largest] -= (lr if arrival else 1) * v[worker, largest] / N
            v[worker, largest] = 0
    return p, v


@pytest.mark.parametrize("correction", ["corrected", "none"])
@pytest.mark.parametrize("lr_at", ["departure", "arrival"])
def test_steps_of_the_local_direction_by_hand(correction, lr_at):
    share = 1 - (1 - 1 / 4) / (1 - 0.1 / 1.9) if correction == "corrected" else 1.0
    torch.manual_seed(0)
    chosen = Candidate(correction=correction, lr_at=lr_at, density=0.05, warmup=0.0, dense_below=0)
    trainer = AdamVariant(nn.Linear(5, 4).double(), TASK, chosen, 3)
    gradients, rates = torch.randn(3, N, 20, dtype=torch.float64), [0.01, 0.02, 0.005]
    p, v = by_hand(trainer.flat.clone(), gradients, rates, share, lr_at == "arrival")
    for g, lr in zip(gradients, rates, strict=True):
        trainer._gradients = lambda _, g=g: torch.cat([g, g[:, :4]], 1)  # the bias is dense
        trainer.optimizer.param_groups[0]["lr"] = lr
        trainer.learn([])
    torch.testing.assert_close(trainer.flat, p)
    torch.testing.assert_close(trainer.v, v)
    assert torch.equal(trainer.network.weight.detach().flatten(), trainer.flat)


def test_each_correction_has_the_mean_square_of_the_average():
    generator = torch.Generator().manual_seed(0)
    signal, noise = 0.5, torch.randn(4000, 2000, generator=generator)
    g = signal + noise
    m = torch.zeros(2000)
    found = {"corrected": 0.0, "none": 0.0, "cross": 0.0}
    for t in range(4000):
        before, m = m, torch.lerp(m, g[t], 0.1)
        if t >= 100:  # the bias of the start is gone
            for correction in found:
                term = adam_variants.second_moment(correction, g[t], m, before, 0.9, N)
                found[correction] += float(term.mean()) / 3900
    assert found["corrected"] == pytest.approx(signal**2 + 1 / N, rel=0.01)
    assert found["cross"] == pytest.approx(signal**2 + 1 / N, rel=0.01)
    assert found["none"] == pytest.approx(signal**2 + 1, rel=0.01)
    assert adam_variants.noise_share(0.9, 1) == 1
    assert adam_variants.noise_share(0.9, 1000) == 0


def test_scape_by_hand():
    """Two steps of one entry of five, by the equations of its description."""
    torch.manual_seed(0)
    for shared in (True, False):
        chosen = Candidate(rule="SCAPE", shared_mask=shared, density=0.05, warmup=0.0, dense_below=0)
        trainer = AdamVariant(nn.Linear(5, 4).double(), TASK, chosen, 2)
        p, m, e = trainer.flat.clone(), torch.zeros(20).double(), torch.zeros(N, 20).double()
        for g in torch.randn(2, N, 20, dtype=torch.float64):
            c = 0.9 * m + 0.1 * g + e
            places = [int((c.mean(0) if shared else c[worker]).abs().argmax()) for worker in range(N)]
            new, e = torch.zeros(20).double(), c.clone()
            for worker, place in enumerate(places):
                new[place] += c[worker, place] / N
                e[worker, place] = 0
            h = (new - 0.9 * m) / 0.1
            p = p * (1 - 0.01 * 0.1) - 0.01 * new / ((0.95 * m**2 + 0.05 * h**2).sqrt() + 1e-8)
            m = new
            trainer._gradients = lambda _, g=g: torch.cat([g, g[:, :4]], 1)
            trainer.learn([])
        torch.testing.assert_close(trainer.flat, p)
        torch.testing.assert_close(trainer.v, e)


def test_a_worker_looks_ahead_by_its_own_residual_and_no_further():
    plain, ahead = trained(candidate(density=0.05)), trained(candidate(density=0.05, ahead=0.5))
    assert distance(plain, trained(candidate(density=0.05, ahead=0.0))) == 0
    assert distance(plain, ahead) > 0
    torch.manual_seed(0)
    trainer = AdamVariant(TASK.network(), TASK, Candidate(ahead=0.5, density=0.05, dense_below=0), 10)
    trainer.v.normal_()
    here, seen = trainer.flat.clone(), []
    trainer.network.register_forward_pre_hook(lambda *_: seen.append(trainer.flat.clone()))
    trainer._gradients(next(replicas.batches_of(TASK, 0, 1)))
    torch.testing.assert_close(torch.stack(seen), here - 0.5 * trainer.v)
    assert torch.equal(trainer.flat, here)


def test_every_candidate_is_another_method():
    found = {}
    for name, switches in adam_candidates.RULES.items():
        found[name] = trained(candidate(**{"dense_below": 151, **switches}), steps=12)
    names = [*found]
    assert [(a, b) for i, a in enumerate(names) for b in names[:i] if distance(found[a], found[b]) == 0] == []


def test_switches_that_a_rule_does_not_have_are_refused():
    with pytest.raises(ValueError, match="ahead: expected 0 with rule 'naive', got"):
        candidate(rule="naive", ahead=0.5)(network(), TASK)
    with pytest.raises(ValueError, match="masking: expected False with rule 'SCAPE'"):
        candidate(rule="SCAPE", masking=True)(network(), TASK)


def test_the_local_gradient_is_the_packages_rule():
    def single():
        return network().float()

    def samples():
        return data.Data(*(t.float() if t.is_floating_point() else t for t in regression()))

    # With a small eps all directions of the first step are 1 or -1, and rounding decides what is sent.
    task = replace(TASK, network=single, load=samples, eps=0.1, lr=0.05)
    chosen = Candidate("local gradient", density=0.02, dense_below=0, warmup=0.4)
    config = replace(chosen.config(20), clip_norm=task.clip_norm)
    core = trained(partial(replicas.DGC, config=config), task)
    ours = trained(candidate(rule="local gradient", density=0.02, warmup=0.4), task)
    torch.manual_seed(1)
    start = [p.detach() for p in single().parameters()]
    assert distance(core, ours) <= 1e-3 * distance(core, start)


def test_bytes_by_hand():
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 10))  # 120,000 + 400, 4,000 + 10
    config = dgc.DGCConfig(0.001, warmup_steps=4, warmup_densities=(0.5, 0.25))
    whole, rest = 4 * 124_410, 4 * 4_410
    # As one bucket: header 32, used 16, upper and low bits of the indices, values of 120 or 30,000 entries.
    final, quarter = 48 + 48 + 144 + 480, 48 + 7_504 + 7_504 + 120_000
    dense = 2 * 3 / 4 * whole  # so is the first phase, at 0.5
    sent = 2 * dense + 2 * (3 * quarter + 1.5 * rest) + 6 * (3 * final + 1.5 * rest)
    assert traffic.share_of_dense(model, config, 10, 4) == pytest.approx(sent / (10 * dense), rel=1e-6)
    assert traffic.share_of_dense(model, dgc.DGCConfig(1.0), 10, 4) == 1
    assert traffic.share_of_dense(model, dgc.DGCConfig(0.01, dense_below=10**6), 10, 4) == 1


class Guess(nn.Module):
    """Scores the right class highest with `share` of the samples, and another one with the others."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, samples):
        right = samples.clone()
        right[round(self.share * len(samples)) :] += 1
        return 20.0 * nn.functional.one_hot(right, 12).float()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_accuracy_and_perplexity_by_hand(share):
    classes = torch.arange(10)
    task = replace(TASK, metric="accuracy", load=lambda: data.Data(classes, classes, classes, classes))
    assert tasks.measure(task, Guess(share)) == 100 * share
    perplexity = tasks.measure(replace(task, metric="perplexity"), Guess(share))
    assert perplexity == pytest.approx(math.exp(20 * (1 - share)), rel=1e-3)


def test_a_patch_sees_all_others_and_a_word_only_those_before():
    words = torch.arange(8).view(1, 8)
    other = words.clone()
    other[0, -1] = 9
    gpt = tasks.TASKS["gpt-adamw"].network()
    assert not (gpt(words)[0, 0] != gpt(other)[0, 0]).any()
    block = tasks.TASKS["vit-adamw"].network().blocks
    patches = torch.randn(1, 49, 64)
    changed = patches.clone()
    changed[0, -1] += 1
    assert (block(patches)[0, 0] != block(changed)[0, 0]).any()


def test_every_run_of_both_plans_can_be_made():
    plan = adamw.plan(adamw.TRAINED, 2, 100)
    assert len(set(plan)) == len(plan) == 2 * (len(adamw.METHODS) + 2 + 2 * 2)
    assert len({run.settings for run in plan if (run.seed, run.task) == (0, "gpt-adamw")}) == len(adamw.METHODS)
    plan = adam_candidates.plan(adamw.TRAINED, [*adam_candidates.METHODS], 2, 100, 1e-3)
    assert len(set(plan)) == len(plan) == 2 * 3 * len(adam_candidates.METHODS)
    assert "lr 0.001 " in plan[0].settings
    assert [*adam_candidates.CURVE] == [0, 0.1, 0.3, 0.5, 0.8]


def finished(plan):
    """Returns records of runs that were not done: dense ends at 40, others at 42, and half a point more by seed."""
    return [
        runs.Record(run, [(run.steps, (40 if run.method == "dense" else 42) + run.seed / 2)], 1.0, "") for run in plan
    ]


def test_candidates_tables_say_what_is_sent(tmp_path):
    methods = [*adam_candidates.METHODS]
    records = finished(adam_candidates.plan(["gpt-adamw"], methods, 1, 2000, None))
    [(_, _, rows)] = adam_candidates.tables_of(records, methods, range(1), None)
    assert rows[0] == ["dense", "40.00", "", "100.0 %"]
    assert rows[1] == ["gradient, 1 %", "42.00", "+5.00 %", "6.6 %"]
    adam_candidates.draw_warmups(records, range(1), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_the_comparisons_report_has_all_tasks_and_bytes(tmp_path):
    adamw.tell(adamw.TRAINED, range(2), finished(adamw.plan(adamw.TRAINED, 2, None)), tmp_path)
    text = (tmp_path / "adamw.md").read_text()
    assert all(f"**{name}**" in text for name in adamw.TRAINED)
    assert text.count("| 100.0 % ") == text.count("| dense ") == 3
    row = next(line for line in text.splitlines() if line.startswith("| DGC 0.1 % "))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["DGC 0.1 %", "42.25", "0.35", "+4.97 %", "+4.58 to +5.36 %", "no", "5.5 %"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".json", ".png"}
