"""What each method flag of dcgan.py, cdcgan.py and wgan_clip.py promises, flags without effect, and the data sets that
come as files. Layers that a flag adds or removes: test_networks.py; terms of the losses: test_gan_losses.py."""

import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_gan_losses import SMALL, float64, forwards, run, steps  # noqa: F401  float64: a fixture
from test_networks import layers, pair

import bigan
import cdcgan
import dcgan
import mdgan
import metrics
import unrolled
import wgan_clip
import wgan_gp

pytestmark = pytest.mark.usefixtures("float64")
ONE = [*SMALL, "--d-steps", "1", "--g-steps", "1", "--image-size", "16"]
ALL = [(dcgan, []), (cdcgan, []), (wgan_clip, []), (wgan_clip, ["--conditional", "--optimizer", "adam"])]
EACH = pytest.mark.parametrize("module, argv", ALL, ids=[f"{m.__name__} {' '.join(a)}" for m, a in ALL])


# losses and penalties -------------------------------------------------------------------------------------------------


def test_loss_changes_g_and_leaves_d(monkeypatch):
    runs = {kind: run(monkeypatch, dcgan, [*ONE, "--loss", kind]) for kind in ("ns", "minimax")}
    f = {}
    for kind, seen in runs.items():
        (event,) = steps(seen, "G")
        G, D = event.copies
        z = forwards(seen, "G")[-1].inputs[0]
        f[kind] = D(G(z)).detach()
    assert torch.equal(f["ns"], f["minimax"])  # the same start, the same noise
    for a, b in zip(*(steps(seen, "D")[0].grads["D"] for seen in runs.values())):
        assert torch.equal(a, b)
    assert runs["ns"].logged[0]["g_loss"] == pytest.approx(torch.log1p(torch.exp(-f["ns"])).mean().item(), rel=1e-9)
    assert runs["minimax"].logged[0]["g_loss"] == pytest.approx(
        -torch.log1p(torch.exp(f["ns"])).mean().item(), rel=1e-9
    )
    assert runs["ns"].logged[0]["d_loss"] == runs["minimax"].logged[0]["d_loss"]


@pytest.mark.parametrize("flag", ["--gp", "--r1", "--r2"])
def test_a_penalty_takes_the_papers_batch_norm_out_of_d_and_says_so(flag, capsys):
    assert dcgan.parse_args(["--paper", flag, ".5"]).d_norm == "none"
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "--d-norm none" in note
    assert dcgan.parse_args(["--paper", flag, ".5", "--d-norm", "batch"]).d_norm == "batch"  # obeyed
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "batch" in warning and warning != note
    for quiet in ([flag, ".5", "--d-norm", "none"], [flag, "0"], []):
        assert dcgan.parse_args(["--paper", *quiet]).d_norm == ("none" if "none" in quiet else "batch")
        assert capsys.readouterr().err == ""
    assert dcgan.parse_args(["--paper", "--arch", "mlp"]).d_norm == "none"
    assert wgan_clip.parse_args(["--paper", "--arch", "mlp"]).d_norm == "none"


WITHOUT_EFFECT = [
    (unrolled, "--k 0 --inner adam", "--inner"),
    (unrolled, "--k 0 --inner-lr .5", "--inner-lr"),
    (dcgan, "--norm-first", "--norm-first"),
    (dcgan, "--arch mlp --upsample nearest", "--upsample"),
    (dcgan, "--upsample-kernel 5", "--upsample-kernel"),
    (mdgan, "--arch mlp --upsample-kernel 5", "--upsample-kernel"),
    (dcgan, "--arch mlp --ngf 8", "--ngf"),
    (dcgan, "--r1 0 --penalty-share .5", "--penalty-share"),
    (wgan_clip, "--optimizer rmsprop --beta1 .9", "--beta1"),
    (wgan_clip, "--paper --beta2 .9", "--beta2"),
    (wgan_clip, "--arch mlp --ndf 8", "--ndf"),
    (unrolled, "--inner adam --inner-lr .5", "--inner-lr"),
    (unrolled, "--paper --inner-lr .5", "--inner-lr"),
    (unrolled, "--r1 0 --penalty-share .5", "--penalty-share"),
    (mdgan, "--r1 0 --penalty-share .5", "--penalty-share"),
    (bigan, "--r1 0 --penalty-share .5", "--penalty-share"),
    (cdcgan, "--arch mlp --d-norm batch", "--d-norm"),
    (cdcgan, "--r1 0 --penalty-share .5", "--penalty-share"),
    (cdcgan, "--paper --r1 1", "batch norm"),  # R1 through batch norm: an effect, but not R1's
    (cdcgan, "--d-norm batch", "--d-norm batch mixes"),
    (dcgan, "--d-norm batch", "--d-norm batch"),
]


@pytest.mark.parametrize("module, argv, named", WITHOUT_EFFECT, ids=[f"{m.__name__} {a}" for m, a, _ in WITHOUT_EFFECT])
def test_a_flag_without_its_effect_is_one_line(module, argv, named, capsys):
    module.parse_args(argv.split())
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and named in line, line


