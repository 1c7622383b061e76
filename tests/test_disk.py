"""What a disk, a spreadsheet or a closed stream does to a run: it goes on, or it ends with one line and exit code 2."""

import contextlib
import csv
import errno
import functools
import importlib
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import metrics

ROOT = Path(__file__).parents[1]


def no_space(*a, **k):
    raise OSError(errno.ENOSPC, "No space left on device")


def one_line(capsys, call):
    """The one line on stderr with which a call ends the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    out = capsys.readouterr()
    assert stop.value.code == 2 and out.err.count("\n") == 1 and "error: " in out.err, out.err
    return out.err


def study(folder, classes=None, **flags):
    """A Study of a generator that draws noise."""
    args = dict(
        run_dir=str(folder), device="cpu", dataset="digits", data_dir="data", image_size=8, seed=0, latent_dim=4
    )
    args |= dict(prior="normal", resume=None, tensorboard=False, batch_size=8, d_steps=1, g_steps=1, reject="none")
    args |= dict(generate_to=None, label="shares")
    made = metrics.Study(
        types.SimpleNamespace(**args | flags),
        types.SimpleNamespace(held=None, training_set=None, channels=1, classes=classes or {}),
        lambda z, y: (z[:, :1, None, None] * 50 + 128).clamp(0, 255).byte().expand(-1, 1, 8, 8),
        lambda x, y: torch.zeros(len(x)),
        ROOT / "wgan_gp.py",
        bool(classes),
    )
    return made


def started(folder, **flags):
    made = study(folder, **flags)
    made.start(0, 1000, 10)
    return made


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# files


@pytest.mark.parametrize("fault", ["write", "fsync", "replace"])
def test_a_write_that_the_disk_refuses_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, capsys, fault):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    if fault != "write":
        monkeypatch.setattr(os, fault, no_space)

    def write(file):
        file.write(b"new")
        if fault == "write":
            no_space()

    line = one_line(capsys, lambda: metrics.write_whole(path, write))
    assert "last.pt cannot be written" in line and "No space left" in line
    with pytest.raises(OSError, match="No space left"):
        metrics.replace_file(path, write, ".1")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pt"]


def test_a_checkpoint_on_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    """torch.save in a run of a script: it was thirty lines of traceback."""
    import wgan_gp

    digits = metrics.render_digits(64, 1)
    monkeypatch.setattr(metrics, "render_digits", lambda n, seed: digits)
    monkeypatch.setattr(torch, "save", no_space)
    flags = "--arch mlp --batch-size 8 --steps 2 --eval-every 0 --device cpu --run-dir".split()
    assert "last.pt cannot be written" in one_line(capsys, lambda: wgan_gp.main([*flags, str(tmp_path / "run")]))
    assert not list((tmp_path / "run").glob("*.pt*"))


@pytest.fixture
def few_digits(monkeypatch):
    digits = metrics.render_digits(64, 1)
    monkeypatch.setattr(metrics, "render_digits", lambda n, seed: digits)
    monkeypatch.setattr(metrics, "FEWEST", 1000)


TINY = "--ngf 2 --ndf 2 --latent-dim 6 --batch-size 8 --steps 4 --eval-every 0 --device cpu --run-dir".split()


@pytest.mark.parametrize("flag", ["--run-dir", "--data-dir"])
def test_a_name_that_no_disk_takes_is_one_line(tmp_path, capsys, few_digits, flag):
    import wgan_gp

    where = [str(tmp_path / "run"), "--dataset", "mnist"] if flag == "--data-dir" else []
    long = str(tmp_path / ("x" * 300))
    line = one_line(capsys, lambda: wgan_gp.main([*TINY, *where, *(["--data-dir"] if where else []), long]))
    assert "File name too long" in line and os.listdir(tmp_path) == []


def test_an_image_that_the_disk_refuses_is_not_left_in_part(tmp_path, monkeypatch):
    write = Path.write_bytes

    def cut(path, data):
        write(path, bytes(data[:10]))
        no_space()

    monkeypatch.setattr(Path, "write_bytes", cut)
    with pytest.raises(OSError, match="No space"):
        metrics.save_sheet(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
def test_generate_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys, there):
    saved = []
    save_sheet = metrics.save_sheet

    def save(x, path):
        saved.append(path)
        if len(saved) == 7:
            no_space()
        save_sheet(x, path)

    monkeypatch.setattr(metrics, "save_sheet", save)
    out = tmp_path / "new" / "out"
    if there:
        out.mkdir(parents=True)
    s = study(tmp_path / "run", generate_to=str(out))
    assert "No space left" in one_line(capsys, lambda: s.generate(20))
    assert len(saved) == 7 and not list(tmp_path.rglob("*.png")) and (tmp_path / "new").exists() == there


def test_images_are_generated_a_part_at_a_time_in_the_order_of_their_z(tmp_path):
    """50,000 colour images of 256 pixels would take 10 GB."""
    s = study(tmp_path / "run", generate_to=str(tmp_path / "out"))
    drawn = []

    def sample(z, y, sample=s.sample):
        drawn.append((len(z), len(list(tmp_path.rglob("*.png")))))
        return sample(z, y)

    s.sample = sample
    s.generate(1200)
    assert drawn == [(500, 0), (500, 500), (200, 1000)]
    z = metrics.sample_z(s.args, 1200, "cpu", metrics.seeded(0, metrics.GENERATED))
    for i in (0, 499, 500, 1199):
        assert np.array(Image.open(tmp_path / "out" / f"{i:05}.png"))[0, 0] == int((z[i, 0] * 50 + 128).clamp(0, 255))


def test_labels_csv_survives_any_name_of_a_class(tmp_path):
    names = ["a,b", 'say "x"', "ü", "\udcff", "plain"]
    s = study(tmp_path / "run", dict.fromkeys(names, 4), generate_to=str(tmp_path / "out"))
    s.generate(20)
    with open(tmp_path / "out" / "labels.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        found = [row["label"] for row in csv.DictReader(file)]
    assert sorted(found) == sorted(names * 4)


# a run's folder


@pytest.mark.parametrize("fault", ["copyfile", "json", "board"])
def test_a_failed_start_leaves_no_folder(tmp_path, monkeypatch, capsys, fault):
    flags = {}
    if fault == "copyfile":
        monkeypatch.setattr(metrics.shutil, "copyfile", no_space)
    elif fault == "json":
        monkeypatch.setattr(metrics.os, "fsync", no_space)
    else:
        flags = {"tensorboard": True}
        board = types.SimpleNamespace(SummaryWriter=no_space)
        monkeypatch.setattr(metrics.importlib, "import_module", lambda name: board)
    assert "No space" in one_line(capsys, lambda: started(tmp_path / "runs" / "a", **flags))
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    assert started(tmp_path / "runs" / "a").folder.is_dir()  # the second try is a first one


def test_of_two_that_begin_at_once_one_is_refused_and_harms_nothing(tmp_path, monkeypatch, capsys):
    """As under mpirun, which starts a script twice: both find no folder."""
    s = started(tmp_path / "a")
    before = {path: path.stat().st_ino for path in (tmp_path / "a").iterdir()}
    monkeypatch.setattr(Path, "glob", lambda *a: iter([]))
    assert "File exists" in one_line(capsys, lambda: started(tmp_path / "a"))
    assert {path: path.stat().st_ino for path in (tmp_path / "a").iterdir()} == before
    s.sheet(1)
    assert os.listdir(tmp_path / "a" / "samples") == ["step_0000001.png"]


def test_a_folder_in_use_without_a_checkpoint_is_not_offered_for_resume(tmp_path, capsys):
    started(tmp_path / "a")
    assert "delete it" in one_line(capsys, lambda: started(tmp_path / "a"))
    (tmp_path / "a" / "last.pt").write_bytes(b"")
    assert "--resume its last.pt" in one_line(capsys, lambda: started(tmp_path / "a"))
    assert (tmp_path / "a" / "args.json").exists()  # not ours to remove


def test_a_disk_without_permissions_holds_a_run(tmp_path, monkeypatch):
    """exFAT and some network mounts know no chmod."""

    def refused(*args, **named):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for name in ("chmod", "utime", "setxattr"):
        monkeypatch.setattr(os, name, refused, raising=False)
    started(tmp_path / "a").sheet(1)
    assert (tmp_path / "a" / "wgan_gp.py").read_bytes() == (ROOT / "wgan_gp.py").read_bytes()


def test_a_copy_of_a_sheet_is_not_ours_to_read_or_remove(tmp_path):
    s = started(tmp_path / "a")
    for i in (5, 10):
        s.sheet(i)
    copy = tmp_path / "a" / "samples" / "step_0000010 (1).png"
    copy.write_bytes((tmp_path / "a" / "samples" / "step_0000010.png").read_bytes())
    study(tmp_path / "a", resume=str(tmp_path / "a" / "last.pt")).start(5, 1000, 10)
    assert sorted(os.listdir(tmp_path / "a" / "samples")) == ["step_0000005.png", "step_0000010 (1).png"]


def test_samples_removed_while_it_trains_come_back(tmp_path):
    s = started(tmp_path / "a")
    s.sheet(1)
    metrics.shutil.rmtree(tmp_path / "a" / "samples")
    s.sheet(2)
    assert os.listdir(tmp_path / "a" / "samples") == ["step_0000002.png"]


def test_a_sheet_that_cannot_be_written_costs_a_line(tmp_path, monkeypatch, capsys):
    s = started(tmp_path / "a")
    monkeypatch.setattr(Path, "write_bytes", no_space)
    s.sheet(1)
    assert "no sheet of samples" in capsys.readouterr().err


def test_figures_that_cannot_be_written_do_not_cost_the_scores(tmp_path, monkeypatch, capsys):
    s = started(tmp_path / "a")
    judge = types.SimpleNamespace(n=10, line=str)
    s.judge = type("Judge", (), {"n": 10, "line": staticmethod(str), "__call__": lambda self, x, y: {"fid": 1.5}})()
    assert judge.n == s.judge.n
    (tmp_path / "a" / "last.pt").write_bytes(b"")
    monkeypatch.setattr(Path, "write_bytes", no_space)
    s.finish(5, lambda path: 5)
    assert json.loads((tmp_path / "a" / "scores.json").read_text()) == {"last.pt": {"fid": 1.5}}
    said = capsys.readouterr().err
    assert all(line in said for line in ("no samples.png", "an interpolation is missing", "no traversal.png")), said


# what step() returns, and the code that ran


def test_losses_that_cannot_be_logged_are_named(tmp_path):
    """Sums are kept by place, so a name that comes and goes would mix the columns."""
    s = started(tmp_path / "a")
    s.add({"d_loss": torch.tensor(1.0), "gamma": torch.tensor([3.0])})  # one number, if in a vector
    with pytest.raises(ValueError, match="d_loss, path after d_loss, gamma"):
        s.add({"d_loss": torch.tensor(1.0), "path": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="as gamma: it has to be a tensor with one number"):
        s.add({"d_loss": torch.tensor(1.0), "gamma": torch.ones(2)})
    with pytest.raises(ValueError, match=r"returned 0\.5 as gamma"):
        s.add({"d_loss": torch.tensor(1.0), "gamma": 0.5})
    s.add({"d_loss": torch.tensor(2.0), "gamma": torch.tensor([5.0])})
    s.log(5)
    [row] = rows(tmp_path / "a/log.csv")
    assert (float(row["d_loss"]), float(row["gamma"])) == (1.5, 4.0)


def test_the_column_that_is_not_finite_is_named(tmp_path, capsys):
    s = started(tmp_path / "a")
    s.add({"d_loss": torch.tensor(1.0), "share": torch.tensor(float("nan"))})
    assert "share is not finite by step 5" in one_line(capsys, lambda: s.log(5))


def test_a_resume_with_changed_code_keeps_both(tmp_path, capsys):
    folder = tmp_path / "a"
    s = started(folder)
    script = folder / "wgan_gp.py"
    assert script.read_bytes() == (ROOT / "wgan_gp.py").read_bytes()
    s.keep_code(40)  # nothing has changed
    assert {p.name for p in folder.glob("*.py")} == {"wgan_gp.py", "metrics.py"}
    script.write_text("# as it was\n")
    s.keep_code(40)
    assert script.read_text() == "# as it was\n"
    assert (folder / "wgan_gp-from-40.py").read_bytes() == (ROOT / "wgan_gp.py").read_bytes()
    assert "wgan_gp.py has changed since: wgan_gp-from-40.py is the one that goes on" in capsys.readouterr().out


def test_a_long_reason_is_cut(capsys):
    """PyTorch names every weight of a network that does not fit."""
    with pytest.raises(SystemExit), metrics.or_fail("it does not fit"):
        raise RuntimeError("weight, " * 1000)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith(" ...)\n") and len(err) < 400
    assert "it does not fit (RuntimeError: weight, weight, " in err


def test_curves_that_cannot_be_written_cost_a_line(tmp_path, monkeypatch, capsys):
    s = started(tmp_path / "a")
    s.judge = False
    s.add({"loss": torch.tensor(0.5)})
    s.log(5)
    s.add({"loss": torch.tensor(0.25)})
    s.log(10)
    monkeypatch.setattr(Image.Image, "save", no_space)
    s.finish(10, None)
    out = capsys.readouterr()
    assert (
        f"no curves.png: {tmp_path / 'a' / 'curves.png'} cannot be written: " in out.out
        and "No space left" in out.out
        and f"done: {tmp_path / 'a'}" in out.out
    )


# TensorBoard


def test_tensorboard_has_the_sheets_beside_the_curves(tmp_path):
    """Read back from its own file: the pixels of samples/step_I.png."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    s = started(tmp_path / "a", tensorboard=True)
    s.sheet(5)
    s.to_board({"step": 5, "loss": 0.5})
    s.sheet(10)
    s.board.close()
    events = EventAccumulator(str(tmp_path / "a")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 0.5)]
    sheets = events.Images("samples")
    assert [e.step for e in sheets] == [5, 10]
    for e in sheets:
        shown = np.asarray(Image.open(io.BytesIO(e.encoded_image_string)).convert("L"))
        assert np.array_equal(shown, np.asarray(Image.open(tmp_path / f"a/samples/step_{e.step:07}.png")))


