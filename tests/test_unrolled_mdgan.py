"""unrolled.py and mdgan.py: the steps ahead against closed forms, finite differences and torch.optim; the mixture
against torch.distributions, scipy and grids; and, watching train(), what each update is made of."""

import copy
import functools
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from test_gan_losses import (  # noqa: F401  float64: a fixture
    EXACT,
    SMALL,
    close_gradients,
    float64,
    forwards,
    run,
    sigmoid,
    softplus,
)
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import dcgan
import mdgan
import unrolled

pytestmark = pytest.mark.usefixtures("float64")


def cross_entropy(real, fake):
    """D's loss: -log D(x) - log(1 - D(G(z)))."""
    return -F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()


def bits(tree):
    """The bytes of every tensor of a state dict, and all plain values."""
    if torch.is_tensor(tree):
        return tree.dtype, tuple(tree.shape), tree.numpy().tobytes()
    if isinstance(tree, dict):
        return {k: bits(v) for k, v in tree.items()}
    return [bits(v) for v in tree] if isinstance(tree, (list, tuple)) else tree


@pytest.mark.parametrize("module, lr_g, lr_d", [(unrolled, 1e-3, 2e-4), (mdgan, 5e-4, 5e-4)])
def test_the_papers_settings(module, lr_g, lr_d):
    a = module.parse_args(["--paper"])
    assert (a.batch_size, a.d_steps, a.g_steps, a.lr_g, a.lr_d) == (32, 1, 1, lr_g, lr_d)
    assert (a.beta1, a.beta2, a.ngf, a.ndf, a.r1) == (0.5, 0.999, 16, 16, 0)
    if module is unrolled:
        assert (a.k, a.inner, a.loss) == (5, "adam", "ns")
    else:
        assert (a.mixture, a.embedding_dim, a.loss) == ("clusters", 9, "ns")


# unrolled: the steps ahead --------------------------------------------------------------------------------------------


class Dirac(nn.Module):
    """D(x) = t x."""

    def __init__(self, t):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(t))

    def forward(self, x):
        return self.t * x


def dirac(k, p, t, eta):
    """G's loss -L(f_k) and its slope in p, for data at 0 and G(z) = p."""
    D, zero, p = Dirac(t), torch.zeros(1), torch.tensor([p], requires_grad=True)
    params = unrolled.look_ahead(D, torch.optim.Adam(D.parameters()), zero, p, k, "sgd", eta)
    loss = unrolled.generator_loss(functional_call(D, params, (p,)), "minimax", functional_call(D, params, (zero,)))
    return params["t"].item(), loss.item(), torch.autograd.grad(loss, p)[0].item()


def dirac_by_hand(k, p, t, eta, first_order=False):
    slope = 0.0  # of t in p
    for _ in range(k):
        s = sigmoid(t * p)
        turn = s + p * s * (1 - s) * (t + p * slope)
        t, slope = t - eta * s * p, 0.0 if first_order else slope - eta * turn
    return t, -np.log(2) - softplus(t * p), -sigmoid(t * p) * (t + p * slope)


def test_a_dirac_gan_one_step_ahead():
    """With the slope through the step; without it, which is the classic mistake, the sign is another."""
    assert dirac(1, 1.3, 0.7, 0.5)[2] == pytest.approx(0.2005100176, abs=5e-11)
    assert dirac_by_hand(1, 1.3, 0.7, 0.5, first_order=True)[2] == pytest.approx(-0.1363186304, abs=5e-11)
    assert dirac(0, 1.3, 0.7, 0.5)[2] == pytest.approx(-0.4991001139, abs=5e-11)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("p, t, eta", [(1.3, 0.7, 0.5), (-0.4, 2.0, 0.3), (2.5, -0.6, 0.1)])
def test_a_dirac_gan_k_steps_ahead(k, p, t, eta):
    assert dirac(k, p, t, eta) == pytest.approx(dirac_by_hand(k, p, t, eta), abs=1e-12)
    numeric = (dirac(k, p + 1e-5, t, eta)[1] - dirac(k, p - 1e-5, t, eta)[1]) / 2e-5
    assert dirac(k, p, t, eta)[2] == pytest.approx(numeric, abs=1e-9)