@pytest.mark.parametrize("argv", ["--gp 5", "--lr 1e-3", "--latent 9", "--epoch 3"])
def test_a_flag_is_not_abbreviated(argv, capsys):
    """--gp is a flag of dcgan.py. As a short form of --gp-weight it would be another penalty."""
    with pytest.raises(SystemExit):
        wgan_gp.parse_args(argv.split())
    assert f"unrecognized arguments: {argv}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, argv",
    [
        *((m, more) for m in (dcgan, cdcgan, wgan_clip, wgan_gp, bigan, unrolled, mdgan) for more in ("", "--paper")),
        *((m, "--arch mlp") for m in (dcgan, cdcgan, wgan_clip, wgan_gp, bigan, unrolled, mdgan)),
        (dcgan, "--paper --norm-first"),
        (dcgan, "--ngf 8 --upsample nearest --penalty-share .5"),
        (wgan_gp, "--dataset cifar10 --upsample-kernel 5"),
        (wgan_clip, "--optimizer adam --beta1 .9"),
        (unrolled, "--inner sgd --inner-lr .5"),
        (cdcgan, "--d-norm batch --r1 0"),
    ],
)
def test_flags_that_have_an_effect_are_taken_in_silence(module, argv, capsys):
    module.parse_args(argv.split())
    out = capsys.readouterr()
    assert out.err == ""
    assert out.out.startswith("colour images set ") if "cifar10" in argv else out.out == ""


@pytest.mark.parametrize(
    "module", [dcgan, cdcgan, wgan_clip, wgan_gp, bigan, unrolled, mdgan], ids=lambda m: m.__name__
)
def test_ranks_with_less_than_two_images_each_are_one_line(module, monkeypatch, capsys):
    """torchrun --nproc-per-node 2: batch norm needs two rows a rank, and each has as many."""
    monkeypatch.setattr(module, "WORLD", 2)
    for size in ("2", "3", "5"):
        with pytest.raises(SystemExit) as stop:
            module.parse_args(["--arch", "mlp", "--batch-size", size])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and f"--batch-size {size}" in err, err
    assert module.parse_args(["--arch", "mlp", "--batch-size", "4"]).batch_size == 4


# networks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, argv",
    [
        (dcgan, ["--upsample", "nearest"]),
        (dcgan, ["--upsample", "bilinear"]),
        (dcgan, ["--d-norm", "none"]),
        (dcgan, ["--norm-first"]),
        (dcgan, ["--gp", "1"]),
        (dcgan, ["--image-size", "28"]),
        (dcgan, ["--arch", "mlp"]),
        (cdcgan, ["--d-ignores-label"]),
        (wgan_clip, ["--upsample", "nearest"]),
        (wgan_clip, ["--d-norm", "none"]),
        (wgan_clip, ["--g-norm", "layer"]),
        (wgan_clip, ["--g-norm", "none"]),
        (wgan_clip, ["--d-dropout", ".5"]),
        (wgan_clip, ["--conditional"]),
        (wgan_clip, ["--conditional", "--d-ignores-label"]),
    ],
)
def test_network_flags_reach_the_networks_that_train(monkeypatch, module, argv):
    seen = run(monkeypatch, module, [*ONE, *argv])
    classes = 3 if module is cdcgan or "--conditional" in argv else 0
    built = pair(module, *ONE, *argv, classes=classes)
    plain = pair(module, *ONE, classes=3 if module is cdcgan else 0)
    for ours, theirs in zip((seen.G, seen.D), built):
        assert layers(ours) == layers(theirs)
    assert [str(net) for net in (seen.G, seen.D)] != [str(net) for net in plain]


def test_init_draws_other_weights(monkeypatch):
    """The first convolution of G, (100, 128, 4, 4): N(0, .02), or U(-b, b) with b = 1 / sqrt(128 16)."""
    std = {}
    for init in ("dcgan", "default"):
        argv = ["--paper", "--ndf", "2", "--batch-size", "2", "--init", init, "--device", "cpu"]
        seen = run(monkeypatch, dcgan, argv)
        first = next(e for e in seen.events if e.kind == "step").before["G"][0]
        assert first.shape == (100, 128, 4, 4)
        std[init] = first.std().item()
    assert std["dcgan"] == pytest.approx(0.02, rel=0.01)
    assert std["default"] == pytest.approx((128 * 16 * 3) ** -0.5, rel=0.01)


def test_dropout_is_off_outside_of_training(monkeypatch):
    seen = run(monkeypatch, wgan_clip, [*ONE, "--d-dropout", ".5"])
    assert all(e.train for e in seen.events if e.kind == "forward")
    x = torch.randn(6, 1, 16, 16)
    assert not torch.equal(seen.D.train()(x), seen.D(x)) and torch.equal(seen.D.eval()(x), seen.D(x))


# labels ---------------------------------------------------------------------------------------------------------------


LABELLED = [
    (cdcgan, []),
    (cdcgan, ["--arch", "mlp"]),
    (wgan_clip, ["--conditional"]),
    (wgan_clip, ["--conditional", "--arch", "mlp"]),
]


@pytest.mark.parametrize("ignored", [False, True], ids=["D(x, y)", "D(x)"])
@pytest.mark.parametrize("module, argv", LABELLED, ids=[f"{m.__name__} {' '.join(a)}" for m, a in LABELLED])
def test_d_ignores_label(monkeypatch, module, argv, ignored):
    """D's answer moves with y, or with the flag does not; G's always does. What is drawn is bytes."""
    seen = run(monkeypatch, module, [*ONE, *argv, *["--d-ignores-label"] * ignored])
    x, z = seen.x[:6], torch.randn(6, 5)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    another = (y + 1) % 3
    with torch.no_grad():
        score = seen.score(x, y)
        assert seen.D.training  # as it was
        changes = (score - seen.score(x, another)).abs()
        torch.testing.assert_close(score, seen.D.eval()(x.double() / 127.5 - 1, y))
        made, other = (seen.ema(z, labels) for labels in (y, another))
        drawn = seen.sample(z, y)
    assert (changes == 0).all() if ignored else (changes > 1e-9 * score.abs()).all(), changes
    assert ((made - other).flatten(1).abs().amax(1) > 1e-6).all()
    assert drawn.dtype == torch.uint8 and (drawn.double() - (made + 1) * 127.5).abs().max() <= 0.5 + 1e-9
    assert seen.classes == {"0": 20, "1": 20, "2": 20}


