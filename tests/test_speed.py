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

# a driver for torchrun: float64, no batch norm (it would see a rank's rows only), random pictures, and mishaps
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
w.SCRIPT = Path({alone!r})
{more}
record, mishaps = w.Run.record, [tuple(map(int, m.split(","))) for m in sys.argv.pop(1).split()]
def mishap(run, values):
    record(run, values)
    for step, rank, number in mishaps:
        if run.step == step and w.RANK == rank: os.kill(os.getpid(), number)
w.Run.record = mishap
w.main(sys.argv[1:])
"""
FLAGS = ["--paper", "--arch", "mlp", "--batch-size", "16", "--d-steps", "2", "--device", "cpu", "--log-every", "20",
         "--sample-every", "0", "--eval-every", "0", "--checkpoint-every", "2"]


def ranks(n, mishaps, *flags, name="wgan_gp", more=""):
    """(exit code, output, seconds) of the driver under torchrun with n ranks, or on its own. Mishaps: STEP,RANK,SIGNAL
    with spaces between; more: lines of code."""
    Path("driver.py").write_text(DRIVER.format(root=str(ROOT), name=name, alone=str(CASES[name].SCRIPT), more=more))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(n)] if n > 1 else []
    start, env = time.time(), {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "driver.py", mishaps, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    return done.returncode, done.stdout + done.stderr, time.time() - start


def test_two_ranks_train_as_one_process_through_a_signal_and_a_resume():
    """30 iterations in float64. Both ranks are told to stop, as by Ctrl-C, but not in the same iteration, the second or
    third: both leave after the tenth. Resumed, a signal that reaches the second rank alone does not part them."""
    flags = [*FLAGS, "--penalty-share", ".25", "--steps", "60"]
    assert ranks(1, "", *flags, "--run-dir", "one")[0] == 0
    number = signal.SIGTERM.value
    code, out, _ = ranks(2, f"4,1,{number} 6,0,{number}", *flags, "--run-dir", "two")
    assert code != 0 and torch.load("two/last.pt", weights_only=True)["step"] == 20, out
    assert "stopped at step 20" in out and "Error" not in out.split("ChildFailedError")[0], out
    code, out, _ = ranks(2, f"24,1,{number}", "--resume", "two/last.pt")
    assert code == 0, out
    rows = equal_but_for_rounding("one", "two")
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == ["20", "40", "60"]
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


def test_two_ranks_go_back_to_the_best_checkpoint_as_one_process():
    """Only rank 0 scores; the others must hear of it. Best at step 10, given up at 30."""
    judge = f"""
import metrics
class Study:
    fids = [50, 60, 70, 40]
    def __init__(self, *a): pass
    def evaluate(self, step): return {{"fid_train": self.fids.pop(0)}}
    def figures(self): pass
    def last_scores(self, restore): pass
