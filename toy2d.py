"""Mode coverage in two dimensions: five objectives of this collection on a ring or a grid of Gaussians.

D(x) is a score of any size. Where it is a logit, p(x) = sigmoid(D(x)) is the probability that x is real.

    gan         D     min  -E[log p(x)] - E[log(1 - p(G(z)))]                           arXiv 1406.2661
                G     min  -E[log p(G(z))]        or, with --loss minimax,  E[log(1 - p(G(z)))]
    unrolled    D     as gan                                                            arXiv 1611.02163
                G     min  minus all of D's loss  or, with --loss ns, as gan: both by D_k in the place of D. That is
                      D after k more of its own steps, which depend on G
    wgan_clip   D     min  E[D(G(z))] - E[D(x)], then each weight is clipped to [-c, c] arXiv 1701.07875
                G     min  -E[D(G(z))]
    wgan_gp     D     min  E[D(G(z))] - E[D(x)] + lambda E[(||grad D(x_hat)|| - 1)^2]   arXiv 1704.00028
                G     min  -E[D(G(z))]        x_hat lies between a real point and a made one
    mdgan       D     min  E[u(x)] - E[log(1 - exp(-u(G(z))))]                          arXiv 1811.00152
                G     min  E[u(G(z))]         or, with --loss minimax,  E[log(1 - exp(-u(G(z))))]
                D's layers map x to a point of nine dimensions. There stands a mixture of ten Gaussians, which has
                nothing to do with those of the data. u is 0 where it is likeliest, and larger elsewhere. D(x) is -u

G's loss in unrolled and mdgan, and in all of --protocol metz, is minimax by default; in gan it is ns.

Why modes are lost: if D stood still, the best G would put all its points where D is highest, on one spot. Points stay
apart because D soon lowers its score where they crowd. A D that is much slower than G comes too late.

A generator that has learned the distribution puts points on each mode (covered), the right share on each (reverse KL),
and close to its centre (high quality, within 3 standard deviations: 98.9 % of the real points are). Only together do
these say much: 2,500 points spread evenly over the grid, from -5 to 5, cover 21 of its 25 modes, with 2 % of high
quality. coverage() has all the scores.

    python toy2d.py --protocol metz --method gan         collapses into one blob, which wanders
    python toy2d.py --protocol metz --method unrolled    spreads over all 8 modes
    python toy2d.py --data grid --method wgan_gp --seeds 3
    python toy2d.py --table --quick                      all of them beside the published figures

--seeds N trains N runs at once, as one batch of networks. Protocols: pacgan (Lin et al. 2018, arXiv 1712.04086): ring
of radius 1 and std .01, grid +-4 and std .05, 2,500 points; metz (arXiv 1611.02163): ring of radius 2 and std .02, and
the game of METZ. There is no --resume. --reject drs also scores the points that D keeps.
"""

# `uv run toy2d.py` reads this block, installs the packages and runs the file. Without uv it is a comment.
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=10.1"]
# ///

import argparse
import copy
import csv
import json
import math
import sys
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from metrics import WORLD, HelpFormatter, contents, fail, file_name, number, or_fail, platt, rejected, say, warn

# Each is the objective of the script of its name; gan: of dcgan.py.
METHODS = ("gan", "wgan_clip", "wgan_gp", "unrolled", "mdgan")
# Defaults of one objective, found by trying on seed 0. A WGAN's Adam goes without its first moment. MD-GAN has two
# layers, as its authors have: with three layers, one of three runs on the ring lost modes. Width, noise, batch, decay
# and average are the same for all. (Adam's beta2 is .9 for the WGANs and .999 for the others: see train.) The steps
# make runs of three to eight minutes of one CPU core for five seeds.
TUNED = {
    "gan": dict(),
    "unrolled": dict(loss="minimax", lr_d=3e-4, steps=2000),
    "mdgan": dict(loss="minimax", layers=2, steps=12_000),
    "wgan_clip": dict(d_steps=2, beta1=0.0, lr_d=2e-3, steps=5000),
    "wgan_gp": dict(d_steps=2, beta1=0.0, lr_g=2e-3, lr_d=4e-3, steps=5000),
}
# The toy game of Metz et al. 2017 (rates and z as in their demo), in which a plain GAN collapses: D learns ten times
# more slowly than G, G's output is linear, nothing decays, and the weights of G that are scored are the last, not an
# average. Their batch is 512, ours 256.
METZ = dict(
    radius=2.0,
    loss="minimax",
    layers=2,
    slope=0.0,
    bound=0.0,
    latent_dim=256,
    d_steps=1,
    lr_g=1e-3,
    lr_d=1e-4,
    beta1=0.5,
    lr_decay="none",
    ema=0.0,
    steps=3000,
)