class Ahead:
    """A tiny G and D, D's Adam with moments of a few steps, a batch of data and of noise."""

    def __init__(self, before=3, lr=0.02, betas=(0.5, 0.999), act=nn.Tanh, dead=False):
        torch.manual_seed(1)
        self.G = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.D = nn.Sequential(nn.Linear(2, 5), act(), nn.Linear(5, 1), nn.Flatten(0))
        if dead:
            self.D[0].bias.data[2] = -100
        self.opt = torch.optim.Adam(self.D.parameters(), lr, betas, fused=True)  # as the script's own: unrolled.adam
        for _ in range(before):
            self.opt.zero_grad()
            cross_entropy(self.D(torch.randn(7, 2) + 1), self.D(torch.randn(7, 2))).backward()
            self.opt.step()
        self.x_real, self.z = torch.randn(6, 2) + 1, torch.randn(6, 3)

    def loss(self, k, inner="adam", inner_lr=0.3, kind="ns", detached=False):
        x_fake = self.G(self.z)
        params = unrolled.look_ahead(
            self.D, self.opt, self.x_real, x_fake.detach() if detached else x_fake, k, inner, inner_lr
        )
        f_real, f_fake = (functional_call(self.D, params, (x,)) for x in (self.x_real, x_fake))
        return unrolled.generator_loss(f_fake, kind, f_real)

    def played(self, k, inner="adam", inner_lr=0.3, kind="ns"):
        return played(self.D, self.opt, self.x_real, self.G(self.z).detach(), k, inner, inner_lr, kind)[0]


def played(D, opt, x_real, x_fake, k, inner, inner_lr, kind):
    """The same without look_ahead: k real steps of torch.optim on a copy; G's loss, and the copy."""
    D = copy.deepcopy(D)
    if inner == "adam":
        again = torch.optim.Adam(
            D.parameters(), float(opt.param_groups[0]["lr"]), opt.param_groups[0]["betas"], fused=True
        )
        again.load_state_dict(copy.deepcopy(opt.state_dict()))  # which would otherwise share its moments
    else:
        again = torch.optim.SGD(D.parameters(), inner_lr)
    for _ in range(k):
        again.zero_grad()
        cross_entropy(D(x_real), D(x_fake)).backward()
        again.step()
    with torch.no_grad():
        real, fake = D(x_real), D(x_fake)
        loss = -F.logsigmoid(fake).mean() if kind == "ns" else -cross_entropy(real, fake)
    return loss.item(), D


def numeric_slope(f, p, i, h=1e-5):
    """Central difference of f() in the i-th number of p."""
    ends = []
    for step in (h, -2 * h):
        p.data.view(-1)[i] += step
        ends.append(f())
    p.data.view(-1)[i] += h
    return (ends[0] - ends[1]) / (2 * h)


@pytest.mark.parametrize("inner", ["adam", "sgd"])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["ns", "minimax"])
def test_slope_of_gs_loss_is_that_of_the_whole_game(inner, k, kind):
    """Against steps really taken by torch.optim, by central differences in single weights of G."""
    game = Ahead()
    loss = game.loss(k, inner, kind=kind)
    assert loss.item() == pytest.approx(game.played(k, inner, kind=kind), abs=1e-11)
    grads = torch.autograd.grad(loss, list(game.G.parameters()))
    assert max(g.abs().max() for g in grads) > 0.01
    for p, grad in zip(game.G.parameters(), grads):
        i = p.numel() // 2
        numeric = numeric_slope(lambda: game.played(k, inner, kind=kind), p, i)
        assert grad.view(-1)[i].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_the_slope_through_the_steps_is_no_small_thing(inner):
    """Without it the slope points elsewhere: an implementation of first order cannot pass the tests above."""
    game = Ahead()
    for kind in ("ns", "minimax"):
        full, first = (
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(game.loss(3, inner, kind=kind, detached=d), list(game.G.parameters()))
                ]
            )
            for d in (False, True)
        )
        assert (full - first).norm() > 0.1 * full.norm()


