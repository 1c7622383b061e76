"""wgan_gp.py's penalty and its step against closed forms, finite differences and eq. (3) written out; and what all
seven scripts share of a step: averages, accuracy, batches, noise, bytes."""

import copy

import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_gan_losses import float64, forwards, run, steps  # noqa: F401  float64: a fixture
from torch import nn

import metrics
import wgan_gp

pytestmark = pytest.mark.usefixtures("float64")


def linear_critic(w):
    return lambda x: (x * w).flatten(1).sum(1) + 3


def penalty_at(D, x):
    """With the real images and the fake ones the same, every x_hat is there."""
    return wgan_gp.gradient_penalty(D, x, x)


def plain_penalty(D, x):
    """The formula once more, straight from the paper: one picture at a time, no guard."""
    x = x.detach().requires_grad_()
    slopes = [torch.autograd.grad(D(x[i : i + 1]).sum(), x, create_graph=True)[0][i] for i in range(len(x))]
    return sum((s.square().sum().sqrt() - 1) ** 2 for s in slopes) / len(x)


# the penalty ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 1, 1), (1, 4, 4), (2, 4, 4)])
def test_penalty_of_a_linear_critic(shape):
    w = torch.randn(*shape, requires_grad=True)
    penalty, norm = wgan_gp.gradient_penalty(linear_critic(w), *torch.randn(2, 5, *shape))
    length = w.detach().square().sum().sqrt()
    torch.testing.assert_close(penalty, (length - 1) ** 2, rtol=0, atol=1e-10)
    torch.testing.assert_close(norm, length, rtol=0, atol=1e-10)
    (slope,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(slope, 2 * (length - 1) * w.detach() / length, rtol=0, atol=1e-10)


def test_norm_runs_over_all_of_a_picture():
    w = torch.full((1, 4, 4), 0.25)  # length 1 over the picture, 1/4 over the channel axis
    penalty, norm = penalty_at(linear_critic(w), torch.randn(3, 1, 4, 4))
    assert penalty.item() == pytest.approx(0, abs=1e-20)
    assert norm.item() == pytest.approx(1, abs=1e-11)
    assert (w.norm(dim=0) - 1).square().mean().item() == 0.5625  # what the norm over that axis would give


@pytest.mark.parametrize("a", [0.15, 0.7, -2.0])
def test_penalty_of_a_quadratic_critic(a):
    x = torch.randn(6, 2, 3, 3)
    a = torch.tensor(a, requires_grad=True)
    penalty, norm = penalty_at(lambda x: a / 2 * x.square().flatten(1).sum(1), x)
    r = x.flatten(1).norm(dim=1)  # the slope at x is a x
    torch.testing.assert_close(penalty, (a.abs() * r - 1).square().mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(norm, a.abs().detach() * r.mean(), rtol=0, atol=1e-10)
    (slope,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(slope, (2 * (a.abs() * r - 1) * r * a.sign()).mean().detach(), rtol=0, atol=1e-10)


def test_penalty_differentiates_to_every_weight():
    layers = [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Softplus(), nn.Linear(4, 1)]
    D = nn.Sequential(*layers, nn.Flatten(0))
    x, h = torch.randn(4, 2, 4, 4), 1e-5
    penalty, _ = penalty_at(D, x)
    torch.testing.assert_close(penalty, plain_penalty(D, x), rtol=0, atol=1e-10)
    *grads, last_bias = torch.autograd.grad(penalty, list(D.parameters()), allow_unused=True, materialize_grads=True)
    assert last_bias.abs().max() == 0  # a constant added to the score has no slope
    for p, grad in zip(D.parameters(), grads):
        numeric = torch.empty(p.numel())
        for i in range(p.numel()):
            ends = []
            for step in (h, -2 * h):
                p.data.view(-1)[i] += step
                ends.append(plain_penalty(D, x).item())
            p.data.view(-1)[i] += h
            numeric[i] = (ends[0] - ends[1]) / (2 * h)
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(grad.flatten(), numeric, rtol=0, atol=1e-8)


def test_penalty_where_the_slope_is_zero():
    w = torch.zeros(1, 4, 4, requires_grad=True)
    penalty, norm = penalty_at(linear_critic(w), torch.randn(3, 1, 4, 4))
    penalty.backward()
    assert penalty.item() == pytest.approx(1, abs=1e-5)
    assert norm.item() == pytest.approx(0, abs=1e-5)
    assert w.grad.isfinite().all()


def test_penalty_sends_no_gradient_to_the_pictures():
    real, fake = (torch.randn(3, 1, 4, 4, requires_grad=True) for _ in range(2))
    w = torch.randn(1, 4, 4, requires_grad=True)
    wgan_gp.gradient_penalty(lambda x: (x * w).square().flatten(1).sum(1), real, fake)[0].backward()
    assert real.grad is None and fake.grad is None
    assert w.grad.abs().min() > 0


def interpolates(real, fake):
    """x_hat, as D is given it."""
    seen = []

    def D(x):
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    wgan_gp.gradient_penalty(D, real, fake)
    return seen[0]


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 8, 8), (3, 5, 5)])
def test_interpolates_lie_on_the_segments_one_ratio_a_picture(shape):
    real, fake = torch.randn(2, 9, *shape)
    x_hat = interpolates(real, fake)
    assert x_hat.shape == real.shape
    ratio = ((x_hat - fake) / (real - fake)).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=0, atol=1e-9)
    assert 0 <= ratio.min() and ratio.max() <= 1
    assert ratio[:, 0].sort().values.diff().min() > 1e-6


