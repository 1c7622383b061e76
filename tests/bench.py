"""Speed against the textbook loop, and the quality yardstick. Run it on a quiet machine.

    python tests/bench.py                     each script and mode beside a textbook loop, interleaved; Markdown out
    python tests/bench.py --cases dcgan cdcgan          these alone
    python tests/bench.py --growth            cost against batch size and width
    python tests/bench.py --big data/animals  report B's full-width networks at 64x64 on a folder: 20 iterations
    python tests/bench.py --profile mlp       where the time of our iteration goes
    python tests/bench.py --activation        the critic's activation beside nn.LeakyReLU
    python tests/bench.py --unroll            time and memory of unrolled.py's G update for k = 0, 1, 5, 10
    python tests/bench.py --yardstick 18760   train the textbook loop that long on MNIST, then score its samples
    python tests/bench.py --to 140            seconds until wgan_gp.py, and until the textbook loop, has that FID

The textbook loop is what the common single-file collections do with the same networks. The habits it copies: PIL
pictures through torchvision transforms in a DataLoader without workers, made anew each epoch; z from numpy; real and
fake in two forward passes; for WGAN-GP fakes with the graph of G attached, so that the critic's backward also runs
through G (the others detach them); a sigmoid and BCELoss for the vanilla GANs; the optimizer as it comes; .item() on
both losses each step for the progress line.
"""
import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))
import cdcgan
import dcgan
import unrolled
import wgan_clip
import wgan_gp

ROOT = Path(__file__).parents[1]
MODES = {"cpu": {"float32": [], "--amp": ["--amp"]},
         "cuda": {"--no-graph": ["--no-graph"], "--graph": ["--graph"], "--graph --amp": ["--graph", "--amp"]}}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32 = ["--graph"] if DEVICE == "cuda" else []  # the fastest mode of it
QUIET = ["--log-every", "0", "--sample-every", "0", "--eval-every", "0", "--checkpoint-every", "0"]
CASES = {"wgan_gp mlp": (wgan_gp, ["--arch", "mlp"]), "wgan_gp 28": (wgan_gp, ["--image-size", "28"]),
         "wgan_gp": (wgan_gp, ["--image-size", "32"]), "dcgan mlp": (dcgan, ["--arch", "mlp"]), "dcgan": (dcgan, []),
         "cdcgan": (cdcgan, []), "wgan_clip": (wgan_clip, [])}


MORE = {"dcgan 64": (dcgan, []), "unrolled 28": (unrolled, ["--image-size", "28"]),
        "unrolled mlp": (unrolled, ["--arch", "mlp"])}  # not beside a textbook loop


class Pictures(torch.utils.data.Dataset):
    def __init__(self, x, y, size):
        self.x, self.y = x, y
        self.transform = transforms.Compose([transforms.Resize(size), transforms.ToTensor(),
                                             transforms.Normalize([0.5], [0.5])])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.x[i, 0].numpy(), mode="L")), int(self.y[i])


class Textbook:
    """step() is one update of D, and G's after every d_steps of them."""

    def __init__(self, script, args, G, D, x, y, device="cpu"):
        self.script, self.args, self.device, self.i = script, args, device, 0
        self.G, self.D, self.rng, betas = G.to(device), D.to(device), np.random.default_rng(0), (args.beta1, args.beta2)
        self.opt_g, self.opt_d = (torch.optim.RMSprop(n.parameters(), lr) if script is wgan_clip else
                                  torch.optim.Adam(n.parameters(), lr, betas)
                                  for n, lr in ((G, args.lr_g), (D, args.lr_d)))
        self.loader = torch.utils.data.DataLoader(Pictures(x, y, args.image_size), args.batch_size, shuffle=True,
                                                  drop_last=True)
        self.batches, self.bce = iter(()), nn.BCELoss()

    def next(self):
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch[0].to(self.device), batch[1].to(self.device)

    def step(self):
        a, (x_real, y) = self.args, self.next()
        y = (y,) if self.script is cdcgan else ()
        z = torch.tensor(self.rng.normal(0, 1, (len(x_real), a.latent_dim)), dtype=torch.float32).to(self.device)
        self.opt_d.zero_grad()
        x_fake = self.G(z, *y)
        if self.script is wgan_gp:
            score_real, score_fake = self.D(x_real), self.D(x_fake)
            alpha = torch.tensor(self.rng.random((len(x_real), 1, 1, 1)), dtype=torch.float32).to(self.device)
            x_hat = (alpha * x_real + (1 - alpha) * x_fake).requires_grad_(True)
            score_hat = self.D(x_hat)
            grad = torch.autograd.grad(score_hat, x_hat, torch.ones_like(score_hat), create_graph=True)[0]
            penalty = ((grad.view(len(grad), -1).norm(2, dim=1) - 1) ** 2).mean()
            d_loss = -score_real.mean() + score_fake.mean() + a.gp_weight * penalty
        else:
            score_real, score_fake = self.D(x_real, *y), self.D(x_fake.detach(), *y)
            d_loss = (-score_real.mean() + score_fake.mean() if self.script is wgan_clip else
                      self.bce(score_real.sigmoid(), torch.ones_like(score_real))
                      + self.bce(score_fake.sigmoid(), torch.zeros_like(score_fake)))
        d_loss.backward()
        self.opt_d.step()
        if self.script is wgan_clip:
            for p in self.D.parameters():
                p.data.clamp_(-a.clip, a.clip)
        self.i += 1
        if self.i % a.d_steps == 0:
            self.opt_g.zero_grad()
            score = self.D(self.G(z, *y), *y)  # the same z again, as they do
            self.g_loss = (-score.mean() if self.script in (wgan_gp, wgan_clip) else
                           self.bce(score.sigmoid(), torch.ones_like(score)))
            self.g_loss.backward()
            self.opt_g.step()
        return d_loss.item(), self.g_loss.item() if self.i >= a.d_steps else 0.0


