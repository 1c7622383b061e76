"""Unrolled GAN: G plays against D as k more steps would make it, and G's gradient is taken through those k steps.

Metz, Poole, Pfau and Sohl-Dickstein 2017, "Unrolled Generative Adversarial Networks", arXiv 1611.02163, eq. (7)-(10);
f_k is D's logit after k further updates on one batch, starting from the current D, so that it depends on G:

    discriminator  min_D  L(f_0) = E[softplus(-f_0(x))] + E[softplus(f_0(G(z)))]                     one plain step
    generator      min_G  E[softplus(-f_k(G(z)))], non-saturating; or -L(f_k), the game of the paper

    python unrolled.py                                    numerals rendered at start-up, no download
    python unrolled.py --dataset mnist --image-size 28 --k 5 --steps 5000

The steps that were looked ahead are thrown away: D and its optimizer stay as they are, bit for bit. D moves first; G
then looks ahead from the new D on D's last pictures and a fresh z; so with the same other flags --k 0 is dcgan.py's
--d-norm none. D has no batch norm: its statistics would have to be unrolled too. G is in train mode for D's fakes and
is sampled in eval mode with averaged weights. Under torchrun each rank looks ahead on its own rows of the batch.

Expect FID[classifier] 150 after 10,000 updates on MNIST at 28 pixels, --k 5 --lr-decay linear, and 112 with --k 0 (seed
0, README has the protocol): looking ahead is for games that collapse, such as toy2d.py --protocol metz.
"""

import argparse
import copy
import csv
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--k", type=number(int, 0, 1000), default=5,
                   help="D's steps that G looks ahead; 0: the plain GAN. Time and memory of a G step grow with k")
    p.add_argument("--inner", choices=("adam", "sgd"), default="adam",
                   help="optimizer of the k steps: D's own Adam, from its moments and at its rate; or gradient descent")
    p.add_argument("--inner-lr", type=number(float, 0), default=0.05,
                   help="rate of --inner sgd, constant; at 1e-4, usual for Adam, k steps would hardly move D")
    p.add_argument("--loss", choices=("ns", "minimax"), default="ns", help="G's: non-saturating, or the paper's game")
    add_run_flags(p)
    p.set_defaults(batch_size=32, d_steps=1, lr_g=1e-3, lr_d=2e-4, beta1=0.5, beta2=0.999, ngf=16, ndf=16)
    return resolve(p, argv)


# MODEL ----------------------------------------------------------------------------------------------------------------


def make_generator(args, channels):
    """z (B, latent_dim) -> picture (B, channels, S, S) in [-1, 1]."""
    S, nz, ngf = args.image_size, args.latent_dim, args.ngf
    if args.arch == "mlp":  # report E's fully connected pair: 256-512-1024
        layers, width = [], nz
        for w in (256, 512, 1024):
            layers += [nn.Linear(width, w, bias=False), nn.BatchNorm1d(w), nn.LeakyReLU(negative_slope=0.2)]
            width = w
        return Net(*layers, nn.Linear(width, channels * S * S), nn.Tanh(), nn.Unflatten(1, (channels, S, S)))
    start, widths = dcgan_plan(args, ngf)
    layers = [nn.Unflatten(1, (nz, 1, 1)), nn.ConvTranspose2d(nz, widths[0], start, 1, 0, bias=False)]
    for w_in, w_out in zip(widths, [*widths[1:], channels]):  # each block doubles the side
        layers += [nn.BatchNorm2d(w_in), nn.ReLU(), nn.ConvTranspose2d(w_in, w_out, 4, 2, 1, bias=False)]
    return Net(*layers, nn.Tanh()).apply(dcgan_init)


def make_discriminator(args, channels):
    """Picture (B, channels, S, S) -> logit (B,), larger for more real. No norm, so the biases stay."""
    S, ndf = args.image_size, args.ndf
    if args.arch == "mlp":
        layers, width = [nn.Flatten()], channels * S * S
        for w in (1024, 512, 256):
            layers += [nn.Linear(width, w), nn.LeakyReLU(negative_slope=0.2)]
            width = w
        return Net(*layers, nn.Linear(width, 1), nn.Flatten(0))
    start, widths = dcgan_plan(args, ndf)
    layers, width = [], channels
    for w in reversed(widths):  # each block halves the side
        layers += [nn.Conv2d(width, w, 4, 2, 1), nn.LeakyReLU(negative_slope=0.2)]
        width = w
    return Net(*layers, nn.Conv2d(width, 1, start, 1, 0, bias=False), nn.Flatten(0)).apply(dcgan_init)


def dcgan_plan(args, base):
    """Side of the smallest feature map, and the widths from there to the picture: at 32, report C's 128, 64, 32."""
    plans = {28: (7, [2, 1]), 32: (4, [4, 2, 1]), 64: (4, [8, 4, 2, 1])}
    if args.image_size not in plans:
        fail(f"--arch dcgan makes pictures of 28, 32 or 64 pixels, not --image-size {args.image_size}")
    start, factors = plans[args.image_size]
    return start, [base * f for f in factors]


def dcgan_init(m):
    """Radford et al. 2016, section 3: convolutions N(0, .02), batch norm's scale N(1, .02)."""
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)


# LOSS -----------------------------------------------------------------------------------------------------------------


def discriminator_loss(logit_real, logit_fake):
    """E[softplus(-f(x))] + E[softplus(f(G(z)))] for logits (B,): cross-entropy, -log D(x) - log(1 - D(G(z)))."""
    return F.softplus(-logit_real).mean() + F.softplus(logit_fake).mean()


def generator_loss(logit_real, logit_fake, kind):
    """ns: E[-log D(G(z))], of logit_fake alone. minimax: minus D's loss, whose first term depends on G as well, through
    the steps ahead."""
    return F.softplus(-logit_fake).mean() if kind == "ns" else -discriminator_loss(logit_real, logit_fake)


def look_ahead(D, opt, x_real, x_fake, k, inner="adam", inner_lr=0.05):
    """D's parameters {name: tensor} after k more steps on one batch, eq. (8), as differentiable functions of x_fake and
    of D's parameters; neither D nor its optimizer changes. adam: torch.optim.Adam of `opt`, from the moments, count and
    rate that it has now, after one step or more. sgd: gradient descent at inner_lr."""
    params = dict(D.named_parameters())
    group, state = opt.param_groups[0], [opt.state.get(p, {}) for p in params.values()]
    if k and inner == "adam":
        (b1, b2), lr, eps = group["betas"], group["lr"], group["eps"]
        t = state[0]["step"].to(x_real.device, copy=True)  # on the device: no step of this waits for it
        m, v = ([s[key].clone() for s in state] for key in ("exp_avg", "exp_avg_sq"))
    for _ in range(k):
        logits = (functional_call(D, params, (x,)) for x in (x_real, x_fake))
        grads = torch.autograd.grad(discriminator_loss(*logits), list(params.values()), create_graph=True)
        if inner == "sgd":
            params = {name: p - inner_lr * g for (name, p), g in zip(params.items(), grads)}
            continue
        t = t + 1
        c1, c2 = 1 - b1**t, 1 - b2**t
        m = [torch.lerp(g, a, b1) for a, g in zip(m, grads)]
        v = [torch.lerp(g * g, a, b2) for a, g in zip(v, grads)]
        # the root has no slope at 0, where a unit that never fires leaves v: hence the 1e-16
        params = {name: p - lr / c1 * a / ((b / c2 + 1e-16).sqrt() + eps)
                  for (name, p), a, b in zip(params.items(), m, v)}
    return params


