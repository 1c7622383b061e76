"""MD-GAN: D maps an image to a point, real ones to where a fixed mixture of Gaussians is likely, fake ones elsewhere.

Eghbal-zadeh, Zellinger and Widmer 2019, "Mixture Density Generative Adversarial Networks", arXiv 1811.00152. lk is the
likelihood of a mixture of d + 1 Gaussians, lk(e) = 1/(d + 1) sum_i N(e; mu_i, sigma^2 I), with the mu_i on the corners
of a regular simplex. lambda is its maximum. D's layers map an image x to a point e(x), which the paper calls D(x), and
u(x) = log lambda - log lk(e(x)) is never below 0. In the code D(x) returns the score -u(x). With exp(-u) as the
probability p that x is real, these are the losses of the GAN of 2014: p = lk / lambda.

    discriminator  max_D  E[log lk(e(x))] + E[log(lambda - lk(e(G(z))))]
                   i.e.   min_D  E[u(x)] - E[log(1 - exp(-u(G(z))))], plus r1/2 E||grad u(x)||^2, which the paper lacks
    generator      min_G  E[u(G(z))]                     --loss ns, non-saturating, not in the paper
                   min_G  E[log(1 - exp(-u(G(z))))]      --loss saturating, the paper's
    where          z ~ N(0, I), or each component from U[-1, 1] (--prior)

    python mdgan.py                                      digits rendered at start-up, no download
    python mdgan.py --dataset mnist --epochs 200
    python mdgan.py --dataset folder --data-dir photos --flip --steps 12000
    python mdgan.py --dataset mnist --paper --mixture published --loss saturating    mixture and loss as published

`--dataset mnist --steps 5300` takes two to six minutes of one CPU core. It ends at an FID[classifier] of 8.2 +- 0.5,
the mean and the standard deviation over seeds 0 to 2. FID is a distance between generated and real images, here in the
features of a small network that reads digits: lower is better, and real digits against other real ones have 1.3.
tests/gallery/README.md has the protocol.

e(x) lies in a box, [-2.5, 2.5]^d, with d = 9. By default sigma is .5 and the corners lie at a radius of 2. With the
published radius (--mixture published) the ten Gaussians melt into one blob at d = 9; a run's first lines say where its
clusters lie. grad is with respect to the pixels of x. The published loss of G has the derivative 1 / (exp(u) - 1) in u,
which is next to none where D is sure. The score -u is no logit: --reject naive means nothing here.

D has no batch norm. While training, G's batch norm uses the current batch. The images to look at come from `ema`, a
copy of G with averaged weights and G's running statistics, in eval mode. Colour images have settings of their own
(COLOUR), and so have long runs (LONG).
"""

# `uv run mdgan.py` reads this block, installs the packages and runs the file. Without uv it is a comment.
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=10.1"]
# ///

import argparse
import copy
import math
import os
from datetime import datetime, timedelta
from pathlib import Path

import torch
from torch import nn

from metrics import (
    CHANNELS,
    HELD_OUT,
    MIRROR,
    ORDER,
    RANK,
    RANKS,
    WORLD,
    HelpFormatter,
    Stop,
    Study,
    fail,
    file_name,
    leave_ranks,
    load_data,
    not_finite,
    number,
    or_fail,
    or_warn,
    rank_0_first,
    release_folders,
    replace_file,
    sample_z,
    say,
    seeded,
    warn,
)

# --paper sets these. The authors gave no settings for images, so they are ours. --paper does not set the paper's
# mixture and loss of G: add --mixture published --loss saturating.
PAPER = dict(batch_size=32, lr_g=5e-4, lr_d=5e-4, beta1=0.5, beta2=0.999, ema=0.999, ngf=16, ndf=16)
PAPER |= dict(r1=0.0, penalty_share=1.0, lr_decay="none", upsample="deconv")
MLP = dict(lr_g=2e-3, lr_d=5e-4)  # --arch mlp sets these
# Colour images of 32 pixels or more set these, but not with --arch mlp: tried on faces. At twice these rates training
# fails.
COLOUR = dict(batch_size=16, lr_g=1e-3, lr_d=1e-3, ema=0.995, ngf=32, ndf=32, upsample="nearest")
# --epochs 40 or more, or --steps 40000 or more, sets these, but not where COLOUR holds and not with --arch mlp: twice
# the width at half the rates. Such networks end at a lower FID, but take twice as long for each update. If one of the
# four is given, none is set.
LONG = dict(lr_g=1e-3, lr_d=1e-3, ngf=32, ndf=32)