@pytest.mark.parametrize("before", [1, 8])
@pytest.mark.parametrize(
    "lr, betas", [(1e-3, (0.5, 0.999)), (0.01, (0.5, 0.999)), (0.01, (0.0, 0.9)), (0.01, (0.9, 0.95))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adam_ahead_is_torchs_adam(before, lr, betas, dtype):
    """Ten steps of the fused one, which trains, from live moments, at the rate that the group has now."""
    torch.set_default_dtype(dtype)
    game = Ahead(before, 0.05, betas)
    game.opt.param_groups[0]["lr"] = lr
    x_fake = game.G(game.z).detach()
    ahead = unrolled.look_ahead(game.D, game.opt, game.x_real, x_fake, 10, "adam")
    D = played(game.D, game.opt, game.x_real, x_fake, 10, "adam", None, "ns")[1]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-10
    for (name, p), (_, old) in zip(D.named_parameters(), game.D.named_parameters()):
        assert (p - old).abs().max() > lr  # they went somewhere
        torch.testing.assert_close(ahead[name], p, rtol=0, atol=tolerance)


@pytest.mark.parametrize("before", [1, 3, 40, 2000])
@pytest.mark.parametrize("betas", [(0.5, 0.999), (0.0, 0.9), (0.9, 0.9999)])
@pytest.mark.parametrize(
    "dtype, k, lr, tolerance",
    [(torch.float64, 1, 100, 1e-12), (torch.float64, 5, 0.05, 1e-12), (torch.float32, 1, 100, 5e-7)],
)
def test_steps_ahead_are_those_that_training_would_take(before, betas, dtype, k, lr, tolerance):
    """By the script's own optimizer, which forms 1 - b^t in float64: formed in float32 it is off by 1e-5 for .999. A
    step of 100 from a weight of 1 or less is a step to its last digit."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(1)
    D = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0))
    args = unrolled.parse_args(["--beta1", str(betas[0]), "--beta2", str(betas[1])])
    opt = unrolled.adam(D, 0.0, args)
    assert opt.defaults["fused"]
    for p in D.parameters():
        p.grad = torch.randn(p.shape)
    opt.step()
    for p in D.parameters():  # moments and a count as after many steps
        opt.state[p]["step"].fill_(before)
        opt.state[p]["exp_avg"].copy_(0.05 * torch.randn(p.shape))
        opt.state[p]["exp_avg_sq"].copy_(1e-3 * (1 + torch.rand(p.shape)))
    opt.param_groups[0]["lr"] = lr
    x_real, x_fake = torch.randn(6, 2), torch.randn(6, 2)
    start = [p.detach().clone() for p in D.parameters()]
    ahead = unrolled.look_ahead(D, opt, x_real, x_fake, k, "adam")
    for _ in range(k):
        opt.zero_grad()
        unrolled.discriminator_loss(D(x_real), D(x_fake)).backward()
        opt.step()
    moved = max((p - old).abs().max() for p, old in zip(D.parameters(), start))
    assert moved > lr / 10
    for name, p in D.named_parameters():
        assert ((ahead[name] - p).abs() <= tolerance * moved).all(), name


@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_steps_ahead_change_neither_d_nor_its_optimizer(inner):
    game = Ahead()
    game.opt.zero_grad()
    cross_entropy(game.D(game.x_real), game.D(-game.x_real)).backward()  # gradients of D's own step are still there
    grads = [p.grad for p in game.D.parameters()]
    before = bits(game.D.state_dict()), bits(game.opt.state_dict()), bits(grads)
    game.loss(5, inner).backward(inputs=list(game.G.parameters()))
    assert (bits(game.D.state_dict()), bits(game.opt.state_dict()), bits(grads)) == before
    assert all(p.grad is g and p.requires_grad for p, g in zip(game.D.parameters(), grads))


def test_no_steps_ahead_are_ds_own_weights():
    game = Ahead()
    for inner in ("adam", "sgd"):
        params = unrolled.look_ahead(game.D, game.opt, game.x_real, game.G(game.z), 0, inner)
        assert list(params) == [n for n, _ in game.D.named_parameters()]
        assert all(params[n] is p for n, p in game.D.named_parameters())
    fresh = torch.optim.Adam(game.D.parameters())  # no moments are asked for
    assert unrolled.look_ahead(game.D, fresh, game.x_real, game.G(game.z), 0, "adam")
    assert unrolled.look_ahead(game.D, fresh, game.x_real, game.G(game.z), 2, "sgd")


@pytest.mark.parametrize("k", [1, 4])
def test_a_unit_that_never_fires_makes_no_nan(k):
    """Its moments are exactly 0, where a root has an infinite slope."""
    game = Ahead(act=nn.ReLU, dead=True)
    state = [game.opt.state[p]["exp_avg_sq"] for p in game.D.parameters()]
    assert state[0][2].abs().max() == state[1][2] == state[2][0, 2] == 0 < state[0][0].min()
    for kind in ("ns", "minimax"):
        grads = torch.autograd.grad(game.loss(k, kind=kind), list(game.G.parameters()))
        assert all(g.isfinite().all() for g in grads)
        for p, grad in zip(game.G.parameters(), grads):
            numeric = numeric_slope(lambda kind=kind: game.played(k, kind=kind), p, 1)
            assert grad.view(-1)[1].item() == pytest.approx(numeric, rel=1e-4, abs=1e-7)


# unrolled: training ---------------------------------------------------------------------------------------------------


def small_nets():
    """Smooth, so that differences are slopes."""
    torch.manual_seed(3)
    G = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
    D = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    return G, D


def mean_squared_slope(D, x):
    """Of D's scores in the pixels of x, one picture at a time."""
    x = x.clone().requires_grad_()
    slopes = [torch.autograd.grad(D(x)[i], x, create_graph=True)[0] for i in range(len(x))]
    return sum(slope.pow(2).sum() for slope in slopes) / len(x)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--k 0",
        "--k 1",
        "--k 3 --loss minimax",
        "--k 2 --inner sgd",
        "--k 0 --loss minimax",
        "--k 3 --inner sgd --inner-lr .2 --loss minimax",
        "--k 1 --inner sgd --r1 2 --penalty-share .5",  # the default method; R1 is not in the steps ahead
    ],
)
def test_unrolled_training_is_the_game_as_written(monkeypatch, flags):
    """D: one plain step a batch. G: k real steps from where D and its Adam stand, on D's last pictures and a fresh z,
    the whole differentiated by central differences; nothing of it is left in D, its gradients or its optimizer."""
    snapshots = []

    def snapshot(opt, *_):
        snapshots.append((opt, copy.deepcopy(opt.state_dict())))

    hooks = register_optimizer_step_pre_hook(snapshot), register_optimizer_step_post_hook(snapshot)
    try:
        argv = [*SMALL, "--arch", "mlp", "--image-size", "8", "--lr-d", ".01", *flags.split()]
        seen = run(monkeypatch, unrolled, argv, iterations=2, nets=small_nets())
    finally:
        for hook in hooks:
            hook.remove()
    args = seen.args
    pictures = seen.x.double() / 127.5 - 1
    order, since, left = [], [], None
    for event in seen.events:
        if event.kind == "forward":
            since.append(event)
            continue
        order.append(event.net)
        G, D = event.copies
        (g_call,), d_calls = ([e for e in since if e.net == k] for k in "GD")
        fake = G(g_call.inputs[0]).detach()
        if event.net == "D":
            assert not g_call.graph and [len(e.inputs[0]) for e in d_calls] == [12, 3][: 1 + bool(args.r1)]
            real, made = d_calls[0].inputs[0].chunk(2)
            torch.testing.assert_close(made, fake, **EXACT)
            assert all(any(torch.equal(p, q) for q in pictures) for p in real)
            loss = cross_entropy(D(real), D(fake))
            if args.r1:
                loss = loss + args.r1 / 2 * mean_squared_slope(D, real[:3])
            close_gradients(event.grads["D"], loss, D)
            for now, then in zip(event.grads["G"], left or [None] * 9):
                assert now is None or torch.equal(now, then)
            d_grads = event.grads["D"]
            d_state = next(s for o, s in reversed(snapshots[: 2 * len(order)]) if o is seen.opts["d"])
        else:
            own = torch.optim.Adam(D.parameters(), args.lr_d, (args.beta1, args.beta2))
            own.load_state_dict(copy.deepcopy(d_state))
            how = args.k, args.inner, args.inner_lr, args.loss
            value, ahead = played(D, own, real, fake, *how)
            last = d_calls[-1 - (args.loss == "minimax") :]
            assert len(d_calls) == 2 * args.k + len(last) and g_call.graph
            for e in d_calls:  # one batch and one z for all steps
                is_fake = torch.equal(e.inputs[0], fake)
                assert e.slope == is_fake and (is_fake or torch.equal(e.inputs[0], real))
            assert sum(e.slope for e in d_calls) == args.k + 1 and any(e.slope for e in last)
            for e in last:
                torch.testing.assert_close(e.weights, list(ahead.parameters()), rtol=0, atol=1e-6)
            for p, grad in zip(G.parameters(), event.grads["G"]):
                i = p.numel() // 2
                numeric = numeric_slope(lambda: played(D, own, real, G(g_call.inputs[0]).detach(), *how)[0], p, i)
                assert grad.view(-1)[i].item() == pytest.approx(numeric, rel=1e-4, abs=1e-9)
            assert bits(event.grads["D"]) == bits(d_grads)  # nothing was added to D's gradients
            for now, then in zip(event.after["D"], event.before["D"]):
                assert torch.equal(now, then)
            left = event.grads["G"]
            if order[-2:] == ["G", "G"]:
                assert seen.logged[len(order) // 4 - 1]["g_loss"] == pytest.approx(value, rel=1e-9)
        since = []
    assert order == ["D", "D", "G", "G"] * 2
    d_states = [bits(s) for o, s in snapshots if o is seen.opts["d"]]  # before and after each of D's four steps
    assert len(d_states) == 8 and d_states[1] == d_states[2] != d_states[3] == d_states[4] != d_states[5] == d_states[6]
    assert bits(seen.opts["d"].state_dict()) == d_states[7]
    assert all(p.requires_grad for net in (seen.G, seen.D) for p in net.parameters())


@pytest.mark.parametrize(
    "argv, loss",
    [
        (["--image-size", "28"], "ns"),
        (["--image-size", "28"], "minimax"),
        (["--image-size", "16", "--r1", "1", "--penalty-share", ".5"], "minimax"),
        (["--arch", "mlp", "--d-steps", "1", "--g-steps", "1"], "ns"),
    ],
)
def test_without_steps_ahead_it_is_dcgan(monkeypatch, argv, loss):
    """Bit for bit, through two iterations of both scripts from one seed."""
    flags = [*SMALL, *argv, "--loss", loss, "--ema", ".1"]  # less than it warms up with
    ours = run(monkeypatch, unrolled, [*flags, "--k", "0"], iterations=2)
    theirs = run(monkeypatch, dcgan, [*flags, "--d-norm", "none", "--lr-g", "1e-3", "--lr-d", "2e-4"], iterations=2)
    for net in ("G", "D"):
        assert bits(getattr(ours, net).state_dict()) == bits(getattr(theirs, net).state_dict())
    assert bits(ours.ema.state_dict()) == bits(theirs.ema.state_dict())
    for key in "gd":
        assert bits(ours.opts[key].state_dict()["state"]) == bits(theirs.opts[key].state_dict()["state"])
    for a, b in zip(ours.logged, theirs.logged):
        assert a["d_loss"] == b["d_loss"] and a["d_acc"] == b["d_acc"]
        assert a["g_loss"] == b["g_loss"] if loss == "ns" else a["g_loss"] < b["g_loss"]  # less D's term on real ones
    ahead = run(monkeypatch, unrolled, [*flags, "--k", "1"], iterations=2)
    assert bits(ahead.G.state_dict()) != bits(ours.G.state_dict())


# mdgan: the simplex and the mixture -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_corners_of_a_simplex(dtype):
    torch.set_default_dtype(dtype)  # its own are float64 whatever this is
    for d in range(1, 33):
        for R in (1.0, 2.0, 0.9436):
            mu = mdgan.simplex(d, R)
            assert mu.shape == (d + 1, d) and mu.dtype == torch.float64
            gram = R**2 * ((d + 1) / d * np.eye(d + 1) - np.ones((d + 1, d + 1)) / d)
            np.testing.assert_allclose(mu @ mu.T, gram, rtol=0, atol=1e-12)


KINDS = {"clusters": (2.0, 0.5), "published": (0.9436, 0.5)}


def mixture(mu, sigma):
    """torch's own, weights and normalisers included."""
    d = mu.shape[1]
    return MixtureSameFamily(
        Categorical(torch.ones(d + 1) / (d + 1)),
        MultivariateNormal(mu.double(), sigma**2 * torch.eye(d, dtype=torch.float64)),
    )


@functools.cache
def best(d, radius, sigma):
    """log lambda by scipy: L-BFGS from every corner, from the middle and from twenty other points."""
    mu = mdgan.simplex(d, radius).numpy()
    constant = np.log(d + 1) + d / 2 * np.log(2 * np.pi * sigma**2)

    def negative(e):
        a = -((e - mu) ** 2).sum(1) / (2 * sigma**2)
        return constant - special.logsumexp(a), special.softmax(a) @ (e - mu) / sigma**2

    starts = [*mu, np.zeros(d), *np.random.RandomState(0).randn(20, d)]
    return -min(
        optimize.minimize(negative, s, jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10}).fun
        for s in starts
    )


