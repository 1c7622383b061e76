"""Speed against the textbook loop, and the quality yardstick. Run it on a quiet machine.

    python tests/bench.py                     each script and mode beside a textbook loop, in turns; Markdown out
    python tests/bench.py --cases dcgan cdcgan          these alone
    python tests/bench.py --against ../before           beside the same scripts of another checkout, in turns
    python tests/bench.py --against ../before --modes float32 --cases wgan_gp dcgan bigan
    python tests/bench.py --growth            cost against batch size and width
    python tests/bench.py --big data/animals  report B's full-width networks at 64x64 on a folder: 20 iterations
    python tests/bench.py --profile "wgan_gp mlp"       where the time of our iteration goes
    python tests/bench.py --unroll            time and memory of unrolled.py's G update for k = 0, 1, 5, 10
    python tests/bench.py --yardstick 18760   train the textbook loop that long on MNIST, then score its samples
    python tests/bench.py --to 140            seconds until wgan_gp.py, and until the textbook loop, has that FID
    python tests/bench.py --to 10 --epochs 6            the same for an FID that takes longer

The textbook loop is what the common single-file collections do with the same networks. The habits it copies: PIL
images through torchvision transforms in a DataLoader without workers, made anew each epoch; z from numpy; real and
fake in two forward passes; for WGAN-GP fakes with the graph of G attached, so that the critic's backward also runs
through G (the others detach them); a sigmoid and BCELoss for the vanilla GANs; the optimizer as it comes; .item() on
both losses each step for the progress line.
"""

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.func import functional_call
from torchvision import transforms

ROOT = Path(__file__).parents[1]
MODES = {
    "cpu": {"float32": [], "--amp": ["--amp"]},
    "cuda": {"--no-graph": ["--no-graph"], "--graph": ["--graph"], "--graph --amp": ["--graph", "--amp"]},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32 = ["--graph"] if DEVICE == "cuda" else []  # the fastest mode of it
QUIET = ["--log-every", "0", "--sample-every", "0", "--eval-every", "0", "--checkpoint-every", "0"]
CASES = {
    "wgan_gp mlp": ("wgan_gp", ["--arch", "mlp"]),
    "wgan_gp 28": ("wgan_gp", ["--image-size", "28"]),
    "wgan_gp": ("wgan_gp", ["--image-size", "32"]),
    "dcgan mlp": ("dcgan", ["--arch", "mlp"]),
    "dcgan": ("dcgan", []),
    "cdcgan": ("cdcgan", []),
    "wgan_clip": ("wgan_clip", []),
}
NO_TEXTBOOK = {  # what other checkouts, or --unroll, are timed on beside these
    "unrolled 28": ("unrolled", ["--image-size", "28"]),
    "unrolled mlp": ("unrolled", ["--arch", "mlp"]),
    "mdgan": ("mdgan", []),
    "bigan": ("bigan", []),
}


class Pictures(torch.utils.data.Dataset):
    def __init__(self, x, y, size):
        self.x = x
        self.y = y
        steps = [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
        self.transform = transforms.Compose(steps)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.x[i, 0].numpy())), int(self.y[i])


