"""Losses, penalties and clipping of dcgan.py, cdcgan.py and wgan_clip.py against closed forms, finite differences and
the objective written out; and, watching train(), what enters each forward and what each backward reaches."""
import copy
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import cdcgan
import dcgan
import wgan_clip

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(monkeypatch, module, argv, iterations=1, x=None, y=None, nets=None):
    """train() for some iterations on CPU without a Run: its events in order, networks, optimizers and logged values.
    An event is ("forward", "G" or "D", inputs, with or without gradients) or ("step", ...) with .grads and .before."""
    size = module.parse_args(argv).image_size
    if x is None:
        x = torch.randint(0, 256, (60, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(len(x)) % 3 if y is None else y
    seen = SimpleNamespace(events=[], logged=[], x=x, y=y)

    def note(**what):
        seen.events.append(SimpleNamespace(at=len(seen.events), **what))

    made = []

    def watched(make, given):
        def call(*args):
            net = given or make(*args)
            made.append(net)
            name = "GD"[len(made) - 1]
            setattr(seen, name, net)

            def noted(m, inputs):
                if m is net:  # not a copy of it
                    note(kind="forward", net=name, inputs=[i.detach().clone() for i in inputs], train=m.training,
                         graph=torch.is_grad_enabled(), slope=inputs[0].requires_grad, d_weights=params(seen.D))

            net.register_forward_pre_hook(noted)
            return net
        return call

    def fake_run(args, nets, opts, ema, draw, rate, batch, labels=1):
        for k, v in locals().items(): setattr(seen, k, v)
        stand_in = mock.MagicMock()
        stand_in.training.side_effect = [True] * iterations + [False]
        stand_in.record.side_effect = lambda values: seen.logged.append({k: v.item() for k, v in values.items()})
        stand_in.noise.side_effect = lambda n, *key: torch.randn(n, args.latent_dim)
        return stand_in

    def params(net):
        return [p.detach().clone() for p in net.parameters()]

    def grads(net):
        return [None if p.grad is None else p.grad.clone() for p in net.parameters()]

    def name_of(opt):
        first = opt.param_groups[0]["params"][0]
        return "G" if first is next(seen.G.parameters()) else "D"

    def before(opt, *_):
        nets = {"G": seen.G, "D": seen.D}
        note(kind="step", net=name_of(opt), opt=opt, grads={k: grads(v) for k, v in nets.items()},
             before={k: params(v) for k, v in nets.items()}, copies=copy.deepcopy((seen.G, seen.D)))

    def after(opt, *_):
        seen.events[-1].after = {k: params(getattr(seen, k)) for k in "GD"}

    nets = nets or (None, None)
    for name, fake in (("make_generator", watched(module.make_generator, nets[0])), ("Run", fake_run),
                       ("make_discriminator", watched(module.make_discriminator, nets[1])),
                       ("load_data", lambda *a, **k: (x, y)), ("save_sheet", lambda *a: None)):
        monkeypatch.setattr(module, name, fake)
    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        module.train(module.parse_args(argv))
    finally:
        for hook in hooks: hook.remove()
        monkeypatch.undo()
    return seen


def steps(seen, net):
    return [e for e in seen.events if e.kind == "step" and e.net == net]


# the losses -----------------------------------------------------------------------------------------------------------

REAL, FAKE = np.array([0.3, -2, 7.5, 0, -9]), np.array([1.1, -0.4, 12, -13, 0])


def sigmoid(t):
    return 1 / (1 + np.exp(-t))


@pytest.mark.parametrize("module", [dcgan, cdcgan], ids=lambda m: m.__name__)
def test_discriminator_loss_is_the_cross_entropy(module):
    real, fake = (torch.tensor(v, requires_grad=True) for v in (REAL, FAKE[:4]))  # means apart: unequal numbers
    loss = module.discriminator_loss(real, fake)
    loss.backward()
    assert loss.item() == pytest.approx(np.logaddexp(0, -REAL).mean() + np.logaddexp(0, FAKE[:4]).mean(), abs=1e-12)
    wanted = F.binary_cross_entropy(real.sigmoid(), torch.ones(5)) + F.binary_cross_entropy(
        fake.sigmoid(), torch.zeros(4))
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-9)  # torch clamps its logarithms
    torch.testing.assert_close(real.grad, torch.tensor(-sigmoid(-REAL) / 5), **EXACT)
    torch.testing.assert_close(fake.grad, torch.tensor(sigmoid(FAKE[:4]) / 4), **EXACT)


@pytest.mark.parametrize("loss, value, slope", [
    (lambda f: dcgan.generator_loss(f, "ns"), np.logaddexp(0, -FAKE), -sigmoid(-FAKE)),
    (lambda f: dcgan.generator_loss(f, "minimax"), -np.logaddexp(0, FAKE), -sigmoid(FAKE)),  # log(1 - D(G(z)))
    (cdcgan.generator_loss, np.logaddexp(0, -FAKE), -sigmoid(-FAKE)),
    (wgan_clip.generator_loss, -FAKE, -np.ones(5))], ids=["ns", "minimax", "cdcgan", "wgan"])
def test_generator_losses(loss, value, slope):
    fake = torch.tensor(FAKE, requires_grad=True)
    out = loss(fake)
    out.backward()
    assert out.item() == pytest.approx(value.mean(), abs=1e-12)
    torch.testing.assert_close(fake.grad, torch.tensor(slope / 5), **EXACT)


def test_discriminator_loss_of_scores():
    real, fake = torch.tensor([1.0, 2, 6], requires_grad=True), torch.tensor([0.5, -1], requires_grad=True)
    loss = wgan_clip.discriminator_loss(real, fake)
    loss.backward()
    assert loss.item() == pytest.approx(-0.25 - 3, abs=1e-15)
    torch.testing.assert_close(real.grad, torch.full((3,), -1 / 3), **EXACT)
    torch.testing.assert_close(fake.grad, torch.full((2,), 1 / 2), **EXACT)


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
    for module in (dcgan, cdcgan):
        assert ends(lambda f, m=module: m.discriminator_loss(f, zero) - m.discriminator_loss(
            zero, zero) / 2) == pytest.approx([size / 2, -1, 0], abs=1e-5)
        assert ends(lambda f, m=module: m.discriminator_loss(zero, f) - m.discriminator_loss(
            zero, zero) / 2) == pytest.approx([size / 2, 0, 1], abs=1e-5)
    assert ends(lambda f: dcgan.generator_loss(f, "ns")) == pytest.approx([size / 2, -1, 0], abs=1e-5)
    assert ends(cdcgan.generator_loss) == pytest.approx([size / 2, -1, 0], abs=1e-5)
    assert ends(lambda f: dcgan.generator_loss(f, "minimax")) == pytest.approx([-size / 2, 0, -1], abs=1e-5)


# the penalties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (1, 4, 4), (3, 4, 4)])
def test_squared_slope_of_a_linear_logit(shape):
    w = torch.randn(shape, requires_grad=True)
    value = dcgan.squared_gradient(lambda x: (x * w).flatten(1).sum(1) + 3, torch.randn(5, *shape))
    torch.testing.assert_close(value, w.detach().square().sum(), **EXACT)  # over the whole picture
    torch.testing.assert_close(torch.autograd.grad(value, w)[0], 2 * w.detach(), **EXACT)


@pytest.mark.parametrize("a", [0.15, -2.0])
def test_squared_slope_of_a_quadratic_logit(a):
    x, a = torch.randn(6, 2, 3, 3), torch.tensor(a, requires_grad=True)
    value = dcgan.squared_gradient(lambda x: a / 2 * x.square().flatten(1).sum(1), x)
    mean = x.flatten(1).square().sum(1).mean()
    torch.testing.assert_close(value, a.detach() ** 2 * mean, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, a)[0], 2 * a.detach() * mean, rtol=1e-13, atol=1e-12)


