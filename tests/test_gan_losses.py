"""Losses, penalties and clipping of dcgan.py, cdcgan.py, wgan_clip.py and their like, against closed forms, finite
differences and the objective written out; and, watching train(), what enters each forward, what each backward reaches.

run() and steps() serve other files too."""

import copy
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import bigan
import cdcgan
import dcgan
import mdgan
import toy2d
import unrolled
import wgan_clip
import wgan_gp

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


pytestmark = pytest.mark.usefixtures("float64")


def run(monkeypatch, module, argv, iterations=1, x=None, y=None, nets=()):
    """train() on the CPU for some iterations, on 60 random images of 3 classes, with nothing to watch it.

    Returns a namespace: G, D (, E), ema (, ema_e), opts {"g", "d"}, sample, score, held, classes, args, x, y, logged
    (the dicts of step, as numbers), and events in their order:
        kind "forward"  net "G", "D" or "E"; inputs; train, graph, slope (its first input wants a gradient); D's weights
        kind "step"     net "G" or "D"; opt; copies (G, D (, E)) as they were; grads, before and after {net: tensors}
    `nets` take the places of G, D (, E); None leaves the script's own."""
    args = module.parse_args(argv)
    args.steps = iterations * args.d_steps
    if x is None:
        rng = torch.Generator().manual_seed(0)
        x = torch.randint(0, 256, (60, 1, args.image_size, args.image_size), dtype=torch.uint8, generator=rng)
    y = torch.arange(len(x)) % 3 if y is None else y
    names = [] if y.min() < 0 else [str(i) for i in range(int(y.max()) + 1)]
    seen = SimpleNamespace(args=args, x=x, y=y, events=[], logged=[], opts={}, ema=None)
    made = {}
    over = False

    def weights(net):
        return [p.detach().clone() for p in net.parameters()]

    def weights_of_all():
        return {name: weights(net) for name, net in made.items()}

    def gradients(net):
        return [None if p.grad is None else p.grad.clone() for p in net.parameters()]

    def watch(name, make, given):
        def call(*how):
            net = given or make(*how)
            made[name] = net
            setattr(seen, name, net)

            def noted(m, inputs, named):
                if m is not net or over:  # a copy of it, or after the training
                    return
                inputs = [*inputs, *named.values()]
                event = SimpleNamespace(kind="forward", net=name, at=len(seen.events), train=m.training)
                event.inputs = [i.detach().clone() for i in inputs]
                event.graph = torch.is_grad_enabled()
                event.slope = inputs[0].requires_grad
                if name == "D":
                    event.weights = weights(net)
                seen.events.append(event)

            net.register_forward_pre_hook(noted, with_kwargs=True)
            return net

        return call

    def before(opt, *_):
        first = opt.param_groups[0]["params"][0]
        name = "G" if first is next(seen.G.parameters()) else "D"
        seen.opts[name.lower()] = opt
        event = SimpleNamespace(kind="step", net=name, at=len(seen.events), opt=opt, before=weights_of_all())
        event.grads = {name: gradients(net) for name, net in made.items()}
        event.copies = copy.deepcopy(tuple(made.values()))
        seen.events.append(event)

    def after(opt, *_):
        seen.events[-1].after = weights_of_all()

    def averaged(net, averaged=module.averaged):
        name = "ema" if seen.ema is None else "ema_e"
        setattr(seen, name, averaged(net))
        return getattr(seen, name)

    def study(args, data, sample, score, script=None, conditional=False):
        seen.held, seen.sample, seen.score, seen.classes = data.held, sample, score, data.classes
        seen.conditional = conditional
        stand_in = mock.MagicMock()
        stand_in.evaluate.return_value = False
        stand_in.add = lambda losses: seen.logged.append({k: v.item() for k, v in losses.items()})
        return stand_in

    nets = [*nets, None, None, None]
    with monkeypatch.context() as m:
        for name, kind, given in zip("GDE", ("Generator", "Discriminator", "Encoder"), nets):
            if hasattr(module, kind):
                m.setattr(module, kind, watch(name, getattr(module, kind), given))
        m.setattr(module, "Study", study)
        m.setattr(module, "averaged", averaged)
        m.setattr(module, "load_data", lambda *a: (x, y, names))
        m.setattr(module, "save", lambda *a: None)
        m.setattr(module, "reconstruction_figures", lambda *a: None, raising=False)
        hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        try:
            module.train(args)
        finally:
            over = True
            for hook in hooks:
                hook.remove()
    return seen


