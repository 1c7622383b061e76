"""On a CUDA GPU: python -m pytest tests/test_cuda.py. Captured equals eager, through resumes and reloads. Each test
that compares the two counts the replays, since without a capture it would compare eager with eager. No data is
needed."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CASES, EVERY, ROOT, TINY, checkpoint, leaves, scripted_judge, tensors, timeless

import metrics

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("small")]
CUDA = ["--device", "cuda", "--batch-size", "16"]
FLAGS = [*TINY, *CUDA]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 throughout and the same kernels each time, so that only the graph can make a difference."""

    def strict(start, args):
        device = start(args)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        return device

    for script in {case.module for case in CASES.values()}:
        monkeypatch.setattr(script, "start", functools.partial(strict, script.start))
    yield
    torch.backends.cudnn.deterministic = False


@pytest.fixture
def replayed(monkeypatch):
    """replayed(main, flags) runs it, and returns how many times a graph was replayed."""
    count = 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph):
        nonlocal count
        count += 1
        replay(graph)

    def run(main, *flags):
        before = count
        main([*flags])
        return count - before

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return run


def close(a, b, atol=1e-5):
    """The networks, averages and moments of two checkpoints."""
    for name in a.keys() & {"G", "D", "E", "ema", "ema_e", "opt_g", "opt_d"}:
        x, y = leaves(a[name]), leaves(b[name])
        assert len(x) == len(y) > 1, name
        for p, q in zip(x, y):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=atol)


def both(replayed, main, iterations, *flags):
    """The checkpoints of the same run captured and eager; the noise too: the generator ends in the same state."""
    assert replayed(main, *flags, "--graph", "--run-dir", "graph") == iterations - 3  # three are eager, and count
    assert replayed(main, *flags, "--no-graph", "--run-dir", "eager") == 0
    graph, eager = tensors("graph/last.pt"), tensors("eager/last.pt")
    assert torch.equal(graph["rng"]["cuda"], eager["rng"]["cuda"])
    return graph, eager


@EVERY
@pytest.mark.parametrize("more", [[], ["--arch", "mlp"], ["--paper"], ["--upsample", "nearest"]], ids=" ".join)
def test_captured_equals_eager(replayed, w, more):
    """With g_steps and d_steps, so that a replay holds several updates, and rates that fall."""
    flags = [*w.tiny, *more, *CUDA, *"--d-steps 2 --g-steps 2 --steps 16 --log-every 2 --lr-decay linear".split()]
    close(*both(replayed, w.main, 8, *flags))
    graph, eager = timeless("graph"), timeless("eager")
    assert len(graph) == len(eager) == 8
    for a, b in zip(graph, eager):
        assert [float(v) for v in a.values()] == pytest.approx([float(v) for v in b.values()], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "name, more",
    [
        ("dcgan", "--d-norm batch --upsample nearest --upsample-kernel 5"),
        ("dcgan", "--loss relativistic --r2 1 --upsample bilinear"),
        ("dcgan", "--loss minimax --r1 0 --gp 0.5"),
        ("cdcgan", "--d-ignores-label"),
        ("conditional", "--d-norm none --d-dropout 0.3"),
        ("wgan_clip", "--g-norm layer --optimizer rmsprop"),
        ("unrolled", "--inner adam --k 3 --loss minimax"),
        ("mdgan", "--loss saturating --mixture published"),
        ("bigan", "--prior uniform"),
    ],
)
def test_captured_equals_eager_with_a_methods_own_flags(replayed, name, more):
    case = CASES[name]
    close(*both(replayed, case.main, 8, *case.tiny, *CUDA, *more.split(), "--steps", "8"))


def test_the_graph_is_the_default(replayed, w):
    assert replayed(w.main, *FLAGS, "--steps", "8", "--run-dir", "a") == 8 - 3


def test_z_is_the_same_eager_replayed_and_resumed(replayed, w, monkeypatch):
    """The noise of each update of G, which the step writes into a buffer that outlives it."""
    sample_z = w.sample_z
    add = metrics.Study.add
    seen = {}
    steady = [*FLAGS, "--lr-decay", "none"]

    def run(name, replays, *flags):
        buffer = torch.zeros(16, 6, device="cuda")
        seen[name] = []

        def watched(args, n, device, generator=None):
            z = sample_z(args, n, device, generator)
            if generator is None:
                buffer.copy_(z)
            return z

        def noted(study, losses):
            add(study, losses)
            seen[name].append(buffer.cpu().clone())

        with monkeypatch.context() as m:
            m.setattr(w.module, "sample_z", watched)
            m.setattr(metrics.Study, "add", noted)
            assert replayed(w.main, *flags) == replays

    run("eager", 0, *steady, "--steps", "12", "--no-graph", "--run-dir", "eager")
    run("graph", 12 - 3, *steady, "--steps", "12", "--graph", "--run-dir", "graph")
    run("first", 6 - 3, *steady, "--steps", "6", "--graph", "--run-dir", "part")
    run("rest", 6 - 3, "--resume", "part/last.pt", "--steps", "12", "--graph", "--device", "cuda")
    assert len(seen["eager"]) == 12
    for i, z in enumerate(seen["eager"]):
        assert torch.equal(z, seen["graph"][i]), i
        assert torch.equal(z, (seen["first"] + seen["rest"])[i]), i
    assert not torch.equal(seen["graph"][10], seen["graph"][11])


@EVERY
def test_resume_under_graphs(replayed, w):
    flags = [*w.tiny, *CUDA, "--lr-decay", "none", "--graph"]
    assert replayed(w.main, *flags, "--steps", "12", "--run-dir", "whole") == 12 - 3
    assert replayed(w.main, *flags, "--steps", "6", "--run-dir", "half") == 6 - 3
    resumed = ["--resume", "half/last.pt", "--steps", "12", "--device", "cuda", "--graph"]
    assert replayed(w.main, *resumed) == 6 - 3
    close(tensors("half/last.pt"), tensors("whole/last.pt"))


