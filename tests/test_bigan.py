"""bigan.py: its losses against closed forms and a game small enough to enumerate; who gets whose gradient, watching
train(); its figures, decoded; the probe's table against scikit-learn."""
import copy
import functools
import hashlib
import itertools
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from test_networks import LEAKY, bn, down, layers, up
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import bigan
import metrics

TINY = ["--paper", "--image-size", "28", "--ngf", "4", "--ndf", "4", "--latent-dim", "6", "--batch-size", "8",
        "--device", "cpu",
        "--log-every", "0", "--sample-every", "0", "--eval-every", "0", "--checkpoint-every", "0"]
rendered = functools.cache(bigan.render_digits)


@pytest.fixture
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """300 digits of either split, the script on its own (no scores), the working folder a temporary one."""
    (tmp_path / "alone").mkdir()
    monkeypatch.setattr(bigan, "render_digits", lambda n, seed: rendered(300, seed))
    monkeypatch.setattr(bigan, "SCRIPT", Path(shutil.copy(bigan.__file__, tmp_path / "alone")))
    monkeypatch.chdir(tmp_path)


def nets(*argv, channels=1):
    args = bigan.parse_args([str(a) for a in argv])
    return [make(args, channels) for make in (bigan.make_generator, bigan.make_discriminator, bigan.make_encoder)]


# the networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, start, widths", [(28, 7, [64, 32]), (32, 4, [128, 64, 32]),
                                                 (64, 4, [256, 128, 64, 32])])
@pytest.mark.parametrize("channels", [1, 3])
def test_convolutional_networks(side, start, widths, channels):
    """E is G turned round; D has 512 numbers of the picture beside 512 of z, and no norm."""
    G, D, E = nets("--image-size", side, channels=channels)
    wanted = [("ConvTranspose2d", 100, widths[0], start, 1, 0, "no bias")]
    for a, b in zip(widths, [*widths[1:], channels]): wanted += [bn(a), "ReLU", up(a, b)]
    assert layers(G) == [*wanted, "Tanh"]
    on_the_way = list(zip([channels, *widths[:0:-1]], widths[::-1]))
    wanted = [v for a, b in on_the_way for v in (down(a, b), bn(b), LEAKY)]
    assert layers(E) == [*wanted, ("Linear", widths[0] * start**2, 100, "bias")]
    picture = [v for a, b in on_the_way for v in (down(a, b, bias="bias"), LEAKY)]
    linear = [(widths[0] * start**2, 512), (100, 512), (512, 512), (1024, 1024)]
    hidden = [v for a, b in linear for v in (("Linear", a, b, "bias"), LEAKY)]
    assert layers(D) == [*picture, *hidden, ("Linear", 1024, 1, "bias")]
    z = torch.randn(3, 100)
    x = G(z)
    assert x.shape == (3, channels, side, side) and x.abs().max() <= 1
    assert E(x).shape == (3, 100) and D(x, z).shape == (3,)
    assert E[:-2](x).shape == (3, widths[0] * start**2)
    for net in (G, D, E):
        for m in net.modules():
            if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)) and m.weight.numel() > 2000:
                assert m.weight.std().item() == pytest.approx(0.02, rel=0.1)
            elif isinstance(m, torch.nn.BatchNorm2d):
                assert m.weight.mean().item() == pytest.approx(1, abs=0.03) and m.weight.std() > 0.005


def test_permutation_invariant_networks():
    G, D, E = nets("--arch", "mlp", "--latent-dim", "50")
    norm = ("BatchNorm1d", 1024)
    assert layers(G) == [("Linear", 50, 1024, "no bias"), norm, "ReLU", ("Linear", 1024, 1024, "no bias"), norm, "ReLU",
                         ("Linear", 1024, 784, "bias"), "Tanh"]
    assert layers(E) == [("Linear", 784, 1024, "no bias"), norm, LEAKY, ("Linear", 1024, 1024, "no bias"), norm, LEAKY,
                         ("Linear", 1024, 50, "bias")]
    assert layers(D) == [("Linear", 834, 1024, "bias"), LEAKY, ("Linear", 1024, 1024, "bias"), LEAKY,
                         ("Linear", 1024, 1, "bias")]
    x, z = torch.rand(3, 1, 28, 28), torch.rand(3, 50)
    assert G(z).shape == x.shape and E(x).shape == z.shape and D(x, z).shape == (3,) and E[:-2](x).shape == (3, 1024)


