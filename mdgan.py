"""MD-GAN: D maps a picture to a point, real ones to where a fixed mixture of Gaussians is likely, made ones elsewhere.

Eghbal-zadeh, Zellinger and Widmer 2019, "Mixture Density Generative Adversarial Networks", arXiv 1811.00152; lk is the
likelihood of d + 1 Gaussians on the corners of a regular simplex, lambda its maximum, u(x) = log lambda - log lk(D(x)):

    discriminator  max_D  E[log lk(D(x))] + E[log(lambda - lk(D(G(z))))] i.e. min_D  E[u(x)] - E[log(1 - exp(-u(G(z))))]
    generator      min_G  E[u(G(z))], non-saturating, not in the paper; or E[log(1 - exp(-u(G(z))))], the paper's

    python mdgan.py                                      numerals rendered at start-up, no download
    python mdgan.py --dataset mnist --epochs 200
    python mdgan.py --dataset mnist --paper --mixture published --loss saturating    mixture and loss as published

Expect FID[classifier] 8.2 +- 0.4 of --dataset mnist --amp --steps 5300, 3 minutes of one CPU core; real digits have
1.3. Seeds 0-2, network 565494b9; protocol: tests/gallery/README.md. As published, ten Gaussians melt into one blob (a
run's first lines say so), and G's loss has the gradient 1 / (exp(u) - 1) in u: next to none where D is sure. Scores are
-u, no logits: --reject naive means nothing. By default D's loss has r1/2 E||grad u(x)||^2 too, not in the paper.

D has no batch norm. G is in train mode for D's fakes and is sampled in eval mode with averaged weights.
"""

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

# Names without an import (Net, number, adam, Run and so on) stand below the ruled line.
# Best of a search on MNIST, two or three minutes of one core a run (tests/gallery/README.md); resolve sets latent_dim.
BEST = dict(
    batch_size=64,
    d_steps=1,
    lr_g=2e-3,
    lr_d=2e-3,
    beta1=0.0,
    beta2=0.9,
    ema=0.995,
    ngf=16,
    ndf=16,
    r1=10.0,
    penalty_share=0.25,
    lr_decay="linear",
)
MLP = dict(lr_g=2e-3, lr_d=5e-4)  # with --arch mlp, on top of BEST
PAPER = dict(
    batch_size=32,
    d_steps=1,
    lr_g=5e-4,
    lr_d=5e-4,
    beta1=0.5,
    beta2=0.999,
    ema=0.999,
    ngf=16,
    ndf=16,
    r1=0.0,
    penalty_share=1.0,
    lr_decay="none",
)  # --paper: ours, they gave none for pictures


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--mixture", choices=("clusters", "published"), default="clusters", help="radius 2; .9436: a blob")
    p.add_argument("--embedding-dim", type=number(int, 1, 512), default=9, help="d; the authors: 9, so ten centres")
    p.add_argument("--loss", choices=("ns", "saturating"), default="ns", help="G's: non-saturating, or the paper's")
    p.add_argument("--r1", type=number(float, 0), help="gamma of R1 on real pictures, not in the paper")
    p.add_argument("--penalty-share", type=number(float, 0.01, 1), help="share of the batch penalized")
    add_run_flags(p)
    return resolve(p, argv, BEST, MLP, PAPER)


# MODEL ----------------------------------------------------------------------------------------------------------------


def make_generator(args, channels):
    """z (B, latent_dim) -> picture (B, channels, S, S) in [-1, 1]."""
    S, nz = args.image_size, args.latent_dim
    if args.arch == "mlp":
        layers = []
        for w_in, w_out in ((nz, 256), (256, 512), (512, 1024)):
            layers += [nn.Linear(w_in, w_out, bias=False), nn.BatchNorm1d(w_out), nn.LeakyReLU(negative_slope=0.2)]
        return Net(*layers, nn.Linear(1024, channels * S * S), nn.Tanh(), nn.Unflatten(1, (channels, S, S)))
    start, widths, kernels = dcgan_plan(args, args.ngf)
    layers = [nn.Unflatten(1, (nz, 1, 1)), nn.ConvTranspose2d(nz, widths[0], start, 1, 0, bias=False)]
    for w_in, w_out, k in zip(widths, [*widths[1:], channels], kernels):  # each block doubles the side
        layers += [nn.BatchNorm2d(w_in), nn.ReLU(), nn.ConvTranspose2d(w_in, w_out, k, 2, 1, bias=False)]
    return Net(*layers, nn.Tanh()).apply(dcgan_init)


def make_discriminator(args, channels):
    """Picture (B, channels, S, S) -> -u (B,) <= 0, larger for more real. No norm, so the biases stay."""
    S, d = args.image_size, args.embedding_dim
    if args.arch == "mlp":
        layers = [nn.Flatten()]
        for w_in, w_out in ((channels * S * S, 1024), (1024, 512), (512, 256)):
            layers += [nn.Linear(w_in, w_out), nn.LeakyReLU(negative_slope=0.2)]
        return Net(*layers, nn.Linear(256, d), Mixture(args.mixture, d))
    start, widths, kernels = dcgan_plan(args, args.ndf)
    layers, width = [], channels
    for w, k in zip(widths[::-1], kernels[::-1]):  # each block halves the side
        layers += [nn.Conv2d(width, w, k, 2, 1), nn.LeakyReLU(negative_slope=0.2)]
        width = w
    return Net(*layers, nn.Conv2d(width, d, start, 1, 0), nn.Flatten(1), Mixture(args.mixture, d)).apply(dcgan_init)


class Mixture(nn.Module):
    """D's last layer: (B, d) -> a point e in [-2.5, 2.5]^d -> -u(e) (B,), in logarithms from end to end: a likelihood
    itself is rounded to 0, and its gradient too, a few sigma away from every centre."""

    def __init__(self, kind, d):
        super().__init__()
        self.radius, self.sigma = 0.9436 if kind == "published" else 2.0, 0.5  # .9436, not 1: a root inside their loop
        mu = simplex(d, self.radius)
        self.from_corner, self.from_middle = (ascend(e, mu, self.sigma) for e in (mu[0], torch.zeros_like(mu[0])))
        there, middle = (log_sum(e, mu, self.sigma).item() for e in (self.from_corner, self.from_middle))
        self.peak, self.gap = max(there, middle), there - middle
        self.register_buffer("mu", mu.to(torch.get_default_dtype()), persistent=False)

    def forward(self, x):
        e = 5 * x.to(self.mu.dtype).sigmoid() - 2.5  # the box as in the authors' code; float32 under --amp
        return (log_sum(e, self.mu, self.sigma) - self.peak).clamp(max=-1e-6)  # u >= 1e-6: log(1 - exp(-u)) is finite

    def __str__(self):
        n, end = len(self.mu), self.from_corner.norm().item() / self.radius
        return f"mixture of {n}: mean shift from a corner ends at {end:.3f} of the radius, " + (
            f"{n} clusters; log likelihood there less that in the middle: {self.gap:.3f}"
            if end > 1e-3
            else "one blob, no clusters"
        )