# SCHEDULE -------------------------------------------------------------------------------------------------------------

LOGGED = ("d_loss", "g_loss", "d_acc")  # what step() returns, in this order


def train(args):
    device, channels = pick_device(args), DATASETS[args.dataset]
    torch.manual_seed(args.seed)
    G, D = make_generator(args, channels), make_discriminator(args, channels)  # drawn on the CPU: the same everywhere
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    G.amp = D.amp = args.amp
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    opt_g, opt_d = adam(G, args.lr_g, args), adam(D, args.lr_d, args)
    batch = Batches(args, device) if not args.generate or args.reject == "drs" else None

    # step() reads nothing but x and the random stream, takes nothing and waits for nothing: what a CUDA graph needs.
    # Under torchrun every rank draws the whole batch's noise and uses its own rows of it.
    S, B = args.image_size, args.batch_size
    x = torch.empty((args.d_steps, B // WORLD, channels, S, S), dtype=torch.uint8, device=device)
    ema_updates = torch.zeros((), device=device)

    def step():
        for x_uint8 in x:
            x_real = from_uint8(x_uint8)
            with torch.no_grad():  # D's backward ends at the picture
                x_fake = G(own(sample_z(args, B, device)))
            score_real, score_fake = D(torch.cat([x_real, x_fake])).chunk(2)  # no batch norm: one forward for both
            d_loss = discriminator_loss(score_real, score_fake)
            opt_d.zero_grad(set_to_none=True)
            d_loss.backward()
            average_gradients(D)
            opt_d.step()

        for _ in range(args.g_steps):
            x_fake = G(own(sample_z(args, B, device)))  # a fresh z
            params = look_ahead(D, opt_d, x_real, x_fake, args.k, args.inner, args.inner_lr)
            logit_fake = functional_call(D, params, (x_fake,))
            logit_real = functional_call(D, params, (x_real,)) if args.loss == "minimax" else None
            g_loss = generator_loss(logit_real, logit_fake, args.loss)
            grads = torch.autograd.grad(g_loss, list(G.parameters()))  # not backward(): D's weights get no gradient
            for p, grad in zip(G.parameters(), grads): p.grad = grad
            average_gradients(G)
            opt_g.step()
            update_ema(ema, G, args.ema, ema_updates)
        return torch.stack([d_loss.detach(), g_loss.detach(), pair_accuracy(score_real, score_fake)])

    def draw(n, z=None, y=None):
        x_fake = ema(sample_z(args, n, device) if z is None else z)
        return x_fake, D(x_fake)

    def rate(x, y=None):
        return D(x)

    run = Run(args, {"G": G, "D": D}, {"g": opt_g, "d": opt_d}, ema, draw, rate, batch)
    if args.generate:
        return run.generate()
    ema_updates.fill_(run.g_updates())
    step = captured(step, args, run.nets)
    while run.training():
        run.set_lr()
        for i in range(args.d_steps):
            x[i], _ = batch()
        run.record(step())
        if run.due(args.log_every): run.log()
        if run.due(args.sample_every): run.sample()
        if run.due(args.eval_every): run.evaluate()
        if run.due(args.checkpoint_every): run.save("last.pt")
    run.finish()


# ======================================================================================================================
# The method ends here. Below is plumbing: each block between "shared" marks is byte-identical in every script.
# ======================================================================================================================


# --- shared: data ---
DATASETS = {"digits": 1, "mnist": 1, "fashion": 1, "cifar10": 3, "celeba": 3, "folder": 3,
            "stacked_mnist": 3}  # name -> channels


def fail(message):
    """A user's mistake: one line on stderr, exit code 2, no traceback."""
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}\n")
    raise SystemExit(2)


def load_data(name, data_dir, size, split, limit=None):
    """The "train" or "test" pictures of a data set: uint8 (N, C, size, size) in 0..255, int64 labels (N,) or -1."""
    root = Path(data_dir)
    if name == "folder":
        return read_files(root, *list_folder(root, split), size, limit)
    if name == "celeba":
        return read_files(root / "celeba" / "img_align_celeba", *list_celeba(root, split), size, limit)
    if name == "digits":
        x, y = render_digits(*((20_000, 1) if split == "train" else (10_000, 2)))
    elif name == "stacked_mnist":
        x, y = stack(*torchvision_data("mnist", root, split), *((128_000, 3) if split == "train" else (26_000, 4)))
    else:
        x, y = torchvision_data(name, root, split)
    return fit(x[:limit], size), y[:limit]


def torchvision_data(name, root, split):
    """Pictures (N, C, H, W) as they come, and labels: files under `root` are used, missing ones downloaded."""
    from torchvision import datasets
    kind, place, files = {"mnist": (datasets.MNIST, "MNIST/raw", "the four *-ubyte files"),
                          "fashion": (datasets.FashionMNIST, "FashionMNIST/raw", "the four *-ubyte files"),
                          "cifar10": (datasets.CIFAR10, "cifar-10-batches-py", "the files of that archive")}[name]
    ours = [d for d in (root / place, *(root / place).parents) if not d.exists()]
    try:
        data = kind(str(root), train=split == "train", download=True)
    except Exception as e:  # no network, a damaged or cut file: torchvision raises a different kind for each
        for d in ours:
            if d.is_dir() and not any(d.iterdir()): d.rmdir()
        fail(f"--dataset {name}: no usable files in {root / place} and no download ({e}). Offline: put {files} there, "
             f"or name a folder that has them by --data-dir, or use --dataset digits")
    x = torch.as_tensor(data.data)
    return x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2), torch.as_tensor(data.targets).long()


def list_folder(root, split):
    """Picture files below `root`, and labels by the first folder on the way, -1 without. Its train/ and test/ are the
    split; where it has none, every tenth file is for testing. In the order of their names' hashes, which mixes classes:
    the first n files are a fair sample."""
    apart = (root / "train").is_dir() and (root / "test").is_dir()
    kinds = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
    found = [p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in kinds]
    found.sort(key=lambda p: hashlib.sha256(p.as_posix().encode()).digest())
    names = sorted({p.parts[apart] for p in found if len(p.parts) > 1 + apart})  # of both splits: labels mean the same
    files = ([p for p in found if p.parts[0] == split] if apart else
             [p for i, p in enumerate(found) if (i % 10 == 9) == (split == "test")])
    if not files:
        fail(f"--dataset folder: no png, jpg, bmp or webp in {root / split if apart else root}: name the folder of "
             f"pictures by --data-dir")
    return [root / p for p in files], [names.index(p.parts[apart]) if len(p.parts) > 1 + apart else -1 for p in files]


