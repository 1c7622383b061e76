"""Scores of generated pictures (FID, KID, Inception and Mode Score, precision and recall, density and coverage),
rejection sampling, and plots of the runs' logs.

    python metrics.py --real mnist --fake runs/NAME/generated     a folder of PNG; or a .npy or .pt, uint8 (N, C, H, W)
    python metrics.py --real photos --fake generated --features inception --scores fid
    python metrics.py --plot runs/A runs/B -o curves.png

The features come from a small convnet that is trained here on the labelled training set, "classifier", or from the
Inception network of 2015 that published FIDs use, "inception". A classifier's FID is on a scale of its own: compare
order and ratios under one classifier (its hash is printed), never with Inception FIDs.
The functions take features and logits as tensors; everything after the network is computed in float64.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import nn
from torch.nn import functional as F

# SCORES: pure functions of features and logits ------------------------------------------------------------------------


def inception_score(logits, splits=10):
    """exp(E KL(p(y|x) || p(y))), Salimans et al. 2016 (1606.03498), section 4: 1 (worst) to K.

    logits (N, K) -> mean and population standard deviation over `splits` equal shares, taken in a fixed shuffle; a
    share of n pictures cannot score above n, so keep N / splits well above K. One split: the score of all, spread 0.
    ValueError where there are fewer pictures than splits."""
    n = len(logits)
    if n < splits:
        raise ValueError(f"{n} pictures in {splits} splits")
    order = np.random.RandomState(2020).permutation(n)  # the seed and the cuts of torch-fidelity
    p = logits.double().softmax(1)[torch.from_numpy(order).to(logits.device)]
    parts = [p[i * n // splits:(i + 1) * n // splits] for i in range(splits)]
    scores = torch.stack([kl(part, part.mean(0)).mean().exp() for part in parts])
    return scores.mean().item(), scores.std(correction=0).item()


def kl(p, q):
    """KL(p || q) in nats over the last dimension, 0 log 0 = 0."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def mode_score(logits_fake, logits_real):
    """(as printed, as meant) for logits (N, K) and (M, K).

    As the papers print it, exp(E KL(p(y|x) || p*) - KL(p(y) || p*)), p* the real marginal: p* cancels and what is left
    is the Inception Score of the whole set, exactly. As meant (Xu et al. 2018, 1806.07755): IS * exp(-KL(p(y) || p*)),
    which does fall when classes are missing: m of K classes, each certain, score m * m / K."""
    p, p_real = logits_fake.double().softmax(1), logits_real.double().softmax(1).mean(0)
    p_fake = p.mean(0)
    printed = (kl(p, p_real).mean() - kl(p_fake, p_real)).exp()
    meant = (kl(p, p_fake).mean() - kl(p_fake, p_real)).exp()
    return printed.item(), meant.item()


