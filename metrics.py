"""Scores of generated pictures (FID, KID, Inception and Mode Score, precision and recall, density and coverage),
rejection sampling, and what a training asks for: scores on the way, figures, plots of the logs.

    python metrics.py --real mnist --fake runs/NAME/generated     a folder of PNG; or a .npy or .pt, uint8 (N, C, H, W)
    python metrics.py --real photos --fake generated              a folder against a folder: no labels, no download
    python metrics.py --real photos --fake generated --features inception --scores fid
    python metrics.py --plot runs/A runs/B -o curves.png          runs that differ in the seed alone become one band
    python metrics.py --table runs/A runs/B                       their final scores, mean and deviation over seeds

    from metrics import fid, kid, inception_score, density_coverage       on features and logits, tensors (N, d), (N, K)

The sections: SCORES, functions of features and logits; FEATURES, the networks that give them; JUDGE, a data set's own
scale; REJECTION; STUDY, for the scripts; PLOT, logs and final scores; COMMAND LINE.

The features come from a small convnet that is trained on the data set itself, on its labels or, where there are fewer
than two, on telling by how many quarter turns a picture was rotated; or from the Inception network of 2015 that
published FIDs use. A small network's FID is on a scale of its own: compare order and ratios under one network (its hash
is printed), never with Inception FIDs. Everything after the network is computed in float64. The functions raise
ValueError where there is no answer: NaN, infinity, nothing to score, fewer rows than they need.
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
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import fx, nn
from torch.nn import functional as F

# SCORES: pure functions of features and logits ------------------------------------------------------------------------

def checked(least, *tables):
    """Features or logits (N, d) in float64. ValueError: no such table, fewer than `least` rows, other widths, NaN."""
    for t in tables:
        if not torch.is_tensor(t) or t.dim() != 2 or t.shape[1] != tables[0].shape[1]:
            raise ValueError(f"tensors of rows of one width are needed, not {[tuple(np.shape(t)) for t in tables]}")
        if len(t) < least:
            raise ValueError(f"{len(t)} rows, where {least} or more are needed")
        if not t.isfinite().all():
            raise ValueError("features or logits that are not finite")
    return [t.double() for t in tables]

def inception_score(logits, splits=10):
    """exp(E KL(p(y|x) || p(y))), Salimans et al. 2016 (1606.03498), section 4: 1 (worst) to K.

    logits (N, K) -> mean and population standard deviation over `splits` equal shares, taken in a fixed shuffle; a
    share of n pictures cannot score above n, so keep N / splits well above K. One split: the score of all, spread 0.
    ValueError where there are fewer pictures than splits."""
    (logits,), n = checked(max(1, splits), logits), len(logits)
    order = np.random.RandomState(2020).permutation(n)  # the seed and the cuts of torch-fidelity
    p = logits.softmax(1)[torch.from_numpy(order).to(logits.device)]
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
    logits_fake, logits_real = checked(1, logits_fake, logits_real)
    p, p_real = logits_fake.softmax(1), logits_real.softmax(1).mean(0)
    p_fake = p.mean(0)
    printed = (kl(p, p_real).mean() - kl(p_fake, p_real)).exp()
    meant = (kl(p, p_fake).mean() - kl(p_fake, p_real)).exp()
    return printed.item(), meant.item()

def mean_and_covariance(x):
    """Features (N, d) -> mean (d,) and covariance (d, d) in float64, divided by N - 1 as np.cov does."""
    (x,) = checked(2, x)
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
    x, y = checked(2, x, y)
    if max(len(x), len(y)) >= x.shape[1]:
        return frechet_distance(*mean_and_covariance(x), *mean_and_covariance(y))
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
        checked(0, x)
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
        if self.shift is None: return mean_and_covariance(torch.cat(self.rows))
        cov = (self.products - torch.outer(self.sum, self.sum) / self.n) / (self.n - 1)
        return self.shift + self.sum / self.n, cov

    def fid(self, other):
        """As fid() of all the features."""
        if self.shift is None and other.shift is None:
            return fid(torch.cat(self.rows), torch.cat(other.rows))
        return frechet_distance(*self.mean_and_covariance(), *other.mean_and_covariance())

def kid(real, fake, subsets=100, size=1000):
    """Kernel Inception Distance, Binkowski et al. 2018 (1801.01401), section 4: mean and standard deviation over
    `subsets` of `size` of the unbiased squared MMD under (x'y / d + 1)^3.

    Features (N, d), (M, d). 0 on average for equal laws at any size, so it may fall below 0. Subsets have at most half
    the rows: as large as the whole they would all be the same, and their spread 0. ValueError: fewer than four rows."""
    real, fake = checked(4, real, fake)
    size = min(size, len(real) // 2, len(fake) // 2)
    if size < 2:
        raise ValueError(f"subsets of {size}: a kernel distance needs two rows or more")
    rng, values = np.random.RandomState(2020), []  # the seed and the draws of torch-fidelity
    for _ in range(subsets):
        y, x = (t[torch.from_numpy(rng.choice(len(t), size, replace=False)).to(t.device)] for t in (fake, real))
        own = sum(((t @ t.T / t.shape[1] + 1) ** 3).sum() - ((t.square().sum(1) / t.shape[1] + 1) ** 3).sum()
                  for t in (x, y))
        values.append(own / (size * (size - 1)) - 2 * ((x @ y.T / x.shape[1] + 1) ** 3).mean())
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()

# Distances: a matrix product finds who is near, five times faster than measuring each pair; what it finds is measured
# directly. The product alone is off by 1e-8 of the features' size, which would lose duplicates and ties; so they are
# taken about their mean.

def nearness(x, y, y2):
    """Shares (B, d) of x (N, d) and |x - y|^2 - |x|^2 (B, M), which for each x orders the y (M, d), of squares y2 (M,).

    Each share's matrix takes the place of the one before: fresh memory would cost as much as the product."""
    out = x.new_empty(max(1, min(len(x), 2_000_000 // len(y))), len(y))
    for part in x.split(len(out)):
        yield part, torch.addmm(y2, part, y.T, alpha=-2, out=out[:len(part)])

def measured(x, y):
    return (x - y).square().sum(-1).sqrt()

def ball_radius(x, k):
    """The distance (N,) from each of x (N, d) to its k-th neighbour, itself not counted. ValueError: only k rows."""
    (x,), parts = checked(k + 1, x), []
    x = x - x.mean(0)
    for part, near in nearness(x, x, x.square().sum(1)):
        index = near.topk(k + 1, largest=False).indices
        parts += [measured(p[:, None], x[i]).sort(1).values[:, k] for p, i in zip(part.split(100), index.split(100))]
    return torch.cat(parts)

def coverage(real, fake, k=5, radius=None):
    """The share of real points whose ball, as wide as the distance to the k-th other real point, holds a fake one.

    Naeem et al. 2020 (2002.09797), eq. (8), the inequality strict as in their code. Features (N, d), (M, d); `radius`
    (N,) if already known. For equal laws and sizes 1 - 2^-k: .969 at k = 5."""
    radius = ball_radius(real, k) if radius is None else radius
    x, y = (t - real.double().mean(0) for t in checked(1, real, fake))
    checked(len(x), radius[:, None])
    nearest = torch.cat([near.argmin(1) for _, near in nearness(x, y, y.square().sum(1))])
    return (measured(x, y[nearest]) < radius).double().mean().item()

def inside(points, centres, radius, closed):
    """Blocks (B, M) of a table of all: does ball j, its rim included if `closed`, hold point i?"""
    points, centres = (t - centres.double().mean(0) for t in checked(1, points, centres))
    checked(len(centres), radius[:, None])
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

def as_pictures(x, *channels):
    """x, if it is uint8 (N, C, H, W), C one of `channels` if any are named. ValueError: floats, whose scale is unknown,
    and every other shape."""
    if (not torch.is_tensor(x) or x.dtype != torch.uint8 or x.dim() != 4 or 0 in x.shape[1:]
            or x.shape[1] not in (channels or x.shape)):
        kind = getattr(x, "dtype", type(x))
        raise ValueError(f"pictures are uint8 (N, C, H, W), C of {channels or 'any'}, not {kind} {tuple(np.shape(x))}")
    return x

class Classifier(nn.Module):
    """uint8 pictures (N, C, S, S) -> features (N, 128), logits (N, K). Inside, 32x32 pictures in [0, 1]. It judges the
    side it was trained at, if .side is set: what is pooled from another side looks different."""

    batch, side = 1000, None

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
        """A 28x28 picture is padded to 32 as load_data pads it: MNIST at 28 and at 32 are one scale."""
        x = x.float() / 255
        if x.shape[-1] == 28:
            x = F.pad(x, (2, 2, 2, 2))
        return F.adaptive_avg_pool2d(x, 32) if x.shape[-1] != 32 else x

    @torch.no_grad()
    def embed(self, x):
        """uint8 (N, C, S, S) -> features (N, 128), logits (N, K), in eval mode whatever mode it was in."""
        side = padded(as_pictures(x, self.channels).shape[-1])
        if self.side not in (None, side):
            raise ValueError(f"pictures of {side} pixels, where the network was trained on {self.side}")
        self.eval()
        device = self.head.weight.device
        size = 100 if device.type == "cpu" else 1000  # a CPU's caches hold the maps of 100: three times as fast
        with exact():
            parts = [self(self.prepare(b.to(device))) for b in x.split(size)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

def padded(side):
    return 32 if side == 28 else side

def turned(x, quarters):
    """Pictures (N, C, S, S), each rotated by its number (N,) of quarter turns."""
    out = x.clone()
    for k in (1, 2, 3):
        out[quarters == k] = torch.rot90(x[quarters == k], k, (2, 3))
    return out

def train_classifier(x, y, classes, device, epochs=None, say=print):
    """A Classifier of uint8 pictures (N, C, H, W) and labels (N,); y None: of rotations (Gidaris et al. 2018,
    1803.07728). AdamW under a one-cycle rate, pictures shifted by up to 2 pixels, 180,000 pictures in all (3 to 20
    epochs); weights rounded to half precision, in which they are kept. Draws from no stream of the caller's."""
    epochs = epochs or min(20, max(3, 180_000 // len(x)))
    with torch.random.fork_rng([]):  # the first weights are drawn on the CPU, nothing else is
        torch.default_generator.manual_seed(0)
        net = Classifier(x.shape[1], classes).to(device, memory_format=torch.channels_last)
        rng, start, size = torch.Generator().manual_seed(0), time.time(), min(100, len(x))
        opt = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, epochs * (len(x) // size))
        for epoch in range(epochs):
            for index in torch.randperm(len(x), generator=rng)[:len(x) // size * size].split(size):
                label = torch.randint(4, (size,), generator=rng) if y is None else y[index]
                dx, dy = torch.randint(-2, 3, (2,), generator=rng).tolist()
                batch = turned(x[index], label) if y is None else x[index]
                batch = net.prepare(batch.to(device)).roll((dx, dy), (2, 3))
                loss = F.cross_entropy(net.train()(batch)[1], label.to(device))
                opt.zero_grad()
                loss.backward()
                opt.step()
                schedule.step()
            if (epoch + 1) % max(1, epochs // 3) == 0:
                say(f"the scores' network: epoch {epoch + 1} of {epochs}, {time.time() - start:.0f} s")
    return net.half().float().eval()

class Stacked(nn.Module):
    """A classifier of single grey digits on pictures of three, red, green and blue (stacked MNIST)."""

    def __init__(self, one):
        super().__init__()
        self.one, self.batch, self.accuracy, self.labelled = one, one.batch, one.accuracy, True
        self.name = one.name.replace("/128", " on each of 3 channels/384")

    def embed(self, x):
        """uint8 (N, 3, H, W) -> features (N, 384), log-probabilities (N, 1000) of the triple, red the hundreds."""
        parts = [self.one.embed(x[:, c:c + 1]) for c in range(3)]
        r, g, b = (logits.log_softmax(1) for _, logits in parts)
        joint = r[:, :, None, None] + g[:, None, :, None] + b[:, None, None, :]
        return torch.cat([features for features, _ in parts], 1), joint.flatten(1)

JUDGES = Path(__file__).parent / "tests" / "judges"  # networks that come with the collection: one scale for everyone

@torch.random.fork_rng([])  # building a network draws its first weights: not from the caller's stream
def classifier(dataset, train, test, folder=None, device="cpu", epochs=None, say=print):
    """The network that scores pictures like these: `train` and `test` are (pictures uint8 (N, C, S, S), labels (N,)).

    It reads labels where there are two classes or more, else how a picture was rotated. .name is "TASK-DATASET-SIDE/128
    HASH", .accuracy its share right on the test pictures, .labelled whether its logits are of labels. Looked for in
    `folder` (None: neither read nor kept), then beside metrics.py, under a name that changes with the pictures; else
    trained, in one or two minutes on two cores. stacked_mnist has the network of single digits, a channel at a time."""
    if dataset == "stacked_mnist" and train[1].min() >= 0:  # not a folder that is called so
        red = [(x[:, :1], y // 100) for x, y in (train, test)]
        return Stacked(classifier("mnist", *red, folder, device, epochs, say))
    (x, y), (x_test, y_test) = train, test
    labelled = len(y.unique()) > 1 and bool(min(y.min(), y_test.min()) >= 0)
    classes, task = (int(max(y.max(), y_test.max())) + 1, "classifier") if labelled else (4, "rotation")
    side, key, net = padded(x.shape[-1]), picture_key(x, y), None
    name = f"{task}-{dataset}-{side}-{key}.pt"
    paths = [*([Path(folder) / name] if folder else []), JUDGES / f"{dataset}.pt"]
    for path in (p for p in paths if net is None and p.exists()):
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if key in saved["pictures"]:
                net = Classifier(x.shape[1], classes)
                net.load_state_dict(saved["net"])  # half precision into float32
                net.accuracy = saved["accuracy"]
        except Exception as e:  # cut short or not ours: torch raises a different kind for each
            say(f"{path} is damaged ({type(e).__name__})")
            net = None
    y_test = y_test if labelled else torch.arange(len(x_test)) % 4
    if net is None:
        say(f"training the network that scores, once, on {len(x)} pictures: {task} of {dataset}")
        net = train_classifier(x, y if labelled else None, classes, torch.device(device), epochs, say)
        net.accuracy = (net.embed(x_test if labelled else turned(x_test, y_test))[1].argmax(1).cpu()
                        == y_test).double().mean().item()
        if folder:
            weights = {k: v.half() if v.is_floating_point() else v for k, v in net.cpu().state_dict().items()}
            keep(Path(folder) / name, {"net": weights, "accuracy": net.accuracy, "pictures": [key]}, say)
    net.labelled, net.side, net.name = labelled, side, f"{task}-{dataset}-{side}/128 {digest(net)}"
    chance = y_test.bincount().max().item() / len(y_test)  # one answer to all
    say(f"{net.name}: {net.accuracy:.2%} of the test set's {'labels' if labelled else 'rotations'} right"
        + f": little better than chance ({chance:.0%}), so its scores mean little"
        * (net.accuracy - chance < 0.13 * (1 - chance)))
    return net.to(device, memory_format=torch.channels_last)

def picture_key(x, y):
    """A hash of pictures and labels, the same for MNIST at 28 and padded to 32."""
    x = F.pad(x, (2, 2, 2, 2)) if x.shape[-1] == 28 else x
    key = hashlib.sha256(x.contiguous().numpy())  # as they lie: tobytes would double them
    key.update(y.contiguous().numpy())
    return key.hexdigest()[:12]

def keep(path, what, say):
    """torch.save by way of a temporary file; a folder that cannot be written to costs a line and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        torch.save(what, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        say(f"not kept for the next run: {path} ({e})")

def digest(net):
    return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in net.state_dict().values())).hexdigest()[:8]

INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"

class Inception(nn.Module):
    """uint8 pictures (N, 1 or 3, H, W) -> features (N, 2048), logits (N, 1008): the 2015 network of published FIDs.

    Szegedy et al. 2015 (1512.00567) as TensorFlow ran it and pytorch-fid's file holds it, which torchvision's own
    Inception is not: average pools count no padding, and the last block's pool takes the maximum. Pictures are resized
    as pytorch-fid does, bilinearly, without antialiasing. The logits are without the bias, as torch-fidelity's are.
    `state` is that file's dict; RuntimeError where it does not fit."""

    batch = 25  # pictures at a time

    def __init__(self, state):
        super().__init__()
        from torchvision.models import Inception3
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            net = Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
        net.load_state_dict(state, assign=True)
        fc, net.fc = net.fc, nn.Identity()
        self.body, self.fc = fx.symbolic_trace(net), fc  # torchvision's forward, whose calls can be changed
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

    @torch.no_grad()
    def embed(self, x):
        device = self.fc.weight.device
        with exact():
            parts = [self(self.prepare(b.to(device))) for b in as_pictures(x, 1, 3).split(self.batch)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

def inception(weights, device):
    """The Inception of the file `weights`, or of the one that torch.hub keeps, fetched if need be; .name as above.
    ValueError where there is no such file or it holds another network."""
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rsplit("/", 1)[1])
    try:
        if not (weights or path.exists()):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, path, path.stem.rsplit("-", 1)[1], sys.stderr.isatty())
        net = Inception(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:  # no network, a file cut short or of another network: a different kind for each
        if weights and not path.exists():
            raise ValueError(f"--weights {path}: no such file") from None
        if path.exists():
            raise ValueError(f"{path} does not hold the 2015 FID Inception ({type(e).__name__}: {str(e)[:99]})") from e
        raise ValueError(f"no Inception weights: put {INCEPTION} into {path.parent}, or name the file by --weights "
                         f"({type(e).__name__}: {e})") from None
    net.name, net.accuracy, net.labelled = f"inception-2015/2048 {digest(net)}", None, True
    return net.to(device)

# JUDGE: samples against a data set ------------------------------------------------------------------------------------

SCORES = ("fid", "kid", "is", "mode", "pr", "dc")

class Sample:
    """What a network makes of pictures: .n, .moments; if kept, .features (N, d), .logits (N, K) and .radius(k) (N,)."""

    def __init__(self, moments, features=None, logits=None):
        self.moments, self.n, self.features, self.logits = moments, moments.n, features, logits
        self.radius = functools.cache(functools.partial(ball_radius, features))

def embed(net, pictures, keep=True, what="pictures"):
    """A Sample of uint8 pictures (N, C, H, W), or of a Pictures, which are read as they are needed. Without `keep` no
    feature is held longer than its batch. ValueError: pictures of another kind, features that are not finite."""
    moments, kept = Moments(), []
    batches = pictures.batches(net.batch) if hasattr(pictures, "batches") else as_pictures(pictures).split(net.batch)
    for batch in progress(batches, len(pictures), what):
        features, logits = net.embed(batch)
        moments.add(features)
        if keep: kept.append((features, logits))
    return Sample(moments, *map(torch.cat, zip(*kept)))

def progress(batches, total, what):
    """The batches, and a line on stderr on how far they are: kept fresh on a terminal, every 10 s elsewhere."""
    done, start, said, live = 0, time.time(), time.time(), sys.stderr.isatty()
    for batch in batches:
        yield batch
        done += len(batch)
        now = time.time()
        if now - said > (0.5 if live else 10):
            text = f"{what}: {done} of {total}, {(now - start) / done * (total - done):.0f} s to go"
            print(f"\r\033[K{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)
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
    (logits,), classes = checked(1, logits), logits.shape[1]
    shares = torch.bincount(logits.argmax(1), minlength=classes).double() / len(logits)
    return {"classes": int((shares >= 1 / (4 * classes)).sum()), "class_min": shares.min().item(),
            "class_max": shares.max().item()}

def mode_coverage(labels, classes):
    """Of the labels (N,) a classifier gives: the number of classes that occur (modes), and KL(their law || uniform),
    in nats; 26,000 real stacked digits have about 1,000 and 999 / (2 N) = .019. Metz et al. 2017, Lin et al. 2018."""
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels of 0 to {classes - 1} are needed")
    p = torch.bincount(labels, minlength=classes).double() / len(labels)
    return {"modes": int((p > 0).sum()), "modes_kl": torch.xlogy(p, p * classes).sum().item()}

FEWEST = 50  # pictures of a kind, below which a score is no score; below 1,000 it is printed with a warning

class TooFew(ValueError): """Too few pictures for any score."""

def enough(dataset):
    """How many pictures of each kind are scored, where there are as many."""
    return 26_000 if dataset == "stacked_mnist" else 10_000

def some(items, n):
    """n of pictures (N, C, H, W) or of a list of files, always the same, in their order. The first n are no sample:
    classes may lie together, or writers (between the halves of MNIST's test set FID is 31, between random halves 2)."""
    chosen = torch.randperm(len(items), generator=torch.Generator().manual_seed(2020))[:n].sort().values
    return items[chosen] if torch.is_tensor(items) else [items[i] for i in chosen]

class Judge:
    """Scores pictures against a data set. judge(x, y=None) takes uint8 (N, C, S, S), and the labels (N,) that were
    asked for, if any; returns a dict of plain numbers:

    fid, coverage                                against n test pictures; coverage's k is 5
    fid_train                                    against n training pictures: for choosing a checkpoint
    inception_score, mode_score                  only where the network reads labels, as the next two lines
    classes, class_min, class_max                classes with 1/(4K) of the samples or more; least and largest share
    label_accuracy                               with y: the share that the network takes for what was asked
    n_real, n_fake, floor                        sizes (equal), and the FID of training against test pictures
    modes, modes_kl                              stacked_mnist: mode_coverage() of n = 26,000, and of as many real ones
                                                 (modes_real, modes_kl_real)

    load("train") and load("test") give pictures and labels; the network is classifier()'s, kept in `folder`.
    ValueError: too few pictures, or features that are not finite."""

    def __init__(self, dataset, load, folder=None, device="cpu", n=None, epochs=None, say=print):
        n = n or enough(dataset)
        train, test = load("train"), load("test")
        self.n = min(n, len(train[0]), len(test[0]))
        if self.n < FEWEST:
            raise TooFew(f"{self.n} test pictures, where {FEWEST} would be few")
        self.net, self.labels = classifier(dataset, train, test, folder, device, epochs, say), train[1]
        self.train, self.real = embed(self.net, some(train[0], self.n), False), embed(self.net, some(test[0], self.n))
        self.floor = self.train.moments.fid(self.real.moments)
        self.stacked = dataset == "stacked_mnist"

    def __call__(self, x, y=None):
        if len(x) < self.n:
            raise ValueError(f"{len(x)} pictures: {self.n} are needed, as many as real ones")
        fake, more = embed(self.net, x[:self.n]), {}
        if self.net.labelled:
            more = {**compare(fake, self.real, ("is", "mode")), **class_shares(fake.logits)}
            if y is not None:
                more["label_accuracy"] = (fake.logits.argmax(1).cpu() == y[:self.n]).double().mean().item()
        if self.stacked:
            more |= mode_coverage(fake.logits.argmax(1), 1000)
            more |= {f"{k}_real": v for k, v in mode_coverage(self.real.logits.argmax(1), 1000).items()}
        return {**compare(fake, self.real, ("fid", "coverage"), self.train), **more, "n_real": self.n, "n_fake": self.n,
                "floor": self.floor, "features": self.net.name, "accuracy": self.net.accuracy}

    @staticmethod
    def line(s):
        few = " few pictures: compare at this n only" if s["n_real"] < 1000 else ""
        labels = (f"IS {s['inception_score']:.2f} +- {s['inception_score_std']:.2f}  Mode Score {s['mode_score']:.2f}  "
                  f"{s['classes']} classes of {s['class_min']:.1%} to {s['class_max']:.1%}"
                  if "classes" in s else "no labels: no IS, no Mode Score")
        return (f"FID[{s['features']}] {s['fid']:.1f} (floor {s['floor']:.1f}, n {s['n_real']} + {s['n_fake']}){few}  "
                f"coverage {s['coverage']:.3f}  {labels}"
                + (f"  labels right {s['label_accuracy']:.1%}" if "label_accuracy" in s else "")
                + (f"  {s['modes']} of 1000 modes, KL {s['modes_kl']:.3f} (real {s['modes_real']}, "
                   f"{s['modes_kl_real']:.3f})" if "modes" in s else ""))

# REJECTION: which of a generator's pictures to keep, by their scores --------------------------------------------------

def ratings(score, most=1e300):
    """Scores, if they can be compared; -inf can, and is never kept. ValueError: NaN, infinity, above `most`."""
    if not (score <= most).all():
        raise ValueError(f"scores that are not finite, or above {most}")
    return score

def naive(score):
    """The chance (N,) to keep a picture of this score (N,): sigmoid, as the reports do. Even for the best D this draws
    from p_g p_d / (p_g + p_d), normalised, and not from p_d; for a critic's raw score it means nothing."""
    return ratings(score.double()).sigmoid()

def drs(score, top, gamma=0.0, eps=1e-8):
    """Discriminator rejection sampling: the chance (N,) to keep a picture whose score (N,) is log p_d / p_g.

    Azadi et al. 2019 (1810.06758), section 3: sigmoid(F - gamma), F = d - log(1 - exp(d - eps)), d = score - top, where
    top (a number or (N,)) is the largest score there is. Without eps and gamma it is exp(d), and what is kept follows
    p_d; a larger gamma keeps less, at a law between the two."""
    return (drs_logit(score, top, eps) - gamma).sigmoid()

def drs_logit(score, top, eps=1e-8):
    """F for scores and top (numbers or (N,)), in float64: in float32, and without expm1, it is inf at the maximum."""
    d = ratings(torch.as_tensor(score).double() - top, 0.0)
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
        return x, ratings(a * score.detach().double().flatten().cpu() + b)

    drs_kind = {"naive": False, "drs": True}[kind]
    burn_in = burn_in if drs_kind else 0
    if n < 1 or (drs_kind and percentile is not None and burn_in < 1):
        raise ValueError("n is 1 or more; a percentile is of the burn-in's scores: give burn_in, or percentile None")
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

# STUDY: what the training scripts ask for -----------------------------------------------------------------------------

NOT_LOGGED = {"n_real", "n_fake", "floor", "accuracy", "features", "inception_score_std", "modes_real", "modes_kl_real"}

class Study:
    """What looks at a generator while it trains and when it is done: scores, choice by rejection, figures, curves.

    args, folder    the run's flags and its directory
    load(split)     -> pictures uint8 (N, C, S, S), labels (N,): the script's own data; limit=n: the first n
    draw(z, y)      -> pictures uint8 (N, C, S, S) and D's scores (N,), on the CPU; y None: each label in turn
    rate(x, y)      -> D's scores (N,) of pictures uint8
    noise(n, *key)  -> z (n, latent_dim), a pure function of its arguments
    held            pictures and labels that D never saw, or None; labels: how many G can be asked for, 1: none"""

    def __init__(self, args, folder, load, draw=None, rate=None, noise=None, held=None, labels=1, say=print):
        self.args, self.folder, self.load, self.draw, self.rate = args, Path(folder), load, draw, rate
        self.noise, self.held, self.labels, self.say, self.judge = noise, held, labels, say, None
        if noise and not vars(args).get("generate"):  # a run goes on: those of an earlier end are not its own
            (self.folder / "scores.json").unlink(missing_ok=True)

    def ready(self):
        """The judge, made when it is first asked for; False where there can be no scores, which is said once."""
        if self.judge is None:
            a, device = self.args, "cuda" if torch.cuda.is_available() and self.args.device != "cpu" else "cpu"
            home = Path(a.data_dir).resolve().parent if a.dataset == "folder" else a.data_dir  # not among the pictures
            load = functools.partial(self.load, limit=256) if a.dry_run else self.load
            try:
                self.judge = Judge(a.dataset, load, None if a.dry_run else home, device,
                                   epochs=1 if a.dry_run else None, say=self.say)
            except TooFew as e:  # the training goes on
                self.judge = self.say(f"no scores: {e}") or False
        return self.judge

    def evaluate(self, step):
        """The scores of fresh samples after `step` D updates, for the log; None where there can be none."""
        if not self.ready(): return None
        scores = self.scores(2, step)
        self.say(f"step {step}: {self.judge.line(scores)}")
        return {k: v for k, v in scores.items() if k not in NOT_LOGGED}

    def scores(self, *key):
        y = self.asked(self.judge.n, *key)
        return self.judge(self.draw(self.noise(self.judge.n, *key), y)[0], y)

    def asked(self, n, *key):
        """n labels in the data's own shares, shuffled, where G takes one: in turn, or drawn, they would add to FID."""
        if self.labels == 1: return None
        y = self.judge.labels.sort().values
        return y[torch.arange(n) * len(y) // n][torch.randperm(n, generator=seeded(self.args.seed, 12, *key))]

    def last_scores(self, restore):
        """The figures; scores.json: of last.pt and best.pt on fresh z, and of what --reject keeps; and curves.png.
        restore(name) loads a checkpoint of the run and returns its step."""
        self.figures()  # of the weights as they are: restore comes after
        scores, reject, steps = {}, self.args.reject, {}
        for name in [n for n in ("last.pt", "best.pt") if (self.folder / n).exists()] if self.ready() else ():
            steps[name] = restore(name)
            if name == "best.pt" and steps[name] == steps["last.pt"]:
                scores |= {k.replace("last", "best"): v for k, v in scores.items()}
                self.say("best.pt is last.pt")
                continue
            scores[name] = self.scores(3)
            self.say(f"{name}, fresh z: {self.judge.line(scores[name])}")
            if reject != "none":
                try:
                    x, took = self.kept(self.judge.n, 8, shares=True)
                except ValueError as e:
                    self.say(f"--reject {reject}: {e}")
                    continue
                scores[f"{name} --reject {reject}"] = s = {**self.judge(x), **took}
                self.say(f"{name}, --reject {reject}: {self.judge.line(s)}; {took['line']}")
        if scores: (self.folder / "scores.json").write_text(json.dumps(scores, indent=1))
        if not (self.folder / "log.csv").exists():
            return self.say("no curves.png: log.csv has no rows, which come every --log-every updates of D")
        try: plot([self.folder], self.folder / "curves.png")
        except ValueError as e: self.say(f"no curves.png: {e}")

    def kept(self, n, *key, shares=False):
        """n pictures uint8 (n, C, S, S) that --reject keeps, and rejected's dict; ValueError where D is of no use.
        Labels are asked for in turn, or with the data's `shares`."""
        args, drawn = self.args, []

        def more(k):
            drawn.append(None)
            z = self.noise(k, *key, 2, len(drawn))
            return self.draw(z, self.asked(k, *key, len(drawn)) if shares else None)

        head = None
        if args.reject == "naive" and getattr(args, "d_norm", "none") == "batch":
            self.say("--reject naive: D has batch norm, and in eval mode its logit is not the one that trained")
        if args.reject == "drs":
            x, y = self.held
            head = platt(self.rate(x, y), torch.cat([more(len(b))[1] for b in x.split(500)]))
        x, took = rejected(args.reject, more, n, seeded(args.seed, *key, 1), head, args.drs_percentile)
        line = (f"{took['attempts']} attempts, {took['acceptance']:.1%} kept"
                + (f", calibrated at AUC {took['auc']:.3f}" if head else "")
                + (f". {took['warning']}" if took["warning"] else ""))
        return x, {**took, "line": line}

    def figures(self):
        """training.gif, interpolation_latent.png and _pixel.png, traversal.png, of the weights as they are."""
        save_gif(sorted((self.folder / "samples").glob("step_*.png")), self.folder / "training.gif")
        a, b = self.noise(16, 4).chunk(2)  # eight pairs, ten pictures from one to the other
        t, y = torch.linspace(0, 1, 10), torch.arange(8) % self.labels
        x, _ = self.draw(torch.lerp(a[:, None], b[:, None], t.view(10, 1)).flatten(0, 1), y.repeat_interleave(10))
        save_sheet(x, self.folder / "interpolation_latent.png", 10)
        xa, xb = (self.draw(ends, y)[0].float()[:, None] for ends in (a, b))
        between = torch.lerp(xa, xb, t.view(1, 10, 1, 1, 1)).flatten(0, 1).round().byte()
        save_sheet(between, self.folder / "interpolation_pixel.png", 10)
        self.traversal()

    def traversal(self, rows=10):
        """One z, a row per coordinate, slid from -4 to 4 (-1 to 1 for a uniform prior): the coordinates that change the
        picture most from end to end."""
        z, far = self.noise(1, 5), 4.0 if self.args.prior == "normal" else 1.0
        one = torch.eye(self.args.latent_dim) > 0
        y = torch.zeros(len(one), dtype=torch.long)
        low, high = (self.draw(torch.where(one, v, z), y)[0].float() for v in (-far, far))
        strongest = (high - low).abs().flatten(1).mean(1).argsort(descending=True)[:rows]
        slid = torch.where(one[strongest, None], torch.linspace(-far, far, 9).view(1, 9, 1), z).flatten(0, 1)
        save_sheet(self.draw(slid, y[:1].expand(len(slid)))[0], self.folder / "traversal.png", 9)

def seeded(*key):
    """A CPU generator, a pure function of whole numbers, the same as the scripts'."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

def save_sheet(x, path, columns):
    """uint8 (N, C, H, W) as one PNG, row by row, two pixels of white between pictures."""
    from torchvision.utils import make_grid
    sheet = make_grid(x, columns, padding=2, pad_value=255)[:x.shape[1]]
    Image.fromarray(sheet[0].numpy() if len(sheet) == 1 else sheet.permute(1, 2, 0).contiguous().numpy()).save(path)

def save_gif(paths, out, limit=300 * 1024):
    """The sheets as an animation of at most `limit` bytes: fewer frames and grey levels until it fits."""
    for frames, colours in ((48, 16), (32, 16), (24, 8), (16, 8), (10, 4), (5, 4), (2, 2)):
        chosen = [paths[i] for i in sorted({round(t) for t in np.linspace(0, len(paths) - 1, min(frames, len(paths)))})]
        images = [Image.open(p).quantize(colours) for p in chosen]
        if not images: return
        file = io.BytesIO()
        images[0].save(file, "GIF", save_all=True, append_images=images[1:] + images[-1:] * 5, duration=150, loop=0)
        if file.tell() <= limit:
            Path(out).write_bytes(file.getvalue())
            return

def answers(models, x, y, x_test):
    """bigan.py's probe: labels of features x_test (M, d) by 1-NN among x (N, d) with labels y (N,), by plain distances
    as in the paper (scaled ones cost MNIST's pixels 2.6 points), and by scikit-learn's models, two at most, that see
    numbers of mean 0 and deviation 1; the second is fitted to the first 5,000."""
    squares = x.square().sum(1)  # |a - x|^2 = |a|^2 - 2 a.x + |x|^2: which x is nearest does not depend on |a|^2
    yield torch.cat([y[torch.addmm(squares, a, x.T, alpha=-2).argmin(1)] for a in x_test.split(250)])
    mean, deviation = x.mean(0), x.std(0, correction=0)
    x, x_test = ((t - mean) / torch.where(deviation > 0, deviation, 1) for t in (x, x_test))
    for model, n in zip(models, (len(x), 5000)):
        yield torch.from_numpy(model.fit(x[:n].numpy(), y[:n].numpy()).predict(x_test.numpy()))

def reconstruction_ratio(x, made, seed):
    """mean |x - G(E(x))| / mean |x - G(E(x'))|, x' the next in a random circle of all pictures: 0 where G undoes E, 1
    where E tells nothing."""
    circle = torch.randperm(len(x), generator=seeded(seed, 10))
    right, wrong = ((x[circle] - made[i]).flatten(1).norm(dim=1).mean() for i in (circle, circle.roll(-1)))
    return (right / wrong).item()

# PLOT -----------------------------------------------------------------------------------------------------------------

COLOURS = ("#1f5fa8", "#c8452b", "#2f8f4e", "#8a4fa3", "#b58a00", "#444444", "#3fb0c9", "#d477a8", "#7a5230", "#8fb339",
           "#6a6acd", "#e08a2e")
NOT_PLOTTED = {"step", "epoch", "g_updates", "seconds", "images_per_s", "lr_g", "lr_d", "class_min", "class_max"}

def read_log(run):
    """A run directory's log.csv -> {column: (steps, values)}, rows without a value left out. ValueError: it is none."""
    path = Path(run) / "log.csv" if Path(run).is_dir() else Path(run)
    try:
        rows = list(csv.DictReader(path.open(newline="")))
        return {k: ([float(r["step"]) for r in rows if r[k]], [float(r[k]) for r in rows if r[k]]) for k in rows[0]}
    except (OSError, KeyError, IndexError, ValueError, TypeError) as e:
        raise ValueError(f"{path} is not the log of a run ({type(e).__name__}: {e})") from None

def ticks(low, high, wanted=6):
    """Round numbers from low to high: 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / wanted
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

NOT_COMPARED = {"seed", "name", "data_dir", "device", "graph", "run_dir", "resume", "generate", "generate_to", "z_file",
                "tensorboard", "log_every", "sample_every", "eval_every", "checkpoint_every"}

def groups(runs):
    """{label: [run directories]}: those that differ in the seed alone together, in the order given. A label is the
    script and the flags that tell its groups apart. What has no args.json is a group of its own."""
    flags, out, seen, folders = {}, {}, [], {r: Path(r) if Path(r).is_dir() else Path(r).parent for r in runs}
    for run in (r for r in runs if (folders[r] / "args.json").exists()):
        args = json.loads((folders[run] / "args.json").read_text())
        script = args.get("name", folders[run].resolve().name).split(f"-{args.get('dataset') or args.get('data')}-")[0]
        skip = NOT_COMPARED | ({"epochs"} if args.get("steps") else set())  # --steps overrides it
        skip = skip - {"eval_every"} if args.get("lr_decay") == "best-fid" else skip  # whose scores change the rates
        flags[run] = script, {k: v for k, v in args.items() if k not in skip}, args.get("seed")
    for run in runs:
        script, mine, seed = flags.get(run, (folders[run].resolve().name, {}, None))
        apart = [k for k in mine if len({repr(f.get(k)) for s, f, _ in flags.values() if s == script}) > 1]
        label = " ".join([script, *(f"--{k.replace('_', '-')} {mine[k]}" for k in apart)])
        out.setdefault(str(run) if (label, seed) in seen else label, []).append(run)  # a seed twice: other code ran
        seen.append((label, seed))
    return out

def scores_table(runs):
    """The final scores of run directories (scores.json) as Markdown, for each group of seeds and each checkpoint: the
    mean and, of two runs or more, the standard deviation (n - 1). ValueError: a run without scores."""
    columns = {"FID": ("fid", ".1f"), "IS": ("inception_score", ".2f"), "coverage": ("coverage", ".3f"),
               "classes": ("classes", ".4g"), "least": ("class_min", ".1%"), "labels right": ("label_accuracy", ".1%"),
               "modes": ("modes", ".0f"), "attempts": ("attempts", ".0f")}
    rows, networks = [], set()
    for label, members in groups(runs).items():
        try: scores = [json.loads((Path(run) / "scores.json").read_text()) for run in members]
        except (OSError, ValueError) as e: raise ValueError(f"a run without scores: {e}") from None
        for name in dict.fromkeys(n for s in scores for n in s if ".pt" in n):
            if name.startswith("best.pt") and all(s.get(name) == s.get(name.replace("best", "last")) for s in scores):
                continue
            mine = [s[name] for s in scores if name in s]  # a seed may lack what --reject keeps
            values = {c: [s[k] for s in mine if s.get(k) is not None] for c, (k, _) in columns.items()}
            used = {f"{s['features']}, floor {s['floor']:.1f}, n {s['n_fake']}" for s in mine}
            rows.append((label + " (by several networks)" * (len(used) > 1), name, len(mine),
                         {c: v for c, v in values.items() if len(v) == len(mine)}))
            networks |= used
    shown = [c for c in columns if any(c in values for *_, values in rows)]
    lines = ["; ".join(sorted(networks)), "", "| " + " | ".join(["run", "weights", "seeds", *shown]) + " |",
             "|---" * (3 + len(shown)) + "|"]
    for label, name, n, values in rows:
        figures = np.mean, lambda v: np.std(v, ddof=1)
        cells = [[format(f(values[c]), columns[c][1]) for f in figures[:n] if c in values] for c in shown]
        lines.append("| " + " | ".join([label, name, str(n), *(" ± ".join(cell) for cell in cells)]) + " |")
    return "\n".join(lines)

def band(logs, column):
    """Of one column in the logs of several seeds: the steps that all have, means, least and largest values."""
    found = [dict(zip(*log.get(column, ((), ())))) for log in logs]
    steps = [s for s in found[0] if all(s in f for f in found)]
    values = np.array([[f[s] for f in found] for s in steps]).reshape(-1, len(found))
    return steps, *(f(values, 1).tolist() for f in (np.mean, np.min, np.max))

def plot(runs, out):
    """Each logged column of runs against the step (D updates), a panel each, as one PNG; of runs that differ in the
    seed alone the mean, in a band from least to largest. ValueError: logs without rows, or no such file."""
    names, members = zip(*groups(runs).items())
    names, logs = names if names[1:] else [Path(runs[0]).resolve().name], [[read_log(r) for r in m] for m in members]
    panels = [c for c in dict.fromkeys(c for seeds in logs for log in seeds for c in log) if c not in NOT_PLOTTED
              and any(band(seeds, c)[0] for seeds in logs)]
    if not panels:
        raise ValueError("nothing to plot: the logs have no rows yet")
    w, h, columns = 440, 260, min(3, len(panels))
    image = Image.new("RGB", (w * columns, h * -(-len(panels) // columns) + 18 * len(names) + 8), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for i, name in enumerate(names):
        draw.line([(14, 15 + 18 * i), (44, 15 + 18 * i)], COLOURS[i % len(COLOURS)], 3)
        draw.text((52, 15 + 18 * i), name, "black", font, anchor="lm")
    for i, column in enumerate(panels):
        x0, y0 = w * (i % columns) + 62, h * (i // columns) + 18 * len(names) + 32
        x1, y1 = x0 + w - 80, y0 + h - 66
        log_scale = column.startswith("fid")
        curves = [(s, *([math.log10(max(v, 1e-3)) if log_scale else v for v in vs] for vs in values))
                  for s, *values in (band(seeds, column) for seeds in logs)]
        values = [v for _, *parts in curves for vs in parts for v in vs if math.isfinite(v)] or [0.0]
        low, high = min(values), max(values)
        margin = 0.04 * (high - low) if high - low > 1e-9 else 0.5
        low, high = low - margin, high + margin
        last = max(max(s, default=0) for s, *_ in curves) or 1
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
        def places(s, vs):
            return [(x0 + a / last * (x1 - x0), y1 - (v - low) / (high - low) * (y1 - y0))
                    for a, v in zip(s, vs) if math.isfinite(v)]
        for j, (s, mean, least, most) in enumerate(curves):
            colour = COLOURS[j % len(COLOURS)]
            if least != most and places(s, least)[1:]:
                shade = Image.new("L", image.size)
                ImageDraw.Draw(shade).polygon(places(s, least) + places(s, most)[::-1], fill=60)
                image.paste(colour, mask=shade)
            draw.line(points := places(s, mean), colour, 2)
            for a, b in points if len(points) < 60 else ():
                draw.ellipse([a - 2, b - 2, a + 2, b + 2], fill=colour)
    try:
        image.save(out)
    except (OSError, ValueError) as e:
        raise ValueError(f"-o {out}: {e}") from None

# COMMAND LINE ---------------------------------------------------------------------------------------------------------

JPEG_EFFECT = "10,000 real MNIST pictures had FID[classifier] 2.0 as PNG, 3.9 as JPEG of quality 75"
CROPPED = "--real folder --data-dir DIR crops and resizes real pictures as the scripts do"
SUFFIXES = (".bmp", ".gif", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

class Pictures:
    """A folder of pictures in the order of their names, or a .npy or .pt of uint8 (N, C, S, S), or such a tensor.

    len(); .size; .batches(b) reads uint8 (b, channels, size, size) at a time; .formats counts the kinds of files read;
    .digest() is a hash of all bytes. Files are read once at the start, before anything costs time: those that cannot be
    are left out with a line, .bad. ValueError: more than 1 % of them, or pictures that cannot be scored as they are,
    not square, of several sizes, of more than 8 bits a channel."""

    def __init__(self, source, channels, name=None):
        self.path, self.channels, self.kind = name or source, channels, "data set"
        self.formats, self.bad, self.size = Counter(), [], None
        try:
            if not torch.is_tensor(source) and Path(source).suffix in (".npy", ".pt"):
                load = np.load if Path(source).suffix == ".npy" else functools.partial(torch.load, weights_only=True)
                source, self.kind = torch.as_tensor(load(source)), "array"
            self.items = as_pictures(source, channels, 1) if torch.is_tensor(source) else sorted(
                f for f in Path(source).iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        except Exception as e:  # numpy and torch raise a different kind for each way to be damaged
            raise ValueError(f"{self.path}: {type(e).__name__}: {e}") from None
        if torch.is_tensor(self.items):
            self.size = self.items.shape[3]
            if self.items.shape[2] != self.size:
                raise ValueError(f"{self.path}: {tuple(self.items.shape)}: all must be square ({CROPPED})")
        else:
            n, self.items = len(self.items), [f for f in self.items if self.read(f) is not None]
            bad = f"{len(self.bad)} of {n} pictures of {source}: {'; '.join(self.bad[:3])}"
            if len(self.bad) > 0.01 * n:
                raise ValueError(f"cannot read {bad}; more than 1 %, and other pictures than asked for are not scored")
            if self.bad:
                say(f"left out {bad}")
        if len(self) < 2:
            raise ValueError(f"{self.path} holds {len(self)} pictures, in a folder {' '.join(SUFFIXES)}: 2 are needed")

    def __len__(self):
        return len(self.items)

    def only(self, n):
        """some(n) of them, from now on."""
        self.items = some(self.items, n)
        return self

    def read(self, path):
        """A file's picture, or None and a line in .bad."""
        try:
            picture, kind = read_picture(path, self.channels)
        except OSError as e:
            return self.bad.append(str(e))
        self.size = self.size or picture.shape[-1]
        if picture.shape[-1] != self.size:
            raise ValueError(f"{path} is {picture.shape[-1]} pixels wide, the first {self.size}: all must be of one "
                             f"({CROPPED})")
        self.formats[kind.replace("MPO", "JPEG")] += 1  # a phone's JPEG with a second picture inside
        return picture

    def batches(self, size):
        self.formats.clear()
        for part in (self.items[i:i + size] for i in range(0, len(self), size)):
            if torch.is_tensor(part):
                self.formats[self.kind] += len(part)
                yield part.expand(-1, self.channels, -1, -1)
            else:
                yield torch.stack([self.read(f) for f in part])

    def digest(self):
        files = not torch.is_tensor(self.items)
        h = hashlib.sha256(repr((len(self), self.size, self.channels, files)).encode())
        if not files:
            h.update(self.items.contiguous().numpy())
        for data in map(Path.read_bytes, self.items) if files else ():
            h.update(len(data).to_bytes(8, "big") + data)
        return h.hexdigest()

    def __str__(self):
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.formats.items()))
        return f"{self.path} ({kinds}, {self.size}x{self.size})"

def read_picture(path, channels):
    """uint8 (channels, S, S), upright, and the kind of file, by its content; what is see-through becomes white. OSError
    where it cannot be read, ValueError where it is not 8 bits a channel or not square."""
    try:
        with Image.open(path) as im:
            kind, mode, see_through = im.format, im.mode, im.has_transparency_data
            deep = mode[0] in "IF" or any("16" in str(tile[3]) for tile in im.tile)
            im = ImageOps.exif_transpose(im)
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA")) if see_through else im
            x = np.array(im.convert("L" if channels == 1 else "RGB"))
    except Exception as e:  # Pillow raises a different kind for each damage
        raise OSError(f"{path} cannot be read: {type(e).__name__}: {e}") from None
    if deep:
        raise ValueError(f"{path} has more than 8 bits a channel ({mode})")
    if x.shape[0] != x.shape[1]:
        raise ValueError(f"{path} is {x.shape[1]}x{x.shape[0]}: all must be square ({CROPPED})")
    return torch.from_numpy(x)[None] if channels == 1 else torch.from_numpy(x).permute(2, 0, 1), kind

def cached(net, pictures, keep_features, folder, what):
    """embed(), but read from `folder` where the same network has seen the same pictures before; None: made anew."""
    if not folder: return embed(net, pictures, keep_features, what)
    device, moments = next(net.parameters()).device, Moments()
    key = hashlib.sha256(f"{net.name} {device.type} {keep_features} 2 {pictures.digest()}".encode()).hexdigest()[:24]
    path = Path(folder) / f"statistics-{key}.pt"
    with contextlib.suppress(Exception):  # none is there, or one cut short, which is made again
        saved = torch.load(path, map_location=device, weights_only=True)
        features, logits, pictures.formats = saved.pop("features"), saved.pop("logits"), Counter(saved.pop("formats"))
        vars(moments).update(saved)
        return Sample(moments, features, logits)
    sample = embed(net, pictures, keep_features, what)
    if not pictures.bad:
        saved = {"features": sample.features, "logits": sample.logits, "formats": dict(pictures.formats)}
        keep(path, {**vars(sample.moments), **saved}, say)
    return sample

def say(text):
    print(text, file=sys.stderr)

def fail(message):
    """A user's mistake: one line on stderr, exit code 2, no traceback."""
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}\n")
    raise SystemExit(2)

def table(s, fake, real):
    """The scores for a reader."""
    rows = [("FID", "fid", ".4g", "floor {floor:.4g}: real training against test pictures" if "floor" in s else ""),
            ("FID, training", "fid_train", ".4g", "against training pictures"),
            ("KID", "kid", ".4g", "+- {kid_std:.4g}"),
            ("Inception Score", "inception_score", ".2f", "+- {inception_score_std:.2f}"),
            ("Mode Score", "mode_score", ".2f", ""),
            *((s, s, ".3f", f"k {k}") for s, k in (("precision", 3), ("recall", 3), ("density", 5), ("coverage", 5))),
            ("classes", "classes", "d", "of {class_min:.1%} to {class_max:.1%}"),
            ("modes", "modes", "d", "of 1000, KL {modes_kl:.3f} to the uniform law")]
    what = "labels" if s["labelled"] else "rotations"
    accuracy = f", {s['accuracy']:.2%} of its test set's {what} right" if s["accuracy"] else ""
    lines = [f"features {s['features']}{accuracy}, n {s['n_real']} + {s['n_fake']}", f"fake     {fake}",
             f"real     {real}"]
    for name, key, form, more in rows:
        if key in s:
            value = format(s[key], ".1f" if key.startswith("fid") and s[key] >= 1 else form)  # FIDs span 1e-6 to 1e3
            lines.append(f"{name:16} {value:>10}  {more.format(**s)}".rstrip())
    if not s["labelled"]:
        lines.append("no labels        so no Inception Score, no Mode Score and no classes")
    return "\n".join(lines)

def main(argv=None):
    try:
        command(argv)
    except (OSError, ValueError) as e:
        fail(e)

def command(argv):
    try:  # the one place where this file looks at a script, and only as a command
        from wgan_gp import DATASETS as datasets, load_data
    except ImportError:
        load_data, datasets = None, {}
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.error = fail
    p.add_argument("--real", help=f"the test set of {', '.join(datasets)}; or a folder, a .npy or a .pt")
    p.add_argument("--fake", help="a folder of PNG, or a .npy or .pt of uint8 (N, C, H, W)")
    p.add_argument("--features", choices=("classifier", "inception"), default="classifier", help="the feature network")
    p.add_argument("--weights", help=f"file of --features inception: {INCEPTION.rsplit('/', 1)[1]}")
    p.add_argument("--classifier", choices=datasets, help="whose network gives the features; default: --real's own")
    p.add_argument("--scores", nargs="+", choices=SCORES, default=SCORES, metavar="SCORE",
                   help=f"of {' '.join(SCORES)}; default all. fid alone keeps no features in memory")
    p.add_argument("--data-dir", default="data", help="folder of the data sets, the networks and real statistics")
    p.add_argument("--no-cache", action="store_true", help="neither read nor keep statistics of real pictures")
    p.add_argument("--n", type=int, help="pictures of each kind, at most; default 10000, of stacked_mnist 26000")
    p.add_argument("--json", action="store_true", help="print the scores as one JSON object")
    p.add_argument("--plot", nargs="+", metavar="RUN", help="run directories, or their log.csv, in one plot")
    p.add_argument("--table", nargs="+", metavar="RUN", help="run directories: their final scores as Markdown")
    p.add_argument("-o", "--out", default="curves.png", help="where --plot draws")
    args = p.parse_args(argv)
    if args.plot:
        plot(args.plot, args.out)
        return print(args.out)
    if args.table:
        return print(scores_table(args.table))
    if not (args.real and args.fake):
        raise ValueError("name --real and --fake, --plot or --table")
    if args.features == "classifier" and args.weights:
        raise ValueError("--weights goes with --features inception")
    score(args, load_data, datasets)

def score(args, load_data, datasets):
    """Scores of --fake against --real, printed."""
    name = args.classifier or (args.real if args.real in datasets else None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = args.features == "classifier"
    channels = datasets[name] if small and name else 3
    fake, train, test, parts = Pictures(args.fake, channels), None, None, {}
    if name:
        parts = {s: load_data(name, args.data_dir, fake.size, s) for s in ("train", "test")}
        train, test = (Pictures(x, channels, f"{name}, {s} set") for s, (x, _) in parts.items())
    real = (Pictures(args.real, channels) if args.real not in datasets else test if args.real == name else
            Pictures(load_data(args.real, args.data_dir, fake.size, "test")[0], channels, f"{args.real}, test set"))
    n = min(len(p) for p in (fake, real, train, test) if p is not None)
    n = min(n, enough(name) if args.n is None else args.n)
    if n < FEWEST:
        raise ValueError(f"{n} + {n} pictures: a score of fewer than {FEWEST} says nothing")
    if small and (padded(fake.size) != padded(real.size) if name else fake.size != real.size):
        raise ValueError(f"fakes of {fake.size} pixels, real pictures of {real.size} ({CROPPED})")
    home = Path(args.data_dir).resolve().parent if "folder" in (name, args.real) else args.data_dir  # not among them
    folder = None if args.no_cache else home
    if not small:
        net = inception(args.weights, device)
    elif name:
        net = classifier(name, parts["train"], parts["test"], home, device, say=say)
    else:  # a folder against a folder: nine tenths of the real ones train a network, the others test it
        x = torch.cat(list(real.batches(1000)))
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
        parts = [(part, torch.full((len(part),), -1)) for part in x.tensor_split([len(x) - max(1, len(x) // 10)])]
        net = classifier(Path(args.real).resolve().stem, *parts, Path(args.real).resolve().parent, device, say=say)
    keep_features = set(args.scores) != {"fid"}
    fake_sample = embed(net, fake.only(n), keep_features, "fakes")
    real_sample = cached(net, real.only(n), keep_features, folder, "real pictures")
    wanted = [s for s in args.scores if net.labelled or s not in ("is", "mode")]
    train_sample, floor = None, {}
    if train and "fid" in wanted:
        train_sample = cached(net, train.only(n), False, folder, "training pictures")
        tested = real_sample if test is real else cached(net, test.only(n), False, folder, "test pictures")
        floor = {"floor": train_sample.moments.fid(tested.moments)}
    scores = compare(fake_sample, real_sample, wanted, train_sample)
    if keep_features and small and net.labelled:
        scores.update(class_shares(fake_sample.logits))
        if isinstance(net, Stacked):
            scores.update(mode_coverage(fake_sample.logits.argmax(1), 1000))
    scores.update(n_real=n, n_fake=n, features=net.name, accuracy=net.accuracy, labelled=net.labelled,
                  jpeg_real=real.formats["JPEG"], jpeg_fake=fake.formats["JPEG"], **floor)
    for p in (p for p in (real, fake) if p.formats["JPEG"]):
        say(f"warning: {p.path} holds {p.formats['JPEG']} JPEG files, whose losses are in the scores: {JPEG_EFFECT}")
    if n < 1000 or (not small and n < 4096 and "fid" in args.scores):
        say(f"warning: {n} pictures of each kind: FID is too large, and compares at this n only")
    print(json.dumps(scores, indent=1) if args.json else table(scores, fake, real))

if __name__ == "__main__":
    main()