def parse_args(argv=None):
    """The flags, as a namespace. The defaults come from a search on MNIST (tests/gallery/search.md)."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    p.add_argument(
        "--mixture",
        choices=("clusters", "published"),
        default="clusters",
        help="distance of the Gaussians from the middle: 2, or the authors' .9436",
    )
    p.add_argument(
        "--embedding-dim", type=number(int, 1, 512), default=9, help="d, for d + 1 Gaussians; the authors: 9"
    )
    p.add_argument("--loss", choices=("ns", "saturating"), default="ns", help="G's: non-saturating, or the paper's")
    p.add_argument(
        "--r1",
        type=number(float, 0),
        default=10.0,
        help="gamma of R1: half of it is the weight of ||grad u||^2 at real images; not in the paper",
    )
    p.add_argument(
        "--penalty-share",
        type=number(float, 0.01, 1),
        default=0.25,
        help="part of each batch that the penalty is taken on",
    )
    p.add_argument("--batch-size", type=number(int, 2), default=64, help="real images in each update, over all GPUs")
    p.add_argument("--d-steps", "--n-critic", type=number(int, 1, 1000), default=1, help="updates of D per iteration")
    p.add_argument("--g-steps", type=number(int, 1, 1000), default=1, help="updates of G per iteration")
    p.add_argument("--lr-g", type=number(float, 0, 10), default=2e-3, help="learning rate of G")
    p.add_argument("--lr-d", type=number(float, 0, 10), default=2e-3, help="learning rate of D")
    p.add_argument("--lr-decay", choices=("none", "linear"), default="linear", help="linear: falls evenly to 0")
    p.add_argument("--beta1", type=number(float, 0, 0.999999), default=0.0, help="Adam's decay of the first moment")
    p.add_argument("--beta2", type=number(float, 0, 0.999999), default=0.9, help="Adam's decay of the second moment")
    p.add_argument(
        "--ema",
        type=number(float, 0, 0.999999),
        default=0.9999,
        help="highest decay of G's average, see update_ema(); 0: none",
    )
    p.add_argument(
        "--ngf", type=number(int, 1, 4096), default=16, help="channels of G's last hidden map; earlier ones have more"
    )
    p.add_argument(
        "--ndf", type=number(int, 1, 4096), default=16, help="channels of D's first map; later ones have more"
    )
    add_run_flags(p)
    args, given = resolve(p, argv, PAPER, MLP, COLOUR, long=LONG)
    if args.reject == "naive":
        warn("--reject naive takes D's score for a logit, which it is not here: see --reject drs")
    if not args.r1 and "penalty_share" in given:
        warn("--penalty-share has no effect without --r1")
    return args


# MODEL ----------------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """z (B, latent_dim) -> image (B, channels, S, S) in [-1, 1].

    By default, for 28 pixels: 64 maps of 4x4, 32 of 7x7, 16 of 14x14, then the image."""

    def __init__(self, args, channels):
        super().__init__()
        S = args.image_size
        if args.arch == "dcgan":
            n = doublings(S)
            n_in = args.ngf * 2 ** (n - 1)
            layers = [nn.Unflatten(1, (args.latent_dim, 1, 1))]  # (B, latent_dim, 1, 1)
            layers += [nn.ConvTranspose2d(args.latent_dim, n_in, 4, 1, 0, bias=False)]  # (B, n_in, 4, 4)
            layers += [nn.BatchNorm2d(n_in), nn.ReLU()]
            for i in range(n - 1):  # twice the side, half the channels
                # A kernel of 4 doubles the side. For 28 the first of these has a kernel of 3, which takes 4 to 7.
                kernel = 3 if S == 28 and i == 0 else 4
                n_out = n_in // 2
                layers += [*grow(args, n_in, n_out, kernel), nn.BatchNorm2d(n_out), nn.ReLU()]
                n_in = n_out
            layers += [*grow(args, n_in, channels), nn.Tanh()]  # (B, channels, S, S)
        else:
            layers = []
            n_in = args.latent_dim
            for n_out in (256, 512, 1024):
                layers += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.LeakyReLU(negative_slope=0.2)]
                n_in = n_out
            layers += [nn.Linear(n_in, channels * S * S), nn.Tanh(), nn.Unflatten(1, (channels, S, S))]
        self.net = nn.Sequential(*layers)
        self.apply(dcgan_init)

    def forward(self, z):
        return self.net(z).to(z.dtype)  # under --amp the layers return bfloat16; real images are float32


class Discriminator(nn.Module):
    """Image (B, channels, S, S) -> -u (B,) <= 0, larger for more real.

    By default, for 28 pixels: 16 maps of 14x14, 32 of 7x7, 64 of 4x4, then the point.
    There is no batch norm after its layers, so each has a bias."""

    def __init__(self, args, channels):
        super().__init__()
        S = args.image_size
        if args.arch == "dcgan":
            n = doublings(S)
            layers = []
            n_in = channels
            for i in range(n):  # half the side, twice the channels; the first makes ndf channels
                # A kernel of 4 halves the side. For 28 the last of these has a kernel of 3, which takes 7 to 4.
                kernel = 3 if S == 28 and i == n - 1 else 4
                n_out = args.ndf * 2**i
                layers += [nn.Conv2d(n_in, n_out, kernel, 2, 1), nn.LeakyReLU(negative_slope=0.2)]
                n_in = n_out
            layers += [nn.Conv2d(n_in, args.embedding_dim, 4, 1, 0), nn.Flatten(1)]  # (B, n_in, 4, 4) -> (B, d)
        else:
            layers = [nn.Flatten()]
            n_in = channels * S * S
            for n_out in (1024, 512, 256):
                layers += [nn.Linear(n_in, n_out), nn.LeakyReLU(negative_slope=0.2)]
                n_in = n_out
            layers += [nn.Linear(n_in, args.embedding_dim)]
        self.net = nn.Sequential(*layers)
        self.mixture = Mixture(args.mixture, args.embedding_dim)
        self.apply(dcgan_init)

    def forward(self, x):
        # Under --amp the layers return bfloat16, and the losses want float32.
        return self.mixture(self.net(x).to(x.dtype))


class Mixture(nn.Module):
    """(B, d) -> a point e in [-2.5, 2.5]^d -> -u(e) (B,).

    It works with log lk, never with lk. Far from all centres lk is so small that the 1e-8 which the authors' code adds
    to it outweighs it, and the gradient is lost."""

    def __init__(self, kind, d):
        super().__init__()
        # The authors divide the corners by their length, but their code takes the square root after every term of its
        # sum, not once at the end. So at d = 9 its corners are .9436 from the centre, not 1. We keep that number at
        # every d.
        self.radius = 0.9436 if kind == "published" else 2.0
        self.sigma = 0.5
        mu = simplex(d, self.radius)
        # lk is highest near the corners or, where the Gaussians melt into one blob, in the middle. Climb from both.
        self.from_corner = ascend(mu[0], mu, self.sigma)
        self.from_middle = ascend(torch.zeros_like(mu[0]), mu, self.sigma)
        corner = log_sum(self.from_corner, mu, self.sigma).item()
        middle = log_sum(self.from_middle, mu, self.sigma).item()
        self.peak = max(corner, middle)
        self.gap = corner - middle
        # A buffer, so that checkpoints hold it: how the simplex is turned is the choice of the SVD, and D's weights
        # have learned this one.
        self.register_buffer("mu", mu.to(torch.get_default_dtype()))

    def forward(self, x):
        e = 5 * x.to(self.mu.dtype).sigmoid() - 2.5  # the box of the authors' code
        return (log_sum(e, self.mu, self.sigma) - self.peak).clamp(max=-1e-6)  # u >= 1e-6: log(1 - exp(-u)) is finite

    def __str__(self):
        n = len(self.mu)
        end = self.from_corner.norm().item() / self.radius
        text = f"mixture of {n}: mean shift from a corner ends at {end:.3f} of the radius, "
        if end <= 1e-3:
            return text + "one blob, no clusters"
        return text + f"{n} clusters; log lk is {self.gap:.3f} higher there than in the middle"


def simplex(d, radius):
    """(d + 1, d) in float64: the corners of a regular simplex around 0, each `radius` from it."""
    ones = torch.ones(1, d + 1, dtype=torch.float64)
    basis = torch.linalg.svd(ones).Vh[1:]  # (d, d + 1): orthonormal rows, each orthogonal to the ones
    return radius * math.sqrt((d + 1) / d) * basis.T


def log_kernels(e, mu, sigma):
    """-||e - mu_i||^2 / 2 sigma^2 (..., d + 1) for points e (..., d) and the centres mu (d + 1, d)."""
    squared_distance = (e[..., None, :] - mu).square().sum(-1)
    return -squared_distance / (2 * sigma**2)


def log_sum(e, mu, sigma):
    """log sum_i exp(-||e - mu_i||^2 / 2 sigma^2) (...) for e (..., d): log lk(e) but for a constant, which u drops."""
    return torch.logsumexp(log_kernels(e, mu, sigma), -1)


def ascend(e, mu, sigma):
    """Climbs lk from the point e (d,) by mean shift, to where its gradient is 0. e = 0 stays at 0, maximum or not.

    Each round moves e to the mean of the mu_i, weighted by how likely each of the Gaussians is to have made e."""
    for _ in range(100_000):
        last = e
        e = torch.softmax(log_kernels(e, mu, sigma), 0) @ mu
        if (e - last).abs().max() < 1e-13:
            break
    return e


def grow(args, n_in, n_out, kernel=4, bias=False):
    """Layers that double the side of a map: (B, n_in, s, s) -> (B, n_out, 2s, 2s). With a kernel of 3 they take 4 to 7.

    deconv is a transposed convolution. Neighbouring pixels of its output use different entries of the kernel, which can
    leave a checkerboard (Odena et al. 2016). nearest and bilinear resize the map; the convolution after that makes all
    pixels with the same weights."""
    if args.upsample == "deconv" or kernel == 3:  # 4 to 7 is no doubling: always a transposed convolution
        return [nn.ConvTranspose2d(n_in, n_out, kernel, 2, 1, bias=bias)]
    k = args.upsample_kernel
    return [nn.Upsample(scale_factor=2, mode=args.upsample), nn.Conv2d(n_in, n_out, k, padding=k // 2, bias=bias)]


def doublings(side):
    """How many layers of stride 2 lead from a side of 4 to this one. At 28 the first of them takes 4 to 7."""
    layers = {16: 2, 28: 3, 32: 3, 64: 4, 128: 5, 256: 6}  # 28: 4, 7, 14, 28
    if side not in layers:
        fail(f"--arch dcgan makes images of 16, 28, 32, 64, 128 or 256 pixels, not --image-size {side}")
    return layers[side]


def dcgan_init(module):
    """DCGAN's initialization (Radford et al. 2016, section 4): normal with a standard deviation of .02.

    Weights of convolutions lie around 0, scales of BatchNorm2d around 1 (as in its code). Others keep PyTorch's."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
        for name, p in module.named_parameters():
            if "weight" in name:  # spectral_norm, if you add it, renames it to parametrizations.weight.original
                nn.init.normal_(p, mean, 0.02)