def test_tensorboard_on_a_full_disk_costs_a_line(tmp_path, monkeypatch, capsys):
    """It ended the run with a traceback: its writer raises at the call after the one that failed."""
    board = types.SimpleNamespace(
        SummaryWriter=lambda *a, **k: types.SimpleNamespace(add_scalar=no_space, add_image=no_space)
    )
    monkeypatch.setattr(metrics.importlib, "import_module", lambda name: board)
    s = started(tmp_path / "a", tensorboard=True)
    s.add({"loss": torch.tensor(0.5)})
    s.log(5)
    s.sheet(5)
    assert capsys.readouterr().err.count("no more of this run in TensorBoard") == 1
    assert [r["loss"] for r in rows(tmp_path / "a" / "log.csv")] == ["0.5"]
    assert os.listdir(tmp_path / "a" / "samples") == ["step_0000005.png"]


# log.csv


def test_a_row_that_cannot_be_written_is_tried_again_at_the_next(tmp_path, monkeypatch, capsys):
    table = metrics.CsvLog(tmp_path / "log.csv")
    table.add({"step": 1, "loss": 0.5})
    append = metrics.append
    monkeypatch.setattr(metrics, "append", no_space)
    table.add({"step": 2, "loss": 0.25})
    table.add({"step": 3, "loss": 0.125})
    assert capsys.readouterr().err.count("tried again") == 2
    monkeypatch.setattr(metrics, "append", append)
    table.add({"step": 4, "loss": 1.0})
    assert [(r["step"], r["loss"]) for r in rows(table.path)] == [
        ("1", "0.5"),
        ("2", "0.25"),
        ("3", "0.125"),
        ("4", "1"),
    ]