@pytest.mark.parametrize("module, argv", [(dcgan, []), (wgan_clip, [])], ids=["dcgan", "wgan_clip"])
def test_without_conditional_nobody_is_told_a_label(monkeypatch, module, argv):
    seen = run(monkeypatch, module, [*ONE, *argv])
    assert not seen.conditional
    if module is wgan_clip:  # its networks are passed labels, and do not look
        x, z = torch.randn(6, 1, 16, 16), torch.randn(6, 5)
        for net, rows in ((seen.G.eval(), z), (seen.D.eval(), x)):
            assert torch.equal(net(rows), net(rows, torch.arange(6) % 3))


@pytest.mark.parametrize("dim", [None, 3, 8])
def test_label_embedding_dim(monkeypatch, dim):
    """As many numbers as classes where not given; learned: they move with G."""
    flag = [] if dim is None else ["--label-embedding-dim", str(dim)]
    seen = run(monkeypatch, wgan_clip, [*ONE, "--conditional", "--lr-g", ".01", *flag])
    wide, (event,) = dim or 3, steps(seen, "G")
    at = [i for i, p in enumerate(seen.G.parameters()) if p.shape == (3, wide)]
    assert len(at) == 1 and layers(seen.G)[0][1] == 5 + wide
    grad, moved = event.grads["G"][at[0]], event.after["G"][at[0]] - event.before["G"][at[0]]
    assert grad.abs().min() > 0 and moved.abs().min() > 1e-3


@pytest.mark.parametrize("classes", [1, 0])
def test_unlabelled_data_is_one_line_for_a_conditional_script(monkeypatch, capsys, classes, tmp_path):
    monkeypatch.chdir(tmp_path)
    y = torch.full((60,), classes - 1)
    for module, argv in ((cdcgan, []), (wgan_clip, ["--conditional"])):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, module, [*ONE, *argv], y=y)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and f"has {classes} labelled classes" in err
        assert list(tmp_path.iterdir()) == []
    run(monkeypatch, wgan_clip, ONE, y=y)  # unconditional: any data will do
    run(monkeypatch, dcgan, ONE, y=y)


# schedule -------------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("d, g", [(1, 1), (1, 2), (1, 10), (1, 15), (5, 1), (2, 3)])
def test_d_steps_and_g_steps(monkeypatch, module, argv, d, g):
    seen = run(monkeypatch, module, [*ONE, *argv, "--d-steps", str(d), "--g-steps", str(g)], iterations=2)
    order = "".join(e.net for e in seen.events if e.kind == "step")
    assert order == 2 * ("D" * d + "G" * g)
    assert len(seen.logged) == 2
    one = run(monkeypatch, module, [*ONE, *argv], iterations=1)  # the first D update is the same whatever comes after
    for a, b in zip(steps(seen, "D")[0].grads["D"], steps(one, "D")[0].grads["D"]):
        assert torch.equal(a, b)


def test_n_critic_is_another_name_for_d_steps():
    assert wgan_clip.parse_args(["--n-critic", "7"]).d_steps == 7


@EACH
def test_each_network_has_its_own_rate(monkeypatch, module, argv):
    """Adam's first step is lr g / (|g| + 1e-8); RMSprop's lr g / (|g| / 10 + 1e-8)."""
    seen = run(monkeypatch, module, [*ONE, *argv, "--lr-g", "3e-3", "--lr-d", "7e-4"])
    adam = module is not wgan_clip or "adam" in argv
    for net, lr in (("G", 3e-3), ("D", 7e-4)):
        (event,) = steps(seen, net)
        for before, after, grad in zip(event.before[net], event.after[net], event.grads[net]):
            wanted = before - lr * grad / (grad.abs() * (1 if adam else 0.1) + 1e-8)
            torch.testing.assert_close(after, wanted, rtol=0, atol=1e-9)
    still = run(monkeypatch, module, [*ONE, *argv, "--lr-g", "0"])
    assert all(torch.equal(a, b) for a, b in zip(steps(still, "G")[0].before["G"], steps(still, "G")[0].after["G"]))
    assert not torch.equal(steps(still, "D")[0].before["D"][0], steps(still, "D")[0].after["D"][0])


@pytest.mark.parametrize(
    "module, argv, reference",
    [
        (wgan_clip, [], lambda p: torch.optim.RMSprop(p, 2e-3)),
        (wgan_clip, ["--optimizer", "rmsprop", "--arch", "mlp"], lambda p: torch.optim.RMSprop(p, 2e-3, alpha=0.99)),
        (wgan_clip, ["--optimizer", "adam"], lambda p: torch.optim.Adam(p, 2e-3, (0.5, 0.999))),
        (
            wgan_clip,
            ["--optimizer", "adam", "--beta1", "0", "--beta2", ".9"],
            lambda p: torch.optim.Adam(p, 2e-3, (0.0, 0.9)),
        ),
        (dcgan, [], lambda p: torch.optim.Adam(p, 2e-3, (0.5, 0.999))),
        (dcgan, ["--beta1", ".9", "--beta2", ".99"], lambda p: torch.optim.Adam(p, 2e-3, (0.9, 0.99))),
        (cdcgan, [], lambda p: torch.optim.Adam(p, 2e-3, (0.5, 0.999))),
    ],
)
def test_updates_are_the_named_optimizers(monkeypatch, module, argv, reference):
    """The same gradients through torch's plain single-tensor optimizer: the same weights, over six updates."""
    seen = run(monkeypatch, module, [*ONE, *argv, "--lr-g", "2e-3", "--lr-d", "2e-3"], iterations=6)
    for net in "GD":
        updates = steps(seen, net)
        weights = [torch.nn.Parameter(p.clone()) for p in updates[0].before[net]]
        opt = reference(weights)
        for event in updates:
            for p, grad, now in zip(weights, event.grads[net], event.before[net]):
                p.grad, p.data = grad.clone(), now.clone()  # clipped in between
            opt.step()
            for p, wanted in zip(weights, event.after[net]):
                torch.testing.assert_close(p.detach(), wanted, rtol=1e-9, atol=1e-11)
        assert (updates[-1].after[net][0] - updates[0].before[net][0]).abs().max() > 1e-3