metrics.Study, w.SCRIPT = Study, Path({str(ROOT)!r}) / "wgan_gp.py"
"""
    flags = [*FLAGS, "--steps", "40", "--eval-every", "10", "--lr-decay", "best-fid", "--patience", "2"]
    for n, run in ((1, "one"), (2, "two")):
        code, out, _ = ranks(n, "", *flags, "--run-dir", run, more=judge)
        assert code == 0, out
    for rows in equal_but_for_rounding("one", "two"):
        assert [(r["step"], r["lr_g"]) for r in rows if r["lr_g"]] == [("20", "0.0001"), ("40", "5e-05")]


@pytest.mark.parametrize("name, flags", [("unrolled", ["--k", "0", "--loss", "minimax"]), ("mdgan", [])])
def test_two_ranks_of_the_other_methods(name, flags):
    """With --k above 0 each rank looks ahead on its own rows, so that two ranks are another method than one."""
    flags = [*FLAGS, *flags, "--steps", "8", "--log-every", "4", "--ema", "0.5"]
    for n, run in ((1, "one"), (2, "two")):
        code, out, _ = ranks(n, "", *flags, "--run-dir", run, name=name)
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


@pytest.mark.parametrize("prior", ["normal", "uniform"])
def test_ranks_share_the_noise_and_the_batch_of_one_process(prior, monkeypatch):
    """z, the numbers of rand() and the batch of three ranks are those of one process, every third row to each: so the
    first rows of all, which --penalty-share takes, are the first rows of one."""
    args = wgan_gp.parse_args([*TINY, "--batch-size", "6", "--prior", prior, "--flip"])

    def seen(rows):
        torch.manual_seed(0)
        z, u = wgan_gp.sample_z(args, rows, "cpu"), wgan_gp.rand(rows, 1, 2, like=torch.zeros(1, dtype=torch.float64))
        batch = wgan_gp.Batches(args, torch.device("cpu"))
        assert batch.buffer.shape == (5, rows, 1, 28, 28) and batch.per_epoch == 50
        batch.step = 49
        return z, u, *batch(), *batch()

    whole, parts = seen(6), []
    monkeypatch.setattr(wgan_gp, "from_rank_0", lambda value=None: value)
    monkeypatch.setattr(wgan_gp, "WORLD", 3)
    for rank in range(3):
        monkeypatch.setattr(wgan_gp, "RANK", rank)
        parts.append(seen(2))
    assert whole[0].shape == (6, 6) and whole[1].dtype == torch.float64 and whole[1].shape == (6, 1, 2)
    for one, three in zip(whole, zip(*parts)):
        assert all(len(p) == 2 for p in three) and torch.equal(torch.stack(three, 1).flatten(0, 1), one)
    args = wgan_gp.parse_args([*TINY, "--seed", "9"])
    z = wgan_gp.sample_z(args, 5, "cpu", wgan_gp.seeded(9, 1))  # of figures and scores: whole on every rank
    assert z.shape == (5, 6)


WAITING = """
import sys, time
sys.path.insert(0, {root!r})
import torch
import wgan_gp as w
def load_data(*a):
    began = time.time()
    if not w.RANK: time.sleep(2)
    open(f"rank{{w.RANK}}", "w").write(f"{{began}} {{time.time()}}")
    return torch.zeros(64, 1, 28, 28, dtype=torch.uint8), torch.arange(64) % 10
w.load_data = load_data
args = w.parse_args(sys.argv[1:])
w.Batches(args, w.pick_device(args))
torch.distributed.destroy_process_group()
"""


def test_the_other_ranks_wait_while_rank_0_loads():
    """It may have to download or to decode; then they find what it left."""
    Path("waiting.py").write_text(WAITING.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "waiting.py", *TINY],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    (_, end), (began, _) = (map(float, Path(f"rank{r}").read_text().split()) for r in (0, 1))
    assert began >= end


def test_ranks_may_wait_for_hours(monkeypatch):
    """NCCL's own limit of ten minutes would end them while rank 0 decodes or scores."""
    asked = []
    monkeypatch.setattr(wgan_gp, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: asked.append((a, k)))
    wgan_gp.pick_device(wgan_gp.parse_args(TINY))
    ((backend,), more), = asked
    assert backend == "gloo" and more["timeout"].total_seconds() >= 6 * 3600


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
    D, x = wgan_gp.make_discriminator(args, 1), torch.rand(8, 1, 28, 28) * 2 - 1
    seen = []
    for layer in D:
        layer.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    exact = D(x)
    assert set(seen) == {torch.float32}
    seen.clear()
    D.amp = True
    rounded = D(x)
    assert torch.bfloat16 in seen and rounded.dtype == torch.float32  # losses are float32
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < 0.03, error
    D.eval()
    assert torch.equal(D(x), exact)  # scores and samples are float32