def numeric_squared_slope(D, x, h=1e-4):
    """Without autograd: central differences in every pixel."""
    total = 0.0
    with torch.no_grad():
        for i in range(x[0].numel()):
            e = torch.zeros_like(x[0]).flatten()
            e[i] = h
            total = total + ((D(x + e.view_as(x[0])) - D(x - e.view_as(x[0]))) / (2 * h)).square().mean()
    return total


def test_squared_slope_differentiates_to_every_weight():
    D = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Softplus(), nn.Linear(4, 1),
                      nn.Flatten(0))
    x, h = torch.randn(4, 2, 4, 4), 1e-4
    value = dcgan.squared_gradient(D, x)
    assert value.item() == pytest.approx(numeric_squared_slope(D, x).item(), rel=1e-6)
    *grads, last_bias = torch.autograd.grad(value, list(D.parameters()), allow_unused=True, materialize_grads=True)
    assert last_bias.abs().max() == 0  # a constant added to the logit has no slope
    for p, grad in zip(D.parameters(), grads):
        numeric = torch.empty_like(p)
        for i in range(p.numel()):
            ends = []
            for step in (h, -2 * h):
                p.data.view(-1)[i] += step
                ends.append(numeric_squared_slope(D, x).item())
            p.data.view(-1)[i] += h
            numeric.view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(grad, numeric, rtol=1e-5, atol=1e-6)