def list_celeba(root, split):
    """The aligned faces of CelebA, split as its list says; no labels."""
    base = root / "celeba"
    try:
        if not (base / "list_eval_partition.txt").exists():
            from torchvision import datasets
            datasets.CelebA(str(root), download=True)  # by the package gdown
        parts = dict(line.split() for line in (base / "list_eval_partition.txt").read_text().splitlines())
        files = sorted(p for p in (base / "img_align_celeba").glob("*.jpg")
                       if parts.get(p.name) == {"train": "0", "test": "2"}[split])
        if not files:
            raise ValueError("no pictures")
    except Exception as e:  # no network, no gdown, Google's quota
        fail(f"--dataset celeba: {e}. Put img_align_celeba/ and list_eval_partition.txt into {base}")
    return files, [-1] * len(files)


def read_files(root, files, labels, size, limit):
    """uint8 (N, 3, size, size): the middle square, resized with antialiasing. Decoded once, by threads, and kept beside
    `root` as one array, whose name changes with the files (names, sizes, dates) and with `size`."""
    def read(path):
        try:
            with Image.open(path) as im:
                if im.mode.startswith("I"):  # 16 bits a pixel, which convert would clip
                    im = Image.fromarray((np.asarray(im).clip(0, 65535) / 257).round().astype(np.uint8))
                upright = ImageOps.exif_transpose(im).convert("RGB")
                return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        except Exception as e:  # Pillow raises a different kind for each kind of damage
            return f"{path}: {e}"

    files, labels = files[:limit], labels[:limit]
    stamp = [(p.relative_to(root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps([size, stamp]).encode()).hexdigest()[:12]
    cache = root.resolve().parent / f"{root.resolve().name}-{size}-{key}.npy"
    if cache.exists():
        return torch.from_numpy(np.load(cache)), torch.tensor(labels)
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(read, files))
    for problem in (p for p in pictures if isinstance(p, str)):
        fail(f"unreadable picture {problem}")
    x = np.stack(pictures)
    try:
        if not limit:
            temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp.npy")
            np.save(temporary, x)
            os.replace(temporary, cache)
    except OSError as e:
        sys.stderr.write(f"not kept for the next run: {cache} ({e})\n")
    return torch.from_numpy(x), torch.tensor(labels)


def render_digits(n, seed):
    """n numerals (n, 1, 28, 28), labels 0..9 in turn: Pillow's own font, two stroke widths, two blurs, a random
    affine map each. The same for the same seed, so every run and every metric sees the same data."""
    glyphs = []
    for digit, stroke, blur in ((d, s, b) for d in range(10) for s in (1, 2) for b in (1.2, 1.8)):
        im = Image.new("L", (64, 64))
        ImageDraw.Draw(im).text((32, 32), str(digit), 255, ImageFont.load_default(54), anchor="mm", stroke_width=stroke)
        glyphs.append(torch.from_numpy(np.array(im.filter(ImageFilter.GaussianBlur(blur)))))
    rng, y = torch.Generator().manual_seed(seed), torch.arange(n) % 10
    which = y * 4 + torch.randint(4, (n,), generator=rng)
    angle, shear, sx, sy, tx, ty = (torch.rand(6, n, generator=rng) * 2 - 1) * torch.tensor(
        [[0.18], [0.2], [0.12], [0.1], [0.08], [0.08]])  # +-10 degrees, shear .2, scales, shifts of a pixel
    c, s = angle.cos(), angle.sin()
    theta = torch.stack([torch.stack([c * (1.05 + sx), shear - s, tx], 1), torch.stack([s, c * (1.05 + sy), ty], 1)], 1)
    bank, out = torch.stack(glyphs)[:, None], []
    for i in torch.arange(n).split(2000):
        grid = F.affine_grid(theta[i], [len(i), 1, 28, 28], align_corners=False)
        out.append(F.grid_sample(bank[which[i]].float(), grid, align_corners=False).round().clamp(0, 255).byte())
    return torch.cat(out), y


def stack(x, y, n, seed):
    """n pictures (n, 3, H, W) of three digits drawn at random, red, green and blue; labels 0..999, red the hundreds."""
    i = torch.randint(len(x), (n, 3), generator=torch.Generator().manual_seed(seed))
    return x[i, 0], y[i] @ torch.tensor([100, 10, 1])


def fit(x, size):
    """uint8 (N, C, H, W) -> side `size`: 28 to 32 by 2 pixels of zeros, everything else resized with antialiasing."""
    if x.shape[-1] == 28 and size >= 32:
        x = F.pad(x, (2, 2, 2, 2))
    if x.shape[-2:] != (size, size):
        x = torch.cat([F.interpolate(b.float(), (size, size), mode="bilinear", antialias=True).round().byte()
                       for b in x.split(1000)])
    return x
# --- end shared ---


# --- shared: flags ---
def number(kind, low, high=2**40):
    """An argparse type: an int or a float in [low, high]; NaN and infinity are out."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def add_run_flags(p):
    """The flags every image script has. A script sets its own defaults with p.set_defaults."""
    p.error, p.formatter_class = fail, argparse.ArgumentDefaultsHelpFormatter
    count, share = number(int, 0), number(float, 0, 0.999999)
    a = p.add_argument
    a("--dataset", choices=DATASETS, default="digits", help="digits: rendered here, no download")
    a("--data-dir", default="data", help="folder of the data sets, and of the trained classifier that scores")
    a("--image-size", type=number(int, 8, 1024), help="dcgan: 28, 32 (its default) or 64; mlp: 28 (its default)")
    a("--arch", choices=("dcgan", "mlp"), default="dcgan", help="networks")
    a("--ngf", type=number(int, 1, 4096), default=32, help="dcgan: width of G's largest map, doubled by each smaller")
    a("--ndf", type=number(int, 1, 4096), default=32, help="dcgan: width of D's largest map, doubled by each smaller")
    a("--latent-dim", type=number(int, 1, 65536), default=100, help="size of z")
    a("--prior", choices=("normal", "uniform"), default="normal", help="law of z: N(0, I) or U[-1, 1]")
    a("--epochs", type=number(int, 1), default=20, help="of N // batch D updates")
    a("--steps", type=number(int, 1), help="D updates in all; overrides --epochs")
    a("--batch-size", type=number(int, 2), help="pictures a step")
    a("--d-steps", "--n-critic", type=number(int, 1, 1000), help="D updates an iteration; WGAN-GP's paper: 5")
    a("--g-steps", type=number(int, 1, 1000), default=1, help="G updates an iteration")
    a("--lr-g", type=number(float, 0, 10), help="Adam's rate for G")
    a("--lr-d", type=number(float, 0, 10), help="Adam's rate for D")
    a("--lr-decay", choices=("none", "linear", "best-fid"), default="none",
      help="linear: to 0 at the last step. best-fid: when the FID has not improved for --patience evaluations, go back "
           "to the best checkpoint and halve both rates")
    a("--patience", type=number(int, 1), default=5, help="evaluations without a better FID, for best-fid")
    a("--beta1", type=share, help="Adam's first moment")
    a("--beta2", type=share, help="Adam's second moment")
    a("--ema", type=share, default=0.999, help="decay of G's averaged copy, which makes every picture; 0: no averaging")
    a("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the networks, the order of the data, and all noise")
    a("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="mps is written for but untested")
    a("--amp", action="store_true", help="matrix products and convolutions of training in bfloat16")
    a("--graph", action=argparse.BooleanOptionalAction, help="replay the iteration as one CUDA graph; default: on CUDA")
    a("--log-every", type=count, default=100, help="D updates between rows of log.csv; 0: never")
    a("--sample-every", type=count, default=1000, help="D updates between sheets of samples")
    a("--eval-every", type=count, default=5000, help="D updates between scores of 10,000 samples; 0: only the last")
    a("--checkpoint-every", type=count, default=2000, help="D updates between writes of last.pt")
    a("--run-dir", help="default: runs/SCRIPT-DATASET-sSEED-TIME")
    a("--resume", metavar="FILE", help="a checkpoint: go on from it, with its flags unless given here")
    a("--generate", type=number(int, 1), metavar="N", help="with --resume: train nothing, write N pictures as PNG")
    a("--generate-to", metavar="DIR", help="where to; default: RUN/generated")
    a("--z-file", metavar="FILE", help="with --generate: z from a .npy or .pt (N, latent-dim)")
    a("--reject", choices=("none", "naive", "drs"), default="none",
      help="keep pictures by D's score, in --generate and the last scores. naive: with chance sigmoid(score), so not "
           "for a critic; drs: Azadi et al. 2019, calibrated on --holdout")
    a("--drs-percentile", type=number(float, 0, 100), default=60.0, help="of D's scores that drs keeps half of: the "
      "higher, the fewer and better; the paper: 80 on ImageNet, 95 on a 2-D grid (as recalled)")
    a("--holdout", type=count, default=0, help="training pictures that D never sees, for --reject drs: 1000, say")
    a("--traverse", type=number(int, 1), default=10, help="rows of traversal.png: the strongest coordinates of z")
    a("--tensorboard", action="store_true", help="also write the log for TensorBoard, if it is installed")
    a("--dry-run", action="store_true", help="two iterations and one of everything else, on tiny data")


OF_ONE_CALL = {"resume", "run_dir", "generate", "generate_to", "z_file", "device", "graph"}  # never from a checkpoint
# what a resumed run may change; the rest would make another network, other data or another order of it
MAY_CHANGE = OF_ONE_CALL | {"steps", "epochs", "lr_g", "lr_d", "lr_decay", "patience", "log_every", "sample_every",
                            "eval_every", "checkpoint_every", "data_dir", "traverse", "tensorboard", "amp", "reject",
                            "drs_percentile"}


def resolve(p, argv):
    """Flags, with those not given taken from --resume's checkpoint, and the defaults that depend on others."""
    args = p.parse_args(argv)
    if args.resume:
        absent = argparse.Namespace(**dict.fromkeys(vars(args), ...))
        given = {k: v for k, v in vars(p.parse_args(argv, absent)).items() if v is not ...}
        checkpoint = read_checkpoint(args.resume)
        old, script = checkpoint["args"], checkpoint["script"]
        if script != Path(__file__).stem:
            fail(f"{args.resume} is a checkpoint of {script}.py")
        for k, v in given.items():
            if k in old and v != old[k] and k not in MAY_CHANGE | ({"seed"} if args.generate else set()):
                fail(f"--{k.replace('_', '-')} is {old[k]} in {args.resume}: a resumed run cannot change it to {v}")
        vars(args).update({k: v for k, v in old.items() if k not in given and k not in OF_ONE_CALL})
        if "epochs" in given and "steps" not in given:
            args.steps = None
    if (args.generate and not args.resume) or (args.z_file and not args.generate):
        fail("--generate N needs --resume FILE, the checkpoint to draw from, and --z-file needs --generate N")
    if args.lr_decay == "best-fid" and not args.eval_every:
        fail("--lr-decay best-fid needs evaluations: give --eval-every")
    if args.reject == "drs" and args.holdout < 2:
        fail("--reject drs is calibrated on pictures that D has never seen: train with --holdout 1000, say")
    if args.z_file and args.reject != "none":
        fail("--z-file names the pictures, --reject would choose among them: give one of the two")
    args.image_size = args.image_size or {"dcgan": 32, "mlp": 28}[args.arch]
    if args.dry_run:
        args.steps, args.batch_size, args.holdout = 2 * args.d_steps, min(args.batch_size, 16), min(args.holdout, 64)
        args.log_every = args.sample_every = args.eval_every = args.checkpoint_every = args.d_steps
    return args


def pick_device(args):
    """The device, this rank's own under torchrun; also settles --graph."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        fail(f"--device {name}: this PyTorch finds no such device")
    if args.graph and (name != "cuda" or WORLD > 1):
        fail("--graph needs CUDA and a process of its own: an all_reduce between ranks is not captured")
    args.graph = name == "cuda" and WORLD == 1 if args.graph is None else args.graph
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    torch.backends.cudnn.benchmark = True
    if WORLD > 1:
        if args.batch_size % WORLD:
            fail(f"--batch-size {args.batch_size} does not divide among {WORLD} ranks")
        if name == "cuda": torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if name == "cuda" else "gloo")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)
# --- end shared ---


# --- shared: step ---
def to_uint8(x):
    """[-1, 1] -> uint8 0..255: the one way out, for files and for metrics alike."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


def from_uint8(x):
    """uint8 0..255 -> float [-1, 1]."""
    return x.to(torch.get_default_dtype()) / 127.5 - 1


class Net(nn.Sequential):
    """nn.Sequential (several inputs go to its first layer as a tuple) that under --amp trains with its products in
    bfloat16. What comes out, losses and penalties stay float32, and in eval mode all of it. No cache of cast weights:
    filled under no_grad, it would cut their gradients."""
    amp = False

    def forward(self, *inputs):
        first = inputs[0]
        with torch.autocast(first.device.type, torch.bfloat16, self.amp and self.training, cache_enabled=False):
            return super().forward(inputs if len(inputs) > 1 else first).to(first.dtype)


def sample_z(args, n, device, generator=None):
    """z (n, latent_dim) from the prior."""
    if args.prior == "normal":
        return torch.randn(n, args.latent_dim, device=device, generator=generator)
    return torch.rand(n, args.latent_dim, device=device, generator=generator) * 2 - 1


def seeded(*key):
    """A CPU generator, a pure function of whole numbers: hashed, as torch keeps only 32 bits of a seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def adam(net, lr, args):
    device = next(net.parameters()).device
    cuda = device.type == "cuda"  # there the rate lies on the device, so that a captured step sees it change
    return torch.optim.Adam(net.parameters(), torch.tensor(lr, device=device) if cuda else lr, (args.beta1, args.beta2),
                            fused=cuda or device.type == "cpu", capturable=cuda)


@torch.no_grad()
def update_ema(ema, G, decay, updates):
    """ema <- d ema + (1 - d) G with d = min(decay, (1 + t) / (10 + t)), t = `updates` on the device; buffers copied."""
    updates += 1
    weight = 1 - ((1 + updates) / (10 + updates)).clamp(max=decay)
    for e, p in zip(ema.parameters(), G.parameters()):
        e.lerp_(p, weight)
    for e, b in zip(ema.buffers(), G.buffers()):
        e.copy_(b)


def pair_accuracy(score_real, score_fake):
    """The share of all pairs with score(real) > score(fake): .5 to 1, comparable across all losses."""
    return (score_real.detach()[:, None] > score_fake.detach()).float().mean()


class Batches:
    """batch() -> uint8 (B, C, H, W), labels (B,), from one tensor on the device. Epoch e's order is a pure function of
    (seed, e): there is nothing to checkpoint but the step."""

    def __init__(self, args, device):
        if RANK: over_ranks(torch.zeros(1, device=device))  # rank 0 may have to download
        x, y = load_data(args.dataset, args.data_dir, args.image_size, "train", 256 if args.dry_run else None)
        if not RANK: over_ranks(torch.zeros(1, device=device))
        self.size, self.seed, self.step, self.epoch, self.held = args.batch_size, args.seed, 0, None, None
        if args.holdout:
            shuffled = torch.randperm(len(x), generator=seeded(args.seed, 7))
            held, kept = shuffled[:args.holdout], shuffled[args.holdout:]
            self.held, x, y = (x[held], y[held]), x[kept], y[kept]
        self.per_epoch = len(x) // args.batch_size
        if not self.per_epoch:
            fail(f"--batch-size {args.batch_size} is larger than the data: {len(x)} pictures")
        args.classes = int(y.max()) + 1 if y.min() >= 0 else 0
        self.x, self.y = x.to(device), y.to(device)

    def __call__(self):
        epoch, i = divmod(self.step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = torch.randperm(len(self.x), generator=seeded(self.seed, 0, epoch)).to(self.x.device)
        self.step += 1
        index = own(self.order[i * self.size:(i + 1) * self.size])
        return self.x[index], self.y[index]
# --- end shared ---


# --- shared: ranks ---
RANK, WORLD = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun: one process a GPU, which train as one process would
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def own(whole):
    """This rank's rows of a batch that every rank has drawn whole, from the same stream."""
    n = len(whole) // WORLD
    return whole[RANK * n:(RANK + 1) * n]


def over_ranks(x, operation="SUM"):
    """x reduced over all ranks, in place."""
    if WORLD > 1:
        try:
            torch.distributed.all_reduce(x, getattr(torch.distributed.ReduceOp, operation))
        except RuntimeError as e:
            fail(f"rank {RANK} has lost another rank: {e}")
    return x


def average_gradients(net):
    """Their mean over ranks, by one flat all_reduce."""
    if WORLD > 1:
        params = list(net.parameters())
        flat = over_ranks(torch.cat([p.grad.flatten() for p in params])) / WORLD
        for p, mean in zip(params, flat.split([p.numel() for p in params])):
            p.grad.copy_(mean.view_as(p))


def as_rank_0(value):
    """What rank 0 passes."""
    box = [value]
    if WORLD > 1: torch.distributed.broadcast_object_list(box)
    return box[0]
# --- end shared ---


# --- shared: graph ---
def captured(step, args, nets, warm_up=3):
    """step() replayed as one CUDA graph: to launch its hundreds of small kernels one by one takes longer than to run
    them. The first calls run eagerly and count as training; they let cuDNN choose kernels and Adam make its moments,
    on the stream that then captures. After that a tensor of step() may be written to, never replaced.
    A capture executes nothing: where it fails, the run goes on eagerly from the state it had."""
    if not args.graph:
        return step
    side, graph, calls, values = torch.cuda.Stream(), torch.cuda.CUDAGraph(), 0, None

    def call():
        nonlocal graph, calls, values
        calls += 1
        if calls == warm_up + 1:
            noise = torch.cuda.default_generators[torch.cuda.current_device()]
            before = noise.clone_state()
            try:
                with torch.cuda.graph(graph, stream=side):
                    values = step()
            except Exception as e:
                graph, values = None, None
                noise.graphsafe_set_state(before)  # a broken capture leaves the generator unusable
                for net in nets.values(): net.requires_grad_(True)
                sys.stderr.write(f"no CUDA graph, so slower: {type(e).__name__}: {' '.join(str(e).split())[:200]}\n")
        if values is not None:
            graph.replay()
            return values
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            eager = step()
        torch.cuda.current_stream().wait_stream(side)
        return eager

    return call
# --- end shared ---


# --- shared: checkpoint ---
def write_whole(path, write):
    """write(file) into a temporary file beside `path`, flush, rename: a kill at any moment leaves the old file."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    with open(temporary, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_checkpoint(path):
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if {"script", "args", "step", "nets", "ema", "opts", "rng", "state", "window"} <= set(checkpoint):
            return checkpoint
        raise ValueError("parts are missing")
    except FileNotFoundError:
        fail(f"no checkpoint at {path}")
    except Exception as e:  # cut short, not ours, or a folder: torch raises a different kind for each
        fail(f"{path} is not a whole checkpoint of these scripts ({type(e).__name__})")


def load_optimizer(opt, saved):
    params = [p for group in opt.param_groups for p in group["params"]]
    if opt.state:  # in place: a captured step reads these tensors
        for i, moments in saved["state"].items():
            for k, v in moments.items():
                opt.state[params[i]][k].copy_(v)
        return
    for now, old in zip(opt.param_groups, saved["param_groups"]):  # another device may want other kernels
        old.update({k: now[k] for k in ("fused", "capturable", "foreach", "lr") if k in now})
    opt.load_state_dict(saved)
# --- end shared ---


# --- shared: run ---
SCRIPT = Path(__file__)
SCORES = ["fid", "fid_train", "inception_score", "mode_score", "coverage", "classes", "class_min", "class_max",
          "label_accuracy", "modes", "modes_kl"]


def rejection_line(took):
    return (f"{took['attempts']} attempts, {took['acceptance']:.1%} kept"
            + (f", calibrated at AUC {took['auc']:.3f}" if took["auc"] else "")
            + (f". {took['warning']}" if took["warning"] else ""))


class Run:
    """The run directory, progress, checkpoints, scores and figures; sees the method only through these arguments.
    Under torchrun every rank has one and calls the same methods, and that of rank 0 writes."""

    def __init__(self, args, nets, opts, ema, draw, rate, batch, labels=1):
        """labels: the number of classes that draw's y can ask for; 1: it has no y."""
        self.args, self.nets, self.opts, self.ema, self.batch, self.labels = args, nets, opts, ema, batch, labels
        self.draw, self.rate = self.apart(draw), self.apart(rate)
        self.device, self.step = next(ema.parameters()).device, 0
        self.state = {"best_fid": math.inf, "stale": 0, "scored": -1, "seconds": 0.0}
        self.sums, self.count = torch.zeros(len(LOGGED), device=self.device), 0
        old = Path(args.resume).parent if args.resume else None
        name = f"{SCRIPT.stem}-{args.dataset}-s{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.dir = Path(as_rank_0(args.run_dir) or old or Path("runs") / as_rank_0(name))
        if old:
            self.restore(read_checkpoint(args.resume))
        self.metrics = self.board = self.judge = self.asked = self.signal = None
        if SCRIPT.with_name("metrics.py").exists() and RANK == 0:
            import metrics
            self.metrics = metrics
        elif args.reject != "none" and RANK == 0:
            fail(f"--reject {args.reject} needs metrics.py beside the script")
        if args.generate:
            return
        self.total = args.steps or args.epochs * batch.per_epoch
        self.first_bad = torch.full((), -1, device=self.device)
        if RANK == 0:
            self.open(old)
        # the same z in every sheet: 64 of them, or eight columns and a row for each label, of which 20 are shown
        rows = min(labels, 20)
        self.z_sheet = self.noise(64, 1) if labels == 1 else self.noise(8, 1).repeat(rows, 1)
        self.y_sheet = torch.arange(rows, device=self.device).repeat_interleave(64 if labels == 1 else 8)
        self.clock, self.clock_step, self.paused = time.time(), self.step, 0.0
        if self.step == 0 and args.sample_every:
            self.sample()
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.on_signal)
        self.say(f"{self.dir}: {self.total} D updates of {args.batch_size} pictures on {self.device}"
                 + (f" and {WORLD - 1} more" if WORLD > 1 else ""))

    def apart(self, f):
        """draw or rate outside of training: no gradients, networks in eval mode, and back."""
        @torch.no_grad()
        def call(*args, **kwargs):
            for net in self.nets.values(): net.eval()
            try:
                return f(*args, **kwargs)
            finally:
                for net in self.nets.values(): net.train()
        return call

    def open(self, old):
        """The run directory; `old` is that of the checkpoint to resume."""
        args, fresh = self.args, not old or self.dir.resolve() != old.resolve()
        if fresh and self.dir.exists() and (not self.dir.is_dir() or any(self.dir.iterdir())):
            fail(f"--run-dir {self.dir} is in use: name another, or go on with --resume {self.dir / 'last.pt'}")
        if args.lr_decay == "best-fid" and not (self.metrics and args.classes):
            fail("--lr-decay best-fid needs scores: metrics.py beside the script, and labels to train on")
        if not self.metrics:
            self.say("metrics.py is not beside this script: no scores, no curves.png")
        elif not args.classes:
            self.say("no labels to train a classifier on, so the run has no scores: see metrics.py --features")
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                fail("--tensorboard needs a package of its own: pip install tensorboard")
        try:
            (self.dir / "samples").mkdir(parents=True, exist_ok=not fresh)
        except OSError as e:
            fail(f"--run-dir {self.dir}: {e}")
        if args.tensorboard:
            self.board = SummaryWriter(self.dir, purge_step=self.step)
        if fresh:
            shutil.copy(SCRIPT, self.dir / SCRIPT.name)
        if not (self.dir / "best.pt").exists():
            self.state.update(best_fid=math.inf, stale=0)
        (self.dir / "args.json").write_text(json.dumps(vars(args), indent=1))
        self.drop_later()

    def on_signal(self, signum, frame):
        """Stop at the end of this iteration, with a checkpoint; a second signal stops at once."""
        self.asked = signum
        default_signals()

    def training(self):
        if WORLD == 1:
            self.signal = self.asked
        elif self.step // self.args.d_steps % 10 == 0:  # all ranks leave after the same iteration
            self.signal = int(over_ranks(torch.tensor(self.asked or 0, device=self.device), "MAX")) or None
        return self.step < self.total and self.signal is None

    def due(self, every):
        """True at the first iteration boundary at or past each multiple of `every`."""
        return every > 0 and self.step // every > (self.step - self.args.d_steps) // every

    def g_updates(self):
        return self.step // self.args.d_steps * self.args.g_steps

    def set_lr(self):
        scale = 1 - self.step / self.total if self.args.lr_decay == "linear" else 1
        for key, lr in (("g", self.args.lr_g), ("d", self.args.lr_d)):
            for group in self.opts[key].param_groups:
                if torch.is_tensor(group["lr"]):
                    group["lr"].fill_(lr * scale)
                else:
                    group["lr"] = lr * scale

    def record(self, values):
        """Once an iteration: sums stay on the device, and so does the first step with a loss that is not finite."""
        self.step += self.args.d_steps
        self.sums, self.count = self.sums + values, self.count + 1
        self.first_bad = torch.where((self.first_bad < 0) & ~values.isfinite().all(), self.step, self.first_bad)

    def check_finite(self):
        """Before anything is written: a NaN stops the run and leaves the last good checkpoint."""
        bad = int(self.first_bad)
        if bad >= 0 or not all(p.isfinite().all() for net in self.nets.values() for p in net.parameters()):
            kept = self.dir / "last.pt"
            fail(f"a loss or weight is not finite at step {bad if bad >= 0 else self.step}: try lower --lr-d, --lr-g"
                 + (f"; {kept} is from before" if kept.exists() else ""))

    # the log ----------------------------------------------------------------------------------------------------------

    def log(self):
        self.check_finite()  # waits for the device
        means = dict(zip(LOGGED, (over_ranks(self.sums.clone()) / WORLD / self.count).tolist()))
        rate = (self.step - self.clock_step) / max(time.time() - self.clock - self.paused, 1e-9)
        self.state["seconds"], self.sums, self.count = self.seconds(), torch.zeros_like(self.sums), 0
        self.clock, self.clock_step, self.paused = time.time(), self.step, 0.0
        self.write_row({**means, "images_per_s": rate * self.args.batch_size,
                        **{f"lr_{k}": float(opt.param_groups[0]["lr"]) for k, opt in self.opts.items()}})
        losses, eta = "  ".join(f"{k} {v:.3f}" for k, v in means.items()), max(0, int((self.total - self.step) / rate))
        self.say(f"epoch {self.step / self.batch.per_epoch:.1f}/{self.total / self.batch.per_epoch:.4g}  D {self.step} "
                 f"G {self.g_updates()}  {losses}  {rate * self.args.batch_size:.0f} images/s  "
                 f"ETA {eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}", redraw=True)

    def say(self, text, redraw=False):
        """A line of its own; on a terminal the next one is written over a `redraw` line."""
        if RANK:
            return
        if sys.stdout.isatty():
            text = "\r\033[K" + (text[:shutil.get_terminal_size().columns - 1] if redraw else text + "\n")
        print(text, end="" if sys.stdout.isatty() else "\n", flush=True)

    def seconds(self):
        return self.state["seconds"] + time.time() - self.clock

    def write_row(self, row):
        if RANK:
            return
        row = {"step": self.step, "epoch": self.step / self.batch.per_epoch, "g_updates": self.g_updates(),
               "seconds": self.seconds(), **row}
        columns = ["step", "epoch", "g_updates", "seconds", *LOGGED, "images_per_s", "lr_g", "lr_d", *SCORES]
        with open(self.dir / "log.csv", "a", newline="") as f:
            writer = csv.DictWriter(f, columns, extrasaction="ignore", lineterminator="\n")
            if not f.tell(): writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        for k in columns if self.board else ():
            if k in row: self.board.add_scalar(k, row[k], self.step)

    def drop_later(self):
        """Rows and sheets past this step go: a resumed run leaves what an unbroken one would."""
        path = self.dir / "log.csv"
        if path.exists() and path.stat().st_size:
            header, *rows = path.read_text().splitlines()
            rows = [r for r in rows if r.count(",") == header.count(",") and int(r.split(",")[0]) <= self.step]
            write_whole(path, lambda f: f.write("\n".join([header, *rows, ""]).encode()))
        for sheet in (self.dir / "samples").glob("step_*.png"):
            if int(sheet.stem[5:]) > self.step: sheet.unlink()

    # samples and scores -----------------------------------------------------------------------------------------------

    def noise(self, n, *key):
        """z (n, latent_dim) for figures and scores: a pure function of the seed and a key; 0 is the data's."""
        return sample_z(self.args, n, "cpu", seeded(self.args.seed, *key)).to(self.device)

    def pictures(self, z, y=None):
        """uint8 (N, C, H, W) on the CPU, of labels y (N,) or each in turn."""
        y = torch.arange(len(z), device=z.device) % self.labels if y is None else y
        return torch.cat([to_uint8(self.draw(len(b), z=b, y=c)[0]).cpu() for b, c in zip(z.split(500), y.split(500))])

    def sample(self):
        self.check_finite()
        if RANK:
            return
        start = time.time()
        save_sheet(self.pictures(self.z_sheet, self.y_sheet), self.dir / "samples" / f"step_{self.step:07}.png", 8)
        self.paused += time.time() - start

    def evaluate(self):
        """Scores of fresh samples. best.pt is chosen by the FID against training pictures, so that the FID against the
        test set stays a measurement."""
        self.check_finite()
        if self.metrics and self.args.classes:
            self.score()
        self.state["stale"] = as_rank_0(self.state["stale"])
        if self.args.lr_decay == "best-fid" and self.state["stale"] >= self.args.patience:
            self.back_to_best()

    def score(self):
        start = time.time()
        if not self.judge:
            self.save("last.pt")  # a data set or a classifier that cannot be had must not cost the run
            self.judge = self.metrics.Judge(self.args.dataset, self.args.data_dir, self.args.image_size, self.device,
                                            limit=256 if self.args.dry_run else None, say=self.say)
        if self.state["scored"] == self.step:  # a resumed run knows of it
            return
        scores = self.judge(self.pictures(self.noise(self.judge.n, 2, self.step)), self.asked_for(self.judge.n))
        self.state.update(stale=self.state["stale"] + 1, scored=self.step)
        if scores["fid_train"] < self.state["best_fid"]:
            self.state.update(best_fid=scores["fid_train"], stale=0)
            self.save("best.pt")
        self.write_row(scores)
        self.say(f"step {self.step}: {self.judge.line(scores)}")
        self.paused += time.time() - start

    def asked_for(self, n):
        """The labels of n pictures, where G is told one."""
        return torch.arange(n) % self.labels if self.labels > 1 else None

    def kept(self, n, *key):
        """n pictures uint8 (n, C, H, W) that --reject keeps, and what it took; ValueError where D is of no use."""
        args, rng = self.args, seeded(self.args.seed, *key)

        def more(k):
            x, score = self.draw(k, z=sample_z(args, k, "cpu", rng).to(self.device))
            return to_uint8(x).cpu(), score

        head = None
        if args.reject == "drs":
            x, y = (t.to(self.device).split(500) for t in self.batch.held)
            real = torch.cat([self.rate(from_uint8(x), y) for x, y in zip(x, y)])
            head = self.metrics.platt(real, torch.cat([more(len(b))[1] for b in x]))
        return self.metrics.rejected(args.reject, more, n, seeded(args.seed, *key, 1), head, args.drs_percentile)

    # checkpoints ------------------------------------------------------------------------------------------------------

    def save(self, name):
        self.check_finite()
        if RANK:
            return
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            rng[self.device.type] = getattr(torch, self.device.type).get_rng_state()
        checkpoint = {"script": SCRIPT.stem, "args": dict(vars(self.args)), "step": self.step, "rng": rng,
                      "state": {**self.state, "seconds": self.seconds()},
                      "window": {"sums": self.sums, "count": self.count},
                      "nets": {k: net.state_dict() for k, net in self.nets.items()}, "ema": self.ema.state_dict(),
                      "opts": {k: opt.state_dict() for k, opt in self.opts.items()}}
        write_whole(self.dir / name, lambda f: torch.save(checkpoint, f))

    def restore(self, checkpoint, weights_only=False):
        """Networks, average and optimizers; unless `weights_only` also the step, the noise and the schedule."""
        try:
            for k, net in self.nets.items():
                net.load_state_dict(checkpoint["nets"][k])
            self.ema.load_state_dict(checkpoint["ema"])
            for k, opt in self.opts.items():
                load_optimizer(opt, checkpoint["opts"][k])
        except (KeyError, RuntimeError, ValueError) as e:
            fail(f"{self.args.resume} does not fit these networks ({e})")
        if not weights_only:
            self.step, rng, window = checkpoint["step"], checkpoint["rng"], checkpoint["window"]
            self.sums, self.count = window["sums"].to(self.device), window["count"]
            self.state.update(checkpoint["state"])
            torch.set_rng_state(rng["cpu"])
            if self.device.type != "cpu" and self.device.type in rng:
                getattr(torch, self.device.type).set_rng_state(rng[self.device.type])
            if self.batch: self.batch.step = self.step

    def back_to_best(self):
        """Networks and moments of the best checkpoint, and half the rates from here on."""
        self.restore(read_checkpoint(self.dir / "best.pt"), weights_only=True)
        self.state["stale"] = 0
        self.args.lr_g, self.args.lr_d = self.args.lr_g / 2, self.args.lr_d / 2

    # the end ----------------------------------------------------------------------------------------------------------

    def finish(self, more_figures=lambda: None):
        self.save("last.pt")
        if self.signal is not None:
            if self.board: self.board.close()
            self.say(f"stopped at step {self.step}: go on with --resume {self.dir / 'last.pt'}")
            raise SystemExit(128 + self.signal)
        default_signals()
        if RANK:
            return
        self.figures()
        more_figures()
        if self.metrics and self.args.classes:
            self.score()
            self.save("last.pt")  # it now knows of the last score
            self.last_scores()
        if self.metrics:
            self.metrics.plot([self.dir], self.dir / "curves.png")
        if self.board: self.board.close()
        self.say(f"done: {self.dir}")

    def last_scores(self):
        """scores.json: last.pt and best.pt on fresh z, and on what --reject keeps."""
        scores, reject, last = {}, self.args.reject, self.step
        for name in (n for n in ("last.pt", "best.pt") if (self.dir / n).exists()):
            checkpoint = read_checkpoint(self.dir / name)
            if name == "best.pt" and checkpoint["step"] == last:  # the same networks
                scores |= {k.replace("last", "best"): v for k, v in scores.items()}
                self.say("best.pt is last.pt")
                break
            self.restore(checkpoint, weights_only=True)
            scores[name] = self.judge(self.pictures(self.noise(self.judge.n, 3)), self.asked_for(self.judge.n))
            self.say(f"{name}, fresh z: {self.judge.line(scores[name])}")
            if reject != "none":
                try:
                    x, took = self.kept(self.judge.n, 8)
                except ValueError as e:
                    self.say(f"--reject {reject}: {e}")
                    continue
                scores[f"{name} --reject {reject}"] = s = {**self.judge(x), **took}
                self.say(f"{name}, --reject {reject}: {self.judge.line(s)}; {rejection_line(took)}")
        (self.dir / "scores.json").write_text(json.dumps(scores, indent=1))

    def figures(self):
        z, far, args = self.noise(1, 5), 4.0 if self.args.prior == "normal" else 1.0, self.args
        save_sheet(self.pictures(self.z_sheet, self.y_sheet), self.dir / "samples.png", 8)
        save_gif(sorted((self.dir / "samples").glob("step_*.png")), self.dir / "training.gif")
        a, b = self.noise(16, 4).chunk(2)  # eight pairs, ten pictures from one to the other
        t = torch.linspace(0, 1, 10).view(10, 1)
        between = torch.lerp(a[:, None], b[:, None], t.to(a.device)).flatten(0, 1)
        y = torch.arange(8, device=z.device) % self.labels
        save_sheet(self.pictures(between, y.repeat_interleave(10)), self.dir / "interpolation_latent.png", 10)
        xa, xb = (self.pictures(ends, y).float()[:, None] for ends in (a, b))
        between = torch.lerp(xa, xb, t.view(1, 10, 1, 1, 1)).flatten(0, 1).round().byte()
        save_sheet(between, self.dir / "interpolation_pixel.png", 10)
        one = torch.eye(args.latent_dim, device=z.device) > 0  # row i: coordinate i at either end, the rest left alone
        low, high = (self.pictures(torch.where(one, v, z), y[:1].expand(len(one))).float() for v in (-far, far))
        rows = (high - low).abs().flatten(1).mean(1).argsort(descending=True)[:args.traverse].to(z.device)
        steps = torch.linspace(-far, far, 9, device=z.device).view(1, 9, 1)
        slid = torch.where(one[rows, None], steps, z).flatten(0, 1)
        save_sheet(self.pictures(slid, y[:1].expand(len(slid))), self.dir / "traversal.png", 9)

    def generate(self):
        args, out = self.args, Path(self.args.generate_to or self.dir / "generated")
        z = self.noise(args.generate, 6)
        if args.z_file:
            try:
                z = np.load(args.z_file) if args.z_file.endswith(".npy") else torch.load(args.z_file, weights_only=True)
                z = torch.as_tensor(z).float().to(self.device)
                if z.dim() != 2 or z.shape[1] != args.latent_dim or len(z) < args.generate or not z.isfinite().all():
                    raise ValueError(f"is {tuple(z.shape)}, or not finite")
            except Exception as e:
                fail(f"--z-file {args.z_file}, to be ({args.generate} or more, {args.latent_dim}): {e}")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            fail(f"--generate-to {out} is in use")
        try:
            out.mkdir(parents=True, exist_ok=True)
            out.rmdir()  # until there is something to put in it
        except OSError as e:
            fail(f"--generate-to {out}: {e}")
        try:
            x, took = (self.pictures(z[:args.generate]), None) if args.reject == "none" else self.kept(args.generate, 6)
        except ValueError as e:
            fail(f"--reject {args.reject}: {e}")
        out.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(x):
            to_image(picture).save(out / f"{i:05}.png")
        self.say(f"{args.generate} pictures in {out}" + (f": {rejection_line(took)}" if took else ""))