def networks(script, args):
    """A script's pair for one channel and ten classes, with torch's own LeakyReLU, in torch's default memory format."""
    args.classes = 10
    return plain(script.make_generator(args, 1)), plain(script.make_discriminator(args, 1))


def plain(net):
    layers = [nn.LeakyReLU(m.negative_slope) if isinstance(m, nn.LeakyReLU) else m for m in net]
    return type(net)(*layers)


class Done(Exception):
    pass


def our_loop(script, flags, on_iteration):
    """The script's own training loop, with on_iteration(count) after each iteration until it raises Done."""
    record, count = script.Run.record, [0]

    def watched(run, values):
        record(run, values)
        count[0] += 1
        on_iteration(count[0])

    script.Run.record = watched
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            with contextlib.suppress(Done):
                script.main([*flags, "--steps", "1000000", "--device", DEVICE, "--run-dir", f"{folder}/run", *QUIET])
    finally:
        script.Run.record = record


def now():
    if DEVICE == "cuda": torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(script, flags, blocks, iterations):
    """[(ours, textbook) seconds per block of `iterations` iterations], in turns in one process; and the share of the
    threads' time that our blocks used on a CPU."""
    args = script.parse_args(flags)
    x, y = script.load_data(args.dataset, args.data_dir, args.image_size, "train")
    torch.manual_seed(0)
    textbook = Textbook(script, args, *networks(script, args), x, y, DEVICE)
    pairs, busy, start = [], [], None

    def hand_over(n):
        nonlocal start
        if n % iterations:
            return
        end, cpu = now(), time.process_time()
        for _ in range(iterations * args.d_steps):
            textbook.step()
        if start:  # the first block of both warms up
            pairs.append((end - start[0], now() - end))
            busy.append((cpu - start[1]) / (end - start[0]) / torch.get_num_threads())
        if len(pairs) == blocks:
            raise Done
        start = now(), time.process_time()

    our_loop(script, flags, hand_over)
    return pairs, statistics.median(busy), args


def peak_memory(name, flags, iterations=6):
    """MiB, in a process of its own: on a GPU what the allocator reserved, a graph's pool counted; on a CPU the whole
    process with torch in it."""
    command = [sys.executable, __file__, "--memory", json.dumps([name, flags]), "--iterations", str(iterations)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_memory(name, flags, iterations):
    def stop(n):
        if n == iterations: raise Done

    our_loop({**CASES, **MORE}[name][0], flags, stop)
    if DEVICE == "cuda":
        print(torch.cuda.max_memory_reserved() / 2**20)
    else:  # the process's own peak; getrusage would count the parent's too
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 2**10)


def busy_gpu(script, flags, iterations=20):
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

    our_loop(script, flags, watch)
    spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events()
                   if e.device_type == torch.autograd.DeviceType.CUDA)
    covered, reach = 0.0, spans[0][0]
    for start, end in spans:
        covered, reach = covered + max(0.0, end - max(start, reach)), max(reach, end)
    return covered / (reach - spans[0][0])


