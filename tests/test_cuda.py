"""On a CUDA GPU: python -m pytest -m cuda. Captured equals eager, through resumes and reloads; each test that compares
the two counts the replays, since without a capture it would compare eager with eager. No data is needed."""
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_run import CASES, EVERY, ROOT, TINY, losses, scripted_judge, small, tensors, w  # noqa: F401  fixtures
from test_speed import leaves

import wgan_gp

pytestmark = pytest.mark.cuda
FLAGS = [*TINY, "--device", "cuda", "--batch-size", "16", "--lr-decay", "linear"]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 throughout and the same kernels each time, so that only the graph can make a difference."""
    def strict(pick, args):
        device = pick(args)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        return device

    for script in {case.module for case in CASES.values()}:
        monkeypatch.setattr(script, "pick_device", functools.partial(strict, script.pick_device))
    yield
    torch.backends.cudnn.deterministic = False


@pytest.fixture
def replayed(monkeypatch):
    """replayed(main, flags) runs it; returns how many times a graph was replayed."""
    count, replay = [0], torch.cuda.CUDAGraph.replay

    def counted(graph):
        count[0] += 1
        replay(graph)

    def run(main, *flags):
        before = count[0]
        main([*flags])
        return count[0] - before

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return run


def close(a, b, atol=1e-5):
    for key in ("nets", "ema", "opts"):
        x, y = leaves(a[key]), leaves(b[key])
        assert len(x) == len(y) > 5
        for p, q in zip(x, y):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=atol)


def both(replayed, main, iterations, *flags):
    """The checkpoints of the same run captured and eager; the noise too: the generator ends in the same state."""
    assert replayed(main, *flags, "--graph", "--run-dir", "graph") == iterations - 3  # three are eager, and count
    assert replayed(main, *flags, "--no-graph", "--run-dir", "eager") == 0
    graph, eager = tensors("graph/last.pt"), tensors("eager/last.pt")
    assert torch.equal(graph["rng"]["cuda"], eager["rng"]["cuda"])
    return graph, eager


@pytest.mark.parametrize("more, iterations", [
    ([], 8), (["--arch", "mlp"], 8), (["--g-steps", "2", "--prior", "uniform", "--d-steps", "2"], 20)])
def test_captured_equals_eager(replayed, more, iterations):
    """40 critic updates."""
    close(*both(replayed, wgan_gp.main, iterations, *FLAGS, *more, "--steps", "40"))
    assert len(losses("graph")) == len(losses("eager")) >= 6
    for a, b in zip(losses("graph"), losses("eager")):
        assert [float(v) for v in a[:7]] == pytest.approx([float(v) for v in b[:7]], rel=1e-4, abs=1e-5)


@EVERY
@pytest.mark.parametrize("arch", ["dcgan", "mlp"])
def test_every_script_captured_equals_eager(replayed, w, arch):  # noqa: F811
    flags = [*w.tiny, "--device", "cuda", "--batch-size", "16", "--steps", "40"]
    close(*both(replayed, w.main, 8, *flags, "--arch", arch))


def test_the_graph_is_the_default(replayed):
    assert replayed(wgan_gp.main, *FLAGS, "--steps", "40", "--run-dir", "a") == 8 - 3


def test_a_dry_run_replays(replayed):
    assert replayed(wgan_gp.main, *FLAGS, "--dry-run", "--graph", "--run-dir", "a") == 1


def test_z_is_the_same_eager_replayed_and_resumed(monkeypatch, replayed):
    """The noise of each G update, written by step() into a buffer that outlives it."""
    sample, seen = wgan_gp.sample_z, {}

    def run(name, iterations, *flags):
        zs, buffer, record = [], torch.zeros(16, 6, device="cuda"), wgan_gp.Run.record

        def watched(args, n, device, generator=None):
            z = sample(args, n, device, generator)
            if generator is None: buffer.copy_(z)
            return z

        def noted(r, values):
            record(r, values)
            zs.append((r.step, buffer.cpu().clone()))

        with monkeypatch.context() as m:
            m.setattr(wgan_gp, "sample_z", watched)
            m.setattr(wgan_gp.Run, "record", noted)
            assert replayed(wgan_gp.main, *flags) == iterations
        seen[name] = dict(zs)

    run("eager", 0, *FLAGS, "--steps", "60", "--no-graph", "--run-dir", "eager")
    run("graph", 12 - 3, *FLAGS, "--steps", "60", "--graph", "--run-dir", "graph")
    run("first", 6 - 3, *FLAGS, "--steps", "30", "--graph", "--run-dir", "part")
    run("rest", 6 - 3, "--resume", "part/last.pt", "--steps", "60", "--graph", "--device", "cuda")
    for step, z in seen["eager"].items():
        assert torch.equal(z, seen["graph"][step]), step
        assert torch.equal(z, (seen["first"] if step <= 30 else seen["rest"])[step]), step
    assert not torch.equal(seen["graph"][40], seen["graph"][45])


def test_resume_under_graphs(replayed):
    flags = [*FLAGS[:-2], "--graph"]
    assert replayed(wgan_gp.main, *flags, "--steps", "60", "--run-dir", "whole") == 12 - 3
    assert replayed(wgan_gp.main, *flags, "--steps", "30", "--run-dir", "half") == 6 - 3
    resumed = ["--resume", "half/last.pt", "--steps", "60", "--device", "cuda", "--graph"]
    assert replayed(wgan_gp.main, *resumed) == 6 - 3
    close(tensors("half/last.pt"), tensors("whole/last.pt"))


def test_back_to_best_under_graphs(monkeypatch, replayed):
    flags = [*FLAGS[:-2], "--steps", "50", "--eval-every", "5", "--lr-decay", "best-fid", "--patience", "2"]
    for flag, iterations in (("--graph", 10 - 3), ("--no-graph", 0)):
        scripted_judge(monkeypatch, [50, 40, 45, 46, 30, 31, 32])
        assert replayed(wgan_gp.main, *flags, flag, "--run-dir", flag[2:]) == iterations
    close(tensors("graph/last.pt"), tensors("no-graph/last.pt"))


@pytest.mark.parametrize("kind", ["raised", "sync"])
def test_a_failed_capture_is_one_line_that_names_the_way_out(kind):
    """In a process of its own, as a broken capture leaves traces: the step raises, or waits for the device. What was
    saved before it resumes eagerly."""
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); kind = sys.argv.pop(1)\n"
            "import torch, wgan_gp as w\n"
            "render = w.render_digits; w.render_digits = lambda n, seed: render(300, seed)\n"
            "loss = w.generator_loss\n"
            "def bad(score):\n"
            "    if torch.cuda.is_current_stream_capturing():\n"
            "        if kind == 'raised': raise RuntimeError('not in\\na capture')\n"
            "        score.sum().item()\n"
            "    return loss(score)\n"
            "w.generator_loss = bad\n"
            "w.main(sys.argv[1:])")

    def call(*flags):
        return subprocess.run([sys.executable, "-c", code, str(ROOT), kind, *flags], capture_output=True, text=True)

    done = call(*FLAGS, "--steps", "40", "--graph", "--run-dir", "a", "--checkpoint-every", "5")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and "--no-graph" in errors[0], done.stderr
    assert torch.load("a/last.pt", weights_only=True)["step"] == 15 and "samples.png" not in os.listdir("a")
    done = call("--resume", "a/last.pt", "--no-graph", "--device", "cuda")
    assert done.returncode == 0, done.stderr
    assert torch.load("a/last.pt", weights_only=True)["step"] == 40


def test_checkpoints_move_between_cpu_and_cuda():
    cpu = [*FLAGS, "--device", "cpu"]
    wgan_gp.main([*cpu, "--steps", "20", "--run-dir", "cpu"])
    wgan_gp.main(["--resume", "cpu/last.pt", "--steps", "60", "--device", "cuda", "--run-dir", "to_cuda"])
    wgan_gp.main(["--resume", "to_cuda/last.pt", "--steps", "70", "--device", "cpu", "--run-dir", "back"])
    assert torch.load("back/last.pt", weights_only=True)["step"] == 70
    start, moved = tensors("cpu/last.pt"), tensors("to_cuda/last.pt")
    assert all(v.device.type == "cpu" for v in leaves(torch.load("to_cuda/last.pt", map_location="cpu")["nets"]))
    assert leaves(moved["opts"]["d"])[0].item() == 60 and leaves(start["opts"]["d"])[0].item() == 20
    assert all(p.isfinite().all() for p in leaves(tensors("back/last.pt")["nets"]))


def test_amp_under_graphs_equals_amp_eager(replayed):
    graph, eager = both(replayed, wgan_gp.main, 8, *FLAGS, "--amp", "--steps", "40")
    close(graph, eager, atol=1e-3)
    wgan_gp.main([*FLAGS, "--steps", "40", "--run-dir", "exact"])
    assert not torch.equal(graph["nets"]["D"]["0.weight"], tensors("exact/last.pt")["nets"]["D"]["0.weight"])


def test_the_graph_needs_at_most_twice_the_memory(replayed):
    peaks = []
    for flag, iterations in (("--no-graph", 0), ("--graph", 8 - 3)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        flags = [*FLAGS, "--ngf", "32", "--ndf", "32", "--batch-size", "64", "--steps", "40"]
        assert replayed(wgan_gp.main, *flags, flag, "--run-dir", flag[2:]) == iterations
        peaks.append(torch.cuda.max_memory_reserved())
    assert peaks[1] < 2 * peaks[0] + 2**26, [p >> 20 for p in peaks]
    assert Path("graph/last.pt").exists()


def test_two_scores_of_one_network_are_the_same_on_both_devices():
    """The network that scores computes in float32, not TF32, whatever the training's own setting is."""
    import metrics
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    net, x = metrics.Classifier(1, 10).eval(), torch.randint(256, (200, 1, 28, 28), dtype=torch.uint8)
    here = net.embed(x)
    there = net.to("cuda").embed(x)
    for a, b in zip(here, there): torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)
    assert torch.get_float32_matmul_precision() == "high"