@pytest.mark.parametrize("arch", ["mlp", "dcgan"])
def test_codes_lie_where_the_prior_does(arch):
    x = torch.randn(8, 1, 28, 28) * 1e4
    for prior in ("normal", "uniform"):
        _, _, E = nets("--arch", arch, "--image-size", 28, "--prior", prior)
        far = E.eval()(x).abs().max()
        assert far > 2 if prior == "normal" else 0.99 < far <= 1
        torch.testing.assert_close(E(x), E[-2:](E[:-2](x)), rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["mlp", "dcgan"])
def test_d_sees_picture_and_code(arch):
    _, D, _ = nets("--arch", arch, "--image-size", 28)
    x, z = torch.rand(4, 1, 28, 28, requires_grad=True), torch.randn(4, 100, requires_grad=True)
    dx, dz = torch.autograd.grad(D(x, z)[2], [x, z])
    for grad in (dx, dz):
        assert grad[2].abs().min() > 0 and grad[[0, 1, 3]].abs().max() == 0  # no norm: each pair on its own


def test_defaults():
    a = bigan.parse_args([])
    assert (a.batch_size, a.d_steps, a.g_steps, a.lr_g, a.lr_d, a.beta1, a.beta2, a.probe) == (
        128, 1, 1, 2e-4, 2e-4, 0.5, 0.999, False)


# the losses -----------------------------------------------------------------------------------------------------------

REAL, FAKE = np.array([0.3, -2, 7.5, 0, -9]), np.array([1.1, -0.4, 12, -13])


def sigmoid(t):
    return 1 / (1 + np.exp(-t))