def steps(seen, net):
    return [e for e in seen.events if e.kind == "step" and e.net == net]


def forwards(seen, net):
    return [e for e in seen.events if e.kind == "forward" and e.net == net]


# the losses -----------------------------------------------------------------------------------------------------------

REAL, FAKE = np.array([0.3, -2, 7.5, 0, -9]), np.array([1.1, -0.4, 12, -13])  # means apart: unequal numbers


def sigmoid(t):
    return 1 / (1 + np.exp(-t))


def softplus(t):
    return np.logaddexp(0, t)


CROSS_ENTROPY = [dcgan, cdcgan, unrolled, bigan]
D_LOSS = softplus(-REAL).mean() + softplus(FAKE).mean(), -sigmoid(-REAL) / 5, sigmoid(FAKE) / 4
SCORES = FAKE.mean() - REAL.mean(), -np.ones(5) / 5, np.ones(4) / 4
NS = softplus(-FAKE).mean(), 0 * REAL, -sigmoid(-FAKE) / 4
LOSSES = {
    **{f"{m.__name__} D": (m.discriminator_loss, *D_LOSS) for m in CROSS_ENTROPY},
    **{f"{m.__name__} D": (m.discriminator_loss, *SCORES) for m in (wgan_clip, wgan_gp)},
    "dcgan ns": (lambda r, f: dcgan.generator_loss(f, "ns"), *NS),
    "cdcgan ns": (lambda r, f: cdcgan.generator_loss(f), *NS),
    "unrolled ns": (lambda r, f: unrolled.generator_loss(f, "ns", r), *NS),
    "dcgan minimax": (  # log(1 - D(G(z)))
        lambda r, f: dcgan.generator_loss(f, "minimax"),
        -softplus(FAKE).mean(),
        0 * REAL,
        -sigmoid(FAKE) / 4,
    ),
    "unrolled minimax": (lambda r, f: unrolled.generator_loss(f, "minimax", r), *(-v for v in D_LOSS)),
    "bigan swapped": (
        bigan.generator_loss,
        softplus(REAL).mean() + softplus(-FAKE).mean(),
        sigmoid(REAL) / 5,
        -sigmoid(-FAKE) / 4,
    ),
    "wgan_clip G": (lambda r, f: wgan_clip.generator_loss(f), -FAKE.mean(), 0 * REAL, -np.ones(4) / 4),
    "wgan_gp G": (lambda r, f: wgan_gp.generator_loss(f), -FAKE.mean(), 0 * REAL, -np.ones(4) / 4),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_slopes(name):
    loss, value, *slopes = LOSSES[name]
    real, fake = (torch.tensor(v, requires_grad=True) for v in (REAL, FAKE))
    out = loss(real, fake)
    assert out.item() == pytest.approx(value, abs=1e-12)
    grads = torch.autograd.grad(out, [real, fake], allow_unused=True, materialize_grads=True)
    for grad, slope in zip(grads, slopes):
        torch.testing.assert_close(grad, torch.tensor(slope), **EXACT)


@pytest.mark.parametrize("module", CROSS_ENTROPY, ids=lambda m: m.__name__)
def test_discriminator_loss_is_torchs_cross_entropy(module):
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    wanted = F.binary_cross_entropy(real.sigmoid(), torch.ones(5))
    wanted = wanted + F.binary_cross_entropy(fake.sigmoid(), torch.zeros(4))
    assert module.discriminator_loss(real, fake).item() == pytest.approx(wanted.item(), abs=1e-9)  # torch clamps logs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [80, 1e4])
def test_losses_far_out_are_finite(size, dtype):
    """At +-80 sigmoid rounds to 0 or 1 in float32, and log of it to -inf; a slope is 1 where D is wrong."""

    def ends(loss):
        f = torch.tensor([-size, size], dtype=dtype, requires_grad=True)
        value = loss(f)
        value.backward()
        assert value.isfinite() and f.grad.isfinite().all()
        return [value.item(), *(2 * f.grad).tolist()]

    zero = torch.zeros(1, dtype=dtype)
    log2 = math.log(2)
    for module in CROSS_ENTROPY:
        d_loss = module.discriminator_loss
        assert ends(lambda f, loss=d_loss: loss(f, zero) - log2) == pytest.approx([size / 2, -1, 0], abs=1e-5)
        assert ends(lambda f, loss=d_loss: loss(zero, f) - log2) == pytest.approx([size / 2, 0, 1], abs=1e-5)
    for loss in (dcgan.generator_loss, cdcgan.generator_loss, unrolled.generator_loss):
        assert ends(loss) == pytest.approx([size / 2, -1, 0], abs=1e-5)
    assert ends(lambda f: dcgan.generator_loss(f, "minimax")) == pytest.approx([-size / 2, 0, -1], abs=1e-5)
    assert ends(lambda f: unrolled.generator_loss(f, "minimax", f)) == pytest.approx([-size, 1, -1], abs=1e-5)
    assert ends(lambda f: bigan.generator_loss(f, f)) == pytest.approx([size, -1, 1], abs=1e-5)


# the penalties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (1, 4, 4), (3, 4, 4)])
def test_squared_slope_of_a_linear_logit(shape):
    w = torch.randn(shape, requires_grad=True)
    value = dcgan.squared_gradient(lambda x: (x * w).flatten(1).sum(1) + 3, torch.randn(5, *shape))
    torch.testing.assert_close(value, w.detach().square().sum(), **EXACT)  # over the whole picture
    torch.testing.assert_close(torch.autograd.grad(value, w)[0], 2 * w.detach(), **EXACT)


@pytest.mark.parametrize("a", [0.15, -2.0])
def test_squared_slope_of_a_quadratic_logit(a):
    x = torch.randn(6, 2, 3, 3)
    a = torch.tensor(a, requires_grad=True)
    value = dcgan.squared_gradient(lambda x: a / 2 * x.square().flatten(1).sum(1), x)
    mean = x.flatten(1).square().sum(1).mean()
    torch.testing.assert_close(value, a.detach() ** 2 * mean, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, a)[0], 2 * a.detach() * mean, rtol=1e-13, atol=1e-12)


