"""What makes the step fast must not change what it computes: graphs, bfloat16, several ranks. On the CPU; the same on a
GPU in test_cuda.py."""
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_run import CASES, EVERY, ROOT, TINY, losses, same, scripted_judge, small, tensors, w  # noqa: F401  fixtures

import wgan_gp

# a driver for torchrun: float64, no batch norm (it would see a rank's rows only), random pictures, and a mishap
DRIVER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import {name} as w
torch.set_default_dtype(torch.float64)
noise = lambda n, seed: torch.randint(0, 256, (300, 1, 28, 28), dtype=torch.uint8,
                                      generator=torch.Generator().manual_seed(seed))
w.render_digits = lambda n, seed: (noise(n, seed), torch.arange(300) % 10)
w.nn.BatchNorm1d = lambda n: torch.nn.Identity()
w.Run.figures = lambda run: None
w.SCRIPT = Path({alone!r})
record, (step, rank, number) = w.Run.record, map(int, sys.argv.pop(1).split(","))
def mishap(run, values):
    record(run, values)
    if run.step == step and w.RANK == rank:
        os.kill(os.getpid(), number)
w.Run.record = mishap
w.main(sys.argv[1:])
"""
FLAGS = ["--arch", "mlp", "--batch-size", "16", "--d-steps", "2", "--device", "cpu", "--log-every", "20",
         "--sample-every", "0", "--eval-every", "0", "--checkpoint-every", "2"]


def ranks(n, mishap, *flags, name="wgan_gp"):
    """(exit code, output, seconds) of the driver under torchrun with n ranks, or on its own."""
    Path("driver.py").write_text(DRIVER.format(root=str(ROOT), name=name, alone=str(CASES[name].SCRIPT)))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(n)] if n > 1 else []
    start, env = time.time(), {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "driver.py", mishap, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    return done.returncode, done.stdout + done.stderr, time.time() - start


def test_two_ranks_train_as_one_process_through_a_signal_and_a_resume():
    """20 iterations in float64; the second rank alone is told to stop in the third: both leave after the tenth."""
    assert ranks(1, "0,0,0", *FLAGS, "--steps", "40", "--run-dir", "one")[0] == 0
    code, out, _ = ranks(2, f"6,1,{signal.SIGTERM.value}", *FLAGS, "--steps", "40", "--run-dir", "two")
    assert code != 0 and torch.load("two/last.pt", weights_only=True)["step"] == 20, out
    code, out, _ = ranks(2, "0,0,0", "--resume", "two/last.pt")
    assert code == 0, out
    rows = equal_but_for_rounding("one", "two")
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == ["20", "40"]
    for a, b in zip(*rows):  # d_acc is over pairs within a rank, so not the same
        assert all(float(a[k]) == pytest.approx(float(b[k]), rel=1e-5) for k in ("d_loss", "g_loss", "grad_norm"))


def equal_but_for_rounding(*runs):
    """The rows of both logs."""
    one, two = (tensors(f"{d}/last.pt") for d in runs)
    assert torch.equal(one["rng"]["cpu"], two["rng"]["cpu"])
    for key in ("nets", "opts"):
        for name in one[key]:
            a, b = (leaves(c[key][name]) for c in (one, two))
            assert len(a) == len(b) >= 5
            for x, y in zip(a, b):
                assert x.dtype == torch.float64 or x.dim() == 0
                torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
    return [list(csv.DictReader(open(f"{d}/log.csv"))) for d in runs]


@pytest.mark.parametrize("name, flags", [("unrolled", ["--k", "0", "--loss", "minimax"]), ("mdgan", [])])
def test_two_ranks_of_the_other_methods(name, flags):
    """With --k above 0 each rank looks ahead on its own rows, so that two ranks are another method than one."""
    flags = [*FLAGS, *flags, "--steps", "8", "--log-every", "4", "--ema", "0.5"]
    for n, run in ((1, "one"), (2, "two")):
        code, out, _ = ranks(n, "0,0,0", *flags, "--run-dir", run, name=name)
        assert code == 0, out
    one, two = equal_but_for_rounding("one", "two")
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        assert all(float(a[k]) == pytest.approx(float(b[k]), rel=1e-5) for k in ("d_loss", "g_loss"))


def leaves(tree):
    if torch.is_tensor(tree):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [leaf for v in values for leaf in leaves(v)]


def test_a_killed_rank_ends_the_others_within_a_minute():
    code, out, seconds = ranks(2, f"6,1,{signal.SIGKILL.value}", *FLAGS, "--steps", "1000000", "--run-dir", "two")
    assert code != 0 and seconds < 60, out
    assert torch.load("two/last.pt", weights_only=True)["step"] >= 4


def test_rows_of_a_rank(monkeypatch):
    whole, parts = torch.arange(12).view(6, 2), []
    monkeypatch.setattr(wgan_gp, "WORLD", 3)
    for rank in range(3):
        monkeypatch.setattr(wgan_gp, "RANK", rank)
        parts.append(wgan_gp.own(whole))
    assert torch.equal(torch.cat(parts), whole) and all(len(p) == 2 for p in parts)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(wgan_gp, "WORLD", 3)
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main([*TINY, "--steps", "5"])
    assert stop.value.code == 2 and "3 ranks" in capsys.readouterr().err and not Path("runs").exists()


# bfloat16 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["mlp", "dcgan"])
def test_amp_rounds_products_and_nothing_else(arch):
    args = wgan_gp.parse_args([*TINY, "--arch", arch])
    torch.manual_seed(0)
    C, x = wgan_gp.make_critic(args, 1), torch.rand(8, 1, 28, 28) * 2 - 1
    seen = []
    for layer in C:
        layer.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    exact = C(x)
    assert set(seen) == {torch.float32}
    seen.clear()
    C.amp = True
    rounded = C(x)
    assert torch.bfloat16 in seen and rounded.dtype == torch.float32  # losses are float32
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < 0.03, error
    C.eval()
    assert torch.equal(C(x), exact)  # scores and samples are float32


@pytest.mark.parametrize("arch", ["mlp", "dcgan"])
def test_amp_keeps_gradients_and_the_penaltys_second_derivative(arch):
    """Against float32, by direction; with a forward under no_grad first, after which a cache of cast weights would have
    no gradient."""
    args = wgan_gp.parse_args([*TINY, "--arch", arch])
    torch.manual_seed(0)
    C, x = wgan_gp.make_critic(args, 1), torch.rand(8, 1, 28, 28) * 2 - 1
    grads = []
    for C.amp in (False, True):
        with torch.no_grad():
            C(x)
        C.zero_grad()
        penalty, norm = wgan_gp.gradient_penalty(C, x)
        assert penalty.dtype == norm.dtype == torch.float32
        (wgan_gp.critic_loss(C(x), C(-x)) + 10 * penalty).backward()
        # the last layer's bias has slope 0 here and nothing but rounding in it
        grads.append(torch.cat([p.grad.flatten() for p in C.parameters() if p.dim() > 1]))
    cosine = torch.nn.functional.cosine_similarity(*grads, dim=0).item()
    assert 0.995 < cosine < 1 - 1e-9, cosine


def test_amp_resumes_bit_for_bit_and_saves_float32():
    wgan_gp.main([*TINY, "--amp", "--steps", "20", "--run-dir", "whole"])
    wgan_gp.main([*TINY, "--amp", "--steps", "10", "--run-dir", "half"])
    wgan_gp.main(["--resume", "half/last.pt", "--steps", "20"])
    whole = tensors("whole/last.pt")
    same(tensors("half/last.pt"), whole)
    assert all(v.dtype in (torch.float32, torch.int64) for net in whole["nets"].values() for v in net.values())
    wgan_gp.main([*TINY, "--steps", "20", "--run-dir", "exact"])
    assert not torch.equal(tensors("exact/last.pt")["nets"]["D"]["0.weight"], whole["nets"]["D"]["0.weight"])


# the captured step, with a stand-in for the graph ---------------------------------------------------------------------


class FakeCuda:
    """Stands in for torch.cuda's graphs on the CPU. As with the real ones, a capture changes no tensor and no random
    state, and a replay reads and writes the memory that the tensors of step() had when it was captured."""

    def __init__(self, monkeypatch, script):
        self.step = self.values = self.memory = None
        self.replays = 0
        outer, real, pick = self, script.captured, script.pick_device

        class Graph:
            def replay(self):
                now = [t.data_ptr() for t in outer.tensors()]
                assert now == outer.memory, "a tensor of step() was replaced after capture"
                outer.replays += 1
                outer.values.copy_(outer.step())

        class Capture:
            def __init__(self, graph, stream=None):
                assert stream is outer.stream

            def __enter__(self):
                self.before = [t.clone() for t in outer.tensors()], torch.get_rng_state()

            def __exit__(self, *error):
                with torch.no_grad():
                    for t, old in zip(outer.tensors(), self.before[0]): t.copy_(old)
                outer.memory = [t.data_ptr() for t in outer.tensors()]
                torch.set_rng_state(self.before[1])

        class Stream:
            def wait_stream(self, other):
                pass

            def __enter__(self):
                pass

            def __exit__(self, *error):
                pass

        class Noise:
            clone_state = staticmethod(torch.get_rng_state)
            graphsafe_set_state = staticmethod(torch.set_rng_state)

        def captured(step, args, nets):
            def traced():
                self.values = step()
                return self.values

            def plain():
                return step()
            self.step, self.closure = plain, step.__closure__
            return real(traced, args, nets)

        def pick_graph(args):
            wanted, args.graph = args.graph, None
            device = pick(args)
            args.graph = wanted is None or wanted
            return device

        self.stream = Stream()
        for name, value in {"Stream": lambda: self.stream, "CUDAGraph": Graph, "graph": Capture,
                            "current_stream": Stream, "stream": lambda s: s, "current_device": lambda: 0,
                            "default_generators": [Noise]}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(script, "captured", captured)
        monkeypatch.setattr(script, "pick_device", pick_graph)

    def tensors(self):
        """All tensors that step() reaches, by the variables it closes over."""
        found = []
        for cell in self.closure:
            v = cell.cell_contents
            if torch.is_tensor(v):
                found.append(v)
            elif isinstance(v, torch.nn.Module):
                found += [*v.parameters(), *v.buffers()]
            elif isinstance(v, torch.optim.Optimizer):
                found += [t for state in v.state.values() for t in state.values()]
        return found


@pytest.fixture
def fake(monkeypatch, w):  # noqa: F811
    return FakeCuda(monkeypatch, w.module)


@EVERY
def test_graph_runs_equal_eager_ones(fake, w):  # noqa: F811
    flags = [*w.tiny, "--steps", "40", "--lr-decay", "linear"]
    w.main([*flags, "--run-dir", "graph"])
    assert fake.replays == 8 - 3  # three eager iterations count as training
    w.main([*flags, "--run-dir", "eager", "--no-graph"])
    assert fake.replays == 5
    same(tensors("graph/last.pt"), tensors("eager/last.pt"))
    assert losses("graph") == losses("eager")


@EVERY
def test_graph_resumes_and_mixes_with_eager(fake, w):  # noqa: F811
    w.main([*w.tiny, "--steps", "60", "--run-dir", "whole", "--no-graph"])
    w.main([*w.tiny, "--steps", "30", "--run-dir", "half"])
    w.main(["--resume", "half/last.pt", "--steps", "60"])
    assert fake.replays == 2 * (6 - 3)
    same(tensors("half/last.pt"), tensors("whole/last.pt"))


def test_back_to_best_writes_in_place(fake, monkeypatch):
    runs = []
    for flag in ("--graph", "--no-graph"):
        scripted_judge(monkeypatch, [50, 40, 45, 46, 30, 31, 32])
        flags = [*TINY, "--steps", "50", "--eval-every", "5", "--lr-decay", "best-fid", "--patience", "2"]
        wgan_gp.main([*flags, flag, "--run-dir", flag[2:]])
        runs.append(tensors(f"{flag[2:]}/last.pt"))
    assert fake.replays == 10 - 3
    same(*runs)


def test_a_failed_capture_goes_on_eagerly_from_the_same_state(fake, monkeypatch, capsys):
    loss, calls = wgan_gp.generator_loss, [0]

    def uncapturable(score):
        calls[0] += 1
        if calls[0] == 4:  # after three eager iterations
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return loss(score)

    monkeypatch.setattr(wgan_gp, "generator_loss", uncapturable)
    wgan_gp.main([*TINY, "--steps", "40", "--run-dir", "graph"])
    err = capsys.readouterr().err
    assert fake.replays == 0 and err.count("\n") == 1 and "not permitted when stream" in err
    monkeypatch.setattr(wgan_gp, "generator_loss", loss)
    wgan_gp.main([*TINY, "--steps", "40", "--run-dir", "eager", "--no-graph"])
    same(tensors("graph/last.pt"), tensors("eager/last.pt"))


def test_the_step_reads_only_static_buffers(fake, monkeypatch):
    """The tensors step() closes over are x and the counter of averages, the same memory all along; networks and
    optimizers aside it reaches nothing of the run."""
    wgan_gp.main([*TINY, "--steps", "20", "--run-dir", "a"])
    names = {type(c.cell_contents).__name__ for c in fake.closure}
    assert names <= {"Tensor", "Net", "Adam", "Namespace", "int", "device"}
    free = [c.cell_contents for c in fake.closure if torch.is_tensor(c.cell_contents)]
    assert sorted(tuple(t.shape) for t in free) == [(), (5, 8, 1, 28, 28)]


def test_graph_without_cuda_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main([*TINY, "--steps", "5", "--graph"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not Path("runs").exists()


def test_the_rate_of_a_captured_adam_is_written_in_place():
    run = object.__new__(wgan_gp.Run)
    run.args, run.step, run.total = wgan_gp.parse_args([*TINY, "--lr-g", "3e-4", "--lr-decay", "linear"]), 5, 10
    weight = torch.nn.Parameter(torch.zeros(1))
    run.opts = {k: torch.optim.Adam([weight], 1.0) for k in "gd"}
    rate = run.opts["g"].param_groups[0]["lr"] = torch.tensor(1.0)
    run.set_lr()
    assert run.opts["g"].param_groups[0]["lr"] is rate and rate.item() == pytest.approx(1.5e-4)
    assert run.opts["d"].param_groups[0]["lr"] == pytest.approx(5e-5)
