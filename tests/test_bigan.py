"""bigan.py: a game small enough to enumerate; who gets whose gradient, watching train(); its figures, decoded; the
probe's table against scikit-learn."""

import copy
import hashlib
import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import rendered
from PIL import Image
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from test_gan_losses import FAKE, REAL, float64, forwards, run  # noqa: F401  float64: a fixture
from test_networks import KERNELS, LEAKY, SIDES, bn, down, layers, size, up
from torch.nn import functional as F

import bigan
import metrics

TINY = ["--paper", "--image-size", "28", "--ngf", "4", "--ndf", "4", "--latent-dim", "6", "--batch-size", "8"]
TINY += ["--device", "cpu", "--log-every", "0", "--sample-every", "0", "--eval-every", "0", "--checkpoint-every", "0"]


def nets(*argv, channels=1):
    args = bigan.parse_args([str(a) for a in argv])
    return [kind(args, channels) for kind in (bigan.Generator, bigan.Discriminator, bigan.Encoder)]


# the networks ---------------------------------------------------------------------------------------------------------


@SIDES
@pytest.mark.parametrize("channels", [1, 3])
def test_convolutional_networks(side, channels):
    """E is G turned round; D has 512 numbers of the picture beside 512 of z, and no norm."""
    G, D, E = nets("--image-size", side, "--ngf", 2, "--ndf", 3, "--latent-dim", 7, channels=channels)
    kernels = KERNELS[side]
    widths = [2 * 2**i for i in reversed(range(len(kernels)))]
    wanted = [up(7, widths[0], 1, 0)]
    for a, b, k in zip(widths, [*widths[1:], channels], kernels):
        wanted += [bn(a), "ReLU", up(a, b, kernel=k)]
    assert layers(G) == [*wanted, "Tanh"]
    widths = [channels, *widths[::-1]]
    wanted = []
    for a, b, k in zip(widths, widths[1:], kernels[::-1]):
        wanted += [down(a, b, kernel=k), bn(b), LEAKY]
    assert layers(E) == [*wanted, ("Linear", 16 * widths[-1], 7, "bias")]
    weights = sum(k * k * a * b + 2 * b for a, b, k in zip(widths, widths[1:], kernels[::-1]))
    assert size(E) == weights + 7 * (16 * widths[-1] + 1)
    widths = [channels, *(3 * 2**i for i in range(len(kernels)))]
    wanted = []
    for a, b, k in zip(widths, widths[1:], kernels[::-1]):
        wanted += [down(a, b, kernel=k, bias="bias"), LEAKY]
    for a, b in ((16 * widths[-1], 512), (7, 512), (512, 512), (1024, 1024)):
        wanted += [("Linear", a, b, "bias"), LEAKY]
    assert layers(D) == [*wanted, ("Linear", 1024, 1, "bias")]
    z = torch.randn(2, 7)
    x = G(z)
    assert x.shape == (2, channels, side, side) and x.abs().max() <= 1
    assert E(x).shape == (2, 7) and D(x, z).shape == (2,)


def test_permutation_invariant_networks():
    G, D, E = nets("--arch", "mlp", "--latent-dim", "50")
    norm = ("BatchNorm1d", 1024)
    wanted = [("Linear", 50, 1024, "no bias"), norm, "ReLU", ("Linear", 1024, 1024, "no bias"), norm, "ReLU"]
    assert layers(G) == [*wanted, ("Linear", 1024, 784, "bias"), "Tanh"]
    wanted = [("Linear", 784, 1024, "no bias"), norm, LEAKY, ("Linear", 1024, 1024, "no bias"), norm, LEAKY]
    assert layers(E) == [*wanted, ("Linear", 1024, 50, "bias")]
    wanted = [("Linear", 834, 1024, "bias"), LEAKY, ("Linear", 1024, 1024, "bias"), LEAKY]
    assert layers(D) == [*wanted, ("Linear", 1024, 1, "bias")]
    x, z = torch.rand(3, 1, 28, 28), torch.rand(3, 50)
    assert G(z).shape == x.shape and E(x).shape == z.shape and D(x, z).shape == (3,) and E.body(x).shape == (3, 1024)


def test_weights_are_drawn_as_in_the_dcgan_paper():
    for net in nets("--image-size", 32, "--paper"):
        for m in net.modules():
            if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)) and m.weight.numel() > 2000:
                assert m.weight.std().item() == pytest.approx(0.02, rel=0.1)
            elif isinstance(m, torch.nn.BatchNorm2d):
                assert m.weight.mean().item() == pytest.approx(1, abs=0.03) and m.weight.std() > 0.005