def row(values):
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def where():
    chip = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{chip}, torch {torch.__version__}"


def speed(cases, blocks, iterations, data):
    print(f"{where()}, {blocks} blocks of {iterations} iterations, median (min to max)\n\n| networks | mode | "
          f"ours, images/s | ms an iteration | textbook loop, images/s | ratio | peak memory, MiB | busy |\n"
          f"|---|---|---|---|---|---|---|---|")
    for name in cases:
        script, flags = CASES[name]
        for mode, more in MODES[DEVICE].items():
            flags_now = [*flags, *data, *more]
            pairs, busy, args = interleaved(script, flags_now, blocks, iterations)
            images = iterations * args.d_steps * args.batch_size
            ours, theirs = zip(*pairs)
            busy = busy_gpu(script, flags_now) if DEVICE == "cuda" else busy
            print(f"| {name} | {mode} | {row([images / t for t in ours])} | "
                  f"{1e3 * statistics.median(ours) / iterations:.4g} | {row([images / t for t in theirs])} | "
                  f"{row([t / o for o, t in pairs])} | {peak_memory(name, flags_now):.0f} | {busy:.0%} |", flush=True)


def big(folder, modes, iterations=20):
    """Report B's networks at full width, 3 updates of D to one of G, batches of 128."""
    flags = ["--dataset", "folder", "--data-dir", folder, "--image-size", "64", "--ngf", "128", "--ndf", "128",
             "--d-steps", "3", "--paper"]
    print(f"{where()}\n\n| networks | mode | ms an iteration | images/s | peak memory, MiB |\n|---|---|---|---|---|")
    for mode in modes or MODES[DEVICE]:
        times, more = [], MODES[DEVICE][mode]

        def mark(n, times=times):
            times.append(now())
            if n == iterations: raise Done

        our_loop(dcgan, [*flags, *more], mark)
        ms = 1e3 * statistics.median(b - a for a, b in itertools.pairwise(times[3:]))
        print(f"| dcgan 64x64x3, ngf 128, ndf 128, batch 128 | {mode} | {ms:.4g} | {3 * 128e3 / ms:.4g} | "
              f"{peak_memory('dcgan 64', [*flags, *more], 2):.0f} |", flush=True)


def unroll(data, turns=15):
    """What looking ahead costs: one update of G at each k in turns, on networks whose D has stepped once; and the peak
    of a process that trains with that k."""
    print(f"{where()}, {turns} turns, median (min to max)\n\n| networks | inner | k | ms a G update | times k = 0 | "
          f"peak memory, MiB |\n|---|---|---|---|---|---|")
    for name, inner in (("unrolled 28", "adam"), ("unrolled 28", "sgd"), ("unrolled mlp", "adam")):
        flags = [*MORE[name][1], *data, "--inner", inner]
        args = unrolled.parse_args(flags)
        G, D = (make(args, 1).to(DEVICE, memory_format=torch.channels_last)
                for make in (unrolled.make_generator, unrolled.make_discriminator))
        opt_g, opt_d = (unrolled.adam(net, 1e-4, args) for net in (G, D))
        x_real = torch.rand(args.batch_size, 1, args.image_size, args.image_size, device=DEVICE) * 2 - 1
        D(x_real).square().mean().backward()
        opt_d.step()
        times = {k: [] for k in (0, 1, 5, 10)}
        for turn in range(turns + 2):  # two to warm up
            for k, taken in times.items():
                start = now()
                x_fake = G(unrolled.sample_z(args, args.batch_size, DEVICE))
                params = unrolled.look_ahead(D, opt_d, x_real, x_fake, k, inner, args.inner_lr)
                loss = unrolled.generator_loss(unrolled.functional_call(D, params, (x_fake,)), "ns")
                opt_g.zero_grad(set_to_none=True)
                loss.backward(inputs=list(G.parameters()))
                opt_g.step()
                if turn > 1: taken.append(1e3 * (now() - start))
        for k, taken in times.items():
            ratios = [a / b for a, b in zip(taken, times[0])]
            print(f"| {name} | {inner} | {k} | {row(taken)} | {statistics.median(ratios):.3g} | "
                  f"{peak_memory(name, [*flags, '--k', str(k)]):.0f} |", flush=True)