def test_squared_slope_sends_no_gradient_to_the_pictures():
    x, w = torch.randn(3, 1, 4, 4, requires_grad=True), torch.randn(1, 4, 4, requires_grad=True)
    dcgan.squared_gradient(lambda x: (x * w).square().flatten(1).sum(1), x * 2).backward()
    assert x.grad is None and w.grad.abs().min() > 0


@pytest.mark.parametrize("argv", [["--image-size", "28"], ["--image-size", "32"], ["--arch", "mlp"]])
def test_penalised_logit_looks_at_one_picture_at_a_time(argv):
    """Perturbing one leaves the others' slopes alone under --gp; batch norm, obeyed when asked for, breaks that."""
    changes = []
    for flags in (["--gp", "1"], ["--gp", "1", "--d-norm", "batch"]):
        args = dcgan.parse_args([*argv, "--ndf", "4", *flags])
        D = dcgan.make_discriminator(args, 1)
        for p in D.parameters(): p.data.mul_(3)  # away from the start, where everything is nearly linear
        x = torch.randn(4, 1, args.image_size, args.image_size, requires_grad=True)
        other = x.detach().clone()
        other[2] = 3 * torch.randn_like(other[2])
        slopes = [torch.autograd.grad(D(v).sum(), v)[0] for v in (x, other.requires_grad_())]
        kept = [0, 1, 3]
        changes.append((slopes[0][kept] - slopes[1][kept]).abs().max() / slopes[0].abs().max())
        assert not torch.equal(slopes[0][2], slopes[1][2])
    assert changes[0] < 1e-10 and changes[1] > 1e-4


def polynomial(kind, channels=1, side=28):
    """f(x) = w.x + b, or a/2 ||x||^2 + b, as a network."""
    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.1))

        def forward(self, x):
            return self.a / 2 * x.flatten(1).square().sum(1) + self.b

    return Quadratic() if kind == "quadratic" else nn.Sequential(nn.Flatten(), nn.Linear(side * side, 1), nn.Flatten(0))


@pytest.mark.parametrize("gp, r1", [(0, 0), (0.5, 0), (0, 3.0), (0.7, 2.0)])
def test_training_adds_the_sum_of_both_terms_for_gp_and_half_of_gamma_on_real_for_r1(monkeypatch, gp, r1):
    """The columns d_loss and penalty, and the gradient D steps along, for logits whose slope is known."""
    argv = ["--arch", "mlp", "--batch-size", "6", "--gp", str(gp), "--r1", str(r1), "--device", "cpu"]
    for kind in ("linear", "quadratic"):
        seen = run(monkeypatch, dcgan, argv, nets=(None, net := polynomial(kind).double()))
        first = steps(seen, "D")[0]
        both = next(e for e in seen.events if e.kind == "forward" and e.net == "D").inputs[0]
        real, fake = both.flatten(1).chunk(2)
        p, bias = (v.flatten() for v in first.before["D"])
        if kind == "linear":
            f_real, f_fake = real @ p + bias, fake @ p + bias
            terms, slope_terms = (p @ p, p @ p), (2 * p, 2 * p)
            d_real, d_fake = real, fake
        else:
            f_real, f_fake = p / 2 * real.square().sum(1) + bias, p / 2 * fake.square().sum(1) + bias
            means = [v.square().sum(1).mean() for v in (real, fake)]
            terms, slope_terms = [(p * p * m).squeeze() for m in means], [2 * p * m for m in means]
            d_real, d_fake = (v.square().sum(1, keepdim=True) / 2 for v in (real, fake))
            assert abs(means[0] - means[1]) > 1
        penalty = gp * (terms[0] + terms[1]) + r1 / 2 * terms[0]
        bce = torch.log1p(torch.exp(-f_real)).mean() + torch.log1p(torch.exp(f_fake)).mean()
        assert seen.logged[0]["penalty"] == pytest.approx(penalty.item(), rel=1e-12, abs=1e-12)
        assert seen.logged[0]["d_loss"] == pytest.approx((bce + penalty).item(), rel=1e-9)
        wanted = (torch.sigmoid(f_fake)[:, None] * d_fake - torch.sigmoid(-f_real)[:, None] * d_real).mean(0)
        wanted = wanted + gp * (slope_terms[0] + slope_terms[1]) + r1 / 2 * slope_terms[0]
        torch.testing.assert_close(first.grads["D"][0].flatten(), wanted, rtol=1e-9, atol=1e-9)
        assert net is seen.D


