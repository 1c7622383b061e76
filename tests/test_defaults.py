"""What a script does where no flag says otherwise, --paper, and what came with the new defaults: three levels at 28
pixels, penalties on a share of the batch, R1 where the paper has none, relativistic pairs."""
import argparse

import numpy as np
import pytest
import torch
from test_gan_losses import run
from torch import nn

import bigan
import cdcgan
import dcgan
import mdgan
import unrolled
import wgan_clip
import wgan_gp

ALL = [wgan_gp, dcgan, cdcgan, wgan_clip, bigan, unrolled, mdgan]
EACH = pytest.mark.parametrize("module", ALL, ids=lambda m: m.__name__)


def flags(module, *argv):
    return vars(module.parse_args([*argv]))


@EACH
def test_a_flag_given_beats_the_best_ones_and_the_papers(module):
    best, mlp, paper = flags(module), flags(module, "--arch", "mlp"), flags(module, "--paper")
    assert {k: best[k] for k in module.BEST} == module.BEST
    assert {k: mlp[k] for k in module.BEST | module.MLP} == module.BEST | module.MLP
    said = {k: v for k, v in module.PAPER.items() if v is not None}  # None: what follows from other flags
    assert {k: paper[k] for k in said} == said
    own = {k for k in module.BEST if k not in module.PAPER}  # what the paper leaves open is as without the best ones
    assert own == ({"image_size"} if module is cdcgan else set())
    assert (paper["ema"], paper["lr_decay"], paper.get("penalty_share", 1)) == (0.999, "none", 1)
    assert best["lr_decay"] == "linear" and best["paper"] is False and paper["paper"] is True
    for more in ([], ["--paper"], ["--arch", "mlp"]):
        given = flags(module, *more, "--lr-g", "3e-3", "--batch-size", "24", "--lr-decay", "none")
        assert (given["lr_g"], given["batch_size"], given["lr_decay"]) == (3e-3, 24, "none")