class Textbook:
    """step() is one update of D, and G's after every d_steps of them."""

    def __init__(self, name, args, G, D, x, y, device="cpu"):
        self.name = name
        self.args = args
        self.device = device
        self.i = 0
        self.G = G.to(device)
        self.D = D.to(device)
        self.rng = np.random.default_rng(0)
        self.opt_g = self.optimizer(G, args.lr_g)
        self.opt_d = self.optimizer(D, args.lr_d)
        images = Pictures(x, y, args.image_size)
        self.loader = torch.utils.data.DataLoader(images, args.batch_size, shuffle=True, drop_last=True)
        self.batches = iter(())
        self.bce = nn.BCELoss()

    def optimizer(self, net, lr):
        if self.name == "wgan_clip":
            return torch.optim.RMSprop(net.parameters(), lr)
        return torch.optim.Adam(net.parameters(), lr, (self.args.beta1, self.args.beta2))

    def next(self):
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch[0].to(self.device), batch[1].to(self.device)

    def numbers(self, draw, *shape):
        return torch.tensor(draw(size=shape), dtype=torch.float32).to(self.device)

    def penalty(self, x_real, x_fake):
        alpha = self.numbers(self.rng.random, len(x_real), 1, 1, 1)
        x_hat = (alpha * x_real + (1 - alpha) * x_fake).requires_grad_(True)
        score = self.D(x_hat)
        grad = torch.autograd.grad(score, x_hat, torch.ones_like(score), create_graph=True)[0]
        return ((grad.view(len(grad), -1).norm(2, dim=1) - 1) ** 2).mean()

    def step(self):
        args = self.args
        x_real, y = self.next()
        y = (y,) if self.name == "cdcgan" else ()
        z = self.numbers(self.rng.normal, len(x_real), args.latent_dim)
        self.opt_d.zero_grad()
        x_fake = self.G(z, *y)
        if self.name != "wgan_gp":
            x_fake = x_fake.detach()
        real = self.D(x_real, *y)
        fake = self.D(x_fake, *y)
        if self.name == "wgan_gp":
            d_loss = -real.mean() + fake.mean() + args.gp_weight * self.penalty(x_real, x_fake)
        elif self.name == "wgan_clip":
            d_loss = -real.mean() + fake.mean()
        else:
            d_loss = self.bce(real.sigmoid(), torch.ones_like(real)) + self.bce(fake.sigmoid(), torch.zeros_like(fake))
        d_loss.backward()
        self.opt_d.step()
        if self.name == "wgan_clip":
            for p in self.D.parameters():
                p.data.clamp_(-args.clip, args.clip)
        self.i += 1
        if self.i % args.d_steps == 0:
            self.opt_g.zero_grad()
            score = self.D(self.G(z, *y), *y)  # the same z again, as they do
            if self.name in ("wgan_gp", "wgan_clip"):
                self.g_loss = -score.mean()
            else:
                self.g_loss = self.bce(score.sigmoid(), torch.ones_like(score))
            self.g_loss.backward()
            self.opt_g.step()
        return d_loss.item(), self.g_loss.item() if self.i >= args.d_steps else 0.0


def networks(name, args):
    """A script's pair for one channel and ten classes, in torch's default memory format."""
    script = importlib.import_module(name)
    classes = {"cdcgan": (10,), "wgan_clip": (0,)}.get(name, ())
    return script.Generator(args, 1, *classes), script.Discriminator(args, 1, *classes)


class Done(Exception):
    pass


def our_loop(name, flags, on_iteration):
    """The script's own training loop, with on_iteration(count) after each iteration until it raises Done.

    A checkout of before Study had Run.record, called at the same place."""
    script = importlib.import_module(name)
    owner, method = (script.Study, "add") if hasattr(script, "Study") else (script.Run, "record")
    original = getattr(owner, method)
    count = itertools.count(1)

    def watched(self, losses):
        original(self, losses)
        on_iteration(next(count))

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(mock.patch.object(owner, method, watched))
        stack.enter_context(mock.patch("signal.signal"))  # Ctrl-C ends the benchmark, not a loop of it
        stack.enter_context(contextlib.suppress(Done))
        script.main([*flags, "--steps", "1000000", "--device", DEVICE, "--run-dir", f"{folder}/run", *QUIET])


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(name, flags, blocks, iterations):
    """[(ours, textbook) seconds per block of `iterations` iterations], in turns in one process; and the share of the
    threads' time that our blocks used on a CPU."""
    script = importlib.import_module(name)
    args = script.parse_args(flags)
    x, y, _ = script.load_data(args.dataset, args.data_dir, args.image_size, "train")
    torch.manual_seed(0)
    textbook = Textbook(name, args, *networks(name, args), x, y, DEVICE)
    pairs = []
    busy = []
    start = None

    def hand_over(n):
        nonlocal start
        if n % iterations:
            return
        end = now()
        cpu = time.process_time()
        for _ in range(iterations * args.d_steps):
            textbook.step()
        if start:  # the first block of both warms up
            pairs.append((end - start[0], now() - end))
            busy.append((cpu - start[1]) / (end - start[0]) / torch.get_num_threads())
        if len(pairs) == blocks:
            raise Done
        start = now(), time.process_time()

    our_loop(name, flags, hand_over)
    return pairs, statistics.median(busy), args


