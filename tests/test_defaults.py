"""What a script does where no flag says otherwise, with --paper and with --arch mlp; and what came with the defaults:
three levels at 28 pixels, penalties on a share of the batch, R1 where the paper has none, relativistic pairs."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from test_gan_losses import float64, forwards, run, steps  # noqa: F401  float64: a fixture
from torch import nn

import bigan
import cdcgan
import dcgan
import mdgan
import unrolled
import wgan_clip
import wgan_gp

ROOT = Path(__file__).parent.parent
ALL = [wgan_gp, dcgan, cdcgan, wgan_clip, bigan, unrolled, mdgan]
EACH = pytest.mark.parametrize("module", ALL, ids=lambda m: m.__name__)


def flags(module, *argv):
    return vars(module.parse_args([*argv]))


@EACH
def test_a_flag_given_beats_paper_which_beats_mlp_which_beats_the_default(module):
    plain, mlp, paper = flags(module), flags(module, "--arch", "mlp"), flags(module, "--paper")
    both = flags(module, "--arch", "mlp", "--paper")
    norm = {"d_norm"}  # batch norm in D follows from other flags too: test_flags.py
    assert {k: mlp[k] for k in module.MLP} == module.MLP
    assert {k: paper[k] for k in module.PAPER} == module.PAPER
    assert {k: both[k] for k in module.PAPER.keys() - norm} == {k: module.PAPER[k] for k in module.PAPER.keys() - norm}
    assert {k: both[k] for k in module.MLP.keys() - module.PAPER.keys()} == {
        k: v for k, v in module.MLP.items() if k not in module.PAPER
    }
    same = plain.keys() - module.MLP.keys() - norm - {"arch", "run_dir", "image_size", "latent_dim"}
    assert {k: mlp[k] for k in same} == {k: plain[k] for k in same}
    assert (paper["ema"], paper["lr_decay"], paper.get("penalty_share", 1)) == (0.999, "none", 1)
    assert plain["lr_decay"] == "linear" and plain["paper"] is False and paper["paper"] is True
    for more in ([], ["--paper"], ["--arch", "mlp"]):
        given = flags(module, *more, "--lr-g", "3e-3", "--batch-size", "24", "--lr-decay", "none")
        assert (given["lr_g"], given["batch_size"], given["lr_decay"]) == (3e-3, 24, "none")


@EACH
def test_help_shows_the_defaults_and_what_paper_and_mlp_set(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    parts = text.split("options: ")[1].split(" --")
    shown = {part.split()[0]: part for part in reversed(parts)}  # a later part may be another flag's help
    plain = flags(module)
    for name in ("lr_g", "lr_d", "batch_size", "ema", "ngf", "epochs", "dataset", "lr_decay"):
        assert f"(default: {plain[name]})" in shown[name.replace("_", "-")], name
    assert "default: None" not in text and "default: False" not in text and text.count("(default: ") > 20
    said = {}
    for what in ("--paper sets", "--arch mlp sets"):  # as one would type it
        words = text.split(what)[1].split(". ")[0].rstrip(".").split()
        said[what] = dict(zip(words[::2], words[1::2]))
    for what, preset in zip(said, (module.PAPER, module.MLP)):
        assert said[what] == {f"--{name.replace('_', '-')}": str(value) for name, value in preset.items()}


def test_a_flag_of_ones_own_needs_no_help(capsys):
    """As a copy of a script would add one."""
    p = argparse.ArgumentParser()
    p.add_argument("--mine", type=int, default=3)
    p.add_argument("--batch-size", type=int, default=64)
    wgan_gp.add_run_flags(p)
    args, given = wgan_gp.resolve(p, ["--seed", "0"], {}, {"mine": 4})
    assert args.mine == 3 and set(given) == {"seed"}
    assert wgan_gp.resolve(p, ["--arch", "mlp"], {"mine": 5}, {"mine": 4})[0].mine == 4
    assert "--mine" in p.format_help()


def test_the_papers_settings():
    """Gulrajani et al., algorithm 1, but for beta1, .5 in their MNIST code; Arjovsky et al., algorithm 1; Radford et
    al., section 4; Metz et al.; Eghbal-zadeh et al.'s code has 1e-3 in 2-D."""
    a = flags(wgan_gp, "--paper")
    assert (a["gp_weight"], a["d_steps"], a["lr_g"], a["lr_d"], a["beta1"], a["beta2"]) == (10, 5, 1e-4, 1e-4, 0.5, 0.9)
    a = flags(wgan_clip, "--paper")
    assert (a["clip"], a["optimizer"], a["d_steps"], a["lr_g"], a["lr_d"]) == (0.01, "rmsprop", 5, 5e-5, 5e-5)
    assert (a["batch_size"], a["d_norm"], a["g_norm"], a["d_dropout"]) == (64, "batch", "batch", 0)
    for module in (dcgan, cdcgan):
        a = flags(module, "--paper")
        assert (a["lr_g"], a["lr_d"], a["beta1"], a["beta2"], a["batch_size"]) == (2e-4, 2e-4, 0.5, 0.999, 128)
        assert (a["d_steps"], a["g_steps"], a["latent_dim"], a["prior"]) == (1, 1, 100, "normal")
        assert (a["d_norm"], a["r1"]) == ("batch", 0)
    a = flags(dcgan, "--paper")
    assert (a["loss"], a["gp"], a["r2"], a["upsample"], a["init"], a["norm_first"]) == (
        *("ns", 0, 0, "deconv", "dcgan"),
        False,
    )
    assert flags(unrolled, "--paper")["k"] == 5 and flags(unrolled, "--paper")["inner"] == "adam"