def before_the_box(e):
    """What a network would have to put out for the point e."""
    return torch.logit((e + 2.5) / 5)


@pytest.mark.parametrize("d", [1, 2, 9, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_score_is_the_log_likelihood_below_its_maximum(kind, d):
    """By torch.distributions and by scipy, constants included; the corners lie within what D can reach."""
    radius, sigma = KINDS[kind]
    layer = mdgan.Mixture(kind, d)
    mu = layer.mu
    gram = radius**2 * ((d + 1) / d * np.eye(d + 1) - np.ones((d + 1, d + 1)) / d)
    np.testing.assert_allclose(mu @ mu.T, gram, rtol=0, atol=1e-12)
    assert mu.abs().max() < 2.5
    e = torch.cat([torch.rand(200, d) * 4.8 - 2.4, mu[torch.arange(50) % (d + 1)] + 0.1 * torch.randn(50, d)])
    e = e.clamp(-2.45, 2.45)
    law = mixture(mu, sigma)
    wanted = law.log_prob(e) - best(d, radius, sigma)
    assert wanted.max() < 1e-9 and wanted.min() < -3
    torch.testing.assert_close(layer(before_the_box(e)), wanted.clamp(max=-1e-6), rtol=1e-9, atol=1e-9)
    by_scipy = special.logsumexp([stats.multivariate_normal(m.numpy(), sigma**2).logpdf(e.numpy()) for m in mu], axis=0)
    by_scipy = torch.tensor(np.atleast_1d(by_scipy)) - np.log(d + 1)
    torch.testing.assert_close(law.log_prob(e), by_scipy, rtol=1e-10, atol=1e-10)
    constant = -np.log(d + 1) - d / 2 * np.log(2 * np.pi * sigma**2)
    torch.testing.assert_close(mdgan.log_sum(e, mu, sigma) + constant, by_scipy, rtol=1e-10, atol=1e-10)
    assert layer.peak + constant == pytest.approx(best(d, radius, sigma), abs=1e-9)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 0.66, 0.75, 1.2])