def growth(data):
    """Time and memory of our iteration as the batch and the networks grow, in the fastest mode for the device."""
    print(f"{where()}\n\n| networks | batch | ngf, ndf | ms an iteration | images/s | peak memory, MiB |\n"
          f"|---|---|---|---|---|---|")
    for name, batch, width in [*(("wgan_gp mlp", b, 32) for b in (64, 128, 256, 512, 1024)),
                               *(("wgan_gp", b, 32) for b in (64, 128, 256, 512, 1024)),
                               *(("wgan_gp", 64, w) for w in (64, 96, 128))]:
        flags = [*CASES[name][1], *data, *FLOAT32, "--paper",
                 "--batch-size", str(batch), "--ngf", str(width), "--ndf", str(width)]
        times = [0.0]

        def mark(n, times=times):
            if n >= 4: times.append(now())  # 3 eager iterations come before a graph
            if sum(t > 0 for t in times) > 2 and (len(times) > 200 or times[-1] - times[1] > 6): raise Done

        our_loop(wgan_gp, flags, mark)
        ms = 1e3 * (times[-1] - times[1]) / (len(times) - 2)
        print(f"| {name} | {batch} | {width if name == 'wgan_gp' else '-'} | {ms:.4g} | {5e3 * batch / ms:.4g} | "
              f"{peak_memory(name, flags):.0f} |", flush=True)


def profile(name, data):
    """Self time by operation over ten iterations of our own loop."""
    profiler = torch.profiler.profile()

    def watch(n):
        if n == 5: profiler.start()
        if n == 15:
            now()
            profiler.stop()
            raise Done

    our_loop(CASES[name][0], [*CASES[name][1], *data, *FLOAT32], watch)
    print(profiler.key_averages().table(sort_by=f"self_{DEVICE}_time_total", row_limit=14, max_name_column_width=40))


def activation(data):
    """One update of D with wgan_gp.py's LeakyReLU beside the same with nn.LeakyReLU, turn by turn; milliseconds."""
    print("| networks | ours, ms | nn.LeakyReLU, ms | ratio |\n|---|---|---|---|")
    for name, flags in ((name, flags) for name, (script, flags) in CASES.items() if script is wgan_gp):
        args = wgan_gp.parse_args([*flags, *data])
        x_real, x_fake = (torch.rand(args.batch_size, 1, args.image_size, args.image_size) * 2 - 1 for _ in range(2))
        D = wgan_gp.make_discriminator(args, 1).to(memory_format=torch.channels_last)
        times = ([], [])
        for i in range(2 * 40):
            net = (D, plain(D))[i % 2]
            start = time.perf_counter()
            score_real, score_fake = net(torch.cat([x_real, x_fake])).chunk(2)
            penalty, _ = wgan_gp.gradient_penalty(net, wgan_gp.interpolate(x_real, x_fake))
            (wgan_gp.discriminator_loss(score_real, score_fake) + 10 * penalty).backward()
            times[i % 2].append(1e3 * (time.perf_counter() - start))
            net.zero_grad(set_to_none=True)
        ours, theirs = (t[5:] for t in times)
        print(f"| {name} | {row(ours)} | {row(theirs)} | {row([b / a for a, b in zip(ours, theirs)])} |", flush=True)


def public_script(data_dir):
    """The most used public script's defaults: its MLP pair (100-128-256-512-1024-784 with batch norm whose 0.8 is eps,
    784-512-256-1), Adam 2e-4 (.5, .999), batch 64, 5 critic updates, lambda 10, no averaging. The loop that trains it,
    and what draws 10,000 samples of it."""
    torch.manual_seed(0)
    args = wgan_gp.parse_args(["--paper", "--dataset", "mnist", "--arch", "mlp", "--data-dir", data_dir,
                               "--lr-g", "2e-4", "--lr-d", "2e-4", "--beta2", ".999"])
    layers, width = [nn.Linear(100, 128), nn.LeakyReLU(0.2)], 128
    for w in (256, 512, 1024):
        layers += [nn.Linear(width, w), nn.BatchNorm1d(w, eps=0.8), nn.LeakyReLU(0.2)]
        width = w
    G = nn.Sequential(*layers, nn.Linear(1024, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))
    D = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Linear(512, 256), nn.LeakyReLU(0.2),
                      nn.Linear(256, 1), nn.Flatten(0))

    @torch.no_grad()
    def samples():
        z = torch.randn(10_000, 100, generator=torch.Generator().manual_seed(1))
        x = torch.cat([wgan_gp.to_uint8(G.eval()(b)) for b in z.split(500)])
        G.train()
        return x

    return Textbook(wgan_gp, args, G, D, *wgan_gp.load_data("mnist", data_dir, 28, "train")), samples


