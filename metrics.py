"""What the scripts share: real images, scores of generated ones, rejection sampling, and what watches a run.

    python metrics.py --real mnist --fake runs/NAME/generated     a folder of images, or an array: .npy, .npz, .pt, .pth
    python metrics.py --real photos --fake generated              a folder against a folder: no labels, no download
    python metrics.py --real photos --fake generated --features inception --scores fid
    python metrics.py --plot runs/A runs/B -o curves.png          runs that differ in the seed alone become one band
    python metrics.py --table runs/A runs/B                       their final scores, mean and deviation over seeds

    from metrics import fid, kid, inception_score, density_coverage       on features and logits (N, d), (N, K)

The sections: SCORES, functions of features and logits; TOOLS; DATA, the real images; FEATURES, the networks that give
features; JUDGE, scores against a data set; REJECTION; STUDY, what watches a run; PLOT, logs and final scores; COMMAND
LINE. No script is imported here.

The features come from a small convnet that is trained on the data set itself. It learns to predict the labels. If an
image has no label, or all have the same, it learns to predict by how many quarter turns an image was rotated. With
--features inception they come from the Inception network of 2015, the one of published FIDs.

A small network's FID is on a scale of its own: compare order and ratios under one network (its hash is printed), never
with Inception FIDs. Everything after the network is computed in float64. The functions raise ValueError where there is
no answer: NaN, infinity, nothing to score, fewer rows than they need.
"""

# `uv run metrics.py` reads this block, installs the packages and runs the file. Without uv it is a comment.
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "numpy>=2", "pillow>=10.1"]
# ///

import argparse
import contextlib
import copy
import csv
import functools
import gzip
import hashlib
import heapq
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import fx, nn
from torch.nn import functional as F

try:
    import fcntl
except ImportError:  # Windows: no lock on a run's folder
    fcntl = None

# SCORES: pure functions of features and logits ------------------------------------------------------------------------
#
# Features are tables (N, d), a row for each image; logits are tables (N, K), a column for each class. Tensors, numpy
# arrays and nested lists will do. What is asked of them is checked, and a ValueError says what is wrong.


def checked(least, *tables):
    """Tables (N, d) of one width as float64 tensors.

    ValueError: no such table, fewer than `least` rows, NaN, or a number above 1e50."""
    tables = [t if torch.is_tensor(t) else of_numbers(t) for t in tables]
    tables = [t.cpu() if t.is_mps else t for t in tables]  # a Mac's GPU has no float64
    for t in tables:
        if t.is_complex() or t.dim() != 2 or t.shape[1] != tables[0].shape[1]:
            raise ValueError(f"tables (N, d) of one width d are needed, not {[tuple(np.shape(t)) for t in tables]}")
        if len(t) < least:
            raise ValueError(f"{len(t)} rows, where {least} or more are needed")
        if not (t.double().abs() <= 1e50).all():  # KID takes the sixth power
            raise ValueError("features or logits that are not finite, or above 1e50")
    return [t.double() for t in tables]


def check_count(name, value):
    """ValueError where a number of splits, subsets or neighbours is below 1."""
    if value < 1:
        raise ValueError(f"{name} is {value}, where 1 or more is needed")


