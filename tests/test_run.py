"""The run: exact resume, signals, checkpoints, errors, figures, generation. Tiny networks on rendered digits."""
import argparse
import csv
import difflib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bigan
import cdcgan
import dcgan
import mdgan
import metrics
import unrolled
import wgan_clip
import wgan_gp

ROOT = Path(wgan_gp.__file__).parent
TINY = ["--paper", "--image-size", "28", "--ngf", "4", "--ndf", "4", "--latent-dim", "6", "--batch-size", "8",
        "--device", "cpu",
        "--log-every", "5", "--sample-every", "20", "--eval-every", "0"]
LIKE_WGAN_GP = ["--d-steps", "5", "--lr-g", "1e-4", "--lr-d", "1e-4"]  # so that one schedule suits all


class Case:
    """A script and the flags of a tiny run of it; every other attribute is the script's own."""

    def __init__(self, module, *flags):
        self.module, self.name, self.tiny = module, module.__name__, [*TINY, *flags]
        self.told = module is cdcgan or "--conditional" in flags  # G takes a label
        self.size = 32 if "32" in flags else 28
        self.figures = {"interpolation_classes.png"} if "--conditional" in flags else (
            {"reconstructions.png", "interpolation_real.png"} if module is bigan else set())  # beside everyone's

    def __getattr__(self, name):
        return getattr(self.module, name)

    def networks(self, checkpoint):
        """The averaged G and D of a checkpoint, for use; D as a function of x and y, bigan.py's also of x's code z."""
        args = argparse.Namespace(**checkpoint["args"])
        G, D = self.make_generator(args, 1), self.make_discriminator(args, 1).eval()
        ema = torch.nn.ModuleDict({"G": G, "E": bigan.make_encoder(args, 1)}) if self.module is bigan else G
        ema.eval().load_state_dict(checkpoint["ema"]), D.load_state_dict(checkpoint["nets"]["D"])
        if self.module is bigan:
            return G, lambda x, y=None, z=None: D(x, ema.E(x) if z is None else z)
        return G, lambda x, y=None: D(x, y) if self.told else D(x)


CASES = {"wgan_gp": Case(wgan_gp), "dcgan": Case(dcgan, *LIKE_WGAN_GP, "--gp", ".1", "--d-norm", "none"),
         "cdcgan": Case(cdcgan, *LIKE_WGAN_GP, "--image-size", "32"), "wgan_clip": Case(wgan_clip, *LIKE_WGAN_GP),
         "conditional": Case(wgan_clip, *LIKE_WGAN_GP, "--conditional", "--optimizer", "adam"),
         "unrolled": Case(unrolled, *LIKE_WGAN_GP, "--k", "1"), "mdgan": Case(mdgan, *LIKE_WGAN_GP),
         "bigan": Case(bigan, *LIKE_WGAN_GP)}


def over(*names):
    return pytest.mark.parametrize("w", names, indirect=True)


EVERY = over(*CASES)  # tests without such a mark are of shared blocks: wgan_gp stands for all


@pytest.fixture
def w(request):
    return CASES[getattr(request, "param", "wgan_gp")]


rendered = functools.cache(wgan_gp.render_digits)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """300 digits instead of 20,000, the script on its own (no scores), the working folder a temporary one. What a run
    leaves of its signal handlers goes."""
    (tmp_path / "alone").mkdir()
    for module in {case.module for case in CASES.values()}:
        monkeypatch.setattr(module, "render_digits", lambda n, seed: rendered(300, seed))
        alone = Path(shutil.copy(module.__file__, tmp_path / "alone"))
        monkeypatch.setattr(module, "SCRIPT", alone)
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in handlers.items(): signal.signal(s, handler)


@pytest.fixture(scope="session")
def kept_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def ran(w, kept_runs):
    """A run of w with these flags in folder `name` here: trained once a session, copied from then on."""
    def run(name, *flags):
        key = hashlib.sha256(repr((w.tiny, w.name, name, flags)).encode()).hexdigest()[:16]
        if not (kept_runs / key).exists():
            w.main([*w.tiny, *flags, "--run-dir", name])
            shutil.copytree(name, kept_runs / key)
        else:
            shutil.copytree(kept_runs / key, name)
    return run