@pytest.mark.parametrize("arch", ["mlp", "dcgan"])
def test_codes_lie_where_the_prior_does(arch):
    x = torch.randn(8, 1, 28, 28) * 1e4
    for prior in ("normal", "uniform"):
        _, _, E = nets("--arch", arch, "--image-size", 28, "--prior", prior)
        far = E.eval()(x).abs().max()
        assert far > 2 if prior == "normal" else 0.99 < far <= 1
        assert torch.equal(E(x), E.head(E.body(x)))


@pytest.mark.parametrize("arch", ["mlp", "dcgan"])
def test_d_sees_picture_and_code(arch):
    _, D, _ = nets("--arch", arch, "--image-size", 28, "--latent-dim", 9)
    x, z = torch.rand(4, 1, 28, 28, requires_grad=True), torch.randn(4, 9, requires_grad=True)
    for grad in torch.autograd.grad(D(x, z)[2], [x, z]):
        assert grad[2].abs().min() > 0 and grad[[0, 1, 3]].abs().max() == 0  # no norm: each pair on its own


def test_the_papers_settings():
    a = bigan.parse_args(["--paper"])
    assert (a.batch_size, a.d_steps, a.g_steps, a.lr_g, a.lr_d) == (128, 1, 1, 2e-4, 2e-4)
    assert (a.beta1, a.beta2, a.r1, a.probe) == (0.5, 0.999, 0, False)


# the losses -----------------------------------------------------------------------------------------------------------


def test_swapping_the_labels_swaps_the_objectives():
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    a, b = bigan.discriminator_loss(real, fake), bigan.generator_loss(real, fake)
    assert bigan.discriminator_loss(fake, real).item() == pytest.approx(b.item(), abs=1e-12)
    assert bigan.generator_loss(fake, real).item() == pytest.approx(a.item(), abs=1e-12)
    assert abs(a - b) > 0.5


def test_the_best_logit_is_the_log_ratio_of_the_joint_laws():
    """Nine pairs (x, z), as often as the tables say: the D that minimises its loss is log P/Q, and the loss there is
    2 log 2 - 2 JSD(P, Q)."""
    P = torch.tensor([[4.0, 1, 3], [2, 6, 1], [1, 1, 5]], dtype=torch.float64)
    Q = torch.tensor([[2.0, 5, 1], [2, 3, 3], [4, 1, 3]], dtype=torch.float64)
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

SMALL = ["--image-size", "16", "--ngf", "4", "--ndf", "4", "--latent-dim", "6", "--batch-size", "8", "--device", "cpu"]


def bce(logits, label):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(label)))