@EACH
def test_the_side_is_what_suits_the_data_set(module):
    sides = {}
    for name in module.CHANNELS:
        sides[name] = flags(module, "--dataset", name, "--data-dir", "data")["image_size"]
    grey = 32 if module is cdcgan else 28  # its networks double from 4
    small = {"digits": grey, "mnist": grey, "fashion": grey, "stacked_mnist": grey}
    assert sides == {**small, "cifar10": 32, "celeba": 64, "folder": 64}
    assert flags(module, "--arch", "mlp", "--dataset", "folder", "--data-dir", "data")["image_size"] == 28
    assert flags(module, "--paper", "--dataset", "folder", "--data-dir", "data")["image_size"] == 32
    assert (
        flags(module, "--paper", "--dataset", "folder", "--data-dir", "data", "--image-size", "64")["image_size"] == 64
    )


@EACH
def test_the_size_of_z_is_what_suits_the_images(module):
    def size(*argv):
        return flags(module, *argv)["latent_dim"]

    assert size("--paper") == size("--dataset", "folder", "--data-dir", "photos") == 100
    of_mlp = 50 if module is bigan else 100  # as in the paper of bigan.py
    assert size("--arch", "mlp", "--dataset", "mnist") == size("--paper", "--arch", "mlp") == of_mlp
    assert size("--dataset", "mnist") == size() == 16 and size("--latent-dim", "7", "--paper") == 7


LEVELS = {28: [4, 7, 14, 28], 16: [4, 8, 16], 32: [4, 8, 16, 32], 128: [4, 8, 16, 32, 64, 128]}


@pytest.mark.parametrize("module, side", [(m, side) for m in ALL for side in LEVELS if (m, side) != (cdcgan, 28)])
@pytest.mark.parametrize("paper", [[], ["--paper"]], ids=["", "--paper"])
def test_each_level_doubles_the_side(module, paper, side):
    """Of G from z to the image, and of D (and bigan.py's E) from the image back."""
    args = module.parse_args([*paper, "--ngf", "2", "--ndf", "2", "--image-size", str(side)])
    classes = {cdcgan: (10,), wgan_clip: (0,)}.get(module, ())
    nets = {"G": module.Generator(args, 1, *classes), "D": module.Discriminator(args, 1, *classes)}
    if module is bigan:
        nets["E"] = module.Encoder(args, 1)
    seen = {name: [] for name in nets}
    for name, net in nets.items():
        for m in net.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                m.register_forward_hook(lambda m, i, o, name=name: seen[name].append(o.shape[-1]))
    z = torch.randn(3, args.latent_dim)
    y = [torch.tensor([0, 3, 9])] if module is cdcgan else []
    x = nets["G"].eval()(z, *y)
    nets["D"].eval()(x, *([z] if module is bigan else y))
    sides = LEVELS[side]
    assert x.shape == (3, 1, side, side)
    assert sorted({s for s in seen["G"] if s > 1}) == sides
    assert sorted({s for s in seen["D"] if s > 1}) == sides[:-1]
    if module is bigan:
        assert nets["E"].eval()(x).shape == z.shape and sorted({s for s in seen["E"] if s > 1}) == sides[:-1]