def test_losses_and_their_slopes():
    real, fake = (torch.tensor(v, requires_grad=True) for v in (REAL, FAKE))
    for loss, value, slope_real, slope_fake in (
            (bigan.discriminator_loss, np.logaddexp(0, -REAL).mean() + np.logaddexp(0, FAKE).mean(),
             -sigmoid(-REAL) / 5, sigmoid(FAKE) / 4),
            (bigan.generator_loss, np.logaddexp(0, REAL).mean() + np.logaddexp(0, -FAKE).mean(),
             sigmoid(REAL) / 5, -sigmoid(-FAKE) / 4)):
        out = loss(real, fake)
        assert out.item() == pytest.approx(value, abs=1e-12)
        torch.testing.assert_close(torch.autograd.grad(out, [real, fake]),
                                   (torch.tensor(slope_real), torch.tensor(slope_fake)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [80, 1e4])
def test_losses_far_out_are_finite_in_float32(size):
    f = torch.tensor([-size, size], dtype=torch.float32, requires_grad=True)
    for loss in (bigan.discriminator_loss, bigan.generator_loss):
        assert loss(f, f).item() == pytest.approx(size)
        assert torch.autograd.grad(loss(f, f), f)[0].isfinite().all()


def test_swapping_the_labels_swaps_the_objectives():
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    a, b = bigan.discriminator_loss(real, fake), bigan.generator_loss(real, fake)
    assert bigan.discriminator_loss(fake, real).item() == pytest.approx(b.item(), abs=1e-12)
    assert bigan.generator_loss(fake, real).item() == pytest.approx(a.item(), abs=1e-12)
    assert abs(a - b) > 0.5


def test_the_best_logit_is_the_log_ratio_of_the_joint_laws():
    """Nine pairs (x, z), as often as the tables say: the D that minimises its loss is log P/Q, and the loss there is
    2 log 2 - 2 JSD(P, Q)."""
    P = torch.tensor([[4., 1, 3], [2, 6, 1], [1, 1, 5]], dtype=torch.float64)
    Q = torch.tensor([[2., 5, 1], [2, 3, 3], [4, 1, 3]], dtype=torch.float64)
    real, fake = (torch.arange(9).repeat_interleave(t.flatten().long()) for t in (P, Q))
    f = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([f], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss():
        opt.zero_grad()
        value = bigan.discriminator_loss(f[real], f[fake])
        value.backward()
        return value

    opt.step(loss)
    P, Q = P.flatten() / P.sum(), Q.flatten() / Q.sum()
    torch.testing.assert_close(f.detach(), (P / Q).log(), rtol=0, atol=1e-6)
    M = (P + Q) / 2
    jsd = (P * (P / M).log()).sum() / 2 + (Q * (Q / M).log()).sum() / 2
    assert loss().item() == pytest.approx(2 * np.log(2) - 2 * jsd.item(), abs=1e-10)


def test_only_inverses_leave_the_best_d_at_a_loss():
    """All 27 x 27 pairs of maps E and G on three pictures and three codes, uniform both: against the best D the loss is
    2 log 2 where G(E(x)) = x for all x, and less by JSD's smallest step otherwise."""
    maps, inverses = list(itertools.product(range(3), repeat=3)), 0
    for E, G in itertools.product(maps, maps):
        P, Q = torch.zeros(2, 3, 3, dtype=torch.float64)
        for i in range(3):
            P[i, E[i]] += 1
            Q[G[i], i] += 1
        f = ((P + 1e-30) / (Q + 1e-30)).log().flatten()
        real, fake = (torch.arange(9).repeat_interleave(t.flatten().long()) for t in (P, Q))
        best = bigan.discriminator_loss(f[real], f[fake]).item()
        if all(G[E[i]] == i for i in range(3)):
            inverses += 1
            assert best == pytest.approx(2 * np.log(2), abs=1e-12)
        else:  # a pair of one law that the other has not: a third of the mass of each, or more
            assert best < 2 * np.log(2) * 2 / 3 + 1e-9
    assert inverses == 6


# the updates ----------------------------------------------------------------------------------------------------------


def watched(monkeypatch, *argv, iterations=2):
    """train() without a Run: its events in order. A "forward" is one of D, with copies of the three networks as they
    were, what G and E were given last, and D's inputs; a "step" has the gradients that each network then had."""
    seen = SimpleNamespace(events=[], logged=[], over=False)
    seen.x = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def watch(name, make):
        def call(*args):
            net = make(*args)
            setattr(seen, name, net)

            def noted(m, inputs):
                if m is not net or seen.over:  # a copy, or after training
                    return
                setattr(seen, f"last_{name}", inputs[0].detach().clone())
                if name == "D":
                    assert all(n.training for n in (seen.G, seen.D, seen.E))
                    seen.events.append(SimpleNamespace(
                        kind="forward", inputs=[i.detach().clone() for i in inputs], z=seen.last_G, x=seen.last_E,
                        slope=[i.requires_grad for i in inputs], copies=copy.deepcopy((seen.G, seen.D, seen.E))))
            net.register_forward_pre_hook(noted)
            return net
        return call

    def fake_run(args, nets, opts, ema, draw, rate, batch):
        for k, v in locals().items(): setattr(seen, k, v)
        stand_in = mock.MagicMock()
        stand_in.training.side_effect = [True] * iterations + [False]
        stand_in.record.side_effect = lambda values: seen.logged.append({k: v.item() for k, v in values.items()})
        return stand_in

    def before(opt, *_):
        name = "D" if opt is seen.opt_d else "pair"
        grads = {k: [None if p.grad is None else p.grad.clone() for p in getattr(seen, k).parameters()] for k in "GDE"}
        seen.events.append(SimpleNamespace(kind="step", net=name, grads=grads))

    def noted_adam(net, lr, args, adam=bigan.adam):
        opt = adam(net, lr, args)
        setattr(seen, "opt_d" if net is seen.D else "opt_g", opt)
        return opt

    for name, make in (("G", "make_generator"), ("D", "make_discriminator"), ("E", "make_encoder")):
        monkeypatch.setattr(bigan, make, watch(name, getattr(bigan, make)))
    monkeypatch.setattr(bigan, "Run", fake_run)
    monkeypatch.setattr(bigan, "adam", noted_adam)
    monkeypatch.setattr(bigan, "load_data", lambda *a, **k: (seen.x, torch.arange(60) % 3))
    hook = register_optimizer_step_pre_hook(before)
    try:
        bigan.train(bigan.parse_args([*TINY, *argv]))
    finally:
        hook.remove()
        monkeypatch.undo()
        seen.over = True
    return seen


def bce(logits, label):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(label)))