@pytest.mark.parametrize(
    "flags",
    ["--paper", "--paper --arch mlp --prior uniform", "--paper --ema 0", "--r1 2 --penalty-share .25"],
)
def test_each_update_has_the_gradient_of_its_objective(monkeypatch, float64, flags):  # noqa: F811
    """D's from both pairs; E's from (x, E(x)) alone, G's from (G(z), z) alone: each taken here on its own."""
    argv = [*SMALL, *flags.split(), "--d-steps", "2", "--g-steps", "3"]
    iterations = 1 if "mlp" in flags else 2
    seen = run(monkeypatch, bigan, argv, iterations)
    pictures = {tuple(p.flatten().tolist()) for p in seen.x.double() / 127.5 - 1}
    order, since, xs, last = [], [], [], []
    for event in seen.events:
        if event.kind == "forward":
            since.append(event)
            continue
        order.append(event.net)
        G, D, E = event.copies
        (g_call,), (e_call,), d_calls = ([e for e in since if e.net == name] for name in "GED")
        (z,), (x,) = g_call.inputs, e_call.inputs
        xs.append(x)
        assert all(e.train for e in since) and x.shape == (8, 1, 16, 16) and z.shape == (8, 6)
        x_fake, z_real = G(z), E(x)
        for got, wanted in zip(d_calls[0].inputs, ((x, x_fake), (z_real, z))):
            torch.testing.assert_close(got, torch.cat(wanted).detach(), rtol=0, atol=1e-12)
        if event.net == "D":
            assert not g_call.graph and not e_call.graph and not d_calls[0].slope
            assert {tuple(p.flatten().tolist()) for p in x} <= pictures
            logits = D(x, z_real.detach()), D(x_fake.detach(), z)
            loss = d_loss = bce(logits[0], 1) + bce(logits[1], 0)
            penalty = 0.0
            if seen.args.r1:  # of the first two pairs
                pair = [t[:2].detach().requires_grad_() for t in (x, z_real)]
                slopes = torch.autograd.grad(D(*pair).sum(), pair, create_graph=True)
                r1 = 2 / 2 * sum(s.square().sum() for s in slopes) / 2
                loss = d_loss = d_loss + r1
                penalty = r1.item()
            assert [len(e.inputs[0]) for e in d_calls] == [16, 2][: 1 + bool(seen.args.r1)]
            wanted = {"D": torch.autograd.grad(loss, list(D.parameters()), allow_unused=True, materialize_grads=True)}
        else:
            assert torch.equal(x, xs[(len(order) - 1) // 5 * 5 + 1])  # D's last batch
            for_e, for_g = bce(D(x, z_real), 0), bce(D(x_fake, z), 1)
            g_loss = for_e + for_g
            wanted = {"E": torch.autograd.grad(for_e, list(E.parameters()), retain_graph=True)}
            wanted["G"] = torch.autograd.grad(for_g, list(G.parameters()))
            assert all(torch.equal(a, b) for a, b in zip(event.grads["D"], last))  # D's own are not added to
        for name, grads in wanted.items():
            assert max(g.abs().max() for g in grads) > 1e-6
            for a, b in zip(event.grads[name], grads):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        last, since = event.grads["D"], []
        if order[-3:] == ["G"] * 3:
            wins = np.mean([float(a > b) for a in logits[0] for b in logits[1]])
            row = {"d_loss": d_loss.item(), "g_loss": g_loss.item(), "penalty": penalty, "d_acc": wins}
            assert seen.logged[len(order) // 5 - 1] == pytest.approx(row, rel=1e-6)
    assert order == ["D", "D", "G", "G", "G"] * iterations
    zs = torch.cat([e.inputs[0] for e in forwards(seen, "G")])
    assert len({tuple(z.tolist()) for z in zs}) == len(zs) == 5 * iterations * 8  # a fresh z for each
    assert seen.args.prior == "normal" or (-1 <= zs.min() < -0.9 and zs.max() <= 1)
    rows = {tuple(p.flatten().tolist()) for x in (*xs[:2], *xs[5:7]) for p in x}
    assert len(rows) == 2 * iterations * 8  # within an epoch no picture comes twice


def test_who_moves_what(monkeypatch, float64):  # noqa: F811
    """One Adam for G and E at lr_g, one for D at lr_d; the average is of both, E's with its running statistics."""
    flags = "--paper --ema 0 --lr-g .003 --lr-d .001"
    seen = run(monkeypatch, bigan, [*SMALL, *flags.split()], iterations=2)
    for key, rate, owners in (("g", 0.003, (seen.G, seen.E)), ("d", 0.001, (seen.D,))):
        (group,) = seen.opts[key].param_groups
        assert group["lr"] == rate and group["betas"] == (0.5, 0.999)
        assert [id(p) for p in group["params"]] == [id(p) for net in owners for p in net.parameters()]
    for average, net in ((seen.ema, seen.G), (seen.ema_e, seen.E)):  # without averaging: the networks themselves
        state = average.state_dict()
        assert state.pop("updates") == 2 and list(state) == list(net.state_dict()) and not average.training
        for k, v in net.state_dict().items():
            torch.testing.assert_close(state[k], v, rtol=0, atol=1e-12)
        assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in average.parameters()}
        assert not any(p.requires_grad for p in average.parameters())


def test_samples_and_scores_are_of_the_averaged_pairs(monkeypatch, float64):  # noqa: F811
    seen = run(monkeypatch, bigan, [*SMALL, "--paper", "--ema", ".9"], iterations=3)
    x_uint8, z, y = torch.randint(0, 256, (5, 1, 16, 16)).byte(), torch.randn(5, 6), torch.zeros(5).long()
    G, E, D = seen.ema, seen.ema_e, seen.D
    with torch.no_grad():
        x = x_uint8.double() / 127.5 - 1
        assert torch.equal(seen.sample(z, y), bigan.to_uint8(G(z)))
        torch.testing.assert_close(seen.score(x_uint8, y), D(x, E(x)), rtol=0, atol=1e-12)
        assert not torch.allclose(G(z), seen.G.eval()(z)) and not torch.allclose(E(x), seen.E.eval()(x))


def test_amp_reaches_all_three(monkeypatch):
    argv = [*SMALL, "--amp"]
    G, D, E = nets(*argv)
    kinds = []
    for net in (G.net[1], E.body[0], D.net[0]):
        net.register_forward_hook(lambda m, x, out: kinds.append(out.dtype))
    seen = run(monkeypatch, bigan, argv, nets=(G, D, E))
    assert len(kinds) >= 6 and set(kinds) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for net in (seen.G, seen.D, seen.E) for p in net.parameters())


# a run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(small):
    bigan.main([*TINY, "--steps", "4", "--run-dir", "run"])
    return torch.load("run/last.pt", weights_only=True)


def averaged(checkpoint):
    args = SimpleNamespace(**checkpoint["args"])
    G, E = bigan.Generator(args, 1), bigan.Encoder(args, 1)
    for net, state in ((G, checkpoint["ema"]), (E, checkpoint["ema_e"])):
        net.eval().requires_grad_(False).load_state_dict({k: v for k, v in state.items() if k != "updates"})
    return G, E


def test_load_and_load_encoder_give_the_averages(trained):
    x, z = torch.rand(3, 1, 28, 28), torch.randn(3, 6)
    G, E = averaged(trained)
    assert torch.equal(bigan.load("run/last.pt")(z), G(z))
    assert torch.equal(bigan.load_encoder("run/last.pt")(x), E(x))


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
    close(sheet[1], bigan.to_uint8(G(E(x.float() / 127.5 - 1)))[:, 0])
    distances = (sheet[1][:, None].double() - x_train[None, :, 0]).flatten(2).norm(dim=2)
    shown = (sheet[1].double() - sheet[2]).flatten(1).norm(dim=1)
    assert all(any(torch.equal(p, q) for q in x_train[:, 0]) for p in sheet[2])
    torch.testing.assert_close(shown, distances.min(1).values)


def test_interpolation_runs_between_real_pictures_through_their_codes(trained):
    G, E = averaged(trained)
    x = rendered(300, 2)[0][:16]
    sheet = tiles("run/interpolation_real.png", 12)
    assert len(sheet) == 8 and torch.equal(sheet[:, 0], x[:8, 0]) and torch.equal(sheet[:, 11], x[8:, 0])
    z = E(x.float() / 127.5 - 1)
    for i in range(8):
        for k in range(10):
            close(sheet[i, 1 + k], bigan.to_uint8(G((z[i] * (9 - k) + z[8 + i] * k)[None] / 9))[0, 0])


def test_figures_of_a_known_pair(tmp_path):
    """E takes the mean grey of the left and of the right half, G paints them. What is nearest lies past the first
    thousand training pictures; a row of the interpolation is two ramps."""
    torch.manual_seed(0)
    z = torch.randint(0, 256, (16, 2))

    def encode(x):
        return x.float().unflatten(3, (2, 14)).mean((1, 2, 4))

    def decode(z):
        return z[:, None, None, :, None].expand(-1, 1, 28, 2, 14).flatten(3).round().byte()

    x = decode(z.float())
    x_train = torch.randint(0, 256, (1100, 1, 28, 28)).byte()
    x_train[1050:1066] = x
    x_train[1050:1066, :, 0, 0] = 7  # near, not equal
    metrics.reconstruction_figures(tmp_path, lambda split: (x, None, []), encode, decode, x_train)
    sheet = tiles(tmp_path / "reconstructions.png", 16)
    assert torch.equal(sheet[2], x_train[1050:1066, 0])
    close(sheet[1], x[:, 0])
    sheet = tiles(tmp_path / "interpolation_real.png", 12).double()
    for i in range(8):
        ramps = torch.lerp(z[i].double(), z[i + 8].double(), torch.linspace(0, 1, 10, dtype=torch.float64)[:, None])
        for side in (0, 1):
            assert (sheet[i, 1:11, 5, 20 * side] - ramps[:, side]).abs().max() <= 1


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
    x, y = torch.tensor([[0.0, 0], [3, 0], [0, 0]]), torch.tensor([5, 2, 4])
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
    return [
        100 * (m == y_test.numpy()).mean()
        for m in (
            KNeighborsClassifier(1, algorithm="brute").fit(x, y).predict(x_test),
            LogisticRegression(tol=1e-8, max_iter=10_000).fit(a, y).predict(b),
            SVC(tol=1e-5).fit(a[:5000], y[:5000]).predict(b),
        )
    ]


def test_classifiers_see_numbers_scaled_by_the_training_split_alone():
    """The test split has another mean and scale, so that a scaling of its own would answer otherwise; a number that
    never changes in training must not divide by 0, another is a thousand times the others."""
    x, y = blobs(600, 4, 4)
    x[:, 2] *= 1000
    x = torch.cat([x, torch.full((600, 1), 3.0)], 1)
    x_test, y_test = x[300:] * 1.3 + torch.tensor([1.0, -2, 1500, 1, 0]), y[300:]
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
        return SimpleNamespace(predict=lambda c: seen[-1][1][: len(c)].numpy())

    x, y = torch.arange(5100.0)[:, None], torch.arange(5100) % 2
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


def test_probe_of_a_run(trained, capsys):
    """Each row against features and classifiers made here; nothing is trained or written."""
    before = bytes_below(".")
    capsys.readouterr()
    bigan.main(["--resume", "run/last.pt", "--probe"])
    out = capsys.readouterr().out
    assert bytes_below(".") == before
    table = {line.split(" | ")[0].strip("| "): line for line in out.splitlines() if "%" in line and "|" in line}
    assert list(table) == ["E(x)", "the layer before", "E(x), untrained", "the layer before, untrained", "pixels"]
    assert "step 4" in out and "SVM: the first 300" in out and "that classifier" not in out  # too few are no score
    (x, y), (x_test, y_test) = rendered(300, 1), rendered(300, 2)
    x, x_test = x.float() / 127.5 - 1, x_test.float() / 127.5 - 1
    G, E = averaged(trained)
    torch.manual_seed(0)  # the seed of the run: the networks that it began with
    args = SimpleNamespace(**trained["args"])
    bigan.Generator(args, 1), bigan.Discriminator(args, 1)
    first = bigan.Encoder(args, 1).eval().requires_grad_(False)
    features = {"E(x)": E, "the layer before": E.body, "E(x), untrained": first}
    features |= {"the layer before, untrained": first.body, "pixels": torch.nn.Flatten()}
    for (name, f), width in zip(features.items(), (6, 256, 6, 256, 784)):
        assert f"| {width} |" in table[name]
        wanted = fitted_by_scikit_learn(f(x).double(), y, f(x_test).double(), y_test)
        assert shares(table[name]) == pytest.approx(wanted, abs=0.7), name  # two of 300 by rounding
    assert len({tuple(shares(r)) for r in table.values()}) == 5
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

    def judge(dataset, load, folder, device):
        asked.append((dataset, str(folder), device, *load("train")[:2], *load("test")[:2]))
        return SimpleNamespace(net=SimpleNamespace(embed=embed))

    monkeypatch.setattr(metrics, "Judge", judge)
    bigan.main(["--resume", "run/last.pt", "--probe"])
    wanted = 100 * (torch.bucketize(level, edges) == y).double().mean().item()
    ((*how, x_train, _, x_test, y_test),) = asked
    assert 2 < wanted < 60 and how == ["digits", "data", "cpu"]
    assert torch.equal(x_train, rendered(300, 1)[0]) and torch.equal(x_test, x) and torch.equal(y_test, y)
    kept = re.search(r"([\d.]+)% of the reconstructions", capsys.readouterr().out)
    assert float(kept[1]) == pytest.approx(wanted, abs=0.4)


def test_probe_is_never_a_checkpoints(trained):
    """Nor one that says so: a run that resumes it trains."""
    assert trained["args"]["probe"] is False
    torch.save({**trained, "args": {**trained["args"], "probe": True}}, "run/last.pt")
    assert bigan.parse_args(["--resume", "run/last.pt"]).probe is False
    assert bigan.parse_args(["--resume", "run/last.pt", "--probe"]).probe is True


def test_probe_mistakes(trained, capsys, monkeypatch):
    damaged = copy.deepcopy(trained)
    damaged["ema_e"].pop("body.0.weight")
    torch.save(damaged, "damaged.pt")
    before = bytes_below(".")

    def fails(argv, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            bigan.main(argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1
        for word in words:
            assert word in err

    probe = ["--resume", "run/last.pt", "--probe"]
    fails(["--probe"], "--resume")
    fails([*probe, "--generate", "3"], "--generate")
    fails([*probe, "--ngf", "8"], "--ngf")
    fails(["--resume", "nothing.pt", "--probe"], "nothing.pt")
    fails(["--resume", "damaged.pt", "--probe"], "does not fit")
    with monkeypatch.context() as m:  # an import that raises ImportError
        m.setitem(sys.modules, "sklearn.svm", None)
        fails(probe, "pip install scikit-learn")
    x, y = rendered(300, 1)
    for has, labels in ((0, (0 * y - 1, y)), (0, (y, y - 1)), (1, (0 * y, y)), (1000, (y * 111, y))):

        def load(dataset, data_dir, size, split, labels=labels):
            return x, labels[split == "test"], []

        with monkeypatch.context() as m:
            m.setattr(bigan, "load_data", load)
            m.setattr(metrics, "load_data", load)
            fails(probe, f"has {has}\n")
    assert bytes_below(".") == before
