"""wgan_gp.py's mathematics, against closed forms, finite differences and arithmetic done by hand."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

import wgan_gp

F64 = torch.float64
NETS = [("dcgan", 28), ("dcgan", 32), ("dcgan", 64), ("mlp", 28)]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def flags(*argv):
    return wgan_gp.parse_args([str(a) for a in argv])


def randn(*shape):
    return torch.randn(shape, dtype=F64)


def linear_critic(w):
    return lambda x: (x * w).flatten(1).sum(1) + 3


def plain_penalty(D, x):
    """The formula once more, straight from the paper: one picture at a time, no guard."""
    x = x.detach().requires_grad_()
    slopes = [torch.autograd.grad(D(x[i:i + 1]).sum(), x, create_graph=True)[0][i] for i in range(len(x))]
    return sum((s.square().sum().sqrt() - 1) ** 2 for s in slopes) / len(x)


# the penalty


@pytest.mark.parametrize("shape", [(7,), (1, 4, 4), (2, 4, 4)])
def test_penalty_of_a_linear_critic(shape):
    w = randn(*shape).requires_grad_()
    penalty, norm = wgan_gp.gradient_penalty(linear_critic(w), randn(5, *shape))
    length = w.detach().square().sum().sqrt()
    torch.testing.assert_close(penalty, (length - 1) ** 2, rtol=0, atol=1e-10)
    torch.testing.assert_close(norm, length, rtol=0, atol=1e-10)
    (slope,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(slope, 2 * (length - 1) * w.detach() / length, rtol=0, atol=1e-10)


def test_norm_runs_over_all_of_a_picture():
    w = torch.full((1, 4, 4), 0.25, dtype=F64)  # length 1 over the picture, 1/4 over the channel axis
    penalty, norm = wgan_gp.gradient_penalty(linear_critic(w), randn(3, 1, 4, 4))
    assert penalty.item() == pytest.approx(0, abs=1e-20)
    assert norm.item() == pytest.approx(1, abs=1e-11)
    assert (w.norm(dim=0) - 1).square().mean().item() == 0.5625  # what the norm over that axis would give


@pytest.mark.parametrize("a", [0.15, 0.7, -2.0])
def test_penalty_of_a_quadratic_critic(a):
    x, a = randn(6, 2, 3, 3), torch.tensor(a, dtype=F64, requires_grad=True)
    penalty, norm = wgan_gp.gradient_penalty(lambda x: a / 2 * x.square().flatten(1).sum(1), x)
    r = x.flatten(1).norm(dim=1)  # the slope at x is a x
    torch.testing.assert_close(penalty, (a.abs() * r - 1).square().mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(norm, a.abs().detach() * r.mean(), rtol=0, atol=1e-10)
    (slope,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(slope, (2 * (a.abs() * r - 1) * r * a.sign()).mean().detach(), rtol=0, atol=1e-10)


def test_penalty_differentiates_to_every_weight():
    D = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Softplus(), nn.Linear(4, 1),
                      nn.Flatten(0)).to(F64)
    x, h = randn(4, 2, 4, 4), 1e-5
    penalty, _ = wgan_gp.gradient_penalty(D, x)
    torch.testing.assert_close(penalty, plain_penalty(D, x), rtol=0, atol=1e-10)
    *grads, last_bias = torch.autograd.grad(penalty, list(D.parameters()), allow_unused=True, materialize_grads=True)
    assert last_bias.abs().max() == 0  # a constant added to the score has no slope
    for p, grad in zip(D.parameters(), grads):
        numeric = torch.empty_like(p)
        for i in range(p.numel()):
            ends = []
            for step in (h, -2 * h):
                p.data.view(-1)[i] += step
                ends.append(plain_penalty(D, x).item())
            p.data.view(-1)[i] += h
            numeric.view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(grad, numeric, rtol=0, atol=1e-8)


def test_penalty_where_the_slope_is_zero():
    w = torch.zeros(1, 4, 4, dtype=F64, requires_grad=True)
    penalty, norm = wgan_gp.gradient_penalty(linear_critic(w), randn(3, 1, 4, 4))
    penalty.backward()
    assert penalty.item() == pytest.approx(1, abs=1e-5)
    assert norm.item() == pytest.approx(0, abs=1e-5)
    assert w.grad.isfinite().all()


def test_penalty_sends_no_gradient_to_the_pictures():
    x = randn(3, 1, 4, 4).requires_grad_()
    w = randn(1, 4, 4).requires_grad_()
    wgan_gp.gradient_penalty(lambda x: (x * w).square().flatten(1).sum(1), x * 2)[0].backward()
    assert x.grad is None
    assert w.grad.abs().min() > 0


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 8, 8), (3, 5, 5)])
def test_interpolates_lie_on_the_segments_one_ratio_a_picture(shape):
    real, fake = randn(9, *shape), randn(9, *shape)
    x_hat = wgan_gp.interpolate(real, fake)
    assert x_hat.shape == real.shape
    ratio = ((x_hat - fake) / (real - fake)).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=0, atol=1e-9)
    assert 0 <= ratio.min() and ratio.max() <= 1
    assert ratio[:, 0].sort().values.diff().min() > 1e-6


def test_interpolation_ratio_is_uniform():
    eps = wgan_gp.interpolate(torch.ones(20_000, 1, 1, 1, dtype=F64), torch.zeros(20_000, 1, 1, 1, dtype=F64)).flatten()
    ideal = (torch.arange(20_000) + 0.5) / 20_000
    assert (eps.sort().values - ideal).abs().max() < 2 / 20_000 ** 0.5  # Kolmogorov-Smirnov: p < 1e-3


# the losses


def test_discriminator_loss():
    real, fake = torch.tensor([1.0, 2, 6], dtype=F64), torch.tensor([0.5, -1, 2], dtype=F64)
    real.requires_grad_(), fake.requires_grad_()
    loss = wgan_gp.discriminator_loss(real, fake)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 - 3, abs=1e-15)
    torch.testing.assert_close(real.grad, torch.full((3,), -1 / 3, dtype=F64))
    torch.testing.assert_close(fake.grad, torch.full((3,), 1 / 3, dtype=F64))


def test_generator_loss():
    fake = torch.tensor([0.5, -1, 2, 4], dtype=F64, requires_grad=True)
    loss = wgan_gp.generator_loss(fake)
    loss.backward()
    assert loss.item() == -1.375
    torch.testing.assert_close(fake.grad, torch.full((4,), -0.25, dtype=F64))


@pytest.mark.parametrize("term", ["real", "fake", "penalty"])
def test_each_term_of_the_critic_loss_moves_the_gradient(term):
    """Raising one term's weight by .1 adds .1 of that term's own gradient."""
    D = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)).to(F64)
    real, fake, x_hat = randn(5, 1, 4, 4) + 1, randn(5, 1, 4, 4), randn(5, 1, 4, 4)
    weights = list(D.parameters())[:-1]  # the last bias: cancels between real and fake, absent from the penalty

    def gradient(real_weight=1, fake_weight=1, penalty_weight=10):
        loss = wgan_gp.discriminator_loss(real_weight * D(real), fake_weight * D(fake))
        loss = loss + penalty_weight * wgan_gp.gradient_penalty(D, x_hat)[0]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    alone = {"real": lambda: -D(real).sum() / 5, "fake": lambda: D(fake).sum() / 5,
             "penalty": lambda: plain_penalty(D, x_hat)}[term]()
    alone = torch.cat([g.flatten() for g in torch.autograd.grad(alone, weights)])
    raised = gradient(**{f"{term}_weight": 10.1 if term == "penalty" else 1.1})
    assert alone.norm() > 1e-2
    torch.testing.assert_close(raised - gradient(), 0.1 * alone, rtol=0, atol=1e-10)


def test_one_iteration_of_training(monkeypatch):
    """The loop itself, caught just before each optimiser steps: the gradients are those of eq. (3) written out."""
    x = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8)
    seen, interpolate, adam = {}, wgan_gp.interpolate, wgan_gp.adam

    def spy_interpolate(real, fake):
        seen.update(real=real, fake=fake, x_hat=interpolate(real, fake))
        return seen["x_hat"]

    def spy_adam(net, lr, args):
        opt, name = adam(net, lr, args), ("D" if "G" in seen else "G")
        seen[name] = net
        opt.register_step_pre_hook(lambda *_: checks[name]())
        return opt

    def check_critic():
        D = copy.deepcopy(seen["D"])
        loss = D(seen["fake"]).sum() / 8 - D(seen["real"]).sum() / 8 + 7 * plain_penalty(D, seen["x_hat"])
        for p, grad in zip(seen["D"].parameters(), torch.autograd.grad(loss, list(D.parameters()), allow_unused=True)):
            torch.testing.assert_close(p.grad, torch.zeros_like(p) if grad is None else grad, rtol=1e-4, atol=1e-5)
        assert all(p.grad is None for p in seen["G"].parameters())  # the fakes carry no graph
        assert {tuple(p.flatten().tolist()) for p in seen["real"]} <= pictures
        assert seen["fake"].shape == seen["real"].shape and 0.1 < seen["fake"].std() and seen["fake"].abs().max() < 1
        seen["critic"] = [p.grad.clone() for p in seen["D"].parameters()]
        seen["input"] = None

    def check_generator():
        D, G = copy.deepcopy(seen["D"]).requires_grad_(False), copy.deepcopy(seen["G"]).requires_grad_()
        grads = torch.autograd.grad(-D(nn.Sequential.forward(G, seen["input"])).sum() / 8, list(G.parameters()))
        for p, grad in zip(seen["G"].parameters(), grads):
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)
        for p, before in zip(seen["D"].parameters(), seen["critic"]):
            assert p.grad is None or torch.equal(p.grad, before)  # nothing of G's loss is left in the critic
        seen["done"] = True

    checks = {"D": check_critic, "G": check_generator}
    pictures = {tuple(p.flatten().tolist()) for p in x.float() / 127.5 - 1}
    make = wgan_gp.make_generator

    def make_generator(*args):
        net = make(*args)
        net.register_forward_pre_hook(lambda net, z: seen.update(input=z[0].detach()) if net is seen.get("G") else None)
        return net

    run = mock.MagicMock()
    run.training.side_effect = [True, False]
    for name, fake in (("interpolate", spy_interpolate), ("adam", spy_adam), ("make_generator", make_generator),
                       ("Run", lambda *a, **k: run), ("load_data", lambda *a, **k: (x, torch.zeros(40).long()))):
        monkeypatch.setattr(wgan_gp, name, fake)
    wgan_gp.train(flags("--arch", "mlp", "--d-steps", 1, "--batch-size", 8, "--gp-weight", 7, "--device", "cpu",
                        "--lr-decay", "linear"))
    assert seen["done"]


@pytest.mark.parametrize("arch, size", NETS)
def test_generator_loss_reaches_every_weight_of_g(arch, size):
    args = flags("--arch", arch, "--image-size", size, "--latent-dim", 10, "--ngf", 4, "--ndf", 4)
    G, D = wgan_gp.make_generator(args, 1), wgan_gp.make_discriminator(args, 1).requires_grad_(False)
    wgan_gp.generator_loss(D(G(wgan_gp.sample_z(args, 8, "cpu")))).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in G.parameters())


# the networks


@pytest.mark.parametrize("arch, size", NETS)
def test_critic_looks_at_one_picture_at_a_time(arch, size):
    D = wgan_gp.make_discriminator(flags("--arch", arch, "--image-size", size, "--ndf", 4), 1).to(F64)
    for p in D.parameters():
        p.data.mul_(5)  # away from the start, where everything is nearly linear

    def score_and_slope(x):
        x = x.requires_grad_()
        score = D(x)
        return score.detach(), torch.autograd.grad(score.sum(), x)[0]

    x = randn(4, 1, size, size)
    y = x.clone()
    y[2] = 3 * randn(1, size, size)
    (score_x, slope_x), (score_y, slope_y) = score_and_slope(x), score_and_slope(y)
    others = [0, 1, 3]
    torch.testing.assert_close(score_x[others], score_y[others], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(slope_x[others], slope_y[others], rtol=1e-10, atol=1e-14)
    assert score_x[2] != score_y[2] and not torch.equal(slope_x[2], slope_y[2])


@pytest.mark.parametrize("arch, size", NETS)
def test_critic_has_no_norm_and_biases_throughout(arch, size):
    D = wgan_gp.make_discriminator(flags("--arch", arch, "--image-size", size), 1)
    assert not [m for m in D.modules() if "Norm" in type(m).__name__]
    assert not list(D.buffers())
    assert all(m.bias is not None for m in D.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


@pytest.mark.parametrize("arch, size", NETS)
def test_slopes_and_epsilons(arch, size):
    args = flags("--arch", arch, "--image-size", size)
    G, D = wgan_gp.make_generator(args, 1), wgan_gp.make_discriminator(args, 1)
    norms = [m for m in G.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    leaky = [m for net in (G, D) for m in net.modules() if isinstance(m, nn.LeakyReLU)]
    assert norms and all(m.eps == 1e-5 and m.affine and m.track_running_stats for m in norms)
    assert leaky and all(m.negative_slope == 0.2 for m in leaky)


@pytest.mark.parametrize("arch, size", NETS)
def test_critic_and_its_penalty_are_those_of_plain_leaky_relu(arch, size):
    D = wgan_gp.make_discriminator(flags("--arch", arch, "--image-size", size, "--ndf", 4), 1).to(F64)
    for p in D.parameters():
        p.data.mul_(5)  # at the start the slope is 1e-4, and the guard of 1e-12 under the root shows
    plain = nn.Sequential(*(nn.LeakyReLU(0.2) if isinstance(m, nn.LeakyReLU) else m for m in D))
    for m in D:
        if isinstance(m, nn.LeakyReLU):
            x = torch.tensor([-3.0, -1e-3, 0, 1e-3, 3, torch.inf, -torch.inf], dtype=F64, requires_grad=True)
            y, (slope,) = m(x), torch.autograd.grad(m(x).sum(), x)
            assert torch.equal(y, torch.nn.functional.leaky_relu(x, 0.2))
            assert slope.tolist() == [0.2, 0.2, 0.2, 1, 1, 1, 0.2]
    x = randn(3, 1, size, size)
    torch.testing.assert_close(D(x), plain(x), rtol=1e-12, atol=0)
    penalty, wanted = wgan_gp.gradient_penalty(D, x)[0], plain_penalty(plain, x)
    torch.testing.assert_close(penalty, wanted, rtol=0, atol=1e-8)
    weights = [p for p in D.parameters() if p.dim() > 1]
    grads, wanted = torch.autograd.grad(penalty, weights), torch.autograd.grad(wanted, weights)
    assert all(g.abs().max() > 1e-6 for g in grads)
    torch.testing.assert_close(grads, wanted, rtol=1e-6, atol=1e-9)


def layers(net):
    """Kind, in, out, bias or not; between these, of convolutions, kernel, stride and padding."""
    out = []
    for m in net[:]:
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            out.append((type(m).__name__, m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding,
                        m.bias is not None))
        elif isinstance(m, nn.Linear):
            out.append(("Linear", m.in_features, m.out_features, m.bias is not None))
        elif not isinstance(m, (nn.Flatten, nn.Unflatten)):
            out.append(next(c.__name__ for c in type(m).__mro__ if c.__module__.startswith("torch.")))
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_dcgan_32_is_report_c(channels):
    def up(a, b, stride, pad):
        return "ConvTranspose2d", a, b, (4, 4), (stride, stride), (pad, pad), False

    def down(a, b, stride, pad):
        return "Conv2d", a, b, (4, 4), (stride, stride), (pad, pad), True

    args = flags("--arch", "dcgan", "--image-size", 32)
    assert layers(wgan_gp.make_generator(args, channels)) == [
        up(100, 128, 1, 0), "BatchNorm2d", "ReLU", up(128, 64, 2, 1), "BatchNorm2d", "ReLU",
        up(64, 32, 2, 1), "BatchNorm2d", "ReLU", up(32, channels, 2, 1), "Tanh"]
    assert layers(wgan_gp.make_discriminator(args, channels)) == [
        down(channels, 32, 2, 1), "LeakyReLU", down(32, 64, 2, 1), "LeakyReLU", down(64, 128, 2, 1), "LeakyReLU",
        down(128, 1, 1, 0)]


def test_mlp_is_report_e():
    args = flags("--arch", "mlp")
    assert layers(wgan_gp.make_generator(args, 1)) == [
        ("Linear", 100, 256, False), "BatchNorm1d", "LeakyReLU", ("Linear", 256, 512, False), "BatchNorm1d",
        "LeakyReLU", ("Linear", 512, 1024, False), "BatchNorm1d", "LeakyReLU", ("Linear", 1024, 784, True), "Tanh"]
    assert layers(wgan_gp.make_discriminator(args, 1)) == [
        ("Linear", 784, 1024, True), "LeakyReLU", ("Linear", 1024, 512, True), "LeakyReLU",
        ("Linear", 512, 256, True), "LeakyReLU", ("Linear", 256, 1, True)]


@pytest.mark.parametrize("arch, size, g_weights, c_weights", [
    ("dcgan", 32,  # 16 numbers a 4x4 kernel; batch norm holds 2 numbers a channel
     16 * (100 * 128 + 128 * 64 + 64 * 32 + 32 * 1) + 2 * (128 + 64 + 32),  # 369,600
     16 * (1 * 32 + 32 * 64 + 64 * 128 + 128 * 1) + (32 + 64 + 128 + 1)),  # 166,625
    ("mlp", 28,
     100 * 256 + 256 * 512 + 512 * 1024 + 1024 * 784 + 784 + 2 * (256 + 512 + 1024),  # 1,489,168
     785 * 1024 + 1025 * 512 + 513 * 256 + 257 * 1)])  # 1,461,249
def test_number_of_weights(arch, size, g_weights, c_weights):
    args = flags("--arch", arch, "--image-size", size)
    assert sum(p.numel() for p in wgan_gp.make_generator(args, 1).parameters()) == g_weights
    assert sum(p.numel() for p in wgan_gp.make_discriminator(args, 1).parameters()) == c_weights


@pytest.mark.parametrize("arch, size", [*NETS, ("mlp", 13), ("mlp", 32)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [1, 4])
def test_shapes_and_ranges(arch, size, channels, n):
    args = flags("--arch", arch, "--image-size", size, "--latent-dim", 7, "--ngf", 3, "--ndf", 5)
    G, D = wgan_gp.make_generator(args, channels).eval(), wgan_gp.make_discriminator(args, channels)
    z = 1e9 * wgan_gp.sample_z(args, n, "cpu")  # large: tanh must bound it
    x = G(z)
    assert z.shape == (n, 7) and x.shape == (n, channels, size, size) and D(x).shape == (n,)
    assert 0.5 < x.abs().max() <= 1


def test_dcgan_weights_are_drawn_as_in_the_paper():
    args = flags("--arch", "dcgan", "--image-size", 64)
    G, D = wgan_gp.make_generator(args, 1), wgan_gp.make_discriminator(args, 1)
    convs = [m.weight for net in (G, D) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    scales = torch.cat([m.weight for m in G.modules() if isinstance(m, nn.BatchNorm2d)])
    assert len(convs) == 10
    for w, mean in [*((w, 0) for w in convs), (scales, 1)]:
        w, n = (w.detach().to(F64).flatten() - mean) / 0.02, w.numel()
        assert abs(w.mean()) < 4 / n ** 0.5
        assert abs(w.square().mean() - 1) < 4 * (2 / n) ** 0.5
        assert abs(w.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5  # normal: the fourth moment is 3
    assert all((m.bias == 0).all() for m in G.modules() if isinstance(m, nn.BatchNorm2d))


# averaged weights, accuracy, batches, noise


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_averaged_weights(decay):
    G = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(F64)
    ema = wgan_gp.averaged(G).to(F64)
    assert not ema.training and not any(e.requires_grad for e in ema.parameters())
    assert list(ema.state_dict()) == list(G.state_dict())  # the count of updates is none of the average's own numbers
    wanted = [p.detach().clone() for p in ema.parameters()]
    for t in range(1, 15):  # at decay .5 the warm-up ends at t = 8
        for p in G.parameters():
            p.data.normal_()
        G(randn(6, 3))
        wgan_gp.update_ema(ema, G, decay)
        d = min(decay, (1 + t) / (10 + t))
        wanted = [d * w + (1 - d) * p.detach() for w, p in zip(wanted, G.parameters())]
        assert ema.updates == t
        for e, w in zip(ema.parameters(), wanted):
            torch.testing.assert_close(e.detach(), w, rtol=0, atol=1e-12)
        for name, b in G.named_buffers():
            assert torch.equal(ema.get_buffer(name), b) and ema.get_buffer(name).data_ptr() != b.data_ptr()
    assert all(e.grad is None for e in ema.parameters())


@pytest.mark.parametrize("real, fake, wanted", [
    ([3.0, 1.0], [2.0, 1.0, 0.0], 4 / 6),  # all pairs, unequal sizes, a tie is not a win
    ([2.0, 1.0], [0.0, 1.5], 3 / 4), ([1.0, 1.0], [1.0], 0), ([-1.0], [-2.0, -3.0], 1), ([0.0], [1.0], 0)])
def test_pair_accuracy(real, fake, wanted):
    real = torch.tensor(real, requires_grad=True)
    accuracy = wgan_gp.pair_accuracy(real, torch.tensor(fake))
    assert accuracy.item() == pytest.approx(wanted, abs=1e-7)
    assert not accuracy.requires_grad


def batches(seed=3, n=103):
    x = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 2, 2)
    with mock.patch.object(wgan_gp, "load_data", lambda *a, **k: (x, torch.arange(n))):
        return wgan_gp.Batches(flags("--batch-size", 10, "--seed", seed), "cpu")


def epoch(batch):
    return [batch()[1].tolist() for _ in range(10)]


def test_an_epoch_holds_no_picture_twice_and_drops_the_tail():
    batch, seen = batches(), set()
    for _ in range(8):
        order = [i for b in epoch(batch) for i in b]
        assert len(order) == len(set(order)) == 100
        seen |= set(order)
    assert seen == set(range(103))  # the tail is another one each time


def test_pictures_keep_their_labels():
    batch = batches()
    for _ in range(15):
        x, y = batch()
        assert x.shape == (10, 1, 2, 2) and x.dtype == torch.uint8 and torch.equal(x[:, 0, 1, 1].long(), y)


def test_order_is_a_function_of_seed_and_epoch_alone():
    one, two = batches(), batches()
    first = [epoch(one) for _ in range(3)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert [epoch(two) for _ in range(3)] == first
    assert torch.equal(torch.get_rng_state(), state)  # and takes nothing from the training's stream


def test_no_two_epochs_of_any_seeds_agree():
    orders = [tuple(b) for seed in range(12) for b in epoch_starts(seed)]
    assert len(orders) == 144 and len(set(orders)) == 144


def epoch_starts(seed):
    batch = batches(seed)
    for e in range(12):
        batch.step = 10 * e
        yield batch()[1].tolist()


def test_jumping_to_a_step():
    batch = batches()
    orders = epoch(batch) + epoch(batch) + epoch(batch)
    for step in (0, 7, 10, 25, 3, 29, 9):  # forwards and backwards, over the ends of epochs
        for b in (batch, batches()):
            b.step = step
            assert b()[1].tolist() == orders[step] and b.step == step + 1


@pytest.mark.parametrize("prior, second, fourth", [("normal", 1, 3), ("uniform", 1 / 3, 1 / 5)])
def test_noise(prior, second, fourth):
    args = flags("--prior", prior, "--latent-dim", 50)
    z = wgan_gp.sample_z(args, 4000, "cpu", wgan_gp.seeded(1, 2)).to(F64)
    assert z.shape == (4000, 50)
    assert abs(z.mean(0)).max() < 5 * (second / 4000) ** 0.5
    assert z.square().mean().item() == pytest.approx(second, rel=0.02)
    assert z.pow(4).mean().item() == pytest.approx(fourth, rel=0.04)
    assert (z[1:] * z[:-1]).mean().item() == pytest.approx(0, abs=0.02)
    assert prior == "normal" or (-1 <= z.min() < -0.999 and 0.999 < z.max() <= 1)


def test_noise_from_a_generator_is_repeatable():
    args = flags("--latent-dim", 5)
    state = torch.get_rng_state()
    draws = [wgan_gp.sample_z(args, 3, "cpu", wgan_gp.seeded(*k)) for k in ((4, 1), (4, 1), (1, 4), (4, 2), (5, 0))]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0], draws[1])
    assert all(not torch.equal(draws[0], d) for d in draws[2:])


def test_bytes_round_trip():
    x = torch.arange(256, dtype=torch.uint8)
    y = wgan_gp.from_uint8(x)
    assert y.dtype == torch.float32 and y[0] == -1 and y[255] == 1
    torch.testing.assert_close(y.to(F64), x.to(F64) * 2 / 255 - 1, rtol=0, atol=1e-6)
    assert wgan_gp.to_uint8(y).dtype == torch.uint8 and torch.equal(wgan_gp.to_uint8(y), x)
    assert wgan_gp.to_uint8(torch.tensor([-9.0, -1, 0.003, 1, 1.5])).tolist() == [0, 0, 128, 255, 255]
    assert torch.equal(wgan_gp.to_uint8(y + 0.9 / 255), x)  # rounds to the nearest, does not cut off