def simplex(d, radius):
    """(d + 1, d) float64: the corners of a regular simplex around 0, each `radius` from it."""
    across = torch.linalg.svd(torch.ones(1, d + 1, dtype=torch.float64)).Vh[1:]  # orthonormal, and orthogonal to ones
    return radius * math.sqrt((d + 1) / d) * across.T


def log_sum(e, mu, sigma):
    """log sum_i exp(-||e - mu_i||^2 / 2 sigma^2) (...) for e (..., d): log lk(e) but for a constant, which u drops."""
    return torch.logsumexp(-(e[..., None, :] - mu).square().sum(-1) / (2 * sigma**2), -1)


def ascend(e, mu, sigma):
    """The stationary point of the likelihood that mean shift climbs to from e (d,); 0 stays at 0, maximum or not."""
    for _ in range(100_000):
        last, e = e, torch.softmax(-(e - mu).square().sum(-1) / (2 * sigma**2), 0) @ mu
        if (e - last).abs().max() < 1e-13:
            break
    return e


def dcgan_plan(args, base):
    """Side of the smallest feature map, the channels from there to the picture, and the kernels of the blocks between:
    4, [64, 32, 16], [4, 4, 4] at side 32, base 16. Kernels of 4 (stride 2, padding 1) double a side, 3 makes 7 of 4."""
    plans = {28: (4, [4, 2, 1], [3, 4, 4]), 32: (4, [4, 2, 1], [4, 4, 4]), 64: (4, [8, 4, 2, 1], [4, 4, 4, 4])}
    if args.paper:
        plans[28] = 7, [2, 1], [4, 4]  # with --image-size 28; else its side is 32
    if args.image_size not in plans:
        fail(f"--arch dcgan makes pictures of 28, 32 or 64 pixels, not --image-size {args.image_size}")
    start, factors, kernels = plans[args.image_size]
    return start, [base * f for f in factors], kernels


def dcgan_init(m):
    """Radford et al. 2016, section 4: weights N(0, .02); as in its code, batch norm's scale N(1, .02)."""
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        for name, p in m.named_parameters():
            if "weight" in name:  # spectral norm's is parametrizations.weight.original
                nn.init.normal_(p, 1.0 if isinstance(m, nn.BatchNorm2d) else 0.0, 0.02)


# LOSS -----------------------------------------------------------------------------------------------------------------


def discriminator_loss(score_real, score_fake):
    """E[u(x)] - E[log(1 - exp(-u(G(z))))] for scores -u (B,): the paper's with 2 log lambda taken off."""
    return -score_real.mean() - log1mexp(-score_fake).mean()


def generator_loss(score_fake, kind):
    """ns: E[u(G(z))]. saturating: E[log(1 - exp(-u(G(z))))]. Of scores -u (B,)."""
    return -score_fake.mean() if kind == "ns" else log1mexp(-score_fake).mean()


def squared_gradient(D, x):
    """E[||grad u(x)||^2], of x (B, C, H, W): the sum over a picture's numbers, the mean over pictures. R1 is half of it
    on real pictures, times gamma (Mescheder et al. 2018, 1801.04406, eq. 9); not in the paper of this model."""
    x = x.detach().requires_grad_(True)
    (grad,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return grad.flatten(1).square().sum(1).mean()


def log1mexp(u):
    """log(1 - exp(-u)), u > 0, by the form keeping its digits; clamped, the other has a finite slope: 0 inf is NaN."""
    return torch.where(u < math.log(2), (-torch.expm1(-u.clamp(max=1))).log(), torch.log1p(-(-u.clamp(min=0.5)).exp()))


# TRAINING -------------------------------------------------------------------------------------------------------------


def train(args):
    device, channels = pick_device(args), DATASETS[args.dataset]
    torch.manual_seed(args.seed)
    G, D = make_generator(args, channels), make_discriminator(args, channels)  # drawn on the CPU
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    G.amp = D.amp = args.amp
    ema = averaged(G)
    opt_g, opt_d = adam(G, args.lr_g, args), adam(D, args.lr_d, args)
    batch = Batches(args, device)
    x = batch.buffer  # uint8 (d_steps, B, C, S, S), filled before each step()

    def step():
        """One iteration. It takes nothing, reads x and the random stream, and never waits: what a CUDA graph needs."""
        for x_uint8 in x:
            x_real = from_uint8(x_uint8)
            with torch.no_grad():  # D's backward ends at the picture
                x_fake = G(sample_z(args, len(x_real), device))
            score_real, score_fake = D(torch.cat([x_real, x_fake])).chunk(2)  # no batch norm: one forward for both
            d_loss = discriminator_loss(score_real, score_fake)
            if args.r1:
                k = math.ceil(args.penalty_share * len(x_real))  # the first k pictures: unbiased, noisier, cheaper
                d_loss = d_loss + args.r1 / 2 * squared_gradient(D, x_real[:k])
            opt_d.zero_grad(set_to_none=True)
            d_loss.backward()
            average_gradients(D)  # over ranks, where torchrun started several
            opt_d.step()

        for _ in range(args.g_steps):
            g_loss = generator_loss(D(G(sample_z(args, len(x_real), device))), args.loss)  # a fresh z
            opt_g.zero_grad(set_to_none=True)
            g_loss.backward(inputs=list(G.parameters()))  # D's weights get no gradient
            average_gradients(G)
            opt_g.step()
            update_ema(ema, G, args.ema)
        return {"d_loss": d_loss, "g_loss": g_loss, "d_acc": pair_accuracy(score_real, score_fake)}  # of the last

    # Run calls these two in eval mode without gradients, with labels y: draw for every sheet, score, figure and
    # --generate; rate, which is D's score, to calibrate --reject drs on pictures that D has not seen.
    def draw(z, y):
        x_fake = ema(z)
        return to_uint8(x_fake), D(x_fake)

    def rate(x_uint8, y):
        return D(from_uint8(x_uint8))

    run = Run(args, {"G": G, "D": D}, {"g": opt_g, "d": opt_d}, ema, draw, rate, batch)
    say(str(D[-1]))
    step = captured(step, args)  # one CUDA graph, under --graph
    while run.training():
        for i in range(args.d_steps):
            x[i], _ = batch()
        run.record(step())
    run.finish()


# ======================================================================================================================
# The method ends here. Below is the plumbing, the same in all seven scripts: FLAGS, DATA, STEP, RUN, in the order in
# which a run uses them. Its home is wgan_gp.py; after a change there `python tests/sync.py` copies it to the others.
# ======================================================================================================================
import contextlib, copy, functools, glob, hashlib, importlib, itertools, json, os, shutil, signal, sys, time, zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
import numpy as np
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

SCRIPT = Path(__file__)
RANDOM = {"cpu": torch.random, "cuda": torch.cuda, "mps": torch.mps}  # who keeps the state of a device's noise
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun: one process for each GPU


# FLAGS ----------------------------------------------------------------------------------------------------------------
def fail(message):
    """A user's mistake: one line on stderr, exit code 2, no traceback."""
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}\n")
    raise SystemExit(2)