@torch.no_grad()
def numeric_squared_slope(D, x, h=1e-4):
    """Without autograd: central differences in every pixel."""
    pixels = h * torch.eye(x[0].numel()).view(-1, 1, *x.shape[1:])
    ahead, behind = (D((x + e).flatten(0, 1)).view(-1, len(x)) for e in (pixels, -pixels))
    return ((ahead - behind) / (2 * h)).square().sum(0).mean()


def test_squared_slope_differentiates_to_every_weight():
    layers = [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Softplus(), nn.Linear(4, 1)]
    D = nn.Sequential(*layers, nn.Flatten(0))
    x, h = torch.randn(4, 2, 4, 4), 1e-4
    value = dcgan.squared_gradient(D, x)
    assert value.item() == pytest.approx(numeric_squared_slope(D, x).item(), rel=1e-6)
    *grads, last_bias = torch.autograd.grad(value, list(D.parameters()), allow_unused=True, materialize_grads=True)
    assert last_bias.abs().max() == 0  # a constant added to the logit has no slope
    for p, grad in zip(D.parameters(), grads):
        assert grad.abs().max() > 1e-3
        numeric = torch.empty(p.numel())
        for i in range(p.numel()):
            ends = []
            for step in (h, -2 * h):
                p.data.view(-1)[i] += step
                ends.append(numeric_squared_slope(D, x).item())
            p.data.view(-1)[i] += h
            numeric[i] = (ends[0] - ends[1]) / (2 * h)
        torch.testing.assert_close(grad.flatten(), numeric, rtol=1e-5, atol=1e-6)


def test_squared_slope_sends_no_gradient_to_the_pictures():
    x, w = torch.randn(3, 1, 4, 4, requires_grad=True), torch.randn(1, 4, 4, requires_grad=True)
    dcgan.squared_gradient(lambda x: (x * w).square().flatten(1).sum(1), x * 2).backward()
    assert x.grad is None and w.grad.abs().min() > 0