# LOSS -----------------------------------------------------------------------------------------------------------------


def discriminator_loss(score_real, score_fake):
    """E[u(x)] - E[log(1 - exp(-u(G(z))))] for scores -u (B,).

    It is minus the paper's objective, which D maximises, plus the constant 2 log lambda."""
    u_real = -score_real
    u_fake = -score_fake
    return u_real.mean() - log1mexp(u_fake).mean()


def generator_loss(score_fake, kind="ns"):
    """G's loss for scores -u (B,). ns: E[u(G(z))]. saturating: E[log(1 - exp(-u(G(z))))]."""
    u_fake = -score_fake
    if kind == "ns":
        return u_fake.mean()
    if kind == "saturating":
        return log1mexp(u_fake).mean()
    raise ValueError(f"G has no loss for {kind}")


def log1mexp(u):
    """log(1 - exp(-u)) for u > 0, by a form for small u and one for large u, each exact where it is taken.

    torch.where differentiates the form that it drops, too, times 0. For a tiny u exp(-u) rounds to 1, where the form
    for large u has an infinite slope, and 0 times infinity is NaN. The clamp, below log 2, prevents that."""
    small = (-torch.expm1(-u)).log()
    large = torch.log1p(-(-u.clamp(min=0.5)).exp())
    return torch.where(u < math.log(2), small, large)