def mean_and_covariance(x):
    """Features (N, d) -> mean (d,) and covariance (d, d) in float64, divided by N - 1 as np.cov does."""
    x = x.double()
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / (len(x) - 1)


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al. 2017 (1706.08500), section 4.

    (C1 C2)^(1/2) has the trace of (L' C2 L)^(1/2) for any L L' = C1: symmetric, so the eigenvalues are real. Cholesky's
    L costs a thirtieth of the symmetric root, which serves where C1 is singular. ValueError: anything not finite."""
    if not all(t.isfinite().all() for t in (mean1, cov1, mean2, cov2)):
        raise ValueError("features that are not finite")
    root, singular = torch.linalg.cholesky_ex(cov1.double())
    if singular:
        values, vectors = torch.linalg.eigh(cov1.double())
        root = vectors * values.clamp(min=0).sqrt()
    trace = torch.linalg.eigvalsh(root.T @ cov2.double() @ root).clamp(min=0).sqrt().sum()
    return clamp_rounding((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace,
                          cov1.trace() + cov2.trace())


def fid(x, y):
    """Frechet distance of features (N, d) and (M, d). With fewer pictures than dimensions the trace is the nuclear norm
    of the centred product (N, M): exact, and no (d, d) matrix is made. Biased upwards by O(1/N): use equal N."""
    if min(len(x), len(y)) < 2:
        raise ValueError("a covariance needs two pictures or more")
    if max(len(x), len(y)) >= x.shape[1]:
        return frechet_distance(*mean_and_covariance(x), *mean_and_covariance(y))
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features that are not finite")
    x, y = x.double(), y.double()
    a, b = ((t - t.mean(0)) / math.sqrt(len(t) - 1) for t in (x, y))
    trace = torch.linalg.svdvals(a @ b.T).sum()
    traces = a.square().sum() + b.square().sum()
    return clamp_rounding((x.mean(0) - y.mean(0)).square().sum() + traces - 2 * trace, traces)


def clamp_rounding(distance, scale):
    """Rounding can leave a distance just below 0; more than that is an error and must be seen."""
    if distance < -1e-5 * scale - 1e-12:
        raise ArithmeticError(f"a squared distance of {distance.item()}")
    return max(distance.item(), 0.0)


class Moments:
    """Mean and covariance of features that come in batches (B, d), in float64. Fewer than d of them are kept as they
    are, for fid's exact form; from then on only sums and products about a first estimate of the mean, (d, d)."""

    def __init__(self):
        self.n, self.rows, self.shift = 0, [], None

    def add(self, x):
        if not x.isfinite().all():
            raise ValueError("features that are not finite")
        self.n += len(x)
        self.rows.append(x.double())
        if self.n >= x.shape[1]:
            x = torch.cat(self.rows)
            if self.shift is None:
                self.shift, self.sum, self.products = x.mean(0), torch.zeros_like(x[0]), x.new_zeros(2 * x.shape[1:])
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
        if min(self.n, other.n) < 2:
            raise ValueError("a covariance needs two pictures or more")
        return frechet_distance(*self.mean_and_covariance(), *other.mean_and_covariance())


def kid(real, fake, subsets=100, size=1000):
    """Kernel Inception Distance, Binkowski et al. 2018 (1801.01401), section 4: mean and standard deviation over
    `subsets` of `size` of the unbiased squared MMD under (x'y / d + 1)^3.

    Features (N, d), (M, d). 0 on average for equal laws at any size, so it may fall below 0. With fewer than `size`
    pictures the subsets are as large as there are pictures. ValueError: fewer than two."""
    size = min(size, len(real), len(fake))
    if size < 2:
        raise ValueError("a kernel distance needs two pictures or more")
    rng, values = np.random.RandomState(2020), []  # the seed and the draws of torch-fidelity
    for _ in range(subsets):
        y, x = (t[torch.from_numpy(rng.choice(len(t), size, replace=False)).to(t.device)].double()
                for t in (fake, real))
        own = sum(((t @ t.T / t.shape[1] + 1) ** 3).sum() - ((t.square().sum(1) / t.shape[1] + 1) ** 3).sum()
                  for t in (x, y))
        values.append(own / (size * (size - 1)) - 2 * ((x @ y.T / x.shape[1] + 1) ** 3).mean())
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


# Distances: a matrix product finds who is near, five times faster than measuring each pair; what it finds is measured
# directly. The product alone is off by 1e-8 of the features' size, which would lose duplicates and ties.


def nearness(x, y, y2):
    """Shares (B, d) of x (N, d) and |x - y|^2 - |x|^2 (B, M), which for each x orders the y (M, d), of squares y2 (M,).

    Each share's matrix takes the place of the one before: fresh memory would cost as much as the product."""
    out = x.new_empty(max(1, min(len(x), 2_000_000 // len(y))), len(y))
    for part in x.split(len(out)):
        yield part, torch.addmm(y2, part, y.T, alpha=-2, out=out[:len(part)])


def measured(x, y):
    return (x - y).square().sum(-1).sqrt()


def ball_radius(x, k):
    """The distance (N,) from each of x (N, d) to its k-th neighbour, itself not counted."""
    x, parts = x.double(), []
    for part, near in nearness(x, x, x.square().sum(1)):
        index = near.topk(k + 1, largest=False).indices
        parts += [measured(p[:, None], x[i]).sort(1).values[:, k] for p, i in zip(part.split(100), index.split(100))]
    return torch.cat(parts)


def coverage(real, fake, k=5, radius=None):
    """The share of real points whose ball, as wide as the distance to the k-th other real point, holds a fake one.

    Naeem et al. 2020 (2002.09797), eq. (8), the inequality strict as in their code. Features (N, d), (M, d); `radius`
    (N,) if already known. For equal laws and sizes 1 - 2^-k: .969 at k = 5."""
    radius = ball_radius(real, k) if radius is None else radius
    x, y = real.double(), fake.double()
    nearest = torch.cat([near.argmin(1) for _, near in nearness(x, y, y.square().sum(1))])
    return (measured(x, y[nearest]) < radius).double().mean().item()


def inside(points, centres, radius, closed):
    """Blocks (B, M) of a table of all: does ball j, its rim included if `closed`, hold point i?"""
    points, centres = points.double(), centres.double()
    size2 = centres.square().sum(1)
    slack = 1e-13 * (size2.max() + points.square().sum(1).max())  # the product's rounding, with room to spare
    for part, excess in nearness(points, centres, size2 - radius.square()):
        excess += part.square().sum(1, keepdim=True)
        result = excess < 0
        for i, j in zip(*(t.split(10_000) for t in (excess.abs_() <= slack).nonzero(as_tuple=True))):
            d = measured(part[i], centres[j])
            result[i, j] = d <= radius[j] if closed else d < radius[j]
        yield result


def precision_recall(real, fake, k=3, radii=None):
    """Kynkaanniemi et al. 2019 (1904.06991), eq. (1) and (2): the share of fakes within any real picture's ball, as
    wide as the distance to its k-th neighbour, and the share of real pictures within any fake's. Features (N, d),
    (M, d); `radii` (N,), (M,) if already known. One real outlier's ball can hold them all: see density."""
    radii = radii or (ball_radius(real, k), ball_radius(fake, k))
    return tuple(torch.cat([block.any(1) for block in inside(points, centres, radius, True)]).double().mean().item()
                 for points, centres, radius in ((fake, real, radii[0]), (real, fake, radii[1])))


def density_coverage(real, fake, k=5, radius=None):
    """Naeem et al. 2020 (2002.09797), eq. (7) and (8): the number of real balls around a fake, over k, on average (1
    for equal laws, more where fakes crowd), and `coverage`. Features (N, d), (M, d)."""
    radius = ball_radius(real, k) if radius is None else radius
    count = sum(block.sum().item() for block in inside(fake, real, radius, False))
    return count / (k * len(fake)), coverage(real, fake, k, radius)


# FEATURES: a small convnet, trained here; or Inception ----------------------------------------------------------------


class Classifier(nn.Module):
    """uint8 pictures (N, C, H, W) -> features (N, 128), logits (N, K). Inside, 32x32 pictures in [0, 1]."""

    def __init__(self, channels, classes):
        super().__init__()
        self.channels, layers = channels, []
        for a, b in ((channels, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU())
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        features = self.body(x)
        return features, self.head(features)

    @staticmethod
    def prepare(x):
        x = x.float() / 255
        if x.shape[-1] == 28:
            x = F.pad(x, (2, 2, 2, 2))
        return F.adaptive_avg_pool2d(x, 32) if x.shape[-1] != 32 else x

    @torch.no_grad()
    def embed(self, x):
        """uint8 (N, C, H, W) -> features (N, 128), logits (N, K), in eval mode whatever mode it was in."""
        self.eval()
        device = self.head.weight.device
        size = 100 if device.type == "cpu" else 1000  # a CPU's caches hold the maps of 100: three times as fast
        parts = [self(self.prepare(b.to(device))) for b in x.split(size)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def train_classifier(x, y, classes, device, epochs=3, say=print):
    """AdamW under a one-cycle rate, pictures shifted by up to 2 pixels. Draws from no stream of the caller's."""
    with torch.random.fork_rng([]):  # the first weights are drawn on the CPU, nothing else is
        torch.default_generator.manual_seed(0)
        net = Classifier(x.shape[1], classes).to(device, memory_format=torch.channels_last)
        rng, start, size = torch.Generator().manual_seed(0), time.time(), min(100, len(x))
        opt = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, epochs * (len(x) // size))
        for epoch in range(epochs):
            order = torch.randperm(len(x), generator=rng)
            for i in range(len(x) // size):
                index = order[i * size:(i + 1) * size]
                dx, dy = torch.randint(-2, 3, (2,), generator=rng).tolist()
                batch = net.prepare(x[index].to(device)).roll((dx, dy), (2, 3))
                loss = F.cross_entropy(net.train()(batch)[1], y[index].to(device))
                opt.zero_grad()
                loss.backward()
                opt.step()
                schedule.step()
            say(f"classifier: epoch {epoch + 1} of {epochs}, {time.time() - start:.0f} s")
    return net.eval()


class Stacked(nn.Module):
    """A classifier of single grey digits on pictures of three, red, green and blue (stacked MNIST)."""

    def __init__(self, one):
        super().__init__()
        self.one, self.batch, self.accuracy = one, one.batch, one.accuracy
        self.name = one.name.replace("/128", " on each of 3 channels/384")

    def embed(self, x):
        """uint8 (N, 3, H, W) -> features (N, 384), log-probabilities (N, 1000) of the triple, red the hundreds."""
        parts = [self.one.embed(x[:, c:c + 1]) for c in range(3)]
        r, g, b = (logits.log_softmax(1) for _, logits in parts)
        joint = r[:, :, None, None] + g[:, None, :, None] + b[:, None, None, :]
        return torch.cat([features for features, _ in parts], 1), joint.flatten(1)


@torch.random.fork_rng([])  # building a network draws its first weights: not from the caller's stream
def classifier(dataset, data_dir, device, limit=None, say=print):
    """The trained classifier of a data set, with .name ("classifier-mnist/128 HASH") and .accuracy on the test set.
    Cached as DATA_DIR/classifier-DATASET-vN.pt, apart from a `limit`ed one, which is for trying things out.
    stacked_mnist has that of mnist, one channel at a time."""
    if dataset == "stacked_mnist":
        return Stacked(classifier("mnist", data_dir, device, limit, say))
    path, net = Path(data_dir) / f"classifier-{dataset}-v1.pt", None
    if not limit and path.exists():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            net = Classifier(saved["channels"], saved["classes"])
            net.load_state_dict(saved["net"])
            net.accuracy = saved["accuracy"]
        except Exception as e:  # cut short or not ours: torch raises a different kind for each
            say(f"{path} is damaged ({type(e).__name__})")
            net = None
    if net is None:
        x, y = load_data(dataset, data_dir, 28, "train", limit)
        x_test, y_test = load_data(dataset, data_dir, 28, "test", limit)
        classes = int(max(y.max(), y_test.max())) + 1
        say(f"classifier: training once on {len(x)} pictures of {dataset}")
        net = train_classifier(x, y, classes, device, epochs=1 if limit else 3, say=say)
        net.accuracy = (net.embed(x_test)[1].argmax(1).cpu() == y_test).double().mean().item()
        saved = {"net": net.cpu().state_dict(), "accuracy": net.accuracy, "channels": x.shape[1], "classes": classes}
        try:
            if not limit:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(f".{os.getpid()}")
                torch.save(saved, temporary)
                os.replace(temporary, path)
        except (OSError, RuntimeError) as e:
            say(f"the classifier could not be kept in {path} ({e})")
    net.name, net.batch = f"classifier-{dataset}/128 {digest(net)}", 1000
    say(f"{net.name}: {net.accuracy:.2%} of the test set right")
    return net.to(device, memory_format=torch.channels_last)


def digest(net):
    return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in net.state_dict().values())).hexdigest()[:8]


INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


class Inception(nn.Module):
    """uint8 pictures (N, 1 or 3, H, W) -> features (N, 2048), logits (N, 1008): the 2015 network of published FIDs.

    Szegedy et al. 2015 (1512.00567) as TensorFlow ran it and pytorch-fid's file holds it, which torchvision's own
    Inception is not: average pools count no padding, and the last block's pool takes the maximum. Pictures are resized
    as pytorch-fid does, bilinearly, without antialiasing. The logits are without the bias, as torch-fidelity's are.
    `state` is that file's dict; RuntimeError where it does not fit."""

    channels, classes, batch = 3, 1008, 25

    def __init__(self, state):
        super().__init__()
        from torchvision.models import Inception3
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            net = Inception3(num_classes=self.classes, aux_logits=False, init_weights=False)
        for name, part in net.named_children():
            self.add_module(name, part)
        self.load_state_dict(state, assign=True)
        self.float().eval().requires_grad_(False).to(memory_format=torch.channels_last)  # 1.6 times faster on a CPU

    def forward(self, x):  # (N, 3, 299, 299) in [-1, 1]
        for stem in (self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3, self.maxpool1,
                     self.Conv2d_3b_1x1, self.Conv2d_4a_3x3, self.maxpool2):
            x = stem(x)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d):
            x = mixed_a(block, x)  # (N, 288, 35, 35)
        x = self.Mixed_6a(x)
        for block in (self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e):
            x = mixed_c(block, x)  # (N, 768, 17, 17)
        x = self.Mixed_7a(x)
        x = mixed_e(self.Mixed_7b, x, mean_pool)
        x = mixed_e(self.Mixed_7c, x, max_pool)  # (N, 2048, 8, 8)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T

    @staticmethod
    def prepare(x):
        x = F.interpolate(x.float() / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
        return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def embed(self, x):
        device = self.fc.weight.device
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 would move features by 1e-3
            parts = [self(self.prepare(b.to(device))) for b in x.split(self.batch)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def mean_pool(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, 1, 1)


def chain(x, *parts):
    for part in parts:
        x = part(x)
    return x


def mixed_a(b, x):
    return torch.cat([b.branch1x1(x), chain(x, b.branch5x5_1, b.branch5x5_2),
                      chain(x, b.branch3x3dbl_1, b.branch3x3dbl_2, b.branch3x3dbl_3),
                      chain(x, mean_pool, b.branch_pool)], 1)


def mixed_c(b, x):
    return torch.cat([b.branch1x1(x), chain(x, b.branch7x7_1, b.branch7x7_2, b.branch7x7_3),
                      chain(x, b.branch7x7dbl_1, b.branch7x7dbl_2, b.branch7x7dbl_3, b.branch7x7dbl_4,
                            b.branch7x7dbl_5),
                      chain(x, mean_pool, b.branch_pool)], 1)


def mixed_e(b, x, pool):
    y, z = b.branch3x3_1(x), chain(x, b.branch3x3dbl_1, b.branch3x3dbl_2)
    return torch.cat([b.branch1x1(x), b.branch3x3_2a(y), b.branch3x3_2b(y), b.branch3x3dbl_3a(z), b.branch3x3dbl_3b(z),
                      chain(x, pool, b.branch_pool)], 1)


def inception(weights, device):
    """The Inception of the file `weights`, or of the one that torch.hub keeps, fetched if need be; .name as above."""
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rsplit("/", 1)[1])
    try:
        if weights:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
            with quiet:
                state = torch.hub.load_state_dict_from_url(INCEPTION, map_location="cpu", check_hash=True,
                                                           weights_only=True)
        net = Inception(state)
    except Exception as e:  # no network, a file cut short or of another network: a different kind for each
        if path.exists():
            fail(f"{path} does not hold the 2015 FID Inception ({type(e).__name__}: {str(e)[:200]})")
        fail(f"no Inception weights: put {INCEPTION} into {path.parent}, or name the file by --weights "
             f"({type(e).__name__}: {e})")
    net.name, net.accuracy = f"inception-2015/2048 {digest(net)}", None
    return net.to(device)


SCORES = ("fid", "kid", "is", "mode", "pr", "dc")


class Sample:
    """What a network makes of pictures: .n, .moments and, if kept, .features (N, d) and .logits (N, K)."""

    def __init__(self, moments, features=None, logits=None):
        self.moments, self.n, self.features, self.logits, self.radii = moments, moments.n, features, logits, {}

    def radius(self, k):
        if k not in self.radii:
            self.radii[k] = ball_radius(self.features, k)
        return self.radii[k]


def embed(net, pictures, keep=True, what="pictures"):
    """A Sample of uint8 pictures (N, C, H, W), or of a Pictures, which are read as they are needed. Without `keep` no
    feature is held longer than its batch. ValueError: features that are not finite."""
    moments, features, logits = Moments(), [], []
    batches = pictures.split(net.batch) if torch.is_tensor(pictures) else pictures.batches(net.batch)
    for batch in progress(batches, len(pictures), what):
        f, l = net.embed(batch)
        moments.add(f)
        if keep:
            features.append(f)
            logits.append(l)
    return Sample(moments, torch.cat(features), torch.cat(logits)) if keep else Sample(moments)


def progress(batches, total, what):
    """The batches, and a line on stderr on how far they are: kept fresh on a terminal, every 10 s elsewhere."""
    done, start, said, live = 0, time.time(), time.time(), sys.stderr.isatty()
    for batch in batches:
        yield batch
        done += len(batch)
        now = time.time()
        if now - said > (0.5 if live else 10):
            left = (now - start) / done * (total - done)
            text = f"{what}: {done} of {total}, {left:.0f} s to go"
            sys.stderr.write(f"\r\033[K{text}" if live else text + "\n")
            sys.stderr.flush()
            said = now
    if live and said > start:
        sys.stderr.write("\r\033[K")


def compare(fake, real, scores=SCORES, train=None):
    """The `scores` of a Sample against a real one, as a dict of plain numbers; fid_train if there is a third."""
    s, n = {}, min(fake.n, real.n)
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
        k = min(3, n - 1)
        s["precision"], s["recall"] = precision_recall(real.features, fake.features, k,
                                                       (real.radius(k), fake.radius(k)))
    k = min(5, n - 1)
    if "dc" in scores:
        s["density"], s["coverage"] = density_coverage(real.features, fake.features, k, real.radius(k))
    elif "coverage" in scores:
        s["coverage"] = coverage(real.features, fake.features, k, real.radius(k))
    return s


def class_shares(logits):
    classes = logits.shape[1]
    shares = torch.bincount(logits.argmax(1), minlength=classes).double() / len(logits)
    return {"classes": int((shares >= 1 / (4 * classes)).sum()), "class_min": shares.min().item(),
            "class_max": shares.max().item()}


def mode_coverage(labels, classes):
    """Of the labels (N,) a classifier gives: the number of classes that occur (modes), and KL(their law || uniform),
    in nats; 26,000 real stacked digits have about 1,000 and 999 / (2 N) = .019. Metz et al. 2017, Lin et al. 2018."""
    p = torch.bincount(labels, minlength=classes).double() / len(labels)
    return {"modes": int((p > 0).sum()), "modes_kl": torch.xlogy(p, p * classes).sum().item()}


class Judge:
    """Scores pictures against a data set. judge(x, y=None) takes uint8 (N, C, H, W), and the labels (N,) that were
    asked for, if any; returns a dict of plain numbers:

    fid, coverage, inception_score, mode_score   against the first n test pictures; coverage's k is 5
    fid_train                                    against the first n training pictures: for choosing a checkpoint
    classes, class_min, class_max                classes with 1/(4K) of the samples or more; least and largest share
    n_real, n_fake, floor                        sizes (equal), and the FID of training against test pictures
    label_accuracy                               with y: the share that the classifier takes for what was asked
    modes, modes_kl                              stacked_mnist: mode_coverage() of n = 26,000, and of as many real ones
                                                 (modes_real, modes_kl_real)

    ValueError: fewer pictures than n, or features that are not finite."""

    def __init__(self, dataset, data_dir, image_size, device="cpu", limit=None, n=None, say=print):
        n = n or (26_000 if dataset == "stacked_mnist" else 10_000)
        device = torch.device(device)
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.net = classifier(dataset, data_dir, device, limit, say)
        train, test = (load_data(dataset, data_dir, image_size, s, limit)[0] for s in ("train", "test"))
        self.n = min(n, len(train), len(test))
        self.train, self.real = embed(self.net, train[:self.n], False), embed(self.net, test[:self.n])
        self.floor = self.train.moments.fid(self.real.moments)
        self.stacked = dataset == "stacked_mnist"

    def __call__(self, x, y=None):
        if len(x) < self.n:
            raise ValueError(f"{len(x)} pictures: {self.n} are needed, as many as real ones")
        fake = embed(self.net, x[:self.n])
        right = {} if y is None else {
            "label_accuracy": (fake.logits.argmax(1).cpu() == y[:self.n]).double().mean().item()}
        modes = {}
        if self.stacked:
            modes = mode_coverage(fake.logits.argmax(1), 1000)
            modes |= {f"{k}_real": v for k, v in mode_coverage(self.real.logits.argmax(1), 1000).items()}
        return {**compare(fake, self.real, ("fid", "is", "mode", "coverage"), self.train),
                **class_shares(fake.logits), **right, **modes, "n_real": self.n, "n_fake": self.n, "floor": self.floor,
                "features": self.net.name, "accuracy": self.net.accuracy}

    @staticmethod
    def line(s):
        return (f"FID[{s['features']}] {s['fid']:.1f} (floor {s['floor']:.1f}, n {s['n_real']} + {s['n_fake']})  "
                f"IS {s['inception_score']:.2f} +- {s['inception_score_std']:.2f}  Mode Score {s['mode_score']:.2f}  "
                f"coverage {s['coverage']:.3f}  {s['classes']} classes of {s['class_min']:.1%} to {s['class_max']:.1%}"
                + (f"  labels right {s['label_accuracy']:.1%}" if "label_accuracy" in s else "")
                + (f"  {s['modes']} of 1000 modes, KL {s['modes_kl']:.3f} (real {s['modes_real']}, "
                   f"{s['modes_kl_real']:.3f})" if "modes" in s else ""))


# REJECTION: which of a generator's pictures to keep, by their scores --------------------------------------------------


def naive(score):
    """The chance (N,) to keep a picture of this score (N,): sigmoid, as the reports do. Even for the best D this draws
    from p_g p_d / (p_g + p_d), normalised, and not from p_d; for a critic's raw score it means nothing."""
    return score.double().sigmoid()


def drs(score, top, gamma=0.0, eps=1e-8):
    """Discriminator rejection sampling: the chance (N,) to keep a picture whose score (N,) is log p_d / p_g.

    Azadi et al. 2019 (1810.06758), section 3: sigmoid(F - gamma), F = d - log(1 - exp(d - eps)), d = score - top, where
    top (a number or (N,)) is the largest score there is. Without eps and gamma it is exp(d), and what is kept follows
    p_d; a larger gamma keeps less, at a law between the two."""
    return (drs_logit(score, top, eps) - gamma).sigmoid()


def drs_logit(score, top, eps=1e-8):
    """F for scores and top (numbers or (N,)), in float64: in float32, and without expm1, it is inf at the maximum."""
    d = torch.as_tensor(score).double() - top
    return d - (-torch.expm1(d - eps)).log()


def platt(score_real, score_fake):
    """(a, b, auc): sigmoid(a score + b) is the chance that a picture is real, if as many are real as fake.

    So a score + b is log p_d / p_g, calibrated (Platt 1999). Scores (N,) of real pictures that D never saw and (M,) of
    fresh fakes; each side weighs one half. auc is the share of pairs that the scores order rightly. ValueError: a is
    not above 0, or the scores tell the two apart without a mistake: then every a does, and larger is likelier."""
    real, fake = (s.double().flatten().cpu() for s in (score_real, score_fake))
    if min(len(real), len(fake)) < 2 or not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("a calibration needs two finite scores or more of each kind")
    order = fake.sort().values
    below = torch.searchsorted(order, real) + torch.searchsorted(order, real, right=True)  # a tie counts one half
    auc = below.double().mean().item() / (2 * len(fake))
    if real.min() >= fake.max() and real.max() > fake.min():
        raise ValueError("every held-out real picture scores above every fake: there is no ratio to calibrate")
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
        raise ValueError(f"D does not rate held-out real pictures above fakes (AUC {auc:.3f}): nothing to select by")
    return a, (w[1] - w[0] * centre / scale).item(), auc


def rejected(kind, more, n, generator, head=None, percentile=60, burn_in=10_000, batch=1000, patience=1000):
    """n of a generator's pictures, kept by their scores, and a dict of what that took.

    kind        "naive" or "drs"
    more(k)     -> the next k pictures (k, ...) on the CPU and their scores (k,); z and its seeds are the caller's
    generator   draws one uniform for each picture on the CPU: same seed, same choice, whatever the batch
    head        platt's (a, b, auc): a score + b is used in place of score. A critic's score needs one
    percentile  drs: gamma is F at this percentile of the burn-in's scores; None: gamma 0
    burn_in     drs: so many pictures are drawn and dropped first to find the largest score; it rises later if need be

    The dict: attempts (up to and including the n-th kept picture, without burn_in), attempts_per_10000, acceptance, auc
    (None without a head), burn_in, warning (None, or a line for the user). ValueError: no picture was kept in
    `patience` batches in a row, or a score is NaN or +inf."""
    a, b, auc = head or (1.0, 0.0, None)

    def draw(k):
        x, score = more(k)
        score = a * score.detach().double().flatten().cpu() + b
        if score.isnan().any() or score.max() == math.inf:
            raise ValueError("scores that are not finite")
        return x, score

    drs_kind = {"naive": False, "drs": True}[kind]
    burn_in = burn_in if drs_kind else 0
    seen = [draw(min(batch, burn_in - i))[1] for i in range(0, burn_in, batch)]
    top, middle = -math.inf, None
    if seen:
        seen = torch.cat(seen)
        top = seen.max().item()
        middle = None if percentile is None else seen.quantile(percentile / 100, interpolation="lower").item()
    kept, have, attempts, barren = [], 0, 0, 0
    while have < n:
        x, score = draw(batch)
        if drs_kind:
            tops = score.cummax(0).values.clamp(min=top)  # as if one by one: what comes later has no say
            top = tops[-1].item()
            # F rises with the score, so its percentile is F at the scores' percentile, under each picture's own top
            chance = drs(score, tops, 0.0 if middle is None else drs_logit(middle, tops))
        else:
            chance = naive(score)
        index = (torch.rand(batch, generator=generator, dtype=torch.float64) < chance).nonzero().flatten()[:n - have]
        have, barren = have + len(index), 0 if len(index) else barren + 1
        attempts += batch if have < n else int(index[-1]) + 1
        kept.append(x[index])
        if barren >= patience:
            raise ValueError(f"not one of {barren * batch} pictures was kept (--reject {kind}): {have} of {n} so far")
    warning = None
    if auc is not None and auc < 0.55:
        warning = f"AUC {auc:.3f}: D hardly tells held-out real pictures from fakes, so rejection changes little"
    return torch.cat(kept), {"attempts": attempts, "attempts_per_10000": 10_000 * attempts / n,
                             "acceptance": n / attempts, "auc": auc, "burn_in": burn_in, "warning": warning}


# PLOT -----------------------------------------------------------------------------------------------------------------

COLOURS = ("#1f5fa8", "#c8452b", "#2f8f4e", "#8a4fa3", "#b58a00", "#444444")
PANELS = ("d_loss", "g_loss", "w_dist", "grad_norm", "penalty", "clipped", "d_acc", "fid", "inception_score",
          "mode_score", "coverage", "label_accuracy", "modes", "modes_kl")


def read_log(run):
    """A run directory's log.csv -> {column: (steps, values)}, rows without a value left out."""
    path = Path(run) / "log.csv" if Path(run).is_dir() else Path(run)
    try:
        rows = list(csv.DictReader(path.open(newline="")))
        return {k: ([float(r["step"]) for r in rows if r[k]], [float(r[k]) for r in rows if r[k]]) for k in rows[0]}
    except (OSError, KeyError, IndexError, ValueError, TypeError) as e:
        fail(f"{path} is not the log of a run ({type(e).__name__}: {e})")


def ticks(low, high, wanted=6):
    """Round numbers from low to high: 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / wanted
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot(runs, out, names=None):
    """Each logged column of one or several runs against the step (D updates), a panel each, as one PNG."""
    logs = [read_log(r) for r in runs]
    names = names or [Path(r).resolve().name for r in runs]
    panels = [c for c in PANELS if any(log.get(c, ((), ()))[0] for log in logs)]
    if not panels:
        fail("nothing to plot: the logs have no rows yet")
    w, h, columns = 440, 260, min(3, len(panels))
    image = Image.new("RGB", (w * columns, h * -(-len(panels) // columns) + 18 * len(runs) + 8), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for i, name in enumerate(names):
        draw.line([(14, 15 + 18 * i), (44, 15 + 18 * i)], COLOURS[i % len(COLOURS)], 3)
        draw.text((52, 15 + 18 * i), name, "black", font, anchor="lm")
    for i, column in enumerate(panels):
        x0, y0 = w * (i % columns) + 62, h * (i // columns) + 18 * len(runs) + 32
        x1, y1 = x0 + w - 80, y0 + h - 66
        log_scale = column.startswith("fid")
        curves = [(s, [math.log10(max(v, 1e-3)) if log_scale else v for v in vs])
                  for s, vs in (log.get(column, ((), ())) for log in logs)]
        values = [v for _, vs in curves for v in vs if math.isfinite(v)] or [0.0]
        low, high = min(values), max(values)
        margin = 0.04 * (high - low) if high - low > 1e-9 else 0.5
        low, high = low - margin, high + margin
        last = max(max(s, default=0) for s, _ in curves) or 1
        draw.rectangle([x0, y0, x1, y1], outline="#999999")
        draw.text((x0, y0 - 6), column + (" (log scale)" if log_scale else ""), "black", font, anchor="ls")
        for t in ticks(0, last):
            draw.text((x0 + t / last * (x1 - x0), y1 + 4), f"{t:g}", "#555555", font, anchor="mt")
        marks = ticks(low, high)
        if log_scale:  # 1, 2, 5 times powers of ten; on less than a decade, evenly spaced values
            marks = [math.log10(v) for v in (ticks(10 ** low, 10 ** high) if high - low < 1 else
                                             [m * 10 ** k for k in range(-3, 9) for m in (1, 2, 5)])]
        for t in (t for t in marks if low <= t <= high):
            y = y1 - (t - low) / (high - low) * (y1 - y0)
            draw.line([(x0, y), (x1, y)], "#e4e4e4")
            draw.text((x0 - 4, y), f"{10 ** t:.3g}" if log_scale else f"{t:g}", "#555555", font, anchor="rm")
        for j, (s, vs) in enumerate(curves):
            points = [(x0 + a / last * (x1 - x0), y1 - (v - low) / (high - low) * (y1 - y0))
                      for a, v in zip(s, vs) if math.isfinite(v)]
            draw.line(points, COLOURS[j % len(COLOURS)], 2)
            for a, b in points if len(points) < 60 else ():
                draw.ellipse([a - 2, b - 2, a + 2, b + 2], fill=COLOURS[j % len(COLOURS)])
    try:
        image.save(out)
    except (OSError, ValueError) as e:
        fail(f"-o {out}: {e}")


# COMMAND LINE ---------------------------------------------------------------------------------------------------------


JPEG_EFFECT = "10,000 real MNIST pictures had FID[classifier] 1.76 as PNG, 3.9 as JPEG of quality 75, 1.8 of quality 95"
SUFFIXES = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Pictures:
    """A folder of pictures in the order of their names, or a .npy or .pt of uint8 (N, C, S, S), or such a tensor.

    len(); .size; .batches(b) reads uint8 (b, channels, size, size) at a time; .formats counts the kinds of files read;
    .digest() is a hash of all bytes. Whatever cannot be scored rightly ends in one line: unreadable, not square, of
    several sizes, of more than 8 bits a channel, or with see-through parts."""

    def __init__(self, source, channels, name=None):
        self.path, self.channels, self.files, self.x = name or source, channels, [], None
        self.formats = Counter()
        try:
            if torch.is_tensor(source):
                self.x = source
            elif Path(source).suffix in (".npy", ".pt"):
                load = np.load if Path(source).suffix == ".npy" else functools.partial(torch.load, weights_only=True)
                self.x = torch.as_tensor(load(source))
            else:
                self.files = sorted(f for f in Path(source).iterdir() if f.suffix.lower() in SUFFIXES)
        except Exception as e:  # numpy and torch raise a different kind for each way to be damaged
            fail(f"{source}: {type(e).__name__}: {e}")
        if self.x is None:
            if len(self.files) < 2:
                fail(f"{source} holds {len(self.files)} .png or .jpg: a covariance needs two or more")
            self.size = read_picture(self.files[0], channels)[0].shape[-1]
            return
        shape = tuple(self.x.shape)
        if (len(shape) != 4 or self.x.dtype != torch.uint8 or shape[0] < 2 or shape[2] != shape[3] or shape[3] < 1
                or shape[1] not in (channels, 1)):
            fail(f"{self.path}: {self.x.dtype} {shape} is not uint8 (2 or more, {channels}, S, S)")
        self.size = shape[3]

    def __len__(self):
        return len(self.files) if self.x is None else len(self.x)

    def first(self, n):
        """Only the first n from now on."""
        self.files, self.x = self.files[:n], None if self.x is None else self.x[:n]
        return self

    def batches(self, size):
        if self.x is not None:
            self.formats["array" if Path(str(self.path)).suffix in (".npy", ".pt") else "data set"] = len(self)
            for part in self.x.split(size):
                yield part.expand(-1, self.channels, -1, -1)
            return
        self.formats.clear()
        for i in range(0, len(self.files), size):
            batch = []
            for f in self.files[i:i + size]:
                picture, kind = read_picture(f, self.channels)
                if picture.shape[-1] != self.size:
                    fail(f"{f} is {picture.shape[-1]} pixels wide, the first {self.size}: all must be of one size")
                batch.append(picture)
                self.formats[kind] += 1
            yield torch.stack(batch)

    def digest(self):
        h = hashlib.sha256(repr((len(self), self.size, self.channels, self.x is None)).encode())
        if self.x is not None:
            h.update(self.x.contiguous().numpy())
        for f in self.files:
            try:
                data = f.read_bytes()
            except OSError as e:
                fail(f"{f}: {e}")
            h.update(len(data).to_bytes(8, "big") + data)
        return h.hexdigest()

    def __str__(self):
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.formats.items()))
        return f"{self.path} ({kinds}, {self.size}x{self.size})"

    def jpegs(self):
        return sum(n for kind, n in self.formats.items() if kind in ("JPEG", "MPO"))


def read_picture(path, channels):
    """uint8 (channels, S, S) and the kind of file, by its content."""
    try:
        with Image.open(path) as im:
            if im.mode[0] in "IF" or any("16" in str(tile[3]) for tile in im.tile):
                fail(f"{path} has more than 8 bits a channel ({im.mode})")
            if im.has_transparency_data and im.convert("RGBA").getextrema()[3][0] < 255:
                fail(f"{path} is see-through in parts: what colour is behind it?")
            kind, x = im.format, np.array(im.convert("L" if channels == 1 else "RGB"))
    except SystemExit:
        raise
    except Exception as e:  # Pillow raises a different kind for each damage
        fail(f"{path} cannot be read: {type(e).__name__}: {e}")
    if x.shape[0] != x.shape[1]:
        fail(f"{path} is {x.shape[1]}x{x.shape[0]}: all must be square")
    return torch.from_numpy(x)[None] if channels == 1 else torch.from_numpy(x).permute(2, 0, 1), kind


def cached(net, pictures, keep, folder, what):
    """embed(), but read from `folder` where the same network has seen the same pictures before; None: made anew."""
    path, sample = None, None
    if folder:
        key = f"{net.name} {next(net.parameters()).device.type} {keep} 1 {pictures.digest()}"
        path = Path(folder) / f"statistics-{hashlib.sha256(key.encode()).hexdigest()[:24]}.pt"
    if path and path.exists():
        try:
            saved = torch.load(path, map_location=next(net.parameters()).device, weights_only=True)
            sample = Sample(Moments(), saved.pop("features", None), saved.pop("logits", None))
            pictures.formats.update(saved.pop("formats"))
            sample.moments.__dict__.update(saved)
            sample.n = sample.moments.n
        except Exception:  # cut short: made again
            sample = None
    if sample is None:
        sample = embed(net, pictures, keep, what)
        if path:
            saved = {**vars(sample.moments), "formats": dict(pictures.formats)}
            if keep:
                saved.update(features=sample.features, logits=sample.logits)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(f".{os.getpid()}")
                torch.save(saved, temporary)
                os.replace(temporary, path)
            except (OSError, RuntimeError) as e:
                say(f"the real pictures' statistics could not be kept in {folder} ({e})")
    return sample


def say(text):
    print(text, file=sys.stderr)


def table(s, fake, real):
    """The scores for a reader."""
    rows = [("FID", "fid", ".4g", "floor {floor:.4g}: real training against test pictures" if "floor" in s else ""),
            ("FID, training", "fid_train", ".4g", "against training pictures"),
            ("KID", "kid", ".4g", "+- {kid_std:.4g}"),
            ("Inception Score", "inception_score", ".2f", "+- {inception_score_std:.2f}"),
            ("Mode Score", "mode_score", ".2f", ""), ("precision", "precision", ".3f", "k 3"),
            ("recall", "recall", ".3f", "k 3"), ("density", "density", ".3f", "k 5"),
            ("coverage", "coverage", ".3f", "k 5"),
            ("classes", "classes", "d", "of {class_min:.1%} to {class_max:.1%}"),
            ("modes", "modes", "d", "of 1000, KL {modes_kl:.3f} to the uniform law")]
    accuracy = f", {s['accuracy']:.2%} of its test set right" if s["accuracy"] else ""
    lines = [f"features {s['features']}{accuracy}, n {s['n_real']} + {s['n_fake']}", f"fake     {fake}",
             f"real     {real}"]
    for name, key, form, more in rows:
        if key in s:
            value = format(s[key], ".1f" if key.startswith("fid") and s[key] >= 1 else form)  # FIDs span 1e-6 to 1e3
            lines.append(f"{name:16} {value:>10}  {more.format(**s)}".rstrip())
    return "\n".join(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.error = fail
    p.add_argument("--real", help=f"the test set of {', '.join(DATASETS)}; or a folder, a .npy or a .pt")
    p.add_argument("--fake", help="a folder of PNG, or a .npy or .pt of uint8 (N, C, H, W)")
    p.add_argument("--features", choices=("classifier", "inception"), default="classifier", help="the feature network")
    p.add_argument("--weights", help=f"file of --features inception: {INCEPTION.rsplit('/', 1)[1]}")
    p.add_argument("--classifier", choices=DATASETS, help="whose classifier gives the features; default: --real's")
    p.add_argument("--scores", nargs="+", choices=SCORES, default=SCORES, metavar="SCORE",
                   help=f"of {' '.join(SCORES)}; default all. fid alone keeps no features in memory")
    p.add_argument("--data-dir", default="data", help="folder of the data sets, the classifier and real statistics")
    p.add_argument("--no-cache", action="store_true", help="neither read nor keep statistics of real pictures")
    p.add_argument("--n", type=int, default=10_000, help="pictures of each kind, at most")
    p.add_argument("--json", action="store_true", help="print the scores as JSON")
    p.add_argument("--plot", nargs="+", metavar="RUN", help="run directories, or their log.csv, in one plot")
    p.add_argument("-o", "--out", default="curves.png", help="where --plot draws")
    args = p.parse_args(argv)
    if args.plot:
        plot(args.plot, args.out)
        return print(args.out)
    if not (args.real and args.fake):
        fail("name --real and --fake, or --plot")
    name = args.classifier or (args.real if args.real in DATASETS else None)
    if args.features == "classifier" and not name:
        fail(f"--real {args.real} is no data set's name: say whose features to use by --classifier")
    if args.features == "classifier" and args.weights:
        fail("--weights goes with --features inception")
    if args.n < 2:
        fail(f"--n {args.n}: a covariance needs two pictures or more")
    channels = DATASETS[name] if args.features == "classifier" else 3
    fake = Pictures(args.fake, channels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.features == "inception":
        name = args.real if args.real in DATASETS else None
        net = inception(args.weights, device)
    else:
        net = classifier(name, args.data_dir, device, say=say)
    if name:
        train, test = (Pictures(load_data(name, args.data_dir, fake.size, split)[0], channels, f"{name}, {split} set")
                       for split in ("train", "test"))
    real = test if args.real == name else Pictures(
        load_data(args.real, args.data_dir, fake.size, "test")[0] if args.real in DATASETS else args.real, channels,
        f"{args.real}, test set" if args.real in DATASETS else None)
    n = min(args.n, len(fake), len(real), *((len(train), len(test)) if name else ()))
    keep, folder = set(args.scores) != {"fid"}, None if args.no_cache else args.data_dir
    try:
        floor = train_sample = None
        real_sample = cached(net, real.first(n), keep, folder, "real pictures")
        if name and "fid" in args.scores:
            train_sample = cached(net, train.first(n), False, folder, "training pictures")
            test_sample = real_sample if test is real else cached(net, test.first(n), False, folder, "test pictures")
            floor = train_sample.moments.fid(test_sample.moments)
        fake_sample = embed(net, fake.first(n), keep, "fakes")
        scores = compare(fake_sample, real_sample, args.scores, train_sample)
        if keep and args.features == "classifier":
            scores.update(class_shares(fake_sample.logits))
            if isinstance(net, Stacked):
                scores.update(mode_coverage(fake_sample.logits.argmax(1), 1000))
    except ValueError as e:
        fail(f"{args.fake}, {args.real}: {e}")
    scores.update(n_real=n, n_fake=n, features=net.name, accuracy=net.accuracy,
                  jpeg_real=real.jpegs(), jpeg_fake=fake.jpegs())
    if floor is not None:
        scores["floor"] = floor
    for pictures in (real, fake):
        if pictures.jpegs():
            say(f"warning: {pictures.path} holds {pictures.jpegs()} JPEG files, whose losses are part of the scores: "
                f"{JPEG_EFFECT}")
    if args.features == "inception" and n < 4096 and "fid" in args.scores:
        say(f"warning: {n} pictures in 2,048 dimensions: FID is far too large, and compares at this n only")
    print(json.dumps(scores, indent=1) if args.json else table(scores, fake, real))


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


if __name__ == "__main__":
    main()
