"""The run: exact resume, signals, checkpoints, logs, errors, figures, generation. Tiny networks on rendered digits."""

import functools
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CASES,
    EVERY,
    ROOT,
    SCORES,
    TINY,
    checkpoint,
    leaves,
    over,
    rendered,
    rows,
    same,
    scripted_judge,
    tensors,
    timeless,
)
from PIL import Image

import metrics
import wgan_gp

pytestmark = pytest.mark.usefixtures("small")

SETTINGS = [[], ["--paper"], ["--arch", "mlp"], ["--arch", "mlp", "--paper"]]
LOGGED = {
    "wgan_gp": "d_loss g_loss penalty w_dist grad_norm d_acc",
    "dcgan": "d_loss g_loss penalty d_acc",
    "cdcgan": "d_loss g_loss penalty d_acc",
    "wgan_clip": "d_loss g_loss w_dist clipped d_acc",
    "unrolled": "d_loss g_loss penalty d_acc",
    "mdgan": "d_loss g_loss penalty d_acc",
    "bigan": "d_loss g_loss penalty d_acc",
}


@pytest.fixture(scope="session")
def kept_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def ran(w, kept_runs):
    """A run of w with these flags in folder `name` here: trained once a session, copied from then on."""

    def run(name, *flags):
        key = hashlib.sha256(repr((w.tiny, w.name, name, flags)).encode()).hexdigest()[:16]
        if (kept_runs / key).exists():
            shutil.copytree(kept_runs / key, name)
        else:
            w.main([*w.tiny, *flags, "--run-dir", name])
            shutil.copytree(name, kept_runs / key)

    return run


def networks(w, path):
    """The averaged G of a checkpoint, and D as a function of images (and labels), for use."""
    saved = checkpoint(path)
    args = types.SimpleNamespace(**saved["args"])
    classes = [len(saved["classes"])] if w.name in ("cdcgan", "wgan_clip") else []
    D = w.Discriminator(args, 1, *classes).eval()
    D.load_state_dict(saved["D"])
    if w.name == "bigan":
        E = w.load_encoder(path)
        return w.load(path), lambda x, y: D(x, E(x))
    return w.load(path), lambda x, y: D(x, y) if w.told else D(x)


def fails(w, capsys, *flags):
    """Runs w, which is to end with exit code 2 and one line on stderr, no traceback. Returns that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        w.main([*flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "Traceback" not in err and "usage" not in err, err
    return err


# resume ---------------------------------------------------------------------------------------------------------------


def brightness(x):
    """Stands in for an FID: it depends on the images alone, so that equal runs have equal scores."""
    return x.double().mean().item()


def killed(name, flags, owner, attribute, call, after):
    """In a process of its own: runs the script, and SIGKILL comes before or after this call of this function.

    Of save's calls those of last.pt count."""
    w = CASES[name]
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(metrics, "render_digits", lambda n, seed: rendered(300, seed))
    scripted_judge(monkeypatch, brightness, w)
    owner = {"script": w.module, "Study": metrics.Study, "os": os}[owner]
    f = getattr(owner, attribute)
    calls = 0

    def deadly(*args, **kwargs):
        nonlocal calls
        counts = attribute != "save" or args[0] == "last.pt"
        calls += counts
        if counts and calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = f(*args, **kwargs)
        if counts and calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, attribute, deadly)
    w.main(flags)


@functools.cache
def processes():
    """A process that has imported torch, and starts copies of itself: ten times faster than a new Python."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "torchvision", "pytest"])
    return context


def kill(w, flags, owner="script", attribute="save", call=1, after=True):
    name = next(name for name, case in CASES.items() if case is w)
    process = processes().Process(target=killed, args=(name, flags, owner, attribute, call, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (owner, attribute, call)


def same_run(a, b):
    """Two folders hold the same run: networks, logs and every picture."""
    for name in ("last.pt", "best.pt"):
        same(tensors(f"{a}/{name}"), tensors(f"{b}/{name}"))
    for name in ("log.csv", "scores.csv"):
        assert timeless(a, name) == timeless(b, name), name
    assert json.loads(Path(a, "scores.json").read_text()) == json.loads(Path(b, "scores.json").read_text())
    files = sorted(p.relative_to(a) for p in Path(a).rglob("*"))
    assert files == sorted(p.relative_to(b) for p in Path(b).rglob("*"))
    for name in files:
        if name.suffix in (".png", ".gif") and name.stem != "curves":
            assert Path(a, name).read_bytes() == Path(b, name).read_bytes(), name


@EVERY
@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_killed_and_resumed_equals_unbroken_bit_for_bit(w, settings, monkeypatch):
    scripted_judge(monkeypatch, brightness, w)
    flags = [*w.tiny, *settings, "--steps", "20", "--checkpoint-every", "10", "--sample-every", "5"]
    w.main([*flags, "--run-dir", "whole"])
    kill(w, [*flags, "--run-dir", "cut"])
    assert checkpoint("cut/last.pt")["step"] == 10
    assert not Path("cut/samples.png").exists()
    w.main(["--resume", "cut/last.pt"])
    assert [row["step"] for row in rows("cut")] == ["5", "10", "15", "20"]
    same_run("cut", "whole")


@over("wgan_gp", "conditional")
def test_ten_kills_in_a_row_leave_no_trace(w, monkeypatch):
    """After checkpoints, before their files take the old ones' place, in scores, in logs, at the end, in figures."""
    scripted_judge(monkeypatch, brightness, w)
    flags = [*w.tiny, *"--steps 24 --checkpoint-every 4 --eval-every 8 --log-every 2 --sample-every 4".split()]
    w.main([*flags, "--run-dir", "whole"])
    kill(w, [*flags, "--run-dir", "cut"])
    for point in [
        ("os", "replace", 2, False),  # of log.csv, in the resume
        ("os", "replace", 3, False),  # of last.pt at 8, or of best.pt
        ("Study", "add", 3, True),
        ("Study", "log", 3, True),
        ("Study", "evaluate", 1, True),  # the row of scores.csv is there, best.pt not
        ("Study", "sheet", 2, True),
        ("script", "save", 1, True),
        ("Study", "start", 1, True),
        ("script", "save", 2, True),
        ("Study", "interpolations", 1, True),
    ]:
        kill(w, ["--resume", "cut/last.pt"], *point)
    assert checkpoint("cut/last.pt")["step"] == 24
    w.main(["--resume", "cut/last.pt"])
    same_run("cut", "whole")


def test_a_kill_between_the_last_scores_and_best_pt_loses_neither(w, monkeypatch):
    flags = [*w.tiny, "--steps", "10", "--eval-every", "4"]
    judge_by_step(monkeypatch, {4: 50, 8: 60, 10: 40})
    w.main([*flags, "--run-dir", "whole"])
    evaluate = metrics.Study.evaluate

    def cut(study, i):
        better = evaluate(study, i)
        if i == 10:
            raise KeyboardInterrupt
        return better

    with monkeypatch.context() as m:
        m.setattr(metrics.Study, "evaluate", cut)
        with pytest.raises(SystemExit):
            w.main([*flags, "--run-dir", "cut"])
    w.main(["--resume", "cut/last.pt"])
    assert checkpoint("cut/best.pt")["step"] == 10
    same_run("cut", "whole")


def judge_by_step(monkeypatch, fids, w=CASES["wgan_gp"]):
    """Scores of {step: fid_train}; the last ones are those of the last step."""
    step = max(fids)
    evaluate = metrics.Study.evaluate

    def noted(study, i):
        nonlocal step
        step = i
        return evaluate(study, i)

    monkeypatch.setattr(metrics.Study, "evaluate", noted)
    scripted_judge(monkeypatch, lambda x: fids[step], w)


@EVERY
def test_a_resume_from_an_earlier_step_drops_the_branch_after_it(w, monkeypatch):
    """Rows, sheets, the frames of training.gif, best.pt: all are those of a run that never left the way."""
    judge_by_step(monkeypatch, {4: 40, 8: 30, 12: 20, 16: 10, 20: 5}, w)  # a best.pt of before would be lost for good
    flags = [*w.tiny, "--sample-every", "4", "--eval-every", "4", "--log-every", "2", "--lr-decay", "none"]
    w.main([*flags, "--steps", "16", "--run-dir", "whole"])
    w.main([*flags, "--steps", "8", "--run-dir", "cut"])
    shutil.copy("cut/last.pt", "cut/earlier.pt")
    lr_g = checkpoint("cut/last.pt")["args"]["lr_g"]
    w.main(["--resume", "cut/last.pt", "--lr-g", "0.1", "--steps", "20"])
    w.main(["--resume", "cut/earlier.pt", "--lr-g", str(lr_g), "--steps", "16"])
    os.unlink("cut/earlier.pt")
    assert [row["step"] for row in rows("cut", "scores.csv")] == ["4", "8", "12", "16"]
    kept = json.loads(Path("cut/args-to-8.json").read_text())
    assert (kept["steps"], kept["lr_g"]) == (8, lr_g)  # not the .1 of the branch that was dropped
    os.unlink("cut/args-to-8.json")
    same_run("cut", "whole")