def squared_gradient(D, x):
    """E[||grad u(x)||^2] for images x (B, C, H, W): the sum over its pixel values, the mean over images.

    r1/2 of it on real images is R1: Mescheder et al. 2018, 1801.04406, eq. (9)."""
    x = x.detach().requires_grad_(True)  # cut off from what made it; recorded from here on
    # A score depends on its own image alone. So row i of the gradient of the sum of all scores is the gradient of
    # score i.
    # create_graph: the backward of d_loss must differentiate this gradient again, with respect to D's weights.
    (grad,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return grad.flatten(1).square().sum(1).mean()


# TRAINING -------------------------------------------------------------------------------------------------------------


def train(args):
    """Trains G and D as the flags say; with --generate it draws from a checkpoint instead."""
    device = start(args)
    batches = Batches(args, device)
    torch.manual_seed(args.seed)
    G = placed(Generator(args, batches.channels), device)
    D = placed(Discriminator(args, batches.channels), device)
    ema = averaged(G)
    opt_g = adam(G, args.lr_g, args)
    opt_d = adam(D, args.lr_d, args)
    seed_noise(args.seed)  # under torchrun each process draws its own noise from here on

    def amp():
        """With --amp the layers inside run in bfloat16, a float of 16 bits. Without it this does nothing.

        cache_enabled=False: each call of a network casts its weights anew, so the gradients of several calls add up in
        float32. (An older PyTorch could also keep a cast from under no_grad, which passes no gradient on.)"""
        return torch.autocast(device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False)

    def step(x):
        """One iteration: an update of D for each batch in x, uint8 (d_steps, B, C, S, S), then --g-steps of G.

        It returns the losses of the last update of D and of the last of G, for log.csv. They stay on the device:
        reading one would make the CPU wait, which a CUDA graph (see captured) forbids."""
        B = x.shape[1]  # images in a batch
        for x_uint8 in x:
            x_real = from_uint8(x_uint8)
            with torch.no_grad(), amp():  # D's update needs no gradient through G
                x_fake = G(sample_z(args, B, device))  # z (B, latent_dim), normal or uniform
            with amp():
                # One call for both, as D has no batch norm.
                score_real, score_fake = D(torch.cat([x_real, x_fake])).chunk(2)
            # The penalty is costly, so it is taken on n images only: the first n, as the batch is shuffled.
            n = math.ceil(args.penalty_share * B)
            penalty = torch.zeros((), device=device)
            with amp():
                if args.r1 > 0:
                    penalty = args.r1 / 2 * squared_gradient(D, x_real[:n])
            d_loss = discriminator_loss(score_real, score_fake) + penalty
            opt_d.zero_grad(set_to_none=True)
            d_loss.backward()
            average_gradients(D)  # under torchrun, over the GPUs
            opt_d.step()

        for _ in range(args.g_steps):
            with amp():
                x_fake = G(sample_z(args, B, device))  # a fresh z
                new_score_fake = D(x_fake)
            g_loss = generator_loss(new_score_fake, args.loss)
            opt_g.zero_grad(set_to_none=True)
            g_loss.backward(inputs=list(G.parameters()))  # back through D, but only G's weights get gradients
            average_gradients(G)
            opt_g.step()
            update_ema(ema, G, args.ema)

        return {
            "d_loss": d_loss,
            "g_loss": g_loss,
            "penalty": penalty,  # weighted, as in d_loss
            "d_acc": pair_accuracy(score_real, score_fake),
        }

    # Study writes the log, sheets of samples and FIDs, and never trains. It calls sample() for images, and score(), D's
    # opinion of images, for --reject alone; both without gradients, at most 500 images at a time. y, the labels, are
    # for the conditional scripts.
    def sample(z, y):
        return to_uint8(ema(z))

    def score(x, y):
        D.eval()  # if D has them, batch norm takes its running statistics, and dropout is off
        scores = D(from_uint8(x))
        D.train()
        return scores

    study = Study(args, batches, sample, score, SCRIPT)
    state = {"G": G, "D": D, "ema": ema, "opt_g": opt_g, "opt_d": opt_d}
    i = restore(args.resume, state, study) if args.resume else 0  # updates of D so far
    if args.generate:
        study.generate(args.generate)
        return
    total = args.steps or args.epochs * batches.per_epoch
    study.start(i, total, batches.per_epoch)
    say(str(D.mixture))
    stop = Stop()
    if args.graph:
        step = captured(step)

    # i counts updates of D, as do --steps, --log-every, --sample-every and the like. An iteration makes d_steps of
    # them, so the last may pass total.
    while i < total and not stop.is_set():
        # The rates follow from i and total, so a resumed run needs no state of a scheduler. If it is given a larger
        # total, they rise again.
        lr_scale = (1 - i / total) if args.lr_decay == "linear" else 1.0
        set_rate(opt_g, lr_scale * args.lr_g)
        set_rate(opt_d, lr_scale * args.lr_d)
        x, _ = batches(i, args.d_steps)
        losses = step(x)
        i += args.d_steps
        study.add(losses)
        if due(i, args.log_every, args):
            study.log(i)
        if due(i, args.sample_every, args):
            study.sheet(i)
        if due(i, args.eval_every, args):
            is_best = study.evaluate(i)
            if is_best:
                save("best.pt", i, state, study)
        if due(i, args.checkpoint_every, args):
            save("last.pt", i, state, study)

    save("last.pt", i, state, study)
    stop.leave_if_set(i, study)  # after Ctrl-C the program ends here
    is_best = study.evaluate(i)  # does nothing if the loop has scored this update
    if is_best:
        save("best.pt", i, state, study)

    def load_networks(path):
        return restore(path, {"ema": ema, "D": D})

    # The last pictures. Then last.pt and best.pt are loaded in turn and scored; D too, for --reject.
    study.finish(i, load_networks)


def load(path):
    """The averaged generator of a checkpoint, on the CPU and in eval mode.

    It maps z (B, G.latent_dim) to images (B, C, S, S) in [-1, 1]. Ends the program if the file is no checkpoint."""
    checkpoint = read_checkpoint(path)
    # Flags that did not exist yet when the file was written take their default.
    args = argparse.Namespace(**{**vars(parse_args([])), **checkpoint["args"]})
    # As train() made ema: with its count of updates.
    G = averaged(Generator(args, checkpoint["channels"]))
    G.load_state_dict(checkpoint["ema"])
    G.latent_dim = args.latent_dim
    return G


# ======================================================================================================================
# The method ends here. Below is the plumbing, the same in all seven scripts: FLAGS, DATA, STEP, CHECKPOINTS, main.
# Its home is wgan_gp.py; after a change there `python tests/sync.py` copies it to the others.
# ======================================================================================================================

SCRIPT = Path(__file__)

# --resume takes the flags from the checkpoint, and new ones on the command line win. NOT_KEPT are never taken from it:
# they are about this machine or this call. FIXED cannot change: networks, z, the order of the data or the optimizer's
# state would no longer fit. Both lists hold the flags of all seven scripts.
FIXED = """dataset image_size holdout flip batch_size d_steps g_steps seed paper arch ngf ndf latent_dim
    prior upsample upsample_kernel d_norm g_norm d_dropout norm_first conditional d_ignores_label label_embedding_dim
    mixture embedding_dim optimizer init""".split()
NOT_KEPT = "device graph run_dir resume generate generate_to label probe".split()

# Colour images, with their side where no flag gives it. stacked_mnist has three channels too, but of three digits.
COLOUR_SIDES = {"cifar10": 32, "celeba": 64, "folder": 64}

# FLAGS ----------------------------------------------------------------------------------------------------------------


def add_run_flags(p):
    """The flags that have the same default in every script."""
    p.error = fail  # one line, without the usage
    p.allow_abbrev = False  # --gp, a flag of dcgan.py, would pass for --gp-weight in wgan_gp.py
    count = number(int, 0)
    p.add_argument("--dataset", choices=CHANNELS, default="digits", help="digits: rendered here, no download")
    p.add_argument(
        "--data-dir", type=file_name, default="data", help="where data sets lie; with --dataset folder, the images"
    )
    p.add_argument(
        "--image-size",
        type=number(int, 8, 1024),
        help="in pixels. Default: 28 (cdcgan.py: 32), of cifar10 32, of photographs 64; --arch mlp: 28, --paper: 32",
    )
    p.add_argument("--flip", action="store_true", help="mirror images at random: for faces, not for digits")
    p.add_argument("--holdout", type=count, default=0, help="training images that D never sees, for --reject drs")
    p.add_argument("--arch", choices=("dcgan", "mlp"), default="dcgan", help="convolutional or fully connected")
    p.add_argument(
        "--upsample",
        choices=("deconv", "nearest", "bilinear"),
        default="deconv",
        help="how a convolutional G grows a map: by a transposed convolution, or by a resize and a convolution",
    )
    p.add_argument("--upsample-kernel", type=int, choices=(3, 5), default=3, help="of the convolution after a resize")
    p.add_argument(
        "--latent-dim",
        type=number(int, 1, 65536),
        help="size of z. Default: 16 for grey data sets, else 100; with --paper or --arch mlp 100 (bigan.py, mlp: 50)",
    )
    p.add_argument("--prior", choices=("normal", "uniform"), default="normal", help="of z: N(0, I) or U[-1, 1]")
    p.add_argument(
        "--paper",
        action="store_true",
        help="settings of the paper or its code, as far as they have any, and some of ours: see below",
    )
    p.add_argument("--epochs", type=number(int, 1), default=20, help="passes over the training images")
    p.add_argument("--steps", type=number(int, 1), help="updates of D in all; overrides --epochs")
    p.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of networks, data order and noise")
    p.add_argument("--log-every", type=count, default=100, help="updates of D between rows of log.csv; 0: never")
    p.add_argument("--sample-every", type=count, default=1000, help="updates of D between sheets of samples; 0: never")
    p.add_argument("--eval-every", type=count, default=5000, help="updates of D between scores; 0: only the last")
    p.add_argument(
        "--checkpoint-every", type=count, default=2000, help="updates of D between writes of last.pt; 0: at the end"
    )
    p.add_argument(
        "--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="log and sheets for TensorBoard"
    )
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False, help="run the layers in bfloat16")
    p.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: cuda, else cpu; mps: untested"
    )
    p.add_argument(
        "--graph",
        action=argparse.BooleanOptionalAction,
        help="faster on one GPU, and the default there; see captured()",
    )
    p.add_argument(
        "--run-dir", type=file_name, help="default: runs/SCRIPT-DATASET-sSEED-TIME; with --resume its folder"
    )
    p.add_argument(
        "--resume", type=file_name, metavar="FILE", help="a checkpoint to go on from, with its flags unless given here"
    )
    p.add_argument("--generate", type=number(int, 1), metavar="N", help="with --resume: write N images as PNG files")
    p.add_argument(
        "--generate-to", type=file_name, metavar="DIR", help="where to. Default: generated, in the run's folder"
    )
    p.add_argument(
        "--label", default="shares", help="class to --generate: a name; turn: each in turn; shares: as in the data"
    )
    p.add_argument(
        "--reject",
        choices=("none", "naive", "drs"),
        default="none",
        help="which images to keep, by D's score. naive: with chance sigmoid(score); drs: needs --holdout",
    )
    p.add_argument(
        "--drs-percentile",
        type=number(float, 0, 100),
        default=60.0,
        help="drs: an image whose score is at this percentile is kept half the time",
    )