@pytest.mark.parametrize("columns", [{"loss": 1.5}, {"loss": 1.5, "new": 2.0}])
def test_a_log_that_a_spreadsheet_locks_loses_no_row(tmp_path, monkeypatch, columns):
    """Windows lets nobody write, replace or append to it."""
    table = metrics.CsvLog(tmp_path / "log.csv")
    table.add({"step": 1, "loss": 0.5})
    with monkeypatch.context() as locked:
        locked.setattr(metrics, "replace_file", no_space)
        locked.setattr(metrics, "append", no_space)
        table.add({"step": 2, **columns})
    table.add({"step": 3, **columns})
    assert [r["step"] for r in rows(table.path)] == ["1", "2", "3"]
    assert [float(r["loss"]) for r in rows(table.path)] == [0.5, 1.5, 1.5]
    if "new" in columns:
        assert [r["new"] for r in rows(table.path)] == ["", "2", "2"]


def test_half_a_row_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    path.write_bytes(b"step\n1\n")
    real = open

    def almost_full(file, *more, **named):
        opened = real(file, *more, **named)

        class Short:
            tell, truncate = opened.tell, opened.truncate
            __enter__ = lambda self: self  # noqa: E731
            __exit__ = lambda self, *a: opened.close()  # noqa: E731
            write = lambda self, data: opened.write(data[:2])  # noqa: E731

        return Short()

    monkeypatch.setattr("builtins.open", almost_full)
    with pytest.raises(OSError, match="full"):
        metrics.append(path, b"2222\n")
    monkeypatch.undo()
    assert path.read_bytes() == b"step\n1\n"