# --- end shared ---


# --- shared: figures ---
def to_image(x):
    """uint8 (C, H, W) -> a grey or colour Pillow image."""
    return Image.fromarray(x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).contiguous().numpy())


def save_sheet(x, path, columns):
    """uint8 (N, C, H, W) as one PNG, row by row, two pixels of white between pictures."""
    from torchvision.utils import make_grid
    sheet = make_grid(x, nrow=columns, padding=2, pad_value=255)
    to_image(sheet[:x.shape[1]]).save(path)


def save_gif(paths, out, limit=300 * 1024):
    """The sheets as an animation of at most `limit` bytes: fewer frames and grey levels until it fits."""
    for frames, colours in ((48, 16), (32, 16), (24, 8), (16, 8), (10, 4), (5, 4), (2, 2)):
        chosen = [paths[i] for i in sorted({round(t) for t in np.linspace(0, len(paths) - 1, min(frames, len(paths)))})]
        images = [Image.open(p).quantize(colours) for p in chosen]
        if not images:
            return
        file = io.BytesIO()
        images[0].save(file, "GIF", save_all=True, append_images=images[1:] + images[-1:] * 5, duration=150, loop=0)
        if file.tell() <= limit:
            return write_whole(out, lambda f, b=file: f.write(b.getvalue()))
# --- end shared ---


# --- shared: main ---
def default_signals():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(argv=None):
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        train(parse_args(argv))
    except KeyboardInterrupt:  # outside the training loop, or the second one
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        if WORLD > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
# --- end shared ---


if __name__ == "__main__":
    main()