def test_the_flags_of_every_stretch_of_a_run_are_kept(w):
    """Up to 4 at the default, 4 to 8 at .1, then from 2 on at .2: the file of update 4 goes, as its updates have."""
    w.main([*w.tiny, "--steps", "2", "--run-dir", "a"])
    shutil.copy("a/last.pt", "a/earlier.pt")
    lr_g = checkpoint("a/last.pt")["args"]["lr_g"]

    def kept():
        found = {path.name: json.loads(path.read_text()) for path in Path("a").glob("args*.json")}
        return {name: (args["steps"], args["lr_g"]) for name, args in found.items()}

    w.main(["--resume", "a/last.pt", "--steps", "4"])
    w.main(["--resume", "a/last.pt", "--steps", "8", "--lr-g", "0.1"])
    assert kept() == {"args-to-2.json": (2, lr_g), "args-to-4.json": (4, lr_g), "args.json": (8, 0.1)}
    w.main(["--resume", "a/last.pt", "--steps", "8"])  # nothing has changed
    assert len(kept()) == 3
    w.main(["--resume", "a/earlier.pt", "--steps", "6", "--lr-g", "0.2"])
    assert kept() == {"args-to-2.json": (2, lr_g), "args.json": (6, 0.2)}
    os.unlink("a/args-to-2.json")
    w.main(["--resume", "a/earlier.pt", "--steps", "6", "--lr-g", "0.3"])
    assert kept() == {"args-to-2.json": (6, 0.2), "args.json": (6, 0.3)}


def test_best_pt_of_an_abandoned_branch_is_not_the_best(w, monkeypatch):
    """Branch one has its best at 15, with 10, in the place of 40 at 10. Branch two, from 10 on, has 45 at 15: the best
    network that it still can have."""
    judge_by_step(monkeypatch, {5: 50, 10: 40, 15: 10, 20: 70})
    w.main([*w.tiny, *"--eval-every 5 --steps 10 --run-dir a".split()])
    shutil.copy("a/last.pt", "a/earlier.pt")
    w.main(["--resume", "a/last.pt", "--steps", "20"])
    assert checkpoint("a/best.pt")["step"] == 15
    judge_by_step(monkeypatch, {15: 45, 20: 70})
    w.main(["--resume", "a/earlier.pt", "--steps", "20", "--lr-g", "0"])
    best = checkpoint("a/best.pt")
    assert best["args"]["lr_g"] == 0 and best["step"] == 15


@pytest.mark.parametrize(
    "w, number",
    [
        ("wgan_gp", signal.SIGINT),
        ("wgan_gp", signal.SIGHUP),
        ("dcgan", signal.SIGTERM),
        ("cdcgan", signal.SIGINT),
        ("wgan_clip", signal.SIGHUP),
        ("conditional", signal.SIGINT),
        ("unrolled", signal.SIGTERM),
        ("mdgan", signal.SIGINT),
        ("bigan", signal.SIGTERM),
    ],
    indirect=["w"],
)
def test_a_signal_leaves_a_checkpoint_that_resumes_bit_for_bit(w, ran, monkeypatch, capsys, number):
    ran("whole", "--steps", "20")
    with monkeypatch.context() as m:
        signal_at(m, {15: [number]})
        with pytest.raises(SystemExit) as stop:
            w.main([*w.tiny, "--steps", "20", "--run-dir", "cut"])
    assert stop.value.code == 128 + number
    assert checkpoint("cut/last.pt")["step"] == 15 and "--resume cut/last.pt" in capsys.readouterr().out
    assert not list(Path("cut").glob("*.png"))  # no figures of a run to be continued
    w.main(["--resume", "cut/last.pt"])
    same(tensors("cut/last.pt"), tensors("whole/last.pt"))
    assert timeless("cut") == timeless("whole")


def signal_at(monkeypatch, numbers):
    """Sends this process the signals {update of D: [signal, ...]}."""
    add = metrics.Study.add
    updates = 0

    def signalled(study, losses):
        nonlocal updates
        add(study, losses)
        updates += study.args.d_steps
        for number in numbers.get(updates, []):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(metrics.Study, "add", signalled)


@pytest.mark.parametrize(
    "first, second", [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM), (signal.SIGHUP, signal.SIGTERM)]
)
def test_a_second_signal_leaves_at_once(w, monkeypatch, first, second):
    signal_at(monkeypatch, {3: [first, second]})
    with pytest.raises(SystemExit) as stop:
        w.main([*w.tiny, "--steps", "20", "--run-dir", "a"])
    assert stop.value.code == 128 + second and not Path("a/last.pt").exists()


def test_a_background_job_of_a_shell_script_says_that_it_ignores_ctrl_c(w, monkeypatch, capsys):
    """Such a shell starts it with SIGINT ignored, and it stays so: the script's own Ctrl-C is not meant for it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signal_at(monkeypatch, {3: [signal.SIGINT, signal.SIGINT]})
        w.main([*w.tiny, "--steps", "5", "--run-dir", "a"])
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint("a/last.pt")["step"] == 5
    assert f"does not hear Ctrl-C: kill {os.getpid()} stops it" in capsys.readouterr().out


def test_a_run_under_nohup_outlives_its_terminal(w, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal_at(monkeypatch, {3: [signal.SIGHUP, signal.SIGHUP]})
    w.main([*w.tiny, "--steps", "5", "--run-dir", "a"])
    assert checkpoint("a/last.pt")["step"] == 5


def test_a_signal_during_the_last_write_is_not_lost(w, monkeypatch):
    """Training is over and has looked for signals for the last time, the figures have not begun."""
    save = w.save

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args)

    monkeypatch.setattr(w.module, "save", signalled)
    with pytest.raises(SystemExit) as stop:
        w.main([*w.tiny, "--steps", "5", "--checkpoint-every", "0", "--run-dir", "a"])
    assert stop.value.code == 143 and checkpoint("a/last.pt")["step"] == 5
    assert not Path("a/samples.png").exists()


def test_after_the_training_the_first_signal_leaves_at_once(w, monkeypatch, capsys):
    monkeypatch.setattr(metrics.Study, "interpolations", lambda study: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        w.main([*w.tiny, "--steps", "5", "--run-dir", "a"])
    assert stop.value.code == 130 and checkpoint("a/last.pt")["step"] == 5
    assert not Path("a/traversal.png").exists()
    line = f"stopped while scoring. The training is over: --resume {Path('a/last.pt')} scores again"
    assert capsys.readouterr().out.splitlines()[-1] == line and metrics.Stop.finished is None


def test_a_signal_in_an_evaluation_stops_after_it(w, monkeypatch):
    """Its row and best.pt are kept, and it is not done again."""
    flags = [*w.tiny, *"--steps 20 --eval-every 5".split()]
    judge_by_step(monkeypatch, {5: 50, 10: 40, 15: 60, 20: 70})
    w.main([*flags, "--run-dir", "whole"])
    scores = metrics.Study.scores

    def signalled(study, *key):
        if key == (metrics.SCORING, 10):
            os.kill(os.getpid(), signal.SIGTERM)
        return scores(study, *key)

    with monkeypatch.context() as m:
        m.setattr(metrics.Study, "scores", signalled)
        with pytest.raises(SystemExit) as stop:
            w.main([*flags, "--run-dir", "cut"])
    assert stop.value.code == 143
    assert checkpoint("cut/last.pt")["step"] == checkpoint("cut/best.pt")["step"] == 10
    w.main(["--resume", "cut/last.pt"])
    same_run("cut", "whole")


def test_a_kill_while_it_scores_resumes_as_an_unbroken_run(w, monkeypatch):
    """The first scores take minutes."""
    flags = [*w.tiny, *"--steps 20 --eval-every 5 --checkpoint-every 10".split()]
    scripted_judge(monkeypatch, [50, 60, 40], w)
    w.main([*flags, "--run-dir", "whole"])
    scripted_judge(monkeypatch, [50, 60, None, 40], w)
    with pytest.raises(SystemExit):
        w.main([*flags, "--run-dir", "cut"])
    assert checkpoint("cut/last.pt")["step"] == 10
    w.main(["--resume", "cut/last.pt"])
    same_run("cut", "whole")


@over("wgan_gp", "wgan_clip")
def test_epochs_steps_and_rates_may_change(w):
    """300 // 8 = 37 updates are an epoch."""
    w.main([*w.tiny, "--steps", "5", "--run-dir", "a"])
    for flags, end in (("--epochs 1 --lr-g 5e-5", 37), ("", 37), ("--epochs 2", 74), ("--epochs 1 --steps 80", 80)):
        w.main(["--resume", "a/last.pt", *flags.split()])
        assert checkpoint("a/last.pt")["step"] == end, flags
        assert checkpoint("a/last.pt")["args"]["lr_g"] == 5e-5, flags


def test_a_run_goes_on_in_another_folder(w):
    w.main([*w.tiny, "--steps", "10", "--run-dir", "whole"])
    w.main([*w.tiny, "--steps", "5", "--run-dir", "half"])
    before = Path("half/log.csv").read_bytes()
    w.main(["--resume", "half/last.pt", "--steps", "10", "--run-dir", "rest"])
    assert Path("half/log.csv").read_bytes() == before and [row["step"] for row in rows("rest")] == ["10"]
    one, other = checkpoint("rest/last.pt"), checkpoint("whole/last.pt")
    for name in ("G", "D", "ema", "opt_g", "opt_d"):
        # the rate falls from the start over all steps, of which the first half had five
        assert one[name].keys() == other[name].keys()
    assert one["step"] == other["step"] == 10


def test_fewer_steps_than_were_made_are_refused(w, ran, capsys):
    """ "--steps 10" after twenty may have meant ten more."""
    ran("a", "--steps", "20")
    before = Path("a/args.json").read_bytes()
    assert "at update 20, past the 10" in fails(w, capsys, "--resume", "a/last.pt", "--steps", "10")
    assert Path("a/args.json").read_bytes() == before