@pytest.mark.parametrize("argv", [["--image-size", "28"], ["--image-size", "32"], ["--arch", "mlp"]])
def test_penalised_logit_looks_at_one_picture_at_a_time(argv):
    """Perturbing one leaves the others' slopes alone by default; batch norm, obeyed when asked for, breaks that."""
    changes = []
    for norm in ("none", "batch"):
        args = dcgan.parse_args([*argv, "--ndf", "4", "--d-norm", norm])
        D = dcgan.Discriminator(args, 1)
        for p in D.parameters():
            p.data.mul_(3)  # away from the start, where everything is nearly linear
        x = torch.randn(4, 1, args.image_size, args.image_size, requires_grad=True)
        other = x.detach().clone()
        other[2] = 3 * torch.randn_like(other[2])
        slopes = [torch.autograd.grad(D(v).sum(), v)[0] for v in (x, other.requires_grad_())]
        kept = [0, 1, 3]
        changes.append((slopes[0][kept] - slopes[1][kept]).abs().max() / slopes[0].abs().max())
        assert not torch.equal(slopes[0][2], slopes[1][2])
    assert changes[0] < 1e-10 and changes[1] > 1e-4


class Quadratic(nn.Module):
    """f(x) = a/2 ||x||^2 + b."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3))
        self.b = nn.Parameter(torch.tensor(-0.1))

    def forward(self, x):
        return self.a / 2 * x.flatten(1).square().sum(1) + self.b


@pytest.mark.parametrize("gp, r1, r2", [(0, 0, 0), (0.5, 0, 0), (0, 3.0, 0), (0, 0, 3.0), (0.7, 2.0, 1.0)])
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_training_adds_both_terms_for_gp_and_half_of_gamma_for_r1_and_r2(monkeypatch, kind, gp, r1, r2):
    """The columns d_loss and penalty, and the gradient D steps along, for logits whose slope is known."""
    argv = ["--paper", "--image-size", "16", "--ngf", "2", "--batch-size", "6", "--device", "cpu"]
    argv += ["--gp", str(gp), "--r1", str(r1), "--r2", str(r2), "--d-norm", "none"]
    linear = nn.Sequential(nn.Flatten(), nn.Linear(256, 1), nn.Flatten(0))
    seen = run(monkeypatch, dcgan, argv, nets=(None, linear if kind == "linear" else Quadratic()))
    first = steps(seen, "D")[0]
    real, fake = forwards(seen, "D")[0].inputs[0].flatten(1).chunk(2)
    p, bias = (v.flatten() for v in first.before["D"])
    if kind == "linear":  # w.x + b
        f_real, f_fake = real @ p + bias, fake @ p + bias
        terms, slope_terms = (p @ p, p @ p), (2 * p, 2 * p)
        d_real, d_fake = real, fake
    else:
        f_real, f_fake = p / 2 * real.square().sum(1) + bias, p / 2 * fake.square().sum(1) + bias
        means = [v.square().sum(1).mean() for v in (real, fake)]
        terms, slope_terms = [(p * p * m).squeeze() for m in means], [2 * p * m for m in means]
        d_real, d_fake = (v.square().sum(1, keepdim=True) / 2 for v in (real, fake))
        assert abs(means[0] - means[1]) > 1
    penalty = (gp + r1 / 2) * terms[0] + (gp + r2 / 2) * terms[1]
    bce = torch.log1p(torch.exp(-f_real)).mean() + torch.log1p(torch.exp(f_fake)).mean()
    assert seen.logged[0]["penalty"] == pytest.approx(penalty.item(), rel=1e-12, abs=1e-12)
    assert seen.logged[0]["d_loss"] == pytest.approx((bce + penalty).item(), rel=1e-9)
    wanted = (torch.sigmoid(f_fake)[:, None] * d_fake - torch.sigmoid(-f_real)[:, None] * d_real).mean(0)
    wanted = wanted + (gp + r1 / 2) * slope_terms[0] + (gp + r2 / 2) * slope_terms[1]
    torch.testing.assert_close(first.grads["D"][0].flatten(), wanted, rtol=1e-9, atol=1e-9)


# clipping -------------------------------------------------------------------------------------------------------------


def test_clip_weights_bounds_every_parameter_and_returns_the_share_at_the_bound():
    D = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    values = [[[0.005, -0.5, 0.02], [0.0, 0.01, -0.01]], [-0.0099, 3.0], [1.0, -1.0], [0.002, 0.0], [[9.0, -0.001]]]
    values += [[-0.01000001]]
    for p, v in zip(D.parameters(), values):
        p.data = torch.tensor(v)
    D[1].running_mean.fill_(5)
    D[1].running_var.fill_(7)
    share = wgan_clip.clip_weights(D, 0.01)
    flat = torch.cat([p.detach().flatten() for p in D.parameters()]).tolist()
    assert flat[:6] == [0.005, -0.01, 0.01, 0, 0.01, -0.01]
    assert flat[6:] == [-0.0099, 0.01, 0.01, -0.01, 0.002, 0, 0.01, -0.001, -0.01]
    assert share.item() == pytest.approx(9 / 15, abs=1e-6)  # batch norm's scale (both) and shift (none) among them
    assert D[1].running_mean.tolist() == [5, 5] and D[1].running_var.tolist() == [7, 7]
    assert all(p.requires_grad and p.grad is None for p in D.parameters()) and not share.requires_grad


@pytest.mark.parametrize("c", [0.01, 0.03, 0.05, 0.1, 1 / 3])
def test_share_at_the_bound_is_exact_in_float32(c):
    """c is not a float32 number: a weight at the bound is still counted."""
    D = nn.Linear(10, 1, bias=False).float()
    D.weight.data = torch.tensor([[c, -c, 2 * c, -5.0, 0.99 * c, 0, -0.5 * c, 1, c / 2, -0.99 * c]]).float()
    assert wgan_clip.clip_weights(D, c).item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    "argv",
    [
        ["--paper", "--d-steps", "3"],
        ["--d-norm", "none", "--clip", ".02"],
        ["--paper", "--conditional", "--optimizer", "adam"],
        ["--arch", "mlp", "--g-norm", "layer"],
    ],
)
def test_training_clips_after_every_update_of_the_critic(monkeypatch, argv):
    flags = ["--image-size", "16", "--batch-size", "4", "--ngf", "4", "--ndf", "4", "--lr-d", ".02", "--device", "cpu"]
    seen = run(monkeypatch, wgan_clip, [*flags, *argv], iterations=2)
    c = seen.args.clip
    updates = steps(seen, "D")
    assert len(updates) == 2 * seen.args.d_steps
    for this in updates:
        assert max(p.abs().max() for p in this.after["D"]) > c  # RMSprop and Adam went past it
        following = next(e for e in forwards(seen, "D") if e.at > this.at)
        for p, free in zip(following.weights, this.after["D"]):
            assert torch.equal(p, free.clamp(-c, c))
    flat = torch.cat([p.clamp(-c, c).flatten() for p in updates[-1].after["D"]])
    last = seen.logged[-1]
    assert last["clipped"] == pytest.approx((flat.abs() == c).double().mean().item(), abs=1e-6)
    assert 0 < last["clipped"] < 1
    assert last["w_dist"] == pytest.approx(-last["d_loss"], abs=1e-15)


# what each backward reaches -------------------------------------------------------------------------------------------

SMALL = ["--paper", "--batch-size", "6", "--ngf", "4", "--ndf", "4", "--latent-dim", "5", "--device", "cpu"]
SMALL += ["--d-steps", "2", "--g-steps", "2"]
LOOPS = [
    (dcgan, ""),  # of the paper: batch norm in D
    (dcgan, "--loss minimax"),
    (dcgan, "--norm-first"),
    (dcgan, "--d-norm none --r1 2 --penalty-share .25"),  # the default method
    (dcgan, "--gp .5"),
    (dcgan, "--gp .5 --r1 2 --r2 1 --d-norm batch"),
    (dcgan, "--r2 2 --d-norm batch --penalty-share .01"),  # of two images at least
    (dcgan, "--loss relativistic --r1 1 --arch mlp"),
    (cdcgan, ""),
    (cdcgan, "--d-ignores-label"),
    (cdcgan, "--d-norm none --r1 2 --penalty-share .3"),
    (cdcgan, "--arch mlp"),
    (wgan_clip, ""),
    (wgan_clip, "--d-norm none"),
    (wgan_clip, "--arch mlp --d-norm batch"),
    (wgan_clip, "--conditional"),
    (wgan_clip, "--conditional --d-norm none"),
    (wgan_clip, "--conditional --d-ignores-label"),
]
LOOP = pytest.mark.parametrize("module, flags", LOOPS, ids=[f"{m.__name__} {flags}" for m, flags in LOOPS])


def small_run(monkeypatch, module, flags, iterations=1):
    return run(monkeypatch, module, [*SMALL, "--image-size", "16", *flags.split()], iterations)


def weights_of_penalties(args):
    """What stands before E||grad f||^2 on real images, and on fake ones."""
    gp, r1, r2 = (getattr(args, name, 0) for name in ("gp", "r1", "r2"))
    return gp + r1 / 2, gp + r2 / 2


def penalized(args):
    """How many images of the six a penalty is of. Batch norm needs two."""
    return max(math.ceil(args.penalty_share * 6), 2 if args.d_norm == "batch" else 1)


def d_objective(args, D, real, fake, y=()):
    """D's objective, term by term: each kind of picture through D on its own."""

    def mean_squared_slope(x):
        k = penalized(args)
        x, label = x[:k].clone().requires_grad_(), [v[:k] for v in y]
        if args.d_norm == "batch":  # one logit moves with every picture: what is meant is the slope of the sum
            (slope,) = torch.autograd.grad(D(x, *label).sum(), x, create_graph=True)
            return slope.pow(2).sum() / k
        slopes = [torch.autograd.grad(D(x, *label)[i], x, create_graph=True)[0] for i in range(k)]
        return sum(slope.pow(2).sum() for slope in slopes) / k

    f_real, f_fake = D(real, *y), D(fake, *y)
    if hasattr(args, "clip"):
        return f_fake.sum() / 6 - f_real.sum() / 6
    if getattr(args, "loss", "ns") == "relativistic":
        loss = torch.log1p(torch.exp(f_fake - f_real)).sum() / 6
    else:
        loss = torch.log1p(torch.exp(-f_real)).sum() / 6 + torch.log1p(torch.exp(f_fake)).sum() / 6
    for weight, x in zip(weights_of_penalties(args), (real, fake)):
        if weight:
            loss = loss + weight * mean_squared_slope(x)
    return loss