def test_lambda_in_the_plane_by_a_grid(sigma):
    """From a few clusters to one blob; the grid's best is within its spacing's square of the maximum."""
    mu = mdgan.simplex(2, 1.0)
    peak = max(mdgan.log_sum(mdgan.ascend(e, mu, sigma), mu, sigma).item() for e in (mu[0], torch.zeros(2)))
    line = torch.linspace(-1.2, 1.2, 1201)
    grid = torch.cartesian_prod(line, line)
    value = torch.stack([-(grid - m).square().sum(1) / (2 * sigma**2) for m in mu]).exp().sum(0).max().log().item()
    assert value <= peak + 1e-12 and peak - value < 0.001**2 / sigma**2


@pytest.mark.parametrize("ratio, end", [(1.05, 0.999), (1.5, 0.986), (2.0, 0.898), (2.25, 0.0), (2.5, 0.0)])
def test_where_mean_shift_from_a_corner_ends(ratio, end):
    """In nine dimensions, for sigma^2 d / R^2: that the middle is a maximum from 1 on does not end the clusters."""
    for R in (1.0, 1.7):
        mu, sigma = mdgan.simplex(9, R), R * (ratio / 9) ** 0.5
        at = mdgan.ascend(mu[3], mu, sigma)
        assert at.norm().item() / R == pytest.approx(end, abs=6e-4)
        assert at.norm() < 1e-6 or (at / at.norm() - mu[3] / R).abs().max() < 1e-6  # straight towards the middle
        shift = torch.softmax(-(at - mu).square().sum(1) / (2 * sigma**2), 0) @ mu
        torch.testing.assert_close(shift, at, rtol=0, atol=1e-10)


