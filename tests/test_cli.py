"""metrics.py as a command and in the training loop; the classifier; the data."""
import csv
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
import unrolled
import wgan_gp

ROOT = Path(metrics.__file__).parent
MNIST = ROOT / "data/MNIST/raw/train-images-idx3-ubyte"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data folder with a trained classifier of the rendered digits."""
    path = tmp_path_factory.mktemp("data")
    metrics.classifier("digits", path, torch.device("cpu"), say=lambda text: None)
    return path


# data -----------------------------------------------------------------------------------------------------------------


def test_digits_are_labelled_deterministic_and_split():
    x, y = metrics.load_data("digits", "data", 28, "train")
    again, _ = wgan_gp.load_data("digits", "data", 28, "train")
    test, y_test = metrics.load_data("digits", "data", 28, "test")
    assert x.shape == (20_000, 1, 28, 28) and x.dtype == torch.uint8 and torch.equal(x, again)
    assert test.shape == (10_000, 1, 28, 28) and torch.bincount(y).tolist() == [2000] * 10
    assert torch.bincount(y_test).tolist() == [1000] * 10
    assert not torch.equal(metrics.render_digits(50, 1)[0], metrics.render_digits(50, 2)[0])  # train and test differ
    assert x.flatten(1).amax(1).min() > 100 and 0.08 < x.float().mean() / 255 < 0.18  # strokes on black; MNIST: .13
    assert len({bytes(p.flatten().tolist()) for p in x[:3000]}) == 3000


def test_fit_pads_28_to_32_and_averages_down():
    x = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    padded = metrics.fit(x, 32)
    assert torch.equal(padded[..., 2:-2, 2:-2], x) and padded.sum() == x.sum()
    assert metrics.fit(x, 64).shape == (3, 1, 64, 64) and torch.equal(metrics.fit(x, 28), x)
    flat = torch.full((1, 3, 100, 100), 77, dtype=torch.uint8)
    assert (metrics.fit(flat, 64) == 77).all()


def test_mnist_from_files(tmp_path):
    """Four small IDX files under the folder are read without a network."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    rng, made = np.random.RandomState(0), {}
    for name, n in (("train", 30), ("t10k", 20)):
        x, y = made[name] = rng.randint(0, 256, (n, 28, 28), np.uint8), rng.randint(0, 10, n).astype(np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(np.array([2051, n, 28, 28], ">i4").tobytes() + x.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(np.array([2049, n], ">i4").tobytes() + y.tobytes())
    for name, split in (("train", "train"), ("t10k", "test")):
        x, y = metrics.load_data("mnist", tmp_path, 28, split)
        assert np.array_equal(x.numpy()[:, 0], made[name][0]) and np.array_equal(y.numpy(), made[name][1])


def test_stacked_digits_are_three_at_random_and_labelled_by_all_three():
    x = torch.arange(20).view(20, 1, 1, 1) * 10 + torch.arange(4).view(1, 1, 2, 2)  # picture i is 10 i + its pixel
    y = torch.arange(20) % 10
    stacked, labels = metrics.stack(x.byte(), y, 5000, 3)
    assert stacked.shape == (5000, 3, 2, 2) and stacked.dtype == torch.uint8
    assert labels.shape == (5000,) and labels.dtype == torch.int64
    which = stacked[:, :, 0, 0].long() // 10
    assert torch.equal(stacked.long(), 10 * which[:, :, None, None] + torch.arange(4).view(2, 2))  # whole pictures
    red, green, blue = (which % 10).T
    assert torch.equal(labels, 100 * red + 10 * green + blue)
    for channel in which.T:  # each independent and even: 250 of each picture, give or take five deviations
        assert (torch.bincount(channel, minlength=20) - 250).abs().max() < 80
    assert abs(torch.corrcoef(which.T.double()) - torch.eye(3)).max() < 0.07
    assert len(labels.unique()) > 980 and labels.max() == 999 and labels.min() == 0
    again, other = wgan_gp.stack(x.byte(), y, 5000, 3), metrics.stack(x.byte(), y, 5000, 4)
    assert torch.equal(again[0], stacked) and torch.equal(again[1], labels) and not torch.equal(other[1], labels)


@functools.cache
def digits(split):
    return metrics.load_data("digits", "data", 28, split)


@pytest.fixture
def stacked_digits(monkeypatch):
    """stacked_mnist out of the rendered digits, a few hundred in place of 128,000; returns the sizes asked for."""
    asked = []
    for module in (metrics, unrolled):
        def few(x, y, n, seed, stack=module.stack):
            asked.append((len(x), n, seed))
            return stack(x, y, 300, seed)

        monkeypatch.setattr(module, "stack", few)
        monkeypatch.setattr(module, "torchvision_data", lambda name, root, split: {"mnist": digits}[name](split))
    return asked


def test_stacked_mnist_is_drawn_from_its_own_split_of_mnist(stacked_digits):
    (train, y), (test, y_test) = (metrics.load_data("stacked_mnist", "data", 28, s) for s in ("train", "test"))
    assert stacked_digits == [(20_000, 128_000, 3), (10_000, 26_000, 4)]
    for x, labels, split in ((train, y, "train"), (test, y_test, "test")):
        known = {p.numpy().tobytes(): int(c) for p, c in zip(*digits(split))}
        read = [[known[c.numpy().tobytes()] for c in p] for p in x]
        assert (np.array(read) @ [100, 10, 1]).tolist() == labels.tolist()
    ours = unrolled.load_data("stacked_mnist", "data", 32, "train", 20)
    assert torch.equal(ours[0], metrics.fit(train[:20], 32)) and torch.equal(ours[1], y[:20])
    assert metrics.DATASETS["stacked_mnist"] == unrolled.DATASETS["stacked_mnist"] == 3


# the classifier -------------------------------------------------------------------------------------------------------


def test_classifier_is_cached_and_leaves_the_callers_stream_alone(data_dir):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    said = []
    net = metrics.classifier("digits", data_dir, torch.device("cpu"), say=said.append)
    assert len(said) == 1 and net.name in said[0]  # loaded, not trained
    assert net.accuracy > 0.99
    metrics.classifier("digits", data_dir, torch.device("cpu"), limit=200, say=said.append)
    assert torch.equal(torch.get_rng_state(), state)
    x, y = metrics.load_data("digits", data_dir, 28, "test")
    assert (net.embed(x)[1].argmax(1) == y).double().mean().item() == net.accuracy


def test_a_damaged_classifier_is_trained_again_and_one_that_cannot_be_kept_is_used(data_dir, tmp_path, monkeypatch):
    good = torch.load(data_dir / "classifier-digits-v1.pt", weights_only=True)
    trained = metrics.Classifier(1, 10)
    trained.load_state_dict(good["net"])
    monkeypatch.setattr(metrics, "train_classifier", lambda *a, **k: trained)
    path, said = tmp_path / "classifier-digits-v1.pt", []
    path.write_bytes((data_dir / path.name).read_bytes()[:5000])
    net = metrics.classifier("digits", tmp_path, torch.device("cpu"), say=said.append)
    assert "damaged" in said[0] and net.accuracy == good["accuracy"]
    assert torch.load(path, weights_only=True)["accuracy"] == good["accuracy"]
    (tmp_path / "file").write_text("mine")
    said.clear()
    net = metrics.classifier("digits", tmp_path / "file", torch.device("cpu"), say=said.append)
    assert net.accuracy == good["accuracy"] and any("could not be kept" in line for line in said)


def test_judge_leaves_mps_for_the_cpu(monkeypatch, data_dir):
    asked = []
    real = metrics.classifier
    monkeypatch.setattr(metrics, "classifier", lambda name, folder, device, *a: asked.append(device) or real(
        name, folder, torch.device("cpu"), *a))
    metrics.Judge("digits", data_dir, 28, torch.device("mps:0"), n=100, say=lambda text: None)
    assert asked == [torch.device("cpu")]


def test_classifier_of_stacked_mnist_reads_all_three_digits(data_dir, tmp_path, stacked_digits):
    shutil.copy(data_dir / "classifier-digits-v1.pt", tmp_path / "classifier-mnist-v1.pt")
    said = []
    net = metrics.classifier("stacked_mnist", tmp_path, torch.device("cpu"), say=said.append)
    assert len(said) == 1 and said[0].startswith("classifier-mnist/128 ")  # that of single digits, loaded
    x, y = metrics.load_data("stacked_mnist", tmp_path, 32, "test")
    features, joint = net.embed(x)
    assert features.shape == (300, 384) and (joint.argmax(1) == y).double().mean() > 0.95
    assert (features.shape[1], net.name.split()[-2]) == (384, "channels/384")


@pytest.mark.skipif(not MNIST.exists(), reason="real MNIST is not under data/: the classifier's 99 % is not checked")
def test_classifier_reaches_99_percent_of_mnist(tmp_path):
    (tmp_path / "MNIST").symlink_to(MNIST.parents[1])
    net = metrics.classifier("mnist", tmp_path, torch.device("cpu"))
    assert net.accuracy >= 0.99


# the command ----------------------------------------------------------------------------------------------------------


def run(capsys, *argv):
    capsys.readouterr()
    metrics.main([str(a) for a in argv])
    return capsys.readouterr().out


def test_folder_npy_and_pt_score_alike_and_real_scores_at_the_floor(data_dir, tmp_path, capsys):
    x, _ = metrics.load_data("digits", data_dir, 28, "train")
    x = x[5000:5400]
    (tmp_path / "png").mkdir()
    for i, p in enumerate(x):
        Image.fromarray(p[0].numpy()).save(tmp_path / f"png/{i:05}.png")
    np.save(tmp_path / "x.npy", x.numpy())
    torch.save(x, tmp_path / "x.pt")
    scores = [json.loads(run(capsys, "--real", "digits", "--fake", tmp_path / f, "--data-dir", data_dir, "--json"))
              for f in ("png", "x.npy", "x.pt")]
    assert scores[0] == scores[1] == scores[2]
    s = scores[0]
    assert s["n_real"] == s["n_fake"] == 400 and s["classes"] == 10 and s["class_min"] == s["class_max"] == 0.1
    assert s["fid"] < 2 * s["floor"] and s["inception_score"] > 9 and s["coverage"] > 0.9
    line = run(capsys, "--real", "digits", "--fake", tmp_path / "x.pt", "--data-dir", data_dir)
    assert s["features"] in line and f"{s['fid']:.1f}" in line and "floor" in line and "n 400 + 400" in line


def test_a_folder_against_a_folder_and_noise_scores_far_off(data_dir, tmp_path, capsys):
    x, _ = metrics.load_data("digits", data_dir, 28, "test")
    torch.save(x[:300], tmp_path / "real.pt")
    torch.save(torch.randint(0, 256, (300, 1, 28, 28), dtype=torch.uint8), tmp_path / "noise.pt")
    flags = ["--classifier", "digits", "--data-dir", data_dir, "--json", "--real", tmp_path / "real.pt", "--fake"]
    same, noise = (json.loads(run(capsys, *flags, tmp_path / f)) for f in ("real.pt", "noise.pt"))
    assert same["fid"] < 1e-6 and same["coverage"] == 1 and same["mode_score"] > 9
    assert noise["fid"] > 20 * noise["floor"] and noise["coverage"] < 0.05 and noise["class_max"] > 0.3


def test_the_command_counts_the_modes_of_stacked_digits(data_dir, tmp_path, capsys, stacked_digits):
    shutil.copy(data_dir / "classifier-digits-v1.pt", tmp_path / "classifier-mnist-v1.pt")
    x, y = metrics.load_data("stacked_mnist", tmp_path, 28, "test")
    few = x[y < 500][:90]
    torch.save(few.repeat(2, 1, 1, 1), tmp_path / "x.pt")
    flags = ["--real", "stacked_mnist", "--fake", tmp_path / "x.pt", "--data-dir", tmp_path]
    s = json.loads(run(capsys, *flags, "--json"))
    read = metrics.classifier("stacked_mnist", tmp_path, torch.device("cpu"), say=str).embed(few)[1].argmax(1).numpy()
    share = np.unique(read, return_counts=True)[1] / 90
    assert s["modes"] == len(share) > 50 and s["modes_kl"] == pytest.approx((share * np.log(1000 * share)).sum())
    assert s["n_real"] == s["n_fake"] == 180 and s["features"].startswith("classifier-mnist on each of 3 channels/384")
    assert f"of 1000, KL {s['modes_kl']:.3f} to the uniform law" in run(capsys, *flags)


@pytest.mark.parametrize("name, content, named", [
    ("none", None, "none"), ("empty", {}, "empty"), ("cut", {"a.png": b"\x89PNG\r\n", "b.png": (8, 8)}, "a.png"),
    ("mixed", {"a.png": (8, 8), "b.png": (9, 9)}, "b.png"), ("one", {"a.png": (28, 28)}, "one"),
    ("wide", {"a.png": (8, 28), "b.png": (8, 28)}, "wide"), ("deep", {"a.png": "I;16", "b.png": "I;16"}, "a.png"),
    ("float.npy", np.zeros((4, 1, 28, 28)), "float.npy"), ("flat.npy", np.zeros((4, 784), np.uint8), "flat.npy"),
    ("wide.npy", np.zeros((4, 1, 20, 28), np.uint8), "wide.npy")])
def test_unusable_pictures_are_one_line(data_dir, tmp_path, capsys, name, content, named):
    if isinstance(content, dict):
        (tmp_path / name).mkdir()
        for f, c in content.items():
            if isinstance(c, bytes):
                (tmp_path / name / f).write_bytes(c)
            else:
                Image.new("L" if c != "I;16" else "I;16", c if c != "I;16" else (28, 28)).save(tmp_path / name / f)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(SystemExit) as stop:
        metrics.main(["--real", "digits", "--fake", str(tmp_path / name), "--data-dir", str(data_dir)])
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and named in err[-1] and "error" in err[-1] and "Traceback" not in "".join(err)


def test_another_classifier_scores_the_named_data(data_dir, tmp_path, capsys, monkeypatch):
    load = metrics.load_data  # a stand-in for mnist: the digits turned by 180 degrees
    monkeypatch.setattr(metrics, "load_data", lambda name, *a: load("digits", *a) if name == "digits" else (
        load("digits", *a)[0].flip(2, 3), load("digits", *a)[1]))
    torch.save(load("digits", data_dir, 28, "train")[0][:300], tmp_path / "x.pt")
    flags = ["--classifier", "digits", "--data-dir", data_dir, "--json", "--fake", tmp_path / "x.pt", "--real"]
    own, other = (json.loads(run(capsys, *flags, name)) for name in ("digits", "mnist"))
    assert other["fid"] > 20 * own["fid"] and other["floor"] == own["floor"]


def test_out_paths_that_cannot_be_written_are_one_line(tmp_path, capsys):
    (tmp_path / "log.csv").write_text("step,d_loss\n1,2\n")
    for out in ("nodir/c.png", "noextension"):
        with pytest.raises(SystemExit) as stop:
            metrics.main(["--plot", str(tmp_path), "-o", str(tmp_path / out)])
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_command_itself(tmp_path):
    command = [sys.executable, str(ROOT / "metrics.py"), "--plot", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


# plots ----------------------------------------------------------------------------------------------------------------


def test_plot_draws_every_curve_where_it_belongs(tmp_path, capsys):
    for name, slope in (("up", 1), ("down", -1)):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "log.csv", "w") as f:
            f.write("step,d_loss,fid\n" + "".join(f"{i},{slope * i},\n" for i in range(100)) + "50,,200\n100,,100\n")
    metrics.main(["--plot", str(tmp_path / "up"), str(tmp_path / "down"), "-o", str(tmp_path / "c.png")])
    image = np.asarray(Image.open(tmp_path / "c.png")).astype(int)
    assert image.shape == (260 + 44, 880, 3)
    for colour, slope in zip(metrics.COLOURS, (1, -1)):
        rgb = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
        rows, columns = np.nonzero(np.abs(image[60:, 62:400] - rgb).sum(2) < 30)  # the first panel, below the legend
        assert len(rows) > 150 and np.corrcoef(rows, columns)[0, 1] * slope < -0.99
    assert metrics.ticks(0, 100) == [0, 20, 40, 60, 80, 100] and metrics.ticks(-1, 1) == [-1, -0.5, 0, 0.5, 1]


def test_a_log_without_rows_is_one_line(tmp_path, capsys):
    (tmp_path / "log.csv").write_text("step,d_loss\n")
    with pytest.raises(SystemExit) as stop:
        metrics.main(["--plot", str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# evaluation in training -----------------------------------------------------------------------------------------------


def test_scores_in_the_log_are_those_of_the_saved_samples(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "Judge", functools.partial(metrics.Judge, n=1000))  # ten times faster
    flags = ["--image-size", "28", "--ngf", "4", "--ndf", "4", "--batch-size", "16", "--steps", "20", "--device", "cpu",
             "--data-dir", str(data_dir)]
    wgan_gp.main([*flags, "--eval-every", "10", "--run-dir", "a"])
    rows = [r for r in csv.DictReader(open("a/log.csv")) if r["fid"]]
    assert [r["step"] for r in rows] == ["10", "20"]
    final = json.loads(Path("a/scores.json").read_text())
    assert set(final) == {"last.pt", "best.pt"} and final["last.pt"]["n_fake"] == 1000
    best = min(rows, key=lambda r: float(r["fid_train"]))
    saved = torch.load("a/best.pt", weights_only=True)
    assert saved["step"] == int(best["step"]) and f"{saved['state']['best_fid']:.6g}" == best["fid_train"]
    assert os.path.exists("a/curves.png")
    # evaluation took nothing from the training's stream: the same run without it ends with the same weights
    wgan_gp.main([*flags, "--eval-every", "0", "--run-dir", "b"])
    a, b = (torch.load(f"{d}/last.pt", weights_only=True) for d in "ab")
    assert all(torch.equal(a["ema"][k], b["ema"][k]) for k in a["ema"])
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])


def test_a_run_on_stacked_digits_logs_its_modes(data_dir, tmp_path, monkeypatch, stacked_digits):
    monkeypatch.chdir(tmp_path)
    shutil.copy(data_dir / "classifier-digits-v1.pt", tmp_path / "classifier-mnist-v1.pt")
    real = metrics.classifier  # a dry run would train one that cannot tell anything
    monkeypatch.setattr(metrics, "classifier", lambda name, folder, device, *a: real(name, tmp_path, device))
    unrolled.main(["--dataset", "stacked_mnist", "--image-size", "28", "--ngf", "4", "--ndf", "4", "--k", "1",
                   "--device", "cpu", "--dry-run", "--run-dir", "a"])
    scores = json.loads(Path("a/scores.json").read_text())["last.pt"]
    assert scores["n_real"] == 256 and 1 <= scores["modes"] <= 256 and 150 < scores["modes_real"] < 256
    rows = [r for r in csv.DictReader(open("a/log.csv")) if r["modes"]]
    assert [r["step"] for r in rows] == ["1", "2"]
    assert 0 < float(rows[0]["modes_kl"]) <= 6.90776  # log 1000, in the six digits of log.csv
    assert Image.open("a/samples.png").mode == "RGB"
    assert torch.load("a/last.pt", weights_only=True)["args"]["classes"] > 900


def test_without_metrics_there_are_no_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wgan_gp, "SCRIPT", Path(shutil.copy(ROOT / "wgan_gp.py", tmp_path)))
    wgan_gp.main(["--dry-run", "--device", "cpu", "--run-dir", "a"])
    assert "no scores" in capsys.readouterr().out and not Path("a/scores.json").exists()