@pytest.mark.parametrize("argv", [[], ["--arch", "mlp", "--prior", "uniform"], ["--image-size", "28", "--ema", "0"]])
def test_each_update_has_the_gradient_of_its_objective(monkeypatch, float64, argv):
    """D's from both pairs; E's from (x, E(x)) alone, G's from (G(z), z) alone: each taken here on its own."""
    seen = watched(monkeypatch, *argv, "--d-steps", "2", "--g-steps", "3")
    kinds = [e.kind if e.kind == "forward" else e.net for e in seen.events]
    assert kinds == (["forward", "D"] * 2 + ["forward", "pair"] * 3) * 2
    zs, last = [], []
    for forward, step in zip(seen.events[::2], seen.events[1::2]):
        G, D, E = forward.copies
        x, z = forward.x, forward.z
        zs.append(z)
        assert x.shape == (8, 1, 28, 28) and z.shape == (8, 6)
        x_fake, z_real = G(z), E(x)
        for got, wanted in zip(forward.inputs, ((x, x_fake), (z_real, z))):
            torch.testing.assert_close(got, torch.cat(wanted).detach(), rtol=0, atol=1e-12)
        if step.net == "D":
            assert forward.slope == [False, False]
            d_loss = bce(D(x, z_real.detach()), 1) + bce(D(x_fake.detach(), z), 0)
            wanted = {"D": torch.autograd.grad(d_loss, list(D.parameters()))}
        else:
            D.requires_grad_(True)
            wanted = {"E": torch.autograd.grad(bce(D(x, z_real), 0), list(E.parameters())),
                      "G": torch.autograd.grad(bce(D(x_fake, z), 1), list(G.parameters()))}
            assert all(torch.equal(a, b) for a, b in zip(step.grads["D"], last))  # D's own are not added to
        for name, grads in wanted.items():
            assert max(g.abs().max() for g in grads) > 1e-6
            for a, b in zip(step.grads[name], grads):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        last = step.grads["D"]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(zs, 2))  # a fresh z for each
    if "uniform" in argv:
        assert max(z.abs().max() for z in zs) <= 1 and min(z.min() for z in zs) < -0.9
    forwards = [e for e in seen.events if e.kind == "forward"]
    order = torch.randperm(60, generator=bigan.seeded(0, 0, 0))
    for i, f in enumerate(forwards):  # two batches, then the second of them three times
        batch = [0, 1, 1, 1, 1, 2, 3, 3, 3, 3][i]
        pictures = seen.x[order[8 * batch:8 * batch + 8]].double() / 127.5 - 1
        torch.testing.assert_close(f.x, pictures, rtol=0, atol=1e-12)


def test_who_moves_what(monkeypatch, float64):
    """One Adam for G and E at lr_g, one for D at lr_d; the average is of both, E's with its running statistics."""
    seen = watched(monkeypatch, "--ema", "0", "--lr-g", ".003", "--lr-d", ".001")
    assert list(seen.nets) == ["G", "D", "E"] and list(seen.opts) == ["g", "d"]
    for key, rate, owners in (("g", 0.003, (seen.G, seen.E)), ("d", 0.001, (seen.D,))):
        (group,) = seen.opts[key].param_groups
        assert group["lr"] == rate and group["betas"] == (0.5, 0.999)
        assert [id(p) for p in group["params"]] == [id(p) for net in owners for p in net.parameters()]
    for average, net in ((seen.ema.G, seen.G), (seen.ema.E, seen.E)):  # without averaging: the networks themselves
        state = net.state_dict()
        assert list(state) == list(average.state_dict()) and not average.training
        for k, v in average.state_dict().items():
            torch.testing.assert_close(v, state[k], rtol=0, atol=1e-12)
        assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in average.parameters()}
        assert not any(p.requires_grad for p in average.parameters())


def test_logged_values(monkeypatch, float64):
    seen = watched(monkeypatch, iterations=1)
    d, g = (e for e in seen.events if e.kind == "forward")
    logits = [e.copies[1](*e.inputs).detach() for e in (d, g)]
    (row,) = seen.logged
    assert list(row) == ["d_loss", "g_loss", "d_acc"]
    assert row["d_loss"] == pytest.approx((bce(logits[0][:8], 1) + bce(logits[0][8:], 0)).item(), abs=1e-12)
    assert row["g_loss"] == pytest.approx((bce(logits[1][:8], 0) + bce(logits[1][8:], 1)).item(), abs=1e-12)
    assert row["d_acc"] == np.mean([a > b for a in logits[0][:8] for b in logits[0][8:]])