def g_objective(args, D, real, fake, y=()):
    f = D(fake, *y)
    if hasattr(args, "clip"):
        return -f.sum() / 6
    loss = getattr(args, "loss", "ns")
    if loss == "relativistic":
        f = f - D(real, *y)
    return -torch.log1p(torch.exp(f)).sum() / 6 if loss == "minimax" else torch.log1p(torch.exp(-f)).sum() / 6


def close_gradients(grads, loss, net):
    wanted = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)
    for grad, value in zip(grads, wanted):
        torch.testing.assert_close(grad, value, rtol=1e-8, atol=1e-11)


@LOOP
def test_gradients_are_those_of_the_objective_and_flow_only_where_they_should(monkeypatch, module, flags):
    seen = small_run(monkeypatch, module, flags, iterations=2)
    args = seen.args
    label_of = {tuple(p.flatten().tolist()): int(c) for p, c in zip(seen.x.double() / 127.5 - 1, seen.y)}
    order, since = [], []
    last = {"G": None, "D": None}
    for event in seen.events:
        if event.kind == "forward":
            since.append(event)
            continue
        order.append(event.net)
        G, D = event.copies
        g_calls, d_calls = ([e for e in since if e.net == k] for k in "GD")
        assert len(g_calls) == 1 and all(e.train for e in since)
        z, *y = g_calls[0].inputs
        assert z.shape == (6, 5) and len(y) == (module is not dcgan)
        fake = G(z, *y)
        sizes = [len(e.inputs[0]) for e in d_calls]
        if event.net == "D":
            assert not g_calls[0].graph  # the fakes carry no graph
            terms = [penalized(args) for weight in weights_of_penalties(args) if weight]
            assert sizes == ([6, 6] if args.d_norm == "batch" else [12]) + terms
            real, made = torch.cat([e.inputs[0] for e in d_calls])[:12].chunk(2)
            torch.testing.assert_close(made, fake.detach(), rtol=1e-12, atol=1e-12)
            labels = [label_of[tuple(p.flatten().tolist())] for p in real]  # each is one of the training images
            for label in y:
                assert label.tolist() == labels
            for e in d_calls:
                for label in e.inputs[1:]:
                    assert label.tolist() == (labels * 2)[: len(e.inputs[0])]
            close_gradients(event.grads["D"], d_objective(args, D, real, fake.detach(), y), D)
            other = "G"
        else:
            assert g_calls[0].graph and d_calls[-1].slope
            assert sizes == ([6, 6] if "relativistic" in flags else [6])
            close_gradients(event.grads["G"], g_objective(args, D, real, fake, y), G)
            for e in [*g_calls, *d_calls]:
                for label in e.inputs[1:]:
                    assert label.tolist() == labels  # of the last D update
            other = "D"
        for now, then in zip(event.grads[other], last[other] or [None] * 999):
            assert now is None or torch.equal(now, then)  # nothing was added since its own step
        for now, then in zip(event.after[other], event.before[other]):
            assert torch.equal(now, then)
        last[event.net], since = event.grads[event.net], []
    assert order == ["D", "D", "G", "G"] * 2
    assert all(p.requires_grad for net in (seen.G, seen.D) for p in net.parameters())
    told = module is cdcgan or "--conditional" in flags
    assert seen.classes == {"0": 20, "1": 20, "2": 20}
    assert bool(seen.conditional) == told


