"""Speed against the textbook loop, and the quality yardstick. Run it on a quiet machine.

    python tests/bench.py                     each mode of wgan_gp.py beside a textbook loop, interleaved; Markdown out
    python tests/bench.py --growth            cost against batch size and width
    python tests/bench.py --profile mlp       where the time of our iteration goes
    python tests/bench.py --activation        the critic's activation beside nn.LeakyReLU
    python tests/bench.py --yardstick 18760   train the textbook loop that long on MNIST, then score its samples

The textbook loop is what the common single-file collections do with the same networks. The habits it copies: PIL
pictures through torchvision transforms in a DataLoader without workers, made anew each epoch; z from numpy; fakes for
the critic with the graph of G attached, so that the critic's backward also runs through G; real and fake in two forward
passes; Adam as it comes; .item() on both losses each step for the progress line.
"""
import argparse
import contextlib
import io
import json
import os
import resource
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
import wgan_gp

ROOT = Path(__file__).parents[1]
MODES = {"cpu": {"float32": [], "--amp": ["--amp"]},
         "cuda": {"--no-graph": ["--no-graph"], "graph": [], "graph, --amp": ["--amp"]}}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUIET = ["--log-every", "0", "--sample-every", "0", "--eval-every", "0", "--checkpoint-every", "0"]
CASES = {"mlp": ["--arch", "mlp"], "dcgan 28": ["--image-size", "28"], "dcgan": []}


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
    """step() is one critic update, and G's after every d_steps of them."""

    def __init__(self, args, G, C, x, y, device="cpu"):
        self.args, self.G, self.C, self.i, self.rng = args, G.to(device), C.to(device), 0, np.random.default_rng(0)
        self.device = device
        betas = (args.beta1, args.beta2)
        self.opt_g, self.opt_d = (torch.optim.Adam(n.parameters(), lr, betas)
                                  for n, lr in ((G, args.lr_g), (C, args.lr_d)))
        self.loader = torch.utils.data.DataLoader(Pictures(x, y, args.image_size), args.batch_size, shuffle=True,
                                                  drop_last=True)
        self.batches = iter(())

    def next(self):
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch[0]

    def step(self):
        a, x_real = self.args, self.next().to(self.device)
        z = torch.tensor(self.rng.normal(0, 1, (len(x_real), a.latent_dim)), dtype=torch.float32).to(self.device)
        self.opt_d.zero_grad()
        x_fake = self.G(z)
        score_real, score_fake = self.C(x_real), self.C(x_fake)
        alpha = torch.tensor(self.rng.random((len(x_real), 1, 1, 1)), dtype=torch.float32).to(self.device)
        x_hat = (alpha * x_real + (1 - alpha) * x_fake).requires_grad_(True)
        score_hat = self.C(x_hat)
        grad = torch.autograd.grad(score_hat, x_hat, torch.ones_like(score_hat), create_graph=True)[0]
        penalty = ((grad.view(len(grad), -1).norm(2, dim=1) - 1) ** 2).mean()
        d_loss = -score_real.mean() + score_fake.mean() + a.gp_weight * penalty
        d_loss.backward()
        self.opt_d.step()
        self.i += 1
        if self.i % a.d_steps == 0:
            self.opt_g.zero_grad()
            self.g_loss = -self.C(self.G(z)).mean()  # the same z again, as they do
            self.g_loss.backward()
            self.opt_g.step()
        return d_loss.item(), self.g_loss.item() if self.i >= a.d_steps else 0.0


def plain(net):
    """The same network and weights with torch's own LeakyReLU, in torch's default memory format."""
    return nn.Sequential(*[nn.LeakyReLU(m.negative_slope) if isinstance(m, nn.LeakyReLU) else m for m in net])


class Done(Exception):
    pass


def our_loop(flags, on_iteration):
    """wgan_gp.py's own training loop, with on_iteration(count) after each iteration until it raises Done."""
    record, count = wgan_gp.Run.record, [0]

    def watched(run, values):
        record(run, values)
        count[0] += 1
        on_iteration(count[0])

    wgan_gp.Run.record = watched
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            with contextlib.suppress(Done):
                wgan_gp.main([*flags, "--steps", "1000000", "--device", DEVICE, "--run-dir", f"{folder}/run", *QUIET])
    finally:
        wgan_gp.Run.record = record