@EACH
def test_help_shows_what_a_run_would_take(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    shown = capsys.readouterr().out.split("options:")[1].split("\n  --")
    text = {part.split()[0]: " ".join(part.split()) for part in shown}
    assert stop.value.code == 0
    for flag, value in module.BEST.items():
        assert f"(default: {value})" in text[flag.replace("_", "-")], flag
    for flag, value in module.PAPER.items():
        assert value is None or f"(--paper: {value})" in text[flag.replace("_", "-")], flag
    assert all(line.count("(default: ") <= 1 and "default: None" not in line for line in text.values())


def test_a_flag_of_ones_own_needs_no_help(capsys):
    """As a copy of a script would add one."""
    p = argparse.ArgumentParser()
    p.add_argument("--mine", type=int, default=3)
    wgan_gp.add_run_flags(p)
    assert wgan_gp.resolve(p, [], wgan_gp.BEST, wgan_gp.MLP, wgan_gp.PAPER).mine == 3
    assert "(default: 3)" in p.format_help()


def test_the_papers_settings():
    """Gulrajani et al., algorithm 1, but for beta1, .5 in their MNIST code; Arjovsky et al., algorithm 1; Radford et
    al., section 4; Eghbal-zadeh et al.'s code has 1e-3 in 2-D."""
    a = flags(wgan_gp, "--paper")
    assert (a["gp_weight"], a["d_steps"], a["lr_g"], a["lr_d"], a["beta1"], a["beta2"]) == (10, 5, 1e-4, 1e-4, 0.5, 0.9)
    a = flags(wgan_clip, "--paper")
    assert (a["clip"], a["optimizer"], a["d_steps"], a["lr_d"], a["batch_size"]) == (0.01, "rmsprop", 5, 5e-5, 64)
    a = flags(dcgan, "--paper")
    assert (a["lr_g"], a["lr_d"], a["beta1"], a["batch_size"], a["d_norm"]) == (2e-4, 2e-4, 0.5, 128, "batch")
    assert flags(unrolled, "--paper")["k"] == 5


@EACH
def test_the_side_is_what_suits_the_data_set(module):
    if module is not cdcgan:
        sides = {n: flags(module, "--dataset", n)["image_size"] for n in module.DATASETS}
        assert sides == {"digits": 28, "mnist": 28, "fashion": 28, "stacked_mnist": 28, "cifar10": 32, "celeba": 64,
                         "folder": 64}
        assert flags(module, "--arch", "mlp", "--dataset", "folder")["image_size"] == 28
    assert flags(module, "--paper", "--dataset", "folder")["image_size"] == 32


@EACH
def test_the_size_of_z_is_what_suits_the_pictures(module):
    def size(*argv):
        return flags(module, *argv)["latent_dim"]
    assert size("--paper") == size("--paper", "--arch", "mlp") == size("--dataset", "folder") == 100
    assert size("--arch", "mlp", "--dataset", "mnist") == (50 if module is bigan else 100)
    assert size("--dataset", "mnist") == size() == 16 and size("--latent-dim", "7", "--paper") == 7


@pytest.mark.parametrize("module", [m for m in ALL if m is not cdcgan], ids=lambda m: m.__name__)
@pytest.mark.parametrize("argv, sides", [([], [4, 7, 14, 28]), (["--paper", "--image-size", "28"], [7, 14, 28]),
                                         (["--image-size", "32"], [4, 8, 16, 32]),
                                         (["--image-size", "64"], [4, 8, 16, 32, 64])])
def test_each_level_doubles_the_side(module, argv, sides):
    """Of G from z to the picture, and of D from the picture back."""
    args = module.parse_args([*argv, "--ngf", "2", "--ndf", "2"])
    args.classes = 10
    G, D = module.make_generator(args, 1), module.make_discriminator(args, 1)
    seen = {"G": [], "D": []}
    for name, net in (("G", G), ("D", D)):
        for m in net.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                m.register_forward_hook(lambda m, i, o, name=name: seen[name].append(o.shape[-1]))
    z = torch.randn(3, args.latent_dim)
    x = G.eval()(z)
    D.eval()(*(x, z) if module is bigan else (x,))
    assert x.shape == (3, 1, sides[-1], sides[-1]) and [s for s in seen["G"] if s > 1] == sides
    assert [s for s in seen["D"] if s > 1] == sides[-2::-1]


class Quadratic(nn.Module):
    """f(x) = a / 2 ||x||^2, whose gradient is a x."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x, *more):
        return self.a / 2 * x.flatten(1).square().sum(1)


@pytest.mark.parametrize("module", [dcgan, cdcgan, mdgan, unrolled], ids=lambda m: m.__name__)
def test_squared_gradient_of_a_quadratic(module):
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    D = Quadratic(torch.tensor(1.7, dtype=torch.float64).item()).double()
    value = module.squared_gradient(D, x)
    assert value.item() == pytest.approx(1.7**2 * x.square().sum().item() / 5, rel=1e-6)
    value.backward()  # d/da a^2 m = 2 a m
    assert D.a.grad.item() == pytest.approx(2 * 1.7 * x.square().sum().item() / 5, rel=1e-6)


def test_squared_gradient_of_a_pair_counts_both():
    """f(x, z) = <x, w> + 3 sum z: ||w||^2 + 9 times the numbers of z."""
    w = torch.randn(48, dtype=torch.float64)
    value = bigan.squared_gradient(lambda x, z: x.flatten(1) @ w + 3 * z.sum(1), torch.randn(4, 3, 4, 4).double(),
                                   torch.randn(4, 7).double())
    assert value.item() == pytest.approx(w.square().sum().item() + 9 * 7, rel=1e-12)


@pytest.fixture
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("gp, r1, r2, share, k", [(0, 2, 0, 1, 8), (0, 0, 2, 1, 8), (0, 1, 3, 0.25, 2),
                                                  (0.5, 0, 0, 0.3, 3), (0.25, 1, 1, 0.01, 1)])
def test_the_penalty_is_of_the_first_share_of_the_batch(monkeypatch, float64, gp, r1, r2, share, k):
    """(gp + r1 / 2) a^2 mean ||x||^2 + (gp + r2 / 2) a^2 mean ||G(z)||^2 over the first k = ceil(share 8) of each."""
    seen = run(monkeypatch, dcgan, ["--batch-size", "8", "--latent-dim", "5", "--ngf", "4", "--gp", str(gp), "--r1",
                                    str(r1), "--r2", str(r2), "--penalty-share", str(share), "--device", "cpu"],
               nets=(None, Quadratic(0.3)))
    both = next(e for e in seen.events if e.kind == "forward" and e.net == "D").inputs[0]
    real, fake = (t[:k].square().sum().item() / k for t in both.chunk(2))
    assert len(both) == 16 and (k == 8 or real != pytest.approx(both[:8].square().sum().item() / 8))
    wanted = 0.09 * ((gp + r1 / 2) * real + (gp + r2 / 2) * fake)
    assert seen.logged[0]["penalty"] == pytest.approx(wanted, rel=1e-9)


REAL, FAKE = np.array([0.3, -2, 7.5, 0, -9]), np.array([1.1, -0.4, 12, -13, 0])


def test_the_relativistic_loss_pairs_each_made_picture_with_a_real_one():
    """E[log(1 + exp(f(G(z)) - f(x)))] for D, the two exchanged for G (Huang et al. 2024, eq. 2); and its gradient."""
    real, fake = (torch.tensor(v, requires_grad=True) for v in (REAL, FAKE))
    loss = dcgan.discriminator_loss(real, fake, "relativistic")
    loss.backward()
    assert loss.item() == pytest.approx(np.logaddexp(0, FAKE - REAL).mean(), abs=1e-12)
    sigmoid = 1 / (1 + np.exp(REAL - FAKE))
    np.testing.assert_allclose(fake.grad, sigmoid / 5, atol=1e-12)
    np.testing.assert_allclose(real.grad, -sigmoid / 5, atol=1e-12)
    loss = dcgan.generator_loss(torch.tensor(FAKE), "relativistic", torch.tensor(REAL))
    assert loss.item() == pytest.approx(np.logaddexp(0, REAL - FAKE).mean(), abs=1e-12)
    shifted = dcgan.discriminator_loss(torch.tensor(REAL + 3), torch.tensor(FAKE + 3), "relativistic")
    assert shifted.item() == pytest.approx(np.logaddexp(0, FAKE - REAL).mean(), abs=1e-12)  # only differences count


def test_relativistic_training_gives_both_losses_the_pairs(monkeypatch, float64):
    """What train() logs is the loss of the scores that D gave; G's update sends no gradient into D."""
    seen = run(monkeypatch, dcgan, ["--loss", "relativistic", "--batch-size", "6", "--latent-dim", "5", "--ngf", "4",
                                    "--ndf", "4", "--r1", "0", "--device", "cpu", "--lr-d", "0"])
    forwards = [e for e in seen.events if e.kind == "forward"]
    both = next(e for e in forwards if e.net == "D").inputs[0]
    x, z = both[:6], [e for e in forwards if e.net == "G"][-1].inputs[0]
    with torch.no_grad():
        real, fake = (t.numpy() for t in seen.D(both).chunk(2))
        assert seen.logged[0]["d_loss"] == pytest.approx(np.logaddexp(0, fake - real).mean(), rel=1e-9)
        G = next(e for e in seen.events if e.kind == "step" and e.net == "G").copies[0]
        made = seen.D(G(z)).numpy()
        assert seen.logged[0]["g_loss"] == pytest.approx(np.logaddexp(0, seen.D(x).numpy() - made).mean(), rel=1e-6)


def test_r1_adds_half_of_gamma_times_the_gradient(monkeypatch, float64):
    """cdcgan: d_loss with gamma 2 less that without is E||grad f(x, y)||^2, by autograd on the first quarter."""
    argv = ["--batch-size", "8", "--latent-dim", "5", "--ngf", "4", "--ndf", "4", "--device", "cpu", "--lr-d", "0"]
    runs = [run(monkeypatch, cdcgan, [*argv, "--r1", str(r1)]) for r1 in (2, 0)]
    both = next(e for e in runs[0].events if e.kind == "forward" and e.net == "D")
    x, y = both.inputs[0][:2].clone().requires_grad_(True), both.inputs[1][:2]
    rows = [torch.autograd.grad(runs[0].D(x, y)[i], x)[0][i].square().sum().item() for i in range(2)]
    difference = runs[0].logged[0]["d_loss"] - runs[1].logged[0]["d_loss"]
    assert difference == pytest.approx(sum(rows) / 2, rel=1e-6) and difference > 1e-9