OF_METHODS = {  # flags that only some objectives have
    "loss": ("gan", "unrolled", "mdgan"),
    "k": ("unrolled",),
    "gp_weight": ("wgan_gp",),
    "clip": ("wgan_clip",),
    "mixture": ("mdgan",),
}


def parse_args(argv=None, warns=True):
    """The flags, as a namespace.

    One that is not given has its value in METZ (--protocol metz) or in TUNED (otherwise). Where that has none it has
    its default. With warns=False no flag is warned of as having no effect."""
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=HelpFormatter, add_help=False, allow_abbrev=False
    )
    p.error = fail
    p.add_argument("-h", "--help", action="store_true", help="print this, with the defaults of --method and --protocol")
    p.add_argument("--data", choices=("ring", "grid"), default="ring", help="centres on a circle or a square lattice")
    p.add_argument(
        "--modes", type=number(int, 2, 1000), help="ring: any number from 2 (8 by default); grid: 9 or 25 (the default)"
    )
    p.add_argument(
        "--protocol",
        choices=("pacgan", "metz"),
        default="pacgan",
        help="points and their number as in PacGAN, the rest ours; metz: the ring and the game of the unrolled paper",
    )
    p.add_argument(
        "--radius", type=number(float, 1e-6), help="of the ring: 1, Metz et al. 2; of the grid half its side: 4"
    )
    p.add_argument("--std", type=number(float, 1e-9), help="of each mode; default: .01 of the radius; grid: .05")
    p.add_argument("--method", choices=METHODS, default="gan", help="the objective")
    p.add_argument(
        "--loss",
        choices=("ns", "minimax"),
        default="ns",
        help="G's, in gan, unrolled and mdgan. ns: non-saturating; minimax: minus D's (in mdgan.py: saturating)",
    )
    p.add_argument("--k", type=number(int, 0, 100), default=5, help="unrolled: D's steps that G looks ahead; 0: a GAN")
    p.add_argument(
        "--gp-weight", type=number(float, 0), default=0.1, help="wgan_gp: lambda; the authors' toy code has .1 too"
    )
    p.add_argument("--clip", type=number(float, 1e-6), default=0.1, help="wgan_clip: bound of each weight")
    p.add_argument(
        "--mixture",
        choices=("published", "clusters"),
        default="published",
        help="of mdgan. published: the authors' constants, which leave one blob; clusters: radius 2, sigma .5, ten",
    )
    p.add_argument("--layers", type=number(int, 1, 10), default=3, help="hidden layers of both networks")
    p.add_argument("--hidden", type=number(int, 1, 4096), default=128, help="their width")
    p.add_argument("--latent-dim", type=number(int, 1, 4096), default=2, help="size of z")
    p.add_argument("--prior", choices=("normal", "uniform"), default="normal", help="of z: N(0, I) or U[-1, 1]")
    p.add_argument("--slope", type=number(float, 0, 1), default=0.2, help="of D's leaky ReLUs below 0; 0: plain ReLUs")
    p.add_argument(
        "--bound",
        type=number(float, 0, 100),
        default=1.5,
        help="G's last layer is a tanh that reaches to this many radii, as MD-GAN's; 0: linear",
    )
    p.add_argument("--steps", type=number(int, 1), default=10_000, help="updates of G")
    p.add_argument("--batch-size", type=number(int, 2), default=256, help="points a step")
    p.add_argument("--d-steps", type=number(int, 1, 100), default=1, help="updates of D to one of G")
    p.add_argument("--lr-g", type=number(float, 0, 10), default=1e-3, help="Adam's rate for G")
    p.add_argument("--lr-d", type=number(float, 0, 10), default=1e-3, help="Adam's rate for D")
    p.add_argument("--beta1", type=number(float, 0, 0.999), default=0.5, help="Adam's first; second: .999, WGANs .9")
    p.add_argument("--lr-decay", choices=("none", "linear"), default="linear", help="linear: from half the steps, to 0")
    p.add_argument("--ema", type=number(float, 0, 0.99999), default=0.999, help="decay of G's average, which is scored")
    p.add_argument("--seeds", type=number(int, 1, 1000), default=1, help="independent runs, trained side by side")
    p.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all of them together")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    p.add_argument(
        "--snapshot-every", type=number(int, 1), help="updates of G between pictures; default: a fifth of --steps"
    )
    p.add_argument("--reject", choices=("none", "drs"), default="none", help="drs: keep points by D (see metrics.py)")
    p.add_argument("--drs-percentile", type=number(float, 0, 100), default=60.0, help="higher keeps fewer")
    p.add_argument("--run-dir", type=file_name, help="default: runs/toy2d-DATA-METHOD-sSEED-TIME")
    p.add_argument("--table", action="store_true", help="every method on ring and grid, --seeds runs each; Markdown")
    p.add_argument("--quick", action="store_true", help="with --table: a quarter of the steps, a few minutes")

    defaults = vars(p.parse_args([]))
    # Which flags were typed? argparse sets a default only where the namespace lacks the name. So parse into one that
    # has every name, as None: what is not None afterwards was typed.
    unset = argparse.Namespace(**dict.fromkeys(defaults))
    given = {name: value for name, value in vars(p.parse_args(argv, unset)).items() if value is not None}
    if given.get("run_dir") == "":
        fail("--run-dir was given an empty value")
    chosen = {**defaults, **given}
    preset = dict(TUNED[chosen["method"]])
    if chosen["protocol"] == "metz":
        preset |= METZ
    if "help" in given:
        p.set_defaults(**preset)
        p.print_help()
        raise SystemExit
    return resolve(argparse.Namespace(**{**defaults, **preset, **given}), given.keys(), warns)