def same(a, b, path=""):
    """Every leaf of two checkpoints equal, tensors bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            same(a[k], b[k], f"{path}/{k}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}/{i}")
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


def tensors(path):
    checkpoint = torch.load(path, weights_only=True)
    return {k: checkpoint[k] for k in ("step", "nets", "ema", "opts", "rng")}


def losses(run):
    rows = list(csv.DictReader((Path(run) / "log.csv").open()))
    columns = list(rows[0]) if rows else []
    logged = columns[columns.index("seconds") + 1:columns.index("images_per_s")] if rows else []
    return [[r.get(k, "") for k in ("step", "g_updates", *logged, "fid_train")] for r in rows]


@pytest.fixture
def whole(ran):
    ran("whole", "--steps", "40", "--lr-decay", "linear", "--checkpoint-every", "0")
    return tensors("whole/last.pt")


# resume ---------------------------------------------------------------------------------------------------------------


@EVERY
def test_sigkill_after_a_checkpoint_resumes_bit_for_bit(w, whole, tmp_path):
    code = (f"import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import {w.name} as w\n"
            "render = w.render_digits; w.render_digits = lambda n, seed: render(300, seed); save = w.save\n"
            "def save_and_die(run, name='last.pt'): save(run, name); os.kill(os.getpid(), signal.SIGKILL)\n"
            "w.save = save_and_die; w.main(sys.argv[1:])")
    flags = [*w.tiny, "--steps", "40", "--run-dir", "cut", "--lr-decay", "linear", "--checkpoint-every", "20"]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "alone"), *flags], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load("cut/last.pt", weights_only=True)["step"] == 20
    w.main(["--resume", "cut/last.pt"])
    same(tensors("cut/last.pt"), whole)
    assert losses("cut") == losses("whole") and len(losses("cut")) == 8
    assert (Path("cut") / "samples.png").read_bytes() == (Path("whole") / "samples.png").read_bytes()


@pytest.mark.parametrize("w, number", [
    ("wgan_gp", signal.SIGINT), ("wgan_gp", signal.SIGTERM), ("dcgan", signal.SIGTERM), ("cdcgan", signal.SIGINT),
    ("wgan_clip", signal.SIGTERM), ("conditional", signal.SIGINT), ("unrolled", signal.SIGTERM),
    ("mdgan", signal.SIGINT), ("bigan", signal.SIGTERM)], indirect=["w"])
def test_a_signal_leaves_a_checkpoint_that_resumes_bit_for_bit(w, whole, monkeypatch, number):
    record = w.Run.record

    def signalled(run, stats):
        record(run, stats)
        if run.step == 15:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(w.Run, "record", signalled)
    with pytest.raises(SystemExit) as stop:
        w.main([*w.tiny, "--steps", "40", "--run-dir", "cut", "--lr-decay", "linear"])
    assert stop.value.code == 128 + number
    assert torch.load("cut/last.pt", weights_only=True)["step"] == 15
    assert not list(Path("cut").glob("*.png"))  # no figures of a run to be continued
    monkeypatch.setattr(w.Run, "record", record)
    w.main(["--resume", "cut/last.pt"])
    same(tensors("cut/last.pt"), whole)


@EVERY
def test_mlp_resumes_bit_for_bit_and_from_another_run_directory(w):
    flags = [*w.tiny, "--arch", "mlp", "--image-size", "28", "--d-steps", "2", "--g-steps", "2", "--prior", "uniform"]
    w.main([*flags, "--steps", "8", "--run-dir", "whole"])
    w.main([*flags, "--steps", "4", "--run-dir", "half"])
    w.main(["--resume", "half/last.pt", "--steps", "8", "--run-dir", "rest"])
    same(tensors("rest/last.pt"), tensors("whole/last.pt"))
    assert torch.load("half/last.pt", weights_only=True)["step"] == 4


@over("wgan_gp", "conditional")
def test_rows_past_the_step_are_dropped(w, whole):
    w.main([*w.tiny, "--steps", "20", "--run-dir", "half", "--lr-decay", "linear", "--sample-every", "10"])
    with open("half/log.csv", "a") as f:
        f.write("25" + "," * (open("half/log.csv").readline().count(",")) + "\n")
    w.main(["--resume", "half/last.pt", "--sample-every", "0"])
    assert [r[0] for r in losses("half")] == ["5", "10", "15", "20"]
    assert sorted(p.name for p in Path("half/samples").iterdir()) == [f"step_{i:07}.png" for i in (0, 10, 20)]


@over("wgan_gp", "wgan_clip")
def test_epochs_steps_and_rates_may_change(w):
    w.main([*w.tiny, "--steps", "5", "--run-dir", "a"])
    w.main(["--resume", "a/last.pt", "--epochs", "1", "--lr-g", "5e-5", "--lr-d", "5e-5", "--log-every", "1"])
    rows = list(csv.DictReader(open("a/log.csv")))
    assert torch.load("a/last.pt", weights_only=True)["step"] == 40  # 300 // 8 = 37, reached by the iteration to 40
    assert rows[0]["lr_g"] == "0.0001" and rows[-1]["lr_g"] == rows[-1]["lr_d"] == "5e-05"
    for flags, end in (("--epochs 2", 75), ("", 75), ("--steps 80", 80), ("--epochs 3 --steps 85", 85)):
        w.main(["--resume", "a/last.pt", *flags.split()])
        assert torch.load("a/last.pt", weights_only=True)["step"] == end, flags


def as_folder(n, folder):
    for i, picture in enumerate(rendered(300, 1)[0][:n, 0]):
        path = Path(folder) / f"{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(path)


@over("wgan_gp", "conditional")
def test_another_seed_makes_other_pictures_of_one_checkpoint(w):
    """With --generate alone may the seed change: the pictures are those of the noise that it makes."""
    w.main([*w.tiny, "--steps", "5", "--run-dir", "a"])
    made = {}
    for name, flags in (("same", []), ("seven", ["--seed", "7"]), ("again", ["--seed", "7"])):
        w.main(["--resume", "a/last.pt", "--generate", "3", *flags, "--generate-to", name])
        made[name] = [Image.open(f"{name}/{i:05}.png").tobytes() for i in range(3)]
    assert made["seven"] == made["again"] and all(x != y for x, y in zip(made["seven"], made["same"]))
    with pytest.raises(SystemExit):
        w.main(["--resume", "a/last.pt", "--seed", "7", "--steps", "10"])


@pytest.mark.parametrize("w", ["dcgan"], indirect=True)
def test_a_folders_first_line_counts_what_was_read_and_set_aside(w, capsys):
    """42 files: every tenth, four, are for testing; of the other 38 one is cut short."""
    as_folder(42, "data")
    order = sorted(Path("data").rglob("*.png"), key=lambda p: hashlib.sha256(
        p.relative_to("data").as_posix().encode()).digest())
    order[3].write_bytes(order[3].read_bytes()[:60])
    w.main([*w.tiny, "--dataset", "folder", "--data-dir", "data", "--steps", "5", "--run-dir", "a"])
    out = capsys.readouterr()
    assert "data: 37 pictures read, 4 more set aside for testing\n" in out.out
    assert "left out 1 of 38 files" in out.err and str(order[3]) in out.err
    for path in (p for i, p in enumerate(order) if i % 10 == 9): path.write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:  # at the start, not at the first score
        w.main([*w.tiny, "--dataset", "folder", "--data-dir", "data", "--steps", "5", "--run-dir", "b"])
    assert stop.value.code == 2 and "can be read" in capsys.readouterr().err and not Path("b").exists()


def test_other_data_than_the_checkpoint_saw_is_refused(w, monkeypatch, capsys):
    """By the number of pictures and, for a folder, by what is in them; where they lie does not matter."""
    def refused(*flags):
        before = {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            w.main(["--resume", "a/last.pt", "--steps", "10", *flags])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and " saw " in err and "a/last.pt" in err, err
        assert {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()} == before and not Path("b").exists()

    flags = [*w.tiny, "--steps", "5", "--run-dir", "a"]
    w.main(flags)
    with monkeypatch.context() as m:
        m.setattr(w.module, "render_digits", lambda n, seed: rendered(301, seed))
        refused()
        refused("--run-dir", "b")
    shutil.rmtree("a")
    as_folder(30, "here")
    w.main([*flags, "--dataset", "folder", "--data-dir", "here"])
    shutil.copytree("here", "there")
    w.main(["--resume", "a/last.pt", "--data-dir", "there", "--steps", "10"])
    picture = Path("there") / min(p for p in w.list_folder(Path("there"), "train")[0] if p.parts[0] == "1")
    Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture)
    refused("--run-dir", "b")
    refused("--run-dir", "a")
    w.main(["--resume", "a/last.pt", "--data-dir", "here", "--steps", "15"])


# the flags of wgan_gp.py in the args of a checkpoint of before there was one block of plumbing
OLD = ("gp_weight dataset data_dir image_size arch ngf ndf latent_dim prior epochs steps batch_size d_steps g_steps "
       "lr_g lr_d lr_decay patience beta1 beta2 ema seed device amp graph log_every sample_every eval_every "
       "checkpoint_every run_dir resume generate generate_to z_file reject drs_percentile holdout tensorboard dry_run "
       "classes").split()


def test_an_old_checkpoint_resumes(w):
    """Without the data and the flags that came since, with one that went."""
    w.main([*w.tiny, "--steps", "20", "--run-dir", "whole"])
    w.main([*w.tiny, "--steps", "10", "--run-dir", "half"])
    new = torch.load("half/last.pt", weights_only=True)
    args = {k: new["args"][k] for k in OLD} | {"graph": None, "traverse": 10}
    for opt in new["opts"].values():
        for group in opt["param_groups"]: group["betas"] = tuple(group["betas"])
    assert "data" not in args and new["window"].keys() == {"sums", "count"}
    Path("old").mkdir()
    torch.save(new | {"args": args}, "old/last.pt")
    w.main(["--resume", "old/last.pt", "--steps", "20"])
    same(tensors("old/last.pt"), tensors("whole/last.pt"))
    assert losses("old") == losses("whole")[2:]
    w.main(["--resume", "old/last.pt", "--generate", "2"])
    assert len(os.listdir("old/generated")) == 2
    with pytest.raises(SystemExit):  # from here on it knows its data
        as_folder(30, "data")
        w.main(["--resume", "old/last.pt", "--dataset", "folder"])


# the run's name -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w, flags, named", [
    ("wgan_gp", "--gp-weight 1", "gp_weight1.0"), ("dcgan", "--loss minimax", "lossminimax"),
    ("cdcgan", "--d-ignores-label", "d_ignores_label"), ("wgan_clip", "--clip .1", "clip0.1"),
    ("conditional", "--conditional", "conditional"), ("unrolled", "--k 3", "k3"),
    ("mdgan", "--mixture published", "mixturepublished"), ("bigan", "--prior uniform", "prioruniform")], indirect=["w"])
def test_a_runs_name_holds_the_flags_that_were_changed(w, flags, named):
    """Those of the method and of training, not where and how often it writes; few enough for a legend."""
    def parts(*more):
        name = w.parse_args([*more]).name
        assert name.startswith(f"{w.module.__name__}-") and len(name) <= 90
        return name.split("-")[1:]

    assert parts() == ["digits", "paper", "s0"]
    assert parts("--d-steps", str(w.parse_args([]).d_steps), "--beta1", "0.5") == ["digits", "paper", "s0"]
    others = "--eval-every 7 --log-every 7 --epochs 7 --steps 7 --device cpu --data-dir x --seed 3".split()
    data, *flags_of, seed = parts(*flags.split(), *others)
    assert (data, seed) == ("digits", "s3") and sorted(flags_of) == sorted([named, "paper"])
    data, *flags_of, seed = parts(*flags.split(), "--lr-g", "3e-4", "--flip", "--dataset", "mnist", *others)
    assert (data, seed) == ("mnist", "s3") and sorted(flags_of) == sorted([named, "paper", "flip", "lr_g0.0003"])
    many = [*w.tiny, *flags.split(), "--beta1", ".3", "--beta2", ".33", "--lr-d", "7e-4", "--g-steps", "2"]
    whole = {f"{k}{v}".removesuffix("True") for k, v in vars(w.parse_args(many)).items()}
    assert named in parts(*many) and set(parts(*many)[1:-1]) <= whole  # as many as fit, none of them cut


@EVERY
def test_a_resumed_run_keeps_its_name(w):
    sides = [i + j for i, f in enumerate(w.tiny) if f == "--image-size" for j in (0, 1)]
    flags = [f for i, f in enumerate(w.tiny) if i not in sides] + ["--steps", "5", "--run-dir", "a"]
    w.main(flags)
    name = w.parse_args(flags).name
    assert "image_size" not in name
    assert w.parse_args(["--resume", "a/last.pt"]).name == name == json.loads(Path("a/args.json").read_text())["name"]


def test_two_runs_of_one_second_get_two_folders(w, monkeypatch):
    times = [datetime(2026, 1, 2, 3, 4, 5, micro) for micro in (17, 18)]
    monkeypatch.setattr(w.module, "datetime", type("Clock", (), {"now": staticmethod(lambda: times.pop(0))}))
    for _ in range(2): w.main(["--steps", "5", "--gp-weight", "1", "--eval-every", "0", "--device", "cpu"])
    one, two = sorted(Path("runs").iterdir())
    assert one.name == "wgan_gp-digits-gp_weight1.0-paper-s0-20260102-030405-000017" and two.name[:-1] == one.name[:-1]
    assert all((run / "samples.png").exists() for run in (one, two))


# mirrored pictures ----------------------------------------------------------------------------------------------------


def epochs(w, n, first, *flags):
    """Which of 300 pictures are mirrored in each of n epochs, (n, 300), from `first` on, each in its own order."""
    args = w.parse_args([*w.tiny, "--batch-size", "30", *flags])
    batch = w.Batches(args, torch.device("cpu"))
    batch.step, mirrored = first * batch.per_epoch, torch.full((n, 300), -1)
    for i in range(n):
        order = torch.randperm(300, generator=w.seeded(args.seed, 0, first + i))
        for wanted in order.split(30):
            x, index = batch()
            assert torch.equal(index, wanted)
            for picture, j in zip(x, index):
                same, turned = (torch.equal(picture, p) for p in (DATA[j], DATA[j].flip(2)))
                assert same != turned
                mirrored[i, j] = int(turned)
    return mirrored


DATA = wgan_gp.render_digits(300, 1)[0]


def test_flip_mirrors_half_of_the_pictures_as_a_function_of_seed_and_epoch(w, monkeypatch):
    monkeypatch.setattr(w.module, "render_digits", lambda n, seed: (DATA, torch.arange(300)))
    mirrored = epochs(w, 4, 0, "--flip")
    shares = mirrored.double().mean(1)
    assert mirrored.min() == 0 and (shares - 0.5).abs().max() < 5 * 0.5 / 300 ** 0.5, shares
    both = (mirrored[:, None] == mirrored).double().mean(2)[~torch.eye(4, dtype=torch.bool)]
    assert (both - 0.5).abs().max() < 5 * 0.5 / 300 ** 0.5, both  # each epoch draws anew
    assert torch.equal(epochs(w, 2, 2, "--flip"), mirrored[2:])
    assert not torch.equal(epochs(w, 1, 0, "--flip", "--seed", "1"), mirrored[:1])
    assert (epochs(w, 2, 0) == 0).all()


# checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_kill_inside_the_write_leaves_the_old_checkpoint(w, monkeypatch):
    w.main([*w.tiny, "--steps", "5", "--run-dir", "a"])
    before = Path("a/last.pt").read_bytes()
    save = torch.save

    def half(obj, f):
        save(obj, "part")
        f.write(Path("part").read_bytes()[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(SystemExit):
        w.main(["--resume", "a/last.pt", "--steps", "10"])
    assert Path("a/last.pt").read_bytes() == before
    monkeypatch.undo()


def test_a_cut_checkpoint_is_refused_with_one_line(w, capsys):
    w.main([*w.tiny, "--steps", "5", "--run-dir", "a"])
    data = Path("a/last.pt").read_bytes()
    Path("b").mkdir()
    for cut in [0, 1, *np.random.RandomState(0).randint(2, len(data) - 1, 17).tolist(), len(data) - 1]:
        Path("b/cut.pt").write_bytes(data[:cut])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            w.main(["--resume", "b/cut.pt", "--steps", "10"])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and "cut.pt" in err and "Traceback" not in err
        assert os.listdir("b") == ["cut.pt"]


@EVERY
def test_checkpoint_holds_plain_types_and_names_its_script(w, ran):
    ran("a", "--steps", "5")
    checkpoint = torch.load("a/last.pt", weights_only=True)
    assert checkpoint["script"] == w.name and checkpoint["step"] == 5 and checkpoint["args"]["ngf"] == 4
    assert json.loads(Path("a/args.json").read_text())["latent_dim"] == 6
    assert Path(f"a/{w.name}.py").read_bytes() == (ROOT / f"{w.name}.py").read_bytes()
    assert checkpoint["args"]["classes"] == 10 and checkpoint["args"]["data"].startswith("300 pictures")


# the step -------------------------------------------------------------------------------------------------------------


@EVERY
def test_the_step_never_waits_for_the_device(w, monkeypatch):
    """From the last batch() of an iteration to the next one's first, or to a log or write that is due: no way from a
    tensor to the host is taken."""
    armed, calls = [False], [0]

    def guard(name):
        real = getattr(torch.Tensor, name)

        def guarded(*a, **k):
            assert not armed[0], f"Tensor.{name} inside the step"
            return real(*a, **k)
        monkeypatch.setattr(torch.Tensor, name, guarded)

    for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        guard(name)
    batch, check, as_tensor = w.Batches.__call__, w.check_finite, torch.tensor

    def counted(self):
        armed[0] = False
        out = batch(self)
        calls[0] += 1
        armed[0] = calls[0] % 5 == 0
        return out

    def checked(run):
        armed[0] = False
        check(run)

    def host_made(*a, **k):
        assert not armed[0], "a host-made tensor inside the step"
        return as_tensor(*a, **k)

    monkeypatch.setattr(w.Batches, "__call__", counted)
    monkeypatch.setattr(w.module, "check_finite", checked)
    monkeypatch.setattr(torch, "tensor", host_made)
    w.main([*w.tiny, "--steps", "20", "--log-every", "10", "--run-dir", "a"])
    assert calls[0] == 20


@over("wgan_gp", "cdcgan", "wgan_clip")
def test_a_resumed_run_logs_and_scores_as_an_unbroken_one(w, monkeypatch):
    """Stopped between two rows of the log, at an evaluation, and resumed into another run directory."""
    scripted_judge(monkeypatch, [], w)
    flags = [*w.tiny, "--log-every", "10", "--eval-every", "15"]
    w.main([*flags, "--steps", "30", "--run-dir", "whole"])
    w.main([*flags, "--steps", "15", "--run-dir", "part"])
    w.main(["--resume", "part/last.pt", "--steps", "15"])  # nothing to do: no second row of scores
    w.main(["--resume", "part/last.pt", "--steps", "30"])
    assert losses("part") == losses("whole")
    assert open("part/log.csv").readline() == open("whole/log.csv").readline()
    seconds = [float(r["seconds"]) for r in csv.DictReader(open("part/log.csv"))]
    assert seconds == sorted(seconds)
    w.main(["--resume", "part/last.pt", "--run-dir", "other"])
    w.main(["--resume", "other/last.pt", "--steps", "40"])
    assert len({line.count(",") for line in open("other/log.csv")}) == 1


def test_a_second_signal_stops_at_once_and_after_training_the_first(w, monkeypatch):
    record = w.Run.record

    def twice(run, values):
        record(run, values)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(w.Run, "record", twice)
    with pytest.raises(SystemExit) as stop:
        w.main([*w.tiny, "--steps", "40", "--run-dir", "a"])
    assert stop.value.code == 130 and not Path("a/last.pt").exists()
    monkeypatch.setattr(w.Run, "record", record)
    sheet = w.Run.sheet
    monkeypatch.setattr(w.Run, "sheet", lambda run, name=None: (
        os.kill(os.getpid(), signal.SIGINT) if name == "samples.png" else sheet(run, name)))
    with pytest.raises(SystemExit) as stop:
        w.main([*w.tiny, "--steps", "10", "--run-dir", "b"])
    assert stop.value.code == 130 and Path("b/last.pt").exists() and not Path("b/samples.png").exists()


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_is_the_exit_code(w, monkeypatch, first, second):
    record = w.Run.record
    monkeypatch.setattr(w.Run, "record", lambda run, values: (
        record(run, values), os.kill(os.getpid(), first), os.kill(os.getpid(), second)))
    with pytest.raises(SystemExit) as stop:
        w.main([*w.tiny, "--steps", "40", "--run-dir", "a"])
    assert stop.value.code == 128 + second and not Path("a/last.pt").exists()


def test_a_penalty_on_two_pictures_or_more_where_d_has_batch_norm():
    """A quarter of a batch of four is one, which BatchNorm1d refuses."""
    dcgan.main("--arch mlp --d-norm batch --r1 1 --penalty-share .25 --batch-size 4 --steps 2 --eval-every 0 "
               "--device cpu --run-dir a".split())
    assert torch.load("a/last.pt", weights_only=True)["step"] == 2


def test_a_signal_during_the_last_write_is_not_lost(w, monkeypatch):
    """Training is over and has looked for signals for the last time, the figures have not begun."""
    save = w.module.save
    monkeypatch.setattr(w.module, "save", lambda run, name="last.pt": (
        run.step == 10 and os.kill(os.getpid(), signal.SIGTERM), save(run, name)))
    with pytest.raises(SystemExit) as stop:
        w.main([*w.tiny, "--steps", "10", "--checkpoint-every", "0", "--run-dir", "a"])
    assert stop.value.code == 143 and torch.load("a/last.pt", weights_only=True)["step"] == 10
    assert not Path("a/samples.png").exists()


@EVERY
def test_step_counts_and_cadence(w):
    """--steps and every --*-every take effect at the first iteration boundary at or past the number."""
    w.main([*w.tiny, "--steps", "17", "--log-every", "7", "--sample-every", "9", "--g-steps", "3",
                  "--run-dir", "a"])
    assert [r[:2] for r in losses("a")] == [["10", "6"], ["15", "9"]]
    assert sorted(p.name for p in Path("a/samples").iterdir()) == [f"step_{i:07}.png" for i in (0, 10, 20)]
    assert torch.load("a/last.pt", weights_only=True)["step"] == 20


@pytest.mark.parametrize("w, change", [
    ("wgan_gp", "--gp-weight 0"), ("wgan_gp", "--lr-d 1e-3"), ("wgan_gp", "--lr-g 1e-3"), ("wgan_gp", "--beta1 0"),
    ("wgan_gp", "--beta2 .5"), ("wgan_gp", "--ema 0"), ("wgan_gp", "--seed 1"), ("wgan_gp", "--prior uniform"),
    ("wgan_gp", "--d-steps 2"), ("wgan_gp", "--g-steps 2"), ("wgan_gp", "--lr-decay linear"), ("wgan_gp", "--flip"),
    ("dcgan", "--loss minimax"), ("dcgan", "--gp .5"), ("dcgan", "--r1 1"), ("dcgan", "--d-norm batch"),
    ("dcgan", "--upsample nearest"), ("dcgan", "--init default"), ("dcgan", "--amp"), ("cdcgan", "--amp"),
    ("cdcgan", "--d-ignores-label"),
    ("wgan_clip", "--clip .1"), ("wgan_clip", "--optimizer adam"), ("wgan_clip", "--d-dropout .3"),
    ("wgan_clip", "--d-norm none"), ("wgan_clip", "--g-norm layer"), ("wgan_clip", "--lr-decay linear"),
    ("conditional", "--d-ignores-label"), ("conditional", "--label-embedding-dim 3"),
    ("unrolled", "--k 0"), ("unrolled", "--k 3"), ("unrolled", "--inner sgd"), ("unrolled", "--loss minimax"),
    ("unrolled", "--amp"), ("unrolled", "--ema 0"), ("mdgan", "--mixture published"), ("mdgan", "--embedding-dim 8"),
    ("mdgan", "--loss saturating"), ("mdgan", "--amp"), ("mdgan", "--ema 0"),
    ("bigan", "--prior uniform"), ("bigan", "--amp"), ("bigan", "--ema 0"), ("bigan", "--g-steps 2")], indirect=["w"])
def test_every_training_flag_changes_the_weights(w, ran, change):
    ran("a", "--steps", "10", "--sample-every", "0")
    w.main([*w.tiny, "--steps", "10", "--sample-every", "0", "--run-dir", "b", *change.split()])
    a, b = tensors("a/last.pt"), tensors("b/last.pt")
    assert a["ema"].keys() != b["ema"].keys() or not all(
        x.shape == b["ema"][k].shape and torch.equal(x, b["ema"][k]) for k, x in a["ema"].items())


def test_no_averaging_makes_the_average_g(w):
    w.main([*w.tiny, "--steps", "10", "--run-dir", "a", "--ema", "0"])
    saved = tensors("a/last.pt")
    same(saved["ema"], saved["nets"]["G"])


SCORES = ["coverage", "fid", "fid_train", "inception_score", "mode_score", "classes", "class_min", "class_max"]


def scripted_judge(monkeypatch, fids, w=CASES["wgan_gp"]):
    """Scores from a list, in place of metrics.Judge; one FID for every call; None is a kill. Returns what it was asked
    to judge."""
    fids, judged = list(fids), []

    class Judge:
        n = 10
        line = staticmethod(str)

        def __init__(self, dataset, load, folder=None, device="cpu", n=None, epochs=None, say=print):
            (x, self.labels), (x_test, _) = load("train"), load("test")
            assert dataset == "digits" and x.shape[1:] == x_test.shape[1:] == (1, w.size, w.size)
            if metrics.FEWEST > self.n: raise metrics.TooFew("too few test pictures")

        def __call__(self, x, y=None):
            assert x.dtype == torch.uint8 and x.shape == (10, 1, w.size, w.size)
            assert y is None or (w.told and y.dtype == torch.int64 and y.shape == (10,))
            judged.append((x, y))
            fid = fids.pop(0) if fids else 99.0
            if fid is None: raise KeyboardInterrupt
            for_the_line = {"n_real": 10, "n_fake": 10, "floor": 1.0, "accuracy": 1.0, "features": "none"}
            return dict.fromkeys(SCORES, 1.0) | for_the_line | {"fid_train": fid} | (
                {} if y is None else {"label_accuracy": 0.5})

    monkeypatch.setattr(metrics, "Judge", Judge)
    monkeypatch.setattr(metrics, "FEWEST", 10)
    with_metrics(w, monkeypatch)
    return judged


def with_metrics(w, monkeypatch):
    monkeypatch.setattr(w.module, "SCRIPT", ROOT / f"{w.name}.py")


@EVERY
def test_scores_are_of_fresh_pictures_and_of_the_labels_asked_for(w, monkeypatch):
    judged = scripted_judge(monkeypatch, [], w)
    w.main([*w.tiny, "--steps", "10", "--log-every", "10", "--eval-every", "10", "--run-dir", "a", "--lr-g", "1e-2"])
    (at_10, y), (end, y_end) = judged[:2]
    assert not torch.equal(at_10, end)
    G, _ = w.networks(torch.load("a/last.pt", weights_only=True))
    args = w.parse_args(w.tiny)
    assert rendered(300, 1)[1].bincount().tolist() == [30] * 10  # so of ten labels one of each, in another order
    for x, given, key in ((at_10, y, (2, 10)), (end, y_end, (3,))):
        wanted = torch.arange(10)[torch.randperm(10, generator=w.seeded(0, 12, *key))] if w.told else None
        assert given is None if wanted is None else torch.equal(given, wanted)
        shown = paint(G, w.sample_z(args, 10, "cpu", w.seeded(0, *key)), wanted)
        assert np.abs(x[:, 0].double().numpy() - shown).max() <= 1
    (means, scores), scored = csv.DictReader(open("a/log.csv")), [*SCORES, *["label_accuracy"] * w.told]
    assert list(means) == ["step", "epoch", "g_updates", "seconds", *LOGGED[w.name].split(), "images_per_s", "lr_g",
                           "lr_d", *scored]
    assert {means[k] for k in scored} == {""} and [scores[k] for k in SCORES[:3]] == ["1", "1", "99"]
    assert not w.told or scores["label_accuracy"] == "0.5"


def test_last_scores_are_made_up_for(w, monkeypatch, capsys):
    """By a run that was interrupted before they were written, one that goes to a new folder, one that is to choose
    by --reject only now. The step itself is not scored again: that row of the log is there."""
    judged = scripted_judge(monkeypatch, [7.0], w)
    w.main([*w.tiny, "--steps", "10", "--holdout", "50", "--run-dir", "a"])
    first, rows, n = json.loads(Path("a/scores.json").read_text()), Path("a/log.csv").read_text(), len(judged)
    assert first.keys() == {"last.pt", "best.pt"} and n == 2
    Path("a/scores.json").unlink()
    w.main(["--resume", "a/last.pt"])
    assert json.loads(Path("a/scores.json").read_text()) == first and Path("a/log.csv").read_text() == rows
    assert len(judged) == n + 1
    monkeypatch.setattr(metrics, "platt", lambda real, fake: (1.0, 0.0, 0.7))
    w.main(["--resume", "a/last.pt", "--reject", "drs"])
    assert "last.pt --reject drs" in json.loads(Path("a/scores.json").read_text())
    w.main(["--resume", "a/last.pt", "--run-dir", "b"])  # whose log and best.pt are to be made
    assert {"last.pt", "best.pt"} < json.loads(Path("b/scores.json").read_text()).keys()
    assert [r["step"] for r in csv.DictReader(open("b/log.csv"))] == ["10"]
    capsys.readouterr()


@over("wgan_gp", "dcgan", "cdcgan", "wgan_clip", "unrolled")
def test_best_fid_goes_back_and_halves_the_rates(w, monkeypatch):
    scripted_judge(monkeypatch, [50, 40, 45, 46, 30, 31, 32], w)
    flags = [*w.tiny, "--steps", "40", "--eval-every", "5", "--lr-decay", "best-fid", "--patience", "2"]
    seen, training = [], w.Run.training

    def watched(run):
        rate, more = run.args.lr_g, training(run)
        if run.args.lr_g == rate: return more
        best = torch.load(run.folder / "best.pt", weights_only=True)
        seen.append((run.step, best["step"]))
        same(run.nets["G"].state_dict(), best["nets"]["G"])
        same(run.opts["d"].state_dict()["state"], best["opts"]["d"]["state"])
        assert run.state["stale"] == 0
        return more

    monkeypatch.setattr(w.Run, "training", watched)
    w.main([*flags, "--run-dir", "a"])
    assert seen == [(20, 10), (35, 25)]
    rows = [r for r in csv.DictReader(open("a/log.csv")) if r["lr_g"]]
    assert [float(r["lr_d"]) for r in rows] == [1e-4] * 4 + [5e-5] * 3 + [2.5e-5]
    assert torch.load("a/best.pt", weights_only=True)["state"]["best_fid"] == 30
    # the halved rates go on after a resume; given ones replace them; last.pt on its own starts the search afresh
    w.main(["--resume", "a/last.pt", "--steps", "45"])
    w.main(["--resume", "a/last.pt", "--steps", "50", "--lr-d", "3e-5"])
    rows = [r for r in csv.DictReader(open("a/log.csv")) if r["lr_g"]]
    # two evaluations at 99 since step 35: halved a third time at 45, after that row was written
    assert [(float(r["lr_g"]), float(r["lr_d"])) for r in rows[-2:]] == [(2.5e-5, 2.5e-5), (1.25e-5, 3e-5)]
    Path("moved").mkdir()
    shutil.copy("a/last.pt", "moved")
    w.main(["--resume", "moved/last.pt", "--steps", "70"])
    assert Path("moved/best.pt").exists()


@pytest.mark.parametrize("fids, at", [([50, None, 60, 70, 40], 20), ([50, 60, 70, 40], 30)])
def test_a_kill_in_an_evaluation_resumes_as_an_unbroken_run(w, monkeypatch, fids, at):
    """While it scores, which at first takes minutes; and before it has gone back to the best checkpoint."""
    flags = [*w.tiny, *"--steps 40 --eval-every 10 --log-every 10 --lr-decay best-fid --patience 2".split()]
    scripted_judge(monkeypatch, [50, 60, 70, 40], w)
    w.main([*flags, "--run-dir", "whole"])
    restore = w.restore

    def killed(run, path, keep_step=False):
        monkeypatch.setattr(w.module, "restore", restore)
        raise KeyboardInterrupt

    if None not in fids: monkeypatch.setattr(w.module, "restore", killed)
    scripted_judge(monkeypatch, fids, w)
    with pytest.raises(SystemExit):
        w.main([*flags, "--run-dir", "cut"])
    assert torch.load("cut/last.pt", weights_only=True)["step"] == at
    w.main(["--resume", "cut/last.pt"])
    assert losses("cut") == losses("whole")
    same(tensors("cut/last.pt"), tensors("whole/last.pt"))
    assert [r["lr_g"] for r in csv.DictReader(open("cut/log.csv")) if r["lr_g"]] == ["0.0001"] * 3 + ["5e-05"]


def test_a_signal_in_an_evaluation_stops_after_it(w, monkeypatch):
    """It is kept, and neither it nor what best-fid makes of it is done again."""
    flags = [*w.tiny, *"--steps 40 --eval-every 10 --log-every 10 --lr-decay best-fid --patience 2".split()]
    scripted_judge(monkeypatch, [50, 60, 70, 40], w)
    w.main([*flags, "--run-dir", "whole"])
    scripted_judge(monkeypatch, [50, 60, 70, 40], w)
    evaluate = w.Run.evaluate

    def signalled(run):
        if run.step == 30: os.kill(os.getpid(), signal.SIGTERM)
        evaluate(run)

    monkeypatch.setattr(w.Run, "evaluate", signalled)
    with pytest.raises(SystemExit) as stop:
        w.main([*flags, "--run-dir", "cut"])
    assert stop.value.code == 143 and torch.load("cut/last.pt", weights_only=True)["step"] == 30
    assert [r["fid"] != "" for r in csv.DictReader(open("cut/log.csv"))] == [False, True] * 3
    monkeypatch.setattr(w.Run, "evaluate", evaluate)
    w.main(["--resume", "cut/last.pt"])
    assert losses("cut") == losses("whole")
    same(tensors("cut/last.pt"), tensors("whole/last.pt"))


@over("wgan_gp", "wgan_clip")
def test_linear_decay_reaches_zero_at_the_last_step(w):
    w.main([*w.tiny, "--steps", "20", "--run-dir", "a", "--lr-decay", "linear"])
    assert [float(r["lr_g"]) for r in csv.DictReader(open("a/log.csv"))] == pytest.approx([1e-4, 7.5e-5, 5e-5, 2.5e-5])


@EVERY
def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(w, monkeypatch, capsys):
    """It is found at the next row of the log or, without one, before the next write."""
    loss, calls = w.generator_loss, [0]

    def poisoned(*a):
        calls[0] += 1
        return loss(*a) * (float("nan") if calls[0] == 6 else 1)

    monkeypatch.setattr(w.module, "generator_loss", poisoned)
    for log, found in (("0", 50), ("5", 30)):
        calls[0] = 0
        with pytest.raises(SystemExit) as stop:
            w.main([*w.tiny, "--steps", "100", "--run-dir", log, "--checkpoint-every", "25", "--sample-every", "0",
                    "--log-every", log])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and f"step {found}:" in err and f"{log}/last.pt" in err and err.count("\n") == 1
        saved = torch.load(f"{log}/last.pt", weights_only=True)
        assert saved["step"] == 25 and all(p.isfinite().all() for net in saved["nets"].values() for p in net.values())


def test_a_value_of_the_log_that_is_not_finite_stops_the_run_too(w, monkeypatch, capsys):
    monkeypatch.setattr(w.module, "pair_accuracy", lambda real, fake: torch.tensor(float("inf")))
    with pytest.raises(SystemExit) as stop:
        w.main([*w.tiny, "--steps", "20", "--run-dir", "a", "--log-every", "0", "--checkpoint-every", "5"])
    assert stop.value.code == 2 and "step 5:" in capsys.readouterr().err and not Path("a/last.pt").exists()


def test_no_sheet_of_nan_is_written(w, monkeypatch):
    monkeypatch.setattr(w.module, "generator_loss", lambda score: score.mean() * float("nan"))
    with pytest.raises(SystemExit):
        w.main([*w.tiny, "--steps", "20", "--run-dir", "a", "--log-every", "0", "--sample-every", "5"])
    assert os.listdir("a/samples") == ["step_0000000.png"]


# errors ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    for k in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(k, "http://127.0.0.1:9")  # nothing listens there: refused at once
    monkeypatch.delenv("no_proxy", raising=False)


ERRORS = [
    (["--no-such-flag"], "no-such-flag"), (["--dataset", "cats"], "cats"), (["--steps", "0"], "steps"),
    (["--lr-g", "nan"], "lr-g"), (["--lr-d", "inf"], "lr-d"), (["--lr-d", "-1"], "lr-d"), (["--ema", "1"], "ema"),
    (["--beta1", "1"], "beta1"), (["--gp-weight", "-1"], "gp-weight"), (["--batch-size", "1"], "batch-size"),
    (["--ngf", "0"], "ngf"), (["--latent-dim", "x"], "latent-dim"), (["--seed", "-1"], "seed"),
    (["--image-size", "48"], "48"), (["--batch-size", "301"], "301"), (["--device", "cuda"], "cuda"),
    (["--device", "tpu"], "tpu"), (["--dataset", "mnist", "--data-dir", "nowhere"], "nowhere/MNIST/raw"),
    (["--dataset", "fashion", "--data-dir", "nowhere"], "nowhere/FashionMNIST/raw"), (["--run-dir", "used"], "used"),
    (["--run-dir", "file"], "file"), (["--run-dir", "file/in"], "file"), (["--resume", "nothing.pt"], "nothing.pt"),
    (["--resume", "used"], "used"), (["--resume", "file"], "file"), (["--resume", "other.pt"], "dcgan.py"),
    (["--resume", "list.pt"], "list.pt"), (["--generate", "4"], "--resume"), (["--z-file", "z.npy"], "--generate"),
    (["--lr-decay", "best-fid", "--eval-every", "0"], "eval-every"),
    (["--lr-decay", "best-fid", "--eval-every", "5"], "metrics.py"),
    (["--resume", "good/last.pt", "--ngf", "8"], "ngf"),
    (["--resume", "good/last.pt", "--dataset", "mnist"], "dataset"),
    (["--resume", "good/last.pt", "--seed", "3"], "seed"), (["--resume", "misfit.pt"], "misfit.pt"),
    (["--resume", "good/last.pt", "--flip"], "flip"), (["--resume", "good/last.pt", "--holdout", "9"], "holdout"),
    (["--resume", "good/last.pt", "--generate", "2", "--z-file", "z.npy"], "z.npy"),
    (["--resume", "good/last.pt", "--generate", "2", "--z-file", "none.pt"], "none.pt"),
    (["--resume", "good/last.pt", "--generate", "2", "--z-file", "wide.npy"], "wide.npy"),
    (["--resume", "good/last.pt", "--generate", "2", "--generate-to", "used"], "used"),
    (["--resume", "good/last.pt", "--generate-to", "x"], "--generate N"), (["--resume", ""], "empty"),
    (["--resume", "good/last.pt", "--generate", "2", "--z-file", ""], "empty"),
    (["--batch-size", "1000000000000"], "--batch-size"), (["--generate-to", "x"], "--generate N"),
    (["--resume", "good/last.pt", "--generate", "2", "--generate-to", "file/in"], "file/in"),
    (["--dataset", "mnist", "--data-dir", "nowhere/deep/er"], "deep/er"),
    (["--dataset", "stacked_mnist", "--data-dir", "nowhere"], "nowhere/MNIST/raw"),
]


OTHERS = [
    ("dcgan", ["--gp", "-1"], "gp"), ("dcgan", ["--r1", "nan"], "r1"), ("dcgan", ["--loss", "hinge"], "hinge"),
    ("dcgan", ["--upsample", "bicubic"], "bicubic"), ("dcgan", ["--image-size", "48"], "48"),
    ("dcgan", ["--resume", "good/last.pt", "--upsample", "nearest"], "upsample"),
    ("dcgan", ["--resume", "good/last.pt", "--gp", "2"], "gp"), ("dcgan", ["--resume", "other.pt"], "wgan_gp.py"),
    ("cdcgan", ["--image-size", "28"], "28"), ("cdcgan", ["--image-size", "64"], "64"),
    ("cdcgan", ["--batch-size", "301"], "301"), ("cdcgan", ["--resume", "other.pt"], "wgan_gp.py"),
    ("cdcgan", ["--resume", "good/last.pt", "--d-ignores-label"], "d-ignores-label"),
    ("cdcgan", ["--resume", "misfit.pt"], "misfit.pt"),
    ("wgan_clip", ["--clip", "0"], "clip"), ("wgan_clip", ["--clip", "-1"], "clip"),
    ("wgan_clip", ["--d-dropout", "1"], "d-dropout"), ("wgan_clip", ["--optimizer", "sgd"], "sgd"),
    ("wgan_clip", ["--g-norm", "instance"], "instance"), ("wgan_clip", ["--d-ignores-label"], "--conditional"),
    ("wgan_clip", ["--label-embedding-dim", "3"], "--conditional"), ("wgan_clip", ["--image-size", "48"], "48"),
    ("wgan_clip", ["--resume", "good/last.pt", "--clip", ".5"], "clip"),
    ("wgan_clip", ["--resume", "good/last.pt", "--optimizer", "adam"], "optimizer"),
    ("conditional", ["--label-embedding-dim", "0"], "label-embedding-dim"),
    ("conditional", ["--resume", "good/last.pt", "--label-embedding-dim", "4"], "label-embedding-dim"),
    ("conditional", ["--resume", "good/last.pt", "--generate", "2", "--z-file", "wide.npy"], "wide.npy"),
    ("unrolled", ["--k", "-1"], "--k"), ("unrolled", ["--k", "1001"], "--k"), ("unrolled", ["--k", "1.5"], "--k"),
    ("unrolled", ["--inner", "rmsprop"], "rmsprop"), ("unrolled", ["--inner-lr", "-1"], "inner-lr"),
    ("unrolled", ["--inner-lr", "nan"], "inner-lr"), ("unrolled", ["--loss", "saturating"], "saturating"),
    ("unrolled", ["--image-size", "48"], "48"), ("unrolled", ["--resume", "other.pt"], "wgan_gp.py"),
    ("unrolled", ["--resume", "good/last.pt", "--k", "3"], "--k"),
    ("unrolled", ["--resume", "good/last.pt", "--inner", "sgd"], "--inner"),
    ("mdgan", ["--mixture", "uniform"], "uniform"), ("mdgan", ["--embedding-dim", "0"], "embedding-dim"),
    ("mdgan", ["--embedding-dim", "513"], "embedding-dim"), ("mdgan", ["--loss", "minimax"], "minimax"),
    ("mdgan", ["--image-size", "48"], "48"), ("mdgan", ["--resume", "other.pt"], "wgan_gp.py"),
    ("mdgan", ["--resume", "good/last.pt", "--mixture", "published"], "mixture"),
    ("mdgan", ["--resume", "good/last.pt", "--embedding-dim", "4"], "embedding-dim"),
    ("mdgan", ["--resume", "good/last.pt", "--loss", "saturating"], "--loss"),
    ("mdgan", ["--resume", "misfit.pt"], "misfit.pt"),
    ("bigan", ["--probe"], "--resume"), ("bigan", ["--image-size", "48"], "48"),
    ("bigan", ["--resume", "other.pt"], "wgan_gp.py"), ("bigan", ["--resume", "misfit.pt"], "misfit.pt"),
]


@pytest.mark.parametrize("w, flags, named", [*(("wgan_gp", *e) for e in ERRORS), *OTHERS], indirect=["w"],
                         ids=[f"{n} {' '.join(f)}" for n, f in [*(("wgan_gp", e[0]) for e in ERRORS),
                                                                *(o[:2] for o in OTHERS)]])
def test_a_users_mistake_is_one_line_and_leaves_nothing(w, ran, flags, named, capsys, no_network):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    ran("good", "--steps", "5")
    good = torch.load("good/last.pt", weights_only=True)
    torch.save(good | {"script": "dcgan" if w.name == "wgan_gp" else "wgan_gp"}, "other.pt")
    torch.save([1, 2], "list.pt")
    torch.save(good | {"nets": good["nets"] | {"D": {}}}, "misfit.pt")
    np.save("z.npy", np.zeros((1, 6)))  # one row, two wanted
    np.save("wide.npy", np.zeros((2, 7)))
    Path("used").mkdir()
    Path("used/note.txt").write_text("mine")
    Path("file").write_text("mine")
    before = sorted(str(p) for p in Path(".").rglob("*"))
    resumed = "--resume" in flags
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        w.main(flags if resumed else [*w.tiny, *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1 and named in err and "Traceback" not in err and "usage" not in err
    assert sorted(str(p) for p in Path(".").rglob("*")) == before


def test_fewer_steps_than_were_made_are_refused(w, ran, capsys):
    """"--steps 10" after twenty may have meant ten more; what lies within the last iteration is a finished run."""
    ran("a", "--steps", "20")
    before = Path("a/args.json").read_bytes(), tensors("a/last.pt")
    with pytest.raises(SystemExit) as stop: w.main(["--resume", "a/last.pt", "--steps", "10"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "is at step 20, past 10" in err
    assert Path("a/args.json").read_bytes() == before[0]
    w.main(["--resume", "a/last.pt", "--steps", "17"])
    same(tensors("a/last.pt"), before[1])


def test_steps_override_epochs_in_a_resumed_run_too(w, ran):
    """An epoch is 300 // 8 = 37 updates; the 20 steps of the checkpoint, given again, are still 20."""
    ran("a", "--steps", "20")
    for flags, end in ((["--steps", "20", "--epochs", "2"], 20), (["--epochs", "1"], 40), ([], 40)):
        w.main(["--resume", "a/last.pt", *flags])
        assert torch.load("a/last.pt", weights_only=True)["step"] == end


