"""On a CUDA GPU: python -m pytest -m cuda. Captured equals eager, through resumes and reloads. No data is needed."""
import functools
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


def close(a, b, atol=1e-5):
    for key in ("nets", "ema", "opts"):
        x, y = leaves(a[key]), leaves(b[key])
        assert len(x) == len(y) > 5
        for p, q in zip(x, y):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("more", [[], ["--arch", "mlp"], ["--g-steps", "2", "--prior", "uniform", "--d-steps", "2"]])
def test_captured_equals_eager(more):
    """40 critic updates; the noise too: the generator ends in the same state."""
    for flag in ("--graph", "--no-graph"):
        wgan_gp.main([*FLAGS, *more, "--steps", "40", flag, "--run-dir", flag[2:]])
    graph, eager = tensors("graph/last.pt"), tensors("no-graph/last.pt")
    assert torch.equal(graph["rng"]["cuda"], eager["rng"]["cuda"])
    close(graph, eager)
    for a, b in zip(losses("graph"), losses("no-graph")):
        assert [float(v) for v in a[:7]] == pytest.approx([float(v) for v in b[:7]], rel=1e-4, abs=1e-5)


@EVERY
def test_every_script_captured_equals_eager(w):  # noqa: F811
    for flag in ("--graph", "--no-graph"):
        w.main([*w.tiny, "--device", "cuda", "--batch-size", "16", "--steps", "40", flag, "--run-dir", flag[2:]])
    graph, eager = tensors("graph/last.pt"), tensors("no-graph/last.pt")
    assert torch.equal(graph["rng"]["cuda"], eager["rng"]["cuda"])
    close(graph, eager)


def test_the_graph_is_the_default_and_replays(monkeypatch):
    replays, replay = [0], torch.cuda.CUDAGraph.replay

    def counted(graph):
        replays[0] += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    wgan_gp.main([*FLAGS, "--steps", "40", "--run-dir", "a"])
    assert replays[0] == 8 - 3


def test_z_is_the_same_eager_replayed_and_resumed(monkeypatch):
    """The noise of each G update, written by step() into a buffer that outlives it."""
    sample, seen = wgan_gp.sample_z, {}

    def run(name, *flags):
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
            wgan_gp.main([*flags])
        seen[name] = dict(zs)

    run("eager", *FLAGS, "--steps", "60", "--no-graph", "--run-dir", "eager")
    run("graph", *FLAGS, "--steps", "60", "--run-dir", "graph")
    run("first", *FLAGS, "--steps", "30", "--run-dir", "part")
    run("rest", "--resume", "part/last.pt", "--steps", "60", "--device", "cuda")
    for step, z in seen["eager"].items():
        assert torch.equal(z, seen["graph"][step]), step
        assert torch.equal(z, (seen["first"] if step <= 30 else seen["rest"])[step]), step
    assert not torch.equal(seen["graph"][40], seen["graph"][45])


def test_resume_under_graphs():
    flags = [*FLAGS[:-2]]
    wgan_gp.main([*flags, "--steps", "60", "--run-dir", "whole"])
    wgan_gp.main([*flags, "--steps", "30", "--run-dir", "half"])
    wgan_gp.main(["--resume", "half/last.pt", "--steps", "60", "--device", "cuda"])
    close(tensors("half/last.pt"), tensors("whole/last.pt"))


def test_back_to_best_under_graphs(monkeypatch):
    flags = [*FLAGS[:-2], "--steps", "50", "--eval-every", "5", "--lr-decay", "best-fid", "--patience", "2"]
    for flag in ("--graph", "--no-graph"):
        scripted_judge(monkeypatch, [50, 40, 45, 46, 30, 31, 32])
        wgan_gp.main([*flags, flag, "--run-dir", flag[2:]])
    close(tensors("graph/last.pt"), tensors("no-graph/last.pt"))


@pytest.mark.parametrize("kind", ["raised", "sync"])
def test_a_failed_capture_goes_on_eagerly(kind):
    """In a process of its own, as a broken capture can leave traces: the step raises, or waits for the device."""
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); kind = sys.argv.pop(1)\n"
            "import torch, wgan_gp as w\n"
            "render = w.render_digits; w.render_digits = lambda n, seed: render(300, seed)\n"
            "loss = w.generator_loss\n"
            "def bad(score):\n"
            "    if torch.cuda.is_current_stream_capturing():\n"
            "        if kind == 'raised': raise RuntimeError('not in a capture')\n"
            "        score.sum().item()\n"
            "    return loss(score)\n"
            "w.generator_loss = bad\n"
            "torch.backends.cudnn.deterministic = True\n"
            "w.main(sys.argv[1:])")
    for flag in ("--graph", "--no-graph"):
        done = subprocess.run([sys.executable, "-c", code, str(ROOT), kind, *FLAGS, "--steps", "40", flag,
                               "--eval-every", "0", "--run-dir", flag[2:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("no CUDA graph" in done.stderr) == (flag == "--graph")
    graph, eager = tensors("graph/last.pt"), tensors("no-graph/last.pt")
    assert torch.equal(graph["rng"]["cuda"], eager["rng"]["cuda"])
    close(graph, eager, atol=1e-3)  # TF32 and benchmarked kernels here


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


def test_amp_under_graphs_equals_amp_eager():
    for flag in ("--graph", "--no-graph"):
        wgan_gp.main([*FLAGS, "--amp", "--steps", "40", flag, "--run-dir", flag[2:]])
    close(tensors("graph/last.pt"), tensors("no-graph/last.pt"), atol=1e-3)
    wgan_gp.main([*FLAGS, "--steps", "40", "--run-dir", "exact"])
    a, b = (tensors(f"{d}/last.pt")["nets"]["D"]["0.weight"] for d in ("graph", "exact"))
    assert not torch.equal(a, b)


def test_the_graph_needs_at_most_twice_the_memory():
    peaks = []
    for flag in ("--no-graph", "--graph"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        wgan_gp.main([*FLAGS, "--ngf", "32", "--ndf", "32", "--batch-size", "64", "--steps", "40", flag,
                      "--run-dir", flag[2:]])
        peaks.append(torch.cuda.max_memory_reserved())
    assert peaks[1] < 2 * peaks[0] + 2**26, [p >> 20 for p in peaks]
    assert Path("graph/last.pt").exists()