@EACH
@pytest.mark.parametrize("side", [8, 20, 48, 100, 512])
def test_another_side_is_one_line_for_convolutions(module, side, capsys):
    args = module.parse_args([])
    args.image_size = side
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.Discriminator(args, 1, *([10] if module in (cdcgan, wgan_clip) else []))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and f"not --image-size {side}" in err


# penalties ------------------------------------------------------------------------------------------------------------


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
    D = Quadratic(1.7).double()
    labels = [torch.arange(5)] if module is cdcgan else []
    value = module.squared_gradient(D, x, *labels)
    a = D.a.item()
    assert value.item() == pytest.approx(a**2 * x.square().sum().item() / 5, rel=1e-9)
    value.backward()  # d/da a^2 m = 2 a m
    assert D.a.grad.item() == pytest.approx(2 * a * x.square().sum().item() / 5, rel=1e-9)


def test_squared_gradient_of_a_pair_counts_both():
    """f(x, z) = <x, w> + 3 sum z: ||w||^2 + 9 times the numbers of z."""
    w = torch.randn(48, dtype=torch.float64)
    x, z = torch.randn(4, 3, 4, 4).double(), torch.randn(4, 7).double()
    value = bigan.squared_gradient(lambda x, z: x.flatten(1) @ w + 3 * z.sum(1), x, z)
    assert value.item() == pytest.approx(w.square().sum().item() + 9 * 7, rel=1e-12)


TINY = ["--batch-size", "8", "--latent-dim", "5", "--ngf", "4", "--ndf", "4", "--image-size", "16", "--device", "cpu"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "gp, r1, r2, share, k",
    [(0, 2, 0, 1, 8), (0, 0, 2, 1, 8), (0, 1, 3, 0.25, 2), (0.5, 0, 0, 0.3, 3), (0.25, 1, 1, 0.01, 1)],
)
def test_the_penalty_is_of_the_first_share_of_the_batch(monkeypatch, gp, r1, r2, share, k):
    """(gp + r1 / 2) a^2 mean ||x||^2 + (gp + r2 / 2) a^2 mean ||G(z)||^2 over the first k = ceil(share 8) of each."""
    argv = [*TINY, "--gp", str(gp), "--r1", str(r1), "--r2", str(r2), "--penalty-share", str(share)]
    seen = run(monkeypatch, dcgan, argv, nets=(None, Quadratic(0.3)))
    both = forwards(seen, "D")[0].inputs[0]
    real, fake = (t[:k].square().sum().item() / k for t in both.chunk(2))
    assert len(both) == 16 and (k == 8 or real != pytest.approx(both[:8].square().sum().item() / 8))
    wanted = 0.09 * ((gp + r1 / 2) * real + (gp + r2 / 2) * fake)
    assert seen.logged[0]["penalty"] == pytest.approx(wanted, rel=1e-9)


REAL, FAKE = np.array([0.3, -2, 7.5, 0, -9]), np.array([1.1, -0.4, 12, -13, 0])


def test_the_relativistic_loss_pairs_each_fake_image_with_a_real_one():
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


@pytest.mark.usefixtures("float64")
def test_relativistic_training_gives_both_losses_the_pairs(monkeypatch):
    """What train() logs is the loss of the scores that D gave; G's update sends no gradient into D."""
    seen = run(monkeypatch, dcgan, [*TINY, "--loss", "relativistic", "--r1", "0", "--lr-d", "0"])
    both = forwards(seen, "D")[0].inputs[0]
    x = both[:8]
    z = forwards(seen, "G")[-1].inputs[0]
    (event,) = steps(seen, "G")
    (before,) = steps(seen, "D")
    with torch.no_grad():
        real, fake = (t.numpy() for t in seen.D(both).chunk(2))
        made = seen.D(event.copies[0](z)).numpy()
    assert seen.logged[0]["d_loss"] == pytest.approx(np.logaddexp(0, fake - real).mean(), rel=1e-9)
    assert seen.logged[0]["g_loss"] == pytest.approx(np.logaddexp(0, real - made).mean(), rel=1e-9)
    for a, b in zip(before.grads["D"], event.grads["D"]):
        assert torch.equal(a, b)
    assert len(x) == 8 and not torch.equal(z, forwards(seen, "G")[0].inputs[0])