@LOOP
def test_logged_values_are_those_of_the_last_updates(monkeypatch, module, flags):
    seen = small_run(monkeypatch, module, flags)
    first, event = steps(seen, "D")
    calls = [e for e in seen.events[first.at : event.at] if e.kind == "forward" and e.net == "D"]
    real, fake = torch.cat([e.inputs[0] for e in calls])[:12].chunk(2)
    D, y = event.copies[1], [label[:6] for label in calls[0].inputs[1:]]
    (row,) = seen.logged
    assert row["d_loss"] == pytest.approx(d_objective(seen.args, D, real, fake, y).item(), rel=1e-9)
    wins = [float(a > b) for a in D(real, *y) for b in D(fake, *y)]
    assert row["d_acc"] == pytest.approx(sum(wins) / 36, abs=1e-6)
    G, D = steps(seen, "G")[-1].copies
    z, *y = forwards(seen, "G")[-1].inputs
    assert row["g_loss"] == pytest.approx(g_objective(seen.args, D, real, G(z, *y), y).item(), rel=1e-9)


@pytest.mark.parametrize("module", [dcgan, cdcgan, wgan_clip, unrolled, mdgan], ids=lambda m: m.__name__)
def test_every_noise_is_fresh_and_every_batch_the_next(monkeypatch, module):
    seen = small_run(monkeypatch, module, "", iterations=2)
    zs = [tuple(row.tolist()) for e in forwards(seen, "G") for row in e.inputs[0]]
    assert len(zs) == len(set(zs)) == 8 * 6
    pairs = 6 if getattr(seen.args, "d_norm", "none") == "batch" else 12  # D's own forwards, but for those of fakes
    real = [e.inputs[0][:6] for e in forwards(seen, "D") if not e.slope and len(e.inputs[0]) == pairs]
    rows = [tuple(p.flatten().tolist()) for x in real[:: 2 if pairs == 6 else 1] for p in x]
    assert len(rows) == len(set(rows)) == 4 * 6  # within an epoch none comes twice


def test_a_loss_that_is_not_there_is_no_other_loss():
    """A kind that only one of the two functions knows must not train the other's default in silence."""
    logits = torch.zeros(3)
    for loss in (
        lambda: dcgan.discriminator_loss(logits, logits, "hinge"),
        lambda: dcgan.generator_loss(logits, "hinge"),
        lambda: unrolled.generator_loss(logits, "hinge", logits),
        lambda: mdgan.generator_loss(logits - 1, "hinge"),
        lambda: toy2d.generator_loss("gan", "hinge", logits[None]),
    ):
        with pytest.raises(ValueError, match="no loss for hinge"):
            loss()