def test_a_log_that_was_deleted_begins_anew_with_its_columns(tmp_path):
    table = metrics.CsvLog(tmp_path / "log.csv")
    table.add({"step": 1, "loss": 0.5})
    table.path.unlink()
    table.add({"step": 2, "loss": 0.25})
    assert rows(table.path) == [{"step": "2", "loss": "0.25"}]


PLAIN = "step,loss,fid\n100,0.5,\n200,0.25,7.5\n300,0.125,\n"
SPREADSHEETS = {
    "plain": PLAIN.encode(),
    "byte order mark": b"\xef\xbb\xbf" + PLAIN.encode(),
    "semicolons": PLAIN.replace(",", ";").encode(),
    "semicolons and decimal commas": PLAIN.replace(",", ";").replace(".", ",").encode(),
    "tabs": PLAIN.replace(",", "\t").encode(),
    "quotes": b'"step","loss","fid"\r\n"100","0.5",""\r\n"200","0.25","7.5"\r\n"300","0.125",""\r\n',
    "all": b'\xef\xbb\xbf"step";"loss";"fid"\r\n"100";"0,5";\r\n"200";"0,25";"7,5"\r\n"300";"0,125";\r\n',
    "empty lines": PLAIN.replace("\n", "\n\n").encode() + b",,\n",
    "decimals": PLAIN.replace("00,0", "00.0,0").encode(),
    "no end of line": PLAIN.rstrip("\n").encode(),
    "half of it": b"step;loss;fid\n100;0,5;\n200,0.25,7.5\n300,0.125,\n",
}


@pytest.mark.parametrize("how", SPREADSHEETS)
def test_a_log_that_a_spreadsheet_saved_is_read(tmp_path, how):
    path = tmp_path / "log.csv"
    path.write_bytes(SPREADSHEETS[how])
    assert metrics.read_log(path)["loss"] == ([100, 200, 300], [0.5, 0.25, 0.125])
    assert metrics.read_log(path)["fid"] == ([200], [7.5])
    table = metrics.CsvLog(path)
    assert [float(row["step"]) for row in table.keep(200)] == [100, 200]
    table.add({"step": 250, "loss": 0.75, "fid": 3.0})
    kept = [[float(cell or -1) for cell in row.values()] for row in rows(path)]
    assert kept == [[100, 0.5, -1], [200, 0.25, 7.5], [250, 0.75, 3]]