def test_a_run_on_a_gpu_is_scored(w, monkeypatch):
    """By a real network, which a run trains on its 300 digits: G is on the GPU, the scores are made on the CPU."""
    monkeypatch.setattr(metrics, "FEWEST", 50)
    w.main([*FLAGS, "--steps", "8", "--run-dir", "a"])
    scores = json.loads(Path("a/scores.json").read_text())["last.pt"]
    assert scores["n_fake"] == scores["n_real"] == 300
    assert scores["fid"] > 10 * scores["floor"] and 0 <= scores["coverage"] <= 1


def test_scores_and_reloads_leave_the_graph_as_it_is(replayed, w, monkeypatch):
    """At an evaluation the average makes images; at the end last.pt and best.pt are loaded into the same networks."""
    flags = [*FLAGS, "--steps", "12", "--eval-every", "4", "--sample-every", "3"]
    runs = []
    for flag, replays in (("--graph", 12 - 3), ("--no-graph", 0)):
        scripted_judge(monkeypatch, [50, 40, 60], w)
        assert replayed(w.main, *flags, flag, "--run-dir", flag[2:]) == replays
        runs.append(flag[2:])
    for name in ("last.pt", "best.pt"):
        a, b = (checkpoint(f"{run}/{name}") for run in runs)
        assert a["step"] == b["step"] == {"last.pt": 12, "best.pt": 8}[name]
        close(a, b)


BAD = """
import sys
sys.path.insert(0, {root!r})
import torch
import metrics
import wgan_gp
kind = sys.argv[1]
render = metrics.render_digits
metrics.render_digits = lambda n, seed: render(300, seed)
metrics.FEWEST = 301
loss = wgan_gp.generator_loss


def bad(score):
    if torch.cuda.is_current_stream_capturing():
        if kind == "raised":
            raise RuntimeError("not in\\na capture")
        score.sum().item()
    return loss(score)


wgan_gp.generator_loss = bad
wgan_gp.main(sys.argv[2:])
"""


@pytest.mark.parametrize("kind", ["raised", "sync"])
def test_a_failed_capture_is_one_line_that_names_the_way_out(kind):
    """In a process of its own, as a broken capture leaves traces: the step raises, or waits for the device. What was
    saved before it resumes eagerly."""

    def call(*flags):
        command = [sys.executable, "-c", BAD.format(root=str(ROOT)), kind, *flags]
        return subprocess.run(command, capture_output=True, text=True)

    done = call(*FLAGS, *"--steps 8 --graph --run-dir a --checkpoint-every 1".split())
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and "--no-graph" in errors[0], done.stderr
    assert checkpoint("a/last.pt")["step"] == 3 and "samples.png" not in os.listdir("a")
    done = call("--resume", "a/last.pt", "--no-graph", "--device", "cuda")
    assert done.returncode == 0, done.stderr
    assert checkpoint("a/last.pt")["step"] == 8


@EVERY
def test_checkpoints_move_between_cpu_and_cuda(w):
    """And load() gives a generator on the CPU, whatever made it."""
    cpu = [*w.tiny, "--device", "cpu"]
    w.main([*cpu, "--steps", "4", "--run-dir", "cpu"])
    w.main(["--resume", "cpu/last.pt", "--steps", "12", "--device", "cuda", "--run-dir", "cuda"])
    w.main(["--resume", "cuda/last.pt", "--steps", "14", "--device", "cpu", "--run-dir", "back"])
    assert [checkpoint(f"{run}/last.pt")["step"] for run in ("cpu", "cuda", "back")] == [4, 12, 14]
    updates = [leaves(checkpoint(f"{run}/last.pt")["opt_d"]["state"]) for run in ("cpu", "cuda", "back")]
    assert [min(t.item() for t in part if t.dim() == 0) for part in updates] == [4, 12, 14]
    assert all(p.isfinite().all() for p in leaves(checkpoint("back/last.pt")["G"]))
    assert next(w.load("cuda/last.pt").parameters()).device.type == "cpu"


@EVERY
def test_amp_under_graphs_equals_amp_eager(replayed, w):
    flags = [*w.tiny, *CUDA, "--steps", "8"]
    graph, eager = both(replayed, w.main, 8, *flags, "--amp")
    close(graph, eager, atol=1e-3)
    w.main([*flags, "--run-dir", "exact"])
    exact = tensors("exact/last.pt")
    assert any(not torch.equal(p, q) for p, q in zip(leaves(graph["D"]), leaves(exact["D"])))


def test_the_graph_needs_at_most_twice_the_memory(replayed, w):
    peaks = []
    for flag, replays in (("--no-graph", 0), ("--graph", 8 - 3)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        flags = [*FLAGS, *"--ngf 32 --ndf 32 --batch-size 64 --steps 8".split()]
        assert replayed(w.main, *flags, flag, "--run-dir", flag[2:]) == replays
        peaks.append(torch.cuda.max_memory_reserved())
    assert peaks[1] < 2 * peaks[0] + 2**26, [p >> 20 for p in peaks]


def test_two_scores_of_one_network_are_the_same_on_both_devices():
    """The network that scores computes in float32, not TF32, whatever the training's own setting is."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    net = metrics.Classifier(1, 10).eval()
    x = torch.randint(256, (200, 1, 28, 28), dtype=torch.uint8)
    here = net.embed(x)
    there = net.to("cuda").embed(x)
    for a, b in zip(here, there):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)
    assert torch.get_float32_matmul_precision() == "high"