@contextlib.contextmanager
def or_fail(message):
    """Around a line or two whose exceptions are a user's mistake; around more it would hide ours."""
    try:
        yield
    except Exception as e:
        fail(f"{message} ({type(e).__name__}: {e})")


def number(kind, low, high=2**40):
    """An argparse type: an int or a float in [low, high]; NaN and infinity are out."""

    def parse(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")

    parse.__name__ = kind.__name__
    return parse


def add_run_flags(p):
    """The flags of every image script. Its own stand before them, and its defaults follow in resolve."""
    p.error = fail
    a, count, share, rate = p.add_argument, number(int, 0), number(float, 0, 0.999999), number(float, 0, 10)
    a("--dataset", choices=DATASETS, default="digits", help="digits: rendered here, no download")
    a("--image-size", type=number(int, 8, 1024), help="28, 32 or 64; an mlp: any. Default: what suits the data")
    a("--arch", choices=("dcgan", "mlp"), default="dcgan", help="convolutional or fully connected networks")
    a("--ngf", type=number(int, 1, 4096), default=32, help="dcgan: channels of G's largest map; each smaller has twice")
    a("--ndf", type=number(int, 1, 4096), default=32, help="dcgan: channels of D's largest map; each smaller has twice")
    a("--latent-dim", type=number(int, 1, 65536), help="size of z. Default: 16 (grey, dcgan), 50 (bigan's mlp) or 100")
    a("--prior", choices=("normal", "uniform"), default="normal", help="law of z: N(0, I) or U[-1, 1]")
    a("--batch-size", type=number(int, 2), help="pictures a step")
    a("--d-steps", "--n-critic", type=number(int, 1, 1000), help="D updates an iteration")
    a("--g-steps", type=number(int, 1, 1000), default=1, help="G updates an iteration")
    a("--beta1", type=share, help="Adam's first moment")
    a("--beta2", type=share, help="Adam's second moment")
    a("--ema", type=share, default=0.999, help="decay of G's averaged copy, which makes every picture; 0: no averaging")
    a("--flip", action="store_true", help="mirror pictures at random: for faces and animals, not for digits")
    a("--holdout", type=count, default=0, help="training pictures that D never sees, for --reject drs: 1000, say")
    a("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the networks, the order of the data, and all noise")
    a("--paper", action="store_true", help="the paper's settings where no flag says otherwise, not the best ones")
    a("--dry-run", action="store_true", help="two iterations and one of everything else, on tiny data")
    p.fixed = vars(p.parse_args([])).keys()  # the flags so far: in a resumed run they cannot change
    a("--lr-g", type=rate, help="learning rate of G")
    a("--lr-d", type=rate, help="learning rate of D")
    a("--lr-decay", choices=("none", "linear", "best-fid"), default="none", help="linear: to 0; best-fid: --patience")
    a("--amp", action=argparse.BooleanOptionalAction, default=False, help="products and convolutions in bfloat16")
    p.named = vars(p.parse_args([])).keys() - {"dataset", "seed"}  # where they differ, they stand in the run's name
    a("--patience", type=number(int, 1), default=5, help="after so many worse FIDs back to best.pt, at half the rates")
    a("--epochs", type=number(int, 1), default=20, help="of N // batch D updates")
    a("--steps", type=number(int, 1), help="D updates in all; overrides --epochs")
    a("--data-dir", default="data", help="folder of the data sets, and of the trained network that scores")
    a("--log-every", type=count, default=100, help="D updates between rows of log.csv; 0: never")
    a("--sample-every", type=count, default=1000, help="D updates between sheets of samples")
    a("--eval-every", type=count, default=5000, help="D updates between scores of 10,000 samples; 0: only the last")
    a("--checkpoint-every", type=count, default=2000, help="D updates between writes of last.pt")
    a(
        "--reject",
        choices=("none", "naive", "drs"),
        default="none",
        help="choose pictures by D's score. naive: "
        "keep with chance sigmoid(score), not for a critic's score; drs: Azadi et al. 2019, calibrated on --holdout",
    )
    a("--drs-percentile", type=number(float, 0, 100), default=60.0, help="of D's scores, kept half; the paper: 80, 95")
    a("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="write the log for TensorBoard too")
    p.kept = vars(p.parse_args([]))  # the flags so far and their defaults: a resumed run has its checkpoint's
    a("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="mps is written for but untested")
    a("--graph", action=argparse.BooleanOptionalAction, help="replay the iteration as one graph. Default: on one GPU")
    a("--run-dir", help="default: runs/SCRIPT-DATASET-FLAGS-sSEED-TIME, FLAGS those that are not the default")
    a("--resume", metavar="FILE", help="a checkpoint: go on from it, with its flags unless given here")
    a("--generate", type=number(int, 1), metavar="N", help="with --resume: write N pictures as PNG, labels in turn")
    a("--generate-to", metavar="DIR", help="where to; default: RUN/generated")
    a("--z-file", metavar="FILE", help="with --generate: z from a .npy or .pt (N, latent-dim)")


def resolve(p, argv, best, mlp, paper):
    """Flags. Those not given are the checkpoint's with --resume, else the `paper`'s with --paper, else the `best`, and
    with --arch mlp those of `mlp` on top; else what suits the data, or add_run_flags' own default."""
    p.set_defaults(**best)
    for a in p._actions[1:]:  # all but --help, which shows these
        values = {"default": a.default, "--paper": paper.get(a.dest)}.items()
        a.help = (a.help or "") + "".join(f" ({k}: {v})" for k, v in values if v is not None and v is not False)
    args, old = p.parse_args(argv), {}
    if "" in vars(args).values():
        fail("a flag was given an empty value")
    if args.resume:
        checkpoint = read_checkpoint(args.resume)
        if checkpoint["script"] != SCRIPT.stem:
            fail(f"{args.resume} is a checkpoint of {checkpoint['script']}.py")
        old = {k: v for k, v in checkpoint["args"].items() if k in {*p.kept, "classes", "data", "name"}}
        args.paper, args.arch = old.setdefault("paper", True), old["arch"]  # from before there was --paper
    conv = args.arch == "dcgan"
    side = 28 if not conv else 32 if args.paper else {"cifar10": 32, "celeba": 64, "folder": 64}.get(args.dataset, 28)
    nz = 16 if conv and not args.paper and DATASETS[args.dataset] == 1 else 100  # on grey 16 beat 100 by a third
    base = p.kept | dict(image_size=side, latent_dim=nz) | (paper if args.paper else best if conv else best | mlp) | old
    args = p.parse_args(argv, argparse.Namespace(**base | (dict(epochs=None, steps=None) if old.get("steps") else {})))
    if not (args.steps or args.epochs):
        args.steps = old["steps"]  # neither was given, to train for longer
    free = {"seed"} if args.generate and args.reject != "drs" else set()  # other pictures; drs needs its --holdout
    for k in (p.fixed & old.keys()) - free:
        if vars(args)[k] != old[k]:
            fail(f"--{k.replace('_', '-')} is {old[k]} in {args.resume}: it cannot change")
    if args.generate and not args.resume:
        fail("--generate N needs --resume FILE, the checkpoint to draw from")
    if (args.z_file or args.generate_to) and not args.generate:
        fail("--z-file and --generate-to need --generate N")
    if args.z_file and args.reject != "none":
        fail("--z-file goes without --reject")
    if args.lr_decay == "best-fid" and not args.eval_every:
        fail("--lr-decay best-fid needs --eval-every")
    if args.reject == "drs" and args.holdout < 2:
        fail("--reject drs needs pictures D never saw: --holdout 1000, say")
    changed = [f"{k}{v}".removesuffix("True") for k, v in vars(args).items() if k in p.named and v != base.get(k)]
    while len("-".join(changed)) > 60:
        changed.pop()  # what a legend can hold
    args.name = old.get("name", "-".join([SCRIPT.stem, args.dataset, *changed, f"s{args.seed}"]))
    if args.dry_run:
        args.steps, args.batch_size, args.holdout = 2 * args.d_steps, min(args.batch_size, 16), min(args.holdout, 64)
        args.log_every = args.sample_every = args.eval_every = args.checkpoint_every = args.d_steps
    return args


def pick_device(args):
    """The device, this rank's own under torchrun, which it joins; fails where a flag asks for what is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(k for k in there if there[k]) if args.device == "auto" else args.device
    if not there[name]:
        fail(f"--device {name}: this PyTorch finds no such device")
    if args.graph is None:
        args.graph = name == "cuda" and WORLD == 1
    if args.graph and (name != "cuda" or WORLD > 1):
        fail("--graph needs CUDA, and one process: ranks are not captured")
    if args.amp and name == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        fail("--amp: this GPU has no bfloat16 of its own")
    if args.batch_size % WORLD:
        fail(f"--batch-size {args.batch_size} does not divide among {WORLD} ranks")
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    torch.backends.cudnn.benchmark = True
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        torch.distributed.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(days=1))
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


# DATA -----------------------------------------------------------------------------------------------------------------
DATASETS = dict(digits=1, mnist=1, fashion=1, cifar10=3, celeba=3, folder=3, stacked_mnist=3)  # channels
TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "celeba": ("CelebA", "celeba"),
}  # class, folder


def load_data(name, data_dir, size, split, limit=None):
    """The "train" or "test" pictures of a data set: uint8 (N, C, size, size) in 0..255, int64 labels (N,) or -1."""
    root, train = Path(data_dir), split == "train"
    if name == "folder":
        return read_files(root, *list_folder(root, split), size, limit)
    if name == "celeba":
        names = from_torchvision(name, root, split=split).filename
        return read_files(root / "celeba" / "img_align_celeba", names, [-1] * len(names), size, limit)
    if name == "digits":
        x, y = render_digits(*((20_000, 1) if train else (10_000, 2)))  # how many, and a seed
    else:
        data = from_torchvision(name.removeprefix("stacked_"), root, train=train)
        x, y = torch.as_tensor(data.data), torch.as_tensor(data.targets).long()
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)
    if name == "stacked_mnist":
        x, y = stack(x, y, *((128_000, 3) if train else (26_000, 4)))
    return fit(x[:limit], size), y[:limit]


def from_torchvision(name, root, **part):
    """torchvision's data set, the `part` asked for (train=, split=): files under `root` are used, others downloaded."""
    kind, place = TORCHVISION[name]
    ours = [d for d in (root / place, *(root / place).parents) if not d.exists()]
    try:
        return getattr(torchvision.datasets, kind)(str(root), download=True, **part)
    except Exception as e:  # no network, a damaged or cut file: torchvision raises a different kind for each
        for d in (d for d in ours if d.is_dir() and not any(d.iterdir())):
            d.rmdir()
        fail(
            f"--dataset {name}: no usable files in {root / place} and no download ({e}). Offline: put torchvision's "
            f"{kind} there, name a folder that has it by --data-dir, or use --dataset digits"
        )


def list_folder(root, split):
    """Pictures' paths below `root`; labels by the first folder on the way (those to train on first) or -1. train/ and
    test/ are the split, or else every tenth file is for testing. In order of the names' hashes: any n are a sample."""
    apart, kinds = (root / "train").is_dir() and (root / "test").is_dir(), "png jpg jpeg bmp webp gif tif tiff".split()
    found = [p for p in map(Path, glob.glob("**", root_dir=root, recursive=True)) if p.suffix[1:].lower() in kinds]
    found.sort(key=lambda p: hashlib.sha256(os.fsencode(p.as_posix())).digest())  # glob left out what is hidden
    tests = set(found[9::10] or found[-1:])
    part = {p: p.parts[0] if apart else "test" if p in tests else "train" for p in found}
    label = {p: p.parts[apart] for p in found if len(p.parts) > 1 + apart}
    names = list(dict.fromkeys(name for _, name in sorted((part[p] != "train", label[p]) for p in label)))
    files = [p for p in found if part[p] == split]
    if not files:
        fail(f"--dataset folder: no {'/'.join(kinds)} in {root / split if apart else root}: see --data-dir")
    return files, [names.index(label[p]) if p in label else -1 for p in files]


def read_files(root, names, labels, size, limit):
    """uint8 (N, 3, size, size) and labels (N,) of the files that can be read. Decoded once, by threads, and kept beside
    `root` under a name that changes with the files (names, sizes, dates) and with `size`."""
    files, y = [root / name for name in names[:limit]], torch.tensor(labels[:limit])
    facts = [p.stat() if p.exists() else p.lstat() for p in files]  # a link to nothing
    stamp = [size, *((str(name), s.st_size, s.st_mtime_ns) for name, s in zip(names, facts))]
    key = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:12]
    cache = root.resolve().parent / f"{root.resolve().name}-{size}-{key}.npz"
    if cache.exists():
        with or_fail(f"delete {cache}"), np.load(cache) as kept:
            return torch.from_numpy(kept["x"]), y[kept["good"]]
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(lambda path: read_picture(path, size), files))
    good, bad = ([i for i, p in enumerate(pictures) if isinstance(p, kind)] for kind in (np.ndarray, str))
    if not good:
        fail(f"no picture in {root} can be read: {pictures[0]}")
    if bad:
        sys.stderr.write(f"left out {len(bad)} of {len(files)} files: {'; '.join(pictures[i] for i in bad[:3])}\n")
    x = np.stack([pictures[i] for i in good])
    try:
        if not limit:
            write_whole(cache, lambda f: np.savez(f, x=x, good=good), f".{os.getpid()}")
    except OSError as e:
        sys.stderr.write(f"not kept for the next run: {cache} ({e})\n")
    return torch.from_numpy(x), y[good]


def read_picture(path, size):
    """uint8 (3, size, size), upright, the middle square, resized with antialiasing; or a line on why there is none."""
    try:
        with Image.open(path) as im:
            if im.mode.startswith("I"):  # 16 bits a pixel, which convert would clip
                im = Image.fromarray((np.asarray(im).clip(0, 65535) / 257).round().astype(np.uint8))
            im = ImageOps.exif_transpose(im)
            if im.has_transparency_data:  # what is see-through becomes white
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
            im = ImageOps.fit(im.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            return np.asarray(im).transpose(2, 0, 1)
    except Exception as e:
        return f"{path} ({e})"  # Pillow raises a different kind for each kind of damage


def render_digits(n, seed):
    """n numerals (n, 1, 28, 28), labels 0..9 in turn: Pillow's own font, strokes, blurs and affine maps at random."""
    bank, rng, y = [], torch.Generator().manual_seed(seed), torch.arange(n) % 10
    for digit, stroke, blur in itertools.product("0123456789", (1, 2), (1.2, 1.8)):
        im = Image.new("L", (64, 64))
        ImageDraw.Draw(im).text((32, 32), digit, 255, ImageFont.load_default(54), anchor="mm", stroke_width=stroke)
        bank.append(torch.from_numpy(np.array(im.filter(ImageFilter.GaussianBlur(blur)))))
    glyphs = torch.stack(bank)[y * 4 + torch.randint(4, (n,), generator=rng), None]
    scale = torch.tensor([0.18, 0.2, 0.12, 0.1, 0.08, 0.08])  # +-10 degrees, shear .2, scales, shifts of a pixel
    angle, shear, sx, sy, tx, ty = (torch.rand(6, n, generator=rng).double() * 2 - 1) * scale[:, None]
    c, s = angle.cos(), angle.sin()  # all in float64: float32 rounds some pixels otherwise on another CPU
    theta = torch.stack([c * (1.05 + sx), shear - s, tx, s, c * (1.05 + sy), ty], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, 1, 28, 28], align_corners=False)
    return F.grid_sample(glyphs.double(), grid, align_corners=False).round().clamp(0, 255).byte(), y


def stack(x, y, n, seed):
    """n pictures (n, 3, H, W) of three digits drawn at random, red, green and blue; labels 0..999, red the hundreds."""
    i = torch.randint(len(x), (n, 3), generator=torch.Generator().manual_seed(seed))
    return x[i, 0], y[i] @ torch.tensor([100, 10, 1])


def fit(x, size):
    """uint8 (N, C, H, W) -> side `size`: 28 becomes 32 by 2 pixels of zeros, then all is resized with antialiasing."""
    x = F.pad(x, (2, 2, 2, 2)) if x.shape[-1] == 28 and size >= 32 else x
    return torch.cat([torchvision.transforms.functional.resize(b, [size, size]) for b in x.split(1000)])


class Batches:
    """batch() -> uint8 (B, C, S, S), labels (B,), from one tensor on the device; B is a rank's own share of the batch.
    Epoch e's order is a pure function of (seed, e): there is nothing to checkpoint but the step."""

    def __init__(self, args, device):
        self.args, self.device, self.step, self.epoch, self.held = args, device, 0, None, None
        shape = args.d_steps, args.batch_size // WORLD, DATASETS[args.dataset], args.image_size, args.image_size
        with or_fail("--batch-size"):
            self.buffer = torch.empty(shape, dtype=torch.uint8, device=device)  # see captured
        self.load = functools.partial(load_data, args.dataset, args.data_dir, args.image_size)  # for scores too
        if args.generate and args.reject != "drs":
            return  # the data is not needed
        if RANK:
            from_rank_0()  # waits while that one downloads or decodes, up to pick_device's timeout
        x, y = self.load("train", 256 if args.dry_run else None)
        if not RANK:
            from_rank_0()
        if args.dataset == "folder" and not RANK and not args.dry_run:  # now, not after hours of training
            say(f"{args.data_dir}: {len(x)} pictures read, {len(self.load('test')[0])} more set aside for testing")
        data = f"{len(x)} pictures of CRC {zlib.crc32(x.contiguous().numpy()) if args.dataset == 'folder' else 0:08x}"
        if vars(args).setdefault("data", data) != data:
            fail(f"{args.resume} saw {args.data}, the data is {data}")
        args.classes = int(y.max()) + 1 if y.min() >= 0 else 0
        if args.holdout:
            held, kept = torch.randperm(len(x), generator=seeded(args.seed, 7)).tensor_split([args.holdout])
            self.held, x, y = (x[held], y[held]), x[kept], y[kept]
        self.x, self.y, self.per_epoch = x.to(device), y.to(device), len(x) // args.batch_size
        if not self.per_epoch:
            fail(f"--batch-size {args.batch_size} is larger than the data: {len(x)} pictures")

    def __call__(self):
        (epoch, i), a, n = divmod(self.step, self.per_epoch), self.args, len(self.x)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, torch.randperm(n, generator=seeded(a.seed, 0, epoch)).to(self.device)
            if a.flip:
                self.mirror = torch.randint(2, (n, 1, 1, 1), generator=seeded(a.seed, 11, epoch)).to(self.device)
        self.step += 1
        index = self.order[i * a.batch_size : (i + 1) * a.batch_size][RANK::WORLD]
        x = self.x[index]
        return torch.where(self.mirror[index] > 0, x.flip(3), x) if a.flip else x, self.y[index]


# STEP -----------------------------------------------------------------------------------------------------------------
def to_uint8(x):
    """[-1, 1] -> uint8 0..255: the one way out, for files and for metrics alike."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


def from_uint8(x):
    """uint8 0..255 -> float [-1, 1]."""
    return x / 127.5 - 1


class Net(nn.Sequential):
    """nn.Sequential (several inputs go to its first layer as a tuple) that under --amp trains with its products in
    bfloat16; what comes out stays float32. No cache of cast weights: filled under no_grad, it would cut gradients."""

    amp = False

    def forward(self, *inputs):
        first = inputs[0]
        with torch.autocast(first.device.type, torch.bfloat16, self.amp and self.training, cache_enabled=False):
            return super().forward(inputs if len(inputs) > 1 else first).to(first.dtype)


def rand(n, *shape, like):
    """U[0, 1) of shape (n, *shape), device and dtype of `like`. Ranks draw for the whole batch and keep their rows."""
    return torch.rand(WORLD * n, *shape, device=like.device, dtype=like.dtype)[RANK::WORLD]


def sample_z(args, n, device, generator=None):
    """z (n, latent_dim) from the prior. Without a generator as in training: ranks draw all and keep their own rows."""
    draw = torch.randn if args.prior == "normal" else lambda *a, **k: torch.rand(*a, **k) * 2 - 1
    if generator:
        return draw(n, args.latent_dim, device=device, generator=generator)
    return draw(WORLD * n, args.latent_dim, device=device)[RANK::WORLD]


def seeded(*key):
    """A CPU generator, a pure function of whole numbers (hashed: torch keeps 32 bits of a seed): the run's seed, then
    0 data, 1 sheets, 2-5, 9, 12 scores and figures, 6 --generate, 7 --holdout, 8 --reject, 10 --probe, 11 --flip."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def adam(net, lr, args):
    cuda = next(net.parameters()).is_cuda  # there the rate lies on the device, so that a captured step sees it change
    return torch.optim.Adam(
        net.parameters(),
        torch.tensor(lr, device="cuda") if cuda else lr,
        (args.beta1, args.beta2),
        fused=True,
        capturable=cuda,
    )


def averaged(G):
    """The copy of G that update_ema averages into and that every picture comes from."""
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    ema.register_buffer("updates", torch.zeros((), device=next(G.parameters()).device), persistent=False)
    return ema


@torch.no_grad()
def update_ema(ema, G, decay):
    """ema <- d ema + (1 - d) G with d = min(decay, (1 + t) / (10 + t)) at its t-th update; buffers are copied."""
    ema.updates += 1
    weight = 1 - ((1 + ema.updates) / (10 + ema.updates)).clamp(max=decay)
    for e, p in zip(ema.parameters(), G.parameters()):
        e.lerp_(p, weight)
    for name, b in G.named_buffers():
        ema.get_buffer(name).copy_(b)


def pair_accuracy(score_real, score_fake):
    """The share (0 to 1) of all pairs with score(real) > score(fake), comparable across all losses."""
    return (score_real.detach()[:, None] > score_fake.detach()).float().mean()


def average_gradients(net):
    """Their mean over ranks."""
    for p in net.parameters() if WORLD > 1 else ():
        torch.distributed.all_reduce(p.grad.div_(WORLD))


def from_rank_0(value=None):
    """What rank 0 passes; the others wait for it."""
    box = [value]
    if WORLD > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def captured(step, args):
    """step() replayed as one CUDA graph: to launch its hundreds of small kernels one by one takes longer than to run
    them. The first calls run eagerly and count as training; they let cuDNN choose kernels and Adam make its moments,
    on the stream that then captures. After that a tensor of step() may be written to, never replaced."""

    def calls():
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        for _ in range(1 if args.dry_run else 3):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                values = {k: v.detach() for k, v in step().items()}
            torch.cuda.current_stream().wait_stream(side)
            yield values
        with or_fail("step() cannot be captured: give --no-graph"), torch.cuda.graph(graph, stream=side):
            values = {k: v.detach() for k, v in step().items()}  # a capture executes nothing
        while True:
            graph.replay()
            yield values

    return functools.partial(next, calls()) if args.graph else step


# RUN ------------------------------------------------------------------------------------------------------------------
def write_whole(path, write, apart=""):
    """write(file) to a file beside `path`, flush, rename: a kill leaves the old one. `apart` tells writers apart."""
    if RANK:
        return
    with open(temporary := path.with_name(f"{path.name}{apart}.tmp"), "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def save_sheet(x, path, columns=8):
    """uint8 (N, C, H, W) as one PNG, row by row, two pixels of white between pictures; one picture as it is."""
    sheet = torchvision.utils.make_grid(x.cpu(), columns, padding=2, pad_value=255)[: x.shape[1]]  # grey comes back RGB
    Image.fromarray(sheet.permute(1, 2, 0).squeeze(2).contiguous().numpy()).save(path)


def say(text, redraw=False):
    """A line on stdout, rank 0's; on a terminal the next one is written over a `redraw` line."""
    if RANK:
        return
    live = getattr(sys.stdout, "isatty", bool)()  # it is None where a service closed it
    if live:
        text = "\r\033[K" + (text[: shutil.get_terminal_size().columns - 1] if redraw else text + "\n")
    with contextlib.suppress(OSError):
        print(text, end="" if live else "\n", flush=True)  # nobody reads: train on


def make_folder(args):
    """The run's folder: that of the checkpoint, or a new one. Fails before it leaves anything behind."""
    old = Path(args.resume).parent if args.resume else None
    folder = Path(args.run_dir or old or f"runs/{args.name}-{datetime.now():%Y%m%d-%H%M%S-%f}")
    if args.generate:
        return folder
    fresh = not old or folder.resolve() != old.resolve()
    if fresh and any(folder.glob("*")):
        fail(f"--run-dir {folder} is in use: name another, or --resume its last.pt")
    with or_fail(f"--run-dir {folder}"):
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        if fresh:
            shutil.copy(SCRIPT, folder / SCRIPT.name)
        write_whole(folder / "args.json", lambda f: f.write(json.dumps(vars(args), indent=1).encode()))
    return folder


class Run:
    """Drives a training, of which it sees these arguments alone; one on every rank, of which rank 0's writes."""

    def __init__(self, args, nets, opts, ema, draw, rate, batch, labels=1):
        """labels: the number of classes that draw's y can ask for; 1: it has no y."""
        self.args, self.nets, self.opts, self.ema, self.batch = args, nn.ModuleDict(nets), opts, ema, batch
        self.labels, self.step, self.count, self.sums = labels, 0, 0, torch.zeros((), device=batch.device)
        self.draw, self.rate = (functools.partial(in_parts, self, f) for f in (draw, rate))
        self.signal = self.leaving = self.study = self.board = None
        self.state = {"best_fid": math.inf, "stale": 0, "scored": 0, "seconds": 0.0}
        if args.resume:
            restore(self, args.resume)
        self.total = 0 if args.generate else args.steps or args.epochs * batch.per_epoch
        if 0 < self.total <= self.step - args.d_steps:
            fail(f"{args.resume} is at step {self.step}, past {self.total}")
        Study = SCRIPT.with_name("metrics.py").exists() and importlib.import_module("metrics").Study
        if not Study and (args.reject != "none" or args.lr_decay == "best-fid"):
            fail("--reject and --lr-decay best-fid need metrics.py beside the script")
        with or_fail("--tensorboard: pip install tensorboard"):
            writer = args.tensorboard and not RANK and importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.folder = from_rank_0(None if RANK else make_folder(args))
        if not Study:
            say("metrics.py is not beside this script: no scores, and of the figures only the sheets")
        elif not RANK:
            self.study = Study(args, self.folder, batch.load, self.draw, self.rate, self.noise, batch.held, labels, say)
        if args.generate:
            return
        if not (self.folder / "best.pt").exists():
            self.state.update(best_fid=math.inf, stale=0, scored=0)
        self.start, self.mark = time.time() - self.state["seconds"], (time.time(), self.step)
        log = self.folder / "log.csv"
        header, *rows = (log.read_text() if log.exists() else "").split() or ["step"]
        self.rows = [header, *(r for r in rows if int(r.split(",")[0]) <= self.step)]  # as of an unbroken run
        if log.exists():
            write_whole(log, lambda f: f.write("\n".join([*self.rows, ""]).encode()))
        if writer:
            self.board = writer(self.folder, purge_step=self.step)
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.stop)
        say(
            f"{self.folder}: {self.total} D updates of {args.batch_size} out of {len(batch.x)} pictures"
            + ", which are few," * (len(batch.x) < 500)
            + f" on {WORLD} x {batch.device}"
        )

    def noise(self, n, *key):
        """z (n, latent_dim) for figures and scores: a pure function of the seed and a key; 0 is the data's."""
        return sample_z(self.args, n, "cpu", seeded(self.args.seed, *key))

    def stop(self, number, frame):
        """Ends the training after this iteration (ranks: within ten); a second signal, or one after that, at once."""
        if self.signal is not None:
            raise SystemExit(128 + (number or self.signal))
        self.signal = number

    def training(self):
        """Whether to go on. First what is due at this step, and the learning rates of the next."""
        args, state = self.args, self.state
        if args.generate:
            return False
        if self.due(args.sample_every):
            self.sheet(f"samples/step_{self.step:07}.png")
        if self.signal is None and self.due(args.eval_every):
            self.evaluate()  # a resumed run too, if killed at it
        if self.due(args.log_every, args.sample_every, args.eval_every):
            self.mark = time.time(), self.step
        if WORLD == 1 or self.due(args.eval_every) or self.step // args.d_steps % 10 == 0:  # all ranks at one step
            self.leaving, state["stale"] = from_rank_0((self.signal, state["stale"]))
        if args.lr_decay == "best-fid" and state["stale"] >= args.patience:
            restore(self, self.folder / "best.pt", keep_step=True)
            state["stale"], args.lr_g, args.lr_d = 0, args.lr_g / 2, args.lr_d / 2
        scale = max(0, 1 - self.step / self.total) if args.lr_decay == "linear" else 1
        for opt, lr in ((self.opts["g"], args.lr_g * scale), (self.opts["d"], args.lr_d * scale)):
            for group in opt.param_groups:
                group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr
        return self.step < self.total and self.leaving is None

    def due(self, *every):
        """At the first end of an iteration at or past each multiple of one of `every` D updates, and at the start."""
        return any(n > 0 and self.step % n < self.args.d_steps for n in every)

    def record(self, values):
        """Once an iteration: its losses go onto sums that stay on the device; a row of the log, a checkpoint."""
        self.step, self.count = self.step + self.args.d_steps, self.count + 1
        self.sums = self.sums + torch.stack([v.detach() for v in values.values()])
        if self.due(self.args.log_every):
            progress(self, list(values))
        if self.due(self.args.checkpoint_every):
            save(self)

    def sheet(self, name):
        """Of 64 fixed z; where there are labels, a row of the same eight z for each of the first 20."""
        check_finite(self)
        n, rows = (64, 1) if self.labels == 1 else (8, min(self.labels, 20))
        x, _ = self.draw(self.noise(n, 1).repeat(rows, 1), torch.arange(rows).repeat_interleave(n))
        if not RANK:
            save_sheet(x, self.folder / name)

    def evaluate(self):
        """Scores of fresh samples. best.pt goes by the FID to training pictures, so the test set chooses nothing."""
        if not self.study or self.state["scored"] == self.step:
            return  # step 0, or resumed
        save(self)  # scoring may fail, of memory say: that must not cost the run
        if scores := self.study.evaluate(self.step):
            self.state.update(scored=self.step, stale=self.state["stale"] + 1)
            if scores["fid_train"] < self.state["best_fid"]:
                self.state.update(best_fid=scores["fid_train"], stale=0)
                save(self, "best.pt")
            log_row(self, scores)
            save(self)  # it now knows of the score

    def finish(self, more_figures=lambda: None):
        """The last checkpoint, figures and scores; with --generate the pictures asked for."""
        if self.args.generate:
            return None if RANK else generate(self)
        save(self)
        if self.leaving is not None:
            say(f"stopped at step {self.step}: go on with --resume {self.folder / 'last.pt'}")
            raise SystemExit(128 + self.leaving)
        if RANK:
            return
        self.stop(0, None)  # at once, if there was a signal since the last look; from here on any does
        self.sheet("samples.png")
        more_figures()
        self.evaluate()
        if self.study:
            self.study.last_scores(lambda name: restore(self, self.folder / name, keep_step=True))
        say(f"done: {self.folder}")


@torch.no_grad()
def in_parts(run, f, rows, y=None):
    """f, draw or rate, of any number of rows: 500 at a time, in eval mode and back, without gradients; on the CPU."""
    y, device = torch.arange(len(rows)) % run.labels if y is None else y, run.batch.device
    run.nets.eval()
    parts = [f(a.to(device), b.to(device)) for a, b in zip(rows.split(500), y.split(500))]
    run.nets.train()
    return torch.cat(parts).cpu() if torch.is_tensor(parts[0]) else [torch.cat(p).cpu() for p in zip(*parts)]


def check_finite(run):
    """Before anything is read or written: a NaN stops the run and leaves the last good checkpoint."""
    if not all(t.isfinite().all() for t in (run.sums, *run.nets.parameters())):
        fail(
            f"a loss or weight is not finite by step {run.step}: try lower --lr-d, --lr-g"
            + f"; {run.folder / 'last.pt'} is from before" * (run.folder / "last.pt").exists()
        )


def progress(run, names):
    """A row of mean losses and learning rates, and the line on how far the run is and when it will end."""
    check_finite(run)  # waits for the device
    if WORLD > 1:
        torch.distributed.all_reduce(run.sums)
    means = dict(zip(names, (run.sums / WORLD / run.count).tolist()))
    speed = (run.step - run.mark[1]) / max(time.time() - run.mark[0], 1e-9)  # D updates a second, of training alone
    run.sums, run.count = torch.zeros_like(run.sums), 0
    rates = {f"lr_{k}": float(opt.param_groups[0]["lr"]) for k, opt in run.opts.items()}
    row = log_row(run, {**means, "images_per_s": speed * run.args.batch_size, **rates})
    say(
        f"epoch {row['epoch']:.1f}/{run.total / run.batch.per_epoch:.4g}  D {run.step} G {row['g_updates']}  "
        + "".join(f"{k} {v:.3f}  " for k, v in means.items())
        + f"{row['images_per_s']:.0f} images/s  "
        f"ETA {timedelta(seconds=int(max(0, run.total - run.step) / speed))}",
        redraw=True,
    )


def log_row(run, row):
    """One more row {column: number} of log.csv, which is small and written whole, as a column may be new. Its rows are
    kept as text: ten thousand take 2 ms to write again, kept as dicts 27. Returns the whole row."""
    row = {
        "step": run.step,
        "epoch": run.step / run.batch.per_epoch,
        "g_updates": run.step // run.args.d_steps * run.args.g_steps,
        "seconds": time.time() - run.start,
        **row,
    }
    columns = list(dict.fromkeys([*run.rows[0].split(","), *row]))
    cells = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()}
    run.rows = [
        ",".join(columns),
        *(r + "," * (len(columns) - 1 - r.count(",")) for r in run.rows[1:]),
        ",".join(cells.get(k, "") for k in columns),
    ]
    write_whole(run.folder / "log.csv", lambda f: f.write("\n".join([*run.rows, ""]).encode()))
    for k, v in row.items() if run.board else ():
        run.board.add_scalar(k, v, run.step)
    return row