@pytest.mark.parametrize("prior, bound", [("normal", None), ("uniform", 1)])
def test_prior(monkeypatch, prior, bound):
    seen = run(monkeypatch, dcgan, [*ONE, "--prior", prior, "--g-steps", "15"])
    z = torch.cat([e.inputs[0] for e in forwards(seen, "G")])
    assert z.shape == (16 * 6, 5)
    assert (z.abs().max() <= 1) == (bound == 1)
    assert z.var().item() == pytest.approx(1 / 3 if bound else 1, rel=0.25)


# pictures in a folder -------------------------------------------------------------------------------------------------


def picture(path, colour=(10, 200, 30), size=(40, 40), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(path)


def alone(root):
    """root/train: what is put there is for training to the last picture, since root/test has one of its own."""
    picture(root / "test/0.png")
    (root / "train").mkdir(exist_ok=True)
    return root / "train"


def test_unreadable_test_images_are_left_out_and_unreadable_training_images_are_an_error(tmp_path, capsys):
    """A folder of few pictures has one test picture. A run without scores goes on without it."""
    inside = alone(tmp_path / "few")
    picture(inside / "0.png")
    (tmp_path / "few/test/0.png").write_bytes(b"no PNG")
    x, y = load(tmp_path / "few", split="test")
    assert x.shape == (0, 3, 32, 32) and y.shape == (0,)
    assert "left out 1 of 1 files" in capsys.readouterr().err
    assert len(load(tmp_path / "few")[0]) == 1
    assert load(tmp_path / "few", split="test")[0].shape == (0, 3, 32, 32)  # as it was kept
    (inside / "0.png").write_bytes(b"no PNG either")
    with pytest.raises(SystemExit):
        load(tmp_path / "few")
    assert "none of the 1 training images" in capsys.readouterr().err


def test_a_dark_bmp_of_16_bits_for_three_colours_is_read(tmp_path):
    """5, 6 and 5 bits: not the 16 bits a channel of which a scanner may leave the highest two unused."""
    rows = np.full((40, 40), (6 << 11) | (12 << 5) | 6, "<u2").tobytes()
    head = struct.pack("<IiiHHIIiiII", 40, 40, 40, 1, 16, 3, len(rows), 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    start = 14 + len(head) + len(masks)
    (tmp_path / "dark.bmp").write_bytes(
        b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + head + masks + rows
    )
    x, _ = metrics.read_image(tmp_path / "dark.bmp")
    assert x.shape == (3, 40, 40) and 40 < x.float().mean() < 60


def load(root, size=32, split="train"):
    x, y, _ = metrics.load_data("folder", str(root), size, split)
    return x, y


def warned(capsys, root):
    """The lines on stderr, but for the one that says what the folder holds."""
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith(f"{root}: ")]


def colours(x):
    """Of pictures in one colour each."""
    assert (x == x[:, :, :1, :1]).all()
    return [tuple(p[:, 0, 0].tolist()) for p in x]


def shades(x):
    """Their reds, in order: the files' own order is the script's affair."""
    return sorted(c[0] for c in colours(x))


def test_folder_train_and_test(tmp_path):
    root = tmp_path / "pets"
    for split, shade in (("train", 100), ("test", 200)):
        for i, kind in enumerate(("cat", "dog", "wild")):
            for j in range(2):
                picture(root / split / kind / f"{j}.png", (shade, i, j))
    for split, shade in (("train", 100), ("test", 200)):
        x, y = load(root, 32, split)
        assert x.dtype == torch.uint8 and x.shape == (6, 3, 32, 32) and y.dtype == torch.int64
        assert sorted(colours(x)) == [(shade, i, j) for i in range(3) for j in range(2)]
        assert [c[1] for c in colours(x)] == y.tolist()


def test_folder_labels_mean_the_same_in_both_splits(tmp_path):
    """Also where a class has no test pictures."""
    root = tmp_path / "pets"
    for i, kind in enumerate(("cat", "dog", "wild")):
        picture(root / "train" / kind / "0.png", (0, i, 0))
        if kind != "dog":
            picture(root / "test" / kind / "0.png", (9, i, 0))
    x, y = load(root, 32, "test")
    assert [c[1] for c in colours(x)] == y.tolist() and sorted(y.tolist()) == [0, 2]


def test_folder_without_a_split_keeps_every_tenth_file_for_testing(tmp_path):
    root = tmp_path / "flat"
    for i in range(25):
        picture(root / f"{i:02}.png", (i, 0, 0))
    (x, y), (test, y_test) = load(root), load(root, split="test")
    assert len(x) == 23 and len(test) == 2 and sorted(shades(x) + shades(test)) == list(range(25))
    assert set(y.tolist()) == set(y_test.tolist()) == {-1}
    shutil.copytree(root, tmp_path / "elsewhere")
    assert torch.equal(load(tmp_path / "elsewhere", split="test")[0], test)  # the names decide, not where or when


@pytest.mark.parametrize("n", [2, 5, 9, 10, 11])
def test_a_folder_of_a_few_has_one_for_testing(tmp_path, n):
    for i in range(n):
        picture(tmp_path / f"few/{i}.png", (i, 0, 0))
    x, test = load(tmp_path / "few")[0], load(tmp_path / "few", split="test")[0]
    assert len(x) == n - 1 and len(test) == 1 and sorted(shades(x) + shades(test)) == list(range(n))


def test_folder_of_classes_without_a_split(tmp_path):
    root = tmp_path / "kinds"
    for i, kind in enumerate("ab"):
        for j in range(30):
            picture(root / kind / "deep" / f"{j:02}.png", (i, j, 0))
    (x, y), (test, y_test) = load(root), load(root, split="test")
    assert len(x) == 54 and len(test) == 6 and len(set(colours(x) + colours(test))) == 60
    assert [c[0] for c in colours(x)] == y.tolist() and [c[0] for c in colours(test)] == y_test.tolist()
    assert 5 <= y[:20].sum() <= 15  # any first few are a sample
    assert metrics.load_data("folder", root, 32, "test")[2] == ["a", "b"]


def test_an_empty_class_folder_is_no_class(tmp_path):
    """Nothing is to be made of it, so a conditional script must not ask for it."""
    root = tmp_path / "kinds"
    (root / "a").mkdir(parents=True)
    for kind in "bc":
        for i in range(9):
            picture(root / kind / f"{i}.png")
    assert set(load(root)[1].tolist()) == {0, 1}


@pytest.mark.parametrize(
    "mode, suffix, wanted",
    [
        ("RGB", "png", (10, 200, 30)),
        ("RGBA", "png", (10, 200, 30)),
        ("P", "png", (10, 200, 30)),
        ("L", "png", (124, 124, 124)),
        ("RGB", "BMP", (10, 200, 30)),
        ("1", "png", (255, 255, 255)),
        ("P", "gif", (10, 200, 30)),
        ("RGB", "tif", (10, 200, 30)),
        ("L", "TIFF", (124, 124, 124)),
        ("RGB", "JPG", None),
        ("RGB", "jpeg", None),
        ("L", "jpg", None),
        ("RGB", "webp", None),
        ("CMYK", "jpg", None),
    ],
)
def test_folder_modes_and_formats(tmp_path, capsys, mode, suffix, wanted):
    picture(
        alone(tmp_path / "one") / f"0.{suffix}",
        mode="RGB" if mode == "1" else mode,
        colour=(255, 255, 255) if mode == "1" else (10, 200, 30),
    )
    (tmp_path / "one/train/notes.txt").write_text("not a picture")
    x, _ = load(tmp_path / "one")
    mean = x.double().mean((0, 2, 3))
    if wanted:
        assert colours(x) == [wanted]
    else:  # lossy
        target = torch.tensor((124, 124, 124) if mode == "L" else (10, 200, 30)).double()
        assert (mean - target).abs().max() < 6
    line = f"{tmp_path / 'one'}: 1 images to train, 1 to test; left out: .txt (1)\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("suffix", ["png", "gif", "webp"])
def test_folder_transparency_goes_on_white(tmp_path, suffix):
    """Left half see-through, right half not; half a veil of black is a middle grey."""
    image = np.zeros((40, 40, 4), np.uint8)
    image[:] = (10, 200, 30, 0)
    image[:, 20:, 3] = 255
    home = alone(tmp_path / "set")
    if suffix == "gif":  # one colour of its palette is see-through
        im = Image.fromarray((np.indices((40, 40))[1] >= 20).astype(np.uint8), "P")
        im.putpalette([0, 0, 0, 10, 200, 30])
        im.save(home / "a.gif", transparency=0)
    else:
        Image.fromarray(image).save(home / f"a.{suffix}", lossless=True)
    x = load(tmp_path / "set", 40)[0]
    assert x.shape == (1, 3, 40, 40)
    assert (x[..., :18] == 255).all() and colours(x[..., 22:]) == [(10, 200, 30)]
    Image.new("LA", (40, 40), (0, 128)).save(home / "a.png")
    for p in home.glob("a.[gw]*"):
        p.unlink()
    assert colours(load(tmp_path / "set", 40)[0]) == [(127, 127, 127)]


def test_folder_takes_the_first_frame_of_an_animation(tmp_path):
    home = alone(tmp_path / "set")
    first, *others = (Image.new("RGB", (40, 40), (40 * i + 10, 0, 0)) for i in range(4))
    first.save(home / "a.gif", save_all=True, append_images=others, duration=50)
    assert Image.open(home / "a.gif").n_frames == 4 and colours(load(tmp_path / "set")[0]) == [(10, 0, 0)]


def test_folder_of_one_pixel_and_of_odd_names(tmp_path):
    root = tmp_path / "my fotos \u00fc"
    home = alone(root)
    for i, name in enumerate(("one.png", "zwei W\u00f6rter \u00e4.png", "a.b.c.png", "\u5199\u771f.PNG")):
        picture(home / "gr\u00fcn kraut" / name, (i, 0, 0), size=(1, 1) if i == 0 else (30, 20))
    for name in ("._one.png", ".hidden.png", "__MACOSX/._a.png"):  # what a Mac leaves: not pictures
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(b"\0\5\26\7")
    x, y = load(root)
    assert x.shape == (4, 3, 32, 32) and shades(x) == [0, 1, 2, 3] and y.tolist() == [0] * 4
    assert len(caches(tmp_path)) == 1 and caches(tmp_path)[0].startswith("my fotos \u00fc-32-")


def test_folder_pictures_are_cut_to_the_middle_square(tmp_path):
    bands = np.zeros((30, 90, 3), np.uint8)
    bands[:, :30], bands[:, 30:60], bands[:, 60:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    home = alone(tmp_path / "wide")
    Image.fromarray(bands).save(home / "a.png")
    Image.fromarray(bands.transpose(1, 0, 2).copy()).save(home / "b.png")
    x = load(tmp_path / "wide", 28)[0][..., 2:-2, 2:-2]  # a resize may look past the cut for its last pixels
    assert colours(x) == [(0, 255, 0)] * 2


def test_folder_pictures_are_upright_and_unmirrored(tmp_path):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16, :16, 0], image[:16, 16:, 1] = 255, 255  # red top left, green top right
    home = alone(tmp_path / "up")
    Image.fromarray(image).save(home / "a.png")
    turned, exif = Image.fromarray(np.rot90(image).copy()), Image.Exif()
    exif[0x112] = 6  # shown turned by 90 degrees clockwise, as phones write it
    turned.save(home / "b.png", exif=exif)
    x, _ = load(tmp_path / "up")
    for p in x:
        assert torch.equal(p, torch.from_numpy(image).permute(2, 0, 1))


def test_folder_pictures_shrink_with_antialiasing(tmp_path):
    home = alone(tmp_path / "fine")
    Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)).save(home / "a.png")
    x, _ = load(tmp_path / "fine")
    assert (x[..., 2:-2, 2:-2].float() - 127.5).abs().max() < 4  # a checkerboard of pixels is grey from afar