def test_scores_are_of_the_averaged_pairs(monkeypatch, float64):
    seen = watched(monkeypatch, "--ema", ".9", iterations=3)
    x_uint8, z, y = torch.randint(0, 256, (5, 1, 28, 28)).byte(), torch.randn(5, 6), torch.zeros(5).long()
    G, E, D = seen.ema.G, seen.ema.E, seen.D
    with torch.no_grad():
        x, (x_fake, score) = x_uint8.double() / 127.5 - 1, seen.draw(z, y)
        assert x_fake.dtype == torch.uint8 and torch.equal(x_fake, bigan.to_uint8(G(z)))
        assert x_fake.shape == (5, 1, 28, 28) and torch.equal(score, D(G(z), z))
        torch.testing.assert_close(seen.rate(x_uint8, y), D(x, E(x)), rtol=0, atol=1e-12)
        assert not torch.allclose(G(z), seen.G.eval()(z)) and not torch.allclose(E(x), seen.E.eval()(x))


def test_amp_reaches_all_three(monkeypatch):
    seen = watched(monkeypatch, "--amp", iterations=1)
    assert seen.G.amp and seen.D.amp and seen.E.amp


# a run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(small):
    bigan.main([*TINY, "--steps", "4", "--run-dir", "run"])
    return torch.load("run/last.pt", weights_only=True)


def averaged(checkpoint):
    args = SimpleNamespace(**checkpoint["args"])
    pair = torch.nn.ModuleDict({"G": bigan.make_generator(args, 1), "E": bigan.make_encoder(args, 1)})
    pair.eval().requires_grad_(False).load_state_dict(checkpoint["ema"])
    return pair.G, pair.E


def test_resume_is_exact(trained):
    bigan.main([*TINY, "--steps", "2", "--run-dir", "half"])
    bigan.main(["--resume", "half/last.pt", "--steps", "4"])
    half = torch.load("half/last.pt", weights_only=True)
    assert trained["step"] == half["step"] == 4 and set(trained["nets"]) == {"G", "D", "E"}
    for part in ("ema", *(("nets", k) for k in "GDE")):
        a, b = ((c[part] if part == "ema" else c["nets"][part[1]]) for c in (trained, half))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    moments = [c["opts"]["g"]["state"] for c in (trained, half)]
    assert all(torch.equal(moments[0][i][k], moments[1][i][k]) for i in moments[0] for k in moments[0][i])


def tiles(path, columns):
    """A grey sheet as (rows, columns, 28, 28)."""
    sheet = torch.from_numpy(np.array(Image.open(path)))
    rows = (sheet.shape[0] - 2) // 30
    assert sheet.shape == (30 * rows + 2, 30 * columns + 2)
    return sheet[2:, 2:].reshape(rows, 30, columns, 30).permute(0, 2, 1, 3)[..., :28, :28]


def close(a, b):
    """A level off at most: rounding of sums in another order."""
    assert (a.int() - b.int()).abs().max() <= 1 and (a != b).double().mean() < 0.01


def test_reconstructions_show_test_pictures_their_reconstruction_and_what_that_is_nearest_to(trained):
    G, E = averaged(trained)
    x_train, x = rendered(300, 1)[0], rendered(300, 2)[0][:16]
    sheet = tiles("run/reconstructions.png", 16)
    assert len(sheet) == 3 and torch.equal(sheet[0], x[:, 0])
    made = bigan.to_uint8(G(E(x.float() / 127.5 - 1)))
    close(sheet[1], made[:, 0])
    search = NearestNeighbors(n_neighbors=1).fit(x_train.flatten(1).numpy())
    exact = G(E(x.float() / 127.5 - 1)).add(1).mul(127.5).flatten(1).numpy()
    assert torch.equal(sheet[2], x_train[search.kneighbors(exact)[1][:, 0], 0])


def test_interpolation_runs_between_real_pictures_through_their_codes(trained):
    G, E = averaged(trained)
    x = rendered(300, 2)[0][:16]
    sheet = tiles("run/interpolation_real.png", 12)
    assert len(sheet) == 8 and torch.equal(sheet[:, 0], x[:8, 0]) and torch.equal(sheet[:, 11], x[8:, 0])
    z = E(x.float() / 127.5 - 1)
    for i in range(8):
        for k in range(10):
            close(sheet[i, 1 + k], bigan.to_uint8(G((z[i] * (9 - k) + z[8 + i] * k)[None] / 9))[0, 0])