def resolve(p, argv, paper, mlp, colour=None, small_colour=None, long=None, grey_side=28):
    """The flags as a namespace, and the names of those given. Ends the program where they contradict each other.

    A flag's value comes from the first of these that has one:
    1. the command line
    2. the resumed checkpoint
    3. --paper
    4. with --arch mlp: MLP. Else, for colour images of 32 pixels or more: COLOUR, over which SMALL_COLOUR goes below 64
       pixels. Else, in a long run: LONG, if none of its flags has a value so far
    5. the flag's default; --image-size and --latent-dim have none, so suited_to() gives them

    What colour images or the length of the run have set is printed."""
    p.epilog = f"--paper sets {as_flags(paper)}. --arch mlp sets {as_flags(mlp)}."
    if colour:
        p.epilog += f" Colour data sets and folders, of 32 pixels or more, set {as_flags(colour)}."
    if small_colour:
        p.epilog += f" Below 64 pixels they set {as_flags(small_colour)}."
    if long:
        p.epilog += f" On other images --epochs 40 or --steps 40000, or more, sets {as_flags(long)}, if none is given."
    defaults = vars(p.parse_args([]))
    # Which flags were typed? argparse sets a default only where the namespace lacks the name. So parse into one that
    # has every name, as None: what is not None afterwards was typed.
    unset = argparse.Namespace(**dict.fromkeys(defaults))
    given = {name: value for name, value in vars(p.parse_args(argv, unset)).items() if value is not None}
    for name, value in given.items():
        if value == "":
            fail(f"--{name.replace('_', '-')} was given an empty value")
    saved = {}
    if given.get("resume"):
        checkpoint = read_checkpoint(given["resume"])
        # A flag that is newer than the checkpoint has its default.
        saved = {name: checkpoint["args"].get(name, defaults[name]) for name in defaults if name not in NOT_KEPT}
        if "epochs" in given:
            saved["steps"] = None  # new epochs replace the old steps
        # Made on another machine, or by another user: that folder is not here, or may not be read. (Path.exists() would
        # raise PermissionError.)
        if not os.path.exists(saved["data_dir"]):
            needs_data = "generate" not in given or given.get("reject", saved["reject"]) == "drs"
            if saved["dataset"] == "folder" and "data_dir" not in given and needs_data:
                fail(f"the images of {given['resume']} were in {saved['data_dir']}, which is gone: give --data-dir")
            del saved["data_dir"]
        for name in FIXED:
            if name not in saved or name not in given:
                continue
            another_seed = name == "seed" and "generate" in given  # for other images
            if given[name] != saved[name] and not another_seed:
                fail(f"--{name.replace('_', '-')} is {saved[name]} in {given['resume']}: it cannot change")
    chosen = {**saved, **given}
    if chosen.get("dataset") == "folder" and "data_dir" not in chosen and "generate" not in given:
        fail("--dataset folder needs --data-dir, the folder of the images")
    # First without presets, which depend on dataset, arch and paper.
    args = argparse.Namespace(**{**defaults, **chosen})
    suited_side, latent_dim = suited_to(args, grey_side)
    side = args.image_size or suited_side
    preset = {}
    because = None  # what to say of a preset that nobody has typed
    if args.arch == "mlp":
        preset |= mlp
    elif colour and args.dataset in COLOUR_SIDES and side >= 32:
        because = "colour images set"
        preset |= colour
        if small_colour and side < 64:
            preset |= small_colour
    elif long and is_long(args) and not long.keys() & chosen.keys():  # a resumed run keeps its networks
        because = "a long run sets"
        preset |= long
    if args.paper:
        preset |= paper
    elif because and not args.resume:
        say(f"{because} {as_flags({name: value for name, value in preset.items() if name not in given})}")
    args = argparse.Namespace(**{**defaults, **preset, **chosen})
    args.image_size = side
    args.latent_dim = args.latent_dim or latent_dim
    if args.resume and not args.run_dir:
        args.run_dir = str(Path(args.resume).parent)
    elif not args.run_dir:
        args.run_dir = f"runs/{SCRIPT.stem}-{args.dataset}-s{args.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    if args.generate and not args.resume:
        fail("--generate N needs --resume FILE, the checkpoint to draw from")
    if args.generate_to and not args.generate:
        fail("--generate-to needs --generate N")
    if "label" in given and not args.generate:
        fail("--label needs --generate N")
    if "drs_percentile" in given and args.reject != "drs":
        warn("--drs-percentile has no effect without --reject drs")
    if args.reject == "drs" and args.holdout < 2:
        fail("--reject drs needs images that D never saw: train with --holdout 1000, say")
    for name in ("ngf", "ndf", "upsample", "upsample_kernel", "init"):
        if args.arch == "mlp" and name in given:
            warn(f"--{name.replace('_', '-')} has no effect on --arch mlp")
    if args.arch == "dcgan" and args.upsample == "deconv" and "upsample_kernel" in given:
        warn("--upsample-kernel has no effect on --upsample deconv")
    if args.arch == "dcgan":
        doublings(args.image_size)  # ends the program here if there is no network of that size
    resolve_device(args)
    return args, given.keys()