@pytest.mark.parametrize("broken", ["args.json", "copy"])
def test_a_run_folder_that_cannot_be_written_is_one_line(w, ran, broken, capsys, monkeypatch):
    """As chmod cannot forbid root anything, the writes fail by hand."""
    def refuse(*a, **k): raise PermissionError("not yours")

    ran("a", "--steps", "5")
    if broken == "copy": monkeypatch.setattr(shutil, "copy", refuse)
    else: monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SystemExit) as stop:
        w.main(["--resume", "a/last.pt", "--steps", "9", *(["--run-dir", "b"] if broken == "copy" else [])])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--run-dir" in err and "not yours" in err


@pytest.mark.parametrize("stdout", ["closed", "nobody reads"])
def test_a_run_goes_on_where_nobody_reads_what_it_says(w, stdout):
    """As under `| head -1`, or a terminal that went away; or as a service without one."""
    lost = "sys.stdout.close(); sys.stdout = None" if stdout == "closed" else (
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)")
    code = (f"import os, sys; import {w.name} as w; render = w.render_digits\n"
            f"w.render_digits = lambda n, seed: render(300, seed); {lost}\n"
            f"try: w.main({[*w.tiny, '--steps', '20', '--run-dir', 'a']!r})\n"
            f"finally: os.dup2(2, 1)")  # or Python's own last flush complains
    done = subprocess.run([sys.executable, "-c", code], cwd=".", env={**os.environ, "PYTHONPATH": "alone"},
                          capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert torch.load("a/last.pt", weights_only=True)["step"] == 20 and len(open("a/log.csv").readlines()) == 5


def test_damaged_data_is_one_line(w, capsys, no_network):
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(SystemExit) as stop:
        w.main([*w.tiny, "--dataset", "mnist"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not Path("runs").exists()


# figures and generation -----------------------------------------------------------------------------------------------


def tiles(path, columns, side=28):
    """The pictures of a sheet (N, side, side), two pixels of margin around each."""
    sheet = np.asarray(Image.open(path))
    rows = (sheet.shape[0] - 2) // (side + 2)
    assert sheet.shape == (rows * (side + 2) + 2, columns * (side + 2) + 2)
    return np.stack([sheet[2 + r * (side + 2):, 2 + c * (side + 2):][:side, :side]
                     for r in range(rows) for c in range(columns)]).astype(float)


@torch.no_grad()
def paint(G, z, y=None):
    x = G(z) if y is None else G(z, torch.as_tensor(y).expand(len(z)) if torch.as_tensor(y).dim() == 0 else y)
    return np.clip(np.round((x.double().numpy()[:, 0] + 1) * 127.5), 0, 255)


@EVERY
def test_figures_show_what_they_say(w, monkeypatch):
    """With labels: a row for each and a column for each z; in the others the row's label stays. Of the traversal's
    coordinates the ten that change the picture most."""
    scripted_judge(monkeypatch, [], w)
    flags = [*w.tiny, "--latent-dim", "12"]
    w.main([*flags, "--steps", "20", "--run-dir", "a", "--lr-g", "1e-2", "--sample-every", "5"])
    G, _ = w.networks(torch.load("a/last.pt", weights_only=True))
    args = w.parse_args(flags)
    noise = [w.sample_z(args, n, "cpu", w.seeded(0, key)) for n, key in ((8 if w.told else 64, 1), (16, 4), (1, 5))]
    sheet = tiles("a/samples.png", 8, w.size)
    assert len(sheet) == (80 if w.told else 64)
    wanted = np.concatenate([paint(G, noise[0], y) for y in range(10)]) if w.told else paint(G, noise[0])
    assert np.abs(sheet - wanted).max() <= 1
    assert np.abs(tiles("a/samples/step_0000020.png", 8, w.size) - sheet).max() <= 1
    a, b = noise[1][:8], noise[1][8:]
    y = torch.arange(8) if w.told else None
    latent, pixel = (tiles(f"a/interpolation_{k}.png", 10, w.size).reshape(8, 10, w.size, w.size)
                     for k in ("latent", "pixel"))
    for j in range(10):
        assert np.abs(latent[:, j] - paint(G, a + (b - a) * j / 9, y)).max() <= 1
        ends = paint(G, a, y), paint(G, b, y)
        # either end may round the other way, by 1, and the blend is rounded once more, by half
        assert np.abs(pixel[:, j] - (ends[0] + (ends[1] - ends[0]) * j / 9)).max() <= 1.5
    zero, one = torch.tensor(0) if w.told else None, torch.eye(12) > 0
    low, high = (paint(G, torch.where(one, v, noise[2]), zero) for v in (-4.0, 4.0))
    strongest = np.abs(low - high).mean((1, 2)).argsort()[::-1][:10]
    rows = tiles("a/traversal.png", 9, w.size).reshape(10, 9, w.size, w.size)
    for row, i in zip(rows, strongest):
        for picture, v in zip(row, np.linspace(-4, 4, 9)):
            assert np.abs(picture - paint(G, torch.where(one[int(i)], float(v), noise[2]), zero)[0]).max() <= 1
    gif = Image.open("a/training.gif")
    assert Path("a/training.gif").stat().st_size <= 300 * 1024 and gif.n_frames >= 5
    assert gif.size == (8 * (w.size + 2) + 2, (10 if w.told else 8) * (w.size + 2) + 2)


@over("conditional")
def test_interpolation_between_every_pair_of_classes(w, monkeypatch):
    """Report D: one z, from class to class through the embedding; of last.pt as all figures, whatever best.pt is."""
    scripted_judge(monkeypatch, [50, 60, 70], w)  # the best is the first
    w.main([*w.tiny, "--steps", "20", "--eval-every", "10", "--run-dir", "a", "--lr-g", "1e-2"])
    last = torch.load("a/last.pt", weights_only=True)
    assert torch.load("a/best.pt", weights_only=True)["step"] == 10 < last["step"] == 20
    G, _ = w.networks(last)
    (table,) = (v for v in last["ema"].values() if v.shape == (10, 10))
    (own,) = (p for p in G.parameters() if p.shape == (10, 10))
    rows = tiles("a/interpolation_classes.png", 10).reshape(45, 10, 28, 28)
    ends = {}
    z = w.sample_z(w.parse_args(w.tiny), 1, "cpu", w.seeded(0, 9))
    pairs = [(a, b) for a in range(10) for b in range(a + 1, 10)]
    for (a, b), row in zip(pairs, rows):
        for t, picture in zip(np.linspace(0, 1, 10), row):
            own.data[0] = (1 - t) * table[a] + t * table[b]
            assert np.abs(picture - paint(G, z, torch.tensor(0))[0]).max() <= 1
        for c, picture in ((a, row[0]), (b, row[-1])):
            assert np.abs(ends.setdefault(c, picture) - picture).max() <= 1
    assert np.abs(ends[0] - ends[1]).max() > 5


def test_gif_keeps_to_its_size():
    rng, paths = np.random.RandomState(0), []
    for i in range(60):
        paths.append(Path(f"step_{i:07}.png"))
        Image.fromarray(rng.randint(0, 255, (242, 242), dtype=np.uint8)).save(paths[-1])
    metrics.save_gif(paths, Path("a.gif"))
    assert 100 * 1024 < Path("a.gif").stat().st_size <= 300 * 1024


@EVERY
def test_generation_from_z_and_from_a_seed(w, monkeypatch):
    """Labels, where there are any, in turn; the data is not needed."""
    w.main([*w.tiny, "--steps", "20", "--run-dir", "a", "--lr-g", "1e-2"])
    z = torch.randn(13, 6, generator=torch.Generator().manual_seed(7))
    np.save("z.npy", z.numpy())
    torch.save(z, "z.pt")
    before = Path("a/last.pt").read_bytes()
    monkeypatch.setattr(w.module, "load_data", lambda *a: pytest.fail("the data was read"))
    for flags in (["--z-file", "z.npy"], ["--z-file", "z.pt"], ["--seed", "1"], ["--seed", "2"], ["--seed", "1"]):
        out = f"out{len(list(Path('.').glob('out*')))}"
        w.main(["--resume", "a/last.pt", "--generate", "12", "--generate-to", out, *flags])
        assert sorted(os.listdir(out)) == [f"{i:05}.png" for i in range(12)]
    shown = [np.stack([np.asarray(Image.open(f)) for f in sorted(Path(f"out{i}").iterdir())]).astype(float)
             for i in range(5)]
    G, _ = w.networks(torch.load("a/last.pt", weights_only=True))
    assert np.abs(shown[0] - paint(G, z[:12], torch.arange(12) % 10 if w.told else None)).max() <= 1
    assert (shown[0] == shown[1]).all() and (shown[2] == shown[4]).all()
    assert np.abs(shown[0] - shown[2]).max() > 3 and np.abs(shown[2] - shown[3]).max() > 3
    assert Path("a/last.pt").read_bytes() == before


def test_tensorboard_says_how_to_get_it(w, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as stop:
        w.main([*w.tiny, "--steps", "5", "--run-dir", "a", "--tensorboard"])
    assert stop.value.code == 2 and "pip install tensorboard" in capsys.readouterr().err and not Path("a").exists()


LOGGED = {"wgan_gp": "d_loss g_loss w_dist grad_norm d_acc", "dcgan": "d_loss g_loss penalty d_acc",
          "cdcgan": "d_loss g_loss d_acc", "wgan_clip": "d_loss g_loss w_dist clipped d_acc",
          "unrolled": "d_loss g_loss d_acc", "mdgan": "d_loss g_loss d_acc", "bigan": "d_loss g_loss d_acc"}


@EVERY
def test_terminal_redraws_and_file_gets_whole_lines(w, monkeypatch, capsys):
    w.main([*w.tiny, "--steps", "10", "--run-dir", "a"])
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("epoch")]
    assert len(lines) == 2
    values = "".join(rf"{k} -?\d+\.\d\d\d  " for k in LOGGED[w.name].split())
    assert re.fullmatch(rf"epoch 0\.3/0\.2703  D 10 G 2  {values}\d+ images/s  ETA 0:00:00", lines[1]), lines[1]
    _, last = csv.DictReader(open("a/log.csv"))
    assert all(k in last and last[k] != "" for k in LOGGED[w.name].split()) and 0 <= float(last["d_acc"]) <= 1
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    w.main([*w.tiny, "--steps", "10", "--run-dir", "b"])
    assert capsys.readouterr().out.count("\r\033[Kepoch") == 2


@over("mdgan")
@pytest.mark.parametrize("flags, said", [
    ([], "mixture of 10: mean shift from a corner ends at 1.000 of the radius, 10 clusters"),
    (["--mixture", "published"], "mixture of 10: mean shift from a corner ends at 0.000 of the radius, one blob"),
    (["--embedding-dim", "4"], "mixture of 5: ")])
def test_a_run_says_at_its_start_what_its_mixture_is(w, flags, said, capsys):
    w.main([*w.tiny, *flags, "--steps", "5", "--run-dir", "a"])
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("epoch"))
    assert [line.startswith(said) for line in lines[:first]].count(True) == 1
    assert sum("mixture" in line for line in lines) == 1


# the script alone -----------------------------------------------------------------------------------------------------


def alone(tmp_path, w, *command):
    """(exit code, stdout, stderr) of a command in a folder that holds w's script and nothing else at first."""
    folder = tmp_path / "empty"
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / f"{w.name}.py", folder)
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


ALONE = {"args.json", "log.csv", "last.pt", "samples", "samples.png"}


@EVERY
def test_copied_alone_it_trains_resumes_and_generates(w, tmp_path):
    """The whole chain in one process, in an empty folder: the script and nothing else. The figures are metrics.py's,
    but for a script's own."""
    code = (f"import sys; import {w.name} as w; render = w.render_digits\n"
            "w.render_digits = lambda n, seed: render(300, seed)\n"
            "w.main([*sys.argv[1:], '--steps', '10', '--run-dir', 'run', '--sample-every', '5'])\n"
            "w.main(['--resume', 'run/last.pt', '--steps', '20'])\n"
            "w.main(['--resume', 'run/last.pt', '--generate', '2'])\n"
            "assert 'metrics' not in sys.modules")
    code, out, err = alone(tmp_path, w, "-c", code, *w.tiny)
    assert (code, err) == (0, "") and out.count("no scores") == 3
    run = tmp_path / "empty/run"
    assert set(os.listdir(run)) == ALONE | {f"{w.name}.py", "generated"} | w.figures
    assert sorted(os.listdir(run / "samples")) == [f"step_{i:07}.png" for i in (0, 5, 10, 15, 20)]
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 20
    assert [r[0] for r in losses(run)] == ["5", "10", "15", "20"] and len(os.listdir(run / "generated")) == 2


def test_copied_alone_it_runs_from_the_shell(w, tmp_path):
    code, out, err = alone(tmp_path, w, "wgan_gp.py", *w.tiny, "--steps", "10", "--run-dir", "run")
    assert (code, err) == (0, "") and "no scores" in out
    assert set(os.listdir(tmp_path / "empty/run")) == ALONE | {"wgan_gp.py"}
    code, out, err = alone(tmp_path, w, "wgan_gp.py", "--resume", "run/last.pt", "--generate", "2")
    assert (code, err) == (0, "") and len(os.listdir(tmp_path / "empty/run/generated")) == 2
    code, out, err = alone(tmp_path, w, "wgan_gp.py", "--steps", "no")
    assert code == 2 and err.count("\n") == 1 and err.startswith("wgan_gp.py: error: ")


# a copy of one's own: what is changed, by lines of wgan_gp.py ---
MINE = {
    "from torch import nn\n": "from torch import nn\nfrom torch.nn.utils.parametrizations import spectral_norm\n",
    "default=10.0,": "default=0.0,",
    "[nn.Conv2d(width, w, k, 2, 1), ": "[spectral_norm(nn.Conv2d(width, w, k, 2, 1)), ",
    "nn.Conv2d(width, 1, start, 1, 0), ": "spectral_norm(nn.Conv2d(width, 1, start, 1, 0)), ",
    "return score_fake.mean() - score_real.mean()":
        "return F.relu(1 - score_real).mean() + F.relu(1 + score_fake).mean()",
    '"w_dist": -discriminator_loss(score_real, score_fake)': '"margin": (score_real - score_fake).mean()',
    'stacked_mnist=3)': 'stacked_mnist=3, kmnist=1)',
    'TORCHVISION = {': 'TORCHVISION = {"kmnist": ("KMNIST", "KMNIST/raw"), '}


def idx(path, x):
    """As MNIST's files: two zeros, 8 for bytes, the number of dimensions, each as four bytes, the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(n.to_bytes(4, "big") for n in x.shape)
    path.write_bytes(bytes([0, 0, 8, x.dim()]) + sizes + x.byte().numpy().tobytes())


def test_ten_lines_make_a_script_of_ones_own(tmp_path, monkeypatch):
    """A hinge loss, spectral norm, a column for the log and one more data set, in a copy beside metrics.py: it trains,
    scores, plots its column, resumes and generates."""
    text = (ROOT / "wgan_gp.py").read_text()
    for a, b in MINE.items():
        assert text.count(a) == 1, a
        text = text.replace(a, b)
    diff = list(difflib.unified_diff((ROOT / "wgan_gp.py").read_text().splitlines(), text.splitlines(), n=0))
    assert 5 < sum(line.startswith("+") for line in diff[2:]) <= 10
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine.py").write_text(text)
    shutil.copy(ROOT / "metrics.py", home)
    for part, n in (("train", 300), ("t10k", 100)):
        x, y = rendered(300, len(part))
        idx(home / f"data/KMNIST/raw/{part}-images-idx3-ubyte", x[:n, 0])
        idx(home / f"data/KMNIST/raw/{part}-labels-idx1-ubyte", y[:n])

    def call(*flags):
        done = subprocess.run([sys.executable, "mine.py", *flags], cwd=home, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    out = call(*TINY, "--dataset", "kmnist", "--steps", "20", "--eval-every", "10", "--run-dir", "a")
    assert "FID[classifier-kmnist-32/128 " in out and "n 100 + 100" in out
    scores = json.loads((home / "a/scores.json").read_text())
    assert scores["last.pt"]["n_fake"] == 100 and 0 < scores["last.pt"]["fid"] < 1e6
    call("--resume", "a/last.pt", "--steps", "30")
    log = metrics.read_log(home / "a")
    assert log["margin"][0] == [5, 10, 15, 20, 25, 30] and log["fid"][0] == [10, 20, 30] and "w_dist" not in log
    drawn, draw = [], metrics.ImageDraw.ImageDraw.text
    monkeypatch.setattr(metrics.ImageDraw.ImageDraw, "text", lambda self, at, text, *a, **k: (
        drawn.append(text), draw(self, at, text, *a, **k)))
    metrics.plot([home / "a"], tmp_path / "again.png")
    assert {"margin", "d_loss", "fid (log scale)", "coverage"} <= set(drawn)
    assert (tmp_path / "again.png").read_bytes() == (home / "a/curves.png").read_bytes()
    call("--resume", "a/last.pt", "--generate", "3")
    assert len(os.listdir(home / "a/generated")) == 3
    assert sorted(p.name for p in home.iterdir() if p.is_file()) == ["metrics.py", "mine.py"]

    spec = importlib.util.spec_from_file_location("mine", home / "mine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    D = module.make_discriminator(module.parse_args(["--paper"]), 1)
    weights = [p for n, p in D.named_parameters() if n.endswith("original")]
    assert len(weights) == 4 and all(p.std().item() == pytest.approx(0.02, rel=0.06) for p in weights), weights


# rejection ------------------------------------------------------------------------------------------------------------


def test_held_out_pictures_are_never_trained_on(w, monkeypatch):
    """Held out and trained on make up the data, once each; the order of the rest is still a function of the seed."""
    monkeypatch.setattr(w.module, "render_digits",  # picture i holds the number i
                        lambda n, seed: (torch.arange(300).view(300, 1, 1, 1).expand(-1, 1, 28, 28)
                                         .remainder(251).byte().contiguous(), torch.arange(300)))
    args = w.parse_args([*w.tiny, "--holdout", "44"])
    batch = w.Batches(args, torch.device("cpu"))
    assert batch.per_epoch == (300 - 44) // 8
    pictures, trained = (torch.cat(t) for t in zip(*(batch() for _ in range(batch.per_epoch))))
    assert (pictures[:, 0, 0, 0] == (trained % 251).byte()).all()
    x, y = batch.held
    assert len(y) == 44 and sorted([*trained.tolist(), *y.tolist()]) == list(range(300))
    assert (x[:, 0, 0, 0] == (y % 251).byte()).all()
    again = w.Batches(args, torch.device("cpu"))
    assert torch.equal(torch.cat([again()[1] for _ in range(again.per_epoch)]), trained)


@EVERY
def test_generation_by_naive_rejection_keeps_the_pictures_the_rule_keeps(w, monkeypatch):
    """What is written, against a replay of the rule: z in order, chance sigmoid(D(G(z))), one uniform each."""
    w.main([*w.tiny, "--steps", "20", "--run-dir", "a", "--lr-g", "1e-2"])
    with_metrics(w, monkeypatch)
    said = []
    monkeypatch.setattr(w.module, "say", lambda text, redraw=False: said.append(text))
    w.main(["--resume", "a/last.pt", "--generate", "6", "--generate-to", "out", "--reject", "naive"])
    G, D = w.networks(torch.load("a/last.pt", weights_only=True))
    of_chance, args = w.seeded(0, 6, 1), w.parse_args(w.tiny)
    z = torch.cat([w.sample_z(args, 1000, "cpu", w.seeded(0, 6, 2, i)) for i in range(1, 21)])
    uniform = torch.cat([torch.rand(1000, generator=of_chance, dtype=torch.float64) for _ in range(20)])
    y = torch.arange(20_000) % 10 if w.told else None
    with torch.no_grad():
        score = D(G(z, y), y) if w.told else D(G(z), z=z) if w.module is bigan else D(G(z))
        chance = 1 / (1 + torch.exp(-score.double()))
    wanted = (uniform < chance).nonzero().flatten()[:6]
    shown = np.stack([np.asarray(Image.open(f)) for f in sorted(Path("out").iterdir())]).astype(float)
    assert np.abs(shown - paint(G, z[wanted], y[wanted] if w.told else None)).max() <= 1
    assert f"{int(wanted[-1]) + 1} attempts" in said[-1], said


@over("wgan_gp", "dcgan", "cdcgan", "conditional", "unrolled", "mdgan", "bigan")
def test_drs_is_calibrated_on_held_out_pictures_and_scored_at_the_end(w, monkeypatch):
    """The head is fitted on scores of the held-out pictures, and their labels, alone; scores.json: what it took."""
    scripted_judge(monkeypatch, [], w)
    calls = []
    monkeypatch.setattr(metrics, "platt", lambda real, fake: calls.append((real, fake)) or (1.0, 0.0, 0.7))
    w.main([*w.tiny, "--steps", "20", "--run-dir", "a", "--holdout", "40", "--reject", "drs"])
    scores = json.loads(Path("a/scores.json").read_text())
    took = scores["last.pt --reject drs"]
    assert took["attempts"] >= 10 and took["auc"] == 0.7 and took["burn_in"] == 10_000 and took["fid"] == 1
    assert "label_accuracy" not in took
    _, D = w.networks(torch.load("a/last.pt", weights_only=True))
    x, y = w.Batches(w.parse_args([*w.tiny, "--holdout", "40"]), torch.device("cpu")).held
    with torch.no_grad():
        torch.testing.assert_close(calls[0][0], D(x.float() / 127.5 - 1, y))
    assert len(calls[0][1]) == 40


@pytest.mark.parametrize("flags, named", [
    (["--reject", "drs"], "holdout"), (["--reject", "naive"], "metrics.py"), (["--holdout", "295"], "batch-size")])
def test_rejection_mistakes_are_one_line(w, flags, named, capsys):
    with pytest.raises(SystemExit) as stop:
        w.main([*w.tiny, "--steps", "5", *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and named in err and not Path("runs").exists()


def test_a_discriminator_of_no_use_is_one_line(w, monkeypatch, capsys):
    w.main([*w.tiny, "--steps", "5", "--run-dir", "a", "--holdout", "40"])
    with_metrics(w, monkeypatch)

    def useless(real, fake):
        raise ValueError("AUC .4")

    monkeypatch.setattr(metrics, "platt", useless)
    with pytest.raises(SystemExit) as stop:
        w.main(["--resume", "a/last.pt", "--generate", "6", "--reject", "drs", "--generate-to", "out"])
    assert stop.value.code == 2 and "AUC .4" in capsys.readouterr().err and not Path("out").exists()


# several flags of method at once, and data of other kinds -------------------------------------------------------------


@pytest.mark.parametrize("w, flags", [
    ("dcgan", "--r1 2 --upsample nearest --arch dcgan"), ("dcgan", "--d-norm batch --norm-first --loss minimax"),
    ("wgan_gp", "--flip --batch-size 64"), ("cdcgan", "--d-ignores-label"), ("cdcgan", "--arch mlp --image-size 28"),
    ("wgan_clip", "--g-norm layer --d-dropout .3 --upsample bilinear"), ("wgan_clip", "--d-norm none --arch mlp"),
    ("conditional", "--d-ignores-label --optimizer rmsprop --g-norm none"),
    ("conditional", "--label-embedding-dim 3 --d-norm none --amp"),
    ("unrolled", "--inner sgd --inner-lr .3 --loss minimax --arch mlp --k 1"), ("unrolled", "--k 3 --amp"),
    ("unrolled", "--k 0 --g-steps 2"), ("mdgan", "--mixture published --loss saturating --arch mlp"),
    ("mdgan", "--embedding-dim 3 --amp --g-steps 2"), ("bigan", "--arch mlp --prior uniform --g-steps 2"),
    ("bigan", "--amp --d-steps 1")], indirect=["w"])
def test_combinations_resume_bit_for_bit(w, flags):
    run = [*w.tiny, *flags.split(), "--sample-every", "0"]
    w.main([*run, "--steps", "20", "--run-dir", "whole"])
    w.main([*run, "--steps", "10", "--run-dir", "half"])
    w.main(["--resume", "half/last.pt", "--steps", "20"])
    same(tensors("half/last.pt"), tensors("whole/last.pt"))
    assert Path("half/samples.png").read_bytes() == Path("whole/samples.png").read_bytes()
    w.main(["--resume", "half/last.pt", "--generate", "3"])
    assert len(os.listdir("half/generated")) == 3


@over("dcgan", "wgan_clip")
def test_decay_by_fid_on_data_without_labels(w, monkeypatch, capsys):
    """It is scored on rotations, so the rates fall; with too few test pictures for a score a line says so."""
    monkeypatch.setattr(w.module, "load_data", lambda *a, **k: (rendered(300, 1)[0], torch.full((300,), -1)))
    flags = [*w.tiny, "--steps", "20", "--lr-decay", "best-fid", "--eval-every", "5", "--patience", "1"]
    scripted_judge(monkeypatch, [50, 60, 70], w)
    w.main([*flags, "--run-dir", "a"])
    assert [r["lr_g"] for r in csv.DictReader(open("a/log.csv")) if r["lr_g"]] == ["0.0001"] * 2 + ["5e-05", "2.5e-05"]
    monkeypatch.setattr(metrics, "FEWEST", 11)
    capsys.readouterr()
    w.main([*flags, "--run-dir", "b"])
    assert "no scores: too few test pictures" in capsys.readouterr().out and not Path("b/best.pt").exists()


@EVERY
def test_dry_run_does_one_of_everything(w, monkeypatch):
    scripted_judge(monkeypatch, [], w)
    w.main([*w.tiny, "--dry-run", "--run-dir", "a"])
    made = {"args.json", f"{w.name}.py", "log.csv", "last.pt", "best.pt", "samples", "samples.png", "training.gif",
            "interpolation_latent.png", "interpolation_pixel.png", "traversal.png", "scores.json", "curves.png"}
    assert set(os.listdir("a")) == made | w.figures
    assert [r[0] for r in losses("a")] == ["5", "5", "10", "10"]  # two iterations, a row of losses and one of scores
    assert sorted(p.name for p in Path("a/samples").iterdir()) == [f"step_{i:07}.png" for i in (0, 5, 10)]


def test_a_higher_percentile_keeps_fewer(w, monkeypatch):
    """By the rule: at percentile q a picture at the q-th of the burn-in's scores is kept one time in two."""
    wgan_gp.main([*TINY, "--steps", "20", "--run-dir", "a", "--lr-g", "1e-2", "--holdout", "40"])
    with_metrics(w, monkeypatch)
    monkeypatch.setattr(metrics, "platt", lambda real, fake: (1e8, 0.0, 0.7))  # so steep that the rule is a step
    attempts, rejected = [], metrics.rejected

    def watched(*args):
        x, took = rejected(*args)
        attempts.append(took["attempts"])
        return x, took

    monkeypatch.setattr(metrics, "rejected", watched)
    for q in ("20", "90"):
        wgan_gp.main(["--resume", "a/last.pt", "--generate", "400", "--generate-to", q, "--reject", "drs",
                      "--drs-percentile", q])
    assert attempts[0] == pytest.approx(400 / 0.8, rel=0.2) and attempts[1] == pytest.approx(400 / 0.1, rel=0.3)