# clipping -------------------------------------------------------------------------------------------------------------


def test_clip_weights_bounds_every_parameter_and_returns_the_share_at_the_bound():
    D = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    values = [[[0.005, -0.5, 0.02], [0.0, 0.01, -0.01]], [-0.0099, 3.0], [1.0, -1.0], [0.002, 0.0], [[9.0, -0.001]],
              [-0.01000001]]
    for p, v in zip(D.parameters(), values): p.data = torch.tensor(v)
    D[1].running_mean.fill_(5), D[1].running_var.fill_(7)
    share = wgan_clip.clip_weights(D, 0.01)
    flat = torch.cat([p.detach().flatten() for p in D.parameters()])
    assert flat.tolist() == [0.005, -0.01, 0.01, 0, 0.01, -0.01, -0.0099, 0.01, 0.01, -0.01, 0.002, 0, 0.01, -0.001,
                             -0.01]
    assert share.item() == pytest.approx(9 / 15, abs=1e-6)  # batch norm's scale (both) and shift (none) among them
    assert D[1].running_mean.tolist() == [5, 5] and D[1].running_var.tolist() == [7, 7]
    assert all(p.requires_grad and p.grad is None for p in D.parameters()) and not share.requires_grad


@pytest.mark.parametrize("c", [0.01, 0.03, 0.05, 0.1, 1 / 3])
def test_share_at_the_bound_is_exact_in_float32(c):
    """c is not a float32 number: a weight at the bound is still counted."""
    D = nn.Linear(10, 1, bias=False).float()
    D.weight.data = torch.tensor([[c, -c, 2 * c, -5.0, 0.99 * c, 0, -0.5 * c, 1, c / 2, -0.99 * c]]).float()
    assert wgan_clip.clip_weights(D, c).item() == pytest.approx(0.5)


@pytest.mark.parametrize("argv", [["--d-steps", "3"], ["--d-steps", "1", "--clip", ".05"], ["--d-norm", "none"],
                                  ["--conditional", "--optimizer", "adam"], ["--arch", "mlp", "--g-norm", "layer"]])
def test_training_clips_after_every_update_of_the_critic(monkeypatch, argv):
    flags = ["--batch-size", "4", "--ngf", "4", "--ndf", "4", "--lr-d", ".02", "--device", "cpu", *argv]
    c = float(argv[argv.index("--clip") + 1]) if "--clip" in argv else 0.01
    seen = run(monkeypatch, wgan_clip, flags, iterations=2)
    updates = steps(seen, "D")
    assert len(updates) == 2 * wgan_clip.parse_args(flags).d_steps
    for this in updates:
        assert max(p.abs().max() for p in this.after["D"]) > c  # RMSprop and Adam went past it
        for p, free in zip(seen.events[this.at + 1].d_weights, this.after["D"]):  # before the next forward
            assert torch.equal(p, free.clamp(-c, c))
    flat = torch.cat([p.clamp(-c, c).flatten() for p in updates[-1].after["D"]])
    assert seen.logged[-1]["clipped"] == pytest.approx((flat.abs() == c).double().mean().item(), abs=1e-6)
    assert 0 < seen.logged[-1]["clipped"] < 1
    assert seen.logged[-1]["w_dist"] == pytest.approx(-seen.logged[-1]["d_loss"], abs=1e-15)