def test_a_row_cut_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(PLAIN.encode() + b"\0\0\0\0\0\0")
    assert [row["step"] for row in metrics.CsvLog(path).keep(1000)] == ["100", "200", "300"]


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", PLAIN.encode("utf-16")])
def test_what_is_no_log_is_one_line_and_stays(tmp_path, capsys, content):
    s = study(tmp_path / "a", resume=str(tmp_path / "a" / "last.pt"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "args.json").write_text(json.dumps(BEFORE))
    (tmp_path / "a" / "log.csv").write_bytes(content)
    assert "--run-dir" in one_line(capsys, lambda: s.start(5, 1000, 10))
    assert (tmp_path / "a" / "log.csv").read_bytes() == content


def test_scores_that_a_spreadsheet_saved_still_tell_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "step_of", lambda path: 200)
    s = study(tmp_path / "a", resume=str(tmp_path / "a" / "last.pt"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "args.json").write_text(json.dumps(BEFORE))
    (tmp_path / "a" / "best.pt").write_bytes(b"")
    (tmp_path / "a" / "scores.csv").write_bytes(b"\xef\xbb\xbfstep;fid_train\r\n100;9,5\r\n200;7,5\r\n300;\r\n")
    s.start(300, 1000, 10)
    assert s.best_fid == 7.5 and s.scored_at == 200


def test_a_best_that_is_ahead_of_a_resume_stays_until_the_next_score(tmp_path, monkeypatch):
    """Killed at update 220 with last.pt at 150: best.pt is the only file that knows update 200. It was deleted once."""
    monkeypatch.setattr(metrics, "step_of", lambda path: 200)
    s = study(tmp_path / "a", resume=str(tmp_path / "a" / "last.pt"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "args.json").write_text(json.dumps(BEFORE))
    (tmp_path / "a" / "best.pt").write_bytes(b"weights")
    (tmp_path / "a" / "scores.csv").write_text("step,fid_train,features\n100,9.5,net\n200,7.5,net\n")
    s.start(150, 1000, 10)
    assert (tmp_path / "a" / "best.pt").read_bytes() == b"weights"
    assert s.best_fid == math.inf and s.scored_at is None and s.scored_by == "net"


@pytest.mark.parametrize("dataset, level, warned", [("small", 0, False), ("small", 1, True), ("digits", 1, False)])
def test_a_resume_with_other_test_images_is_warned_of(tmp_path, capsys, dataset, level, warned):
    """A picture that comes or goes deals a folder anew: some of its test images were trained on."""
    for folder, step, resume, shade in (("a", 0, None, 0), ("b", 5, str(tmp_path / "a" / "last.pt"), level)):
        s = study(tmp_path / folder, dataset=dataset, resume=resume)
        s.images = lambda split, shade=shade: (
            torch.full((3, 1, 8, 8), shade, dtype=torch.uint8),
            torch.zeros(3).long(),
        )
        s.start(step, 1000, 10)
    assert ("test images are not those of" in capsys.readouterr().err) == warned
    first, second = (json.loads((tmp_path / folder / "args.json").read_text())["test_images"] for folder in "ab")
    assert (first != second) == warned and (first is None) == (dataset == "digits")


def test_tensorboards_file_is_closed_at_the_end(tmp_path, monkeypatch):
    s = started(tmp_path / "a")
    s.board = mock.MagicMock()
    monkeypatch.setattr(s, "ready", lambda: False)
    s.finish(1000, None)
    s.board.close.assert_called_once()


@pytest.mark.parametrize("side, most", [(8, 500), (64, 500), (128, 125), (256, 31), (1024, 16)])
def test_as_many_images_at_a_time_as_have_the_area_of_500_of_64_pixels(side, most):
    parts = []
    whole = metrics.in_parts(lambda z, y: parts.append(len(z)) or z + y, "cpu", side)
    z = torch.arange(1000.0)
    assert torch.equal(whole(z, z), 2 * z) and max(parts) == most and sum(parts) == 1000


# streams


class Gone(io.TextIOBase):
    """A pipe that nobody reads."""

    encoding = "utf-8"

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def speak():
    metrics.say("said ü \U0001f600 \udcff")
    metrics.say("again", redraw=True)
    metrics.warn("warned ü \U0001f600 \udcff")
    clock = iter([0.0, 0.0, *range(20, 200, 20)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.time, "perf_counter", lambda: next(clock))
        assert len(list(metrics.progress(torch.zeros(3, 2), 6, "what"))) == 3
    with pytest.raises(SystemExit) as stop:
        metrics.fail("wrong ü \U0001f600")
    assert stop.value.code == 2


STREAMS = {"none": lambda: None, "closed": closed, "gone": Gone}


@pytest.mark.parametrize("kind", [*STREAMS, "full"])
def test_streams_that_are_gone_stop_nothing(monkeypatch, kind):
    if kind == "full":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        stream = open("/dev/full", "w", buffering=1)
    else:
        stream = STREAMS[kind]()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    speak()
    if kind == "full":
        with contextlib.suppress(OSError):
            stream.close()


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "utf-16"])
def test_a_letter_that_a_stream_lacks_is_written_as_its_number(monkeypatch, encoding):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    speak()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    smile = "\U0001f600" if encoding.startswith("utf") else "\\U0001f600"
    letter = "ü" if encoding != "ascii" else "\\xfc"
    assert out.splitlines() == [f"said {letter} {smile} \\udcff", "again"]
    assert err.splitlines()[0] == f"warned {letter} {smile} \\udcff" and err.count("what: ") == 2
    assert err.splitlines()[-1].endswith(f"error: wrong {letter} {smile}")


def test_a_program_without_streams_opens_its_files_under_other_numbers(tmp_path):
    """After `>&- 2>&-` the first file would be number 1, and what a library written in C prints would stand in it."""
    code = "import metrics; f = open('file', 'w'); f.write(str(f.fileno()))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = f'exec "{sys.executable}" -c "{code}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", line], cwd=tmp_path, env=env).returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


def test_nobody_reads_any_more(tmp_path):
    """2>&1 | head -1: the rest is written into the void, and the exit code stays 0."""
    code = "import sys, metrics; metrics.say('x'); metrics.say('x' * 100_000); metrics.warn('x'); print('rest')"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    child.stdout.close()
    assert child.wait() == 0


def test_scores_are_printed_where_stdout_lacks_a_letter(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "train_classifier", lambda x, y, classes, *a: metrics.Classifier(3, classes).eval())
    torch.save(torch.randint(0, 256, (60, 3, 8, 8)).byte(), tmp_path / "ü 数.pt")
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    path = str(tmp_path / "ü 数.pt")
    metrics.main(["--real", path, "--fake", path, "--data-dir", str(tmp_path), "--scores", "fid"])
    assert b"\nFID " in stream.buffer.getvalue() and b"\\u6570.pt" in stream.buffer.getvalue()


# clocks


def test_a_clock_that_is_set_moves_no_time_of_the_log(tmp_path, monkeypatch):
    """time.time() jumps with it: seconds ran backwards, and images_per_s was 1e9."""
    monkeypatch.setattr(metrics.time, "time", iter([1e9, 1e3, 1e12, *[0.0] * 99]).__next__)
    monkeypatch.setattr(metrics.time, "perf_counter", iter(range(100)).__next__)
    s = started(tmp_path / "a")  # one look for the start, one for the mark
    s.add({"loss": torch.tensor(0.5)})
    s.log(10)
    [row] = rows(tmp_path / "a" / "log.csv")
    assert row["seconds"] == "3" and row["images_per_s"] == "80"


def test_a_run_that_would_take_for_ever_says_so(tmp_path, monkeypatch, capsys):
    """--steps 1e12, to be ended by Ctrl-C: the time to go was more than a timedelta holds."""
    s = study(tmp_path / "a")
    monkeypatch.setattr(metrics.time, "perf_counter", iter(range(0, 10**6, 1000)).__next__)
    s.start(0, 10**12, 10)
    s.add({"loss": torch.tensor(0.5)})
    s.log(1)
    assert "ETA 11574074 days, 1:46:40" in capsys.readouterr().out


# signals, in a program that imports a script


def test_a_run_in_a_thread_listens_to_no_signal():
    """signal.signal is for the main thread: it raised ValueError."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    made = []
    thread = threading.Thread(target=lambda: made.append(metrics.Stop()))
    thread.start()
    thread.join()
    assert not made[0].is_set() and [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    made[0].leave_if_set(1, types.SimpleNamespace(folder=Path("none")))


@pytest.mark.parametrize("ends_by", [None, RuntimeError, KeyboardInterrupt])
def test_after_a_run_the_handlers_are_those_of_before(tmp_path, monkeypatch, few_digits, ends_by):
    """Else the next Ctrl-C in a notebook only sets a flag that nobody reads."""
    import wgan_gp

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    seen = []

    def add(study, losses):
        seen.append([signal.getsignal(number) for number in numbers])
        if ends_by:
            raise ends_by

    monkeypatch.setattr(metrics.Study, "add", add)
    call = functools.partial(wgan_gp.main, [*TINY, str(tmp_path / "run"), "--log-every", "0"])
    if ends_by:
        with pytest.raises(SystemExit if ends_by is KeyboardInterrupt else ends_by):
            call()
    else:
        call()
    assert [signal.getsignal(number) for number in numbers] == before and seen[0] != before


# other pictures


def test_a_run_goes_on_with_other_images_and_other_classes(tmp_path, capsys, monkeypatch):
    """--resume best.pt --data-dir other. The labels stay, under new names, which is said; not their number."""
    import cdcgan
    import wgan_gp

    monkeypatch.setattr(metrics, "FEWEST", 1000)
    for folder, names in (("pets", "cat dog"), ("wild", "fox wolf"), ("more", "cat dog fox")):
        for name in names.split():
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(15):
                Image.new("RGB", (8, 8), (9 * i, len(name), 0)).save(tmp_path / folder / name / f"{i}.png")

    def resumed(module, run, folder):
        flags = ["--resume", str(tmp_path / run / "last.pt"), "--data-dir", str(tmp_path / folder), "--steps", "8"]
        capsys.readouterr()
        module.main([*flags, "--run-dir", str(tmp_path / f"{run} on {folder}")])
        return capsys.readouterr().err

    shared = ["--dataset", "folder", "--data-dir", str(tmp_path / "pets"), "--image-size", "16"]
    for module, run in ((cdcgan, "told"), (wgan_gp, "free")):
        module.main([*TINY, str(tmp_path / run), *shared])
    assert "now called" not in resumed(cdcgan, "told", "pets")
    assert "the classes are now called fox, wolf; in " in resumed(cdcgan, "told", "wild")
    assert list(json.loads((tmp_path / "told on wild" / "args.json").read_text())["classes"]) == ["fox", "wolf"]
    assert "now called" not in resumed(wgan_gp, "free", "more")
    with pytest.raises(SystemExit) as stop:
        resumed(cdcgan, "told", "more")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "knows 2 classes (cat, dog), not 3 (cat, dog, fox)" in line
    assert not (tmp_path / "told on more").exists()
    cdcgan.main(["--resume", str(tmp_path / "told on wild" / "last.pt"), "--generate", "3", "--label", "wolf"])
    assert [r["label"] for r in rows(tmp_path / "told on wild" / "generated" / "labels.csv")] == ["wolf"] * 3


@pytest.mark.parametrize("gone", [True, False])
def test_a_folder_that_changes_while_a_run_trains_does_not_change_what_it_is_scored_on(tmp_path, monkeypatch, gone):
    """One more file would deal the split anew, so that some test images were trained on. No file would end the run."""
    import wgan_gp

    def paint(i):
        Image.new("RGB", (16, 16), (i % 250, 7 * i % 250, i // 250)).save(tmp_path / "photos" / f"{i}.png")

    judged = {}
    (tmp_path / "photos").mkdir()
    for i in range(500):
        paint(i)
    before = {split: metrics.load_data("folder", tmp_path / "photos", 16, split)[0] for split in ("train", "test")}
    add, judge = metrics.Study.add, metrics.Judge

    def changes(study, losses):
        add(study, losses)
        if gone:
            shutil.rmtree(tmp_path / "photos", ignore_errors=True)
        else:
            paint(500 + study.count)

    def noted(dataset, load, *more, **flags):
        judged.update({split: load(split)[0] for split in ("train", "test")})
        return judge(dataset, load, *more, **flags, epochs=1)

    monkeypatch.setattr(metrics.Study, "add", changes)
    monkeypatch.setattr(metrics, "Judge", noted)
    shared = ["--dataset", "folder", "--data-dir", str(tmp_path / "photos"), "--image-size", "16", "--holdout", "9"]
    wgan_gp.main([*TINY, str(tmp_path / "run"), *shared])
    assert [torch.equal(judged[split], before[split]) for split in ("train", "test")] == [True, True]
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["last.pt"]["n_real"] == 50


# words


@pytest.mark.parametrize("text, value", [("1e5", 100_000), ("100", 100), ("2e0", 2)])
def test_whole_numbers_may_be_written_with_an_exponent(text, value):
    assert metrics.number(int, 1)(text) == value and type(metrics.number(int, 1)(text)) is int


@pytest.mark.parametrize("text", ["1.5", "nan", "inf", "1e300", "0", "x", ""])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises((ValueError, metrics.argparse.ArgumentTypeError)):
        metrics.number(int, 1)(text)


@pytest.mark.parametrize("rank, world", [(None, 1), ("2", 4)])
def test_a_clusters_world_size_alone_is_no_torchrun(monkeypatch, rank, world):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    spec = importlib.util.spec_from_file_location("metrics_of_a_cluster", metrics.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (module.WORLD, module.RANK) == (world, int(rank or 0))


def test_a_class_that_is_not_there_is_one_line_and_no_folder(tmp_path, capsys):
    s = study(tmp_path / "run", {"cat": 4, "dog": 4}, label="cow", generate_to=str(tmp_path / "out"))
    assert "--label cow is no class; there are: cat, dog" in one_line(capsys, lambda: s.generate(5))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("typed, named", [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")])
def test_an_accent_is_one_character_or_two(tmp_path, typed, named):
    """A keyboard gives one, the folders of a Mac have two; they look the same."""
    s = study(tmp_path / "run", {"bar": 4, named: 4}, label=typed)
    assert s.labels_to_generate(3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["dcgan", "wgan_gp"])
def test_a_gpu_without_memory_is_one_line(name, monkeypatch, capsys):
    script = importlib.import_module(name)

    def train(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr(script, "train", train)
    assert "smaller --batch-size" in one_line(capsys, lambda: script.main([]))


@pytest.mark.parametrize("name", ["wgan_gp", "toy2d"])
@pytest.mark.parametrize("error", [MemoryError("32 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_machine_without_memory_is_one_line(name, error, monkeypatch, capsys):
    script = importlib.import_module(name)
    work = {"wgan_gp": "train", "toy2d": "command"}[name]
    monkeypatch.setattr(script, work, mock.Mock(side_effect=error))
    assert "too little memory" in one_line(capsys, lambda: script.main([]))
    monkeypatch.setattr(script, work, mock.Mock(side_effect=RuntimeError("of the code")))
    with pytest.raises(RuntimeError, match="of the code"):
        script.main([])


# what a change of the scoring network, a long run or a reader's own flag does


def test_the_best_of_another_scoring_network_is_no_best(tmp_path, monkeypatch):
    """best.pt is of update 200, the best by the network of today; 100 has a lower FID by the one before."""
    monkeypatch.setattr(metrics, "step_of", lambda path: 200)
    made = study(tmp_path)
    (tmp_path / "best.pt").touch()
    made.scored_at, made.best_fid, made.total = None, math.inf, 1000
    before = {"step": "100", "fid_train": "5", "features": "A"}
    made.find_best([before, {"step": "200", "fid_train": "9", "features": "B"}], 200)
    assert made.best_fid == 9 and made.scored_at == 200 and made.scored_by == "B"


def test_an_error_in_the_code_is_not_shown_as_a_users_mistake(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="JSON"):
        study(tmp_path / "a", init_from=Path("x")).start(0, 10, 1)
    made = study(tmp_path / "b", reject="drs")
    made.chosen = mock.Mock(side_effect=torch.OutOfMemoryError("the GPU is full"))
    with pytest.raises(torch.OutOfMemoryError):
        made.generate(5)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("call", [metrics.warn, metrics.fail])
def test_a_message_does_not_follow_a_progress_line_on_a_terminal(monkeypatch, call):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    metrics.say("epoch 1", redraw=True)
    with contextlib.suppress(SystemExit):
        call("careful")
    line = screen.getvalue().split("epoch 1")[1]
    assert line.startswith("\r\033[K") and line.endswith("careful\n")


def test_a_run_ends_well_where_tensorboard_cannot_close_its_file(tmp_path, capsys):
    made = started(tmp_path / "a")
    made.judge = False
    made.board = types.SimpleNamespace(close=no_space)
    made.finish(10, None)
    out = capsys.readouterr()
    assert "TensorBoard's file may lack its end" in out.err and f"done: {tmp_path / 'a'}" in out.out


def test_generated_images_do_not_replace_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    made = study(tmp_path / "a", generate_to=str(tmp_path / "file"))
    assert "FileExistsError" in one_line(capsys, lambda: made.generate(2))


@pytest.mark.parametrize("label, kept", [("shares", 50), ("turn", 50), ("b", 2)])
def test_rejection_is_calibrated_on_a_class_only_where_one_is_asked_for(tmp_path, monkeypatch, label, kept):
    """Of 1,000 images ten are of class b, and two of the 50 that D never saw: shares of 50 ask for class a alone."""
    made = study(tmp_path, {"a": 990, "b": 10}, reject="drs", label=label, drs_percentile=60)
    made.held = torch.zeros(50, 1, 8, 8).byte(), torch.tensor([0] * 48 + [1] * 2)
    seen = []
    monkeypatch.setattr(metrics, "platt", lambda real, fake: seen.append(len(real)))
    monkeypatch.setattr(metrics, "rejected", mock.Mock(side_effect=StopIteration))
    with pytest.raises(StopIteration):
        made.chosen(5, 1, labels=made.labels_to_generate)
    assert seen == [kept]


def test_the_film_shows_the_sheets_in_the_order_of_their_steps(tmp_path, monkeypatch):
    made = started(tmp_path / "a")
    made.judge = False
    for name in ("step_10000000", "step_9999000", "step_9999000 (1)"):
        (tmp_path / "a" / "samples" / f"{name}.png").touch()
    film = mock.Mock()
    monkeypatch.setattr(metrics, "save_gif", film)
    made.finish(10_000_000, None)
    assert [path.stem for path in film.call_args[0][0]] == ["step_9999000", "step_10000000"]


def test_a_long_z_is_traversed_in_its_first_512_numbers(tmp_path):
    seen = []

    def sample(z, y):
        seen.append(z.shape)
        return torch.zeros(len(z), 1, 8, 8).byte()

    made = started(tmp_path / "a", latent_dim=2000)
    made.sample = sample
    made.traversal()
    assert seen == [(512, 2000), (512, 2000), (90, 2000)]


def test_runs_of_a_study_without_a_script_are_told_apart(tmp_path):
    for name, lr in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps({"script": None, "seed": 0, "lr_g": lr}))
    assert list(metrics.groups([tmp_path / "a", tmp_path / "b"])) == ["a", "b"]


def test_args_json_of_another_kind_does_not_end_a_resume(tmp_path):
    made = started(tmp_path / "a")
    (tmp_path / "args.json").write_text("[]")
    made.compare_test_images(tmp_path / "args.json")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_tensors_on_a_full_disk_are_an_oserror():
    """torch.save itself raises RuntimeError there, which those who keep networks and statistics do not expect."""
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        metrics.save_tensors({"x": torch.zeros(1000)}, full)


def test_tensors_that_are_saved_can_be_loaded(tmp_path):
    with open(tmp_path / "a.pt", "wb") as file:
        metrics.save_tensors({"x": torch.arange(3)}, file)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["x"].tolist() == [0, 1, 2]


def test_a_file_that_may_not_be_written_is_not_removed(tmp_path, monkeypatch):
    path = tmp_path / "samples.png"
    path.write_bytes(b"mine")
    monkeypatch.setattr(Path, "write_bytes", no_space)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError):
        metrics.save_sheet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), path)
    assert path.read_bytes() == b"mine"
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    with pytest.raises(OSError):
        metrics.save_sheet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), path)
    assert not path.exists()  # a part of a file is no picture


def test_a_network_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*a, **k):
        raise PermissionError(13, "Permission denied")

    said = []
    monkeypatch.setattr(torch, "load", refuse)
    assert metrics.read_network([tmp_path / "a.pt"], "key", None, said.append) == (None, {})
    assert said == [f"{tmp_path / 'a.pt'} cannot be read (PermissionError)"]


# a checkpoint away from its run, and what one run leaves to others

BEFORE = {"script": "wgan_gp", "dataset": "digits", "image_size": 8, "seed": 0}


@pytest.mark.parametrize("other", [{"script": "dcgan"}, {"dataset": "mnist"}, {"image_size": 32}, {"seed": 1}, None])
def test_a_resume_leaves_alone_what_is_not_of_its_run(tmp_path, capsys, other):
    """A last.pt that was copied among downloads: scores.json, args.json and samples there are not the run's."""
    s = study(tmp_path, resume=str(tmp_path / "gan.pt"))
    files = {"gan.pt": b"", "scores.json": b"{}", "log.csv": b"step\n900\n", "notes.txt": b"mine"}
    if other:
        files["args.json"] = json.dumps(BEFORE | other).encode()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    line = one_line(capsys, lambda: s.start(4, 1000, 10))
    assert f"{tmp_path} is not the folder of the run of {tmp_path / 'gan.pt'}: name one by --run-dir" in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_resume_goes_on_in_its_own_folder_and_beside_a_lone_checkpoint(tmp_path):
    for name, before in (("a", json.dumps(BEFORE)), ("b", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").write_bytes(b"")
        if before:
            (tmp_path / name / "args.json").write_text(before)
        study(tmp_path / name, resume=str(tmp_path / name / "last.pt")).start(4, 1000, 10)
        assert json.loads((tmp_path / name / "args.json").read_text())["script"] == "wgan_gp"


def test_a_checkpoint_that_the_disk_refuses_once_costs_a_warning(tmp_path, monkeypatch, capsys, few_digits):
    """A virus scanner may hold last.pt for a moment, and space may be found. The next checkpoint is the next try."""
    import wgan_gp

    replace = os.replace
    tries = []

    def refuse_the_second(source, target):
        if str(target).endswith("last.pt"):
            tries.append(target)
            if len(tries) == 2:
                raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_the_second)
    wgan_gp.main([*TINY, str(tmp_path / "run"), "--checkpoint-every", "1"])
    assert len(tries) == 5  # after each of four updates, and at the end
    assert capsys.readouterr().err.count(f"{tmp_path / 'run/last.pt'} cannot be written (PermissionError") == 1
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 4


def test_a_last_checkpoint_that_the_disk_refuses_is_not_called_saved(tmp_path, monkeypatch, capsys, few_digits):
    """After Ctrl-C, too, long before the last update: the run must not say that it can go on from there."""
    import wgan_gp

    log = metrics.Study.log

    def interrupted(self, i):
        log(self, i)
        monkeypatch.setattr(os, "fsync", no_space)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(metrics.Study, "log", interrupted)
    flags = [*TINY, str(tmp_path / "run"), "--log-every", "1", "--steps", "400"]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
    try:
        with pytest.raises(SystemExit) as stop:
            wgan_gp.main(flags)
    finally:
        signal.signal(signal.SIGINT, handler)
    out = capsys.readouterr()
    assert stop.value.code == 130 and "last.pt cannot be written" in out.err
    assert "which is not saved" in out.out and "go on with" not in out.out


def test_a_run_that_ended_leaves_its_folder_to_others(tmp_path, monkeypatch, few_digits):
    """A notebook lives on after an error, whose traceback keeps the run's objects, and so the lock, alive."""
    import wgan_gp

    studies = []
    start = metrics.Study.start

    def watched(self, *a):
        start(self, *a)
        studies.append(self)
        assert not taken(tmp_path / "run/args.json")

    monkeypatch.setattr(metrics.Study, "start", watched)
    wgan_gp.main([*TINY, str(tmp_path / "run")])
    wgan_gp.main(["--resume", str(tmp_path / "run/last.pt"), "--steps", "8"])
    assert len(studies) == 2 and taken(tmp_path / "run/args.json")


def taken(path):
    """Whether another process gets the lock on a file."""
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True).returncode == 0


def test_a_data_folder_that_may_not_be_seen_stops_no_generating(tmp_path, monkeypatch, capsys, few_digits):
    """A checkpoint of another user on a shared machine: to ask whether their folder exists raises PermissionError."""
    import wgan_gp

    wgan_gp.main([*TINY, str(tmp_path / "a")])
    saved = torch.load(tmp_path / "a/last.pt", weights_only=True)
    saved["args"] |= {"dataset": "folder", "data_dir": "/home/alice/photos"}
    resume = ["--resume", str(tmp_path / "b.pt")]
    torch.save(saved, resume[1])
    ask = os.stat

    def forbidden(path, *a, **k):
        if "alice" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return ask(path, *a, **k)

    monkeypatch.setattr(os, "stat", forbidden)
    assert wgan_gp.parse_args([*resume, "--generate", "1"]).data_dir == "data"
    line = one_line(capsys, lambda: wgan_gp.parse_args(resume))
    assert "were in /home/alice/photos, which is gone: give --data-dir" in line