@over("wgan_gp", "conditional")
def test_another_seed_makes_other_pictures_of_one_checkpoint(w, ran):
    """With --generate alone may the seed change: the pictures are those of the noise that it makes."""
    ran("a", "--steps", "5", "--lr-g", "1e-2")  # at so high a rate its images differ with z by then
    made = {}
    for name, flags in (("same", []), ("seven", ["--seed", "7"]), ("again", ["--seed", "7"])):
        w.main(["--resume", "a/last.pt", "--generate", "3", *flags, "--generate-to", name])
        made[name] = [Image.open(f"{name}/{i:05}.png").tobytes() for i in range(3)]
    assert made["seven"] == made["again"]
    assert all(x != y for x, y in zip(made["seven"], made["same"]))
    with pytest.raises(SystemExit):
        w.main(["--resume", "a/last.pt", "--seed", "7", "--steps", "10"])


@pytest.mark.parametrize(
    "w, flags",
    [
        ("dcgan", "--r1 2 --upsample nearest"),
        ("dcgan", "--d-norm batch --norm-first --loss minimax"),
        ("dcgan", "--loss relativistic --r2 1 --init default"),
        ("wgan_gp", "--flip --batch-size 64"),
        ("wgan_gp", "--d-steps 2 --g-steps 2 --prior uniform"),
        ("cdcgan", "--d-ignores-label --d-norm batch"),
        ("wgan_clip", "--g-norm layer --d-dropout .3 --upsample bilinear"),
        ("conditional", "--d-ignores-label --optimizer rmsprop --g-norm none"),
        ("conditional", "--label-embedding-dim 3 --d-norm none --amp"),
        ("unrolled", "--inner sgd --inner-lr .3 --loss minimax --arch mlp --k 2"),
        ("unrolled", "--k 3 --inner adam --amp"),
        ("unrolled", "--k 0 --g-steps 2"),
        ("mdgan", "--mixture published --loss saturating"),
        ("mdgan", "--embedding-dim 3 --amp --g-steps 2"),
        ("bigan", "--arch mlp --prior uniform --g-steps 2"),
        ("bigan", "--amp --d-steps 2"),
    ],
    indirect=["w"],
)
def test_combinations_resume_bit_for_bit(w, flags, monkeypatch):
    run = [*w.tiny, *flags.split(), "--steps", "12"]
    w.main([*run, "--run-dir", "whole"])
    with monkeypatch.context() as m:
        signal_at(m, {6: [signal.SIGINT]})
        with pytest.raises(SystemExit):
            w.main([*run, "--run-dir", "half"])
    assert checkpoint("half/last.pt")["step"] == 6
    w.main(["--resume", "half/last.pt"])
    same(tensors("half/last.pt"), tensors("whole/last.pt"))
    assert Path("half/samples.png").read_bytes() == Path("whole/samples.png").read_bytes()
    w.main(["--resume", "half/last.pt", "--generate", "3"])
    assert len(list(Path("half/generated").glob("*.png"))) == 3


# checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_write_that_breaks_off_leaves_the_old_checkpoint(w, monkeypatch):
    w.main([*w.tiny, "--steps", "5", "--run-dir", "a"])
    before = Path("a/last.pt").read_bytes()

    def half(obj, file):
        file.write(before[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(SystemExit):
        w.main(["--resume", "a/last.pt", "--steps", "10"])
    assert Path("a/last.pt").read_bytes() == before
    assert not list(Path("a").glob("*.tmp"))


def test_a_cut_checkpoint_is_refused_with_one_line(w, ran, capsys):
    ran("a", "--steps", "5")
    data = Path("a/last.pt").read_bytes()
    Path("b").mkdir()
    for cut in [0, 1, *np.random.RandomState(0).randint(2, len(data) - 1, 12).tolist(), len(data) - 1]:
        Path("b/cut.pt").write_bytes(data[:cut])
        assert "cut.pt" in fails(w, capsys, "--resume", "b/cut.pt", "--steps", "10")
        assert os.listdir("b") == ["cut.pt"]


@EVERY
def test_checkpoint_holds_plain_types_and_names_its_script(w, ran):
    ran("a", "--steps", "5")
    saved = checkpoint("a/last.pt")
    encoder = {"E", "ema_e"} if w.name == "bigan" else set()
    parts = {"G", "D", "ema", "opt_g", "opt_d"} | encoder
    assert saved.keys() == {"script", "args", "step", "classes", "channels", "seconds", "rng"} | parts
    assert saved["script"] == w.name and saved["step"] == 5 and saved["args"]["ngf"] == 2 and saved["channels"] == 1
    assert list(saved["classes"].items()) == ([(str(i), 30) for i in range(10)] if w.told else [])
    kept = json.loads(Path("a/args.json").read_text())
    assert kept["latent_dim"] == 6
    assert (kept["torch"], kept["gpu"], kept["processes"]) == (torch.__version__, None, 1)
    assert list(kept["classes"].items()) == [(str(i), 30) for i in range(10)]  # those of the data, in every script
    assert Path(f"a/{w.name}.py").read_bytes() == (ROOT / f"{w.name}.py").read_bytes()


@EVERY
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=" ".join)
def test_load_gives_the_averaged_generator(w, ran, settings):
    """It makes the pictures of samples.png, and is not G itself."""
    ran("a", *settings, "--steps", "10")
    saved = checkpoint("a/last.pt")
    G = w.load("a/last.pt")
    assert not G.training and not any(p.requires_grad for p in G.parameters())
    same(dict(G.state_dict()), dict(saved["ema"]))
    own = saved["G"]
    assert any(not torch.equal(p, own[name]) for name, p in G.named_parameters())
    args = types.SimpleNamespace(**saved["args"])
    z = metrics.sample_z(args, 8 if w.told else 64, "cpu", metrics.seeded(0, metrics.SHEETS))
    shown = tiles("a/samples.png", 8, args.image_size)[: len(z)]
    y = torch.zeros(8, dtype=torch.long) if w.told else None
    assert np.abs(paint(G, z, y) - shown).max() <= 1


# logs -----------------------------------------------------------------------------------------------------------------


@EVERY
def test_step_counts_and_cadence(w):
    """--steps and every --*-every take effect at the first end of an iteration at or past the number."""
    w.main([*w.tiny, *"--steps 17 --d-steps 5 --g-steps 3 --log-every 7 --sample-every 9 --run-dir a".split()])
    assert [(row["step"], row["g_updates"]) for row in rows("a")] == [("10", "6"), ("15", "9")]
    assert sorted(p.name for p in Path("a/samples").iterdir()) == [f"step_{i:07}.png" for i in (10, 20)]
    assert checkpoint("a/last.pt")["step"] == 20


@EVERY
def test_terminal_redraws_and_file_gets_whole_lines(w, monkeypatch, capsys):
    w.main([*w.tiny, "--steps", "10", "--run-dir", "a"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    names = LOGGED[w.name].split()
    values = "".join(rf"{name} -?\d+\.\d\d\d  " for name in names)
    assert len(lines) == 2
    assert re.fullmatch(rf"epoch 0\.3/0\.2703  D 10 G 10  {values}\d+ images/s  ETA 0:00:00", lines[1]), lines[1]
    last = rows("a")[-1]
    assert list(last) == ["step", "epoch", "g_updates", "seconds", *names, "images_per_s"]
    assert all(last.values()) and 0 <= float(last["d_acc"]) <= 1
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    w.main([*w.tiny, "--steps", "10", "--run-dir", "b"])
    assert capsys.readouterr().out.count("\r\033[Kepoch") == 2


def test_a_row_is_the_mean_since_the_last_one(w, monkeypatch):
    values = iter(range(1, 100))
    monkeypatch.setattr(w.module, "pair_accuracy", lambda real, fake: torch.tensor(float(next(values))))
    w.main([*w.tiny, "--steps", "10", "--run-dir", "a"])
    assert [float(row["d_acc"]) for row in rows("a")] == [3.0, 8.0]


@over("mdgan")
@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "mixture of 10: mean shift from a corner ends at 1.000 of the radius, 10 clusters"),
        (["--mixture", "published"], "mixture of 10: mean shift from a corner ends at 0.000 of the radius, one blob"),
        (["--embedding-dim", "4"], "mixture of 5: "),
    ],
)
def test_a_run_says_at_its_start_what_its_mixture_is(w, flags, said, capsys):
    w.main([*w.tiny, *flags, "--steps", "5", "--run-dir", "a"])
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("epoch"))
    assert [line.startswith(said) for line in lines[:first]].count(True) == 1
    assert sum("mixture" in line for line in lines) == 1


class Board:
    """Stands in for TensorBoard's SummaryWriter: keeps (name, step, value) and drops what its purge_step says.

    A sheet's value is its size."""

    kept = []  # noqa: RUF012  of all boards, as the event files in a folder are

    def __init__(self, folder, purge_step):
        Board.kept = [scalar for scalar in Board.kept if scalar[1] < purge_step]

    def add_scalar(self, name, value, step):
        assert not isinstance(value, str)  # the real one refuses it
        Board.kept.append((name, step, value))

    def close(self):
        pass

    def add_image(self, name, image, step):
        assert image.dtype == torch.uint8
        Board.kept.append((name, step, tuple(image.shape)))


def test_tensorboard_has_each_step_once_after_a_resume(w, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Board))
    scripted_judge(monkeypatch, [], w)
    flags = [*w.tiny, "--tensorboard", "--eval-every", "10"]
    w.main([*flags, "--steps", "10", "--run-dir", "a"])
    shutil.copy("a/last.pt", "a/earlier.pt")
    w.main(["--resume", "a/last.pt", "--steps", "30"])
    w.main(["--resume", "a/earlier.pt", "--steps", "20"])
    losses = [(step, value) for name, step, value in Board.kept if name == "d_loss"]
    assert [step for step, _ in losses] == [5, 10, 15, 20]
    assert [value for _, value in losses] == pytest.approx([float(row["d_loss"]) for row in rows("a")], rel=1e-4)
    assert [step for name, step, _ in Board.kept if name == "fid_train"] == [10, 20]
    assert [part[1:] for part in Board.kept if part[0] == "samples"] == [(20, (1, 242, 242))]  # 8 x 30 and 2