def caches(folder):
    return sorted(p.name for p in folder.glob("*.npz"))


def test_folder_cache_is_used_and_follows_every_change(tmp_path, monkeypatch):
    root = tmp_path / "set"
    home = alone(root)
    for i in range(4):
        picture(home / f"{i}.bmp", (i, 0, 0))
    first, _ = load(root)
    assert len(caches(tmp_path)) == 1 and {p.name for p in tmp_path.iterdir()} == {*caches(tmp_path), "set"}
    assert sorted(p.name for p in home.iterdir()) == [f"{i}.bmp" for i in range(4)]  # beside it, not in it
    (name,) = caches(tmp_path)
    assert name.startswith("set-32-train-") and len(name) == len("set-32-train-") + 12 + len(".npz")
    with np.load(tmp_path / name) as saved:
        assert np.array_equal(saved["x"], first)
        assert saved["good"].tolist() == [0, 1, 2, 3]
    with monkeypatch.context() as m:
        m.setattr(metrics.Image, "open", lambda *a: pytest.fail("decoded again"))
        again, y = load(root)
        assert torch.equal(first, again) and y.tolist() == [-1] * 4
    before = (home / "2.bmp").stat()
    picture(home / "2.bmp", (77, 0, 0))
    assert (home / "2.bmp").stat().st_size == before.st_size
    os.utime(home / "2.bmp", ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert shades(load(root)[0]) == [0, 1, 3, 77]  # changed
    picture(home / "9.bmp", (9, 0, 0))
    assert shades(load(root)[0]) == [0, 1, 3, 9, 77]  # added
    (home / "0.bmp").rename(home / "8.bmp")
    made = caches(tmp_path)
    assert shades(load(root)[0]) == [0, 1, 3, 9, 77]  # renamed: another order
    assert len(made) == len(caches(tmp_path)) == 1 and caches(tmp_path) != made  # in place of the one before
    (home / "1.bmp").unlink()
    assert shades(load(root)[0]) == [0, 3, 9, 77]  # removed
    assert load(root, 28)[0].shape == (4, 3, 28, 28)  # another size
    load(root, split="test")
    kinds = [name[:-17] for name in caches(tmp_path)]
    assert kinds == ["set-28-train", "set-32-test", "set-32-train"]


def test_two_runs_of_one_folder_started_together_keep_its_cache(tmp_path, monkeypatch, capsys):
    """Two seeds: the first is half done with writing when the second begins and ends."""
    root, savez, nested = tmp_path / "set", np.savez, []
    for i in range(4):
        picture(alone(root) / f"{i}.png", (i, 0, 0))

    def slow(file, **arrays):
        if not nested:
            nested.append(file.write(b"half"))
            monkeypatch.setattr(os, "getpid", lambda: 2)
            assert shades(load(root)[0]) == [0, 1, 2, 3]
            file.seek(0)
        savez(file, **arrays)

    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(np, "savez", slow)
    for _ in range(2):
        assert shades(load(root)[0]) == [0, 1, 2, 3]
    assert nested and warned(capsys, root) == []
    assert {p.name for p in tmp_path.iterdir()} == {"set", *caches(tmp_path)} and len(caches(tmp_path)) == 1


def test_folder_with_names_that_are_not_utf8(tmp_path, capsys):
    home = alone(tmp_path / "set")
    picture(home / os.fsdecode(b"caf\xe9.png"), (7, 0, 0))
    picture(home / "0.png", (1, 0, 0))
    assert shades(load(tmp_path / "set")[0]) == [1, 7] and warned(capsys, tmp_path / "set") == []


def test_a_class_without_training_pictures_comes_last(tmp_path):
    """Else a conditional G would be asked for what it never saw: labels to train on are 0 to K - 1."""
    for split, kinds in (("train", "bd"), ("test", "abcd")):
        for kind in kinds:
            picture(tmp_path / "set" / split / kind / "0.png", (ord(kind), 0, 0))
    names = {}
    for split in ("train", "test"):
        x, y = load(tmp_path / "set", split=split)
        for c, label in zip(colours(x), y.tolist()):
            assert names.setdefault(chr(c[0]), label) == label
    assert names == {"b": 0, "d": 1, "a": 2, "c": 3}


def damaged(path, kind):
    """A picture that cannot be read; `kind` of damage."""
    picture(path)
    data, short = path.read_bytes(), 4 if path.suffix == ".jpg" else 30
    path.write_bytes(
        {
            "short": data[:-short],
            "half": data[: len(data) // 2],
            "empty": b"",
            "head": data[:8],
            "text": b"not a picture\n" * 9,
        }[kind]
    )


@pytest.mark.parametrize("kind", ["short", "half", "empty", "head", "text"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_that_cannot_be_read_is_left_out_counted_and_named(tmp_path, capsys, kind, suffix):
    """The others keep their labels. Another run, from the cache, says it too."""
    root, home = tmp_path / "set", alone(tmp_path / "set")
    for i in range(4):
        for label in "ab":
            picture(home / label / f"{i}.png", (10 * i, ord(label), 0))
    damaged(home / "a" / f"so bad.{suffix}", kind)
    x, y = load(root)
    (line,) = warned(capsys, root)
    assert line.startswith("left out 1 of 9 files: ") and str(home / "a" / f"so bad.{suffix}") in line
    assert len(x) == len(y) == 8 and shades(x) == [0, 0, 10, 10, 20, 20, 30, 30]
    assert [c[1] - ord("a") for c in colours(x)] == y.tolist()
    metrics.warn_once.cache_clear()
    again, labels = load(root)
    assert torch.equal(again, x) and torch.equal(labels, y) and warned(capsys, root) == [line]


def test_many_pictures_that_cannot_be_read_are_one_line(tmp_path, capsys):
    root, home = tmp_path / "set", alone(tmp_path / "set")
    for i in range(9):
        picture(home / f"{i}.png", (i, 0, 0))
    for i in range(7):
        damaged(home / f"bad {i}.jpg", "short")
    x, y = load(root)
    (line,) = warned(capsys, root)
    assert len(x) == len(y) == 9 and shades(x) == [*range(9)]
    assert line.startswith("left out 7 of 16 ") and 1 <= line.count("bad ") <= 7


def test_a_folder_of_which_no_picture_can_be_read_is_an_error(tmp_path, capsys):
    for i in range(3):
        damaged(tmp_path / f"set/{i}.png", "half")
    with pytest.raises(SystemExit) as stop:
        load(tmp_path / "set")
    *left_out, last = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "error: " in last and str(tmp_path / "set") in last and len(left_out) <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("content", ["none", "empty", "text", "one split empty"])
def test_a_folder_without_pictures_is_one_line(tmp_path, capsys, content, monkeypatch):
    root = tmp_path / "set"
    if content != "none":
        root.mkdir()
    if content == "text":
        (root / "a.txt").write_text("a")
    if content == "one split empty":
        (root / "train").mkdir()
        picture(root / "test/a.png")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    for module, argv in ((dcgan, []), (cdcgan, []), (wgan_clip, ["--conditional"])):
        with pytest.raises(SystemExit) as stop:
            module.main([*ONE, *argv, "--dataset", "folder", "--data-dir", str(root), "--steps", "1"])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and str(root) in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unlabelled_folder_is_one_line_for_conditional_scripts_and_trains_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    for i in range(12):
        picture(tmp_path / f"set/{i:02}.png", (20 * i, 0, 0))
    flags = [*ONE, "--dataset", "folder", "--data-dir", "set", "--steps", "1", "--eval-every", "0", "--run-dir"]
    for module, argv in ((cdcgan, []), (wgan_clip, ["--conditional"])):
        with pytest.raises(SystemExit) as stop:
            module.main([*flags, "run", *argv])
        (line,) = warned(capsys, "set")
        assert stop.value.code == 2 and "label" in line and not Path("run").exists()
    for module in (dcgan, wgan_clip):
        module.main([*flags, module.__name__])
        assert Image.open(f"{module.__name__}/samples.png").mode == "RGB"


# torchvision's and CelebA's files -------------------------------------------------------------------------------------


def test_cifar10_channels_come_first(monkeypatch, tmp_path):
    import torchvision.datasets

    rng, asked = np.random.RandomState(0), []
    data = {train: rng.randint(0, 256, (n, 32, 32, 3), np.uint8) for train, n in ((True, 12), (False, 7))}

    def cifar10(root, train, download):
        asked.append((root, train))
        return SimpleNamespace(
            data=data[train], targets=[i % 10 for i in range(len(data[train]))], classes=list("abcdefghij")
        )

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar10)
    for split, train in (("train", True), ("test", False)):
        x, y, names = metrics.load_data("cifar10", str(tmp_path), 32, split)
        assert x.dtype == torch.uint8 and y.dtype == torch.int64 and x.shape == (len(data[train]), 3, 32, 32)
        assert np.array_equal(x.numpy(), data[train].transpose(0, 3, 1, 2))
        assert y.tolist() == [i % 10 for i in range(len(y))] and names == list("abcdefghij")
    assert asked == [(str(tmp_path), True), (str(tmp_path), False)]
    assert metrics.load_data("cifar10", str(tmp_path), 64, "train")[0].shape == (12, 3, 64, 64)


def test_a_set_of_torchvision_that_names_no_classes(monkeypatch, tmp_path):
    """USPS has none. Its labels are its names."""
    import torchvision.datasets

    data = SimpleNamespace(data=np.zeros((4, 16, 16), np.uint8), targets=[0, 2, 1, 2])
    monkeypatch.setattr(torchvision.datasets, "USPS", lambda root, train, download: data, raising=False)
    monkeypatch.setitem(metrics.TORCHVISION, "usps", ("USPS", "usps"))
    monkeypatch.setitem(metrics.CHANNELS, "usps", 1)
    x, y, names = metrics.load_data("usps", str(tmp_path), 16, "train")
    assert x.shape == (4, 1, 16, 16) and y.tolist() == [0, 2, 1, 2] and names == ["0", "1", "2"]


@pytest.mark.parametrize("fault", ["float images", "eight labels each", "grey for colour"])
def test_a_set_of_ones_own_that_is_not_as_wanted_is_one_line(monkeypatch, tmp_path, capsys, fault):
    """QMNIST has eight numbers for each label. Images from 0 to 1 would train as nearly black ones."""
    import torchvision.datasets

    data = SimpleNamespace(data=np.zeros((4, 16, 16), np.uint8), targets=[0, 2, 1, 2])
    channels = 1
    if fault == "float images":
        data.data = np.zeros((4, 16, 16), np.float32)
    elif fault == "eight labels each":
        data.targets = np.zeros((4, 8), np.int64)
    else:
        channels = 3
    monkeypatch.setattr(torchvision.datasets, "USPS", lambda root, train, download: data, raising=False)
    monkeypatch.setitem(metrics.TORCHVISION, "usps", ("USPS", "usps"))
    monkeypatch.setitem(metrics.CHANNELS, "usps", channels)
    with pytest.raises(SystemExit) as stop:
        metrics.load_data("usps", str(tmp_path), 16, "train")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert f"they have to be torch.uint8 (4, {channels}, 16, 16) and (4,)" in err


def test_a_set_that_takes_no_train_is_not_called_missing(monkeypatch, tmp_path, capsys):
    """SVHN takes split=. Its files may well be there."""
    monkeypatch.setitem(metrics.TORCHVISION, "svhn", ("SVHN", "svhn"))
    monkeypatch.setitem(metrics.CHANNELS, "svhn", 3)
    with pytest.raises(SystemExit):
        metrics.load_data("svhn", str(tmp_path), 32, "train")
    err = capsys.readouterr().err
    assert "unexpected keyword argument 'train'. Write its images to a folder" in err and "no download" not in err


def test_a_colour_set_of_ones_own_has_the_settings_of_colour(monkeypatch):
    """README: a line in CHANNELS and TORCHVISION, and one in COLOUR_SIDES."""
    monkeypatch.setitem(metrics.CHANNELS, "cifar100", 3)
    monkeypatch.setitem(dcgan.COLOUR_SIDES, "cifar100", 32)
    args = vars(dcgan.parse_args(["--dataset", "cifar100"]))
    like = vars(dcgan.parse_args(["--dataset", "cifar10"]))
    assert {name for name in args if args[name] != like[name]} == {"dataset", "run_dir"}
    assert (args["image_size"], args["batch_size"], args["ngf"]) == (32, 16, 32)


def test_cifar10_without_files_or_network_is_one_line(monkeypatch, tmp_path, capsys):
    import torchvision.datasets

    def refused(*a, **k):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refused)
    with pytest.raises(SystemExit) as stop:
        metrics.load_data("cifar10", str(tmp_path), 32, "train")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "cifar-10-batches-py" in err and "no network" in err
    assert list(tmp_path.iterdir()) == []


def test_celeba_is_torchvisions_list_and_the_files_beside_it(tmp_path, capsys, monkeypatch):
    """What is in which split is torchvision's affair; the pictures are those of its list, in its order."""
    import torchvision.datasets

    base = tmp_path / "celeba"
    for i in range(6):
        picture(base / f"img_align_celeba/{i:06}.jpg", (30 * i,) * 3, (178, 218))
    splits, asked = {"train": [5, 0, 1], "test": [3, 4]}, []

    def celeba(root, split, download):
        asked.append((root, split, download))
        return SimpleNamespace(filename=[f"{i:06}.jpg" for i in splits[split]])

    monkeypatch.setattr(torchvision.datasets, "CelebA", celeba)
    for split, wanted in splits.items():
        x, y, names = metrics.load_data("celeba", str(tmp_path), 32, split)
        assert x.shape == (len(wanted), 3, 32, 32) and y.tolist() == [-1] * len(wanted) and names == []
        assert [round(p.double().mean().item() / 30) for p in x] == wanted
    assert asked == [(str(tmp_path), "train", True), (str(tmp_path), "test", True)]
    assert len(caches(base)) == 2  # decoded once


def test_celeba_without_files_or_gdown_is_one_line(tmp_path, capsys, monkeypatch):
    import torchvision.datasets

    def refused(root, *a, **k):
        (tmp_path / "celeba").mkdir()  # as where gdown is there and the network is not
        raise RuntimeError("To download files from GDrive,\n'gdown' is required.")

    monkeypatch.setattr(torchvision.datasets, "CelebA", refused)
    with pytest.raises(SystemExit) as stop:
        metrics.load_data("celeba", str(tmp_path), 32, "train")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and str(tmp_path / "celeba") in err and "gdown" in err
    assert list(tmp_path.iterdir()) == []


# names of files


def test_a_folder_of_images_has_to_be_named(capsys):
    """Without --data-dir it would be all pictures below ./data, those of other sets among them."""
    with pytest.raises(SystemExit):
        dcgan.parse_args(["--dataset", "folder"])
    assert "--dataset folder needs --data-dir, the folder of the images" in capsys.readouterr().err
    assert dcgan.parse_args(["--dataset", "folder", "--data-dir", "data"]).data_dir == "data"


def test_a_tilde_is_the_users_folder(monkeypatch, tmp_path):
    """A shell leaves the one of --run-dir=~/x as it is: a folder named ~ was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    args = dcgan.parse_args(["--run-dir=~/x", "--data-dir=~/y", "--dataset", "folder"])
    assert (args.run_dir, args.data_dir) == (f"{tmp_path}/x", f"{tmp_path}/y")


def test_load_refuses_the_checkpoint_of_another_script(tmp_path, capsys):
    """The G of some scripts are alike, so it would load in silence."""
    torch.save(dict(script="mdgan", args={}, step=1, classes={}, seconds=0, rng={}), tmp_path / "x.pt")
    with pytest.raises(SystemExit):
        dcgan.load(tmp_path / "x.pt")
    assert f"{tmp_path / 'x.pt'} is a checkpoint of mdgan.py" in capsys.readouterr().err