def now():
    if DEVICE == "cuda": torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(flags, blocks, iterations):
    """[(ours, textbook) seconds per block of `iterations` iterations], in turns in one process; and the share of the
    threads' time that our blocks used on a CPU."""
    args = wgan_gp.parse_args(flags)
    x, y = wgan_gp.load_data(args.dataset, args.data_dir, args.image_size, "train")
    torch.manual_seed(0)
    textbook = Textbook(args, plain(wgan_gp.make_generator(args, 1)), plain(wgan_gp.make_critic(args, 1)), x, y, DEVICE)
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

    our_loop(flags, hand_over)
    return pairs, statistics.median(busy), args


def peak_memory(flags, iterations=6):
    """MiB, in a process of its own: on a GPU what the allocator reserved, a graph's pool counted; on a CPU the whole
    process with torch in it."""
    command = [sys.executable, __file__, "--memory", json.dumps(flags), "--iterations", str(iterations)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_memory(flags, iterations):
    def stop(n):
        if n == iterations: raise Done

    our_loop(flags, stop)
    print(torch.cuda.max_memory_reserved() / 2**20 if DEVICE == "cuda" else
          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def busy_gpu(flags, iterations=20):
    """The share of the time in which at least one kernel runs, by the profiler, once all is warm."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def watch(n):
        if n == 10:
            now()
            profiler.start()
        if n == 10 + iterations:
            now()
            profiler.stop()
            raise Done

    our_loop(flags, watch)
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


def speed(blocks, iterations, data):
    print(f"{where()}, batch 64, {blocks} blocks of {iterations} iterations (5 critic updates and 1 of G each), median "
          f"(min to max)\n\n| networks | mode | images/s | ms an iteration | textbook loop, images/s | ratio | "
          f"peak memory, MiB | busy |\n|---|---|---|---|---|---|---|---|")
    for name, flags in CASES.items():
        for mode, more in MODES[DEVICE].items():
            flags_now = [*flags, *data, *more]
            pairs, busy, args = interleaved(flags_now, blocks, iterations)
            images = iterations * args.d_steps * args.batch_size
            ours, theirs = zip(*pairs)
            busy = busy_gpu(flags_now) if DEVICE == "cuda" else busy
            print(f"| {name} | {mode} | {row([images / t for t in ours])} | "
                  f"{1e3 * statistics.median(ours) / iterations:.4g} | {row([images / t for t in theirs])} | "
                  f"{row([t / o for o, t in pairs])} | {peak_memory(flags_now):.0f} | {busy:.0%} |", flush=True)


def growth(data):
    """Time and memory of our iteration as the batch and the networks grow, in the fastest mode for the device."""
    print(f"{where()}\n\n| networks | batch | ngf, ndf | ms an iteration | images/s | peak memory, MiB |\n"
          f"|---|---|---|---|---|---|")
    for name, batch, width in [*(("mlp", b, 32) for b in (64, 128, 256, 512, 1024)),
                               *(("dcgan", b, 32) for b in (64, 128, 256, 512, 1024)),
                               *(("dcgan", 64, w) for w in (64, 96, 128))]:
        flags = [*CASES[name], *data, "--batch-size", str(batch), "--ngf", str(width), "--ndf", str(width)]
        times = [0.0]

        def mark(n, times=times):
            if n >= 4: times.append(now())  # 3 eager iterations come before a graph
            if sum(t > 0 for t in times) > 2 and (len(times) > 200 or times[-1] - times[1] > 6): raise Done

        our_loop(flags, mark)
        ms = 1e3 * (times[-1] - times[1]) / (len(times) - 2)
        print(f"| {name} | {batch} | {width if name == 'dcgan' else '-'} | {ms:.4g} | {5e3 * batch / ms:.4g} | "
              f"{peak_memory(flags):.0f} |", flush=True)


def profile(name, data):
    """Self time by operation over ten iterations of wgan_gp.py's own loop."""
    profiler = torch.profiler.profile()

    def watch(n):
        if n == 5: profiler.start()
        if n == 15:
            now()
            profiler.stop()
            raise Done

    our_loop([*CASES[name], *data], watch)
    print(profiler.key_averages().table(sort_by=f"self_{DEVICE}_time_total", row_limit=14, max_name_column_width=40))


def activation(data):
    """One critic update with MaskedLeakyReLU beside the same with nn.LeakyReLU, turn by turn; milliseconds."""
    print("| networks | masked, ms | nn.LeakyReLU, ms | ratio |\n|---|---|---|---|")
    for name, flags in CASES.items():
        args = wgan_gp.parse_args([*flags, *data])
        x_real, x_fake = (torch.rand(args.batch_size, 1, args.image_size, args.image_size) * 2 - 1 for _ in range(2))
        masked = wgan_gp.make_critic(args, 1).to(memory_format=torch.channels_last)
        times = ([], [])
        for i in range(2 * 40):
            C = (masked, plain(masked))[i % 2]
            start = time.perf_counter()
            score_real, score_fake = C(torch.cat([x_real, x_fake])).chunk(2)
            penalty, _ = wgan_gp.gradient_penalty(C, wgan_gp.interpolate(x_real, x_fake))
            (wgan_gp.critic_loss(score_real, score_fake) + 10 * penalty).backward()
            times[i % 2].append(1e3 * (time.perf_counter() - start))
            C.zero_grad(set_to_none=True)
        ours, theirs = (t[5:] for t in times)
        print(f"| {name} | {row(ours)} | {row(theirs)} | {row([b / a for a, b in zip(ours, theirs)])} |", flush=True)


def yardstick(steps, data_dir):
    """The most used public script's defaults: its MLP pair (100-128-256-512-1024-784 with batch norm whose 0.8 is eps,
    784-512-256-1), Adam 2e-4 (.5, .999), batch 64, 5 critic updates, lambda 10, no averaging; by metrics.Judge."""
    import metrics
    torch.manual_seed(0)
    args = wgan_gp.parse_args(["--dataset", "mnist", "--arch", "mlp", "--data-dir", data_dir, "--lr-g", "2e-4",
                               "--lr-d", "2e-4", "--beta2", ".999"])
    layers, width = [nn.Linear(100, 128), nn.LeakyReLU(0.2)], 128
    for w in (256, 512, 1024):
        layers += [nn.Linear(width, w), nn.BatchNorm1d(w, eps=0.8), nn.LeakyReLU(0.2)]
        width = w
    G = nn.Sequential(*layers, nn.Linear(1024, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))
    C = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.LeakyReLU(0.2), nn.Linear(512, 256), nn.LeakyReLU(0.2),
                      nn.Linear(256, 1), nn.Flatten(0))
    loop = Textbook(args, G, C, *wgan_gp.load_data("mnist", data_dir, 28, "train"))
    judge, start = metrics.Judge("mnist", data_dir, 28), time.time()
    for i in range(1, steps + 1):
        losses = loop.step()
        if i % 938 == 0:
            print(f"step {i}: d_loss {losses[0]:.3f}  {time.time() - start:.0f} s", flush=True)
        if i == steps or i % 4690 == 0:
            with torch.no_grad():
                z = torch.randn(10_000, 100, generator=torch.Generator().manual_seed(1))
                x = torch.cat([wgan_gp.to_uint8(G.eval()(b)) for b in z.split(500)])
            G.train()
            print(f"step {i}: {judge.line(judge(x))}", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--blocks", type=int, default=9)
    p.add_argument("--iterations", type=int, default=4)
    p.add_argument("--data-dir", default=str(ROOT / "data"))
    p.add_argument("--growth", action="store_true")
    p.add_argument("--memory", help=argparse.SUPPRESS)
    p.add_argument("--profile", choices=CASES)
    p.add_argument("--activation", action="store_true")
    p.add_argument("--yardstick", type=int, metavar="STEPS")
    a = p.parse_args()
    has_mnist = os.path.exists(f"{a.data_dir}/MNIST/raw/train-images-idx3-ubyte")
    data = ["--dataset", "mnist", "--data-dir", a.data_dir] if has_mnist else []
    if a.memory:
        print_memory(json.loads(a.memory), a.iterations)
    elif a.growth:
        growth(data)
    elif a.profile:
        profile(a.profile, data)
    elif a.activation:
        activation(data)
    elif a.yardstick:
        yardstick(a.yardstick, a.data_dir)
    else:
        speed(a.blocks, a.iterations, data)