class Halves:
    """E takes the mean grey of the left and of the right half, G paints them."""

    def E(self, x):
        return x.unflatten(3, (2, 14)).mean((1, 2, 4))

    def G(self, z):
        return z[:, None, None, :, None].expand(-1, 1, 28, 2, 14).flatten(3)


def test_figures_of_a_known_pair(monkeypatch, tmp_path):
    """What is nearest lies past the first thousand training pictures; a row of the interpolation is two ramps."""
    torch.manual_seed(0)
    z = torch.randint(0, 256, (16, 2))
    x = (z[:, None, None, :, None] + torch.zeros(1, 1, 28, 2, 14, dtype=torch.long)).flatten(3).byte()
    monkeypatch.setattr(bigan, "load_data", lambda name, root, size, split, limit: (x[:limit], None))
    x_train = torch.randint(0, 256, (1100, 1, 28, 28)).byte()
    x_train[1050:1066] = x
    x_train[1050:1066, :, 0, 0] = 7  # near, not equal
    bigan.real_figures(bigan.parse_args(["--image-size", "28"]), Halves(), x_train, tmp_path)
    sheet = tiles(tmp_path / "reconstructions.png", 16)
    assert torch.equal(sheet[2], x_train[1050:1066, 0])
    close(sheet[1], x[:, 0])
    sheet = tiles(tmp_path / "interpolation_real.png", 12).float()
    for i in range(8):
        ramps = torch.lerp(z[i].double(), z[i + 8].double(), torch.linspace(0, 1, 10, dtype=torch.float64)[:, None])
        for side in (0, 1):
            assert (sheet[i, 1:11, 5, 20 * side].double() - ramps[:, side]).abs().max() <= 1


# the probe's classifiers ----------------------------------------------------------------------------------------------


def blobs(n=400, d=5, classes=4, seed=0, spread=2.5):
    x, y = make_blobs(n, d, centers=classes, cluster_std=spread, random_state=seed, center_box=(-4, 4))
    return torch.tensor(x), torch.tensor(y)


def test_nearest_is_scikit_learns():
    x, y = blobs(1500, 6, 7)
    (answer,) = metrics.answers([], x[:800], y[:800], x[800:])
    wanted = KNeighborsClassifier(1, algorithm="brute").fit(x[:800], y[:800]).predict(x[800:])
    assert np.array_equal(answer.numpy(), wanted) and (wanted == y[800:].numpy()).mean() < 0.9


def test_nearest_of_equals_is_the_first():
    x, y = torch.tensor([[0., 0], [3, 0], [0, 0]]), torch.tensor([5, 2, 4])
    assert next(metrics.answers([], x, y, torch.tensor([[0.1, 0], [2, 0]]))).tolist() == [5, 2]


def shares(line):
    return [float(s) for s in re.findall(r"([\d.]+)%", line)]


MODELS = LogisticRegression(C=1.0, max_iter=1000), SVC(C=1.0, kernel="rbf", gamma="scale")


def rights(x, y, x_test, y_test):
    """What share the probe's three classifiers get right, in percent."""
    return [100 * (a == y_test).double().mean().item() for a in metrics.answers(MODELS, x, y, x_test)]


def fitted_by_scikit_learn(x, y, x_test, y_test):
    scale = StandardScaler().fit(x)
    a, b = scale.transform(x), scale.transform(x_test)
    return [100 * (m == y_test.numpy()).mean() for m in (
        KNeighborsClassifier(1, algorithm="brute").fit(x, y).predict(x_test),
        LogisticRegression(tol=1e-8, max_iter=10_000).fit(a, y).predict(b),
        SVC(tol=1e-5).fit(a[:5000], y[:5000]).predict(b))]


def test_classifiers_see_numbers_scaled_by_the_training_split_alone():
    """The test split has another mean and scale, so that a scaling of its own would answer otherwise; a number that
    never changes in training must not divide by 0, another is a thousand times the others."""
    x, y = blobs(600, 4, 4)
    x[:, 2] *= 1000
    x = torch.cat([x, torch.full((600, 1), 3.0)], 1)
    x_test, y_test = x[300:] * 1.3 + torch.tensor([1., -2, 1500, 1, 0]), y[300:]
    x, y = x[:300], y[:300]
    wanted = fitted_by_scikit_learn(x, y, x_test, y_test)
    assert rights(x, y, x_test, y_test) == pytest.approx(wanted, abs=0.4)  # one of 300 by rounding
    own = (x_test - x_test.mean(0)) / x_test.std(0).clamp(min=1e-9) * x.std(0) + x.mean(0)
    other = fitted_by_scikit_learn(x, y, own, y_test)
    assert abs(other[1] - wanted[1]) > 2 and abs(other[2] - wanted[2]) > 2