@pytest.mark.usefixtures("float64")
def test_r1_adds_half_of_gamma_times_the_gradient(monkeypatch):
    """cdcgan: d_loss with gamma 2 less that without is E||grad f(x, y)||^2, by autograd on the first quarter."""
    runs = [run(monkeypatch, cdcgan, [*TINY, "--lr-d", "0", "--r1", str(r1)]) for r1 in (2, 0)]
    both = forwards(runs[0], "D")[0]
    x, y = both.inputs[0][:2].clone().requires_grad_(True), both.inputs[1][:2]
    rows = [torch.autograd.grad(runs[0].D(x, y)[i], x)[0][i].square().sum().item() for i in range(2)]
    difference = runs[0].logged[0]["d_loss"] - runs[1].logged[0]["d_loss"]
    assert difference == pytest.approx(sum(rows) / 2, rel=1e-6) and difference > 1e-9


@pytest.mark.parametrize("module", [m for m in ALL if hasattr(m, "COLOUR")], ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    "argv, has_them",
    [
        ("--dataset mnist", False),
        ("--dataset mnist --image-size 64", False),
        ("--dataset cifar10", True),
        ("--dataset folder --data-dir photos", True),
        ("--dataset folder --data-dir photos --image-size 32", True),
        ("--dataset cifar10 --image-size 64", True),
        ("--dataset folder --data-dir photos --image-size 16", False),
        ("--dataset folder --data-dir photos --arch mlp", False),
        ("--dataset stacked_mnist --image-size 32", False),  # its channels are three grey digits
    ],
)
def test_colour_images_have_settings_of_their_own(module, argv, has_them):
    given, plain = flags(module, *argv.split()), flags(module)
    given_too, paper = flags(module, *argv.split(), "--batch-size", "8"), flags(module, *argv.split(), "--paper")
    mlp = module.MLP if "mlp" in argv else {}
    small = argv == "--dataset cifar10" or "--image-size 32" in argv
    colour = module.COLOUR | (getattr(module, "SMALL_COLOUR", {}) if small else {})
    assert colour.keys() <= module.PAPER.keys()  # else --paper would keep what is no paper's
    for name, value in colour.items():
        assert given[name] == (value if has_them else mlp.get(name, plain[name]))
        no_norm = name == "d_norm" and "mlp" in argv  # the authors' fully connected critic has none
        assert paper[name] == ("none" if no_norm else module.PAPER.get(name, given[name]))
    assert given_too["batch_size"] == 8


HAS_LONG = pytest.mark.parametrize("module", [m for m in ALL if hasattr(m, "LONG")], ids=lambda m: m.__name__)


@HAS_LONG
@pytest.mark.parametrize(
    "length, more, has_them",
    [
        ("--epochs 39", "", False),
        ("--epochs 40", "", True),
        ("--epochs 200", "--dataset mnist", True),
        ("--steps 39999", "", False),
        ("--steps 40000 --epochs 3", "", True),
        ("--steps 100 --epochs 200", "", False),  # --steps overrides --epochs
        ("--epochs 200", "--arch mlp", False),
        ("--epochs 200", "--dataset cifar10", False),
        ("--epochs 200", "--dataset folder --data-dir photos --image-size 16", True),  # COLOUR begins at 32 pixels
        ("--epochs 200", "--dataset stacked_mnist", True),
        ("--epochs 200", "--batch-size 128", True),
    ],
)
def test_long_runs_have_twice_the_width_at_half_the_rates(module, length, more, has_them):
    plain, short = flags(module), flags(module, *more.split())
    long = flags(module, *length.split(), *more.split())
    assert module.LONG == {"ngf": 32, "ndf": 32, "lr_g": plain["lr_g"] / 2, "lr_d": plain["lr_d"] / 2}
    assert (plain["ngf"], plain["ndf"]) == (16, 16) and module.LONG.keys() <= module.PAPER.keys()
    expected = short | (module.LONG if has_them else {})
    aside = {"epochs", "steps", "run_dir"}
    assert {k: long[k] for k in long.keys() - aside} == {k: expected[k] for k in long.keys() - aside}


@HAS_LONG
@pytest.mark.parametrize("typed", ["--ngf 16", "--ndf 64", "--lr-g 4e-3", "--lr-d 1e-3"])
def test_of_the_settings_of_a_long_run_all_hold_or_none(module, typed):
    """Twice the width at the short runs' rates does not train."""
    long, short = (flags(module, "--epochs", n, *typed.split()) for n in ("200", "20"))
    assert {name: long[name] for name in module.LONG} == {name: short[name] for name in module.LONG}


@HAS_LONG
def test_paper_beats_the_settings_of_a_long_run(module):
    paper = flags(module, "--paper", "--epochs", "200")
    assert {name: paper[name] for name in module.LONG} == {name: module.PAPER[name] for name in module.LONG}