def is_long(args):
    """Was a run of 40 epochs or more, or of 40,000 updates of D or more, asked for? --steps overrides --epochs."""
    return args.steps >= 40_000 if args.steps else args.epochs >= 40


def as_flags(preset):
    """A preset as one would type it."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in preset.items())


def suited_to(args, grey_side):
    """The side of the images and the size of z where no flag gives them: by --arch and --paper, then by the data."""
    if args.arch == "mlp":
        return 28, 100
    if args.paper:
        return 32, 100
    side = COLOUR_SIDES.get(args.dataset, grey_side)
    latent_dim = 16 if CHANNELS[args.dataset] == 1 else 100  # on MNIST 16 gave a lower FID than 100 in every script
    return side, latent_dim


def resolve_device(args):
    """Sets args.device and args.graph to what this machine has. Ends the program where it lacks what a flag asks, or
    where the batch does not split over the processes."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        args.device = "cuda" if available["cuda"] else "cpu"  # nobody has run these scripts on mps, a Mac's GPU
    if not available[args.device]:
        fail(f"--device {args.device}: this PyTorch finds no such device")
    if WORLD > 1 and args.device == "mps":
        fail("--device mps takes one process: no gradients can be averaged there")
    if args.device == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        fail(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs of this machine")
    one_gpu = args.device == "cuda" and WORLD == 1
    if args.graph is None:
        args.graph = one_gpu
    if args.graph and not one_gpu:
        fail("--graph needs CUDA and a single process")
    if args.amp and args.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        fail("--amp: this GPU has no bfloat16 of its own")
    if args.batch_size % WORLD or args.batch_size < 2 * WORLD:
        fail(f"--batch-size {args.batch_size} does not split evenly over {WORLD} processes, two images or more each")


def start(args):
    """Sets PyTorch's switches, joins the other ranks of a torchrun, and returns the device."""
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA: faster products, a little less exact
    torch.backends.cudnn.benchmark = True  # cuDNN tries its algorithms and keeps the fastest
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        backend = "nccl" if args.device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))  # while rank 0 scores, the others wait
    return torch.device(args.device)


# DATA -----------------------------------------------------------------------------------------------------------------