def resolve(args, given, warns=True):
    """The flags with what follows from others. `given` are the names of those on the command line."""
    if args.protocol == "metz" and args.data != "ring":
        fail(f"--protocol metz is a ring, not --data {args.data}")
    # A table trains every method on both data sets, writes no files and keeps all points.
    not_for_table = {"data", "modes", "radius", "std", "method", "protocol", "run_dir", "snapshot_every"}
    not_for_table |= {"reject", "drs_percentile"}
    refused = given & not_for_table
    if args.table and refused:
        fail(f"--table goes without --{min(refused).replace('_', '-')}: see --help")
    for name in sorted(given & OF_METHODS.keys()):
        if warns and not args.table and args.method not in OF_METHODS[name]:
            warn(f"--{name.replace('_', '-')} has no effect on --method {args.method}")
    if warns and "drs_percentile" in given and args.reject != "drs":
        warn("--drs-percentile has no effect without --reject drs")
    if WORLD > 1:
        fail("toy2d.py takes one process: --seeds N trains N runs in it")
    if args.quick and not args.table:
        fail("--quick goes with --table")
    if args.modes is None:
        args.modes = {"ring": 8, "grid": 25}[args.data]
    if args.data == "grid" and args.modes not in (9, 25):
        fail(f"--modes {args.modes}: a grid takes 9 or 25")
    args.radius = args.radius or {"ring": 1.0, "grid": 4.0}[args.data]
    args.std = args.std or {"ring": args.radius / 100, "grid": 0.05}[args.data]
    args.snapshot_every = args.snapshot_every or max(1, args.steps // 5)
    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        fail("--device cuda: this PyTorch finds no such device")
    if args.device == "auto":
        args.device = "cuda" if has_cuda else "cpu"
    return args


# DATA -----------------------------------------------------------------------------------------------------------------


def mode_centres(args):
    """(K, 2). The angles of the ring leave out 2 pi, where it closes: with both ends one mode would count twice."""
    if args.data == "ring":
        angle = torch.arange(args.modes) * (2 * math.pi / args.modes)
        return args.radius * torch.stack([angle.cos(), angle.sin()], 1)
    line = torch.linspace(-args.radius, args.radius, math.isqrt(args.modes))
    return torch.cartesian_prod(line, line)


def sample_real(centres, std, *shape, rng=None):
    """Points (*shape, 2) on the device of the centres, each mode as likely as the others."""
    device = centres.device
    mode = torch.randint(len(centres), shape, device=device, generator=rng)
    return centres[mode] + std * torch.randn(*shape, 2, device=device, generator=rng)


def noise(args, *shape, rng=None):
    """z (*shape, latent_dim) on args.device. With a generator, which is of the CPU, it is the same on every device."""
    device = "cpu" if rng else args.device
    if args.prior == "normal":
        z = torch.randn(*shape, args.latent_dim, device=device, generator=rng)
    else:
        z = torch.rand(*shape, args.latent_dim, device=device, generator=rng) * 2 - 1
    return z.to(args.device)


def coverage(points, centres, std):
    """What the tables print, for points (N, 2).

    covered       modes with a point of high quality, one within 3 std of its nearest centre
    strict        modes with at least a quarter of their due share in such points
    high_quality  share of all points that lie within 3 std of their nearest centre
    near          share of all points within a quarter of the spacing of the modes
    reverse_kl    KL(modes of high-quality points || uniform); infinite where there is no such point"""
    distance, mode = torch.cdist(points.double(), centres.double()).min(1)
    good = distance < 3 * std
    K = len(centres)
    count = torch.bincount(mode[good], minlength=K).double()
    p = count / count.sum().clamp(min=1)
    spacing = torch.pdist(centres.double()).min()
    return {
        "covered": (count > 0).sum().item(),
        "strict": (count >= len(points) / (4 * K)).sum().item(),
        "high_quality": good.double().mean().item(),
        "near": (distance < spacing / 4).double().mean().item(),
        "reverse_kl": torch.xlogy(p, p * K).sum().item() if good.any() else math.inf,
    }


# MODEL ----------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """`runs` ReLU networks side by side, leaky with a slope: (runs, B, n_in) -> (runs, B, n_out).

    A network's loss depends on its own weights alone, so the gradients of the sum over runs are those of each run."""

    def __init__(self, runs, n_in, hidden, n_out, layers=2, slope=0.0):
        super().__init__()
        self.slope = slope
        sizes = [n_in, *[hidden] * layers, n_out]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in pairwise(sizes):
            self.weights.append(nn.Parameter(torch.empty(runs, fan_in, fan_out)))
            self.biases.append(nn.Parameter(torch.empty(runs, 1, fan_out)))
        for part in (self.weights, self.biases):
            for p, fan_in in zip(part, sizes[:-1]):
                bound = 1 / math.sqrt(fan_in)
                nn.init.uniform_(p, -bound, bound)  # as nn.Linear

    def forward(self, x):
        for layer, (w, b) in enumerate(zip(self.weights, self.biases)):
            if layer > 0:
                x = F.leaky_relu(x, self.slope) if self.slope else x.relu()
            x = torch.baddbmm(b, x, w)  # b + x w, each run with its own
        return x


class Simplex(nn.Module):
    """MD-GAN's target (Eghbal-zadeh et al. 2019, 1811.00152): d + 1 Gaussians on the corners of a regular simplex.

    The simplex is in d dimensions. lk(e) is the likelihood of the Gaussians' mixture at a point e (..., d), lambda its
    maximum, and u(e) = log lambda - log lk(e) >= 0. log_sum is log lk without its constant, which cancels in u."""

    def __init__(self, mixture, d=9):
        super().__init__()
        # published: the radius that the authors' code has by a slip (mdgan.py). At sigma .5 it leaves one maximum.
        radius = 0.9436 if mixture == "published" else 2.0
        self.sigma = 0.5
        basis = torch.linalg.svd(torch.ones(1, d + 1, dtype=torch.float64)).Vh[1:]  # orthonormal, orthogonal to 1
        mu = (radius * math.sqrt((d + 1) / d) * basis).T.contiguous()  # (d + 1, d)
        self.register_buffer("mu", mu)  # in float64 for the ascent
        # lk is highest near the corners or, where the Gaussians melt into one blob, in the middle. Climb from both.
        from_corner = self.ascend(mu[0])
        from_middle = self.ascend(torch.zeros_like(mu[0]))
        self.peak = max(self.log_sum(from_corner).item(), self.log_sum(from_middle).item())
        self.end_of_corner = (from_corner.norm() / radius).item()
        self.mu = mu.float()

    def log_sum(self, e):
        return torch.logsumexp(-(e[..., None, :] - self.mu).square().sum(-1) / (2 * self.sigma**2), -1)

    def ascend(self, e):
        for _ in range(100_000):  # mean shift
            weight = torch.softmax(-(e - self.mu).square().sum(-1) / (2 * self.sigma**2), 0)
            new = weight @ self.mu
            if (new - e).abs().max() < 1e-13:
                break
            e = new
        return e

    def u(self, e):
        return (self.peak - self.log_sum(e)).clamp(min=1e-6)  # so that log(1 - exp(-u)) is finite


class Discriminator(nn.Module):
    """D, for mdgan with the mixture on top: points (runs, B, 2) -> score (runs, B), larger for more real."""

    def __init__(self, args, scale):
        super().__init__()
        self.scale = scale
        self.simplex = Simplex(args.mixture) if args.method == "mdgan" else None
        n_out = self.simplex.mu.shape[1] if self.simplex else 1
        self.net = MLP(args.seeds, 2, args.hidden, n_out, args.layers, args.slope)

    def forward(self, x):
        out = self.net(x / self.scale)
        if self.simplex:
            return -self.simplex.u(5 * out.sigmoid() - 2.5)  # of a point in the box of the authors' code, [-2.5, 2.5]^9
        return out[..., 0]


def log1mexp(u):
    """log(1 - exp(-u)), by the form that keeps its digits. u is 1e-6 or more here, so nothing has to be clamped."""
    return torch.where(u < math.log(2), (-torch.expm1(-u)).log(), torch.log1p(-torch.exp(-u)))


# LOSS -----------------------------------------------------------------------------------------------------------------


def mean_of_each(values):
    """The mean over B of values (runs, B), summed over the runs: each run has the gradient of its own mean."""
    return values.mean(-1).sum()


def discriminator_loss(method, score_real, score_fake):
    """Scores (runs, B) are logits (gan, unrolled), the critic's values (WGANs), or -u (mdgan).

    u = log lambda - log lk at the point that D maps to, as in mdgan.py. The paper's max E[log lk] + E[log(lambda - lk)]
    is min E[u(x)] - E[log(1 - exp(-u(G(z))))], but for a constant."""
    if method.startswith("wgan"):
        return mean_of_each(score_fake) - mean_of_each(score_real)
    if method == "mdgan":
        u_real = -score_real
        u_fake = -score_fake
        return mean_of_each(u_real) - mean_of_each(log1mexp(u_fake))
    return mean_of_each(F.softplus(-score_real)) + mean_of_each(F.softplus(score_fake))


def generator_loss(method, kind, score_fake, score_real=None):
    """kind: "ns", non-saturating, or "minimax". A WGAN has one loss only.

    Only unrolled with minimax needs score_real. There D has moved on as the fake points made it, so the real term of
    its loss depends on G too."""
    if kind not in ("ns", "minimax"):
        raise ValueError(f"G has no loss for {kind}")
    if method.startswith("wgan"):
        return -mean_of_each(score_fake)
    if method == "mdgan":
        u_fake = -score_fake
        if kind == "ns":
            return mean_of_each(u_fake)
        return mean_of_each(log1mexp(u_fake))
    if kind == "ns":
        return mean_of_each(F.softplus(-score_fake))
    if method == "unrolled":
        return -discriminator_loss(method, score_real, score_fake)
    return -mean_of_each(F.softplus(score_fake))  # E[log(1 - p)]


@torch.no_grad()
def clip_weights(D, c):
    """Clips every parameter to [-c, c]: algorithm 1, line 7, of Arjovsky et al. 2017."""
    for p in D.parameters():
        p.clamp_(-c, c)


def gradient_penalty(D, real, fake):
    """E[(||grad D(x_hat)|| - 1)^2] at one random point between each pair: eq. (3) of Gulrajani et al. 2017."""
    eps = torch.rand(*real.shape[:2], 1, device=real.device)
    x_hat = torch.lerp(fake, real, eps).requires_grad_(True)
    (grad,) = torch.autograd.grad(D(x_hat).sum(), x_hat, create_graph=True)
    norm = (grad.square().sum(-1) + 1e-12).sqrt()  # 1e-12: at 0 the derivative of sqrt is infinite
    return mean_of_each((norm - 1).square())


def look_ahead(D, opt, real, fake, k, lr):
    """D's parameters after k more Adam steps on one batch, as functions of `fake`.

    G's gradient runs through each of the steps: Metz et al. 2017, eq. (7), with Adam in place of gradient descent, as
    in their experiments. Adam goes on from the moments it has, so D has made a step. D and `opt` stay as they are."""
    params = dict(D.named_parameters())
    beta1, beta2 = opt.param_groups[0]["betas"]
    eps = opt.param_groups[0]["eps"]
    state = [opt.state[p] for p in params.values()]
    t = int(state[0]["step"])
    m = [s["exp_avg"] for s in state]
    v = [s["exp_avg_sq"] for s in state]
    for n in range(t + 1, t + 1 + k):  # the number of the step, for Adam's correction
        score_real = functional_call(D, params, (real,))
        score_fake = functional_call(D, params, (fake,))
        loss = discriminator_loss("unrolled", score_real, score_fake)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        m = [beta1 * m_p + (1 - beta1) * g for m_p, g in zip(m, grads)]
        v = [beta2 * v_p + (1 - beta2) * g * g for v_p, g in zip(v, grads)]
        moved = {}
        for (name, p), m_p, v_p in zip(params.items(), m, v):
            # A unit that never fires leaves v at 0, where the derivative of a root is infinite: hence the 1e-16.
            root = (v_p / (1 - beta2**n) + 1e-16).sqrt()
            moved[name] = p - lr / (1 - beta1**n) * m_p / (root + eps)
        params = moved
    return params


# TRAINING -------------------------------------------------------------------------------------------------------------


def train(args, on_snapshot=lambda step, G, D: None):
    """Trains --seeds runs together. Returns the averaged G, a function of z, and D."""
    torch.manual_seed(args.seed)
    R = args.seeds
    B = args.batch_size
    centres = mode_centres(args).to(args.device)
    scale = mode_centres(args).square().mean().sqrt().item()  # the networks see coordinates of size 1
    D = Discriminator(args, scale).to(args.device)
    net = MLP(R, args.latent_dim, args.hidden, 2, args.layers).to(args.device)
    ema = copy.deepcopy(net).requires_grad_(False)
    betas = (args.beta1, 0.9 if args.method.startswith("wgan") else 0.999)
    opt_g = torch.optim.Adam(net.parameters(), args.lr_g, betas, fused=True)
    opt_d = torch.optim.Adam(D.parameters(), args.lr_d, betas, fused=True)

    def to_points(out):
        if args.bound:
            return out.tanh() * (args.bound * args.radius)
        return out * scale

    def G(z):
        return to_points(net(z))

    def averaged_G(z):
        return to_points(ema(z))

    for step in range(1, args.steps + 1):
        lr_scale = 1.0
        if args.lr_decay == "linear":
            lr_scale = min(1.0, 2 - 2 * (step - 1) / args.steps)
        opt_g.param_groups[0]["lr"] = args.lr_g * lr_scale
        opt_d.param_groups[0]["lr"] = args.lr_d * lr_scale

        for _ in range(args.d_steps):
            real = sample_real(centres, args.std, R, B)
            with torch.no_grad():
                fake = G(noise(args, R, B))
            d_loss = discriminator_loss(args.method, D(real), D(fake))
            if args.method == "wgan_gp":
                d_loss = d_loss + args.gp_weight * gradient_penalty(D, real, fake)
            opt_d.zero_grad()
            d_loss.backward()
            opt_d.step()
            if args.method == "wgan_clip":
                clip_weights(D, args.clip)

        fake = G(noise(args, R, B))
        if args.method == "unrolled":
            ahead = look_ahead(D, opt_d, real, fake, args.k, args.lr_d * lr_scale)
            score_fake = functional_call(D, ahead, (fake,))
            score_real = functional_call(D, ahead, (real,))
        else:
            score_fake = D(fake)
            score_real = None
        g_loss = generator_loss(args.method, args.loss, score_fake, score_real)
        opt_g.zero_grad()
        g_loss.backward(inputs=list(net.parameters()))  # D's weights get no gradient
        opt_g.step()
        with torch.no_grad():
            # As update_ema() of the other scripts: the average soon forgets the untrained G.
            weight = 1 - min(args.ema, (1 + step) / (10 + step))
            for a, p in zip(ema.parameters(), net.parameters()):
                a.lerp_(p, weight)

        if step % args.snapshot_every == 0 or step == args.steps:
            if not all(p.isfinite().all() for p in (*net.parameters(), *D.parameters())):
                fail(f"a weight is not finite at step {step}: try lower --lr-d, --lr-g")
            on_snapshot(step, averaged_G, D)
    return averaged_G, D


# SCORES ---------------------------------------------------------------------------------------------------------------

COLUMNS = {"covered": "{:.1f}", "strict": "{:.1f}", "high_quality": "{:.1%}", "near": "{:.1%}", "reverse_kl": "{:.3f}"}


@torch.no_grad()
def scores_of_made(args, G, n=2500):
    """coverage() of n points of each run: a list of dicts."""
    z = noise(args, args.seeds, n, rng=torch.Generator().manual_seed(args.seed + 1))
    centres = mode_centres(args)
    return [coverage(points, centres, args.std) for points in G(z).cpu()]


def scores_of_real(args, n=2500):
    """The same of real points."""
    rng = torch.Generator().manual_seed(args.seed + 2)
    centres = mode_centres(args)
    return [coverage(sample_real(centres, args.std, n, rng=rng), centres, args.std) for _ in range(args.seeds)]


def gradient_norm(args, G, D, n=2500):
    """The mean norm of D's gradient at n random points between real and made ones, over all runs.

    WGAN-GP pulls it to 1. Clipping bounds it by what the layers make of c: it may come to lie near 0 or far above 1."""
    rng = torch.Generator().manual_seed(args.seed + 5)
    real = sample_real(mode_centres(args), args.std, args.seeds, n, rng=rng).to(args.device)
    with torch.no_grad():
        fake = G(noise(args, args.seeds, n, rng=rng))
    eps = torch.rand(args.seeds, n, 1, generator=rng).to(args.device)
    x_hat = torch.lerp(fake, real, eps).requires_grad_(True)
    (grad,) = torch.autograd.grad(D(x_hat).sum(), x_hat)
    return grad.norm(dim=-1).mean().item()


@torch.no_grad()
def scores_of_kept(args, G, D, n=2500):
    """Scores of n points of each run that discriminator rejection sampling keeps, and the share it kept.

    The calibration is fitted on 10,000 fresh real points, which D never saw. A run whose D is of no use for it says why
    and is left out."""
    centres = mode_centres(args)
    rng = torch.Generator().manual_seed(args.seed + 3)
    rng_real = torch.Generator().manual_seed(args.seed + 4)
    kept = []
    for r in range(args.seeds):

        def more(k, r=r):
            x = G(noise(args, args.seeds, k, rng=rng))
            return x[r].cpu(), D(x)[r].cpu()

        real = sample_real(centres, args.std, 10_000, rng=rng_real).to(args.device)
        try:
            head = platt(D(real.expand(args.seeds, -1, -1))[r], more(10_000)[1])
            x, took = rejected("drs", more, n, rng, head, args.drs_percentile)
        except ValueError as e:
            say(f"run {r}: no points are chosen: {e}")
            continue
        if took["warning"]:
            say(f"run {r}: {took['warning']}")
        kept.append({**coverage(x, centres, args.std), "acceptance": took["acceptance"], "auc": took["auc"]})
    return kept


def cells(scores):
    """One text for each of COLUMNS: the mean over the runs, and the standard deviation where there are several."""
    parts = []
    for name, form in COLUMNS.items():
        values = np.array([of_run[name] for of_run in scores])
        text = form.format(values.mean())
        if len(scores) > 1 and np.isfinite(values).all():
            text += f" +- {form.format(values.std(ddof=1))}"
        parts.append(text)
    return parts


def score_line(scores):
    return "  ".join(f"{name} {text}" for name, text in zip(COLUMNS, cells(scores)))


# FIGURES AND TABLES ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def picture(args, G, D, side=256):
    """Real points blue, made ones orange, D's score as shading (lighter: more real), of the first run.

    Each image has its own scale, from the 2 % of lowest scores to the 2 % of highest: it shows where D is high, not how
    steep D is."""
    reach = 1.5 * args.radius
    axis = torch.linspace(-reach, reach, side)
    grid = torch.stack([axis.expand(side, side), -axis[:, None].expand(side, side)], -1).reshape(1, -1, 2)
    first = {name: p[:1] for name, p in D.named_parameters()}
    value = functional_call(D, first, (grid.to(args.device),)).reshape(side, side).cpu()
    low = value.quantile(0.02)
    high = value.quantile(0.98)
    shade = ((value - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 95 + 160
    image = Image.fromarray(shade.byte().numpy()).convert("RGB")
    draw = ImageDraw.Draw(image)

    rng = np.random.default_rng(args.seed)
    centres = mode_centres(args).numpy()
    real = centres[rng.integers(len(centres), size=300)] + args.std * rng.normal(size=(300, 2))
    z = noise(args, args.seeds, 500, rng=torch.Generator().manual_seed(args.seed + 1))
    made = G(z)[0].cpu().numpy()
    for cloud, colour in ((real, (40, 90, 200)), (made, (230, 110, 20))):
        for x, y in (cloud / reach + 1) / 2 * (side - 1):
            draw.ellipse((x - 1, side - 2 - y, x + 1, side - y), fill=colour)  # rows count downwards, y upwards
    return image


def some(paths, most):
    """The images of these files; of more than `most`, as many evenly spaced ones, the first and last among them."""
    return [Image.open(paths[round(i)]) for i in np.linspace(0, len(paths) - 1, min(most, len(paths)))]


def strip(images):
    """Side by side."""
    sheet = Image.new("RGB", (sum(image.width + 4 for image in images) - 4, images[0].height), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (k * (image.width + 4), 0))
    return sheet


def run(args, out=None, report=say):
    """Trains --seeds networks together, with figures of the first. Returns a list of their scores, G and D."""
    rows = []
    start = time.time()

    def on_snapshot(step, G, D):
        scores = scores_of_made(args, G)
        means = {name: float(np.mean([of_run[name] for of_run in scores])) for name in COLUMNS}
        norm = gradient_norm(args, G, D)
        rows.append({"step": step, **means, "grad_norm": norm})
        report(f"step {step}: {score_line(scores)}  grad_norm {norm:.3g}  {time.time() - start:.0f} s")
        if not out:
            return
        picture(args, G, D).save(out / f"step_{step:07}.png")
        with open(out / "log.csv", "a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if len(rows) == 1:
                writer.writeheader()
            writer.writerow(rows[-1])

    G, D = train(args, on_snapshot)
    if out:
        paths = sorted(out.glob("step_*.png"))
        strip(some(paths, 10)).save(out / "strip.png")
        frames = some(paths, 48)
        rest = frames[1:] + frames[-1:] * 3
        frames[0].save(out / "training.gif", save_all=True, append_images=rest, duration=300, loop=0)
    return scores_of_made(args, G), G, D


PUBLISHED = {
    "ring": (
        ("GAN", "6.3 +- .5", "98.2%", ".45", "Lin et al. 2018, 10 runs"),
        ("PacGAN2", "7.9 +- .1", "95.6%", ".07", "Lin et al. 2018, 10 runs"),
        ("Unrolled", "7.6", "35.6%", "", "Srivastava et al. 2017"),
        ("VEEGAN", "8", "52.9%", "", "Srivastava et al. 2017"),
    ),
    "grid": (
        ("GAN", "17.3 +- .8", "94.8%", ".70", "Lin et al. 2018, 10 runs"),
        ("PacGAN4", "24.8 +- .2", "93.6%", ".04", "Lin et al. 2018, 10 runs"),
        ("Unrolled", "23.6", "16%", "", "Srivastava et al. 2017"),
        ("VEEGAN", "24.6", "40%", "", "Srivastava et al. 2017"),
    ),
}


def table(argv, shorter):
    """Every method on ring and grid, as Markdown; real points first, published figures last.

    Flags given beside --table hold for every row; `shorter` divides each number of steps."""
    flags = [flag for flag in argv if flag not in ("--table", "--quick")]
    for data in ("ring", "grid"):
        args = parse_args([*flags, "--data", data], warns=False)
        say(f"\n{data}: 2,500 points, {args.seeds} runs each\n")
        say(f"| method | G updates | {' | '.join(COLUMNS)} | seconds | of its own |")
        say(f"|---|---|{'---|' * (len(COLUMNS) + 2)}")
        say(f"| real | | {' | '.join(cells(scores_of_real(args)))} | | |")
        for method in METHODS:
            args = parse_args([*flags, "--data", data, "--method", method], warns=False)
            args = argparse.Namespace(**{**vars(args), "steps": max(1, args.steps // shorter)})
            start = time.time()
            scores = run(args, report=lambda text: None)[0]
            seconds = time.time() - start
            tuned = [name for name in TUNED[method] if name != "steps"]
            own = ", ".join(f"{name.replace('_', '-')} {getattr(args, name)}" for name in tuned)
            say(f"| {method} | {args.steps} | {' | '.join(cells(scores))} | {seconds:.0f} | {own} |")
        for name, modes, quality, kl, source in PUBLISHED[data]:
            say(f"| {name}, published | | {modes} | | {quality} | | {kl} | | {source} |")


def main(argv=None):
    try:
        command(argv)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # 128 + SIGINT, as shells expect
    except OSError as e:  # a disk that refuses
        fail(e)
    except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(e):
            raise
        fail("too little memory: give a smaller --hidden, --batch-size or --seeds")


def command(argv):
    """What the flags ask for: the table of all methods, or the runs of one."""
    args = parse_args(argv)
    if args.table:
        table(sys.argv[1:] if argv is None else argv, 4 if args.quick else 1)
        return
    name = f"toy2d-{args.data}-{args.method}-s{args.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    out = Path(args.run_dir or Path("runs") / name)
    with or_fail(f"--run-dir {out}"):
        out.mkdir(parents=True, exist_ok=True)
    if contents(out):
        fail(f"--run-dir {out} is in use")
    (out / "args.json").write_text(json.dumps(vars(args), indent=1))
    runs = "one run" if args.seeds == 1 else f"{args.seeds} runs"
    say(f"{out}: {runs} of {args.steps} updates of G on {args.device}")
    if args.method == "mdgan":
        end = Simplex(args.mixture).end_of_corner
        what = "clusters" if end > 1e-3 else "one blob, no clusters"
        say(f"mean shift from a corner ends at {end:.3f} of its radius: {what}")
    try:
        scores, G, D = run(args, out)
    except KeyboardInterrupt:
        say(f"stopped: {out} holds what there is")
        raise SystemExit(130) from None
    real = scores_of_real(args)
    say(f"real:  {score_line(real)}\nmade:  {score_line(scores)}")
    after = None
    if args.reject == "drs":
        after = scores_of_kept(args, G, D)
    if after:
        acceptance = np.mean([of_run["acceptance"] for of_run in after])
        auc = np.mean([of_run["auc"] for of_run in after])
        say(f"kept:  {score_line(after)}  acceptance {acceptance:.1%}  AUC {auc:.3f}")
    text = json.dumps({"made": scores, "kept": after, "real": real}, indent=1)
    # Where no point is near a mode the reverse KL is infinite, and JSON has no such number.
    (out / "scores.json").write_text(text.replace("Infinity", "null"))
    say(f"done: {out}")


if __name__ == "__main__":
    main()