# what each backward reaches -------------------------------------------------------------------------------------------

SMALL = ["--batch-size", "6", "--ngf", "4", "--ndf", "4", "--latent-dim", "5", "--device", "cpu", "--d-steps", "2",
         "--g-steps", "2"]
LOOPS = [(dcgan, []), (dcgan, ["--loss", "minimax"]), (dcgan, ["--norm-first"]), (dcgan, ["--d-norm", "none"]),
         (dcgan, ["--gp", ".5"]), (dcgan, ["--r1", "2"]), (dcgan, ["--gp", ".5", "--d-norm", "batch"]),
         (dcgan, ["--arch", "mlp"]), (cdcgan, []), (cdcgan, ["--d-ignores-label"]), (cdcgan, ["--arch", "mlp"]),
         (wgan_clip, []), (wgan_clip, ["--d-norm", "none"]), (wgan_clip, ["--arch", "mlp"]),
         (wgan_clip, ["--arch", "mlp", "--d-norm", "batch"]), (wgan_clip, ["--conditional"]),
         (wgan_clip, ["--conditional", "--d-norm", "none"]), (wgan_clip, ["--conditional", "--d-ignores-label"])]
LOOP = pytest.mark.parametrize("module, argv", LOOPS, ids=[f"{m.__name__} {' '.join(a)}" for m, a in LOOPS])


def batch_norm_in_d(module, argv):
    if "--d-norm" in argv:
        return argv[argv.index("--d-norm") + 1] == "batch"
    return not {"mlp", "--gp", "--r1"} & set(argv)


def objective(module, argv, D, real, fake, y):
    """D's objective, term by term, from copies: each kind of picture through D on its own."""
    def f(x):
        return D(x, y) if y is not None else D(x)

    def slope(x):
        x = x.clone().requires_grad_()
        if batch_norm_in_d(module, argv):  # one logit moves with every picture: what is meant is the slope of the sum
            return torch.autograd.grad(f(x).sum(), x, create_graph=True)[0].pow(2).sum() / len(x)
        return sum(torch.autograd.grad(f(x)[i], x, create_graph=True)[0].pow(2).sum() for i in range(len(x))) / len(x)

    if module is wgan_clip:
        return f(fake).sum() / 6 - f(real).sum() / 6
    loss = torch.log1p(torch.exp(-f(real))).sum() / 6 + torch.log1p(torch.exp(f(fake))).sum() / 6
    if "--gp" in argv: loss = loss + 0.5 * slope(real) + 0.5 * slope(fake)
    if "--r1" in argv: loss = loss + 1.0 * slope(real)
    return loss


