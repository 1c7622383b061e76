"""What makes the step fast must not change what it computes: graphs, bfloat16, several ranks. On the CPU; the same on a
GPU in test_cuda.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CASES, EVERY, ROOT, TINY, checkpoint, leaves, over, same, tensors, timeless
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import metrics

pytestmark = pytest.mark.usefixtures("small")

# ranks ----------------------------------------------------------------------------------------------------------------

START = """
import hashlib, importlib, json, os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
import metrics
images = torch.randint(256, (300, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
metrics.render_digits = lambda n, seed: (images, torch.arange(300) % 10)
metrics.FEWEST = 301
"""


def torchrun(code, *argv):
    """(exit code, output) of two ranks, each in one thread."""
    Path("driver.py").write_text(START.format(root=str(ROOT)) + code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "driver.py", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


ALL_SEVEN = """
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
rank = metrics.RANK
torch.distributed.init_process_group("gloo")
torch.distributed.init_process_group = torch.distributed.destroy_process_group = lambda *args, **kwargs: None
seen = {}
loads = []
load_data = metrics.load_data


def slow(*args):
    began = time.time()
    if rank == 0 and not loads:
        time.sleep(1)
    result = load_data(*args)
    loads.append((began, time.time()))
    return result


def key(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def run(script, *flags):
    # the weights after every update, and every z
    weights, noise = [], []
    hook = register_optimizer_step_post_hook(
        lambda opt, *args: weights.append(key(p for group in opt.param_groups for p in group["params"]))
    )
    sample_z = script.sample_z

    def watched(args, n, device, generator=None):
        z = sample_z(args, n, device, generator)
        noise.append(key([z]))
        return z

    script.sample_z = watched
    script.main([*flags])
    torch.distributed.barrier()  # last.pt is written
    script.sample_z = sample_z
    hook.remove()
    return {"weights": weights, "noise": noise}


def gradients(script, *flags):
    kept = []

    def keep(opt, *args):
        kept.append(torch.cat([p.grad.flatten() for group in opt.param_groups for p in group["params"]]))

    shares.clear()
    hook = register_optimizer_step_pre_hook(keep)
    script.main([*flags])
    hook.remove()
    return kept


cases = json.loads(sys.argv[1])
for name, (module, flags) in cases.items():
    script = importlib.import_module(module)
    script.load_data = slow
    first = run(script, *flags, "--steps", "3", "--run-dir", name)
    rest = run(script, "--resume", f"{name}/last.pt", "--steps", "5")
    seen[name] = {"first": first, "rest": rest}

# n ranks and one process have the same gradients where they have the same noise and no batch norm, which sees a rank's
# rows alone. float64, so that only rounding can differ
torch.set_default_dtype(torch.float64)
torch.nn.BatchNorm1d = torch.nn.Identity
metrics.Study.finish = lambda *args, **more: None
real = {"rand": torch.rand, "randn": torch.randn}
shares = []


def shared(name):
    def rows(*shape, generator=None, **more):
        if generator is not None or not shares:
            return real[name](*shape, generator=generator, **more)
        n, *rest = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return real[name](n * metrics.WORLD, *rest, **more)[metrics.RANK :: metrics.WORLD]

    return rows


torch.rand, torch.randn = shared("rand"), shared("randn")
for name, (module, flags) in cases.items():
    script = importlib.import_module(module)
    script.seed_noise = lambda *args: shares.append(True)  # from here on, as all have made the same networks
    flags = [*flags, "--arch", "mlp", "--steps", "4"]
    flags += ["--k", "0"] if module == "unrolled" else []  # a rank looks ahead on its own rows
    both = gradients(script, *flags, "--run-dir", f"{name}-two")
    if rank:
        continue
    metrics.WORLD = script.WORLD = 1
    one = gradients(script, *flags, "--run-dir", f"{name}-one")
    metrics.WORLD = script.WORLD = 2
    assert len(one) == len(both) >= 5 and one[0].dtype == torch.float64
    seen[name]["errors"] = [((a - b).norm() / a.norm()).item() for a, b in zip(one, both)]
    seen[name]["norm"] = one[0].norm().item()
seen["loads"] = loads
open(f"rank{rank}.json", "w").write(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks saw of all scripts."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny = [*TINY, "--batch-size", "16", "--d-steps", "1"]
    cases = {name: (case.module.__name__, [*tiny, *case.tiny[len(TINY) :]]) for name, case in CASES.items()}
    cases["published"] = ("wgan_gp", [*tiny, "--paper", "--d-steps", "2", "--g-steps", "2", "--prior", "uniform"])
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        code, out = torchrun(ALL_SEVEN, json.dumps(cases))
        assert code == 0, out
        return [json.loads(Path(f"rank{rank}.json").read_text()) for rank in range(2)]


RUNS = pytest.mark.parametrize("name", [*CASES, "published"])


@RUNS
def test_two_ranks_hold_equal_weights_at_every_step(two_ranks, name):
    one, other = (seen[name] for seen in two_ranks)
    for part, updates in (("first", 3), ("rest", 2)):
        weights = one[part]["weights"]
        assert weights == other[part]["weights"]
        assert len(set(weights)) == len(weights) >= 2 * updates


@RUNS
@pytest.mark.parametrize("part", ["first", "rest"])
def test_each_rank_has_noise_of_its_own(two_ranks, name, part):
    """After a resume too, and not the noise of before once more."""
    one, other = (seen[name] for seen in two_ranks)
    noise = [*one[part]["noise"], *other[part]["noise"]]
    assert len(set(noise)) == len(noise) >= 8
    if part == "rest":
        assert not set(noise) & {*one["first"]["noise"], *other["first"]["noise"]}


@RUNS
def test_the_ranks_mean_gradient_is_that_of_one_process(two_ranks, name):
    assert max(two_ranks[0][name]["errors"]) < 1e-9 < two_ranks[0][name]["norm"]


def test_the_other_ranks_wait_while_rank_0_loads(two_ranks):
    """It may have to download or to decode; then they find what it left."""
    (_, end), (begin, _) = (seen["loads"][0] for seen in two_ranks)
    assert begin >= end


MISHAPS = """
import wgan_gp
mishaps = [[int(n) for n in mishap.split(",")] for mishap in sys.argv[1].split()]
add = metrics.Study.add
iterations = 0


def mishap(study, losses):
    global iterations
    add(study, losses)
    iterations += 1
    for iteration, rank, number in mishaps:
        if iterations == iteration and metrics.RANK == rank:
            open("sent", "w").close()
            os.kill(os.getpid(), number)


metrics.Study.add = mishap
wgan_gp.main(sys.argv[2:])
"""
MLP = [*TINY, "--arch", "mlp", "--checkpoint-every", "2"]


def test_ranks_leave_together():
    """A signal that reaches rank 1 alone, in the third iteration, does not part them. One of rank 0, in the twelfth,
    ends both at its next word to the others: before the twentieth. A last one, after all words, parts them neither."""
    number = signal.SIGTERM.value
    code, out = torchrun(MISHAPS, f"3,1,{number} 12,0,{number}", *MLP, "--steps", "25", "--run-dir", "a")
    assert code != 0 and "stopped at step 19" in out and "[rank" not in out, out  # a traceback of a rank's
    assert checkpoint("a/last.pt")["step"] == 19
    code, out = torchrun(MISHAPS, f"5,1,{number}", "--resume", "a/last.pt")
    assert code == 0, out
    assert checkpoint("a/last.pt")["step"] == 25 and Path("a/traversal.png").exists()


def test_a_killed_rank_ends_the_others_within_a_minute():
    code, out = torchrun(MISHAPS, f"6,1,{signal.SIGKILL.value}", *MLP, "--steps", "1000000", "--run-dir", "a")
    assert code != 0 and time.time() - Path("sent").stat().st_mtime < 60, out
    assert checkpoint("a/last.pt")["step"] >= 4


def as_rank(monkeypatch, w, rank, world):
    for module in (w.module, metrics):
        monkeypatch.setattr(module, "RANK", rank)
        monkeypatch.setattr(module, "WORLD", world)


def test_a_batch_is_dealt_out_to_the_ranks(w, monkeypatch):
    """Every third row to each of three."""
    args = w.parse_args([*TINY, "--batch-size", "6", "--flip"])

    def seen():
        return w.Batches(args, torch.device("cpu"))(49, 2)  # the last of an epoch, and the first of the next

    whole = seen()
    monkeypatch.setattr(metrics, "from_rank_0", lambda value=None: value)
    parts = []
    for rank in range(3):
        as_rank(monkeypatch, w, rank, 3)
        parts.append(seen())
    assert whole[0].shape == (2, 6, 1, 28, 28)
    for one, three in zip(whole, zip(*parts)):
        assert all(part.shape[1] == 2 for part in three)
        assert torch.equal(torch.stack(three, 2).flatten(1, 2), one)


@pytest.mark.parametrize("rank, order", [(0, ["reads", "meets"]), (1, ["meets", "reads"]), (2, ["meets", "reads"])])
def test_rank_0_reads_before_the_others(monkeypatch, rank, order):
    """Both wait in one broadcast: rank 0 comes to it after the reading, the others before."""
    done = []
    monkeypatch.setattr(metrics, "RANK", rank)
    monkeypatch.setattr(metrics, "from_rank_0", lambda value=None: done.append("meets"))
    with metrics.rank_0_first():
        done.append("reads")
    assert done == order


def test_ranks_may_wait_for_hours(w, monkeypatch):
    """NCCL's own limit of ten minutes would end them while rank 0 decodes or scores."""
    asked = []
    monkeypatch.setattr(w.module, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **more: asked.append((args, more)))
    w.start(w.parse_args(TINY))
    (((backend,), more),) = asked
    assert backend == "gloo" and more["timeout"].total_seconds() >= 6 * 3600


@pytest.mark.parametrize("size", ["8", "3"])
def test_a_batch_that_does_not_divide_is_refused(w, monkeypatch, capsys, size):
    """Nor is one image a rank a batch."""
    monkeypatch.setattr(w.module, "WORLD", 3)
    with pytest.raises(SystemExit) as stop:
        w.main([*TINY, "--steps", "5", "--batch-size", size])
    assert stop.value.code == 2 and "3 processes" in capsys.readouterr().err and not Path("runs").exists()


# bfloat16 -------------------------------------------------------------------------------------------------------------

HEAVY = {
    "wgan_gp": "--gp-weight",
    "dcgan": "--r1",
    "cdcgan": "--r1",
    "unrolled": "--r1",
    "mdgan": "--r1",
    "bigan": "--r1",
}
PENALIZED = over(*HEAVY)


def watched_run(w, *flags):
    """A run's gradients at every update, and the dtypes of what layers give in the step and outside, where images are
    made, and of what losses are computed from and are."""
    gradients = []
    dtypes = {"step": set(), "images": set(), "losses": set()}
    place = "images"
    batches = w.Batches.__call__
    add = metrics.Study.add

    def begins(self, i, n):
        nonlocal place
        place = "step"
        return batches(self, i, n)

    def ends(study, losses):
        nonlocal place
        place = "images"
        dtypes["losses"].update(loss.dtype for loss in losses.values())
        add(study, losses)

    def keep(opt, *args):
        parameters = [p for group in opt.param_groups for p in group["params"]]
        gradients.append(torch.cat([p.grad.flatten().double() for p in parameters if p.dim() > 1]))

    def look(module, args, out):
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)):
            dtypes[place].add(out.dtype)

    def watched(loss):
        def f(*scores):
            dtypes["losses"].update(score.dtype for score in scores if torch.is_tensor(score))
            return loss(*scores)

        return f

    with pytest.MonkeyPatch.context() as m:
        m.setattr(w.Batches, "__call__", begins)
        m.setattr(metrics.Study, "add", ends)
        m.setattr(metrics.Study, "finish", lambda *args, **more: None)
        for name in ("discriminator_loss", "generator_loss"):
            m.setattr(w.module, name, watched(getattr(w, name)))
        hooks = [register_optimizer_step_pre_hook(keep), register_module_forward_hook(look)]
        try:
            w.main([*w.tiny, *flags, "--sample-every", "1"])
        finally:
            for hook in hooks:
                hook.remove()
    return gradients, dtypes


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


@EVERY
@pytest.mark.parametrize("arch", ["dcgan", "mlp"])
def test_amp_rounds_products_and_nothing_else(w, arch):
    """Losses, gradients, weights, moments and averages are float32, and images are made in it."""
    flags = ["--arch", arch, "--batch-size", "32", "--steps", "1"]
    exact, dtypes = watched_run(w, *flags, "--run-dir", "exact")
    assert dtypes == {"step": {torch.float32}, "images": {torch.float32}, "losses": {torch.float32}}
    rounded, dtypes = watched_run(w, *flags, "--run-dir", "rounded", "--amp")
    assert dtypes == {"step": {torch.bfloat16}, "images": {torch.float32}, "losses": {torch.float32}}
    assert len(exact) == len(rounded) == 2
    for a, b in zip(exact, rounded):  # at the start real and fake images' shares nearly cancel, their rounding does not
        assert not torch.equal(a, b) and cosine(a, b) > 0.75
    saved = checkpoint("rounded/last.pt")
    floats = [t for t in leaves(saved) if t.is_floating_point()]
    assert len(floats) > 20 and {t.dtype for t in floats} == {torch.float32}


@PENALIZED
@pytest.mark.parametrize("arch", ["dcgan", "mlp"])
def test_amp_keeps_the_penaltys_second_derivative(w, arch):
    """A penalty of weight 1000 is nearly all of D's gradient, which differs from float32's by rounding only."""
    flags = ["--arch", arch, "--batch-size", "32", "--steps", "1", HEAVY[w.name]]
    without = watched_run(w, *flags, "0", "--run-dir", "without")[0][0]
    exact = watched_run(w, *flags, "1000", "--run-dir", "exact")[0][0] - without
    plain = watched_run(w, *flags, "0", "--run-dir", "plain", "--amp")[0][0]
    rounded = watched_run(w, *flags, "1000", "--run-dir", "rounded", "--amp")[0][0] - plain
    assert cosine(exact, rounded) > 0.98
    assert (rounded.norm() / exact.norm()).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("own", [True, False])
def test_amp_asks_for_bfloat16_that_is_not_emulated(w, own, monkeypatch, capsys):
    """is_bf16_supported() alone says yes to every GPU: before Ampere it is emulated, and slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or own)
    assert w.parse_args([*TINY, "--device", "cuda"]).device == "cuda"
    if own:
        assert w.parse_args([*TINY, "--device", "cuda", "--amp"]).amp
        return
    with pytest.raises(SystemExit) as stop:
        w.parse_args([*TINY, "--device", "cuda", "--amp"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--amp" in err


# the captured step, with a stand-in for the graph ---------------------------------------------------------------------


class FakeCuda:
    """Stands in for torch.cuda's graphs on the CPU. As with the real ones, a capture changes no tensor and no random
    state, and a replay reads and writes the memory that step's tensors had when it was captured, its arguments too."""

    def __init__(self, monkeypatch, script):
        self.step = self.args = self.losses = self.memory = None
        self.replays = 0
        self.eager = 0
        self.capturing = False
        outer = self
        real = script.captured
        resolve_device = script.resolve_device

        class Graph:
            def replay(self):
                assert outer.memory == [t.data_ptr() for t in outer.tensors()], "a tensor was replaced after a capture"
                outer.replays += 1
                for name, value in outer.step(*outer.args).items():
                    outer.losses[name].copy_(value.detach())

        class Capture:
            def __init__(self, graph, stream=None):
                assert isinstance(graph, Graph) and stream is outer.stream

            def __enter__(self):
                self.before = [t.clone() for t in outer.tensors()]
                self.noise = torch.get_rng_state()
                outer.capturing = True

            def __exit__(self, *error):
                outer.capturing = False
                with torch.no_grad():
                    for t, before in zip(outer.tensors(), self.before):
                        t.copy_(before)
                torch.set_rng_state(self.noise)
                outer.memory = [t.data_ptr() for t in outer.tensors()]

        class Stream:
            def wait_stream(self, other):
                pass

            def __enter__(self):
                pass

            def __exit__(self, *error):
                pass

        def captured(step):
            def traced(*args):
                outer.eager += not outer.capturing
                outer.args = args
                outer.losses = {name: value.detach() for name, value in step(*args).items()}
                return outer.losses

            outer.step = step
            return real(traced)

        def resolve_as_if_cuda(args):
            wanted = args.graph
            args.graph = False
            resolve_device(args)
            args.graph = bool(wanted)

        self.stream = Stream()
        stand_ins = {"Stream": lambda: self.stream, "CUDAGraph": Graph, "graph": Capture}
        stand_ins |= {"current_stream": Stream, "stream": lambda stream: stream}
        for name, value in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(script, "captured", captured)
        monkeypatch.setattr(script, "resolve_device", resolve_as_if_cuda)

    def reached(self, function):
        """All that a function closes over, and the functions that it closes over."""
        for cell in function.__closure__ or ():
            yield cell.cell_contents
            if hasattr(cell.cell_contents, "__closure__"):
                yield from self.reached(cell.cell_contents)

    def tensors(self):
        """All tensors that step reaches: its arguments, networks, optimizers."""
        found = list(self.args)
        for value in self.reached(self.step):
            if torch.is_tensor(value):
                found.append(value)
            elif isinstance(value, torch.nn.Module):
                found += [*value.parameters(), *value.buffers()]
            elif isinstance(value, torch.optim.Optimizer):
                found += [t for state in value.state.values() for t in state.values()]
        return found


@pytest.fixture
def fake(monkeypatch, w):
    return FakeCuda(monkeypatch, w.module)


@EVERY
@pytest.mark.parametrize("more", [[], ["--paper", "--batch-size", "8"]], ids=" ".join)
def test_graph_runs_equal_eager_ones(fake, w, more):
    """Three eager iterations count as training. Each call's batch is another one, so a replay has to be fed."""
    flags = [*w.tiny, *more, *"--steps 16 --d-steps 2 --log-every 2".split()]
    w.main([*flags, "--run-dir", "graph", "--graph"])
    assert fake.replays == 8 - 3 and fake.eager == 3
    w.main([*flags, "--run-dir", "eager"])  # the default on a CPU
    assert fake.replays == 5 and fake.eager == 3
    same(tensors("graph/last.pt"), tensors("eager/last.pt"))
    assert len(timeless("graph")) == 8 and timeless("graph") == timeless("eager")


@EVERY
def test_graph_resumes_and_mixes_with_eager(fake, w):
    w.main([*w.tiny, "--lr-decay", "none", "--steps", "12", "--run-dir", "whole"])
    w.main([*w.tiny, "--lr-decay", "none", "--steps", "6", "--run-dir", "half", "--graph"])
    assert fake.replays == 6 - 3
    w.main(["--resume", "half/last.pt", "--steps", "12", "--graph"])
    assert fake.replays == 2 * (6 - 3)
    same(tensors("half/last.pt"), tensors("whole/last.pt"))


def test_a_replay_is_fed_with_each_calls_tensors(fake, w):
    """Its own copies of them: the caller's tensors are neither kept nor written."""
    weight = torch.zeros(())

    def step(x, y):
        weight.add_(x.sum())
        return {"sum": x.sum() + 10 * y.sum(), "weight": weight}

    replayed = w.captured(step)
    fake.step = step
    total = 0.0
    for i in range(1, 9):
        x, y = torch.full((2,), float(i)), torch.full((1,), i)
        losses = replayed(x, y)
        total += 2 * i
        assert losses["sum"].item() == 2 * i + 10 * i and losses["weight"].item() == total
        assert x.tolist() == [i, i] and y.tolist() == [i]
    assert fake.replays == 8 - 3 and fake.eager == 3


@EVERY
def test_the_step_closes_over_no_tensor(fake, w):
    """What it trains on are its arguments. A buffer that something else fills would be one more thing to know."""
    w.main([*w.tiny, "--steps", "4", "--graph", "--run-dir", "a"])
    assert fake.replays == 1
    reached = list(fake.reached(fake.step))
    assert any(isinstance(value, torch.optim.Optimizer) for value in reached)
    assert not any(torch.is_tensor(value) or isinstance(value, w.Batches) for value in reached)


def test_a_failed_capture_is_one_line_that_names_the_way_out(fake, w, monkeypatch, capsys):
    """And what was saved before it is there to go on from."""
    loss = w.generator_loss

    def uncapturable(score):
        if fake.capturing:
            raise RuntimeError("not permitted\nwhen capturing")
        return loss(score)

    monkeypatch.setattr(w.module, "generator_loss", uncapturable)
    flags = [*w.tiny, "--steps", "8", "--checkpoint-every", "1"]
    with pytest.raises(SystemExit) as stop:
        w.main([*flags, "--run-dir", "a", "--graph"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and fake.replays == 0
    assert err.count("\n") == 1 and "--no-graph" in err and "not permitted when capturing" in err
    assert checkpoint("a/last.pt")["step"] == 3
    w.main(["--resume", "a/last.pt", "--no-graph"])
    w.main([*flags, "--run-dir", "eager"])
    same(tensors("a/last.pt"), tensors("eager/last.pt"))


@pytest.mark.parametrize(
    "flags, world, wanted", [([], 1, True), (["--no-graph"], 1, False), ([], 2, False), (["--device", "cpu"], 1, False)]
)
def test_the_graph_is_the_default_on_one_gpu(w, flags, world, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(w.module, "WORLD", world)
    assert w.parse_args([*TINY, "--device", "auto", *flags]).graph is wanted


def test_graph_without_cuda_is_one_line(w, capsys):
    with pytest.raises(SystemExit) as stop:
        w.main([*TINY, "--steps", "5", "--graph"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not Path("runs").exists()


def test_a_rate_on_the_device_is_written_in_place(w):
    """A captured Adam reads it there."""
    weight = torch.nn.Parameter(torch.zeros(1))
    opt = torch.optim.Adam([{"params": [weight]}], 1.0)
    rate = opt.param_groups[0]["lr"] = torch.tensor(1.0)
    w.set_rate(opt, 1.5e-4)
    assert opt.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(1.5e-4)
    opt.param_groups[0]["lr"] = 1.0
    w.set_rate(opt, 5e-5)
    assert opt.param_groups[0]["lr"] == 5e-5