def hidden(mode, name, flags, iterations, root=ROOT):
    """The command of one of the modes that this program runs itself in, in a process of its own."""
    command = [sys.executable, __file__, mode, json.dumps([name, flags]), "--iterations", str(iterations)]
    return [*command, "--root", str(root)]


def peak_memory(name, flags, iterations=6):
    """MiB, in a process of its own: on a GPU what the allocator reserved, a graph's pool counted; on a CPU the whole
    process with torch in it."""
    command = hidden("--memory", name, flags, iterations)
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_memory(name, flags, iterations):
    def stop(n):
        if n == iterations:
            raise Done

    our_loop(name, flags, stop)
    if DEVICE == "cuda":
        print(torch.cuda.max_memory_reserved() / 2**20)
    else:  # the process's own peak; getrusage would count the parent's too
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 2**10)


def busy_gpu(name, flags, iterations=20):
    """The share of the time in which at least one kernel runs, by the profiler, once all is warm."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)

    def watch(n):
        if n == 10:
            now()
            profiler.start()
        if n == 10 + iterations:
            now()
            profiler.stop()
            raise Done

    our_loop(name, flags, watch)
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    covered = 0.0
    reach = spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return covered / (reach - spans[0][0])


def row(values):
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def where():
    chip = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{chip}, torch {torch.__version__}"


def head(*columns):
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)


def speed(cases, modes, blocks, iterations, data):
    print(f"{where()}, {blocks} blocks of {iterations} iterations, median (min to max)\n")
    ours = "ours, images/s", "ms an iteration"
    head("networks", "mode", *ours, "textbook loop, images/s", "ratio", "peak memory, MiB", "busy")
    for case in cases:
        name, own_flags = CASES[case]
        for mode in modes:
            flags = [*own_flags, *data, *MODES[DEVICE][mode]]
            pairs, busy, args = interleaved(name, flags, blocks, iterations)
            images = iterations * args.d_steps * args.batch_size
            ours, theirs = zip(*pairs)
            cells = [
                row([images / t for t in ours]),
                f"{1e3 * statistics.median(ours) / iterations:.4g}",
                row([images / t for t in theirs]),
                row([t / o for o, t in pairs]),
                f"{peak_memory(name, flags):.0f}",
                f"{busy_gpu(name, flags) if DEVICE == 'cuda' else busy:.0%}",
            ]
            print(f"| {case} | {mode} | {' | '.join(cells)} |", flush=True)


def serve(name, flags, iterations):
    """Trains a block of iterations for each line on stdin, and prints its seconds: by the clock, and of the CPU."""
    start = None

    def wait(n):
        nonlocal start
        if n % iterations:
            return
        if start:
            wall = now() - start[0]
            print(json.dumps([wall, time.process_time() - start[1]]), file=sys.__stdout__, flush=True)
        else:
            print("warm", file=sys.__stdout__, flush=True)
        if not sys.stdin.readline():
            raise Done
        start = now(), time.process_time()

    our_loop(name, flags, wait)


class Checkout:
    """A script's loop in the checkout at `root`, in a process of its own."""

    def __init__(self, root, name, flags, iterations):
        command = hidden("--serve", name, flags, iterations, root)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline() != "warm\n":
            sys.exit(f"{root}: {name}.py {' '.join(flags)} does not train")

    def block(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def against(root, cases, modes, blocks, iterations, data):
    """Each case here and at `root`, a block at a time in turns. Where other programs share the cores, the ratio of the
    CPU's seconds tells more than that of the clock's."""
    print(f"{where()}, {blocks} blocks of {iterations} iterations, median (min to max); ratio: {root} / here\n")
    head("networks", "mode", "here, ms an iteration", f"{root}, ms an iteration", "ratio", "ratio, CPU seconds")
    for case in cases:
        name, own_flags = {**CASES, **NO_TEXTBOOK}[case]
        for mode in modes:
            flags = [*own_flags, *data, *MODES[DEVICE][mode]]
            here, there = (Checkout(path, name, flags, iterations) for path in (ROOT, root))
            pairs = []
            for i in range(blocks):
                turn = (here, there) if i % 2 == 0 else (there, here)
                seconds = {checkout: checkout.block() for checkout in turn}
                pairs.append((seconds[here], seconds[there]))
            here.close()
            there.close()
            cells = [row([1e3 * pair[side][0] / iterations for pair in pairs]) for side in (0, 1)]
            cells += [row([there[kind] / here[kind] for here, there in pairs]) for kind in (0, 1)]
            print(f"| {case} | {mode} | {' | '.join(cells)} |", flush=True)


def big(folder, modes, iterations=20):
    """Report B's networks at full width, 3 updates of D to one of G, batches of 128."""
    flags = ["--dataset", "folder", "--data-dir", folder, "--image-size", "64", "--ngf", "128", "--ndf", "128"]
    flags += ["--d-steps", "3", "--paper"]
    print(f"{where()}\n")
    head("networks", "mode", "ms an iteration", "images/s", "peak memory, MiB")
    for mode in modes:
        more = MODES[DEVICE][mode]
        times = []

        def mark(n, times=times):
            times.append(now())
            if n == iterations:
                raise Done

        our_loop("dcgan", [*flags, *more], mark)
        ms = 1e3 * statistics.median(b - a for a, b in itertools.pairwise(times[3:]))
        memory = peak_memory("dcgan", [*flags, *more], 2)
        cells = f"{ms:.4g} | {3 * 128e3 / ms:.4g} | {memory:.0f}"
        print(f"| dcgan 64x64x3, ngf 128, ndf 128, batch 128 | {mode} | {cells} |", flush=True)


def unroll(data, turns=15):
    """What looking ahead costs: one update of G at each k in turns, on networks whose D has stepped once; and the peak
    of a process that trains with that k."""
    script = importlib.import_module("unrolled")
    print(f"{where()}, {turns} turns, median (min to max)\n")
    head("networks", "inner", "k", "ms a G update", "times k = 0", "peak memory, MiB")
    for case, inner in (("unrolled 28", "adam"), ("unrolled 28", "sgd"), ("unrolled mlp", "adam")):
        name, own_flags = NO_TEXTBOOK[case]
        flags = [*own_flags, *data, "--inner", inner]
        args = script.parse_args(flags)
        G, D = (net.to(DEVICE, memory_format=torch.channels_last) for net in networks(name, args))
        opt_g, opt_d = (script.adam(net, 1e-4, args) for net in (G, D))
        x_real = torch.rand(args.batch_size, 1, args.image_size, args.image_size, device=DEVICE) * 2 - 1
        D(x_real).square().mean().backward()
        opt_d.step()
        times = {k: [] for k in (0, 1, 5, 10)}
        for turn in range(turns + 2):  # two to warm up
            for k, taken in times.items():
                start = now()
                x_fake = G(script.sample_z(args, args.batch_size, DEVICE))
                params = script.look_ahead(D, opt_d, x_real, x_fake, k, inner, args.inner_lr)
                loss = script.generator_loss(functional_call(D, params, (x_fake,)))
                opt_g.zero_grad(set_to_none=True)
                loss.backward(inputs=list(G.parameters()))
                opt_g.step()
                if turn > 1:
                    taken.append(1e3 * (now() - start))
        for k, taken in times.items():
            ratio = statistics.median(a / b for a, b in zip(taken, times[0]))
            memory = peak_memory(name, [*flags, "--k", str(k)])
            print(f"| {case} | {inner} | {k} | {row(taken)} | {ratio:.3g} | {memory:.0f} |", flush=True)


def growth(data):
    """Time and memory of our iteration as the batch and the networks grow, in the fastest mode for the device."""
    print(f"{where()}\n")
    head("networks", "batch", "ngf, ndf", "ms an iteration", "images/s", "peak memory, MiB")
    batches = 64, 128, 256, 512, 1024
    sizes = [("wgan_gp mlp", b, 32) for b in batches]
    sizes += [("wgan_gp", b, 32) for b in batches]
    sizes += [("wgan_gp", 64, w) for w in (64, 96, 128)]
    for case, batch, width in sizes:
        flags = [*CASES[case][1], *data, *FLOAT32, "--paper", "--batch-size", str(batch)]
        flags += ["--ngf", str(width), "--ndf", str(width)]
        times = []

        def mark(n, times=times):
            if n >= 4:  # 3 eager iterations come before a graph
                times.append(now())
            if len(times) > 200 or (len(times) > 2 and times[-1] - times[0] > 6):
                raise Done

        our_loop("wgan_gp", flags, mark)
        ms = 1e3 * (times[-1] - times[0]) / (len(times) - 1)
        shown = width if case == "wgan_gp" else "-"
        memory = peak_memory("wgan_gp", flags)
        print(f"| {case} | {batch} | {shown} | {ms:.4g} | {5e3 * batch / ms:.4g} | {memory:.0f} |", flush=True)


def profile(case, data):
    """Self time by operation over ten iterations of our own loop."""
    profiler = torch.profiler.profile()

    def watch(n):
        if n == 5:
            profiler.start()
        if n == 15:
            now()
            profiler.stop()
            raise Done

    name, flags = CASES[case]
    our_loop(name, [*flags, *data, *FLOAT32], watch)
    print(profiler.key_averages().table(sort_by=f"self_{DEVICE}_time_total", row_limit=14, max_name_column_width=40))


def public_script(data_dir):
    """The most used public script's defaults: its MLP pair (100-128-256-512-1024-784 with batch norm whose 0.8 is eps,
    784-512-256-1), Adam 2e-4 (.5, .999), batch 64, 5 critic updates, lambda 10, no averaging. The loop that trains it,
    and what draws 10,000 samples of it."""
    script = importlib.import_module("wgan_gp")
    torch.manual_seed(0)
    flags = ["--paper", "--dataset", "mnist", "--arch", "mlp", "--data-dir", data_dir]
    args = script.parse_args([*flags, "--lr-g", "2e-4", "--lr-d", "2e-4", "--beta2", ".999"])
    layers = [nn.Linear(100, 128), nn.LeakyReLU(0.2)]
    width = 128
    for w in (256, 512, 1024):
        layers += [nn.Linear(width, w), nn.BatchNorm1d(w, eps=0.8), nn.LeakyReLU(0.2)]
        width = w
    G = nn.Sequential(*layers, nn.Linear(1024, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))
    layers = [nn.Flatten(), nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Linear(512, 256), nn.LeakyReLU(0.2)]
    D = nn.Sequential(*layers, nn.Linear(256, 1), nn.Flatten(0))

    @torch.no_grad()
    def samples():
        z = torch.randn(10_000, 100, generator=torch.Generator().manual_seed(1))
        x = torch.cat([script.to_uint8(G.eval()(b)) for b in z.split(500)])
        G.train()
        return x

    x, y, _ = script.load_data("mnist", data_dir, 28, "train")
    return Textbook("wgan_gp", args, G, D, x, y), samples


def judge_of(data_dir):
    metrics = importlib.import_module("metrics")
    return metrics.Judge("mnist", functools.partial(metrics.load_data, "mnist", data_dir, 28), data_dir)


def yardstick(steps, data_dir):
    """The public script's loop for that many critic updates, scored by metrics.Judge on the way."""
    loop, samples = public_script(data_dir)
    judge = judge_of(data_dir)
    start = time.time()
    for i in range(1, steps + 1):
        d_loss, _ = loop.step()
        if i % 938 == 0:
            print(f"step {i}: d_loss {d_loss:.3f}  {time.time() - start:.0f} s", flush=True)
        if i == steps or i % 4690 == 0:
            print(f"step {i}: {judge.line(judge(samples()))}", flush=True)


def time_to(target, epochs, data_dir):
    """Seconds of training, scoring not counted, until FID[classifier] on MNIST is `target` or less.

    First wgan_gp.py for so many epochs, by default, with --amp, with --arch mlp, by --paper. Then the public script's
    loop, up to 25 epochs of it."""
    judge = judge_of(data_dir)
    table = []
    for more in ("", " --amp", " --arch mlp --amp", " --paper"):
        flags = [*more.split(), "--dataset", "mnist", "--data-dir", data_dir, "--epochs", str(epochs)]
        table.append((f"wgan_gp.py{more}", *ours_to(target, flags, judge)))
    loop, samples = public_script(data_dir)
    spent = 0.0
    i = 0
    fid = math.inf
    while i < 23_450 and fid > target:
        start = now()
        for _ in range(938):
            loop.step()
        i += 938
        spent += now() - start
        fid = judge(samples())["fid"]
        print(f"textbook, {i} updates, {spent:.1f} s: FID {fid:.1f}", flush=True)
    print(f"{where()}\n")
    head(f"to FID {target:g}", "D updates", "seconds", "FID", "times")
    for name, updates, seconds, reached in [*table, ("textbook loop, MLP", i, spent, fid)]:
        print(f"| {name} | {updates} | {seconds:.1f} | {reached:.1f} | {spent / seconds:.1f} |")


def ours_to(target, flags, judge):
    """(updates of D, seconds, FID) of the first sample whose FID is `target` or less, or of the last one.

    A sample is scored after every 70th part of the run."""
    metrics = importlib.import_module("metrics")
    script = importlib.import_module("wgan_gp")
    add = metrics.Study.add
    spent = 0.0
    start = now()
    fid = math.inf
    updates = 0

    def watched(study, losses):
        nonlocal spent, start, fid, updates
        add(study, losses)
        updates += study.args.d_steps
        if updates % (study.total // 70) >= study.args.d_steps:
            return
        spent += now() - start
        z = study.noise(judge.n, metrics.SCORING)
        fid = judge(study.sample(z, study.labels(judge.n)))["fid"]
        print(f"{updates} updates, {spent:.1f} s: FID {fid:.1f}", flush=True)
        if fid <= target:
            raise Done
        start = now()

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(metrics.Study, "add", watched):
        with contextlib.suppress(Done), mock.patch("signal.signal"):
            script.main([*flags, "--device", DEVICE, "--run-dir", f"{folder}/run", *QUIET])
    return updates, spent, fid


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--blocks", type=int, default=9)
    p.add_argument("--iterations", type=int, default=4)
    p.add_argument("--data-dir", default=str(ROOT / "data"))
    p.add_argument("--cases", nargs="+", choices=[*CASES, *NO_TEXTBOOK], default=list(CASES))
    p.add_argument("--against", metavar="CHECKOUT")
    p.add_argument("--growth", action="store_true")
    p.add_argument("--big", metavar="FOLDER")
    p.add_argument("--modes", nargs="+", choices=MODES[DEVICE], default=list(MODES[DEVICE]))
    p.add_argument("--unroll", action="store_true")
    p.add_argument("--profile", choices=CASES)
    p.add_argument("--yardstick", type=int, metavar="STEPS")
    p.add_argument("--to", type=float, metavar="FID")
    p.add_argument("--epochs", type=int, default=5)
    p.add_argument("--memory", help=argparse.SUPPRESS)
    p.add_argument("--serve", help=argparse.SUPPRESS)
    p.add_argument("--root", default=str(ROOT), help=argparse.SUPPRESS)
    args = p.parse_args()
    sys.path.insert(0, str(Path(args.root).resolve()))
    data_dir = str(Path(args.data_dir).resolve())
    has_mnist = Path(data_dir, "MNIST/raw/train-images-idx3-ubyte").exists()
    data = ["--dataset", "mnist", "--data-dir", data_dir] if has_mnist else []
    if args.memory:
        print_memory(*json.loads(args.memory), args.iterations)
    elif args.serve:
        serve(*json.loads(args.serve), args.iterations)
    elif args.against:
        against(args.against, args.cases, args.modes, args.blocks, args.iterations, data)
    elif args.big:
        big(args.big, args.modes)
    elif args.unroll:
        unroll(data)
    elif args.growth:
        growth(data)
    elif args.profile:
        profile(args.profile, data)
    elif args.yardstick:
        yardstick(args.yardstick, data_dir)
    elif args.to:
        time_to(args.to, args.epochs, data_dir)
    elif set(args.cases) <= set(CASES):
        speed(args.cases, args.modes, args.blocks, args.iterations, data)
    else:
        p.error(f"there is a textbook loop for {', '.join(CASES)} only")


if __name__ == "__main__":
    main()