def save(run, name="last.pt"):
    """A checkpoint: plain types and tensors."""
    check_finite(run)
    run.state["seconds"] = time.time() - run.start
    checkpoint = {
        "script": SCRIPT.stem,
        "args": dict(vars(run.args)),
        "step": run.step,
        "state": run.state,
        "rng": {k: RANDOM[k].get_rng_state() for k in ("cpu", run.batch.device.type)},
        "window": {"sums": run.sums, "count": run.count},
        "nets": {k: net.state_dict() for k, net in run.nets.items()},
        "ema": run.ema.state_dict(),
        "opts": {k: opt.state_dict() for k, opt in run.opts.items()},
    }
    write_whole(run.folder / name, functools.partial(torch.save, checkpoint))


def read_checkpoint(path):
    with or_fail(f"{path} is not a whole checkpoint of these scripts"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {k: checkpoint[k] for k in ("script", "args", "step", "nets", "ema", "opts", "rng", "state", "window")}


def restore(run, path, keep_step=False):
    """Networks, average and moments, in place, as a captured step reads them; then step, log and noise (another kind
    of device's starts from the seed). Rates and betas are flags. Returns the checkpoint's step."""
    checkpoint, device = read_checkpoint(path), run.batch.device
    with or_fail(f"{path} does not fit these networks"):
        for k, net in run.nets.items():
            net.load_state_dict(checkpoint["nets"][k])
        run.ema.load_state_dict(checkpoint["ema"])
        for k, opt in run.opts.items():
            params = [p for group in opt.param_groups for p in group["params"]]
            for i, moments in checkpoint["opts"][k]["state"].items():
                for m, v in moments.items():
                    opt.state[params[i]].setdefault(m, v.to(params[i].device)).copy_(v)
    if not keep_step:
        run.step = run.batch.step = checkpoint["step"]
        run.sums, run.count = checkpoint["window"]["sums"].to(device), checkpoint["window"]["count"]
        run.state.update(checkpoint["state"])
        run.ema.updates.fill_(run.step // run.args.d_steps * run.args.g_steps)
        for k in checkpoint["rng"].keys() & {"cpu", device.type}:
            RANDOM[k].set_rng_state(checkpoint["rng"][k])
    return checkpoint["step"]


def generate(run):
    """--generate N pictures as PNG files: of fresh z, of --z-file, or chosen by --reject."""
    args, out, took = run.args, Path(run.args.generate_to or run.folder / "generated"), None
    if any(out.glob("*")):
        fail(f"--generate-to {out} is in use")
    z = run.noise(args.generate, 6)
    if args.z_file:
        with or_fail(f"--z-file {args.z_file}, to be ({args.generate} or more, {args.latent_dim}) and finite"):
            z = np.load(args.z_file) if args.z_file.endswith(".npy") else torch.load(args.z_file, weights_only=True)
            z = torch.as_tensor(z).float()[: args.generate]
            if z.shape != (args.generate, args.latent_dim) or not z.isfinite().all():
                raise ValueError(tuple(z.shape))
    if args.reject == "none":
        x, _ = run.draw(z)
    else:
        with or_fail(f"--reject {args.reject}"):
            x, took = run.study.kept(args.generate, 6)
    with or_fail(f"--generate-to {out}"):
        out.mkdir(parents=True, exist_ok=True)
    for i in range(len(x)):
        save_sheet(x[i : i + 1], out / f"{i:05}.png")
    say(f"{args.generate} pictures in {out}" + (f": {took['line']}" if took else ""))


def main(argv=None):
    try:
        train(parse_args(argv))
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None  # outside the loop, or the second one
    finally:
        if WORLD > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