@pytest.mark.parametrize("arch", ["mlp", "dcgan"])
def test_amp_keeps_gradients_and_the_penaltys_second_derivative(arch):
    """Against float32, by direction; with a forward under no_grad first, after which a cache of cast weights would have
    no gradient."""
    args = wgan_gp.parse_args([*TINY, "--arch", arch])
    torch.manual_seed(0)
    D, x = wgan_gp.make_discriminator(args, 1), torch.rand(8, 1, 28, 28) * 2 - 1
    grads = []
    for D.amp in (False, True):
        with torch.no_grad():
            D(x)
        D.zero_grad()
        penalty, norm = wgan_gp.gradient_penalty(D, x)
        assert penalty.dtype == norm.dtype == torch.float32
        (wgan_gp.discriminator_loss(D(x), D(-x)) + 10 * penalty).backward()
        # the last layer's bias has slope 0 here and nothing but rounding in it
        grads.append(torch.cat([p.grad.flatten() for p in D.parameters() if p.dim() > 1]))
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


@pytest.mark.parametrize("own", [True, False])
def test_amp_asks_for_bfloat16_that_is_not_emulated(own, monkeypatch, capsys):
    """is_bf16_supported() alone says yes to every GPU: before Ampere it is emulated, and slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or own)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    wgan_gp.pick_device(wgan_gp.parse_args([*TINY, "--device", "cuda"]))
    amp = wgan_gp.parse_args([*TINY, "--device", "cuda", "--amp"])
    if own:
        assert wgan_gp.pick_device(amp) == torch.device("cuda", 0)
        return
    with pytest.raises(SystemExit) as stop:
        wgan_gp.pick_device(amp)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--amp" in err


# the captured step, with a stand-in for the graph ---------------------------------------------------------------------


class FakeCuda:
    """Stands in for torch.cuda's graphs on the CPU. As with the real ones, a capture changes no tensor and no random
    state, and a replay reads and writes the memory that the tensors of step() had when it was captured."""

    def __init__(self, monkeypatch, script):
        self.step = self.values = self.memory = None
        self.replays = self.eager = 0
        outer, real, pick = self, script.captured, script.pick_device

        class Graph:
            def replay(self):
                now = [t.data_ptr() for t in outer.tensors()]
                assert now == outer.memory, "a tensor of step() was replaced after capture"
                outer.replays += 1
                for k, v in outer.step().items(): outer.values[k].copy_(v.detach())

        class Capture:
            def __init__(self, graph, stream=None):
                assert isinstance(graph, Graph) and stream is outer.stream

            def __enter__(self):
                self.before = [t.clone() for t in outer.tensors()], torch.get_rng_state()
                outer.eager -= 1  # a call that executes nothing

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

        def captured(step, args):
            def traced():
                self.eager += 1
                values = step()
                self.values = {k: v.detach() for k, v in values.items()}
                return self.values

            self.step, self.closure = step, step.__closure__
            return real(traced, args)

        def pick_as_if_cuda(args):
            wanted, args.graph = args.graph, False
            device = pick(args)
            args.graph = wanted
            return device

        self.stream = Stream()
        for name, value in {"Stream": lambda: self.stream, "CUDAGraph": Graph, "graph": Capture,
                            "current_stream": Stream, "stream": lambda s: s}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(script, "captured", captured)
        monkeypatch.setattr(script, "pick_device", pick_as_if_cuda)

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
    w.main([*flags, "--run-dir", "graph", "--graph"])
    assert fake.replays == 8 - 3 and fake.eager == 3  # three eager iterations count as training
    for more in (["--no-graph"], []):  # eager is the default on a CPU
        w.main([*flags, "--run-dir", f"eager{len(more)}", *more])
        assert fake.replays == 5
    same(tensors("graph/last.pt"), tensors("eager0/last.pt"))
    assert losses("graph") == losses("eager1") == losses("eager0")


@EVERY
def test_graph_resumes_and_mixes_with_eager(fake, w):  # noqa: F811
    w.main([*w.tiny, "--steps", "60", "--run-dir", "whole"])
    w.main([*w.tiny, "--steps", "30", "--run-dir", "half", "--graph"])
    assert fake.replays == 6 - 3
    w.main(["--resume", "half/last.pt", "--steps", "60", "--graph"])
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


def test_a_dry_run_reaches_the_capture(fake):
    wgan_gp.main([*TINY, "--dry-run", "--graph", "--run-dir", "a"])
    assert fake.replays == fake.eager == 1  # of two iterations


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_failed_capture_is_one_line_that_names_the_way_out(fake, monkeypatch, capsys, more):
    """And what was saved before it is there to go on from."""
    loss = wgan_gp.generator_loss

    def uncapturable(score):
        if fake.eager == (1 if more else 3) and fake.capturing: raise RuntimeError("not permitted\nwhen capturing")
        return loss(score)

    enter = torch.cuda.graph.__enter__
    monkeypatch.setattr(torch.cuda.graph, "__enter__", lambda self: (enter(self), setattr(fake, "capturing", True)))
    fake.capturing = False
    monkeypatch.setattr(wgan_gp, "generator_loss", uncapturable)
    flags = [*TINY, *more, "--run-dir", "a", "--checkpoint-every", "5"]
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main([*flags, "--steps", "40", "--graph"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and fake.replays == 0
    assert err.count("\n") == 1 and "--no-graph" in err and "not permitted when capturing" in err
    assert torch.load("a/last.pt", weights_only=True)["step"] == (5 if more else 15)
    monkeypatch.setattr(wgan_gp, "generator_loss", loss)
    wgan_gp.main(["--resume", "a/last.pt", "--no-graph", "--steps", "20"])
    wgan_gp.main([*flags[:-3], "eager", "--steps", "20"])
    same(tensors("a/last.pt"), tensors("eager/last.pt"))


def test_the_step_reads_only_static_buffers(fake, monkeypatch):
    """The one tensor that step() closes over is x, the same memory all along; networks and optimizers aside it reaches
    nothing of the run."""
    wgan_gp.main([*TINY, "--steps", "20", "--graph", "--run-dir", "a"])
    assert fake.replays == 1
    names = {type(c.cell_contents).__name__ for c in fake.closure}
    assert names <= {"Tensor", "Net", "Adam", "Namespace", "int", "device"}
    free = [c.cell_contents for c in fake.closure if torch.is_tensor(c.cell_contents)]
    assert [tuple(t.shape) for t in free] == [(5, 8, 1, 28, 28)]


@pytest.mark.parametrize("flags, world, wanted", [
    ([], 1, True), (["--no-graph"], 1, False), ([], 2, False), (["--device", "cpu"], 1, False)])
def test_the_graph_is_the_default_on_one_gpu(flags, world, wanted, monkeypatch):
    for name, value in {"is_available": True, "set_device": None, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, value=value: value)
    monkeypatch.setattr(wgan_gp, "WORLD", world)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: None)
    args = wgan_gp.parse_args([*TINY, "--device", "auto", *flags])
    wgan_gp.pick_device(args)
    assert args.graph is wanted


def test_graph_without_cuda_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main([*TINY, "--steps", "5", "--graph"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not Path("runs").exists()


def test_the_rate_of_a_captured_adam_is_written_in_place():
    run = object.__new__(wgan_gp.Run)
    run.signal, run.leaving, run.state = None, None, {"stale": 0}
    run.args, run.step, run.total = wgan_gp.parse_args([*TINY, "--lr-g", "3e-4", "--lr-decay", "linear"]), 5, 10
    weight = torch.nn.Parameter(torch.zeros(1))
    run.opts = {k: torch.optim.Adam([weight], 1.0) for k in "gd"}
    rate = run.opts["g"].param_groups[0]["lr"] = torch.tensor(1.0)
    assert run.training()
    assert run.opts["g"].param_groups[0]["lr"] is rate and rate.item() == pytest.approx(1.5e-4)
    assert run.opts["d"].param_groups[0]["lr"] == pytest.approx(5e-5)