def test_interpolation_ratio_is_uniform():
    eps = interpolates(torch.ones(20_000, 1, 1, 1), torch.zeros(20_000, 1, 1, 1)).flatten()
    ideal = (torch.arange(20_000) + 0.5) / 20_000
    assert (eps.sort().values - ideal).abs().max() < 2 / 20_000**0.5  # Kolmogorov-Smirnov: p < 1e-3


@pytest.mark.parametrize("term", ["real", "fake", "penalty"])
def test_each_term_of_the_critic_loss_moves_the_gradient(term):
    """Raising one term's weight by .1 adds .1 of that term's own gradient."""
    D = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    real, fake, x_hat = torch.randn(3, 5, 1, 4, 4)
    weights = list(D.parameters())[:-1]  # the last bias: cancels between real and fake, absent from the penalty

    def gradient(real_weight=1.0, fake_weight=1.0, penalty_weight=10.0):
        loss = wgan_gp.discriminator_loss(real_weight * D(real), fake_weight * D(fake))
        loss = loss + penalty_weight * penalty_at(D, x_hat)[0]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    alone = {"real": -D(real).sum() / 5, "fake": D(fake).sum() / 5, "penalty": plain_penalty(D, x_hat)}[term]
    alone = torch.cat([g.flatten() for g in torch.autograd.grad(alone, weights)])
    raised = gradient(**{f"{term}_weight": 10.1 if term == "penalty" else 1.1})
    assert alone.norm() > 1e-2
    torch.testing.assert_close(raised - gradient(), 0.1 * alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("flags, k", [("--paper", 8), ("", 2), ("--arch mlp --penalty-share .3", 3)])
def test_training_is_the_game_as_written(monkeypatch, flags, k):
    """The gradients that each optimizer is given are those of eq. (3), whose penalty is of the first k pictures."""
    small = "--image-size 16 --ngf 4 --ndf 4 --latent-dim 5 --batch-size 8 --gp-weight 7 --device cpu"
    seen = run(monkeypatch, wgan_gp, f"{small} --d-steps 2 --g-steps 2 {flags}".split(), iterations=2)
    pictures = {tuple(p.flatten().tolist()) for p in seen.x.double() / 127.5 - 1}
    order, since, ratios = [], [], []
    last = {"G": None, "D": None}
    for event in seen.events:
        if event.kind == "forward":
            since.append(event)
            continue
        order.append(event.net)
        G, D = event.copies
        (g_call,), d_calls = ([e for e in since if e.net == name] for name in "GD")
        fake = G(g_call.inputs[0])
        if event.net == "D":
            both, x_hat = (e.inputs[0] for e in d_calls)
            real, made = both.chunk(2)
            assert not g_call.graph and len(real) == 8 and len(x_hat) == k
            assert {tuple(p.flatten().tolist()) for p in real} <= pictures
            torch.testing.assert_close(made, fake.detach(), rtol=0, atol=1e-12)
            ratio = ((x_hat - made[:k]) / (real - made)[:k]).flatten(1)
            torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=0, atol=1e-9)
            ratios += ratio[:, 0].tolist()
            score_real, score_fake = D(real), D(made)
            penalty = plain_penalty(D, x_hat)
            loss = score_fake.sum() / 8 - score_real.sum() / 8 + 7 * penalty
            slopes = torch.autograd.grad(D(x := x_hat.requires_grad_()).sum(), x)[0].flatten(1).norm(dim=1)
            row = {"d_loss": loss, "penalty": 7 * penalty, "grad_norm": slopes.mean()}
            row["w_dist"] = score_real.mean() - score_fake.mean()
            row["d_acc"] = (score_real[:, None] > score_fake).double().mean()
            net, other = D, "G"
        else:
            assert g_call.graph and [len(e.inputs[0]) for e in d_calls] == [8]
            loss = row["g_loss"] = -D(fake).sum() / 8
            net, other = G, "D"
        wanted = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(event.grads[event.net], list(wanted), rtol=1e-4, atol=1e-8)  # the root's guard shows
        for now, then in zip(event.grads[other], last[other] or [None] * 99):
            assert now is None or torch.equal(now, then)  # nothing of this loss is left in the other network
        for now, then in zip(event.after[other], event.before[other]):
            assert torch.equal(now, then)
        last[event.net], since = event.grads[event.net], []
        if order[-4:] == ["D", "D", "G", "G"]:
            assert seen.logged[len(order) // 4 - 1] == pytest.approx({name: v.item() for name, v in row.items()}, 1e-6)
    assert order == ["D", "D", "G", "G"] * 2
    assert 0 <= min(ratios) < max(ratios) <= 1 and len(set(ratios)) == 4 * k
    zs = [tuple(z.tolist()) for e in forwards(seen, "G") for z in e.inputs[0]]
    assert len(zs) == len(set(zs)) == 8 * 8  # a fresh z for each
    assert len(steps(seen, "G")) == 4


@pytest.mark.parametrize("argv", [["--image-size", "28"], ["--image-size", "32"], ["--arch", "mlp"]])
def test_critic_looks_at_one_picture_at_a_time(argv):
    args = wgan_gp.parse_args([*argv, "--ndf", "4"])
    D = wgan_gp.Discriminator(args, 1)
    for p in D.parameters():
        p.data.mul_(5)  # away from the start, where everything is nearly linear

    def score_and_slope(x):
        x = x.requires_grad_()
        score = D(x)
        return score.detach(), torch.autograd.grad(score.sum(), x)[0]

    x = torch.randn(4, 1, args.image_size, args.image_size)
    y = x.clone()
    y[2] = 3 * torch.randn_like(y[2])
    (score_x, slope_x), (score_y, slope_y) = score_and_slope(x), score_and_slope(y)
    others = [0, 1, 3]
    torch.testing.assert_close(score_x[others], score_y[others], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(slope_x[others], slope_y[others], rtol=1e-10, atol=1e-14)
    assert score_x[2] != score_y[2] and not torch.equal(slope_x[2], slope_y[2])


# averaged weights, accuracy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_averaged_weights(decay):
    G = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = wgan_gp.averaged(G)
    assert not ema.training and not any(e.requires_grad for e in ema.parameters())
    assert set(ema.state_dict()) == {*G.state_dict(), "updates"}
    wanted = [p.detach().clone() for p in ema.parameters()]
    for t in range(1, 15):  # at decay .5 the warm-up ends at t = 8
        for p in G.parameters():
            p.data.normal_()
        G(torch.randn(6, 3))
        before = copy.deepcopy(G.state_dict())
        wgan_gp.update_ema(ema, G, decay)
        d = min(decay, (1 + t) / (10 + t))
        wanted = [d * w + (1 - d) * p.detach() for w, p in zip(wanted, G.parameters())]
        assert ema.updates == t
        for e, w in zip(ema.parameters(), wanted):
            torch.testing.assert_close(e.detach(), w, rtol=0, atol=1e-12)
        for name, b in G.named_buffers():
            assert torch.equal(ema.get_buffer(name), b) and ema.get_buffer(name).data_ptr() != b.data_ptr()
        assert all(torch.equal(v, before[name]) for name, v in G.state_dict().items())
    assert all(e.grad is None for e in ema.parameters())


@pytest.mark.parametrize(
    "real, fake, wanted",
    [
        ([3.0, 1.0], [2.0, 1.0, 0.0], 4.5 / 6),  # all pairs, unequal sizes, a tie is half a win
        ([2.0, 1.0], [0.0, 1.5], 3 / 4),
        ([1.0, 1.0], [1.0], 1 / 2),
        ([-1.0], [-2.0, -3.0], 1),
        ([0.0], [1.0], 0),
    ],
)
def test_pair_accuracy(real, fake, wanted):
    real = torch.tensor(real, requires_grad=True)
    accuracy = wgan_gp.pair_accuracy(real, torch.tensor(fake))
    assert accuracy.item() == pytest.approx(wanted, abs=1e-7)
    assert not accuracy.requires_grad
    is_real = [1] * len(real) + [0] * len(fake)
    assert accuracy.item() == pytest.approx(roc_auc_score(is_real, [*real.tolist(), *fake]), abs=1e-7)


# batches --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch):
    """(seed) -> Batches of ten of 103 images, each of one shade, which is its label."""
    x = torch.arange(103, dtype=torch.uint8)[:, None, None, None].expand(103, 1, 2, 2)
    monkeypatch.setattr(wgan_gp, "load_data", lambda *a: (x, torch.arange(103), []))

    def make(seed=3):
        return wgan_gp.Batches(wgan_gp.parse_args(["--batch-size", "10", "--seed", str(seed)]), "cpu")

    return make


def epoch(batch, i):
    """The labels of ten batches, one by one."""
    return [batch(10 * i + k, 1)[1][0].tolist() for k in range(10)]


def test_an_epoch_holds_no_picture_twice_and_drops_the_tail(batches):
    batch, seen = batches(), set()
    assert batch.per_epoch == 10
    for e in range(8):
        order = [label for labels in epoch(batch, e) for label in labels]
        assert len(order) == len(set(order)) == 100
        seen |= set(order)
    assert seen == set(range(103))  # the tail is another one each time


def test_pictures_keep_their_labels(batches):
    for i in (0, 3, 9, 14):  # 9: over the end of an epoch
        x, y = batches()(i, 2)
        assert x.shape == (2, 10, 1, 2, 2) and x.dtype == torch.uint8 and y.shape == (2, 10)
        assert torch.equal(x[:, :, 0, 1, 1].long(), y)


def test_order_is_a_function_of_seed_and_epoch_alone(batches):
    """Forwards and backwards, over the ends of epochs, one by one or several at a time."""
    batch = batches()
    orders = epoch(batch, 0) + epoch(batch, 1) + epoch(batch, 2)
    state = torch.get_rng_state()
    for i, n in ((0, 1), (7, 2), (10, 1), (25, 5), (3, 4), (29, 1), (8, 12)):
        for b in (batch, batches()):
            assert b(i, n)[1].tolist() == orders[i : i + n]
    assert torch.equal(torch.get_rng_state(), state)  # it takes nothing from the training's stream


def test_no_two_epochs_of_any_seeds_agree(batches):
    made = [batches(seed) for seed in range(12)]
    firsts = [tuple(batch(10 * e, 1)[1][0].tolist()) for batch in made for e in range(12)]
    assert len(set(firsts)) == len(firsts) == 144


# noise, bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior, second, fourth", [("normal", 1, 3), ("uniform", 1 / 3, 1 / 5)])
def test_noise(prior, second, fourth):
    args = wgan_gp.parse_args(["--prior", prior, "--latent-dim", "50"])
    z = metrics.sample_z(args, 4000, "cpu", metrics.seeded(1, 2))
    assert z.shape == (4000, 50)
    assert abs(z.mean(0)).max() < 5 * (second / 4000) ** 0.5
    assert z.square().mean().item() == pytest.approx(second, rel=0.02)
    assert z.pow(4).mean().item() == pytest.approx(fourth, rel=0.04)
    assert (z[1:] * z[:-1]).mean().item() == pytest.approx(0, abs=0.02)
    assert prior == "normal" or (-1 <= z.min() < -0.999 and 0.999 < z.max() <= 1)


def test_noise_from_a_generator_is_repeatable():
    args = wgan_gp.parse_args(["--latent-dim", "5"])
    state = torch.get_rng_state()
    keys = ((4, 1), (4, 1), (1, 4), (4, 2), (5, 0))
    draws = [metrics.sample_z(args, 3, "cpu", metrics.seeded(*key)) for key in keys]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0], draws[1])
    assert all(not torch.equal(draws[0], d) for d in draws[2:])


def test_bytes_round_trip():
    x = torch.arange(256, dtype=torch.uint8)
    torch.set_default_dtype(torch.float32)
    y = wgan_gp.from_uint8(x)
    assert y.dtype == torch.float32 and y[0] == -1 and y[255] == 1
    torch.testing.assert_close(y.double(), x.double() * 2 / 255 - 1, rtol=0, atol=1e-6)
    assert wgan_gp.to_uint8(y).dtype == torch.uint8 and torch.equal(wgan_gp.to_uint8(y), x)
    assert wgan_gp.to_uint8(torch.tensor([-9.0, -1, 0.003, 1, 1.5])).tolist() == [0, 0, 128, 255, 255]
    assert torch.equal(wgan_gp.to_uint8(y + 0.9 / 255), x)  # rounds to the nearest, does not cut off