def judge_of(data_dir):
    import metrics
    return metrics.Judge("mnist", functools.partial(wgan_gp.load_data, "mnist", data_dir, 28), data_dir)


def yardstick(steps, data_dir):
    """The public script's loop for that many critic updates, scored by metrics.Judge on the way."""
    (loop, samples), judge, start = public_script(data_dir), judge_of(data_dir), time.time()
    for i in range(1, steps + 1):
        losses = loop.step()
        if i % 938 == 0:
            print(f"step {i}: d_loss {losses[0]:.3f}  {time.time() - start:.0f} s", flush=True)
        if i == steps or i % 4690 == 0: print(f"step {i}: {judge.line(judge(samples()))}", flush=True)


def time_to(target, data_dir):
    """Seconds of training, scoring not counted, until FID[classifier] on MNIST is `target` or less: wgan_gp.py's first
    epochs as it comes, with --arch mlp and --amp beside, and then the public script's loop, up to 25 epochs of it."""
    judge, table = judge_of(data_dir), [f"{where()}\n\n| to FID {target:g} | D updates | seconds | FID | times |\n"
                                        "|---|---|---|---|---|"]
    for name, flags in (("wgan_gp.py", []), ("wgan_gp.py --amp", ["--amp"]),
                        ("wgan_gp.py --arch mlp --amp", ["--arch", "mlp", "--amp"])):
        record, spent, got = wgan_gp.Run.record, [0.0, None], []

        def watched(run, values, record=record, spent=spent, got=got):
            record(run, values)
            if run.step % 67: return
            spent[0] += now() - spent[1]
            fid = judge(run.draw(run.noise(10_000, 2))[0])["fid"]
            print(f"{run.step} updates, {spent[0]:.1f} s: FID {fid:.1f}", flush=True)
            if fid <= target:
                got[:] = run.step, spent[0], fid
                raise Done
            spent[1] = now()

        wgan_gp.Run.record = watched
        spent[1] = now()
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Done):
                wgan_gp.main(["--dataset", "mnist", "--data-dir", data_dir, "--epochs", "5", "--device", DEVICE,
                              "--run-dir", f"{folder}/run", *QUIET, *flags])
        finally:
            wgan_gp.Run.record = record
        table.append((name, *(got or (4685, spent[0], math.inf))))
    (loop, samples), spent, i, fid = public_script(data_dir), 0.0, 0, math.inf
    while i < 23_450 and fid > target:
        start = now()
        for _ in range(938): loop.step()
        i, spent, fid = i + 938, spent + now() - start, judge(samples())["fid"]
        print(f"textbook, {i} updates, {spent:.1f} s: FID {fid:.1f}", flush=True)
    print(table[0])
    for name, *got in [*table[1:], ("textbook loop, MLP", i, spent, fid)]:
        print(f"| {name} | {got[0]} | {got[1]:.1f} | {got[2]:.1f} | {spent / got[1]:.1f} |")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--blocks", type=int, default=9)
    p.add_argument("--iterations", type=int, default=4)
    p.add_argument("--data-dir", default=str(ROOT / "data"))
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    p.add_argument("--growth", action="store_true")
    p.add_argument("--big", metavar="FOLDER")
    p.add_argument("--memory", help=argparse.SUPPRESS)
    p.add_argument("--modes", nargs="+", choices=MODES[DEVICE], help="with --big; default: all")
    p.add_argument("--unroll", action="store_true")
    p.add_argument("--profile", choices=CASES)
    p.add_argument("--activation", action="store_true")
    p.add_argument("--yardstick", type=int, metavar="STEPS")
    p.add_argument("--to", type=float, metavar="FID")
    a = p.parse_args()
    has_mnist = os.path.exists(f"{a.data_dir}/MNIST/raw/train-images-idx3-ubyte")
    data = ["--dataset", "mnist", "--data-dir", a.data_dir] if has_mnist else []
    if a.memory:
        print_memory(*json.loads(a.memory), a.iterations)
    elif a.big:
        big(a.big, a.modes)
    elif a.unroll:
        unroll(data)
    elif a.growth:
        growth(data)
    elif a.profile:
        profile(a.profile, data)
    elif a.activation:
        activation(data)
    elif a.yardstick:
        yardstick(a.yardstick, a.data_dir)
    elif a.to:
        time_to(a.to, a.data_dir)
    else:
        speed(a.cases, a.blocks, a.iterations, data)