def test_classifiers_learn_from_training_labels_only():
    x, y = blobs(600, 4, 4, spread=0.5)
    shuffled = y[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    assert min(rights(x[:300], y[:300], x[300:], y[300:])) > 95
    assert max(rights(x[:300], shuffled[:300], x[300:], y[300:])) < 50


def test_the_svm_alone_sees_the_first_5000():
    """Two stand-ins note what they are given."""
    seen = []

    def fit(a, b):
        seen.append((torch.tensor(a), torch.tensor(b)))
        return SimpleNamespace(predict=lambda c: seen[-1][1][:len(c)].numpy())

    x, y = torch.arange(5100.)[:, None], torch.arange(5100) % 2
    assert len(list(metrics.answers([SimpleNamespace(fit=fit)] * 2, x, y, x[:30] + 0.3))) == 3
    for (a, b), n in zip(seen, (5100, 5000)):
        assert len(a) == len(b) == n and torch.equal(b, y[:n])
        torch.testing.assert_close(a, (x[:n] - x.mean()) / x.std(correction=0))


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0, -2.0])
def test_reconstruction_ratio_of_orthogonal_pictures(c):
    """x_i = e_i and G(E(x_i)) = c e_i: |1 - c| over sqrt(1 + c^2), whichever the mismatch, as long as it is one."""
    x = torch.eye(36, dtype=torch.float64).view(36, 1, 6, 6)
    for seed in range(5):
        assert metrics.reconstruction_ratio(x, c * x, seed) == pytest.approx(abs(1 - c) / np.sqrt(1 + c * c), abs=1e-12)


def test_reconstruction_ratio_of_a_code_that_tells_nothing():
    x = torch.randn(400, 1, 6, 6)
    assert metrics.reconstruction_ratio(x, torch.zeros_like(x) + 0.1, 0) == pytest.approx(1, abs=1e-6)
    noise = torch.randn(400, 1, 6, 6)
    assert metrics.reconstruction_ratio(x, noise, 0) == pytest.approx(1, abs=0.05)


# --probe --------------------------------------------------------------------------------------------------------------


def bytes_below(path):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(path).rglob("*") if p.is_file()}


def test_probe_of_a_run(trained, capsys, monkeypatch):
    """Each row against features and classifiers made here; nothing is trained or written."""
    monkeypatch.setattr(metrics.Study, "ready", lambda self: None)  # too few pictures, say
    before, kept = bytes_below("."), capsys.readouterr()
    bigan.main(["--resume", "run/last.pt", "--probe"])
    out = capsys.readouterr().out
    assert bytes_below(".") == before
    rows = {line.split(" | ")[0].strip("| "): line for line in out.splitlines() if "%" in line and "|" in line}
    assert list(rows) == ["E(x)", "the layer before", "E(x), untrained", "the layer before, untrained", "pixels"]
    assert "step 4" in out and "SVM: the first 300" in out and "that classifier" not in out and kept
    (x, y), (x_test, y_test) = rendered(300, 1), rendered(300, 2)
    x, x_test = x.float() / 127.5 - 1, x_test.float() / 127.5 - 1
    G, E = averaged(trained)
    torch.manual_seed(0)  # the seed of the run: the networks that it began with
    args = SimpleNamespace(**trained["args"])
    bigan.make_generator(args, 1), bigan.make_discriminator(args, 1)
    first = bigan.make_encoder(args, 1).eval().requires_grad_(False)
    for name, f, width in (("E(x)", E, 6), ("the layer before", E[:-2], 392), ("E(x), untrained", first, 6),
                           ("the layer before, untrained", first[:-2], 392), ("pixels", torch.nn.Flatten(), 784)):
        assert f"| {width} |" in rows[name]
        wanted = fitted_by_scikit_learn(f(x).double(), y, f(x_test).double(), y_test)
        assert shares(rows[name]) == pytest.approx(wanted, abs=0.7), name  # two of 300 by rounding
    assert len({tuple(shares(r)) for r in rows.values()}) == 5
    made = G(E(x_test))
    ratio = float(re.search(r"reconstruction ratio ([\d.]+)", out)[1])
    everyone = torch.cdist(x_test.flatten(1), made.flatten(1))
    right, wrong = everyone.diagonal().mean(), (everyone.sum() - everyone.trace()) / (300 * 299)
    assert ratio == pytest.approx((right / wrong).item(), rel=0.02)  # of all mismatches, of which the probe takes 300