class Batches:
    """The training set, on the device.

    batches(i, n)  images uint8 (n, B, C, S, S) and labels (n, B), for n updates of D from update i on; under torchrun
                   this process's part of each batch
    .x, .y         the images to train on, uint8 (N, C, S, S), and labels int64 (N,), -1 without a label
    .channels      of the images
    .per_epoch     how many batches an epoch has
    .held          (images, labels) set aside by --holdout, or None
    .training_set  all images and labels on the CPU, those of --holdout among them: for the scores
    .classes       {name: number of training images}, those of --holdout among them

    To --generate without --reject drs no images are read. Then .held and .training_set are None, and .channels and
    .classes are those of the checkpoint, {} where G takes no label.

    The order follows from the seed and the epoch alone, so a resumed run goes on with the right batch. What is left
    after the last full batch is skipped; as the order changes, each epoch skips other images."""

    def __init__(self, args, device):
        self.args = args
        self.device = device
        self.held = None
        self.training_set = None
        self.epoch = None
        if args.generate and args.reject != "drs":  # generating needs no data
            checkpoint = read_checkpoint(args.resume)
            self.channels = checkpoint["channels"]
            self.classes = checkpoint["classes"]
            return
        with rank_0_first():  # it may have to download or to decode
            x, y, names = load_data(args.dataset, args.data_dir, args.image_size, "train")
        self.training_set = x, y
        self.channels = x.shape[1]
        counts = y.bincount().tolist() if names and y.min() >= 0 else []  # -1: an image without a label
        names = names[: len(counts)]  # the last names may be of test images only
        self.classes = dict(zip(names, counts))
        if args.holdout >= len(x):
            fail(f"--holdout {args.holdout} leaves nothing of {len(x)} training images to train on")
        if args.holdout:
            # --generate may have another seed, but the images held out are those of the training.
            seed = read_checkpoint(args.resume)["args"]["seed"] if args.generate else args.seed
            order = torch.randperm(len(x), generator=seeded(seed, HELD_OUT))
            held, kept = order.tensor_split([args.holdout])
            self.held = x[held], y[held]
            x, y = x[kept], y[kept]
        self.x = x.to(device)
        self.y = y.to(device)
        self.per_epoch = len(x) // args.batch_size
        if self.per_epoch == 0:
            fail(f"--batch-size {args.batch_size} is larger than the data: {len(x)} images")
        few = ", which are few" if len(x) < 500 else ""
        say(f"{len(x)} training images of {args.dataset}{few}")

    def __call__(self, i, n):
        parts = [self.batch(j) for j in range(i, i + n)]
        return torch.stack([x for x, _ in parts]), torch.stack([y for _, y in parts])

    def batch(self, i):
        epoch, k = divmod(i, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            n = len(self.x)
            self.order = torch.randperm(n, generator=seeded(self.args.seed, ORDER, epoch)).to(self.device)
            if self.args.flip:
                mirror = torch.randint(2, (n, 1, 1, 1), generator=seeded(self.args.seed, MIRROR, epoch))
                self.mirror = mirror.to(self.device) > 0
        size = self.args.batch_size
        rows = self.order[k * size : (k + 1) * size][RANK::WORLD]
        x = self.x[rows]
        if self.args.flip:
            x = torch.where(self.mirror[rows], x.flip(3), x)
        return x, self.y[rows]


# STEP -----------------------------------------------------------------------------------------------------------------


def from_uint8(x):
    """uint8 0..255 -> float -1..1."""
    return x / 127.5 - 1


def to_uint8(x):
    """float -1..1 -> uint8 0..255. Scores see the same rounded pixels as a PNG file holds."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


def placed(net, device):
    """The network on the device, in channels_last: the same shapes, stored pixel by pixel, for faster convolutions.

    Not on a Mac's GPU: there PyTorch 2.11 to 2.13 computes wrong gradients of batch norm in this layout (its issue
    175189)."""
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    return net.to(device, memory_format=layout)


def adam(net, lr, args):
    """Adam. On CUDA the rate is a tensor, which set_rate fills: a CUDA graph would freeze a Python number."""
    cuda = next(net.parameters()).is_cuda
    rate = torch.tensor(lr, device="cuda") if cuda else lr
    return torch.optim.Adam(net.parameters(), rate, (args.beta1, args.beta2), fused=True, capturable=cuda)


def set_rate(opt, rate):
    """Sets the learning rate; in place where it is a tensor (see adam)."""
    for group in opt.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def averaged(G):
    """A copy of G for the running average of its weights, which makes better images than the last weights alone."""
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    ema.register_buffer("updates", torch.zeros((), device=next(G.parameters()).device))
    return ema


@torch.no_grad()
def update_ema(ema, G, decay):
    """ema <- d ema + (1 - d) G, with d = min(decay, (1 + t) / (10 + t)) at update t, which ema.updates counts.

    (1 + t) / (10 + t) makes the average cover about the last ninth of the updates so far, so that it soon forgets the
    untrained G. It reaches .995 after 1,790 updates and .9999 after 90,000. Batch norm's running statistics are
    copied."""
    ema.updates += 1
    d = ((1 + ema.updates) / (10 + ema.updates)).clamp(max=decay)
    for average, p in zip(ema.parameters(), G.parameters()):
        average.lerp_(p, 1 - d)
    for name, b in G.named_buffers():
        ema.get_buffer(name).copy_(b)


def pair_accuracy(score_real, score_fake):
    """The share of (real, fake) pairs that D puts in the right order, the AUC of its score. 1/2: it cannot tell.

    Equal scores count one half. They happen under --amp, where scores are coarsely rounded."""
    difference = score_real.detach()[:, None] - score_fake.detach()
    return ((difference.sign() + 1) / 2).mean()


def seed_noise(seed, i=0):
    """Under torchrun: noise of its own for each rank. Until then all have one seed, so their networks are equal."""
    if WORLD > 1:
        torch.manual_seed(seeded(seed, RANKS, RANK, i).initial_seed())


def average_gradients(net):
    """The mean of the gradients over the ranks of a torchrun."""
    if WORLD > 1:
        for p in net.parameters():
            p.grad /= WORLD
            torch.distributed.all_reduce(p.grad)  # the sum over the ranks, in place


def captured(step):
    """step(x), or step(x, y), as one CUDA graph. It changes no result, only the time: you may skip this.

    A CUDA graph is a recording of all GPU operations of one step. A step starts hundreds of them, and in networks this
    small starting one takes longer than running it. replay() starts all with one call, always on the same memory. So
    each batch is copied into the graph's own input tensors, and the losses come out in the same tensors every time. The
    first three calls run without a graph, as real training: cuDNN chooses its kernels and Adam makes its moments before
    the recording.

    If you edit step: a tensor that it uses must keep its memory. Write into it (fill_, copy_), never put a new one in
    its place. A Python number keeps the value that it had at the recording, and an `if` its branch."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    calls = 0
    inputs = losses = None

    def run():
        return {name: value.detach() for name, value in step(*inputs).items()}

    def replayed(*batch):
        nonlocal calls, inputs, losses
        if inputs is None:
            inputs = [t.clone() for t in batch]
        for own, t in zip(inputs, batch):
            own.copy_(t)
        if calls < 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                losses = run()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if calls == 3:  # recording computes nothing; replay() below does
                with or_fail("the step cannot be captured: give --no-graph"), torch.cuda.graph(graph, stream=stream):
                    losses = run()
            graph.replay()
        calls += 1
        return losses

    return replayed