def of_numbers(values):
    """An array or nested lists as a float64 tensor of its own: numpy's may be read-only, reversed or big-endian."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"tables of numbers are needed, not {type(values).__name__} of {array.dtype}")
    return torch.from_numpy(array.astype(np.float64))


def kl(p, q):
    """KL(p || q) in nats over the last dimension, with 0 log 0 = 0."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def inception_score(logits, splits=10):
    """exp(E KL(p(y|x) || p(y))), from 1 (worst) to K: Salimans et al. 2016 (1606.03498), section 4.

    logits (N, K) -> mean and population standard deviation over `splits` equal parts, taken in a fixed shuffle. A part
    of n images cannot score above n, so N / splits should be well above K. ValueError: fewer images than splits."""
    check_count("splits", splits)
    (logits,) = checked(splits, logits)
    n = len(logits)
    order = np.random.RandomState(2020).permutation(n)  # the seed and the cuts of torch-fidelity
    p = logits.softmax(1)[torch.from_numpy(order).to(logits.device)]
    scores = []
    for i in range(splits):
        part = p[i * n // splits : (i + 1) * n // splits]
        scores.append(kl(part, part.mean(0)).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def mode_score(logits_fake, logits_real):
    """Logits (N, K) of fakes and (M, K) of real images -> two floats: the score as printed, and as meant.

    p* is the mean of p(y|x) over the real images. As printed (Che et al. 2017, 1612.02136) the score is
    exp(E KL(p(y|x) || p*) - KL(p(y) || p*)). Here p* cancels: it is exactly the Inception Score of the whole set. As
    meant (Xu et al. 2018, 1806.07755) it is IS * exp(-KL(p(y) || p*)), which falls when classes are missing.

    An example of the second: K real classes are equally frequent, and G makes m of them, equally often and each beyond
    doubt. Then it is m^2 / K."""
    logits_fake, logits_real = checked(1, logits_fake, logits_real)
    p = logits_fake.softmax(1)
    p_fake = p.mean(0)
    p_real = logits_real.softmax(1).mean(0)
    printed = kl(p, p_fake).mean().exp()  # with p*, as it is printed, it could be infinity - infinity
    meant = (kl(p, p_fake).mean() - kl(p_fake, p_real)).exp()
    return printed.item(), meant.item()


def fid(x, y):
    """The Frechet distance of features (N, d) and (M, d). It is biased upwards by O(1/N): use equal N.

    With fewer images than dimensions the trace is the nuclear norm of the centred product (N, M). This is exact, and
    no (d, d) matrix is made. ValueError: fewer than two rows."""
    x, y = checked(2, x, y)
    if max(len(x), len(y)) >= x.shape[1]:
        return frechet_distance(*mean_and_covariance(x), *mean_and_covariance(y))
    a = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    b = (y - y.mean(0)) / math.sqrt(len(y) - 1)
    trace = torch.linalg.svdvals(a @ b.T).sum()
    traces = a.square().sum() + b.square().sum()
    between_means = (x.mean(0) - y.mean(0)).square().sum()
    return clamp_rounding(between_means + traces - 2 * trace, traces)


def mean_and_covariance(x):
    """Features (N, d) -> mean (d,) and covariance (d, d) in float64, divided by N - 1 as np.cov does."""
    (x,) = checked(2, x)
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / (len(x) - 1)


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al. 2017 (1706.08500), section 4.

    (C1 C2)^(1/2) has the trace of (L' C2 L)^(1/2) for any L with L L' = C1. That matrix is symmetric, so its
    eigenvalues are real. Cholesky's L is the cheapest. Where C1 is singular, L comes from its singular values.

    Means (d,) and covariances (d, d), tensors or arrays -> a float, 0 or more. ValueError: a number that is not finite,
    or above 1e110."""
    mean1, cov1, mean2, cov2 = (torch.as_tensor(t).double() for t in (mean1, cov1, mean2, cov2))
    if not all((t.abs() <= 1e110).all() for t in (mean1, cov1, mean2, cov2)):
        raise ValueError("means or covariances that are not finite, or above 1e110")
    root, singular = torch.linalg.cholesky_ex(cov1)
    if singular:
        # By singular values: eigh does not converge for some matrices of nearly rank 1, such as those of a collapsed G.
        vectors, values, _ = torch.linalg.svd(cov1)
        root = vectors * values.sqrt()
    product = root.T @ cov2 @ root
    try:
        values = torch.linalg.eigvalsh(product)
    except torch.linalg.LinAlgError:
        values = torch.linalg.svdvals(product)  # the same numbers, as none is negative
    trace = values.clamp(min=0).sqrt().sum()
    between_means = (mean1 - mean2).square().sum()
    distance = between_means + cov1.trace() + cov2.trace() - 2 * trace
    return clamp_rounding(distance, cov1.trace() + cov2.trace())


def clamp_rounding(distance, scale):
    """Rounding can leave a distance just below 0; more than that is an error and must be seen."""
    if distance < -1e-5 * scale - 1e-12:
        raise ArithmeticError(f"a squared distance of {distance.item()}")
    return max(distance.item(), 0.0)


class Moments:
    """Mean and covariance of features that come in batches (B, d), in float64.

    Fewer than d rows are kept as they are, for fid's exact form. From then on only sums and products about a first
    estimate of the mean are kept, (d, d)."""

    def __init__(self):
        self.n = 0
        self.rows = []
        self.shift = None

    def add(self, x):
        (x,) = checked(0, x)
        self.n += len(x)
        self.rows.append(x)
        if self.n >= x.shape[1]:
            x = torch.cat(self.rows)
            if self.shift is None:
                self.shift = x.mean(0)
                self.sum = torch.zeros_like(x[0])
                self.products = x.new_zeros(x.shape[1], x.shape[1])
            x = x - self.shift
            self.sum += x.sum(0)
            self.products.addmm_(x.T, x)
            self.rows = []

    def mean_and_covariance(self):
        if self.shift is None:
            return mean_and_covariance(torch.cat(self.rows))
        cov = (self.products - torch.outer(self.sum, self.sum) / self.n) / (self.n - 1)
        return self.shift + self.sum / self.n, cov

    def fid(self, other):
        """As fid() of all the features."""
        if self.shift is None and other.shift is None:
            return fid(torch.cat(self.rows), torch.cat(other.rows))
        return frechet_distance(*self.mean_and_covariance(), *other.mean_and_covariance())


def kid(real, fake, subsets=100, size=1000):
    """Kernel Inception Distance, Binkowski et al. 2018 (1801.01401), section 4.

    Features (N, d) and (M, d) -> mean and standard deviation, over `subsets` subsets of `size` rows, of the unbiased
    squared MMD under the kernel (x'y / d + 1)^3. If both distributions are equal it is 0 on average at any size, so it
    may fall below 0. Subsets have at most half the rows: as large as the whole they would all be the same, and their
    spread 0. ValueError: fewer than four rows, or no subset."""
    check_count("subsets", subsets)
    real, fake = checked(4, real, fake)
    size = min(size, len(real) // 2, len(fake) // 2)
    if size < 2:
        raise ValueError(f"subsets of {size}: a kernel distance needs two rows or more")
    d = real.shape[1]
    rng = np.random.RandomState(2020)  # the seed and the draws of torch-fidelity
    values = []
    for _ in range(subsets):
        y = drawn(fake, size, rng)
        x = drawn(real, size, rng)
        within = 0
        for t in (x, y):  # the kernel of all pairs of different rows
            all_pairs = ((t @ t.T / d + 1) ** 3).sum()
            with_itself = ((t.square().sum(1) / d + 1) ** 3).sum()
            within = within + (all_pairs - with_itself)
        across = ((x @ y.T / d + 1) ** 3).mean()
        values.append(within / (size * (size - 1)) - 2 * across)
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


def drawn(table, n, rng):
    """n different rows of a table."""
    return table[torch.from_numpy(rng.choice(len(table), n, replace=False)).to(table.device)]


# The scores below ask which points lie near which. A matrix product finds candidates five times faster than measuring
# each pair, and what it finds is measured directly. The product alone is off by 1e-8 of the features' size, which would
# lose duplicates and ties. So the features are taken about their mean.


def nearness(x, y, y2):
    """Parts (B, d) of x (N, d), each with |x - y|^2 - |x|^2 (B, M), for y (M, d) of squares y2 (M,).

    For one x this orders the y by distance. Each part's matrix takes the place of the one before, because fresh memory
    would cost as much as the product."""
    out = x.new_empty(max(1, min(len(x), 2_000_000 // len(y))), len(y))
    for part in x.split(len(out)):
        yield part, torch.addmm(y2, part, y.T, alpha=-2, out=out[: len(part)])


def measured(x, y):
    """|x - y| over the last dimension, exact for duplicates."""
    return (x - y).square().sum(-1).sqrt()


def ball_radius(x, k):
    """The distance (N,) from each of x (N, d) to its k-th neighbour, itself not counted.

    ValueError: k rows or fewer, or k below 1."""
    check_count("k", k)
    (x,) = checked(k + 1, x)
    x = x - x.mean(0)
    radii = []
    for part, near in nearness(x, x, x.square().sum(1)):
        index = near.topk(k + 1, largest=False).indices
        for points, candidates in zip(part.split(100), index.split(100)):
            distances = measured(points[:, None], x[candidates])
            radii.append(distances.sort(1).values[:, k])
    return torch.cat(radii)


def one_for_each(points, radius):
    """The radii (N,) of N points, as a tensor. ValueError: more or fewer, or not finite."""
    radius = radius if torch.is_tensor(radius) else of_numbers(radius)
    if radius.dim() != 1 or len(radius) != len(points):
        raise ValueError(f"a tensor {tuple(radius.shape)} of radii for {len(points)} points")
    checked(0, radius[:, None])
    return radius


def coverage(real, fake, k=5, radius=None):
    """The share of real points whose ball, as wide as the distance to the k-th other real point, holds a fake one.

    Naeem et al. 2020 (2002.09797), eq. (8), the inequality strict as in their code. Features (N, d) and (M, d);
    `radius` (N,) if already known. If both distributions and sizes are equal it is 1 - 2^-k: .969 at k = 5."""
    radius = ball_radius(real, k) if radius is None else radius
    x, y = checked(1, real, fake)
    radius = one_for_each(x, radius)
    centre = x.mean(0)
    x = x - centre
    y = y - centre
    nearest = torch.cat([near.argmin(1) for _, near in nearness(x, y, y.square().sum(1))])
    return (measured(x, y[nearest]) < radius).double().mean().item()


def inside(points, centres, radius, closed):
    """Is point i in ball j? Blocks (B, M) of the whole table, in order. With `closed` the rim belongs to the ball."""
    points, centres = checked(1, points, centres)
    radius = one_for_each(centres, radius)
    middle = centres.mean(0)
    points = points - middle
    centres = centres - middle
    size2 = centres.square().sum(1)
    slack = 1e-13 * (size2.max() + points.square().sum(1).max())  # the product's rounding, with room to spare
    for part, excess in nearness(points, centres, size2 - radius.square()):
        excess += part.square().sum(1, keepdim=True)
        result = excess < 0
        close_calls = (excess.abs_() <= slack).nonzero(as_tuple=True)  # too near the rim for the product to decide
        for i, j in zip(*(t.split(10_000) for t in close_calls)):
            d = measured(part[i], centres[j])
            result[i, j] = d <= radius[j] if closed else d < radius[j]
        yield result


def share_inside(points, centres, radius):
    """The share of points within any of the closed balls."""
    return torch.cat([block.any(1) for block in inside(points, centres, radius, True)]).double().mean().item()


def precision_recall(real, fake, k=3, radii=None):
    """Kynkaanniemi et al. 2019 (1904.06991), eq. (1) and (2), of features (N, d) and (M, d).

    Precision is the share of fakes within any real image's ball, as wide as the distance to its k-th neighbour; recall
    the share of real images within any fake's. `radii` (N,) and (M,) if already known. One real outlier's ball can hold
    all fakes: see density."""
    if radii is None:
        radii = ball_radius(real, k), ball_radius(fake, k)
    radius_real, radius_fake = radii
    return share_inside(fake, real, radius_real), share_inside(real, fake, radius_fake)


def density_coverage(real, fake, k=5, radius=None):
    """Naeem et al. 2020 (2002.09797), eq. (7) and (8), of features (N, d) and (M, d).

    Density is the number of real balls around a fake, over k, on average: 1 if both distributions are equal, more where
    fakes crowd. Coverage is that of coverage()."""
    check_count("k", k)
    radius = ball_radius(real, k) if radius is None else radius
    count = sum(block.sum().item() for block in inside(fake, real, radius, False))
    return count / (k * len(fake)), coverage(real, fake, k, radius)


# TOOLS ----------------------------------------------------------------------------------------------------------------

# torchrun sets both: how many processes there are, one a GPU, and the number of this one. Rank 0 alone prints, scores
# and writes.
WORLD = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0

# Random streams. seeded(args.seed, STREAM, ...) gives each use numbers of its own, so that one never shifts another.
ORDER = 0  # of the training images in an epoch
SHEETS = 1
SCORING = 2  # during the training
LAST = 3  # the scores at its end
INTERPOLATION = 4
TRAVERSAL = 5
GENERATED = 6  # --generate
HELD_OUT = 7  # --holdout
CHOICE = 8  # --reject
BETWEEN_CLASSES = 9
PROBE = 10  # bigan.py
MIRROR = 11  # --flip
ASKED = 12  # labels that a conditional generator is asked for
RANKS = 13  # the noise of training, under torchrun


def open_standard_streams():
    """Reopens standard streams that `>&-` or `2>&-` closed, onto the null device.

    Otherwise the next file to be opened, such as last.pt, would get the number of a standard stream, and what a library
    written in C prints would land in it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


open_standard_streams()

WINDOWS = os.name == "nt"
if WINDOWS:
    os.system("")  # from here on its older console obeys control codes, such as that which clears a line


def one_line(text):
    """The text on one line. Control characters, such as ESC in a file's name, are escaped, so that no terminal obeys
    them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(text).split()))


def fail(message):
    """Ends the program for a user's mistake: one line on stderr, exit code 2, no traceback."""
    put(sys.stderr, f"{fresh_line()}{Path(sys.argv[0]).name}: error: {one_line(message)}\n")
    raise SystemExit(2)


@contextlib.contextmanager
def or_fail(message, kinds=Exception):
    """fail(message) if the lines inside raise one of `kinds`. For lines whose exceptions are a user's mistake."""
    try:
        yield
    except kinds as e:
        reason = one_line(e)
        if len(reason) > 300:  # PyTorch names each weight of a network that does not fit
            reason = f"{reason[:300]} ..."
        fail(f"{message} ({type(e).__name__}: {reason})")


@contextlib.contextmanager
def or_warn(message, kinds=OSError):
    """If the lines inside raise one of `kinds`, prints a warning and goes on."""
    try:
        yield
    except kinds as e:
        warn(f"{message} ({type(e).__name__}: {e})")


def put(stream, text):
    """Writes to sys.stdout or sys.stderr. These may be None, closed, full, or lack a letter: the program goes on."""
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:  # nobody reads any more: what is still to come goes nowhere, in silence
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    except (OSError, ValueError, AttributeError):
        pass


@contextlib.contextmanager
def removed_if_it_fails(folder):
    """If the lines inside raise, removes what they put into `folder`, and the folders that they made."""
    new = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        yield
    except FileExistsError:  # another process was there first: it is not ours
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if folder not in new:  # it was there before, empty
            folder.mkdir(exist_ok=True)
        for f in new[1:]:
            with contextlib.suppress(OSError):  # not empty
                f.rmdir()
        raise


def is_terminal(stream):
    with contextlib.suppress(ValueError, AttributeError):  # closed, or None
        return stream.isatty()
    return False


def say(text, redraw=False):
    """Prints a line on stdout, from rank 0. On a terminal the next line replaces one with `redraw`."""
    if RANK:
        return
    if not is_terminal(sys.stdout):
        put(sys.stdout, f"{text}\n")
    elif redraw:
        put(sys.stdout, "\r\033[K" + text[: shutil.get_terminal_size().columns - 1])
    else:
        put(sys.stdout, f"\r\033[K{text}\n")


def warn(text):
    """Prints a line on stderr, from rank 0."""
    if not RANK:
        put(sys.stderr, f"{fresh_line()}{one_line(text)}\n")


def fresh_line():
    """On a terminal the control codes that clear the line, on which a progress line may stand; elsewhere nothing."""
    return "\r\033[K" if is_terminal(sys.stderr) else ""


@functools.cache
def warn_once(text):
    """A run reads its training images twice, to train and to score."""
    warn(text)


def progress(batches, total, what):
    """The batches. On rank 0 a line on stderr says how far they are: kept fresh on a terminal, every 10 s elsewhere."""
    live = is_terminal(sys.stderr)
    start = said = time.perf_counter()  # time.time() jumps where somebody sets the clock
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        now = time.perf_counter()
        if RANK == 0 and now - said > (0.5 if live else 10):
            text = one_line(f"{what}: {done} of {total}, {(now - start) / done * (total - done):.0f} s to go")
            if live:  # no longer than a line of the terminal, as it could not be cleared
                put(sys.stderr, "\r\033[K" + text[: shutil.get_terminal_size().columns - 1])
            else:
                put(sys.stderr, f"{text}\n")
            said = now
    if live and said > start:
        put(sys.stderr, "\r\033[K")


def number(kind, low, high=2**40):
    """An argparse type: an int or a float in [low, high]. NaN and infinity are refused; 1e5 is a whole number."""

    def parse(text):
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        if kind(value) != value:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number")
        return kind(value)

    parse.__name__ = kind.__name__
    return parse


def file_name(text):
    """An argparse type: a name of a file or folder. A shell leaves the ~ of --run-dir=~/x as it is."""
    return os.path.expanduser(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """--help with "(default: ...)" where a default says something."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)

    def _fill_text(self, text, width, indent):
        """Whole flags: argparse would break --penalty-share after its second hyphen."""
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def seeded(*key):
    """A CPU generator that is a pure function of whole numbers: the run's seed, a stream, and what else tells it apart.

    They are hashed, because torch keeps only 32 bits of a seed. Zeros at the end do not tell two keys apart."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def sample_z(args, n, device, generator=None):
    """z (n, latent_dim) from the prior: N(0, I), or uniform on [-1, 1]."""
    shape = (n, args.latent_dim)
    if args.prior == "normal":
        return torch.randn(shape, device=device, generator=generator)
    return torch.rand(shape, device=device, generator=generator) * 2 - 1


def from_rank_0(value=None):
    """What rank 0 passes. The others wait for it."""
    box = [value]
    if WORLD > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def rank_0_first():
    """Under torchrun rank 0 runs the lines inside first, then the others do."""
    if RANK != 0:
        from_rank_0()  # waits until rank 0 comes to its own call, below
    yield
    if RANK == 0:
        from_rank_0()


def leave_ranks():
    """Under torchrun: leaves the other ranks, when all of them do. After an error it is not called: it would wait for
    the others, and they for this rank. torchrun ends them as soon as this process has ended."""
    if WORLD > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def write_whole(path, write):
    """replace_file(path, write). Ends the program with one line where the disk refuses."""
    with or_fail(f"{path} cannot be written"):
        replace_file(path, write)


def replace_file(path, write, apart=""):
    """write(file), to a temporary file beside `path` that then takes its place: a kill leaves the old file whole.

    `apart` tells several writers' temporary files apart. OSError where the disk refuses; nothing is left then."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}{apart}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def put_in_place(temporary, path):
    """os.replace(). Windows refuses it while a virus scanner or an indexer reads the old file: there it tries again."""
    if WINDOWS:
        for seconds in (0.1, 0.3, 1.0):
            try:
                return os.replace(temporary, path)
            except PermissionError:
                time.sleep(seconds)
    os.replace(temporary, path)


def save_tensors(value, file):
    """torch.save by way of memory. On a full disk torch.save itself raises RuntimeError, and this OSError."""
    whole = io.BytesIO()
    torch.save(value, whole)
    file.write(whole.getbuffer())


def append(path, data):
    """Adds bytes to the end of a file, all or none. OSError where the disk refuses."""
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        if file.write(data) < len(data):
            file.truncate(size)
            raise OSError(f"the disk is full: {path}")


def read_csv(path):
    """The rows of a CSV file as dicts of texts, also as a spreadsheet saves it: with a byte order mark, quotes,
    semicolons and decimal commas, or tabs. OSError; ValueError: text of another kind."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8-sig").splitlines():
        if ";" in line:
            separator = ";"
        elif "\t" in line:
            separator = "\t"
        else:
            separator = ","
        try:
            cells = [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
        except csv.Error as e:
            raise ValueError(f"{path} is no table: {e}") from None
        if separator != ",":
            cells = [cell.replace(",", ".") for cell in cells]
        if any(cells):
            rows.append(cells)
    if not rows:
        return []
    header = rows[0]
    return [dict(itertools.zip_longest(header, row[: len(header)], fillvalue="")) for row in rows[1:]]


def contents(folder):
    """What lies in a folder, [] if there is none, but for what file managers put there by themselves."""
    return [path for path in Path(folder).glob("*") if path.name not in (".DS_Store", "desktop.ini", "Thumbs.db")]


def cache_folders(folder):
    """Where to keep what takes long to compute: `folder` first, then the user's cache folder, then the folder for
    temporary files."""
    folder = Path(folder).resolve()
    own = "gan-" + hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    homes = [os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")]
    with contextlib.suppress(OSError):  # nothing can be written, not even in the folder for temporary files
        homes.append(tempfile.gettempdir())
    return [folder, *[Path(home, own) for home in homes if os.path.isabs(home)]]  # "~" stays where a user has no home


def cache_home(dataset, data_dir):
    """The folder for the networks that score and for their statistics: --data-dir. For a folder of images it is the
    parent folder, so that no file lands among the images."""
    return Path(data_dir).resolve().parent if dataset == "folder" else Path(data_dir)


def remove_old(home, name, old):
    """Removes the files in `home` whose names match the regular expression `old`, except `name`. Removes what a killed
    process left half written, too."""
    for path in home.iterdir():
        half_written = re.fullmatch(rf"{old}\.\d+\.tmp", path.name)
        # Another process may be writing it now. After a day without a change it is what a killed one left.
        if half_written and time.time() - path.stat().st_mtime > 86_400:
            path.unlink()
        if path.name != name and re.fullmatch(old, path.name):
            path.unlink()


def keep(folder, name, write, say=None, old=None):
    """Calls write(file) for the file `name` in the first of cache_folders(folder) that can be written.

    Older files there, whose names match the regular expression `old`, are removed. If no folder can be written, it says
    so and goes on."""
    for home in cache_folders(folder):
        try:
            home.mkdir(parents=True, exist_ok=True)
            replace_file(home / name, write, f".{os.getpid()}")
            if old:
                with contextlib.suppress(OSError):  # the new file is there: an old one may stay
                    remove_old(home, name, old)
            return
        except OSError as e:
            reason = e
    (say or warn_once)(f"not kept for the next run: {name} ({reason})")


def sheet_of(x, columns=8):
    """Images uint8 (N, C, H, W) as one (C, H, W), row by row, two white pixels between them. One stays as it is."""
    sheet = torchvision.utils.make_grid(x.cpu(), columns, padding=2, pad_value=255)
    return sheet[: x.shape[1]]  # grey comes back RGB


def save_sheet(x, path, columns=8):
    """sheet_of(x) as a PNG. OSError where the disk refuses; no part of a file is left then."""
    sheet = sheet_of(x, columns)
    file = io.BytesIO()
    Image.fromarray(sheet.permute(1, 2, 0).squeeze(2).contiguous().numpy()).save(file, "PNG")
    try:
        Path(path).write_bytes(file.getbuffer())
    except OSError:
        with contextlib.suppress(OSError):
            if os.access(path, os.W_OK):  # a file that may not be written stays as it is
                Path(path).unlink()
        raise


# DATA: real images ----------------------------------------------------------------------------------------------------

CHANNELS = {"digits": 1, "mnist": 1, "fashion": 1, "cifar10": 3, "celeba": 3, "folder": 3, "stacked_mnist": 3}
TORCHVISION = {  # the class in torchvision.datasets, and the folder where it looks for its files
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "celeba": ("CelebA", "celeba"),
}


def load_data(dataset, data_dir, size, split):
    """The "train" or "test" images of a data set.

    Returns images uint8 (N, C, size, size), labels int64 (N,), -1 where there are none, and the classes' names in the
    order of the labels, [] without labels. C is that of CHANNELS, but 1 for a folder in which all pictures are grey.
    Ends the program with one line where there are no usable files."""
    x, y, names = read_data(dataset, Path(data_dir), size, split)
    channels = x.shape[1] if dataset == "folder" else CHANNELS[dataset]  # a folder's may all be grey
    wanted = (len(x), channels, size, size)
    if x.dtype != torch.uint8 or x.shape != wanted or y.shape != (len(x),):  # a data set of your own
        found = f"{x.dtype} {tuple(x.shape)} and labels {tuple(y.shape)}"
        fail(f"--dataset {dataset}: images {found}; they have to be torch.uint8 {wanted} and {(len(x),)}")
    return x, y, names


def read_data(dataset, root, size, split):
    """load_data() without its checks."""
    if dataset == "folder":
        return read_folder(root, size, split)
    if dataset == "celeba":
        names = from_torchvision("celeba", root, split=split).filename
        folder = root / "celeba" / "img_align_celeba"
        facts, _ = list_images(folder)
        files = {"train": [], "test": []} | {split: [(name, *facts.get(name, (0, 0))) for name in names]}
        x, good = read_images(folder, size, split, files)
        return x, torch.full((len(good),), -1), []
    if dataset == "digits":
        x, y = render_digits(20_000, 1) if split == "train" else render_digits(10_000, 2)
        return resized(x, size), y, list("0123456789")
    data = from_torchvision(dataset.removeprefix("stacked_"), root, train=split == "train")
    x = torch.as_tensor(data.data)
    y = torch.as_tensor(data.targets).long()
    names = getattr(data, "classes", None) or [str(i) for i in range(int(y.max()) + 1)]  # some sets have no names
    names = [name.split(" - ")[0] for name in names]  # MNIST's are "0 - zero"
    x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)
    if dataset == "stacked_mnist":
        x, y = stack_digits(x, y, 128_000, 3) if split == "train" else stack_digits(x, y, 26_000, 4)
        names = [f"{i:03}" for i in range(1000)]
    return resized(x, size), y, names


def from_torchvision(dataset, root, **part):
    """torchvision's data set, the `part` asked for (train=, split=). Files below `root` are used, others downloaded."""
    kind, place = TORCHVISION[dataset]
    new_folders = [d for d in (root / place, *(root / place).parents) if not d.exists()]
    source = getattr(torchvision.datasets, kind)
    try:
        unpacked = unpacked_mnist(root / place, part["train"]) if place.endswith("raw") else None
        if unpacked:
            return argparse.Namespace(data=unpacked[0], targets=unpacked[1], classes=source.classes)
        return source(str(root), download=True, **part)
    except TypeError as e:  # SVHN and EMNIST take split= in place of train=
        fail(f"--dataset {dataset}: {e}. Write its images to a folder and take --dataset folder")
    except Exception as e:  # no network, a damaged or cut file: torchvision raises a different kind for each
        for folder in new_folders:
            with contextlib.suppress(OSError):  # not there, or not empty
                folder.rmdir()
        fail(
            f"--dataset {dataset}: no usable files in {root / place} and no download ({e}). Offline: put torchvision's "
            f"{kind} there, name a folder that has it by --data-dir, or use --dataset digits"
        )


def unpacked_mnist(folder, train):
    """MNIST's images and labels from files that torchvision would not find: named train-images.idx3-ubyte, gzipped, or
    beside the folder raw/.

    None where there are none, or where a download was cut short. ValueError: another file was."""
    arrays = []
    for kind in ("images?idx3-ubyte*", "labels?idx1-ubyte*"):
        pattern = ("train-" if train else "t10k-") + kind
        found = [*sorted(folder.glob(pattern)), *sorted(folder.parent.glob(pattern))]
        files = [path for path in found if path.is_file()]
        if not files:
            return None
        data = files[0].read_bytes()
        if data[:2] == b"\x1f\x8b":
            try:
                data = gzip.decompress(data)
            except (EOFError, OSError, zlib.error):  # a download cut short: torchvision fetches it again
                return None
        if len(data) < 4:  # cut short within its header
            return None
        try:
            shape = np.frombuffer(data, ">i4", data[3], 4)  # the fourth byte is the number of dimensions
            arrays.append(np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())
        except ValueError as e:
            raise ValueError(f"{files[0]} is damaged: {e}") from None
    return arrays


def file_identity(path, facts):
    """What is the same for all names of one file or folder: its numbers in `facts`, which os.stat gave.

    Some network drives number nothing. There it is the path without links."""
    return (facts.st_dev, facts.st_ino) if facts.st_ino else os.path.realpath(path)


def list_images(root):
    """The image files below `root` as {path relative to it: (bytes, date)}, and a Counter of what else lies there.

    An image file is one whose suffix this Pillow, with its plugins, can open. Links are followed, but every file counts
    once, under a path without links if it has one. Hidden files and folders (a leading dot) and the folders of runs are
    left out."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    above = set()
    for parent in root.resolve().parents:
        with contextlib.suppress(OSError):  # the root of a network drive may be out of bounds
            above.add(file_identity(parent, os.stat(parent)))
    seen = set()
    best_name = {}  # file: (by a link?, path)
    size_and_date = {}  # file: (bytes, date)
    left_out = Counter()
    todo = [(False, "")]  # (by a link?, folder): those by links come last, when all others have been seen
    while todo:
        linked, folder = heapq.heappop(todo)
        try:
            folder_facts = os.stat(root / folder)
            entries = list(os.scandir(root / folder))
        except OSError:
            left_out["folder that cannot be listed"] += 1
            continue
        place = file_identity(root / folder, folder_facts)
        if folder and {"args.json", "samples"} <= {entry.name for entry in entries}:
            left_out["folder of a run"] += 1  # its own sheets and curves would become training images
            continue
        if place in above:
            left_out["link to a folder around this one"] += 1
        if place in above or place in seen:
            continue
        seen.add(place)
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            by_link = linked or entry.is_symlink()
            path = folder + entry.name
            if entry.name.startswith("."):
                left_out["hidden"] += 1
                continue
            try:
                facts = os.stat(entry.path)
            except OSError:
                left_out["link to nothing" if entry.is_symlink() else "file that cannot be examined"] += 1
                continue
            if stat.S_ISDIR(facts.st_mode):
                heapq.heappush(todo, (by_link, f"{path}/"))
            elif not stat.S_ISREG(facts.st_mode):
                left_out["pipe, socket or device"] += 1
            elif suffix not in suffixes:
                left_out[suffix or "no suffix"] += 1
            else:
                file = file_identity(entry.path, facts)
                name = (by_link, path)  # names without links sort first
                best_name[file] = min(name, best_name.get(file, name))
                size_and_date[file] = (facts.st_size, facts.st_mtime_ns)
    images = {path: size_and_date[file] for file, (_, path) in best_name.items()}
    return images, left_out


TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")


def split_images(paths):
    """{"train": paths, "test": paths} of list_images, and how many folders lie above those of the classes.

    The folders train/ (or training/) and test/ (or testing/, val/, valid/, validation/), in any case, are the split;
    else every tenth file is for testing. The order is that of the names' hashes, so that any first n of them are a
    sample. A folder that holds all others is no class."""
    paths = sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())
    folders = {path: path.lower().split("/")[:-1] for path in paths}  # those above each file
    chains = list(folders.values())
    depth = 0
    while chains and min(map(len, chains)) > depth and len({chain[depth] for chain in chains}) == 1:
        holds_the_files = max(map(len, chains)) == depth + 1
        if holds_the_files and chains[0][depth] not in TRAIN_FOLDERS:
            break  # one class
        depth += 1
    tops = {chain[depth] for chain in chains if len(chain) > depth}
    train = next((name for name in TRAIN_FOLDERS if name in tops), None)
    test = next((name for name in TEST_FOLDERS if name in tops), None)

    def files_in(name):
        return [path for path in paths if folders[path][depth : depth + 1] == [name]]

    if train and test:
        return {"train": files_in(train), "test": files_in(test)}, depth + 1
    tenth = set(paths[9::10] or paths[-1:])
    parts = {
        "train": [path for path in paths if path not in tenth],
        "test": [path for path in paths if path in tenth],
    }
    return parts, depth


def read_folder(root, size, split):
    """load_data of a folder of images. Its sub-folders are the classes; those with training images come first."""
    with or_fail(f"--dataset folder: --data-dir {root}"):  # no permission, or too long a name
        is_folder, is_there = root.is_dir(), root.exists()
    if not is_folder:
        kind = "a file: unpack it, and name the folder" if is_there else "no such folder"
        fail(f"--dataset folder: --data-dir {root}: {kind}")
    found, left_out = list_images(root)
    parts, depth = split_images(found)
    beside = len(found) - len(parts["train"]) - len(parts["test"])
    if beside:
        left_out["in folders beside train and test"] = beside
    about_files = []
    if left_out:
        about_files.append(f"left out: {', '.join(f'{what} ({n})' for what, n in left_out.most_common(9))}")
    if not parts["train"]:
        few = f"{len(found)} images in {root}, where one to train and one to test are needed"
        fail("; ".join([f"--dataset folder: {few}", *about_files]))
    paths = [*parts["train"], *parts["test"]]
    class_of = {path: path.split("/")[depth] for path in paths if path.count("/") > depth}
    counts = Counter(class_of[path] for path in parts["train"] if path in class_of)
    names = sorted(counts)
    names += sorted(set(class_of.values()) - counts.keys())
    outside = [path for path in paths if path not in class_of]
    about_classes = []
    if names:
        shown = ", ".join(f"{name} ({counts[name]})" for name in names[:20])
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        about_classes.append(f"classes: {shown}{more}")
    if names and outside:
        about_classes.append(f"without a label, as in no sub-folder: {len(outside)}, such as {outside[0]}")
    sizes = f"{root}: {len(parts['train'])} images to train, {len(parts['test'])} to test"
    warn_once("; ".join([sizes, *about_classes, *about_files]))
    files = {}
    for part, part_paths in parts.items():
        files[part] = [(path, *found[path]) for path in part_paths]
    x, good = read_images(root, size, split, files)
    other = "test" if split == "train" else "train"
    if all_grey(x) and all_grey(read_images(root, size, other, files)[0]):
        x = x[:, :1].clone()  # a view would keep all three channels in memory
    index = {name: i for i, name in enumerate(names)}
    labels = [index.get(class_of.get(path), -1) for path in parts[split]]
    return x, torch.tensor(labels)[good], names


def read_images(root, size, split, files):
    """The images uint8 (N, 3, size, size) of files[split], a list of (path below root, bytes, date), and the indexes of
    those that can be read.

    Decoded once, by threads, and kept as one .npz, whose name changes with the files and with `size`."""
    name = f"{root.resolve().name}-{size}-{split}"
    watched = files if split == "test" else files["train"]  # for what is said of copies
    key = hashlib.sha256(json.dumps([READER, size, watched]).encode()).hexdigest()[:12]
    for folder in cache_folders(root.resolve().parent):
        with contextlib.suppress(Exception), np.load(folder / f"{name}-{key}.npz") as kept:  # none, or a damaged one
            x, good, said = (kept[part] for part in ("x", "good", "said"))
            if str(said):
                warn_once(str(said))
            return torch.from_numpy(x), good
    paths = [root / path for path, *_ in files[split]]
    x = np.empty((len(paths), 3, size, size), np.uint8)
    bad = {}

    def decode(i):
        try:
            x[i] = read_image(paths[i], size=size)[0]
        except ValueError as e:
            bad[i] = str(e)

    if len(paths) >= 2000:
        warn(f"reading {len(paths)} {split} images of {root}, once: what becomes of them is kept")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # each holds one image of full size
        for part in progress(torch.arange(len(paths)).split(1000), len(paths), f"reading {root}"):
            list(pool.map(decode, part.tolist()))
    reasons = [bad[i] for i in sorted(bad)]
    if split == "train" and len(bad) == len(paths):
        fail(f"none of the {len(paths)} training images in {root} can be read: {reasons[0]}")
    facts = []
    if bad:
        facts.append(f"left out {len(bad)} of {len(paths)} files: {'; '.join(reasons[:3])}")
    copies = count_copies(root, files["test"], files["train"]) if split == "test" else 0
    if copies:
        facts.append(
            f"{copies} of {len(paths)} test images are also training images: scores come out slightly too good"
        )
    said = ". ".join(facts)
    if said:
        warn_once(said)
    good = np.array([i for i in range(len(paths)) if i not in bad], dtype=int)  # else an empty list makes floats
    x = x[good] if bad else x
    old = f"{re.escape(name)}-[0-9a-f]{{12}}\\.npz"
    keep(root.resolve().parent, f"{name}-{key}.npz", lambda file: np.savez(file, x=x, good=good, said=said), old=old)
    return torch.from_numpy(x), good


def all_grey(x):
    """Whether all images uint8 (N, 3, H, W) have the same values in their three channels."""
    return all((part == part[:, :1]).all() for part in x.split(1000))


def count_copies(root, files, others):
    """How many of the files have the bytes of one of the others."""
    sizes = {size for _, size, _ in files} & {size for _, size, _ in others}

    def digests(files):
        for path, size, _ in files:
            with contextlib.suppress(OSError):
                if size in sizes:
                    yield hashlib.sha256((root / path).read_bytes()).digest()

    known = set(digests(others))
    return sum(digest in known for digest in digests(files))


READER = 4  # changes when read_image does, so that what was kept is made anew


def read_image(path, channels=3, size=None):
    """An image file as uint8 (channels, H, W), and the kind of file by its content ("PNG").

    It is turned upright, and what is transparent becomes white. With `size` the middle square is resized to that side,
    with antialiasing. ValueError: a file that cannot be read, or whose numbers have no clear scale from black to white
    (see eight_bits)."""
    try:
        with Image.open(path) as image:
            kind = image.format
            if size:
                image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its side
            image = eight_bits(image)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            mode = "L" if channels == 1 else "RGB"
            if image.mode != mode:
                image = image.convert(mode)
            if size:
                image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            x = np.array(image)
    except Exception as e:  # Pillow raises a different kind for each kind of damage
        raise ValueError(f"{path} cannot be read: {e}") from None
    x = torch.from_numpy(x)
    return x[None] if channels == 1 else x.permute(2, 0, 1), kind


def eight_bits(image):
    """The image upright, with 8 bits a channel. ValueError: floats, 32-bit integers, and 16 bits of which only the
    lower 14 are used. These may be 12 or 14 bits kept as they are, and would come out much too dark."""
    # The file's own description of its pixels tells how many bits there were: of colours Pillow itself keeps the upper
    # 8 as it reads them. BGR;16 means another thing, 16 bits for all three colours together.
    grey_16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    colour_16 = not grey_16 and ";16" in str(image.tile).replace("BGR;16", "")
    if image.mode in ("I", "F") and not grey_16:
        raise ValueError(f"mode {image.mode}: no clear scale from black to white")
    with contextlib.suppress(Exception):  # a damaged description of a good picture: it stays as it lies
        ImageOps.exif_transpose(image, in_place=True)
    if grey_16:
        values = np.asarray(image)
        check_highest_bits(values.max() >= 2**14)
        if getattr(image, "tag_v2", {}).get(262) == 0:  # a TIFF in which 0 is white: with 8 bits Pillow turns it itself
            values = 65535 - values
        grey = Image.fromarray((values / 257).round().astype(np.uint8))
        if "transparency" in image.info:
            grey.putalpha(Image.fromarray((values != image.info["transparency"]) * np.uint8(255)))
        return grey
    if colour_16:
        check_highest_bits(np.array(image.convert("RGB")).max() >= 2**6)
        if "transparency" in image.info:
            image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    return image


def check_highest_bits(are_used):
    if not are_used:
        raise ValueError("16 bits, of which the highest two are not used: no clear scale from black to white")


def render_digits(n, seed):
    """n numerals uint8 (n, 1, 28, 28) with labels 0 to 9 in turn: Pillow's own font under random strokes and shapes."""
    bank = []
    for digit, stroke, blur in itertools.product("0123456789", (1, 2), (1.2, 1.8)):
        image = Image.new("L", (64, 64))
        font = ImageFont.load_default(54)
        ImageDraw.Draw(image).text((32, 32), digit, 255, font, anchor="mm", stroke_width=stroke)
        bank.append(torch.from_numpy(np.array(image.filter(ImageFilter.GaussianBlur(blur)))))
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 10
    variant = torch.randint(4, (n,), generator=rng)  # of a digit's four glyphs, which lie together in the bank
    glyphs = torch.stack(bank)[4 * y + variant][:, None]
    scale = torch.tensor([0.18, 0.2, 0.12, 0.1, 0.08, 0.08])  # +-10 degrees, shear .2, scales, shifts of a pixel
    # in float64, because float32 rounds some pixels differently on another CPU
    from_minus_1_to_1 = torch.rand(6, n, generator=rng).double() * 2 - 1
    angle, shear, sx, sy, tx, ty = from_minus_1_to_1 * scale[:, None]
    c, s = angle.cos(), angle.sin()
    theta = torch.stack([c * (1.05 + sx), shear - s, tx, s, c * (1.05 + sy), ty], 1).view(n, 2, 3)
    parts = []
    for glyph, part in zip(glyphs.split(1000), theta.split(1000)):  # all at once in float64 would take a gigabyte
        grid = F.affine_grid(part, [len(part), 1, 28, 28], align_corners=False)
        parts.append(F.grid_sample(glyph.double(), grid, align_corners=False).round().clamp(0, 255).byte())
    return torch.cat(parts), y


def stack_digits(x, y, n, seed):
    """n images (n, 3, H, W) of three random digits in red, green and blue; labels 0 to 999, red the hundreds."""
    i = torch.randint(len(x), (n, 3), generator=torch.Generator().manual_seed(seed))
    return x[i, 0], y[i] @ torch.tensor([100, 10, 1])


def resized(x, size):
    """uint8 (N, C, H, W) at another side. 28 becomes 32 by two pixels of zeros; all else by antialiased resizing."""
    if x.shape[-1] == 28 and size >= 32:
        x = F.pad(x, (2, 2, 2, 2))
    return torch.cat([torchvision.transforms.functional.resize(part, [size, size]) for part in x.split(1000)])


# FEATURES: a small convnet, trained here; or Inception ----------------------------------------------------------------


@contextlib.contextmanager
def exact():
    """float32 that is float32: no TF32 on CUDA, which would move features by 1e-3."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def in_batches(net, x, batch_size, device):
    """net's features and logits of uint8 images (N, C, H, W), `batch_size` at a time."""
    with exact():
        parts = [net(net.prepare(part.to(device))) for part in x.split(batch_size)]
    features, logits = zip(*parts)
    return torch.cat(features), torch.cat(logits)


def as_images(x, channels=()):
    """x, if it is uint8 (N, C, H, W), C one of `channels` if any are named. ValueError: floats, whose scale is unknown,
    and every other shape."""
    of_bytes = torch.is_tensor(x) and x.dtype == torch.uint8 and x.dim() == 4 and 0 not in x.shape[1:]
    if not of_bytes or (channels and x.shape[1] not in channels):
        kind = getattr(x, "dtype", type(x))
        raise ValueError(f"images are uint8 (N, C, H, W), C of {channels or 'any'}, not {kind} {tuple(np.shape(x))}")
    return x


class SmallNet(nn.Module):
    """What the two networks below share. forward(x) takes what prepare(x) gives, and returns features and logits.

    It judges the side it was trained at, if .side is set: what is pooled from another side looks different."""

    batch = 1000  # images that are read at a time
    side = None
    inside = 32  # pixels

    def prepare(self, x):
        """uint8 -> images of the side inside, in [0, 1].

        28x28 is padded to 32 as load_data pads it: MNIST at 28 and at 32 are one scale."""
        x = x.float() / 255
        if x.shape[-1] == 28:
            x = F.pad(x, (2, 2, 2, 2))
        return F.adaptive_avg_pool2d(x, self.inside) if x.shape[-1] != self.inside else x

    def embed(self, x):
        """uint8 (N, C, S, S) -> features (N, d), logits (N, K), in eval mode whatever mode it was in."""
        side = padded(as_images(x, [self.channels]).shape[-1])
        if self.side not in (None, side):
            raise ValueError(f"images of {side} pixels, where the network was trained on {self.side}")
        self.eval()
        device = self.head.weight.device
        # a CPU's caches hold the maps of 100: three times as fast
        return in_batches(self, x, 100 if device.type == "cpu" else 1000, device)


def padded(side):
    return 32 if side == 28 else side


class Classifier(SmallNet):
    """uint8 images (N, C, S, S) -> features (N, 128), logits (N, K). Inside, 32x32 images in [0, 1]."""

    width = 128

    def __init__(self, channels, classes):
        super().__init__()
        self.channels = channels
        layers = []
        for a, b in ((channels, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU())
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        features = self.body(x)
        return features, self.head(features)


def train_classifier(x, y, classes, device, epochs=None, say=print):
    """A Classifier of uint8 images (N, C, H, W) and labels (N,).

    AdamW under a one-cycle rate, images shifted by up to 2 pixels, 180,000 images in all (3 to 20 epochs); weights
    rounded to half precision, in which they are kept. Draws from no stream of the caller's."""
    epochs = epochs or min(20, max(3, 180_000 // len(x)))
    with torch.random.fork_rng([]):  # the first weights are drawn on the CPU, nothing else is
        torch.default_generator.manual_seed(0)
        net = Classifier(x.shape[1], classes).to(device, memory_format=torch.channels_last)
    rng = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    size = min(100, len(x))
    opt = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=epochs * (len(x) // size))
    net.train()
    for epoch in range(epochs):
        for index in torch.randperm(len(x), generator=rng)[: len(x) // size * size].split(size):
            shift = torch.randint(-2, 3, (2,), generator=rng).tolist()
            batch = net.prepare(x[index].to(device)).roll(shift, (2, 3))
            loss = F.cross_entropy(net(batch)[1], y[index].to(device))
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
        if (epoch + 1) % max(1, epochs // 3) == 0:
            say(f"the scores' network: epoch {epoch + 1} of {epochs}, {time.perf_counter() - start:.0f} s")
    return net.half().float().eval()


class RotationNet(SmallNet):
    """For images without labels: uint8 (N, C, S, S) -> features (N, 512), logits (N, 4) of the quarter turn.

    It learns by how many quarters an image was turned (Gidaris et al. 2018, 1803.07728). With aligned faces that task
    is too easy: a few coarse features solve it. So the images are augmented: cropped, in other colours, blurred and
    noisy (augmented_views).

    The features are the last maps, averaged over each quarter of the image. They are rotated to the principal axes of
    real images, the largest variance first, and divided by the standard deviations, so that all count alike: what a GAN
    gets wrong lies where real images vary least. Coverage, precision, recall and KID take all of them. FID takes the
    first 64, as its floor grows with the square of their number.

    Inside, images of 64 pixels, or of 32 if they are smaller than 64."""

    width = 64  # the number of features that FID takes

    def __init__(self, channels, side):
        super().__init__()
        self.channels = channels
        self.inside = 64 if side >= 64 else 32
        first = (4, 2, 1) if self.inside == 64 else (3, 1, 1)  # kernel, stride, padding
        layers = []
        for a, b, shape in ((channels, 24, first), (24, 48, (3, 2, 1)), (48, 96, (3, 2, 1)), (96, 128, (3, 2, 1))):
            layers += [nn.Conv2d(a, b, *shape, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.maps = nn.Sequential(*layers)  # (N, 128, 4, 4)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(2048, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU())
        self.head = nn.Linear(128, 4)
        self.register_buffer("axes", torch.eye(512))

    def forward(self, x):
        maps = self.maps(x.contiguous(memory_format=torch.channels_last))
        return F.adaptive_avg_pool2d(maps, 2).flatten(1) @ self.axes, self.head(self.body(maps))

    @torch.no_grad()
    def find_axes(self, x):
        """Sets the axes from real images uint8 (N, C, S, S): one for every 16 images, as few images show few axes."""
        self.axes.copy_(torch.eye(512))
        features = self.embed(x)[0].cpu().double()  # a Mac's GPU has no float64
        centred = features - features.mean(0)
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(x))  # in ascending order
        # What hardly varies is not blown up: half precision, in which the axes are kept, ends at 65504.
        least = (0.001 * variances.mean()).clamp(min=1e-8)
        self.axes.copy_((axes / (variances + least).sqrt()).flip(1))
        self.axes[:, max(8, len(x) // 16) :] = 0


def train_rotation_net(x, device, epochs=None, say=print):
    """A RotationNet of uint8 images (N, C, H, W).

    A step turns two views (augmented_views) of each of 128 images. AdamW under a one-cycle rate, 400 steps or 20
    epochs; weights rounded to half precision, in which they are kept. Draws from no stream of the caller's."""
    size = min(128, len(x))
    steps = min(400, (epochs or 20) * (len(x) // size))
    with torch.random.fork_rng([]):  # the first weights are drawn on the CPU, nothing else is
        torch.default_generator.manual_seed(0)
        net = RotationNet(x.shape[1], x.shape[-1]).to(device, memory_format=torch.channels_last)
    rng = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    opt = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps, cycle_momentum=False)
    net.train()
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < size:
            order = torch.randperm(len(x), generator=rng)
        index, order = order[:size], order[size:]
        views = augmented_views(net.prepare(x[index].to(device)), rng)
        quarters = (torch.arange(len(views), device=device) % len(index)) % 4
        loss = F.cross_entropy(net(turned(views, quarters))[1], quarters)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        if (step + 1) % max(1, steps // 4) == 0:
            say(f"the scores' network: step {step + 1} of {steps}, {time.perf_counter() - start:.0f} s")
    net = net.half().float().eval()
    net.find_axes(some(x, 10_000))
    net.axes.copy_(net.axes.half())
    return net


def augmented_views(x, rng):
    """Two views of each image x (N, C, S, S) in [0, 1], a little blurred and noisy: (2N, C, S, S)."""
    return blurred_and_noisy(torch.cat([shifted(x, rng), cropped(x, rng)]), rng)


def turned(x, quarters):
    """Images (N, C, S, S), each rotated by its number (N,) of quarter turns."""
    out = x.clone()
    for k in (1, 2, 3):
        out[quarters == k] = torch.rot90(x[quarters == k], k, (2, 3))
    return out


def uniform(low, high, x, rng):
    """Numbers (N, 1, 1, 1) for images x (N, C, S, S), drawn on the CPU."""
    return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=rng).to(x.device)


def shifted(x, rng):
    """Images moved by up to two pixels, all alike. Each is mirrored with probability 1/2."""
    side = x.shape[-1]
    dx, dy = torch.randint(0, 5, (2,), generator=rng).tolist()
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")[..., dy : dy + side, dx : dx + side]
    return torch.where(uniform(0, 1, x, rng) < 0.5, x.flip(3), x)


def cropped(x, rng):
    """Windows of half a side to a whole one, mirrored or not, enlarged again, in other colours."""
    zoom = uniform(0.5, 1, x, rng)
    centre = (uniform(-1, 1, x, rng) * (1 - zoom), uniform(-1, 1, x, rng) * (1 - zoom))
    mirror = torch.where(uniform(0, 1, x, rng) < 0.5, -1.0, 1.0)
    right = torch.cat([zoom * mirror, 0 * zoom, centre[0]], 3)
    down = torch.cat([0 * zoom, zoom, centre[1]], 3)
    grid = F.affine_grid(torch.cat([right, down], 2).squeeze(1), x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    mean = x.mean((1, 2, 3), keepdim=True)
    tint = torch.randn(len(x), x.shape[1], 1, 1, generator=rng).to(x.device) * uniform(0, 0.15, x, rng)
    return ((x - mean) * uniform(0.6, 1.4, x, rng) + mean + tint + uniform(-0.15, 0.15, x, rng)).clamp(0, 1)


def blurred_and_noisy(x, rng):
    """A little blur and noise on some images, so that the network cannot live on the finest texture alone."""
    small = int(x.shape[-1] * (0.5 + 0.4 * torch.rand(1, generator=rng).item()))
    soft = F.interpolate(x, (small, small), mode="bilinear", antialias=True)
    soft = F.interpolate(soft, x.shape[2:], mode="bilinear")
    x = x + uniform(-0.5, 1, x, rng).clamp(min=0) * (soft - x)
    noise = torch.randn(x.shape, generator=rng).to(x.device)
    return (x + uniform(-0.03, 0.05, x, rng).clamp(min=0) * noise).clamp(0, 1)


class Stacked(nn.Module):
    """A classifier of single grey digits on images of three, red, green and blue (stacked MNIST)."""

    labelled = True

    def __init__(self, one):
        super().__init__()
        self.one = one
        self.batch = one.batch
        self.accuracy = one.accuracy
        self.name = one.name.replace("/128", " on each of 3 channels/384")

    def embed(self, x):
        """uint8 (N, 3, H, W) -> features (N, 384), log-probabilities (N, 1000) of the triple, red the hundreds."""
        parts = [self.one.embed(x[:, c : c + 1]) for c in range(3)]
        r, g, b = (logits.log_softmax(1) for _, logits in parts)
        joint = r[:, :, None, None] + g[:, None, :, None] + b[:, None, None, :]
        return torch.cat([features for features, _ in parts], 1), joint.flatten(1)


JUDGES = Path(__file__).parent / "tests" / "judges"  # networks that come with the collection: one scale for everyone


@torch.random.fork_rng([])  # building a network draws its first weights: not from the caller's stream
def classifier(dataset, train, test, folder=None, device="cpu", epochs=None, say=print):
    """The network that scores images like these: `train` and `test` are (images uint8 (N, C, S, S), labels (N,)).

    It reads labels where there are two classes or more, else by how many quarters an image was turned. .name is
    "TASK-DATASET-SIDE/WIDTH HASH", .accuracy its share right on the test images, .labelled whether its logits are of
    labels. Looked for in `folder` (None: neither read nor kept), then beside metrics.py, under a name that changes with
    the training images; else trained, in two or three minutes of one core. stacked_mnist has the network of single
    digits, a channel at a time."""
    if dataset == "stacked_mnist" and train[1].min() >= 0:  # not a folder that is called so
        red = [(part[0][:, :1], part[1] // 100) for part in (train, test)]
        return Stacked(classifier("mnist", *red, folder, device, epochs, say))
    x, y = train[:2]
    x_test, y_test = (some(part, 10_000) for part in test[:2])
    if len(x_test) == 0:
        raise ValueError(f"{dataset}: there is no test image")
    key = image_key(x, y)
    test_key = image_key(x_test, y_test)
    side = padded(x.shape[-1])
    labelled = len(y.unique()) > 1 and bool(min(y.min(), y_test.min()) >= 0)
    if labelled:
        task = "classifier"
        classes = int(max(y.max(), y_test.max())) + 1
        empty = functools.partial(Classifier, x.shape[1], classes)
    else:
        task = "turns"
        empty = functools.partial(RotationNet, x.shape[1], x.shape[-1])
    name = f"{task}-{dataset}-{side}-{key}.pt"
    paths = [home / name for home in cache_folders(folder)] if folder else []
    net, saved = read_network([*paths, JUDGES / f"{dataset}.pt"], key, empty, say)
    trained = net is None
    if trained:
        if dataset in ("digits", "mnist", "cifar10") and not JUDGES.is_dir():
            say(f"{JUDGES} is not there: scores of {dataset} are on a scale of this machine's own")
        elif dataset == "digits" and side == 32:
            # Pillow brings FreeType, and another version of it renders some pixels in another way.
            say("these are not the numerals of tests/judges (another Pillow?): scores are on a scale of their own")
        say(f"training the network that scores: {task} of {dataset}, {len(x)} images; up to three minutes, once")
        if labelled:
            net = train_classifier(x, y, classes, torch.device(device), epochs, say)
        else:
            net = train_rotation_net(x, torch.device(device), epochs, say)
    if test_key in saved.get("tested", []):
        net.accuracy = saved["accuracy"]
    elif labelled:
        net.accuracy = (net.embed(x_test)[1].argmax(1).cpu() == y_test).double().mean().item()
    else:
        net.accuracy = rotation_accuracy(net, x_test)
    if trained and folder:
        weights = {k: v.half() if v.is_floating_point() else v for k, v in net.cpu().state_dict().items()}
        saved = {"net": weights, "accuracy": net.accuracy, "tested": [test_key], "pictures": [key]}
        keep(folder, name, functools.partial(save_tensors, saved), say)
    net.labelled = labelled
    net.side = side
    net.name = f"{task}-{dataset}-{side}/{net.width} {digest(net)}"
    if labelled:
        chance = y_test.bincount().max().item() / len(y_test)  # one answer to all
        line = f"{net.name}: {net.accuracy:.2%} of the test set's labels right"
    else:
        chance = 1 / 4
        line = f"{net.name}: {net.accuracy:.2%} of the test images' quarter turns right, seen cropped and blurred"
        if net.accuracy > 0.99:
            line += ": so easy that coarse features may do, so its scores may miss finer faults"
    if net.accuracy - chance < 0.13 * (1 - chance):
        line += f": little better than chance ({chance:.0%}), so its scores mean little"
    say(line)
    return net.to(device, memory_format=torch.channels_last)


def read_network(paths, key, empty, say):
    """The network of training images with this key, and what was saved with it, from the first of the paths that has
    it; else None and {}. empty() makes one whose weights are not yet set."""
    for path in paths:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if key in saved["pictures"]:
                net = empty()
                net.load_state_dict(saved["net"])  # half precision into float32
                return net, saved
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as e:
            say(f"{path} cannot be read ({type(e).__name__})")
        except Exception as e:  # cut short or not ours: torch raises a different kind for each
            say(f"{path} is damaged ({type(e).__name__})")
    return None, {}


def rotation_accuracy(net, x):
    """The share of quarter turns that a RotationNet predicts, of cropped and blurred images x uint8 (N, C, S, S)."""
    rng = torch.Generator().manual_seed(1)
    right = 0
    with torch.no_grad(), exact():
        for part in some(x, 1000).split(100):
            views = blurred_and_noisy(cropped(net.prepare(part.to(net.head.weight.device)), rng), rng)
            quarters = torch.arange(len(part), device=views.device) % 4
            right += (net.eval()(turned(views, quarters))[1].argmax(1) == quarters).sum().item()
    return right / min(len(x), 1000)


def image_key(x, y):
    """A hash of images and labels, the same for MNIST at 28 and padded to 32."""
    x = F.pad(x, (2, 2, 2, 2)) if x.shape[-1] == 28 else x
    key = hashlib.sha256(x.contiguous().numpy())  # as they lie: tobytes would double them
    key.update(y.contiguous().numpy())
    return key.hexdigest()[:12]


def digest(net):
    return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in net.state_dict().values())).hexdigest()[:8]


INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


class Inception(nn.Module):
    """uint8 images (N, 1 or 3, H, W) -> features (N, 2048), logits (N, 1008): the 2015 network of published FIDs.

    Szegedy et al. 2015 (1512.00567) as TensorFlow ran it and pytorch-fid's file holds it, which torchvision's own
    Inception is not: average pools count no padding, and the last block's pool takes the maximum. Images are resized as
    pytorch-fid does, bilinearly, without antialiasing. The logits are without the bias, as torch-fidelity's are.
    `state` is that file's dict; RuntimeError where it does not fit."""

    batch = 25  # images at a time

    def __init__(self, state):
        super().__init__()
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            net = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
        net.load_state_dict(state, assign=True)
        self.fc = net.fc
        net.fc = nn.Identity()
        self.body = fx.symbolic_trace(net)  # torchvision's forward, whose calls can be changed
        *pools, last = (node for node in self.body.graph.nodes if node.target is F.avg_pool2d)  # nine, one a block
        for pool in pools:
            pool.update_kwarg("count_include_pad", False)
        last.target = F.max_pool2d
        self.body.recompile()
        self.float().eval().requires_grad_(False).to(memory_format=torch.channels_last)  # 1.6 times faster on a CPU

    def forward(self, x):  # (N, 3, 299, 299) in [-1, 1]
        features = self.body(x)
        return features, features @ self.fc.weight.T

    @staticmethod
    def prepare(x):
        x = F.interpolate(x.float() / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
        return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)

    def embed(self, x):
        return in_batches(self, as_images(x, [1, 3]), self.batch, self.fc.weight.device)


def inception(weights, device):
    """The Inception of the file `weights`, or of the one that torch.hub keeps, fetched if need be; .name as above.
    ValueError where there is no such file or it holds another network."""
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rsplit("/", 1)[1])
    try:
        if not (weights or path.exists()):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, path, path.stem.rsplit("-", 1)[1], is_terminal(sys.stderr))
        net = Inception(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:  # no network, a file cut short or of another network: a different kind for each
        if weights and not path.exists():
            raise ValueError(f"--weights {path}: no such file") from None
        if path.exists():
            raise ValueError(f"{path} does not hold the 2015 FID Inception ({type(e).__name__}: {str(e)[:99]})") from e
        raise ValueError(
            f"no Inception weights: put {INCEPTION} into {path.parent}, or name the file by --weights "
            f"({type(e).__name__}: {e})"
        ) from None
    net.name = f"inception-2015/2048 {digest(net)}"
    net.accuracy = None
    net.labelled = True
    return net.to(device)


# JUDGE: samples against a data set ------------------------------------------------------------------------------------

SCORES = ("fid", "kid", "is", "mode", "pr", "dc")


class Sample:
    """What a network makes of images: .n, .moments; if kept, .features (N, d), .logits (N, K) and .radius(k) (N,)."""

    def __init__(self, moments, features=None, logits=None):
        self.moments = moments
        self.n = moments.n
        self.features = features
        self.logits = logits
        self.radius = functools.cache(functools.partial(ball_radius, features))


def embed(net, images, keep=True, what="images"):
    """A Sample of uint8 images (N, C, H, W), or of an Images, which are read as they are needed. Without `keep` no
    feature is held longer than its batch. ValueError: images of another kind, features that are not finite."""
    moments = Moments()
    kept = []
    batches = images.batches(net.batch) if isinstance(images, Images) else as_images(images).split(net.batch)
    for batch in progress(batches, len(images), what):
        features, logits = net.embed(batch)
        moments.add(features[:, : getattr(net, "width", None)])  # a RotationNet's FID takes the first of them
        if keep:
            kept.append((features, logits))
    if not keep:
        return Sample(moments)
    features, logits = zip(*kept)
    return Sample(moments, torch.cat(features), torch.cat(logits))


def compare(fake, real, scores=SCORES, train=None):
    """The `scores` of a Sample against a real one, as a dict of plain numbers; fid_train if there is a third."""
    s = {}
    n = min(fake.n, real.n)
    k = min(5, n - 1)
    if "fid" in scores:
        s["fid"] = fake.moments.fid(real.moments)
        if train:
            s["fid_train"] = fake.moments.fid(train.moments)
    if "kid" in scores:
        s["kid"], s["kid_std"] = kid(real.features, fake.features)
    if "is" in scores:
        s["inception_score"], s["inception_score_std"] = inception_score(fake.logits, min(10, n))
    if "mode" in scores:
        s["mode_score"] = mode_score(fake.logits, real.logits)[1]
    if "pr" in scores:
        radii = [sample.radius(min(3, n - 1)) for sample in (real, fake)]
        s["precision"], s["recall"] = precision_recall(real.features, fake.features, radii=radii)
    if "dc" in scores:
        s["density"], s["coverage"] = density_coverage(real.features, fake.features, k, real.radius(k))
    elif "coverage" in scores:
        s["coverage"] = coverage(real.features, fake.features, k, real.radius(k))
    return s


def class_shares(logits):
    """Logits (N, K) -> a dict. A row's class is that of its largest logit.

    classes      how many classes have 1/(4K) of the images or more
    classes_of   K, how many there are
    class_min    the least share of a class
    class_max    the largest"""
    (logits,) = checked(1, logits)
    classes = logits.shape[1]
    shares = torch.bincount(logits.argmax(1), minlength=classes).double() / len(logits)
    return {
        "classes": int((shares >= 1 / (4 * classes)).sum()),
        "classes_of": classes,
        "class_min": shares.min().item(),
        "class_max": shares.max().item(),
    }


def mode_coverage(labels, classes):
    """The labels (N,) that a classifier gives, from 0 to classes - 1 -> a dict. Metz et al. 2017 (1611.02163).

    modes       the number of classes that occur
    modes_kl    KL(distribution of the labels || uniform), in nats

    N = 26,000 real stacked digits have about 1,000 modes and a KL of about 999 / (2 N) = .019. ValueError: other
    labels, or none."""
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels of 0 to {classes - 1} are needed")
    p = torch.bincount(labels, minlength=classes).double() / len(labels)
    return {"modes": int((p > 0).sum()), "modes_kl": torch.xlogy(p, p * classes).sum().item()}


FEWEST = 50  # images of a kind, below which a score is no score; below 1,000 it is printed with a warning


def enough(dataset):
    """How many images of each kind are scored, where there are as many."""
    return 26_000 if dataset == "stacked_mnist" else 10_000


def some(items, n):
    """n of images (N, C, H, W) or of a list of files, always the same, in their order. The first n are no sample:
    classes may lie together, or writers: between the halves of MNIST's test set FID is 31, of random halves 1 to 2."""
    chosen = torch.randperm(len(items), generator=torch.Generator().manual_seed(2020))[:n].sort().values
    return items[chosen] if torch.is_tensor(items) else [items[i] for i in chosen]


class Judge:
    """Scores images against a data set. judge(x, y=None) takes uint8 (N, C, S, S), and the labels (N,) that were asked
    for, if any; returns a dict of plain numbers:

    fid, coverage                                against n test images; coverage's k is 5
    fid_train                                    against n training images: for choosing a checkpoint
    inception_score, mode_score                  only where the network reads labels, as the next two lines
    classes, class_min, class_max                classes with 1/(4K) of the samples or more; least and largest share
    label_accuracy                               with y: the share that the network takes for what was asked
    n_real, n_fake, floor                        sizes (equal), and the FID of training against test images
    modes, modes_kl                              stacked_mnist: mode_coverage() of n = 26,000, and of as many real ones
                                                 (modes_real, modes_kl_real)

    load("train") and load("test") give images and labels; the network is classifier()'s, kept in `folder`.
    ValueError: too few images, or features that are not finite."""

    def __init__(self, dataset, load, folder=None, device="cpu", n=None, epochs=None, say=print):
        if n is not None and n < FEWEST:
            raise ValueError(f"n is {n}, where {FEWEST} or more are needed")
        train = load("train")
        test = load("test")
        self.n = min(n or enough(dataset), len(train[0]), len(test[0]))
        if self.n < FEWEST:
            raise ValueError(
                f"{len(train[0])} training and {len(test[0])} test images, where {FEWEST} of each are needed"
            )
        self.net = classifier(dataset, train, test, folder, device, epochs, say)
        self.train = embed(self.net, some(train[0], self.n))
        self.real = embed(self.net, some(test[0], self.n))
        of_real = compare(self.train, self.real, ("fid", "coverage"))  # what a generator can hope for
        self.floor = of_real["fid"]
        self.coverage_real = of_real["coverage"]
        self.stacked = dataset == "stacked_mnist"

    def __call__(self, x, y=None):
        if len(x) < self.n:
            raise ValueError(f"{len(x)} images: {self.n} are needed, as many as real ones")
        fake = embed(self.net, x[: self.n])
        s = compare(fake, self.real, ("fid", "coverage"), self.train)
        if self.net.labelled:
            s |= compare(fake, self.real, ("is", "mode")) | class_shares(fake.logits)
            if y is not None:
                s["label_accuracy"] = (fake.logits.argmax(1).cpu() == y[: self.n]).double().mean().item()
        if self.stacked:
            s |= mode_coverage(fake.logits.argmax(1), 1000)
            real = mode_coverage(self.real.logits.argmax(1), 1000)
            s |= {f"{name}_real": value for name, value in real.items()}
        s |= {"n_real": self.n, "n_fake": self.n, "floor": self.floor, "coverage_real": self.coverage_real}
        return s | {"features": self.net.name, "accuracy": self.net.accuracy}

    @staticmethod
    def line(s):
        """The scores in one line."""
        parts = [f"FID[{s['features']}] {s['fid']:.1f} (floor {s['floor']:.1f}, n {s['n_real']} + {s['n_fake']})"]
        if s["n_real"] < 1000:
            parts[0] += " few images: compare at this n only"
        parts.append(f"coverage {s['coverage']:.3f} (real {s['coverage_real']:.3f})")
        if "classes" in s:
            parts.append(f"IS {s['inception_score']:.2f} +- {s['inception_score_std']:.2f}")
            parts.append(f"Mode Score {s['mode_score']:.2f}")
            shares = f"shares {s['class_min']:.1%} to {s['class_max']:.1%}"
            parts.append(f"{s['classes']} of {s['classes_of']} classes, {shares}")
        else:
            parts.append("no labels: no IS, no Mode Score")
        if "label_accuracy" in s:
            parts.append(f"labels right {s['label_accuracy']:.1%}")
        if "modes" in s:
            real = f"real {s['modes_real']}, {s['modes_kl_real']:.3f}"
            parts.append(f"{s['modes']} of 1000 modes, KL {s['modes_kl']:.3f} ({real})")
        return "  ".join(parts)


# REJECTION: which of a generator's images to keep, by their scores ----------------------------------------------------


def check_scores(score):
    """Returns the scores (N,). ValueError: one is NaN or +inf. -inf is allowed: such an image is never kept."""
    if not (score <= 1e300).all():
        raise ValueError("scores that are not finite")
    return score


def naive(score):
    """The chance (N,) to keep an image of this score (N,): sigmoid, as the reports do. Even for the best D this draws
    from p_g p_d / (p_g + p_d), normalised, and not from p_d; for a critic's raw score it means nothing."""
    return check_scores(score.double()).sigmoid()


def drs(score, top, gamma=0.0, eps=1e-8):
    """Discriminator rejection sampling: the chance (N,) to keep an image whose score (N,) is log p_d / p_g.

    Azadi et al. 2019 (1810.06758), section 3: sigmoid(F - gamma), F = d - log(1 - exp(d - eps)), d = score - top, where
    top (a number or (N,)) is the largest score there is. Without eps and gamma it is exp(d), and what is kept follows
    p_d; a larger gamma keeps fewer, from a distribution between the two."""
    return (drs_logit(score, top, eps) - gamma).sigmoid()


def drs_logit(score, top, eps=1e-8):
    """F for scores and top (numbers or (N,)), in float64: in float32, and without expm1, it is inf at the maximum.

    ValueError: a score is NaN or above top."""
    d = torch.as_tensor(score).double() - top
    if not (d <= 0).all():
        raise ValueError("scores that are not finite, or above the largest one, top")
    return d - (-torch.expm1(d - eps)).log()


def platt(score_real, score_fake):
    """(a, b, auc): sigmoid(a score + b) is the chance that an image is real, if as many are real as fake.

    So a score + b is log p_d / p_g, calibrated (Platt 1999). Scores (N,) of real images that D never saw and (M,) of
    fresh fakes; each side weighs one half. auc is the share of pairs that the scores order rightly. ValueError: a is
    not above 0, or the scores separate the two without a mistake, so that the likelihood keeps rising with a."""
    real, fake = (s.double().flatten().cpu() for s in (score_real, score_fake))
    if min(len(real), len(fake)) < 2 or not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("a calibration needs two finite scores or more of each kind")
    order = fake.sort().values
    below = torch.searchsorted(order, real) + torch.searchsorted(order, real, right=True)  # a tie counts one half
    auc = below.double().mean().item() / (2 * len(fake))
    if real.min() >= fake.max() and real.max() > fake.min():
        raise ValueError("every held-out real image scores above every fake: there is no ratio to calibrate")
    s = torch.cat([real, fake])
    centre, scale = s.mean(), s.std()
    s = torch.stack([(s - centre) / scale.clamp(min=1e-300), torch.ones(len(s))], 1)
    sign = torch.cat([torch.ones(len(real)), -torch.ones(len(fake))]).double()
    weight = torch.cat([torch.full_like(real, 0.5 / len(real)), torch.full_like(fake, 0.5 / len(fake))])
    w = torch.zeros(2, dtype=torch.float64)

    def loss(w):
        return -(weight * F.logsigmoid(sign * (s @ w))).sum()

    for _ in range(100):  # Newton; convex, so halving the step always ends
        p = (sign * (s @ w)).sigmoid()
        gradient = -((weight * sign * (1 - p)) @ s)
        if gradient.abs().max() < 1e-12:
            break
        step = torch.linalg.lstsq((s * (weight * p * (1 - p))[:, None]).T @ s, gradient, driver="gelsd").solution
        while loss(w - step) > loss(w) and step.abs().max() > 1e-15:
            step = step / 2
        w = w - step
    a = (w[0] / scale).item()
    if not a > 0:
        raise ValueError(f"D does not rate held-out real images above fakes (AUC {auc:.3f}): nothing to select by")
    return a, (w[1] - w[0] * centre / scale).item(), auc


def rejected(kind, more, n, generator, head=None, percentile=60, burn_in=10_000, batch=1000, patience=1000):
    """n of a generator's images, kept by their scores, and a dict of what that took.

    kind        "naive" or "drs"
    more(k)     -> the next k images (k, ...) on the CPU and their scores (k,); z and its seeds are the caller's
    generator   draws one uniform for each image on the CPU: same seed, same choice, whatever the batch
    head        platt's (a, b, auc): a score + b is used in place of score. A critic's score needs one
    percentile  drs: gamma is F at this percentile of the burn-in's scores; None: gamma 0
    burn_in     drs: so many images are drawn and dropped first to find the largest score; it rises later if need be

    The dict:

    attempts            images drawn, up to and including the n-th kept one; the burn-in does not count
    attempts_per_10000  the same for 10,000 kept ones
    acceptance          n / attempts
    auc                 the head's; None without one
    burn_in             how many were drawn and dropped first
    warning             a line for the user, or None
    index               (n,): which of the attempts were kept

    ValueError: no image was kept in `patience` batches in a row, a score is NaN or +inf, or an argument is out of
    range."""
    a, b, auc = head or (1.0, 0.0, None)

    def draw(k):
        x, score = more(k)
        return x, check_scores(a * score.detach().double().flatten().cpu() + b)

    if kind not in ("naive", "drs"):
        raise ValueError(f"kind is naive or drs, not {kind}")
    if kind == "naive":
        burn_in = 0
    if percentile is not None and not 0 <= percentile <= 100:
        raise ValueError(f"a percentile is in 0..100, not {percentile}")
    if n < 1 or (kind == "drs" and percentile is not None and burn_in < 1):
        raise ValueError("n is 1 or more; a percentile is of the burn-in's scores: give burn_in, or percentile None")
    first_scores = [draw(min(batch, burn_in - i))[1] for i in range(0, burn_in, batch)]
    top = -math.inf
    score_at_percentile = None
    if first_scores:
        first_scores = torch.cat(first_scores)
        top = first_scores.max().item()
        if percentile is not None:
            score_at_percentile = first_scores.quantile(percentile / 100, interpolation="lower").item()
    kept = []
    indexes = []
    n_kept = 0
    attempts = 0
    empty_batches = 0
    while n_kept < n:
        x, score = draw(batch)
        if kind == "drs":
            tops = score.cummax(0).values.clamp(min=top)  # as if one by one: what comes later has no say
            top = tops[-1].item()
            # F rises with the score, so its percentile is F at the scores' percentile, under each image's own top
            gamma = 0.0
            if score_at_percentile is not None:
                gamma = drs_logit(score_at_percentile, tops)
            chance = drs(score, tops, gamma)
        else:
            chance = naive(score)
        u = torch.rand(batch, generator=generator, dtype=torch.float64)
        passed = (u < chance).nonzero().flatten()
        index = passed[: n - n_kept]  # no more than are still wanted
        n_kept += len(index)
        empty_batches = 0 if len(index) else empty_batches + 1
        indexes.append(attempts + index)
        if n_kept < n:
            attempts += batch
        else:  # up to the last one kept
            attempts += int(index[-1]) + 1
        kept.append(x[index])
        if empty_batches >= patience:
            raise ValueError(
                f"not one of {empty_batches * batch} images was kept (--reject {kind}): {n_kept} of {n} so far"
            )
    warning = None
    if auc is not None and auc < 0.55:
        warning = f"AUC {auc:.3f}: D hardly tells held-out real images from fakes, so rejection changes little"
    return torch.cat(kept), {
        "attempts": attempts,
        "attempts_per_10000": 10_000 * attempts / n,
        "acceptance": n / attempts,
        "auc": auc,
        "burn_in": burn_in,
        "warning": warning,
        "index": torch.cat(indexes),
    }


# STUDY: what watches a run and never trains ---------------------------------------------------------------------------

NOT_LOGGED = set(
    "n_real n_fake floor coverage_real classes_of accuracy inception_score_std modes_real modes_kl_real".split()
)


CLAIMED = []  # files by which Study.claim keeps other processes out of a run's folder


def release_folders():
    """Lets other processes into the folders of this one's runs: a notebook lives on after a run."""
    while CLAIMED:
        CLAIMED.pop().close()


class Study:
    """Watches a run: its folder, logs, sheets, scores, figures. It never trains, and its random streams are its own.

    args            the run's flags
    data            the script's Batches. Taken from it: the training set, .channels, .classes, and .held, the images on
                    which --reject drs is calibrated
    sample(z, y)    -> images uint8 (B, C, S, S) of z (B, latent_dim) and labels (B,)
    score(x, y)     -> D's scores (B,) of images uint8 (B, C, S, S) with labels (B,)
    script          the script's path, for the copy in the run's folder
    conditional     whether G takes a label

    The other ranks of a torchrun have one too. It checks that their losses are finite, and does nothing else."""

    def __init__(self, args, data, sample, score, script=None, conditional=False):
        self.args = args
        self.held = data.held
        self.sample = in_parts(sample, args.device, args.image_size)
        self.score = in_parts(score, args.device, args.image_size)
        self.classes_of_data = data.classes
        self.classes = data.classes if conditional else {}  # those that G can be asked for
        self.channels = data.channels
        self.script = Path(script) if script else None
        self.folder = Path(args.run_dir)
        self.log_file = CsvLog(self.folder / "log.csv")
        self.scores_file = CsvLog(self.folder / "scores.csv")
        self.splits = {"train": data.training_set}  # start() reads "test"
        self.judge = None  # made when it is first needed
        self.board = None
        self.seconds_before = 0.0  # of the same run, before it was resumed
        self.sums = 0
        self.count = 0

    # While it trains

    def start(self, i, total, per_epoch):
        """Makes the folder of a run that has done i of `total` updates of D, `per_epoch` an epoch.

        What an abandoned branch logged past i is dropped. Ends the program where the folder cannot be used."""
        self.total = total
        self.per_epoch = per_epoch
        self.start_time = time.perf_counter() - self.seconds_before
        self.scored_at = None
        self.best_fid = math.inf
        self.scored_by = None  # the network of the last scores
        self.test_key = None  # of the test images
        if RANK:
            return
        args = self.args
        if args.dataset != "digits":  # those are rendered, so they are always there
            # Test images that cannot be read end the program now, not at the first scores.
            self.test_key = image_key(*self.images("test"))
            if args.resume:
                self.compare_test_images(Path(args.resume).parent / "args.json")
        if i >= total + args.d_steps:  # the last iteration may end past the total
            fail(f"{args.resume} is at update {i}, past the {total} asked for")
        goes_on = bool(args.resume) and Path(args.resume).resolve().parent == self.folder.resolve()
        if goes_on and not self.is_folder_of_this_run():
            fail(f"{self.folder} is not the folder of the run of {args.resume}: name one by --run-dir")
        if not goes_on and contents(self.folder):
            way_out = "--resume its last.pt" if (self.folder / "last.pt").exists() else "delete it: it has no last.pt"
            fail(f"--run-dir {self.folder} is in use: name another, or {way_out}")
        if args.tensorboard:
            with or_fail("--tensorboard: pip install tensorboard"):
                writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        undo = contextlib.nullcontext() if goes_on else removed_if_it_fails(self.folder)
        with or_fail(f"--run-dir {self.folder}", (OSError, ValueError)), undo:
            (self.folder / "samples").mkdir(parents=True, exist_ok=goes_on)  # of two that begin at once one fails
            self.claim()
            if self.script:
                self.keep_code(i)
            script = self.script.stem if self.script else None
            machine = {"torch": torch.__version__, "gpu": None, "processes": WORLD}
            if args.device == "cuda":
                machine["gpu"] = torch.cuda.get_device_name()
            text = {"script": script, **vars(args), "classes": self.classes_of_data, **machine}
            text = json.dumps(text | {"test_images": self.test_key}, indent=1)
            if goes_on:
                self.keep_flags(i, json.loads(text))
            replace_file(self.folder / "args.json", lambda file: file.write(text.encode()))
            (self.folder / "scores.json").unlink(missing_ok=True)  # of an earlier end
            for step, path in self.sheets().items():
                if step > i:
                    path.unlink()
            self.log_file.keep(i)
            rows = self.scores_file.keep(i)
            if args.tensorboard:
                self.board = writer(self.folder, purge_step=i + 1)
            self.claim()  # the file that has just been written
        self.find_best(rows, i)
        ranks = f"{WORLD} x " if WORLD > 1 else ""
        say(f"{self.folder}: update {i} to {total} of D, {args.batch_size} images each, on {ranks}{args.device}")
        self.mark(i)

    def is_folder_of_this_run(self):
        """Whether the folder that holds the checkpoint to resume is that of its run, or holds nothing else.

        A checkpoint may have been copied to where other files are called scores.json or samples, too."""
        try:
            before = read_json(self.folder / "args.json")
        except FileNotFoundError:
            return contents(self.folder) == [self.folder / Path(self.args.resume).name]
        except (OSError, ValueError):
            return False
        same = all(before.get(name) == vars(self.args)[name] for name in ("dataset", "image_size", "seed"))
        return same and (self.script is None or before.get("script") == self.script.stem)

    def claim(self):
        """Keeps other processes out of the run's folder until this one ends: two would write one last.pt."""
        if fcntl and (self.folder / "args.json").exists():
            claimed = open(self.folder / "args.json", "r+b")  # the lock goes with the process, however it ends
            CLAIMED.append(claimed)
            try:
                fcntl.lockf(claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f"--run-dir {self.folder}: another process is training there")
            except OSError:  # a file system without locks
                pass

    def compare_test_images(self, path):
        """Warns if the run in the args.json at `path` had other test images: some may have been trained on."""
        with contextlib.suppress(OSError, ValueError):  # a checkpoint may lie without its run
            before = read_json(path).get("test_images")
            if before not in (None, self.test_key):
                warn(f"the test images are not those of {path}: if images came or went, some were trained on before")

    def find_best(self, rows, i):
        """Takes up the lowest fid_train of scores.csv if best.pt is of that step. Otherwise the next score is the best.

        Then best.pt comes from updates that this resume undoes, or the run was killed before the newer one was written.
        It stays until the next score replaces it."""
        best = self.folder / "best.pt"
        if rows:
            self.scored_by = rows[-1].get("features")
        rows = [row for row in rows if row.get("features") == self.scored_by]  # FIDs of two networks do not compare
        fids = {int(float(row["step"])): float(row["fid_train"]) for row in rows if is_number(row.get("fid_train", ""))}
        if fids and best.exists() and step_of(best) == min(fids, key=fids.get):
            self.scored_at = max(fids)
            self.best_fid = min(fids.values())
        elif i >= self.total:  # the loop is over, and update i is scored again
            self.scores_file.keep(i - 1)

    def mark(self, i):
        """From here on speed is measured, so that scoring and drawing do not count."""
        self.marked = (time.perf_counter(), i)

    def keep_flags(self, i, now):
        """Before args.json is written anew, with the flags `now`, by a run that goes on from update i.

        Where the flags up to there were others, args-to-300.json keeps them, if i is 300. Those of updates after i,
        which this resume drops, go."""
        numbered = {}
        for path in self.folder.glob("args-to-*.json"):
            number = path.stem.removeprefix("args-to-")
            if number.isdecimal():
                numbered[int(number)] = path
        later = [numbered[n] for n in sorted(numbered) if n > i]
        of_before = later[0] if later else self.folder / "args.json"
        if of_before.exists() and i not in numbered:
            before = read_json(of_before)
            names = (before.keys() | now.keys()) - {"resume", "run_dir", "data_dir", "generate", "generate_to"}
            if any(before.get(name) != now.get(name) for name in names):
                (self.folder / f"args-to-{i}.json").write_bytes(of_before.read_bytes())
        for path in later:
            path.unlink(missing_ok=True)

    def keep_code(self, i):
        """Copies the script and metrics.py into the folder. A resume with changed code adds the changed file, under a
        name that says from which update on it ran."""
        for path in (self.script, Path(__file__)):
            copy = self.folder / path.name
            if copy.exists() and copy.read_bytes() != path.read_bytes():
                copy = copy.with_name(f"{path.stem}-from-{i}.py")
                say(f"{path.name} has changed since: {copy.name} is the one that goes on")
            if not copy.exists() or copy.read_bytes() != path.read_bytes():
                shutil.copyfile(path, copy)

    def add(self, losses):
        """Adds an iteration's losses to sums that stay on the device: nothing waits.

        `losses` is a dict of tensors with one number each, with the same names in every iteration; else ValueError."""
        if self.count > 0 and list(losses) != self.names:
            raise ValueError(f"step() returned {', '.join(losses)} after {', '.join(self.names)}: not the same names")
        for name, value in losses.items():
            if not torch.is_tensor(value) or value.numel() != 1:
                raise ValueError(f"step() returned {value} as {name}: it has to be a tensor with one number")
        self.names = list(losses)
        self.sums = self.sums + torch.stack([value.detach().reshape(()) for value in losses.values()])
        self.count += 1

    def log(self, i):
        """A row of log.csv, the mean losses since the last one, and a line on how far the run is.

        Under torchrun the losses are of rank 0's part of each batch, and images_per_s counts all ranks.

        This waits for the device. A loss that is not finite ends the program: last.pt is from before."""
        means = dict(zip(self.names, (self.sums / self.count).tolist()))
        for name, value in means.items():
            if not math.isfinite(value):
                not_finite(name, i, self.folder)
        self.sums = 0
        self.count = 0
        if RANK:
            return
        since, update = self.marked
        speed = (i - update) / max(time.perf_counter() - since, 1e-9)
        row = {
            "step": i,
            "epoch": i / self.per_epoch,
            "g_updates": i // self.args.d_steps * self.args.g_steps,
            "seconds": self.seconds(),
            **means,
            "images_per_s": speed * self.args.batch_size,
        }
        self.log_file.add(row)
        self.to_board(row)
        losses = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        seconds = int(max(0, self.total - i) / max(speed, 1e-9))  # the last iteration may pass the total
        left = timedelta(seconds=min(seconds, 10**12))  # a timedelta holds little more
        epochs = f"epoch {row['epoch']:.1f}/{self.total / self.per_epoch:.4g}"
        say(
            f"{epochs}  D {i} G {row['g_updates']}  {losses}  {row['images_per_s']:.0f} images/s  ETA {left}",
            redraw=True,
        )
        self.mark(i)

    def seconds(self):
        return time.perf_counter() - self.start_time

    def to_board(self, row=None, sheet=None, i=None):
        """A row, or a sheet at step i, to TensorBoard. Once its file cannot be written it takes nothing more."""
        if not self.board:
            return
        try:
            for name, value in (row or {}).items():
                self.board.add_scalar(name, value, row["step"])
            if sheet is not None:
                self.board.add_image("samples", sheet, i)
        except OSError as e:
            self.board = None
            warn(f"no more of this run in TensorBoard: its file cannot be written ({e})")

    def sheet(self, i):
        """samples/step_I.png: 64 images of a fixed z; of a conditional G eight of each of the first 20 classes."""
        if RANK:
            return
        x = self.sample_sheet()
        with or_warn("no sheet of samples"):
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            save_sheet(x, self.folder / "samples" / f"step_{i:07}.png")
        self.to_board(sheet=sheet_of(x), i=i)
        self.mark(i)

    def sheets(self):
        """{step: path} of the sheets in samples/, in the order of their steps."""
        found = {}
        for path in (self.folder / "samples").glob("step_*.png"):
            step = path.stem.removeprefix("step_")
            if step.isdecimal():  # "step_0001000 (1).png" is somebody's copy
                found[int(step)] = path
        return dict(sorted(found.items()))

    def sample_sheet(self):
        rows = min(len(self.classes), 20)
        if rows:
            z = self.noise(8, SHEETS).repeat(rows, 1)
            y = torch.arange(rows).repeat_interleave(8)
        else:
            z = self.noise(64, SHEETS)
            y = torch.zeros(64, dtype=torch.long)
        return self.sample(z, y)

    def evaluate(self, i):
        """Scores fresh samples: a row of scores.csv. True if the FID to training images is the least of the run.

        best.pt goes by training images, so that the test set chooses nothing. False if i has been scored before."""
        if RANK or self.scored_at == i or not self.ready():
            return False
        scores = self.scores(SCORING, i)
        say(f"step {i}: {self.judge.line(scores)}")
        row = {"step": i, "epoch": i / self.per_epoch, "seconds": self.seconds()}
        row |= {name: value for name, value in scores.items() if name not in NOT_LOGGED}
        self.scores_file.add(row)
        self.to_board({name: value for name, value in row.items() if name != "features"})
        if self.scored_by not in (None, scores["features"]):
            warn(f"the scores are by another network than before, {self.scored_by}: best.pt starts afresh")
            self.best_fid = math.inf
        self.scored_by = scores["features"]
        better = scores["fid_train"] < self.best_fid
        self.best_fid = min(self.best_fid, scores["fid_train"])
        self.scored_at = i
        self.mark(i)
        return better

    # What it draws and scores

    def images(self, split):
        """The "train" or "test" images uint8 (N, C, S, S) and their labels (N,).

        They are read once. A folder that changes while the run trains would be split anew, and some of its test images
        would be those that the run has trained on."""
        if split not in self.splits:
            args = self.args
            self.splits[split] = load_data(args.dataset, args.data_dir, args.image_size, split)[:2]
        return self.splits[split]

    def noise(self, n, *key):
        """z (n, latent_dim), a pure function of the run's seed and a key."""
        return sample_z(self.args, n, "cpu", seeded(self.args.seed, *key))

    def labels(self, n, *key):
        """n labels in the shares of the training set, shuffled: in turn, or drawn at random, they would add to FID."""
        if not self.classes:
            return torch.zeros(n, dtype=torch.long)
        counts = torch.tensor(list(self.classes.values()))
        y = torch.arange(len(counts)).repeat_interleave(counts)
        shuffle = torch.randperm(n, generator=seeded(self.args.seed, ASKED, *key))
        return y[torch.arange(n) * len(y) // n][shuffle]

    def ready(self):
        """Makes the judge when it is first needed. False where there can be no scores, which is said once."""
        if self.judge is None:
            args = self.args
            device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
            try:
                self.judge = Judge(args.dataset, self.images, cache_home(args.dataset, args.data_dir), device)
            except ValueError as e:  # too few images, or features that are not finite: the training goes on
                say(f"no scores: {e}")
                self.judge = False
        return bool(self.judge)

    def scores(self, *key):
        """The judge's scores of fresh samples."""
        y = self.labels(self.judge.n, *key)
        x = self.sample(self.noise(self.judge.n, *key), y)
        return self.judge(x, y if self.classes else None)

    # When it is done

    def finish(self, i, load_networks):
        """samples.png, the figures, scores.json and curves.png. load_networks(path) loads those of a checkpoint."""
        if RANK:
            return
        with or_warn("no samples.png"):
            save_sheet(self.sample_sheet(), self.folder / "samples.png")
        with or_warn("no training.gif"):
            save_gif(list(self.sheets().values()), self.folder / "training.gif")
        with or_warn("an interpolation is missing"):
            self.interpolations()
        with or_warn("no traversal.png"):
            self.traversal()
        self.last_scores(i, load_networks)
        if self.board:
            with or_warn("TensorBoard's file may lack its end"):
                self.board.close()
        if self.log_file.path.exists():
            try:
                plot([self.folder], self.folder / "curves.png")
            except ValueError as e:  # rows without a number to plot, or a full disk
                say(f"no curves.png: {e}")
        else:
            say("no curves.png: log.csv has no rows, which come every --log-every updates of D")
        say(f"done: {self.folder}")

    def last_scores(self, i, load_networks):
        """scores.json: last.pt and best.pt on fresh z, and what --reject keeps of their samples."""
        if not self.ready():
            return
        scores = {}
        for name in ("last.pt", "best.pt"):
            if not (self.folder / name).exists():
                continue
            step = load_networks(self.folder / name)
            if name == "best.pt" and step == i:
                scores |= {key.replace("last", "best"): value for key, value in scores.items()}
                say("best.pt is last.pt")
                continue
            scores[name] = self.scores(LAST)
            say(f"{name}, fresh z: {self.judge.line(scores[name])}")
            if self.args.reject != "none":
                chosen = self.scores_of_chosen(name)
                if chosen:
                    scores[f"{name} --reject {self.args.reject}"] = chosen
        text = json.dumps(scores, indent=1)
        write_whole(self.folder / "scores.json", lambda file: file.write(text.encode()))

    def scores_of_chosen(self, name):
        reject = f"--reject {self.args.reject}"
        try:
            x, y, took = self.chosen(self.judge.n, CHOICE)
        except ValueError as e:
            say(f"{reject}: {e}")
            return None
        scores = self.judge(x, y if self.classes else None) | took
        say(f"{name}, {reject}: {self.judge.line(scores)}; {took['line']}")
        return scores

    def chosen(self, n, *key, labels=None):
        """n images that --reject keeps, their labels, and rejected's dict. ValueError: D is of no use for it.

        labels(k, *key) -> the k labels to ask for; as a default in the shares of the training set."""
        args = self.args
        labels = labels or self.labels
        asked = []

        def more(k):
            asked.append(labels(k, *key, len(asked) + 1))
            x = self.sample(self.noise(k, *key, 2, len(asked)), asked[-1])
            return x, self.score(x, asked[-1])

        head = None
        if args.reject == "naive" and getattr(args, "d_norm", "none") == "batch":
            say("--reject naive: D has batch norm, and in eval mode its logit is not the one that trained")
        if args.reject == "drs":
            x, y = self.held
            if self.classes and args.label not in ("shares", "turn"):  # one class, held against its own real images
                is_wanted = y == labels(1, *key)
                x, y = x[is_wanted], y[is_wanted]
            fakes = [more(len(part))[1] for part in x.split(500)]
            head = platt(self.score(x, y), torch.cat(fakes))
        calibrated = len(asked)
        x, took = rejected(args.reject, more, n, seeded(args.seed, *key, 1), head, args.drs_percentile)
        index = took.pop("index")
        labels_drawn = torch.cat(asked[calibrated:])  # of the burn-in, then of the attempts
        y = labels_drawn[took["burn_in"] :][index]
        line = f"{took['attempts']} attempts, {took['acceptance']:.1%} kept"
        if head:
            line += f", calibrated at AUC {took['auc']:.3f}"
        if took["warning"]:
            line += f". {took['warning']}"
        return x, y, {**took, "line": line}

    def interpolations(self):
        """interpolation_latent.png and interpolation_pixel.png: eight pairs, ten images from one to the other."""
        z_start, z_end = self.noise(16, INTERPOLATION).chunk(2)
        t = torch.linspace(0, 1, 10)
        y = torch.arange(8) % max(1, len(self.classes))
        z = torch.lerp(z_start[:, None], z_end[:, None], t.view(10, 1))
        save_sheet(self.sample(z.flatten(0, 1), y.repeat_interleave(10)), self.folder / "interpolation_latent.png", 10)
        x_start, x_end = (self.sample(z, y).float()[:, None] for z in (z_start, z_end))
        x = torch.lerp(x_start, x_end, t.view(1, 10, 1, 1, 1)).round().byte()
        save_sheet(x.flatten(0, 1), self.folder / "interpolation_pixel.png", 10)

    def traversal(self, rows=10):
        """traversal.png: one z, and in each row one of its coordinates slid from -4 to 4 (uniform prior: -1 to 1).

        The rows are the coordinates that change the image most from end to end, the strongest first. Of a longer z the
        first 512 are tried."""
        far = 4.0 if self.args.prior == "normal" else 1.0
        z = self.noise(1, TRAVERSAL)
        is_coordinate = torch.eye(min(512, self.args.latent_dim), self.args.latent_dim) > 0  # row i: coordinate i alone
        y = torch.zeros(len(is_coordinate), dtype=torch.long)
        low = self.sample(torch.where(is_coordinate, -far, z), y).float()
        high = self.sample(torch.where(is_coordinate, far, z), y).float()
        change = (high - low).abs().flatten(1).mean(1)
        strongest = change.argsort(descending=True)[:rows]
        moved = is_coordinate[strongest][:, None]  # (rows, 1, latent_dim)
        positions = torch.linspace(-far, far, 9).view(1, 9, 1)
        slid = torch.where(moved, positions, z).flatten(0, 1)
        save_sheet(self.sample(slid, y[:1].expand(len(slid))), self.folder / "traversal.png", 9)

    def class_interpolations(self):
        """interpolation_classes.png: for each pair of the first ten classes ten images of one z, from class to class.

        For a G that takes y (B, classes) too, the shares of the classes in a blend."""
        if RANK:
            return
        one = torch.eye(len(self.classes))
        t = torch.linspace(0, 1, 10)[:, None]
        pairs = torch.combinations(torch.arange(min(len(one), 10))).tolist()
        shares = torch.cat([(1 - t) * one[a] + t * one[b] for a, b in pairs])
        z = self.noise(1, BETWEEN_CLASSES).expand(len(shares), -1)
        with or_warn("no interpolation_classes.png"):
            save_sheet(self.sample(z, shares), self.folder / "interpolation_classes.png", 10)

    # --generate

    def generate(self, n):
        """Writes n images as PNG files of fresh z, chosen by --reject; of a conditional G labels.csv beside them."""
        if RANK:
            return
        args = self.args
        out = Path(args.generate_to or self.folder / "generated")
        if contents(out):
            fail(f"--generate-to {out} is in use")
        line = ""
        if args.reject == "none":
            y = self.labels_to_generate(n, GENERATED)
            z = self.noise(n, GENERATED)
            parts = map(self.sample, z.split(500), y.split(500))  # drawn one after the other, as all may be too large
        else:
            with or_fail(f"--reject {args.reject}", ValueError):
                x, y, took = self.chosen(n, GENERATED, labels=self.labels_to_generate)
            parts = x.split(500)
            line = f": {took['line']}"
        with or_fail(f"--generate-to {out}", (OSError, ValueError)), removed_if_it_fails(out):
            out.mkdir(parents=True, exist_ok=True)
            images = itertools.chain.from_iterable(progress(parts, n, "generating"))
            for i, image in enumerate(images):
                save_sheet(image[None], out / f"{i:05}.png")
            if self.classes:
                names = list(self.classes)
                with open(out / "labels.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                    writer = csv.writer(file, lineterminator="\n")  # a name may hold a comma
                    writer.writerow(["file", "label"])
                    writer.writerows([f"{i:05}.png", names[label]] for i, label in enumerate(y.tolist()))
        say(f"{n} images in {out}{line}")

    def labels_to_generate(self, n, *key):
        """As --label says: in the shares of the training set, in turn, or all of one class."""
        names = list(self.classes)
        label = self.args.label
        if label == "shares" or (label == "turn" and not names):
            return self.labels(n, *key)
        if label == "turn":
            return torch.arange(n) % len(names)
        # An accented letter is one character or two: folders of a Mac have two.
        plain = [unicodedata.normalize("NFC", name) for name in names]
        label = unicodedata.normalize("NFC", label)
        if label not in plain:
            fail(f"--label {label} is no class; there are: {', '.join(names[:20]) or 'none'}")
        return torch.full((n,), plain.index(label))


class Stop:
    """Set by Ctrl-C, SIGTERM or SIGHUP: the loop ends after its iteration. A second signal leaves at once."""

    before: ClassVar[dict] = {}  # the handlers that it took the place of
    finished: ClassVar = None  # last.pt, once the training is over

    def __init__(self):
        self.signal = None
        self.asked = 0
        if threading.current_thread() is not threading.main_thread():
            return  # only that one may listen
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            signum = getattr(signal, name, None)  # Windows has no SIGHUP, and others no SIGBREAK
            if not signum:
                continue
            if signal.getsignal(signum) != signal.SIG_IGN:
                self.before[signum] = signal.signal(signum, self.catch)
            elif name == "SIGINT":  # by a shell script that started this run with &; by nohup it is SIGHUP
                say(f"as a script's job in the background this run does not hear Ctrl-C: kill {os.getpid()} stops it")

    def catch(self, signum, frame):
        if self.signal is not None:
            raise SystemExit(128 + signum)
        self.signal = signum

    def is_set(self):
        """Under torchrun rank 0 decides, at every tenth call: all ranks leave after the same iteration."""
        if WORLD > 1:
            self.asked += 1
            if self.asked % 10:
                return False
            self.signal = from_rank_0(self.signal)
        return self.signal is not None

    def leave_if_set(self, i, study):
        """After the last checkpoint: ends the program if there was a signal. From here on any signal does, at once."""
        if WORLD > 1:
            self.signal = from_rank_0(self.signal)
        self.put_back()
        last = study.folder / "last.pt"
        Stop.finished = last  # main() names it if Ctrl-C comes from here on
        if self.signal is not None:
            if step_of(last) == i:
                say(f"stopped at step {i}: go on with --resume {last}")
            else:  # the disk has refused it
                say(f"stopped at step {i}, which is not saved")
            leave_ranks()
            raise SystemExit(128 + self.signal)

    @classmethod
    def put_back(cls):
        """The handlers of before. After an error in the loop too: a notebook would lose its next Ctrl-C."""
        cls.finished = None
        if threading.current_thread() is threading.main_thread():
            while cls.before:
                signal.signal(*cls.before.popitem())


def step_of(checkpoint):
    """The update of D at which a checkpoint was written, None where it cannot be read."""
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True)["step"]
    except Exception:  # a damaged file: torch raises a different kind for each kind of damage
        return None


def in_parts(f, device, side=64):
    """f(rows, y), of as many rows as wanted, without gradients. The result is on the CPU.

    At a time 500 rows go to `device`; where images have more than 64 pixels a side, as many as have the same area, but
    at least 16."""
    n = max(16, min(500, 500 * 64**2 // side**2))

    @torch.no_grad()
    def whole(rows, y):
        return torch.cat([f(a.to(device), b.to(device)).cpu() for a, b in zip(rows.split(n), y.split(n))])

    return whole


def not_finite(what, i, folder):
    """Ends the program: a NaN or an infinity by update i."""
    last = Path(folder) / "last.pt"
    before = f"; {last} is from before" if last.exists() else ""
    fail(f"{what} is not finite by step {i}: try lower --lr-d, --lr-g{before}")


class CsvLog:
    """A CSV file with a "step" column that a run appends to, and cuts back where it goes on from an earlier step."""

    def __init__(self, path):
        self.path = path
        self.columns = []
        self.waiting = []  # rows that could not be written yet

    def keep(self, step):
        """Drops the rows past `step`, and returns those that stay as dicts of texts. ValueError: it is no such file."""
        if not self.path.exists():
            return []
        rows = read_csv(self.path)
        if rows and "step" not in rows[0]:
            raise ValueError(f"{self.path} has no column step")
        if not self.path.read_bytes().endswith((b"\n", b"\r")):  # a killed process left half a row
            rows = rows[:-1]
        rows = [row for row in rows if is_number(row["step"]) and float(row["step"]) <= step]
        self.rewrite(rows)
        return rows

    def add(self, row):
        """Appends a row {column: number}; a column that the file lacks is added to it. A row that cannot be written, on
        a full disk or to a file that a spreadsheet locks, is tried again with the next one."""
        cells = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        self.waiting.append(cells)
        there = self.path.exists()
        try:
            if there and set(cells) <= set(self.columns):
                append(self.path, csv_bytes(self.waiting, self.columns, header=False))
            else:
                old = read_csv(self.path) if there else []
                self.rewrite(old + self.waiting)
            self.waiting = []
        except (OSError, ValueError) as e:
            warn(f"{self.path} cannot be written, which is tried again at the next row ({e})")

    def rewrite(self, rows):
        columns = []
        for row in rows:
            columns += [name for name in row if name not in columns]
        if rows:
            replace_file(self.path, lambda file: file.write(csv_bytes(rows, columns, header=True)))
        else:
            self.path.unlink()
        self.columns = columns


def csv_bytes(rows, columns, header):
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def is_number(text):
    with contextlib.suppress(ValueError):
        return math.isfinite(float(text))
    return False


def save_gif(paths, out, limit=300 * 1024, largest=530):
    """The sheets as an animated GIF of at most `limit` bytes: ever fewer frames and colours until it fits.

    Frames larger than `largest` pixels, the side of a sheet of 64 images of 64 pixels, are made smaller. Nothing is
    written if even two frames of two colours are too large. OSError: a sheet cannot be read, or the disk refuses."""

    def frame(path, colours):
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except (OSError, SyntaxError) as e:  # Pillow raises either for a damaged PNG, and does not name the file
            raise OSError(f"{path}: {e}") from None
        image.thumbnail((largest, largest))
        return image.quantize(colours)

    if not paths:
        return
    for frames, colours in ((48, 16), (32, 16), (24, 8), (16, 8), (10, 4), (5, 4), (2, 2)):
        evenly = np.linspace(0, len(paths) - 1, min(frames, len(paths)))
        images = [frame(paths[i], colours) for i in sorted({round(t) for t in evenly})]
        file = io.BytesIO()
        rest = images[1:] + images[-1:] * 5
        images[0].save(file, "GIF", save_all=True, append_images=rest, duration=150, loop=0)
        if file.tell() <= limit:
            replace_file(out, lambda whole: whole.write(file.getbuffer()))
            return


def answers(models, x, y, x_test):
    """For bigan.py's probe: yields the predicted labels (M,) of features x_test (M, d), once for each classifier.

    All learn from features x (N, d) with labels y (N,). First comes the nearest neighbour, by plain distances as in the
    paper: scaled ones cost MNIST's pixels 2.6 points. Then come scikit-learn's `models`, at most two, on features of
    mean 0 and standard deviation 1. The second is fitted to the first 5,000 rows only, as it is slow."""
    x, x_test = x - x.mean(0), x_test - x.mean(0)  # far from 0 the products below would lose their digits
    squares = x.square().sum(1)  # |a - x|^2 = |a|^2 - 2 a.x + |x|^2: which x is nearest does not depend on |a|^2
    yield torch.cat([y[torch.addmm(squares, a, x.T, alpha=-2).argmin(1)] for a in x_test.split(250)])
    deviation = x.std(0, correction=0)
    x, x_test = (t / torch.where(deviation > 0, deviation, 1) for t in (x, x_test))
    for model, n in zip(models, (len(x), 5000)):
        yield torch.from_numpy(model.fit(x[:n].numpy(), y[:n].numpy()).predict(x_test.numpy()))


def reconstruction_ratio(x, made, seed):
    """mean |x - G(E(x))| / mean |x - G(E(x'))|: an image's distance to its own reconstruction, over that to another's.

    All images are put into a circle in random order, and x' is the one after x. 0: G undoes E. 1: E tells nothing."""
    circle = torch.randperm(len(x), generator=seeded(seed, PROBE))
    to_own = (x[circle] - made[circle]).flatten(1).norm(dim=1).mean()
    to_next = (x[circle] - made[circle.roll(-1)]).flatten(1).norm(dim=1).mean()
    return (to_own / to_next).item()


@torch.no_grad()
def reconstruction_figures(folder, images, encode, decode, x_train):
    """reconstructions.png and interpolation_real.png in `folder`, of the first 16 test images x.

    images      Study.images
    encode(x)   -> codes z (B, latent_dim) of images uint8 (B, C, S, S)
    decode(z)   -> images uint8 (B, C, S, S)
    x_train     images uint8 (N, C, S, S)

    A column of the first is x, its reconstruction, and the training image nearest to that. A row of the second is x,
    ten images along the line from x's code to that of x', and x'."""
    if RANK:
        return
    x = images("test")[0][:16].to(x_train.device)
    if len(x) == 0:
        say("no reconstructions.png: no test image can be read")
        return
    z = encode(x)
    made = decode(z)
    parts = x_train.split(1000)
    with exact():
        distance = torch.cat([torch.cdist(made.flatten(1).float(), part.flatten(1).float()) for part in parts], 1)
    nearest = x_train[distance.argmin(1)]
    with or_warn("no reconstructions.png"):
        save_sheet(torch.cat([x, made, nearest]), folder / "reconstructions.png", len(x))
    half = len(x) // 2
    x_start, x_end = x[:8, None], x.roll(-half, 0)[:8, None]
    z_start, z_end = z[:8, None], z.roll(-half, 0)[:8, None]
    between = torch.lerp(z_start, z_end, torch.linspace(0, 1, 10, device=z.device).view(1, 10, 1))
    between = decode(between.flatten(0, 1)).unflatten(0, (-1, 10))
    rows = torch.cat([x_start, between, x_end], 1)
    with or_warn("no interpolation_real.png"):
        save_sheet(rows.flatten(0, 1), folder / "interpolation_real.png", 12)


@torch.no_grad()
def probe(study, i, features, reconstruct, x, y):
    """bigan.py --probe: prints, as Markdown, what share of the test labels classifiers tell from features.

    i               the checkpoint's step
    features        {name: function of images uint8 (B, C, S, S) that returns numbers (B, d)}; pixels are added
    reconstruct(x)  -> G(E(x)), images uint8 (B, C, S, S)
    x, y            training images uint8 (N, C, S, S) and labels (N,), which the classifiers learn from"""
    if RANK:
        return
    with or_fail("--probe needs scikit-learn: pip install scikit-learn"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.svm import SVC
    args = study.args
    y = y.cpu()
    x_test, y_test = study.images("test")
    labelled = min(y.min(), y_test.min()) >= 0
    classes = int(y.max()) + 1 if labelled else 0
    if not 2 <= classes <= 100:
        fail(f"--probe reads labels, of 2 to 100 classes: {args.dataset} has {classes}")

    def of_all(f, images):
        return torch.cat([f(part.to(x.device)).cpu() for part in images.split(500)])

    say(
        f"{args.resume}, step {i}: {len(x_test)} test images of {args.dataset}, classified after {len(x)} training "
        f"images (SVM: the first {min(len(x), 5000)})\n"
    )
    say("| features | numbers | 1-NN | logistic regression | SVM |\n|---|---|---|---|---|")
    models = LogisticRegression(C=1.0, max_iter=1000), SVC(C=1.0, kernel="rbf", gamma="scale")
    features = {**features, "pixels": lambda images: images.flatten(1) / 127.5 - 1}
    for name, f in features.items():
        train, test = of_all(f, x), of_all(f, x_test)
        shares = [f"{(given == y_test).double().mean():.2%}" for given in answers(models, train, y, test)]
        say(f"| {name} | {train.shape[1]} | {' | '.join(shares)} |")
    made = of_all(reconstruct, x_test)
    say(f"\nreconstruction ratio {reconstruction_ratio(x_test.float(), made.float(), args.seed):.3f}")
    if study.ready():
        kept = (study.judge.net.embed(made)[1].argmax(1).cpu() == y_test).double().mean()
        say(f"{kept:.2%} of the reconstructions are of the image's class, by that classifier")


# PLOT: logs as curves, final scores as a table ------------------------------------------------------------------------

COLOURS = "#1f5fa8 #c8452b #2f8f4e #8a4fa3 #b58a00 #444444 #3fb0c9 #d477a8 #7a5230 #8fb339 #6a6acd #e08a2e".split()
NOT_PLOTTED = {"step", "epoch", "g_updates", "seconds", "images_per_s", "class_min", "class_max"}
NOT_COMPARED = set(
    "script classes test_images torch gpu seed data_dir device graph run_dir resume generate generate_to label "
    "tensorboard log_every sample_every eval_every checkpoint_every".split()
)


def read_log(run):
    """The log.csv and scores.csv of a run's folder, or one such file -> {column: (steps, values)}.

    Cells without a value are left out. ValueError: it is no log."""
    path = Path(run)
    files = [path]
    if path.is_dir():
        files = [path / name for name in ("log.csv", "scores.csv") if (path / name).exists()]
        if not files:
            raise ValueError(f"{path} has no log.csv: a run writes it after --log-every updates of D")
    columns = {}
    try:
        for file in files:
            rows = read_csv(file)
            if not rows:
                continue
            for name in rows[0]:
                if name == "features":  # a text: the network that scored
                    continue
                filled = [row for row in rows if row[name]]
                steps = [float(row["step"]) for row in filled]
                columns.setdefault(name, (steps, [float(row[name]) for row in filled]))
    except (OSError, KeyError, IndexError, ValueError, TypeError) as e:
        raise ValueError(f"{file} is not the log of a run ({type(e).__name__}: {e})") from None
    if not columns:
        raise ValueError(f"{path} has no rows yet")
    return columns


def read_json(path):
    """The dict in a file of a run. ValueError: it is empty, cut short or of another kind."""
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: no JSON object")
    return found


def groups(runs):
    """{label: [run folders]}: those that differ in the seed alone together, in the order given.

    A label is the script and the flags that tell its groups apart. A folder without args.json is a group of its own,
    and so is a seed that comes twice: other code made it."""
    described = {}  # {run: (script, flags, seed)}
    for run in runs:
        folder = Path(run) if Path(run).is_dir() else Path(run).parent
        if not (folder / "args.json").exists():
            described[run] = (folder.resolve().name, {}, None)
            continue
        args = read_json(folder / "args.json")
        compared = {name: value for name, value in args.items() if name not in NOT_COMPARED}
        if args.get("steps"):
            compared.pop("epochs", None)  # --steps overrides it
        described[run] = (args.get("script") or folder.resolve().name, compared, args.get("seed"))
    together = {}
    seen = []
    for run in runs:
        script, mine, seed = described[run]
        of_same_script = [flags for other, flags, _ in described.values() if other == script]
        label = script
        for flag, value in mine.items():
            values = {repr(flags.get(flag)) for flags in of_same_script}
            if len(values) == 1:
                continue
            if flag == "processes":
                label += f", processes: {value}"
            else:
                label += f" --{flag.replace('_', '-')} {value}"
        group = str(run) if (label, seed) in seen else label
        together.setdefault(group, []).append(run)
        seen.append((label, seed))
    return together


def unlike(runs):
    """What run folders differ in beside flags: the code that ran, the test images, PyTorch's version, the GPU.

    A file of code that some of the folders lack is a difference too: it is there after a resume with changed code."""
    described = []
    for run in runs:
        args = read_json(Path(run) / "args.json") if Path(run, "args.json").exists() else {}
        of_run = {"the test images": repr(args.get("test_images"))}
        of_run |= {"PyTorch's version": args.get("torch"), "the GPU": args.get("gpu")}
        of_run |= {path.name: path.read_bytes() for path in sorted(Path(run).glob("*.py"))}
        described.append(of_run)
    names = {}  # in order
    for of_run in described:
        names |= of_run
    return [name for name in names if any(of_run.get(name) != described[0].get(name) for of_run in described)]


TABLE_COLUMNS = {  # heading: the score, its format
    "FID": ("fid", ".1f"),
    "IS": ("inception_score", ".2f"),
    "coverage": ("coverage", ".3f"),
    "classes": ("classes", ".1f"),
    "least": ("class_min", ".1%"),
    "labels right": ("label_accuracy", ".1%"),
    "modes": ("modes", ".0f"),
    "attempts": ("attempts", ".0f"),
}


def scores_table(runs):
    """The final scores of run folders (scores.json) as Markdown: a row for each group of seeds and each checkpoint.

    The mean and, of two runs or more, the standard deviation (n - 1). ValueError: a run without scores."""
    rows = []
    networks = set()
    for label, members in groups(runs).items():
        differences = unlike(members)
        if differences:
            warn(f"the {len(members)} runs of {label} differ in more than the seed: in {', '.join(differences)}")
        try:
            scores = [read_json(Path(run) / "scores.json") for run in members]
        except (OSError, ValueError) as e:
            raise ValueError(f"a run without scores: {e}") from None
        names = []
        for run in scores:
            names += [name for name in run if ".pt" in name and name not in names]
        for name in names:
            last = name.replace("best", "last")
            if name != last and all(run.get(name) == run.get(last) for run in scores):
                continue  # best.pt is last.pt
            mine = [run[name] for run in scores if name in run]  # a seed may lack what --reject keeps
            try:
                used = set()
                for s in mine:
                    real = f", coverage of real images {s['coverage_real']:.3f}" if "coverage_real" in s else ""
                    used.add(f"{s['features']}, floor {s['floor']:.1f}{real}, n {s['n_fake']} of each")
            except (KeyError, TypeError, ValueError) as e:
                raise ValueError(f"scores.json of {label} is damaged: {name} has no scores ({e})") from None
            networks |= used
            several = " (by several networks)" if len(used) > 1 else ""
            rows.append((label + several, name, mine))
    shown = []
    for heading, (key, _) in TABLE_COLUMNS.items():
        if any(all(s.get(key) is not None for s in mine) for _, _, mine in rows):
            shown.append(heading)
    lines = ["; ".join(sorted(networks)), "", "| " + " | ".join(["run", "weights", "seeds", *shown]) + " |"]
    lines.append("|---" * (3 + len(shown)) + "|")
    for label, name, mine in rows:
        cells = [label, name, str(len(mine))]
        cells += [mean_and_spread(mine, *TABLE_COLUMNS[heading]) for heading in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_spread(scores, key, form):
    """A cell of the table, "" where a run lacks the score."""
    values = [s.get(key) for s in scores]
    if None in values:
        return ""
    if len(values) == 1:
        return format(values[0], form)
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}"


def band(logs, column):
    """Of one column in the logs of several seeds: the steps that all have, means, least and largest values."""
    found = []  # for each log {step: value}
    for log in logs:
        steps, values = log.get(column, ([], []))
        found.append(dict(zip(steps, values)))
    shared = [step for step in found[0] if all(step in values for values in found)]
    rows = []
    for step in shared:
        rows.append([values[step] for values in found])
    table = np.array(rows).reshape(-1, len(found))
    return shared, table.mean(1).tolist(), table.min(1).tolist(), table.max(1).tolist()


def ticks(low, high, wanted=6):
    """Round numbers from low to high: 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / wanted
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def logarithms(values):
    """To base 10, as a list; what is below .001 counts as .001."""
    return np.log10(np.maximum(values, 1e-3)).tolist()


def log_ticks(low, high):
    """Marks for an axis of logarithms: 1, 2 and 5 times powers of ten, or even steps within a decade."""
    values = []
    for power in range(-3, 9):
        values += [m * 10.0**power for m in (1, 2, 5)]
    if high - low < 1:
        values = ticks(10**low, 10**high)
    return [math.log10(value) for value in values]


def plot(runs, out):
    """Each logged column of runs against the step (D updates), a panel each, as one PNG.

    Of runs that differ in the seed alone the mean, in a band from least to largest. ValueError: logs without rows, or
    no such file."""
    grouped = groups(runs)
    labels = list(grouped)
    logs = [[read_log(run) for run in members] for members in grouped.values()]
    if len(runs) == 1:
        run = Path(runs[0]).resolve()
        labels = [run.name if run.is_dir() else run.parent.name]
    names = []
    for seeds in logs:
        for log in seeds:
            names += [name for name in log if name not in NOT_PLOTTED and name not in names]
    panels = [name for name in names if any(band(seeds, name)[0] for seeds in logs)]
    if not panels:
        raise ValueError("nothing to plot: the logs have no rows yet")
    width, height = 440, 260  # of a panel
    columns = min(3, len(panels))
    legend = 18 * len(labels) + 8
    image = Image.new("RGB", (width * columns, height * math.ceil(len(panels) / columns) + legend), "white")
    draw = ImageDraw.Draw(image)
    draw.text((width * columns - 18, 15), "against updates of D", "#555555", ImageFont.load_default(13), anchor="rm")
    for i, label in enumerate(labels):
        y = 15 + 18 * i
        draw.line([(14, y), (44, y)], COLOURS[i % len(COLOURS)], 3)
        draw.text((52, y), label, "black", ImageFont.load_default(13), anchor="lm")
    for i, name in enumerate(panels):
        corner = (width * (i % columns) + 62, height * (i // columns) + legend + 24)
        panel(image, corner, (width - 80, height - 66), name, [band(seeds, name) for seeds in logs])
    try:
        image.save(out)
    except (OSError, ValueError) as e:
        raise ValueError(f"{out} cannot be written: {e}") from None


def panel(image, corner, size, name, curves):
    """Draws curves (steps, means, least, largest), one for each group of runs, into a box of the image."""
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    x0, y0 = corner
    x1, y1 = x0 + size[0], y0 + size[1]
    log_scale = name.startswith("fid") or name == "grad_norm"
    if log_scale:
        curves = [(steps, *map(logarithms, values)) for steps, *values in curves]
    finite = []
    for _, _, least, largest in curves:
        finite += [v for v in (*least, *largest) if math.isfinite(v)]
    low = min(finite, default=0.0)
    high = max(finite, default=0.0)
    size_of_values = max(1.0, abs(low), abs(high))
    flat = high - low < 1e-9 * size_of_values
    margin = 0.5 * size_of_values if flat else 0.04 * (high - low)
    low, high = low - margin, high + margin
    last = max(max(steps, default=0) for steps, *_ in curves) or 1

    def place(step, value):
        return x0 + step / last * (x1 - x0), y1 - (value - low) / (high - low) * (y1 - y0)

    def places(steps, values):
        return [place(step, value) for step, value in zip(steps, values) if math.isfinite(value)]

    draw.rectangle([x0, y0, x1, y1], outline="#999999")
    draw.text((x0, y0 - 6), name + (" (log scale)" if log_scale else ""), "black", font, anchor="ls")
    for t in ticks(0, last):
        draw.text((place(t, low)[0], y1 + 4), f"{t:g}", "#555555", font, anchor="mt")
    marks = log_ticks(low, high) if log_scale else ticks(low, high)
    for t in marks:
        if low <= t <= high:
            y = place(0, t)[1]
            draw.line([(x0, y), (x1, y)], "#e4e4e4")
            draw.text((x0 - 4, y), f"{10**t:.3g}" if log_scale else f"{t:g}", "#555555", font, anchor="rm")
    for i, (steps, means, least, largest) in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        if len(steps) == 1:  # too few for a band
            draw.line(places(steps, least) + places(steps, largest), colour, 1)
        if least != largest and len(places(steps, least)) > 1:
            shade = Image.new("L", image.size)
            ImageDraw.Draw(shade).polygon(places(steps, least) + places(steps, largest)[::-1], fill=60)
            image.paste(colour, mask=shade)
        points = places(steps, means)
        draw.line(points, colour, 2)
        if len(points) < 60:
            for x, y in points:
                draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)


# COMMAND LINE ---------------------------------------------------------------------------------------------------------

JPEG_EFFECT = "10,000 real MNIST images had FID[classifier] 1.3 as PNG, 3.3 as JPEG of quality 75"
CROPPED = "--real folder --data-dir DIR crops and resizes real images as the scripts do"
ARRAYS = (".npy", ".npz", ".pt", ".pth")


class Images:
    """A folder of images in the order of their names, or an array: a tensor, or a file of one (see ARRAYS).

    len(); .size; .batches(b) reads uint8 (b, channels, size, size) at a time; .formats counts the kinds of files read;
    .digest() is a hash of all bytes. Files are read once at the start, before anything costs time: those that cannot be
    are left out with a line, .bad. ValueError: more than 1 % of them, or images that cannot be scored as they are, not
    square, of several sizes."""

    def __init__(self, source, channels, name=None):
        self.path = name or source
        self.channels = channels
        self.kind = "data set"
        self.formats = Counter()
        self.bad = []
        self.size = None
        if not torch.is_tensor(source) and Path(source).suffix.lower() in ARRAYS and not Path(source).is_dir():
            source = read_array(Path(source))
            self.kind = "array"
        if torch.is_tensor(source):
            self.take_array(source)
        else:
            self.take_folder(Path(source))
        if len(self) < 2:
            raise ValueError(f"{self.path} holds {len(self)} images, where two or more are needed")

    def take_array(self, x):
        try:
            if x.dim() == 3:  # grey
                x = x[:, None]
            if x.dim() == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
                x = x.permute(0, 3, 1, 2).contiguous()  # channels last, as in TensorFlow
            if self.channels == 1 and as_images(x).shape[1] == 3 and all_grey(x):
                x = x[:, :1]
            self.items = as_images(x, sorted({1, self.channels}))
        except ValueError as e:
            raise ValueError(f"{self.path}: {e}") from None
        self.size = x.shape[3]
        if x.shape[2] != self.size:
            raise ValueError(f"{self.path}: {tuple(x.shape)}: all must be square ({CROPPED})")

    def take_folder(self, folder):
        if not folder.is_dir():
            kind = "a file, of none of these kinds" if folder.exists() else "not there"
            raise ValueError(
                f"{self.path}: a folder of images, or one of {' '.join(ARRAYS)}, is needed; this is {kind}"
            )
        found, left_out = list_images(folder)
        if left_out:
            warn_once(f"left out of {folder}: {', '.join(f'{what} ({n})' for what, n in left_out.most_common(9))}")
        self.items = [file for file in (folder / path for path in sorted(found)) if self.read(file) is not None]
        bad = f"{len(self.bad)} of {len(found)} images of {folder}: {'; '.join(self.bad[:3])}"
        if len(self.bad) > 0.01 * len(found):
            raise ValueError(f"cannot read {bad}; more than 1 %, and other images than asked for are not scored")
        if self.bad:
            warn(f"left out {bad}")
        if self.channels == 1 and not all(all_grey(read_image(file)[0][None]) for file in self.items[:10]):
            warn(f"the images of {folder} have colours, which are left out: the network that scores takes grey images")

    def __len__(self):
        return len(self.items)

    def part(self, chosen):
        """Those of the numbers `chosen`, a tensor."""
        other = copy.copy(self)
        other.formats = Counter()
        other.items = self.items[chosen] if torch.is_tensor(self.items) else [self.items[i] for i in chosen.tolist()]
        return other

    def only(self, n):
        """some(n) of them."""
        return self.part(some(torch.arange(len(self)), n))

    def read(self, path):
        """A file's image, or None and a line in .bad."""
        try:
            image, kind = read_image(path, self.channels)
        except ValueError as e:
            self.bad.append(str(e))
            return None
        height, width = image.shape[1:]
        if height != width:
            raise ValueError(f"{path} is {width}x{height}: all must be square ({CROPPED})")
        self.size = self.size or width
        if width != self.size:
            raise ValueError(f"{path} is {width} pixels wide, the first {self.size}: all must be of one ({CROPPED})")
        self.formats[kind.replace("MPO", "JPEG")] += 1  # a phone's JPEG with a second image inside
        return image

    def batches(self, size):
        self.formats.clear()
        for i in range(0, len(self), size):
            part = self.items[i : i + size]
            if torch.is_tensor(part):
                self.formats[self.kind] += len(part)
                yield part.expand(-1, self.channels, -1, -1)
            else:
                images = [self.read(file) for file in part]
                if any(image is None for image in images):
                    raise ValueError(f"{self.bad[-1]}. It could be read a moment ago")
                yield torch.stack(images)

    def digest(self):
        of_files = not torch.is_tensor(self.items)
        h = hashlib.sha256(repr((len(self), self.size, self.channels, of_files)).encode())
        if of_files:
            for file in self.items:
                data = file.read_bytes()
                h.update(len(data).to_bytes(8, "big") + data)
        else:
            h.update(self.items.contiguous().numpy())
        return h.hexdigest()

    def __str__(self):
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.formats.items()))
        return f"{self.path} ({kinds}, {self.size}x{self.size})"


def read_array(path):
    """The array in a file of ARRAYS, as a tensor. ValueError: none, or several of images."""
    try:
        if path.suffix.lower() in (".pt", ".pth"):
            loaded = torch.as_tensor(torch.load(path, map_location="cpu", weights_only=True))
            return loaded.to_dense() if loaded.is_sparse else loaded
        loaded = np.load(path)
        if isinstance(loaded, np.ndarray):
            return torch.as_tensor(loaded)
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except Exception as e:  # numpy and torch raise a different kind for each way to be damaged
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from None
    images = [a for a in arrays.values() if a.dtype == np.uint8 and a.ndim in (3, 4)]
    if len(images) != 1:
        raise ValueError(f"{path} holds {', '.join(arrays)}: one array of images, uint8 (N, C, H, W), is needed")
    return torch.as_tensor(images[0])


STATISTICS = 3  # changes when what is kept does, so that it is made anew


def cached(net, images, keep_features, folder, what):
    """embed(), but read from `folder` where the same network has seen the same images before; None: made anew."""
    if not folder:
        return embed(net, images, keep_features, what)
    device = next(net.parameters()).device
    what_is_kept = f"{net.name} {device.type} {keep_features} {STATISTICS} {images.digest()}"
    key = hashlib.sha256(what_is_kept.encode()).hexdigest()[:24]
    name = f"statistics-{key}.pt"
    for home in cache_folders(folder):
        with contextlib.suppress(Exception):  # none is there, or one cut short, which is made again
            saved = torch.load(home / name, map_location=device, weights_only=True)
            features, logits, formats = (saved.pop(part) for part in ("features", "logits", "formats"))
            moments = Moments()
            vars(moments).update(saved)
            images.formats = Counter(formats)
            return Sample(moments, features, logits)
    sample = embed(net, images, keep_features, what)
    saved = {"features": sample.features, "logits": sample.logits, "formats": dict(images.formats)}
    keep(folder, name, functools.partial(save_tensors, {**vars(sample.moments), **saved}))
    return sample


# What a score is called, its name in the JSON object, its format, and what stands beside it.
SCORE_LINES = (
    ("FID", "fid", ".4g", "floor {floor:.4g}: real images against others, n {floor_n}"),
    ("FID, training", "fid_train", ".4g", "against training images"),
    ("KID", "kid", ".4g", "spread over subsets {kid_std:.4g}"),
    ("Inception Score", "inception_score", ".2f", "spread over ten parts {inception_score_std:.2f}"),
    ("Mode Score", "mode_score", ".2f", ""),
    ("precision", "precision", ".3f", "k 3"),
    ("recall", "recall", ".3f", "k 3"),
    ("density", "density", ".3f", "k 5"),
    ("coverage", "coverage", ".3f", "k 5"),
    ("classes", "classes", "d", "of {classes_of}, shares {class_min:.1%} to {class_max:.1%}"),
    ("modes", "modes", "d", "of 1000, KL {modes_kl:.3f} to the uniform distribution"),
)


def scores_text(s, fake, real):
    """The scores of one set of fakes, for a reader."""
    what = "labels" if s["labelled"] else "quarter turns"
    accuracy = f", {s['accuracy']:.2%} of its test set's {what} right" if s["accuracy"] else ""
    lines = [f"features {s['features']}{accuracy}, n {s['n_real']} + {s['n_fake']}"]
    lines += [f"fake     {fake}", f"real     {real}"]
    for name, key, form, more in SCORE_LINES:
        if key in s:
            form = ".1f" if key.startswith("fid") and s[key] >= 1 else form  # FIDs span 1e-6 to 1e3
            parts = [more.format(**s)] if more else []
            if f"{key}_real" in s:
                parts.insert(0, f"real {format(s[f'{key}_real'], form)}")
            lines.append(f"{name:16} {format(s[key], form):>10}  {'; '.join(parts)}".rstrip())
    if not s["labelled"]:
        lines.append("no labels        so no Inception Score, no Mode Score and no classes")
    return "\n".join(lines)


def over_seeds(results):
    """{score: (mean, sample standard deviation)} over several sets of fakes, such as those of three seeds."""
    together = {}
    for _, key, _, _ in SCORE_LINES:
        values = [s[key] for s in results if key in s]
        if len(values) == len(results):
            together[key] = (float(np.mean(values)), float(np.std(values, ddof=1)))
    return together


def over_seeds_text(together, n):
    """The same for a reader."""
    lines = [f"mean and standard deviation over {n} sets of fakes"]
    for name, key, form, _ in SCORE_LINES:
        if key in together:
            mean, deviation = together[key]
            if form == "d" or (key.startswith("fid") and mean >= 1):
                form = ".1f"
            lines.append(f"{name:16} {format(mean, form):>10}  +- {format(deviation, form)}")
    return "\n".join(lines)


def main(argv=None):
    try:
        command(argv)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # 128 + SIGINT, as shells expect
    except (OSError, ValueError) as e:
        fail(e)
    except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(e):
            raise
        fail("too little memory: give a smaller --n, or smaller images")


def command(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.error = fail
    p.add_argument("--real", type=file_name, help=f"one of {', '.join(CHANNELS)}; or a folder, or an array as --fake")
    p.add_argument(
        "--split", choices=("test", "train"), default="test", help="which part of a data set named by --real"
    )
    p.add_argument(
        "--fake",
        type=file_name,
        nargs="+",
        help="a folder of images, or uint8 (N, C, H, W) or (N, H, W, C) as .npy, .npz, .pt, .pth; of several, such as "
        "those of three seeds, mean and standard deviation too",
    )
    p.add_argument("--features", choices=("classifier", "inception"), default="classifier", help="the feature network")
    p.add_argument("--weights", type=file_name, help=f"file of --features inception: {INCEPTION.rsplit('/', 1)[1]}")
    p.add_argument("--classifier", choices=CHANNELS, help="whose network gives the features; default: --real's own")
    scores = f"of {' '.join(SCORES)}; default all. fid alone keeps no features in memory"
    p.add_argument("--scores", nargs="+", choices=SCORES, default=SCORES, metavar="SCORE", help=scores)
    p.add_argument(
        "--data-dir",
        type=file_name,
        help="where data sets, networks and statistics lie, by default data; with --real folder, the images",
    )
    p.add_argument("--no-cache", action="store_true", help="neither read nor keep statistics of real images")
    p.add_argument(
        "--n", type=number(int, 1), help="images of each kind, at most; default 10000, of stacked_mnist 26000"
    )
    p.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    p.add_argument(
        "--plot", type=file_name, nargs="+", metavar="RUN", help="run directories, or their log.csv, in one plot"
    )
    p.add_argument(
        "--table", type=file_name, nargs="+", metavar="RUN", help="run directories: their final scores as Markdown"
    )
    p.add_argument("-o", "--out", type=file_name, default="curves.png", help="where --plot draws")
    args = p.parse_args(argv)
    if args.plot:
        plot(args.plot, args.out)
        return put(sys.stdout, f"{args.out}\n")
    if args.table:
        return put(sys.stdout, f"{scores_table(args.table)}\n")
    if not (args.real and args.fake):
        raise ValueError("name --real and --fake, --plot or --table")
    if "folder" in (args.real, args.classifier) and not args.data_dir:
        raise ValueError("the data set folder needs --data-dir, the folder of the images")
    args.data_dir = args.data_dir or "data"
    if args.features == "classifier" and args.weights:
        raise ValueError("--weights goes with --features inception")
    if args.features == "inception" and args.classifier:
        raise ValueError("--classifier goes with --features classifier")
    results = []
    for path in args.fake:
        scores, text = score_images(args, path)
        results.append(scores)
        if not args.json:
            put(sys.stdout, f"{text}\n")
    if len(results) == 1:
        if args.json:
            put(sys.stdout, f"{json.dumps(results[0], indent=1)}\n")
        return
    if len({s["features"] for s in results}) > 1:  # images of another size have another network
        raise ValueError("the sets of fakes are scored by different networks, so there is no mean")
    if len({s["n_fake"] for s in results}) > 1:
        warn("warning: the sets of fakes are scored at different numbers of images, on which FID depends: give --n")
    together = over_seeds(results)
    if args.json:
        mean = {key: pair[0] for key, pair in together.items()}
        deviation = {key: pair[1] for key, pair in together.items()}
        each = [{"path": str(path), **scores} for path, scores in zip(args.fake, results)]
        put(sys.stdout, f"{json.dumps({'fakes': each, 'mean': mean, 'std': deviation}, indent=1)}\n")
    else:
        put(sys.stdout, f"\n{over_seeds_text(together, len(results))}\n")


def score_images(args, fake_path):
    """Scores of one set of fakes against --real: a dict, and its text for a reader.

    The floor is the FID between two sets of real images. No generator can beat it by much. For a data set these are
    training and test images. If one of the two has fewer than n images, floor_n is their number. The other scores of
    the same two sets are kid_real, precision_real and so on.

    A folder has no such split. With --features classifier a network is trained on it. If the folder has 2,000 images or
    more, at least 1,000 of them are kept from that training, and the fakes are scored against these only: images that a
    network was trained on have other features."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    of_data_set = args.real in CHANNELS
    if not of_data_set and args.split == "train":
        raise ValueError("--split train goes with a data set's name: of a path --real takes every image")
    trained_on = args.classifier  # the data set whose network gives the features
    if not trained_on and of_data_set:
        trained_on = args.real
    by_classifier = args.features == "classifier"
    channels = CHANNELS[trained_on] if by_classifier and trained_on else 3
    fake = Images(fake_path, channels)

    @functools.cache
    def data(name, split):
        return load_data(name, args.data_dir, fake.size, split)

    if by_classifier and trained_on == "folder" and data("folder", "train")[0].shape[1] == 1:
        channels = 1  # a folder in which all pictures are grey
        fake = Images(fake_path, channels)
    others = None  # real images that are not in `real`
    if of_data_set:
        other_split = "train" if args.split == "test" else "test"
        real = Images(data(args.real, args.split)[0], channels, f"{args.real}, {args.split} set")
        others = Images(data(args.real, other_split)[0], channels, f"{args.real}, {other_split} set")
    else:
        everything = Images(args.real, channels)
        real = everything
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
        least_apart = 1000 if len(everything) >= 2000 else 1
        n_apart = max(least_apart, len(everything) // 10)
        known = order[:-n_apart]  # the numbers of the images that a network may be trained on
        unknown = order[-n_apart:]
        if by_classifier and not trained_on and n_apart >= 1000:
            others = everything.part(known)
            real = everything.part(unknown)
    n = min(args.n or enough(trained_on), len(fake), len(real))
    if others and args.split == "test":
        n = min(n, len(others))
    if n < FEWEST:
        raise ValueError(f"{n} + {n} images: a score of fewer than {FEWEST} says nothing")
    sides = {fake.size, real.size}
    if trained_on:  # its network pads 28 to 32
        sides = {padded(fake.size), padded(real.size)}
    if by_classifier and len(sides) > 1:
        raise ValueError(f"fakes of {fake.size} pixels, real images of {real.size} ({CROPPED})")
    if "folder" in (trained_on, args.real):
        home = cache_home("folder", args.data_dir)
    else:
        home = Path(args.data_dir)
    if not by_classifier:
        net = inception(args.weights, device)
    elif trained_on:
        net = classifier(trained_on, data(trained_on, "train"), data(trained_on, "test"), home, device, say=warn)
    else:
        parts = []
        for numbers in (known, unknown):
            x = torch.cat(list(everything.part(numbers).batches(1000)))
            parts.append((x, torch.full((len(numbers),), -1)))
        folder = Path(args.real).resolve()
        net = classifier(folder.stem, *parts, folder.parent, device, say=warn)
        if not others:
            warn(f"warning: the network knows most of {args.real}: 2,000 images or more avoid that")
    keep_features = set(args.scores) != {"fid"}
    wanted = [s for s in args.scores if net.labelled or s not in ("is", "mode")]
    embed_kept = functools.partial(cached, net, folder=None if args.no_cache else home)
    fake = fake.only(n)
    real = real.only(n)
    fake_sample = embed(net, fake, keep_features, "fakes")
    real_sample = embed_kept(images=real, keep_features=keep_features, what="real images")
    floor = {}
    train_sample = None
    if wanted:
        if others:
            first = embed_kept(images=others.only(n), keep_features=keep_features, what="other real images")
            second = real_sample
        else:
            size = max(2, min(n, len(order) // 2))
            first = embed_kept(images=everything.part(order[:size]), keep_features=keep_features, what="half")
            second = embed_kept(
                images=everything.part(order[size : 2 * size]), keep_features=keep_features, what="half"
            )
        of_real = compare(first, second, wanted if first.n >= 8 else [score for score in wanted if score == "fid"])
        floor = {f"{name}_real": value for name, value in of_real.items() if not name.endswith("_std")}
        if "fid_real" in floor:
            floor["floor"] = floor.pop("fid_real")
        floor["floor_n"] = first.n
        if of_data_set and args.split == "test":
            train_sample = first
    scores = compare(fake_sample, real_sample, wanted, train_sample)
    if keep_features and by_classifier and net.labelled:
        scores |= class_shares(fake_sample.logits)
        if isinstance(net, Stacked):
            scores |= mode_coverage(fake_sample.logits.argmax(1), 1000)
    scores["real"] = str(real.path)
    scores |= {"n_real": n, "n_fake": n, "features": net.name, "accuracy": net.accuracy, "labelled": net.labelled}
    scores |= {"jpeg_real": real.formats["JPEG"], "jpeg_fake": fake.formats["JPEG"]} | floor
    for images in (real, fake):
        if images.formats["JPEG"]:
            count = images.formats["JPEG"]
            warn(f"warning: {images.path} holds {count} JPEG files, whose losses are in the scores: {JPEG_EFFECT}")
    if "fid" in args.scores and n < (1000 if by_classifier else 4096):
        warn(f"warning: {n} images of each kind: FID is too large, and compares at this n only")
    elif n < 1000:
        warn(f"warning: {n} images of each kind are few: compare at this n only")
    return scores, scores_text(scores, fake, real)


if __name__ == "__main__":
    main()