def test_probe_counts_reconstructions_that_keep_their_class(trained, capsys, monkeypatch):
    """A stand-in for the classifier takes a picture's brightness for its class."""
    G, E = averaged(trained)
    x, y = rendered(300, 2)
    made = bigan.to_uint8(G(E(x.float() / 127.5 - 1)))
    level = made.float().mean((1, 2, 3))
    edges = level.quantile(torch.arange(1, 10) / 10)

    def embed(x):
        assert x.dtype == torch.uint8
        return None, F.one_hot(torch.bucketize(x.float().mean((1, 2, 3)), edges), 10)

    asked = []

    def judge(dataset, load, folder, device, epochs, say):
        asked.append((dataset, folder, device, load("train"), load("test")))
        return SimpleNamespace(net=SimpleNamespace(embed=embed))

    monkeypatch.setattr(metrics, "Judge", judge)
    bigan.main(["--resume", "run/last.pt", "--probe"])
    wanted = 100 * (torch.bucketize(level, edges) == y).double().mean().item()
    (name, folder, device, train, test), = asked
    assert 2 < wanted < 60 and name == "digits" and folder == "data" and device == "cpu"
    assert torch.equal(train[0], rendered(300, 1)[0]) and torch.equal(test[0], x) and torch.equal(test[1], y)
    assert float(re.search(r"([\d.]+)% of the reconstructions", capsys.readouterr().out)[1]) == pytest.approx(
        wanted, abs=0.4)


def test_probing_leaves_no_trace_in_what_follows(trained, monkeypatch):
    monkeypatch.setattr(metrics.Study, "ready", lambda self: None)
    bigan.main(["--resume", "run/last.pt", "--probe"])
    bigan.main(["--resume", "run/last.pt", "--steps", "6"])
    later = torch.load("run/last.pt", weights_only=True)
    assert later["step"] == 6 and later["args"]["probe"] is False


def test_probe_is_never_a_checkpoints(trained):
    """Nor one that says so: a run that resumes it trains."""
    assert trained["args"]["probe"] is False
    torch.save({**trained, "args": {**trained["args"], "probe": True}}, "run/last.pt")
    assert bigan.parse_args(["--resume", "run/last.pt"]).probe is False
    assert bigan.parse_args(["--resume", "run/last.pt", "--probe"]).probe is True


def fails(capsys, argv, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        bigan.main(argv)
    out = capsys.readouterr()
    assert stop.value.code == 2 and out.out == "" and out.err.count("\n") == 1
    for word in words: assert word in out.err


def test_probe_mistakes(trained, capsys, monkeypatch):
    before = bytes_below(".")
    probe = ["--resume", "run/last.pt", "--probe"]
    fails(capsys, ["--probe"], "--resume")
    fails(capsys, [*probe, "--generate", "3"], "--generate")
    fails(capsys, [*probe, "--ngf", "8"], "--ngf")
    fails(capsys, ["--resume", "nothing.pt", "--probe"], "nothing.pt")
    with monkeypatch.context() as m:  # an import that raises ImportError
        m.setitem(sys.modules, "sklearn.svm", None)
        fails(capsys, probe, "pip install scikit-learn")
    x, y = rendered(300, 1)
    for has, labels in ((0, (0 * y - 1, y)), (0, (y, y - 1)), (1, (0 * y, y)), (1000, (y * 111, y))):
        with monkeypatch.context() as m:
            m.setattr(bigan, "load_data", lambda name, root, size, split, limit=None: (x, labels[split == "test"]))
            fails(capsys, probe, f"has {has}\n")
    damaged = torch.load("run/last.pt", weights_only=True)
    damaged["ema"].pop("E.0.weight")
    torch.save(damaged, "damaged.pt")
    fails(capsys, ["--resume", "damaged.pt", "--probe"], "does not fit")
    Path("damaged.pt").unlink()
    assert bytes_below(".") == before