# CHECKPOINTS ----------------------------------------------------------------------------------------------------------


def due(i, every, args):
    """Did i reach or pass a multiple of `every` in this iteration? i grows by d_steps, so it may skip the multiple.

    every 0: never."""
    return every > 0 and i % every < args.d_steps


def save(name, i, state, study):
    """Writes a checkpoint into the run's folder: one dict of plain types and tensors. Only rank 0 writes.

    Ends the program if a weight is NaN or infinite, before the last good file is overwritten. A disk that refuses costs
    a warning, as the file of before stays and the next save may succeed. After the last update it ends the program."""
    for part in state.values():
        if isinstance(part, nn.Module) and not all(p.isfinite().all() for p in part.parameters()):
            not_finite("a weight", i, study.folder)
    if RANK != 0:
        return
    data_dir = str(Path(study.args.data_dir).resolve())  # absolute, so that --resume works from any directory
    checkpoint = {
        "script": SCRIPT.stem,
        "args": {**vars(study.args), "data_dir": data_dir},
        "step": i,
        "classes": study.classes,
        "channels": study.channels,
        "seconds": study.seconds(),
        "rng": {"cpu": torch.get_rng_state()},
        **{key: part.state_dict() for key, part in state.items()},
    }
    if study.args.device != "cpu":
        checkpoint["rng"][study.args.device] = torch.get_device_module(study.args.device).get_rng_state()
    on_error = or_warn if i < study.total else or_fail
    # On a full disk torch.save raises RuntimeError, others OSError.
    with on_error(f"{study.folder / name} cannot be written", (OSError, RuntimeError)):
        replace_file(study.folder / name, lambda file: torch.save(checkpoint, file))


def read_checkpoint(path):
    """The dict that save wrote, on the CPU. Ends the program with one line if the file is none of this script."""
    with or_fail(f"{path} is not a whole checkpoint of these scripts"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"script", "args", "step", "classes", "seconds", "rng"} - checkpoint.keys()
        if missing:
            raise KeyError(*missing)
    if checkpoint["script"] != SCRIPT.stem:
        fail(f"{path} is a checkpoint of {checkpoint['script']}.py")
    if "channels" not in checkpoint:  # written by an older form, which read grey folders as colour
        checkpoint["channels"] = CHANNELS[checkpoint["args"]["dataset"]]
    return checkpoint


def restore(path, state, study=None):
    """Loads the networks and optimizers in `state` from a checkpoint, and returns its count of updates of D.

    With a study the random state and the seconds so far are restored too, and the classes are compared.

    An optimizer takes its moments from the checkpoint, but keeps its own rate and betas: these are flags."""
    checkpoint = read_checkpoint(path)
    if study and study.channels != checkpoint["channels"]:  # only a folder's can change
        were, are = checkpoint["channels"], study.channels
        fail(f"{path} has images of {were} channels, the data {are}: a folder has 1 while all its pictures are grey")
    before = list(checkpoint["classes"])
    now = list(study.classes) if study else before
    if len(now) != len(before):
        fail(f"{path} knows {len(before)} classes ({', '.join(before[:9])}), not {len(now)} ({', '.join(now[:9])})")
    if now != before:  # other images: the labels go on, under new names
        warn(f"the classes are now called {', '.join(now[:9])}; in {path}: {', '.join(before[:9])}")
    with or_fail(f"{path} does not fit these networks"):
        for name, part in state.items():
            saved = checkpoint[name]
            if isinstance(part, torch.optim.Optimizer):
                saved = {"state": saved["state"], "param_groups": part.state_dict()["param_groups"]}
            part.load_state_dict(saved)
    if study:
        study.seconds_before = checkpoint["seconds"]
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        # A checkpoint made on another kind of device lacks this one's random state: then that of --seed stays.
        if study.args.device != "cpu" and study.args.device in checkpoint["rng"]:
            torch.get_device_module(study.args.device).set_rng_state(checkpoint["rng"][study.args.device])
        seed_noise(study.args.seed, checkpoint["step"])  # under torchrun: what was saved is rank 0's
    return checkpoint["step"]


TOO_LITTLE_MEMORY = "this machine has too little memory: give a smaller --image-size, --batch-size, --ngf or --ndf"


def main(argv=None):
    try:
        train(parse_args(argv))
        leave_ranks()
    except KeyboardInterrupt:  # before or after the loop, during which Stop catches it
        if Stop.finished:
            say(f"stopped while scoring. The training is over: --resume {Stop.finished} scores again")
        raise SystemExit(130) from None  # 128 + SIGINT, as shells expect
    except OSError as e:  # a disk that refuses, a name that is too long
        fail(e)
    except torch.OutOfMemoryError:
        fail("the GPU has too little memory: give a smaller --batch-size, --image-size, --ngf or --ndf")
    except MemoryError:
        fail(TOO_LITTLE_MEMORY)
    except RuntimeError as e:
        # By these words PyTorch says that memory is short on a CPU and on a Mac's GPU.
        if "DefaultCPUAllocator" not in str(e) and "MPS backend out of memory" not in str(e):
            raise
        fail(TOO_LITTLE_MEMORY)
    finally:
        Stop.put_back()
        release_folders()


if __name__ == "__main__":
    main()