@HAS_LONG
@pytest.mark.parametrize("first, then", [("20", "200"), ("200", "20")])
def test_a_run_that_goes_on_longer_keeps_its_networks(module, first, then, tmp_path):
    saved = {**flags(module, "--epochs", first), "data_dir": str(tmp_path)}
    about = {"script": module.__name__, "step": 0, "classes": {}, "seconds": 0.0, "rng": {}, "channels": 1}
    torch.save({**about, "args": saved}, tmp_path / "last.pt")
    given = flags(module, "--resume", str(tmp_path / "last.pt"), "--epochs", then)
    assert given["epochs"] == int(then)
    assert {name: given[name] for name in module.LONG} == {name: saved[name] for name in module.LONG}


def settings_table(module):
    """The table of a script's page in the record: a row for each flag that --paper, --arch mlp or the images set."""
    ways = {"`--paper`": ["--paper"], "`--arch mlp`": ["--arch", "mlp"]}
    if hasattr(module, "COLOUR"):
        ways["colour images"] = ["--dataset", "celeba"]
    if hasattr(module, "SMALL_COLOUR"):
        ways["colour below 64 pixels"] = ["--dataset", "cifar10"]
    if hasattr(module, "LONG"):
        ways["40 epochs and more"] = ["--epochs", "40"]
    plain = flags(module, "--dataset", "mnist")
    found = {way: flags(module, "--dataset", "mnist", *more) for way, more in ways.items()}
    if "colour images" in found and "colour below 64 pixels" not in found:
        side = found["colour images"]["image_size"]
        small_side = flags(module, "--dataset", "cifar10")["image_size"]
        found["colour images"]["image_size"] = f"{side} (cifar10: {small_side})"
    aside = {"paper", "arch", "dataset", "epochs", "run_dir", "device", "graph"}
    names = [n for n in plain if n not in aside and any(f[n] != plain[n] for f in found.values())]
    lines = [f"| flag | default, on MNIST | {' | '.join(ways)} |", "|---" * (len(ways) + 2) + "|"]
    for name in names:
        cells = [
            "" if f[name] == plain[name] else f"{f[name]:g}" if is_number(f[name]) else f[name] for f in found.values()
        ]
        first = f"{plain[name]:g}" if is_number(plain[name]) else plain[name]
        lines.append(f"| `--{name.replace('_', '-')}` | {first} | {' | '.join(cells)} |")
    return "\n".join(lines)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@EACH
def test_the_record_has_each_scripts_settings(module):
    page = (ROOT / "tests" / "gallery" / f"{module.__name__}.md").read_text()
    assert settings_table(module) in page


@pytest.mark.parametrize("module", [wgan_gp, wgan_clip, mdgan, bigan], ids=lambda m: m.__name__)
def test_naive_rejection_by_a_score_that_is_no_logit_is_said(module, capsys):
    module.parse_args(["--reject", "naive"])
    why = "it is that of a pair" if module is bigan else "for a logit, which it is not"
    assert why in capsys.readouterr().err
    module.parse_args(["--reject", "drs", "--holdout", "9"])
    dcgan.parse_args(["--reject", "naive"])
    assert capsys.readouterr().err == ""


def test_naive_rejection_by_a_relativistic_d_is_said(capsys):
    """Its loss is about differences of scores, which have no zero."""
    dcgan.parse_args("--reject naive --loss relativistic".split())
    assert "for a logit, which it is not" in capsys.readouterr().err


def test_a_percentile_without_drs_is_said(capsys):
    wgan_gp.parse_args(["--drs-percentile", "20"])
    assert "--drs-percentile has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("module", [dcgan, cdcgan], ids=lambda m: m.__name__)
def test_r1_with_paper_leaves_batch_norm_out(module, capsys):
    assert module.parse_args(["--paper"]).d_norm == "batch"
    assert module.parse_args(["--paper", "--r1", "1"]).d_norm == "none"
    assert module.parse_args(["--paper", "--r1", "1", "--d-norm", "batch"]).d_norm == "batch"


def test_more_processes_than_gpus_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(wgan_gp, "WORLD", 4)
    args = wgan_gp.parse_args(["--device", "cpu"])
    args.device, args.graph = "cuda", None
    monkeypatch.setenv("LOCAL_RANK", "1")
    wgan_gp.resolve_device(args)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit):
        wgan_gp.resolve_device(args)
    assert "more processes than the 2 GPUs" in capsys.readouterr().err