@LOOP
def test_gradients_are_those_of_the_objective_and_flow_only_where_they_should(monkeypatch, module, argv):
    seen = run(monkeypatch, module, [*SMALL, *argv], iterations=2)
    told = module is cdcgan or "--conditional" in argv  # G takes a label
    asks = told and "--d-ignores-label" not in argv  # so does D
    normed = batch_norm_in_d(module, argv)
    pictures = {tuple(p.flatten().tolist()) for p in seen.x.double() / 127.5 - 1}
    label_of = {tuple(p.flatten().tolist()): int(c) for p, c in zip(seen.x.double() / 127.5 - 1, seen.y)}
    order, last, since = [], {"G": None, "D": None}, []
    for event in seen.events:
        if event.kind == "forward":
            since.append(event)
            continue
        order.append(event.net)
        G, D = event.copies
        g_calls, d_calls = ([e for e in since if e.net == k] for k in "GD")
        assert len(g_calls) == 1 and all(e.train for e in since)
        z, *y = g_calls[0].inputs
        assert z.shape == (6, 5) and len(y) == told and all(len(e.inputs) == 1 + asks for e in d_calls)
        y = y[0] if told else None
        fake = G(z, y) if told else G(z)
        if event.net == "D":
            assert not g_calls[0].graph  # the fakes carry no graph
            sizes = [len(e.inputs[0]) for e in d_calls]
            terms = [6] * (2 * ("--gp" in argv) + ("--r1" in argv))
            assert sizes == ([6, 6] if normed else [12]) + terms
            real, made = (e.inputs[0] for e in d_calls[:2]) if normed else d_calls[0].inputs[0].chunk(2)
            torch.testing.assert_close(made, fake.detach(), rtol=1e-12, atol=1e-12)
            keys = [tuple(p.flatten().tolist()) for p in real]
            assert set(keys) <= pictures
            if told: assert [label_of[k] for k in keys] == y.tolist()
            if asks:
                assert torch.cat([e.inputs[1] for e in d_calls]).tolist() == y.tolist() * 2
            loss = objective(module, argv, D, real, fake.detach(), y if asks else None)
            wanted = torch.autograd.grad(loss, list(D.parameters()), allow_unused=True, materialize_grads=True)
            for grad, value in zip(event.grads["D"], wanted):
                torch.testing.assert_close(grad, value, rtol=1e-8, atol=1e-11)
            untouched = "G"
        else:
            assert g_calls[0].graph and [len(e.inputs[0]) for e in d_calls] == [6] and d_calls[0].slope
            f = D(fake, y) if asks else D(fake)
            loss = (-f.sum() if module is wgan_clip else -torch.log1p(torch.exp(f)).sum() if "minimax" in argv
                    else torch.log1p(torch.exp(-f)).sum()) / 6
            for grad, value in zip(event.grads["G"], torch.autograd.grad(loss, list(G.parameters()))):
                torch.testing.assert_close(grad, value, rtol=1e-8, atol=1e-11)
            if told: assert y.tolist() == seen.last_y  # the data's labels of the last D update
            if asks: assert d_calls[0].inputs[1].tolist() == y.tolist()
            untouched = "D"
        if event.net == "D" and told: seen.last_y = y.tolist()
        for now, then in zip(event.grads[untouched], last[untouched] or [None] * 999):
            assert now is None or torch.equal(now, then)  # nothing was added since its own step
        for now, then in zip(event.after[untouched], event.before[untouched]): assert torch.equal(now, then)
        last[event.net], since = event.grads[event.net], []
    assert order == ["D", "D", "G", "G"] * 2
    assert all(p.requires_grad for net in (seen.G, seen.D) for p in net.parameters())


@LOOP
def test_logged_values_are_those_of_the_last_updates(monkeypatch, module, argv):
    seen = run(monkeypatch, module, [*SMALL, *argv])
    asks = (module is cdcgan or "--conditional" in argv) and "--d-ignores-label" not in argv
    event = steps(seen, "D")[-1]
    calls = [e for e in seen.events[steps(seen, "D")[0].at:event.at] if e.kind == "forward" and e.net == "D"]
    real, fake = torch.cat([e.inputs[0] for e in calls])[:12].chunk(2)
    D, y = event.copies[1], calls[0].inputs[1][:6] if asks else None
    loss = objective(module, argv, D, real, fake, y)
    assert seen.logged[0]["d_loss"] == pytest.approx(loss.item(), rel=1e-9)
    f_real, f_fake = (D(v, y) if asks else D(v) for v in (real, fake))
    wins = sum(float(a > b) for a in f_real for b in f_fake) / 36
    assert seen.logged[0]["d_acc"] == pytest.approx(wins, abs=1e-6)


def test_every_noise_is_fresh_and_every_batch_the_next(monkeypatch):
    for module, argv in ((dcgan, []), (cdcgan, []), (wgan_clip, ["--conditional"])):
        seen = run(monkeypatch, module, [*SMALL, *argv], iterations=2)
        zs = [tuple(row.tolist()) for e in seen.events if e.kind == "forward" and e.net == "G" for row in e.inputs[0]]
        assert len(zs) == len(set(zs)) == 8 * 6
        real = [e.inputs[0] for e in seen.events if e.kind == "forward" and e.net == "D" and not e.slope][::2]
        rows = [tuple(p.flatten().tolist()) for x in real for p in x]
        assert len(rows) == len(set(rows)) == 4 * 6  # within an epoch none comes twice
