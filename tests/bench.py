"""Speed against the textbook loop, and the quality yardstick. Run it on a quiet machine.

    python tests/bench.py                     images/s of wgan_gp.py beside a textbook loop, interleaved; Markdown out
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
import os
import statistics
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

    def __init__(self, args, G, C, x, y):
        self.args, self.G, self.C, self.i, self.rng = args, G, C, 0, np.random.default_rng(0)
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
        a, x_real = self.args, self.next()
        z = torch.tensor(self.rng.normal(0, 1, (len(x_real), a.latent_dim)), dtype=torch.float32)
        self.opt_d.zero_grad()
        x_fake = self.G(z)
        score_real, score_fake = self.C(x_real), self.C(x_fake)
        alpha = torch.tensor(self.rng.random((len(x_real), 1, 1, 1)), dtype=torch.float32)
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
            self.g_loss = -self.C(self.G(z)).mean()
            self.g_loss.backward()
            self.opt_g.step()
        return d_loss.item(), self.g_loss.item() if self.i >= a.d_steps else 0.0


def plain(net):
    """The same network and weights with torch's own LeakyReLU, in torch's default memory format."""
    return nn.Sequential(*[nn.LeakyReLU(m.negative_slope) if isinstance(m, nn.LeakyReLU) else m for m in net])


class Done(Exception):
    pass


def interleaved(flags, blocks, iterations):
    """[(ours, textbook) seconds per block of `iterations` iterations], one after the other in one process: wgan_gp.py's
    own training loop runs, and its record() hands over to the textbook loop between blocks."""
    args = wgan_gp.parse_args(flags)
    x, y = wgan_gp.load_data(args.dataset, args.data_dir, args.image_size, "train")
    torch.manual_seed(0)
    textbook = Textbook(args, plain(wgan_gp.make_generator(args, 1)), plain(wgan_gp.make_critic(args, 1)), x, y)
    pairs, state, record = [], {"n": 0, "start": None}, wgan_gp.Run.record

    def hand_over(run, stats):
        record(run, stats)
        state["n"] += 1
        if state["n"] % iterations == 0:
            now = time.perf_counter()
            ours = now - state["start"] if state["start"] else None
            for _ in range(iterations * args.d_steps):
                textbook.step()
            if ours:  # the first block of both warms up
                pairs.append((ours, time.perf_counter() - now))
            if len(pairs) == blocks:
                raise Done
            state["start"] = time.perf_counter()

    wgan_gp.Run.record = hand_over
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Done):
        wgan_gp.main([*flags, "--steps", "1000000", "--run-dir", f"{folder}/run", *QUIET])
    wgan_gp.Run.record = record
    return pairs, args


def row(values):
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def speed(blocks, iterations, data):
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, batch 64, {blocks} blocks of "
          f"{iterations} iterations (5 critic updates and 1 of G each), median (min to max)\n")
    print("| networks | wgan_gp.py, images/s | textbook loop, images/s | ratio |\n|---|---|---|---|")
    for name, flags in CASES.items():
        pairs, args = interleaved([*flags, *data, "--device", "cpu"], blocks, iterations)
        images = iterations * args.d_steps * args.batch_size
        ours, theirs = zip(*pairs)
        print(f"| {name} | {row([images / t for t in ours])} | {row([images / t for t in theirs])} | "
              f"{row([t / o for o, t in pairs])} |", flush=True)


def profile(name, data):
    """Self time by operation over ten iterations of wgan_gp.py's own loop."""
    record, seen = wgan_gp.Run.record, []
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def watched(run, stats):
        record(run, stats)
        seen.append(1)
        if len(seen) == 3: profiler.start()
        if len(seen) == 13:
            profiler.stop()
            raise Done

    wgan_gp.Run.record = watched
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Done):
        wgan_gp.main([*CASES[name], *data, "--steps", "1000", "--device", "cpu", "--run-dir", f"{folder}/run", *QUIET])
    wgan_gp.Run.record = record
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40))


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
    p.add_argument("--profile", choices=CASES)
    p.add_argument("--activation", action="store_true")
    p.add_argument("--yardstick", type=int, metavar="STEPS")
    a = p.parse_args()
    has_mnist = os.path.exists(f"{a.data_dir}/MNIST/raw/train-images-idx3-ubyte")
    data = ["--dataset", "mnist", "--data-dir", a.data_dir] if has_mnist else []
    if a.profile:
        profile(a.profile, data)
    elif a.activation:
        activation(data)
    elif a.yardstick:
        yardstick(a.yardstick, a.data_dir)
    else:
        speed(a.blocks, a.iterations, data)