@pytest.mark.parametrize("R", [0.5, 2.0])
@pytest.mark.parametrize("ratio", [0.4, 0.8, 0.98, 1.02, 1.5])
def test_two_gaussians_merge_where_sigma_reaches_the_radius(R, ratio):
    """On a line the maximum solves x = R tanh(R x / sigma^2)."""
    mu, sigma = mdgan.simplex(1, R), ratio * R
    at = abs(mdgan.ascend(mu[0], mu, sigma).item())
    root = 0.0 if ratio >= 1 else optimize.brentq(lambda x: x - R * np.tanh(R * x / sigma**2), 1e-3 * R, R, xtol=1e-15)
    assert at == pytest.approx(root, abs=1e-10) and (root > 0.1 * R) == (ratio < 1)


@pytest.mark.parametrize("R, sigma", [(2.0, 0.05), (2.0, 0.01), (0.9436, 0.02)])
def test_a_narrow_gaussian_on_a_line_has_half_its_own_density(R, sigma):
    mu = mdgan.simplex(1, R)
    e = mu[0] + sigma * torch.linspace(-3, 3, 31)[:, None]
    constant = np.log(0.5) - 0.5 * np.log(2 * np.pi * sigma**2)
    wanted = stats.norm.logpdf(e[:, 0].numpy(), mu[0].item(), sigma) + np.log(0.5)
    np.testing.assert_allclose(mdgan.log_sum(e, mu, sigma) + constant, wanted, rtol=0, atol=1e-9)
    far = mdgan.log_sum(torch.zeros(1), mu, sigma).item()  # the likelihood itself is 0 in float64
    assert far == pytest.approx(np.log(2) - (R / sigma) ** 2 / 2, rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_never_passes_lambda(kind, d):
    layer, rng = mdgan.Mixture(kind, d), torch.Generator().manual_seed(0)
    e = torch.rand(100_000, d, generator=rng) * 5 - 2.5
    near = (layer.from_corner, layer.from_middle)
    for i, centre in enumerate(near):
        e[i::4] = centre + 0.02 * torch.randn(len(e[i::4]), d, generator=rng)
    for part in e.split(25_000):
        assert (mdgan.log_sum(part, layer.mu, layer.sigma) <= layer.peak + 1e-12).all()
    u = -layer.float()(torch.randn(100_000, d, dtype=torch.float32, generator=rng))
    assert u.dtype == torch.float32 and (u >= 1e-6 * (1 - 1e-6)).all() and u.isfinite().all()


def test_the_published_mixture_is_one_blob_and_clusters_are_clusters():
    """The maximum of the published one is at 0; .0220870751 there by the simplex of the paper's code."""
    said = str(mdgan.Mixture("published", 9))
    assert "mixture of 10" in said and "ends at 0.000 of the radius, one blob, no clusters" in said
    log_lambda = best(9, *KINDS["published"])
    assert log_lambda == pytest.approx(
        -(0.9436**2) / 0.5 - 4.5 * np.log(np.pi / 2), abs=1e-9
    )  # all ten from the middle
    assert np.exp(log_lambda) == pytest.approx(0.0220870751, rel=2e-4)  # the radius is rounded to 5e-5, times 4 R
    layer = mdgan.Mixture("clusters", 9)
    assert "mixture of 10" in str(layer) and "ends at 1.000 of the radius, 10 clusters" in str(layer)
    law = mixture(layer.mu, 0.5)
    gap = (law.log_prob(layer.mu[0]) - law.log_prob(torch.zeros(9))).item()
    assert f"{gap:.3f}" == "5.697" and str(layer).endswith("log lk is 5.697 higher there than in the middle")
    assert "mixture of 3" in str(mdgan.Mixture("clusters", 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("d", [1, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_at_a_centre_all_losses_are_finite(kind, d, dtype):
    """u is 0 there but for rounding, and log(1 - exp(-u)) minus infinity but for its bound of 1e-6."""
    torch.set_default_dtype(dtype)
    layer = mdgan.Mixture(kind, d)
    x = before_the_box(layer.from_corner).to(dtype)[None].requires_grad_()
    for loss, value in (
        (mdgan.discriminator_loss(layer(x), layer(x)), np.log(1e6)),
        (mdgan.generator_loss(layer(x), "ns"), 1e-6),
        (mdgan.generator_loss(layer(x), "saturating"), -np.log(1e6)),
    ):
        assert loss.item() == pytest.approx(value, abs=1e-3)
        assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_a_point_far_from_every_centre_is_still_drawn_to_them():
    """Where the likelihood is 0 in float32, and log(lk + 1e-8) has no slope."""
    layer = mdgan.Mixture("clusters", 9).float()
    x = torch.tensor([[4, -4, 4, -4, 4, -4, 4, -4, 4]], dtype=torch.float32, requires_grad=True)
    e = 5 * x.detach().double().sigmoid() - 2.5
    law, exact = mixture(layer.mu, 0.5), e.clone().requires_grad_()
    assert law.log_prob(e).exp() < 1e-12
    (wanted,) = torch.autograd.grad(law.log_prob(exact), exact)
    slope = torch.autograd.grad(layer(x), x)[0].double()
    wanted = wanted * 5 * x.detach().double().sigmoid() * (-x.detach().double()).sigmoid()
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-5)


# mdgan: losses --------------------------------------------------------------------------------------------------------

U = [1e-7, 1e-6, 1e-4, 0.01, 0.3, 0.6931, 0.69314718055994, 0.6932, 1.0, 2.5, 17.0, 36.0, 45.0, 80.0]


def log1mexp_exactly(u):
    """log(1 - exp(-u)) and its slope 1 / (exp(u) - 1), to 60 digits."""
    with localcontext() as c:
        c.prec = 60
        e = (-Decimal(u)).exp()
        return float((1 - e).ln()), float(e / (1 - e))


def test_log1mexp_to_the_last_digits():
    u = torch.tensor(U, requires_grad=True)
    value = mdgan.log1mexp(u)
    exact = np.array([log1mexp_exactly(v) for v in U])
    np.testing.assert_allclose(value.detach(), exact[:, 0], rtol=1e-14)
    np.testing.assert_allclose(torch.autograd.grad(value.sum(), u)[0], exact[:, 1], rtol=1e-13)
    assert torch.autograd.gradcheck(mdgan.log1mexp, torch.tensor([0.05, 0.4, 0.69, 0.7, 1.5, 6.0], requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log1mexp_has_finite_slopes_at_both_ends(dtype):
    tiny = 1e-9 if dtype == torch.float32 else 1e-18  # exp(-u) is 1: the form for large u ends in log 0
    u = torch.tensor([tiny, 1e-7, 1e-6, 80, 200, 1e4], dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(mdgan.log1mexp(u).sum(), u)
    np.testing.assert_allclose(grad, [1 / tiny, 1e7, 1e6, np.exp(-80.0), 0, 0], rtol=1e-5, atol=1e-30)
    assert mdgan.log1mexp(u).isfinite().all()


def test_losses_of_scores_and_the_saturating_slope():
    real, fake = np.array([0.2, 3, 11]), np.array([1e-6, 0.5, 2, 30, 600.0])
    s_real, s_fake = (torch.tensor(-v, requires_grad=True) for v in (real, fake))
    exact = np.array([log1mexp_exactly(v) for v in fake])
    loss = mdgan.discriminator_loss(s_real, s_fake)
    assert loss.item() == pytest.approx(real.mean() - exact[:, 0].mean(), rel=1e-13)
    grads = torch.autograd.grad(loss, [s_real, s_fake])
    np.testing.assert_allclose(grads[0], np.full(3, -1 / 3), rtol=1e-13)
    np.testing.assert_allclose(grads[1], exact[:, 1] / 5, rtol=1e-12)
    loss = mdgan.generator_loss(s_fake, "saturating")
    assert loss.item() == pytest.approx(exact[:, 0].mean(), rel=1e-13)
    np.testing.assert_allclose(-torch.autograd.grad(loss, s_fake)[0], 1 / np.expm1(fake) / 5, rtol=1e-12)  # in u
    loss = mdgan.generator_loss(s_fake, "ns")
    assert loss.item() == pytest.approx(fake.mean(), rel=1e-13)
    np.testing.assert_allclose(-torch.autograd.grad(loss, s_fake)[0], np.full(5, 1 / 5), rtol=1e-13)


# mdgan: training ------------------------------------------------------------------------------------------------------


def score_by_torch(D, x, kind):
    """-u from torch's mixture and scipy's maximum, on the embedding that D's last layer is given."""
    e = 5 / (1 + torch.exp(-D.net(x))) - 2.5
    mu, (radius, sigma) = D.mixture.mu, KINDS[kind]
    return mixture(mu, sigma).log_prob(e) - best(mu.shape[1], radius, sigma)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--loss saturating",
        "--mixture published",
        "--embedding-dim 2",
        "--r1 2 --penalty-share .25",  # the default method
        "--arch mlp --mixture published --loss saturating",
        "--image-size 28 --embedding-dim 12 --loss saturating",
    ],
)
def test_mdgan_training_is_the_game_as_written(monkeypatch, flags):
    """D ascends log lk on data and log(lambda - lk) on fakes, which carry no graph; G's step leaves D and its gradients
    alone. Likelihoods, not logarithms, wherever float64 has room for them."""
    seen = run(monkeypatch, mdgan, [*SMALL, "--image-size", "16", *flags.split()], iterations=2)
    args = seen.args
    d, kind = args.embedding_dim, args.mixture
    radius, _ = KINDS[kind]
    assert seen.D.mixture.mu.shape == (d + 1, d)
    assert seen.D.mixture.mu.norm(dim=1).tolist() == pytest.approx([radius] * (d + 1), abs=1e-12)
    log_lambda = best(d, *KINDS[kind])
    pictures = seen.x.double() / 127.5 - 1
    order, since, logged = [], [], {}
    last = {"G": None, "D": None}
    for event in seen.events:
        if event.kind == "forward":
            since.append(event)
            continue
        order.append(event.net)
        G, D = event.copies
        (g_call,), d_calls = ([e for e in since if e.net == k] for k in "GD")
        sizes = [len(e.inputs[0]) for e in d_calls]
        fake = G(g_call.inputs[0])
        if event.net == "D":
            assert not g_call.graph and sizes == [12, 2][: 1 + bool(args.r1)]
            real, made = d_calls[0].inputs[0].chunk(2)
            torch.testing.assert_close(made, fake.detach(), rtol=1e-12, atol=1e-12)
            assert all(any(torch.equal(p, q) for q in pictures) for p in real)
            f_real, f_fake = (score_by_torch(D, x, kind) for x in (real, made))
            likelihoods = (log_lambda + f_real).sum() + torch.log(
                np.exp(log_lambda) - (log_lambda + f_fake).exp()
            ).sum()
            loss = -likelihoods / 6
            logged["penalty"] = 0.0
            if args.r1:
                r1 = args.r1 / 2 * mean_squared_slope(lambda x, D=D: score_by_torch(D, x, kind), real[:2])
                loss = loss + r1
                logged["penalty"] = r1.item()
            logged["d_loss"] = loss.item() + 2 * log_lambda
            logged["d_acc"] = sum(float(a > b) for a in f_real for b in f_fake) / 36
            net, other = D, "G"
        else:
            assert g_call.graph and d_calls[0].slope and sizes == [6]
            score = score_by_torch(D, fake, kind)
            loss = -score.mean() if args.loss == "ns" else torch.log(1 - score.exp()).mean()
            logged["g_loss"] = loss.item()
            net, other = G, "D"
        for grad, value in zip(event.grads[event.net], torch.autograd.grad(loss, list(net.parameters()))):
            assert (grad - value).norm() < 1e-7 * value.norm()
        for now, then in zip(event.grads[other], last[other] or [None] * 99):
            assert now is None or torch.equal(now, then)
        for now, then in zip(event.after[other], event.before[other]):
            assert torch.equal(now, then)
        last[event.net], since = event.grads[event.net], []
        if order[-4:] == ["D", "D", "G", "G"]:
            assert seen.logged[len(order) // 4 - 1] == pytest.approx(logged, rel=1e-7)
    assert order == ["D", "D", "G", "G"] * 2
    assert all(p.requires_grad for net in (seen.G, seen.D) for p in net.parameters())
    x, z, y = seen.x[:4], torch.randn(3, 5), torch.zeros(4).long()
    wanted = score_by_torch(seen.D, x.double() / 127.5 - 1, kind)
    torch.testing.assert_close(seen.score(x, y), wanted, rtol=1e-8, atol=1e-9)
    assert torch.equal(seen.sample(z, y[:3]), mdgan.to_uint8(seen.ema(z)))