def test_tensorboard_says_how_to_get_it(w, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    err = fails(w, capsys, *w.tiny, "--steps", "5", "--run-dir", "a", "--tensorboard")
    assert "pip install tensorboard" in err and not Path("a").exists()


# the step -------------------------------------------------------------------------------------------------------------


@EVERY
def test_the_step_never_waits_for_the_device(w, monkeypatch):
    """From the batches to the losses no way from a tensor to the host is taken, and no tensor is made there."""
    armed = False
    steps = 0

    def guard(owner, name):
        real = getattr(owner, name)

        def guarded(*args, **kwargs):
            assert not armed, f"{name} inside the step"
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        guard(torch.Tensor, name)
    guard(torch, "tensor")
    batches = w.Batches.__call__
    add = metrics.Study.add

    def begins(self, i, n):
        nonlocal armed
        result = batches(self, i, n)
        armed = True
        return result

    def ends(self, losses):
        nonlocal armed, steps
        add(self, losses)
        armed = False
        steps += 1

    monkeypatch.setattr(w.Batches, "__call__", begins)
    monkeypatch.setattr(metrics.Study, "add", ends)
    w.main([*w.tiny, "--steps", "20", "--log-every", "10", "--run-dir", "a"])
    assert steps == 20


@pytest.mark.parametrize(
    "w, change",
    [
        ("wgan_gp", "--gp-weight 0"),
        ("wgan_gp", "--penalty-share 1"),
        ("wgan_gp", "--lr-d 1e-3"),
        ("wgan_gp", "--lr-g 1e-3"),
        ("wgan_gp", "--beta1 .5"),
        ("wgan_gp", "--beta2 .5"),
        ("wgan_gp", "--ema 0"),
        ("wgan_gp", "--seed 1"),
        ("wgan_gp", "--prior uniform"),
        ("wgan_gp", "--d-steps 2"),
        ("wgan_gp", "--g-steps 2"),
        ("wgan_gp", "--lr-decay none"),
        ("wgan_gp", "--flip"),
        ("wgan_gp", "--holdout 10"),
        ("wgan_gp", "--paper"),
        ("dcgan", "--loss minimax"),
        ("dcgan", "--loss relativistic"),
        ("dcgan", "--gp .5"),
        ("dcgan", "--r1 2"),
        ("dcgan", "--r2 1"),
        ("dcgan", "--penalty-share 1"),
        ("dcgan", "--d-norm batch"),
        ("dcgan", "--d-norm batch --norm-first"),
        ("dcgan", "--upsample nearest"),
        ("dcgan", "--init default"),
        ("dcgan", "--amp"),
        ("cdcgan", "--amp"),
        ("cdcgan", "--d-ignores-label"),
        ("cdcgan", "--d-norm batch"),
        ("cdcgan", "--r1 1"),
        ("wgan_clip", "--clip .001"),
        ("wgan_clip", "--optimizer rmsprop"),
        ("wgan_clip", "--d-dropout .3"),
        ("wgan_clip", "--d-norm batch"),
        ("wgan_clip", "--g-norm layer"),
        ("wgan_clip", "--upsample nearest"),
        ("wgan_clip", "--lr-decay none"),
        ("conditional", "--d-ignores-label"),
        ("conditional", "--label-embedding-dim 3"),
        ("unrolled", "--k 0"),
        ("unrolled", "--k 3"),
        ("unrolled", "--inner adam"),
        ("unrolled", "--inner-lr .1"),
        ("unrolled", "--loss minimax"),
        ("unrolled", "--r1 1"),
        ("unrolled", "--amp"),
        ("mdgan", "--mixture published"),
        ("mdgan", "--embedding-dim 8"),
        ("mdgan", "--loss saturating"),
        ("mdgan", "--r1 0"),
        ("mdgan", "--amp"),
        ("bigan", "--prior uniform"),
        ("bigan", "--r1 0"),
        ("bigan", "--amp"),
        ("bigan", "--g-steps 2"),
    ],
    indirect=["w"],
)
def test_every_training_flag_changes_the_weights(w, ran, change):
    ran("a", "--steps", "10", "--sample-every", "0")
    w.main([*w.tiny, "--steps", "10", "--sample-every", "0", "--run-dir", "b", *change.split()])
    a, b = checkpoint("a/last.pt")["ema"], checkpoint("b/last.pt")["ema"]
    assert a.keys() != b.keys() or any(a[k].shape != b[k].shape or not torch.equal(a[k], b[k]) for k in a)


def test_no_averaging_makes_the_average_g(w):
    w.main([*w.tiny, "--steps", "10", "--run-dir", "a", "--ema", "0"])
    saved = checkpoint("a/last.pt")
    assert saved["ema"].pop("updates") == 10
    same(dict(saved["ema"]), dict(saved["G"]))


@over("wgan_gp", "wgan_clip")
def test_linear_decay_reaches_zero_at_the_last_step(w, monkeypatch):
    rates = []
    set_rate = w.set_rate
    monkeypatch.setattr(w.module, "set_rate", lambda opt, rate: rates.append(rate) or set_rate(opt, rate))
    w.main([*w.tiny, *"--steps 4 --lr-g 1e-4 --lr-d 2e-4 --lr-decay linear --run-dir a".split()])
    assert rates[::2] == pytest.approx([1e-4, 7.5e-5, 5e-5, 2.5e-5])
    assert rates[1::2] == pytest.approx([2e-4, 1.5e-4, 1e-4, 5e-5])
    assert checkpoint("a/last.pt")["opt_g"]["param_groups"][0]["lr"] == pytest.approx(2.5e-5)


@EVERY
def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(w, monkeypatch, capsys):
    """It is found at the next row of the log or, without one, before the next write."""
    loss = w.generator_loss
    calls = 0

    def poisoned(*args):
        nonlocal calls
        calls += 1
        return loss(*args) * (float("nan") if calls == 6 else 1)

    monkeypatch.setattr(w.module, "generator_loss", poisoned)
    for log, found in (("0", 10), ("4", 8)):
        calls = 0
        flags = ["--steps", "20", "--run-dir", log, "--checkpoint-every", "5", "--log-every", log]
        err = fails(w, capsys, *w.tiny, *flags)
        assert f"step {found}:" in err and f"{log}/last.pt" in err
        saved = checkpoint(f"{log}/last.pt")
        assert saved["step"] == 5
        assert all(p.isfinite().all() for p in [*leaves(saved["G"]), *leaves(saved["D"]), *leaves(saved["ema"])])


def test_a_value_of_the_log_that_is_not_finite_stops_the_run_too(w, monkeypatch, capsys):
    monkeypatch.setattr(w.module, "pair_accuracy", lambda real, fake: torch.tensor(float("inf")))
    assert "step 5:" in fails(w, capsys, *w.tiny, "--steps", "20", "--run-dir", "a", "--checkpoint-every", "5")
    assert not Path("a/last.pt").exists() and not rows("a")


# scores ---------------------------------------------------------------------------------------------------------------


@EVERY
def test_scores_are_of_fresh_pictures_and_of_the_labels_asked_for(w, monkeypatch):
    judged = scripted_judge(monkeypatch, [], w)
    w.main([*w.tiny, *"--steps 10 --log-every 10 --eval-every 10 --run-dir a --lr-g 1e-2".split()])
    G = w.load("a/last.pt")
    args = w.parse_args(w.tiny)
    assert rendered(300, 1)[1].bincount().tolist() == [30] * 10  # so of ten labels one of each, in another order
    assert len(judged) == 2 and not torch.equal(judged[0][0], judged[1][0])
    for (x, given), key in zip(judged, ((metrics.SCORING, 10), (metrics.LAST,))):
        wanted = torch.randperm(10, generator=metrics.seeded(0, metrics.ASKED, *key)) if w.told else None
        assert given is wanted is None or torch.equal(given, wanted)
        z = metrics.sample_z(args, 10, "cpu", metrics.seeded(0, *key))
        assert np.abs(x[:, 0].double().numpy() - paint(G, z, wanted)).max() <= 1
    (row,) = rows("a", "scores.csv")
    shown = [*SCORES, *["label_accuracy"] * w.told, "features"]
    assert list(row)[:3] == ["step", "epoch", "seconds"] and sorted(list(row)[3:]) == sorted(shown)
    assert row["step"] == "10" and row["fid_train"] == "99" and row["fid"] == "1"


def test_best_pt_is_chosen_by_fid_to_training_images(w, monkeypatch):
    """Not by FID to test images, which is 1 at every step here; at equal scores the earlier one stays."""
    judge_by_step(monkeypatch, {5: 50, 10: 40, 15: 60, 20: 40})
    kept = []
    save = w.save

    def watched(name, i, state, study):
        kept.append((name, i))
        save(name, i, state, study)

    monkeypatch.setattr(w.module, "save", watched)
    w.main([*w.tiny, *"--steps 20 --eval-every 5 --checkpoint-every 0 --run-dir a".split()])
    assert kept == [("best.pt", 5), ("best.pt", 10), ("last.pt", 20)]
    best = checkpoint("a/best.pt")
    assert best["step"] == 10
    w.main(["--resume", "a/best.pt", "--steps", "20", "--run-dir", "b"])  # as good a start as any
    assert checkpoint("b/last.pt")["step"] == 20


def test_a_resume_remembers_the_best_score(w, monkeypatch):
    flags = [*w.tiny, "--eval-every", "5", "--run-dir", "a"]
    judge_by_step(monkeypatch, {5: 40, 10: 50, 15: 45, 20: 30})
    w.main([*flags, "--steps", "10"])
    w.main(["--resume", "a/last.pt", "--steps", "15"])
    assert checkpoint("a/best.pt")["step"] == 5
    w.main(["--resume", "a/last.pt", "--steps", "20"])
    assert checkpoint("a/best.pt")["step"] == 20
    assert [row["step"] for row in rows("a", "scores.csv")] == ["5", "10", "15", "20"]


def test_last_scores_are_made_up_for(w, monkeypatch):
    """By a run that was interrupted before they were written, one that goes to a new folder, one that is to choose
    by --reject only now. The step itself is not scored again: that row is there."""
    judged = scripted_judge(monkeypatch, [7.0], w)
    w.main([*w.tiny, "--steps", "10", "--holdout", "50", "--run-dir", "a"])
    first = json.loads(Path("a/scores.json").read_text())
    kept = Path("a/scores.csv").read_text()
    assert first.keys() == {"last.pt", "best.pt"} and len(judged) == 2
    Path("a/scores.json").unlink()
    w.main(["--resume", "a/last.pt"])
    assert json.loads(Path("a/scores.json").read_text()) == first and Path("a/scores.csv").read_text() == kept
    assert len(judged) == 3
    monkeypatch.setattr(metrics, "platt", lambda real, fake: (1.0, 0.0, 0.7))
    w.main(["--resume", "a/last.pt", "--reject", "drs"])
    assert "last.pt --reject drs" in json.loads(Path("a/scores.json").read_text())
    w.main(["--resume", "a/last.pt", "--run-dir", "b"])  # whose log and best.pt are to be made
    assert {"last.pt", "best.pt"} < json.loads(Path("b/scores.json").read_text()).keys()
    assert [row["step"] for row in rows("b", "scores.csv")] == ["10"]


@EVERY
def test_a_run_of_two_updates_does_one_of_everything(w, monkeypatch):
    scripted_judge(monkeypatch, [], w)
    w.main([*w.tiny, *"--steps 2 --log-every 1 --sample-every 1 --eval-every 1 --run-dir a".split()])
    made = {
        "args.json",
        f"{w.name}.py",
        "metrics.py",
        "log.csv",
        "scores.csv",
        "last.pt",
        "best.pt",
        "samples",
        "samples.png",
    }
    made |= {"training.gif", "interpolation_latent.png", "interpolation_pixel.png", "traversal.png", "scores.json"}
    assert set(os.listdir("a")) == made | {"curves.png"} | w.figures
    assert sorted(p.name for p in Path("a/samples").iterdir()) == ["step_0000001.png", "step_0000002.png"]


# errors ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there: refused at once
    monkeypatch.delenv("no_proxy", raising=False)


GOOD = "--resume good/last.pt"
ERRORS = [  # the script, its flags, and what the line has to name
    ("wgan_gp", "--no-such-flag", "no-such-flag"),
    ("wgan_gp", "--dataset cats", "cats"),
    ("wgan_gp", "--steps 0", "steps"),
    ("wgan_gp", "--lr-g nan", "lr-g"),
    ("wgan_gp", "--lr-d inf", "lr-d"),
    ("wgan_gp", "--lr-d -1", "lr-d"),
    ("wgan_gp", "--ema 1", "ema"),
    ("wgan_gp", "--beta1 1", "beta1"),
    ("wgan_gp", "--gp-weight -1", "gp-weight"),
    ("wgan_gp", "--batch-size 1", "batch-size"),
    ("wgan_gp", "--batch-size 301", "301"),
    ("wgan_gp", "--batch-size 1000000000000", "--batch-size"),
    ("wgan_gp", "--ngf 0", "ngf"),
    ("wgan_gp", "--latent-dim x", "latent-dim"),
    ("wgan_gp", "--seed -1", "seed"),
    ("wgan_gp", "--image-size 48", "48"),
    ("wgan_gp", "--device cuda", "cuda"),
    ("wgan_gp", "--device tpu", "tpu"),
    ("wgan_gp", "--dataset mnist --data-dir nowhere", "nowhere/MNIST/raw"),
    ("wgan_gp", "--dataset mnist --data-dir nowhere/deep/er", "deep/er"),
    ("wgan_gp", "--dataset fashion --data-dir nowhere", "nowhere/FashionMNIST/raw"),
    ("wgan_gp", "--dataset stacked_mnist --data-dir nowhere", "nowhere/MNIST/raw"),
    ("wgan_gp", "--run-dir used", "used"),
    ("wgan_gp", "--run-dir file", "file"),
    ("wgan_gp", "--run-dir file/in", "file"),
    ("wgan_gp", "--resume nothing.pt", "nothing.pt"),
    ("wgan_gp", "--resume used", "used"),
    ("wgan_gp", "--resume file", "file"),
    ("wgan_gp", "--resume list.pt", "list.pt"),
    ("wgan_gp", "--resume=", "empty"),
    ("wgan_gp", "--generate 4", "--resume"),
    ("wgan_gp", "--generate-to x", "--generate N"),
    ("wgan_gp", "--reject drs", "holdout"),
    ("wgan_gp", "--holdout 295", "batch-size"),
    ("wgan_gp", f"{GOOD} --ngf 8", "ngf"),
    ("wgan_gp", f"{GOOD} --dataset mnist", "dataset"),
    ("wgan_gp", f"{GOOD} --seed 3", "seed"),
    ("wgan_gp", f"{GOOD} --flip", "flip"),
    ("wgan_gp", f"{GOOD} --holdout 9", "holdout"),
    ("wgan_gp", f"{GOOD} --generate 2 --generate-to used", "used"),
    ("wgan_gp", f"{GOOD} --generate 2 --generate-to file/in", "file/in"),
    ("wgan_gp", f"{GOOD} --generate-to x", "--generate N"),
    ("wgan_gp", "--label 3", "--generate N"),
    ("wgan_gp", "--image-size 20", "not --image-size 20"),
    ("wgan_clip", f"{GOOD} --d-dropout .3", "d-dropout"),
    ("dcgan", "--gp -1", "gp"),
    ("dcgan", "--r1 nan", "r1"),
    ("dcgan", "--loss nonsense", "nonsense"),
    ("dcgan", "--upsample bicubic", "bicubic"),
    ("dcgan", f"{GOOD} --upsample nearest", "upsample"),
    ("dcgan", f"{GOOD} --init default", "init"),
    ("dcgan", f"{GOOD} --d-norm batch", "d-norm"),
    ("cdcgan", "--image-size 48", "48"),
    ("cdcgan", f"{GOOD} --d-ignores-label", "d-ignores-label"),
    ("wgan_clip", "--clip 0", "clip"),
    ("wgan_clip", "--clip -1", "clip"),
    ("wgan_clip", "--d-dropout 1", "d-dropout"),
    ("wgan_clip", "--optimizer sgd", "sgd"),
    ("wgan_clip", "--g-norm instance", "instance"),
    ("wgan_clip", "--d-ignores-label", "--conditional"),
    ("wgan_clip", "--label-embedding-dim 3", "--conditional"),
    ("wgan_clip", f"{GOOD} --conditional", "conditional"),
    ("conditional", "--label-embedding-dim 0", "label-embedding-dim"),
    ("conditional", f"{GOOD} --label-embedding-dim 4", "label-embedding-dim"),
    ("unrolled", "--k -1", "--k"),
    ("unrolled", "--k 1001", "--k"),
    ("unrolled", "--k 1.5", "--k"),
    ("unrolled", "--inner rmsprop", "rmsprop"),
    ("unrolled", "--inner-lr nan", "inner-lr"),
    ("unrolled", "--loss saturating", "saturating"),
    ("mdgan", "--mixture uniform", "uniform"),
    ("mdgan", "--embedding-dim 0", "embedding-dim"),
    ("mdgan", "--embedding-dim 513", "embedding-dim"),
    ("mdgan", "--loss minimax", "minimax"),
    ("mdgan", f"{GOOD} --mixture published", "mixture"),
    ("mdgan", f"{GOOD} --embedding-dim 4", "embedding-dim"),
    ("bigan", "--probe", "--resume"),
    *[(name, "--resume misfit.pt", "misfit.pt") for name in CASES],
    *[(name, "--resume other.pt", "someone_else.py") for name in CASES],
]


@pytest.mark.parametrize("w, flags, named", ERRORS, indirect=["w"], ids=[" ".join(e[:2]) for e in ERRORS])
def test_a_users_mistake_is_one_line_and_leaves_nothing(w, ran, flags, named, capsys, no_network):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    ran("good", "--steps", "5")
    good = checkpoint("good/last.pt")
    torch.save(good | {"script": "someone_else"}, "other.pt")
    torch.save([1, 2], "list.pt")
    torch.save(good | {"D": {}}, "misfit.pt")
    Path("used").mkdir()
    Path("used/note.txt").write_text("mine")
    Path("file").write_text("mine")
    before = sorted(Path(".").rglob("*"))
    more = [] if "--resume" in flags else w.tiny
    assert named in fails(w, capsys, *more, *flags.split())
    assert sorted(Path(".").rglob("*")) == before


@pytest.mark.parametrize("broken", ["args.json", "copy"])
def test_a_run_folder_that_cannot_be_written_is_one_line(w, ran, broken, capsys, monkeypatch):
    """As chmod cannot forbid root anything, the writes fail by hand."""

    def refuse(*args, **kwargs):
        raise PermissionError("not yours")

    ran("a", "--steps", "5")
    if broken == "copy":
        monkeypatch.setattr(shutil, "copyfile", refuse)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    err = fails(w, capsys, "--resume", "a/last.pt", "--steps", "9", "--run-dir", "b")
    assert "--run-dir" in err and "not yours" in err


@pytest.mark.parametrize("stdout", ["closed", "nobody reads"])
def test_a_run_goes_on_where_nobody_reads_what_it_says(w, stdout):
    """As under `| head -1`, or a terminal that went away; or as a service without one."""
    lost = "sys.stdout.close(); sys.stdout = None"
    if stdout == "nobody reads":
        lost = "read, write = os.pipe(); os.close(read); os.dup2(write, 1)"
    code = f"""
import os, sys
import metrics
import wgan_gp
render = metrics.render_digits
metrics.render_digits = lambda n, seed: render(300, seed)
metrics.FEWEST = 301
{lost}
try:
    wgan_gp.main(sys.argv[1:])
finally:
    os.dup2(2, 1)  # or Python's own last flush complains
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *w.tiny, "--steps", "20", "--run-dir", "a"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert checkpoint("a/last.pt")["step"] == 20 and len(rows("a")) == 4


def test_damaged_data_is_one_line(w, capsys, no_network):
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    fails(w, capsys, *w.tiny, "--dataset", "mnist")
    assert not Path("runs").exists()


def test_two_runs_of_one_second_get_two_folders(w):
    for _ in range(2):
        w.main([*w.tiny, "--steps", "1"])
    names = [run.name for run in Path("runs").iterdir() if (run / "samples.png").exists()]
    assert len(names) == 2 and all(re.fullmatch(r"wgan_gp-digits-s0-\d{8}-\d{6}-\d{6}", name) for name in names)


# figures and generation -----------------------------------------------------------------------------------------------


def tiles(path, columns, side=28):
    """The pictures of a sheet (N, side, side), two pixels of margin around each."""
    sheet = np.asarray(Image.open(path))
    n = (sheet.shape[0] - 2) // (side + 2)
    assert sheet.shape == (n * (side + 2) + 2, columns * (side + 2) + 2)
    cells = sheet[2:, 2:].reshape(n, side + 2, columns, side + 2).swapaxes(1, 2)
    return cells[:, :, :side, :side].reshape(-1, side, side).astype(float)


@torch.no_grad()
def paint(G, z, y=None):
    x = G(z) if y is None else G(z, y)
    return np.clip(np.round((x.double().numpy()[:, 0] + 1) * 127.5), 0, 255)


@EVERY
def test_figures_show_what_they_say(w, monkeypatch):
    """With labels: a row for each and a column for each z; in the others the row's label stays. Of the traversal's
    coordinates the ten that change the picture most."""
    scripted_judge(monkeypatch, [], w)
    flags = [*w.tiny, "--latent-dim", "12"]
    w.main([*flags, *"--steps 20 --run-dir a --lr-g 1e-2 --sample-every 5".split()])
    G = w.load("a/last.pt")
    args = w.parse_args(flags)

    def noise(n, stream):
        return metrics.sample_z(args, n, "cpu", metrics.seeded(0, stream))

    S = args.image_size
    sheet = tiles("a/samples.png", 8, S)
    if w.told:
        columns = noise(8, metrics.SHEETS)
        wanted = np.concatenate([paint(G, columns, torch.full((8,), label)) for label in range(10)])
    else:
        wanted = paint(G, noise(64, metrics.SHEETS))
    assert np.abs(sheet - wanted).max() <= 1
    assert np.abs(tiles("a/samples/step_0000020.png", 8, S) - sheet).max() <= 1
    a, b = noise(16, metrics.INTERPOLATION).chunk(2)
    y = torch.arange(8) if w.told else None
    latent = tiles("a/interpolation_latent.png", 10, S).reshape(8, 10, S, S)
    pixel = tiles("a/interpolation_pixel.png", 10, S).reshape(8, 10, S, S)
    ends = paint(G, a, y), paint(G, b, y)
    for j in range(10):
        assert np.abs(latent[:, j] - paint(G, a + (b - a) * j / 9, y)).max() <= 1
        # either end may round the other way, by 1, and the blend is rounded once more, by half
        assert np.abs(pixel[:, j] - (ends[0] + (ends[1] - ends[0]) * j / 9)).max() <= 1.5
    z = noise(1, metrics.TRAVERSAL)
    one = torch.eye(12) > 0
    zero = torch.zeros(12, dtype=torch.long) if w.told else None
    low, high = (paint(G, torch.where(one, end, z), zero) for end in (-4.0, 4.0))
    strongest = np.abs(low - high).mean((1, 2)).argsort()[::-1][:10]
    shown = tiles("a/traversal.png", 9, S).reshape(10, 9, S, S)
    for row, i in zip(shown, strongest):
        slid = torch.where(one[int(i)], torch.linspace(-4, 4, 9)[:, None], z)
        assert np.abs(row - paint(G, slid, None if zero is None else zero[:9])).max() <= 1
    gif = Image.open("a/training.gif")
    assert gif.n_frames >= 4 and gif.size == (8 * (S + 2) + 2, (10 if w.told else 8) * (S + 2) + 2)


@over("conditional")
def test_interpolation_between_every_pair_of_classes(w, monkeypatch):
    """One z, from class to class through the embedding; of last.pt as all figures, whatever best.pt is."""
    scripted_judge(monkeypatch, [50, 60, 70], w)  # the best is the first
    w.main([*w.tiny, *"--steps 20 --eval-every 10 --run-dir a --lr-g 1e-2".split()])
    assert checkpoint("a/best.pt")["step"] == 10
    G = w.load("a/last.pt")
    (own,) = (p for p in G.parameters() if p.shape == (10, 10))
    table = own.clone()
    shown = tiles("a/interpolation_classes.png", 10).reshape(45, 10, 28, 28)
    ends = {}
    z = metrics.sample_z(w.parse_args(w.tiny), 1, "cpu", metrics.seeded(0, metrics.BETWEEN_CLASSES))
    pairs = [(a, b) for a in range(10) for b in range(a + 1, 10)]
    for (a, b), row in zip(pairs, shown):
        for t, picture in zip(np.linspace(0, 1, 10), row):
            own.data[0] = (1 - t) * table[a] + t * table[b]
            assert np.abs(picture - paint(G, z, torch.tensor([0]))[0]).max() <= 1
        for label, picture in ((a, row[0]), (b, row[-1])):
            assert np.abs(ends.setdefault(label, picture) - picture).max() <= 1
    assert np.abs(ends[0] - ends[1]).max() > 5


def test_gif_keeps_to_its_size():
    rng = np.random.RandomState(0)
    paths = [Path(f"step_{i:07}.png") for i in range(60)]
    for path in paths:
        Image.fromarray(rng.randint(0, 255, (242, 242), dtype=np.uint8)).save(path)
    metrics.save_gif(paths, Path("a.gif"))
    assert 100 * 1024 < Path("a.gif").stat().st_size <= 300 * 1024


def generated(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))]).astype(float)


@EVERY
def test_generated_pictures_are_of_fresh_z_and_need_no_data(w, ran, monkeypatch):
    ran("a", "--steps", "20", "--lr-g", "1e-2")
    before = Path("a/last.pt").read_bytes()
    monkeypatch.setattr(w.module, "load_data", lambda *args: pytest.fail("the data was read"))
    w.main(["--resume", "a/last.pt", "--generate", "12", "--label", "turn"] if w.told else [*GOOD_A, "12"])
    names = sorted(os.listdir("a/generated"))
    assert names == [f"{i:05}.png" for i in range(12)] + ["labels.csv"] * w.told
    z = metrics.sample_z(w.parse_args(w.tiny), 12, "cpu", metrics.seeded(0, metrics.GENERATED))
    y = torch.arange(12) % 10 if w.told else None
    assert np.abs(generated("a/generated") - paint(w.load("a/last.pt"), z, y)).max() <= 1
    assert Path("a/last.pt").read_bytes() == before


GOOD_A = ["--resume", "a/last.pt", "--generate"]


@over("cdcgan", "conditional")
@pytest.mark.parametrize("reject", ["none", "naive"])
def test_labels_are_in_the_datas_shares_or_as_asked(w, monkeypatch, reject):
    """Classes of 80, 10, 5 and 5 %: a hundred images have so many of each, and labels.csv tells each one's."""
    y = torch.arange(4).repeat_interleave(torch.tensor([240, 30, 15, 15]))
    monkeypatch.setattr(metrics, "render_digits", lambda n, seed: (rendered(300, seed)[0], y))
    w.main([*w.tiny, "--steps", "10", "--run-dir", "a", "--lr-g", "1e-2"])
    G = w.load("a/last.pt")
    for label, wanted in (("shares", [80, 10, 5, 5]), ("turn", [25] * 4), ("3", [0, 0, 0, 100])):
        w.main([*GOOD_A, "100", "--label", label, "--reject", reject, "--generate-to", label])
        kept = rows(label, "labels.csv")
        assert [row["file"] for row in kept] == [f"{i:05}.png" for i in range(100)]
        labels = torch.tensor([int(row["label"]) for row in kept])
        if reject == "none":
            assert labels.bincount(minlength=4).tolist() == wanted
            z = metrics.sample_z(w.parse_args(w.tiny), 100, "cpu", metrics.seeded(0, metrics.GENERATED))
            assert np.abs(generated(label) - paint(G, z, labels)).max() <= 1
        elif label == "shares":
            assert labels.bincount(minlength=4)[0] > 60
        elif label == "3":
            assert (labels == 3).all()


# rejection ------------------------------------------------------------------------------------------------------------


def test_held_out_pictures_are_never_trained_on(w, monkeypatch):
    """Held out and trained on make up the data, once each; the order of the rest is still a function of the seed."""
    x = torch.arange(300).remainder(251).byte().view(300, 1, 1, 1).expand(-1, 1, 28, 28)  # picture i holds number i
    monkeypatch.setattr(metrics, "render_digits", lambda n, seed: (x, torch.arange(300)))
    args = w.parse_args([*w.tiny, "--holdout", "44"])
    batches = w.Batches(args, torch.device("cpu"))
    assert batches.per_epoch == (300 - 44) // 8 == 32
    pictures, trained = (t.flatten(0, 1) for t in batches(0, 32))
    assert (pictures[:, 0, 0, 0] == (trained % 251).byte()).all()
    held, y = batches.held
    assert len(y) == 44 and sorted([*trained.tolist(), *y.tolist()]) == list(range(300))
    assert (held[:, 0, 0, 0] == (y % 251).byte()).all()
    again = w.Batches(args, torch.device("cpu"))
    assert torch.equal(torch.cat([again(i, 1)[1][0] for i in range(32)]), trained)


@EVERY
def test_naive_rejection_keeps_the_pictures_the_rule_keeps(w, ran, capsys):
    """What is written, against a replay of the rule: z in order, chance sigmoid(D(G(z))), one uniform each."""
    ran("a", "--steps", "20", "--lr-g", "1e-2")
    capsys.readouterr()
    w.main([*GOOD_A, "6", "--generate-to", "out", "--reject", "naive", "--label", "turn"] if w.told else
           [*GOOD_A, "6", "--generate-to", "out", "--reject", "naive"])  # fmt: skip
    G, D = networks(w, "a/last.pt")
    stream = metrics.GENERATED
    chances = metrics.seeded(0, stream, 1)
    args = w.parse_args(w.tiny)
    z = torch.cat([metrics.sample_z(args, 1000, "cpu", metrics.seeded(0, stream, 2, i)) for i in range(1, 6)])
    uniform = torch.rand(5000, generator=chances, dtype=torch.float64)
    y = torch.arange(1000).repeat(5) % 10 if w.told else None
    with torch.no_grad():
        score = D(G(z, y) if w.told else G(z), y)
    wanted = (uniform < torch.sigmoid(score.double())).nonzero().flatten()[:6]
    assert len(wanted) == 6
    assert np.abs(generated("out") - paint(G, z[wanted], y[wanted] if w.told else None)).max() <= 1
    assert f"{int(wanted[-1]) + 1} attempts" in capsys.readouterr().out
    if w.told:
        assert [int(row["label"]) for row in rows("out", "labels.csv")] == y[wanted].tolist()


@EVERY
def test_drs_is_calibrated_on_held_out_pictures_and_scored_at_the_end(w, monkeypatch):
    """The head is fitted on scores of the held-out pictures, and their labels, alone; scores.json: what it took."""
    scripted_judge(monkeypatch, [], w)
    calls = []
    monkeypatch.setattr(metrics, "platt", lambda real, fake: calls.append((real, fake)) or (1.0, 0.0, 0.7))
    w.main([*w.tiny, *"--steps 10 --run-dir a --holdout 40 --reject drs".split()])
    took = json.loads(Path("a/scores.json").read_text())["last.pt --reject drs"]
    assert took["attempts"] >= 10 and took["auc"] == 0.7 and took["burn_in"] == 10_000 and took["fid"] == 1
    _, D = networks(w, "a/last.pt")
    x, y = w.Batches(w.parse_args([*w.tiny, "--holdout", "40"]), torch.device("cpu")).held
    with torch.no_grad():
        torch.testing.assert_close(calls[0][0], D(x.float() / 127.5 - 1, y))
    assert len(calls[0][1]) == 40


def test_a_discriminator_of_no_use_is_one_line(w, monkeypatch, capsys):
    w.main([*w.tiny, "--steps", "5", "--run-dir", "a", "--holdout", "40"])

    def useless(real, fake):
        raise ValueError("AUC .4")

    monkeypatch.setattr(metrics, "platt", useless)
    assert "AUC .4" in fails(w, capsys, *GOOD_A, "6", "--reject", "drs", "--generate-to", "out")
    assert not Path("out").exists()


def test_a_higher_percentile_keeps_fewer(w, monkeypatch, capsys):
    """By the rule: at percentile q a picture at the q-th of the burn-in's scores is kept one time in two."""
    w.main([*w.tiny, *"--steps 20 --run-dir a --lr-g 1e-2 --holdout 40".split()])
    monkeypatch.setattr(metrics, "platt", lambda real, fake: (1e8, 0.0, 0.7))  # so steep that the rule is a step
    for q, share in (("20", 0.8), ("90", 0.1)):
        capsys.readouterr()
        w.main([*GOOD_A, "400", "--generate-to", q, "--reject", "drs", "--drs-percentile", q])
        attempts = int(re.search(r"(\d+) attempts", capsys.readouterr().out)[1])
        assert attempts == pytest.approx(400 / share, rel=0.3)


# data -----------------------------------------------------------------------------------------------------------------


def as_folder(n, folder):
    for i, picture in enumerate(rendered(300, 1)[0][:n, 0]):
        path = Path(folder) / f"{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(path)


@over("dcgan")
def test_a_folder_counts_what_was_read_and_left_out(w, capsys):
    """42 files: every tenth, four, are for testing; of the other 38 one is cut short."""
    as_folder(42, "data")
    paths = sorted(Path("data").rglob("*.png"))
    paths.sort(key=lambda path: hashlib.sha256(path.relative_to("data").as_posix().encode()).digest())
    paths[3].write_bytes(paths[3].read_bytes()[:60])
    flags = [*w.tiny, "--dataset", "folder", "--data-dir", "data", "--image-size", "16", "--steps", "5"]
    w.main([*flags, "--run-dir", "a"])
    out, err = capsys.readouterr()
    assert "37 training images of folder" in out
    assert "1 of 38" in err and paths[3].name in err


@over("dcgan", "wgan_clip", "bigan")
def test_grey_pictures_make_a_grey_G_and_a_coloured_one_is_said(w, capsys):
    as_folder(40, "photos")
    flags = [*w.tiny, *"--dataset folder --data-dir photos --image-size 16 --steps 4 --run-dir a".split()]
    w.main(flags)
    G = w.load("a/last.pt")
    y = [torch.zeros(5, dtype=torch.long)] if w.told else []
    assert G(torch.randn(5, G.latent_dim), *y).shape == (5, 1, 16, 16)
    if w.name == "bigan":
        assert w.load_encoder("a/last.pt")(torch.zeros(5, 1, 16, 16)).shape == (5, G.latent_dim)
    w.main([*GOOD_A, "3"])
    assert [Image.open(path).mode for path in sorted(Path("a/generated").glob("*.png"))] == ["L"] * 3
    w.main(["--resume", "a/last.pt", "--steps", "6"])
    Image.new("RGB", (16, 16), (9, 8, 7)).save("photos/0/0.png")
    said = fails(w, capsys, "--resume", "a/last.pt", "--steps", "8")
    assert "a/last.pt has images of 1 channels, the data 3" in said
    w.main([*GOOD_A, "3", "--generate-to", "more"])  # that reads no training image
    assert [Image.open(path).mode for path in sorted(Path("more").glob("*.png"))] == ["L"] * 3


@over("dcgan")
def test_a_checkpoint_that_does_not_say_its_channels_has_those_of_its_data_set(w):
    as_folder(40, "photos")
    Image.new("RGB", (16, 16), (9, 8, 7)).save("photos/0/0.png")
    w.main([*w.tiny, *"--dataset folder --data-dir photos --image-size 16 --steps 4 --run-dir a".split()])
    old = checkpoint("a/last.pt")
    assert old.pop("channels") == 3
    torch.save(old, "a/last.pt")
    G = w.load("a/last.pt")
    assert G(torch.randn(5, G.latent_dim)).shape == (5, 3, 16, 16)
    w.main(["--resume", "a/last.pt", "--steps", "6"])


def mirrored(w, x, n, first, *flags):
    """Which of 300 pictures are mirrored in each of n epochs, (n, 300), from `first` on, each in its own order."""
    args = w.parse_args([*w.tiny, "--batch-size", "30", *flags])
    batches = w.Batches(args, torch.device("cpu"))
    result = torch.full((n, 300), -1)
    for epoch in range(n):
        pictures, index = (t.flatten(0, 1) for t in batches((first + epoch) * 10, 10))
        order = torch.randperm(300, generator=metrics.seeded(args.seed, metrics.ORDER, first + epoch))
        assert torch.equal(index, order)
        as_is = (pictures == x[index]).flatten(1).all(1)
        turned = (pictures == x[index].flip(3)).flatten(1).all(1)
        assert (as_is != turned).all()
        result[epoch, index] = turned.long()
    return result


def test_flip_mirrors_half_of_the_pictures_as_a_function_of_seed_and_epoch(w, monkeypatch):
    x = rendered(300, 1)[0]
    monkeypatch.setattr(metrics, "render_digits", lambda n, seed: (x, torch.arange(300)))
    four = mirrored(w, x, 4, 0, "--flip")
    shares = four.double().mean(1)
    five_deviations = 5 * 0.5 / 300**0.5
    assert four.min() == 0 and (shares - 0.5).abs().max() < five_deviations, shares
    both = (four[:, None] == four).double().mean(2)[~torch.eye(4, dtype=torch.bool)]
    assert (both - 0.5).abs().max() < five_deviations, both  # each epoch draws anew
    assert torch.equal(mirrored(w, x, 2, 2, "--flip"), four[2:])
    assert not torch.equal(mirrored(w, x, 1, 0, "--flip", "--seed", "1"), four[:1])
    assert (mirrored(w, x, 2, 0) == 0).all()


# a copy of one's own --------------------------------------------------------------------------------------------------


def test_a_script_needs_metrics_beside_it_and_nothing_else(w, tmp_path):
    def call(*flags):
        return subprocess.run([sys.executable, "wgan_gp.py", *flags], cwd=home, capture_output=True, text=True)

    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(ROOT / "wgan_gp.py", home)
    assert "ModuleNotFoundError: No module named 'metrics'" in call("--steps", "1").stderr
    shutil.copy(ROOT / "metrics.py", home)
    as_folder(40, home / "few")  # too few test images for scores
    flags = [*TINY, *"--dataset folder --data-dir few --image-size 16 --steps 10 --run-dir run".split()]
    done = call(*flags)
    assert done.returncode == 0 and "no scores" in done.stdout and "Traceback" not in done.stderr, done.stderr
    done = call("--resume", "run/last.pt", "--generate", "2")
    assert done.returncode == 0 and len(os.listdir(home / "run/generated")) == 2
    done = call("--steps", "no")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("wgan_gp.py: error: ")


MINE = {  # what is changed in a copy of wgan_gp.py, by its lines: hinge loss, spectral norm, a column
    "from torch import nn\n": "from torch import nn\nfrom torch.nn.utils.parametrizations import spectral_norm\n",
    "default=10.0,": "default=0.0,",
    "[nn.Conv2d(n_in, n_out, kernel, 2, 1), ": "[spectral_norm(nn.Conv2d(n_in, n_out, kernel, 2, 1)), ",
    "[nn.Conv2d(n_in, 1, 4, 1, 0)]": "[spectral_norm(nn.Conv2d(n_in, 1, 4, 1, 0))]",
    "return score_fake.mean() - score_real.mean()": "return (1 - score_real).relu().mean() + (1 + score_fake).relu().mean()",  # noqa: E501
    '"w_dist": score_real.mean() - score_fake.mean()': '"margin": (score_real - score_fake).mean()',
}
KMNIST = {  # and in metrics.py: one more data set of torchvision
    '"stacked_mnist": 3}': '"stacked_mnist": 3, "kmnist": 1}',
    "TORCHVISION = {": 'TORCHVISION = {"kmnist": ("KMNIST", "KMNIST/raw"),',
}


def changed(name, changes, path):
    text = (ROOT / name).read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


def idx(path, x):
    """As MNIST's files: two zeros, 8 for bytes, the number of dimensions, each as four bytes, the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(n.to_bytes(4, "big") for n in x.shape)
    path.write_bytes(bytes([0, 0, 8, x.dim()]) + sizes + x.byte().numpy().tobytes())


def test_eight_lines_make_a_script_of_ones_own(tmp_path):
    """A hinge loss, spectral norm, a column for the log and one more data set: it trains, scores, plots its column,
    resumes and generates."""
    home = tmp_path / "home"
    home.mkdir()
    changed("wgan_gp.py", MINE, home / "mine.py")
    changed("metrics.py", KMNIST, home / "metrics.py")
    for part, n in (("train", 300), ("t10k", 100)):
        x, y = rendered(300, len(part))
        idx(home / f"data/KMNIST/raw/{part}-images-idx3-ubyte", x[:n, 0])
        idx(home / f"data/KMNIST/raw/{part}-labels-idx1-ubyte", y[:n])

    def call(*flags):
        done = subprocess.run([sys.executable, "mine.py", *flags], cwd=home, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    out = call(*TINY, "--dataset", "kmnist", "--steps", "10", "--run-dir", "a")
    assert "FID[classifier-kmnist-32/128 " in out and "n 100 + 100" in out
    scores = json.loads((home / "a/scores.json").read_text())
    assert scores["last.pt"]["n_fake"] == 100 and 0 < scores["last.pt"]["fid"] < 1e6
    call("--resume", "a/last.pt", "--steps", "20")
    assert [row["step"] for row in rows(home / "a")] == ["5", "10", "15", "20"]
    assert "margin" in rows(home / "a")[0] and (home / "a/curves.png").exists()
    assert [row["step"] for row in rows(home / "a", "scores.csv")] == ["10", "20"]
    call("--resume", "a/last.pt", "--generate", "3")
    assert len(os.listdir(home / "a/generated")) == 3

    spec = importlib.util.spec_from_file_location("mine", home / "mine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    D = module.Discriminator(module.parse_args(["--device", "cpu"]), 1)
    weights = [p for name, p in D.named_parameters() if name.endswith("original")]
    assert len(weights) == 4 and all(p.std().item() == pytest.approx(0.02, rel=0.06) for p in weights), weights


# two processes, two places --------------------------------------------------------------------------------------------


def test_another_process_in_the_runs_folder_is_one_line(w, capsys):
    """Two would write one last.pt. The lock goes with its process, also by SIGKILL."""
    w.main([*w.tiny, "--steps", "4", "--run-dir", "a"])
    lines = ("import fcntl, time", "f = open('a/args.json', 'r+b')", "fcntl.lockf(f, 2 | 4)", "print(1, flush=True)")
    code = "\n".join((*lines, "time.sleep(99)"))
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"1\n"
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            w.main(["--resume", "a/last.pt", "--steps", "8"])
        assert stop.value.code == 2 and "another process is training there" in capsys.readouterr().err
        assert checkpoint("a/last.pt")["step"] == 4
    finally:
        other.kill()
        other.wait()
    w.main(["--resume", "a/last.pt", "--steps", "8"])
    assert checkpoint("a/last.pt")["step"] == 8


def test_a_run_goes_on_from_another_directory(w, monkeypatch, tmp_path):
    """The checkpoint knows where its data lies; where that is gone, as on another machine, --data-dir is what it is."""
    (tmp_path / "here" / "pictures").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    w.main([*w.tiny, "--steps", "4", "--data-dir", "pictures", "--run-dir", "a"])
    monkeypatch.chdir(tmp_path / "there")
    args = w.parse_args(["--resume", "../here/a/last.pt"])
    assert Path(args.data_dir) == (tmp_path / "here" / "pictures").resolve()
    (tmp_path / "here" / "pictures").rmdir()
    assert w.parse_args(["--resume", "../here/a/last.pt"]).data_dir == "data"


def test_a_resume_never_takes_other_pictures_in_silence(w, capsys, tmp_path):
    """--data-dir is "data" by default: pictures that happen to lie there are not those of the run."""
    as_folder(60, "photos")
    w.main([*w.tiny, *"--dataset folder --data-dir photos --image-size 16 --steps 4 --run-dir a".split()])
    as_folder(60, "data")
    os.rename("photos", "elsewhere")
    assert "give --data-dir" in fails(w, capsys, "--resume", "a/last.pt", "--steps", "8")
    assert checkpoint("a/last.pt")["step"] == 4
    w.main([*GOOD_A, "2"])  # that needs no data
    w.main(["--resume", "a/last.pt", "--steps", "8", "--data-dir", "elsewhere"])
    assert checkpoint("a/last.pt")["step"] == 8


def test_another_seed_keeps_the_images_held_out(w, ran):
    """Those of the training: D has seen the others."""
    ran("a", "--steps", "4", "--holdout", "40")
    whole = w.Batches(w.parse_args([*w.tiny, "--holdout", "40"]), torch.device("cpu")).held
    flags = [*GOOD_A, "5", "--reject", "drs", "--seed", "7"]
    held = w.Batches(w.parse_args(flags), torch.device("cpu")).held
    assert all(torch.equal(a, b) for a, b in zip(held, whole, strict=True))


def test_a_holdout_of_everything_is_one_line(w, capsys):
    with pytest.raises(SystemExit):
        w.main([*w.tiny, "--holdout", "300", "--run-dir", "a"])
    assert "--holdout 300 leaves nothing of 300 training images" in capsys.readouterr().err
    assert not Path("a").exists()


def test_a_finished_run_whose_last_iteration_went_past_the_total_resumes(w):
    w.main([*w.tiny, "--d-steps", "5", "--steps", "7", "--run-dir", "a"])
    assert checkpoint("a/last.pt")["step"] == 10
    w.main(["--resume", "a/last.pt"])
    assert checkpoint("a/last.pt")["step"] == 10


@over("cdcgan")
def test_r1_under_batch_norm_is_never_taken_on_one_image(w, monkeypatch):
    """A quarter of a batch of 4 is one image, which has no batch statistics."""
    seen = []
    true = w.squared_gradient
    monkeypatch.setattr(w.module, "squared_gradient", lambda D, x, y: seen.append(len(x)) or true(D, x, y))
    w.main([*w.tiny, "--batch-size", "4", "--d-norm", "batch", "--steps", "2"])
    w.main([*w.tiny, "--batch-size", "4", "--steps", "2"])
    assert seen == [2, 2, 1, 1]


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_the_random_state_of_an_accelerator_is_saved_and_restored(device, tmp_path, monkeypatch):
    """The functions of torch.cuda and torch.mps, without such a device."""
    device_module = torch.get_device_module(device)
    held = torch.tensor([1, 2, 3], dtype=torch.uint8)
    monkeypatch.setattr(device_module, "get_rng_state", lambda: held)
    args = types.SimpleNamespace(device=device, data_dir="data", seed=0)
    study = types.SimpleNamespace(args=args, folder=tmp_path, classes={}, channels=1, seconds=lambda: 5.0, total=7)
    wgan_gp.save("last.pt", 7, {}, study)

    given = []
    monkeypatch.setattr(device_module, "set_rng_state", given.append)
    assert wgan_gp.restore(tmp_path / "last.pt", {}, study) == 7
    assert [state.tolist() for state in given] == [[1, 2, 3]]

    other = {"cuda": "mps", "mps": "cuda"}[device]  # the checkpoint has no state of this one: nothing is set
    study.args.device = other
    monkeypatch.setattr(torch.get_device_module(other), "set_rng_state", given.append)
    assert wgan_gp.restore(tmp_path / "last.pt", {}, study) == 7
    assert len(given) == 1
