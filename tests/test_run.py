"""The run: exact resume, signals, checkpoints, errors, figures, generation. Tiny networks on rendered digits."""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import wgan_gp

ROOT = Path(wgan_gp.__file__).parent
TINY = ["--image-size", "28", "--ngf", "4", "--ndf", "4", "--latent-dim", "6", "--batch-size", "8", "--device", "cpu",
        "--log-every", "5", "--sample-every", "20", "--eval-every", "0"]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """300 digits instead of 20,000, the script on its own (no scores), the working folder a temporary one."""
    render = wgan_gp.render_digits
    monkeypatch.setattr(wgan_gp, "render_digits", lambda n, seed: render(300, seed))
    (tmp_path / "alone").mkdir()
    monkeypatch.setattr(wgan_gp, "SCRIPT", Path(shutil.copy(ROOT / "wgan_gp.py", tmp_path / "alone")))
    monkeypatch.chdir(tmp_path)


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
    return [[r[k] for k in ("step", "g_updates", *wgan_gp.LOGGED, "fid_train")] for r in rows]


@pytest.fixture
def whole():
    wgan_gp.main([*TINY, "--steps", "40", "--run-dir", "whole", "--lr-decay", "linear", "--checkpoint-every", "0"])
    return tensors("whole/last.pt")


# resume ---------------------------------------------------------------------------------------------------------------


def test_sigkill_after_a_checkpoint_resumes_bit_for_bit(whole, tmp_path):
    code = ("import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import wgan_gp as w\n"
            "render = w.render_digits; w.render_digits = lambda n, seed: render(300, seed); save = w.Run.save\n"
            "def save_and_die(run, name): save(run, name); os.kill(os.getpid(), signal.SIGKILL)\n"
            "w.Run.save = save_and_die; w.main(sys.argv[1:])")
    flags = [*TINY, "--steps", "40", "--run-dir", "cut", "--lr-decay", "linear", "--checkpoint-every", "20"]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "alone"), *flags], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load("cut/last.pt", weights_only=True)["step"] == 20
    wgan_gp.main(["--resume", "cut/last.pt"])
    same(tensors("cut/last.pt"), whole)
    assert losses("cut") == losses("whole") and len(losses("cut")) == 8
    assert (Path("cut") / "samples.png").read_bytes() == (Path("whole") / "samples.png").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_that_resumes_bit_for_bit(whole, monkeypatch, number):
    record = wgan_gp.Run.record

    def signalled(run, stats):
        record(run, stats)
        if run.step == 15:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(wgan_gp.Run, "record", signalled)
    theirs = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    handlers = lambda *a: None, lambda *a: None  # a caller's own
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(s, handler)
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main([*TINY, "--steps", "40", "--run-dir", "cut", "--lr-decay", "linear"])
    assert stop.value.code == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), theirs):
        signal.signal(s, handler)
    assert torch.load("cut/last.pt", weights_only=True)["step"] == 15
    monkeypatch.setattr(wgan_gp.Run, "record", record)
    wgan_gp.main(["--resume", "cut/last.pt"])
    same(tensors("cut/last.pt"), whole)


def test_mlp_resumes_bit_for_bit_and_from_another_run_directory():
    flags = [*TINY, "--arch", "mlp", "--d-steps", "2", "--g-steps", "2", "--prior", "uniform"]
    wgan_gp.main([*flags, "--steps", "8", "--run-dir", "whole"])
    wgan_gp.main([*flags, "--steps", "4", "--run-dir", "half"])
    wgan_gp.main(["--resume", "half/last.pt", "--steps", "8", "--run-dir", "rest"])
    same(tensors("rest/last.pt"), tensors("whole/last.pt"))
    assert torch.load("half/last.pt", weights_only=True)["step"] == 4


def test_rows_and_sheets_past_the_step_are_dropped(whole):
    wgan_gp.main([*TINY, "--steps", "20", "--run-dir", "half", "--lr-decay", "linear", "--sample-every", "10"])
    with open("half/log.csv", "a") as f:
        f.write("25" + "," * (open("half/log.csv").readline().count(",")) + "\n20,1,")  # and a row cut by a kill
    shutil.copy("half/samples/step_0000020.png", "half/samples/step_0000030.png")
    wgan_gp.main(["--resume", "half/last.pt", "--sample-every", "0"])
    assert [r[0] for r in losses("half")] == ["5", "10", "15", "20"]
    assert sorted(p.name for p in Path("half/samples").iterdir()) == [f"step_{i:07}.png" for i in (0, 10, 20)]


def test_epochs_steps_and_rates_may_change():
    wgan_gp.main([*TINY, "--steps", "5", "--run-dir", "a"])
    wgan_gp.main(["--resume", "a/last.pt", "--epochs", "1", "--lr-g", "5e-5", "--lr-d", "5e-5", "--log-every", "1"])
    rows = list(csv.DictReader(open("a/log.csv")))
    assert torch.load("a/last.pt", weights_only=True)["step"] == 40  # 300 // 8 = 37, reached by the iteration to 40
    assert rows[0]["lr_g"] == "0.0001" and rows[-1]["lr_g"] == rows[-1]["lr_d"] == "5e-05"


# checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_kill_inside_the_write_leaves_the_old_checkpoint(monkeypatch):
    wgan_gp.main([*TINY, "--steps", "5", "--run-dir", "a"])
    before = Path("a/last.pt").read_bytes()
    save = torch.save

    def half(obj, f):
        save(obj, "part")
        f.write(Path("part").read_bytes()[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(SystemExit):
        wgan_gp.main(["--resume", "a/last.pt", "--steps", "10"])
    assert Path("a/last.pt").read_bytes() == before
    monkeypatch.undo()


def test_a_cut_checkpoint_is_refused_with_one_line(capsys):
    wgan_gp.main([*TINY, "--steps", "5", "--run-dir", "a"])
    data = Path("a/last.pt").read_bytes()
    Path("b").mkdir()
    for cut in [0, 1, *np.random.RandomState(0).randint(2, len(data) - 1, 17).tolist(), len(data) - 1]:
        Path("b/cut.pt").write_bytes(data[:cut])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            wgan_gp.main(["--resume", "b/cut.pt", "--steps", "10"])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and "cut.pt" in err and "Traceback" not in err
        assert os.listdir("b") == ["cut.pt"]


def test_checkpoint_holds_plain_types_and_names_its_script():
    wgan_gp.main([*TINY, "--steps", "5", "--run-dir", "a"])
    checkpoint = torch.load("a/last.pt", weights_only=True)
    assert checkpoint["script"] == "wgan_gp" and checkpoint["step"] == 5 and checkpoint["args"]["ngf"] == 4
    assert json.loads(Path("a/args.json").read_text())["latent_dim"] == 6
    assert Path("a/wgan_gp.py").read_bytes() == (ROOT / "wgan_gp.py").read_bytes()


# the step -------------------------------------------------------------------------------------------------------------


def test_the_step_never_waits_for_the_device(monkeypatch):
    """From the last batch() of an iteration to record(): no way from a tensor to the host is taken."""
    armed, calls = [False], [0]

    def guard(name):
        real = getattr(torch.Tensor, name)

        def guarded(*a, **k):
            assert not armed[0], f"Tensor.{name} inside the step"
            return real(*a, **k)
        monkeypatch.setattr(torch.Tensor, name, guarded)

    for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        guard(name)
    batch, record, as_tensor = wgan_gp.Batches.__call__, wgan_gp.Run.record, torch.tensor

    def counted(self):
        out = batch(self)
        calls[0] += 1
        armed[0] = calls[0] % 5 == 0
        return out

    def recorded(run, stats):
        record(run, stats)
        armed[0] = False

    def host_made(*a, **k):
        assert not armed[0], "a host-made tensor inside the step"
        return as_tensor(*a, **k)

    monkeypatch.setattr(wgan_gp.Batches, "__call__", counted)
    monkeypatch.setattr(wgan_gp.Run, "record", recorded)
    monkeypatch.setattr(torch, "tensor", host_made)
    wgan_gp.main([*TINY, "--steps", "10", "--run-dir", "a"])
    assert calls[0] == 10


def test_a_resumed_run_logs_and_scores_as_an_unbroken_one(monkeypatch):
    """Stopped between two rows of the log, at an evaluation, and resumed into another run directory."""
    scripted_judge(monkeypatch, [])
    flags = [*TINY, "--log-every", "10", "--eval-every", "15"]
    wgan_gp.main([*flags, "--steps", "30", "--run-dir", "whole"])
    wgan_gp.main([*flags, "--steps", "15", "--run-dir", "part"])
    wgan_gp.main(["--resume", "part/last.pt", "--steps", "15"])  # nothing to do: no second row of scores
    wgan_gp.main(["--resume", "part/last.pt", "--steps", "30"])
    assert losses("part") == losses("whole")
    seconds = [float(r["seconds"]) for r in csv.DictReader(open("part/log.csv"))]
    assert seconds == sorted(seconds)
    wgan_gp.main(["--resume", "part/last.pt", "--run-dir", "other"])
    wgan_gp.main(["--resume", "other/last.pt", "--steps", "40"])
    assert len({line.count(",") for line in open("other/log.csv")}) == 1


def test_a_second_signal_stops_at_once_and_after_training_the_first(monkeypatch):
    record = wgan_gp.Run.record

    def twice(run, values):
        record(run, values)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(wgan_gp.Run, "record", twice)
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main([*TINY, "--steps", "40", "--run-dir", "a"])
    assert stop.value.code == 130 and not Path("a/last.pt").exists()
    monkeypatch.setattr(wgan_gp.Run, "record", record)
    monkeypatch.setattr(wgan_gp.Run, "figures", lambda run: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main([*TINY, "--steps", "10", "--run-dir", "b"])
    assert stop.value.code == 130 and Path("b/last.pt").exists() and not Path("b/samples.png").exists()


def test_step_counts_and_cadence():
    """--steps and every --*-every take effect at the first iteration boundary at or past the number."""
    wgan_gp.main([*TINY, "--steps", "17", "--log-every", "7", "--sample-every", "9", "--g-steps", "3",
                  "--run-dir", "a"])
    assert [r[:2] for r in losses("a")] == [["10", "6"], ["15", "9"]]
    assert sorted(p.name for p in Path("a/samples").iterdir()) == [f"step_{i:07}.png" for i in (0, 10, 20)]
    assert torch.load("a/last.pt", weights_only=True)["step"] == 20


@pytest.mark.parametrize("change", [["--gp-weight", "0"], ["--lr-d", "1e-3"], ["--lr-g", "1e-3"], ["--beta1", "0"],
                                    ["--beta2", ".5"], ["--ema", "0"], ["--seed", "1"], ["--prior", "uniform"],
                                    ["--d-steps", "2"], ["--g-steps", "2"], ["--lr-decay", "linear"]])
def test_every_training_flag_changes_the_weights(change, monkeypatch):
    monkeypatch.setattr(wgan_gp.Run, "figures", lambda run: None)
    wgan_gp.main([*TINY, "--steps", "10", "--run-dir", "a"])
    wgan_gp.main([*TINY, "--steps", "10", "--run-dir", "b", *change])
    a, b = tensors("a/last.pt"), tensors("b/last.pt")
    assert not all(torch.equal(x, b["ema"][k]) for k, x in a["ema"].items())


def test_no_averaging_makes_the_average_g():
    wgan_gp.main([*TINY, "--steps", "10", "--run-dir", "a", "--ema", "0"])
    saved = tensors("a/last.pt")
    same(saved["ema"], saved["nets"]["G"])


def scripted_judge(monkeypatch, fids):
    """Scores from a list, in place of metrics.Judge; one FID for every call."""
    fids = list(fids)

    class Judge:
        n = 10
        line = staticmethod(str)

        def __init__(self, *a, **k):
            pass

        def __call__(self, x, y=None):
            assert x.dtype == torch.uint8 and x.shape == (10, 1, 28, 28)
            return dict.fromkeys(wgan_gp.SCORES, 1.0) | {"fid_train": fids.pop(0) if fids else 99.0}

    module = type("metrics", (), {"Judge": Judge, "plot": staticmethod(lambda *a: None)})
    monkeypatch.setitem(sys.modules, "metrics", module)
    monkeypatch.setattr(wgan_gp, "SCRIPT", ROOT / "wgan_gp.py")


def test_best_fid_goes_back_and_halves_the_rates(monkeypatch):
    scripted_judge(monkeypatch, [50, 40, 45, 46, 30, 31, 32])
    flags = [*TINY, "--steps", "40", "--eval-every", "5", "--lr-decay", "best-fid", "--patience", "2"]
    seen, back = [], wgan_gp.Run.back_to_best

    def watched(run):
        back(run)
        best = torch.load(run.dir / "best.pt", weights_only=True)
        seen.append((run.step, best["step"]))
        same(run.nets["G"].state_dict(), best["nets"]["G"])
        same(run.opts["d"].state_dict()["state"], best["opts"]["d"]["state"])
        assert run.state["stale"] == 0

    monkeypatch.setattr(wgan_gp.Run, "back_to_best", watched)
    wgan_gp.main([*flags, "--run-dir", "a"])
    assert seen == [(20, 10), (35, 25)]
    rows = [r for r in csv.DictReader(open("a/log.csv")) if r["lr_g"]]
    assert [float(r["lr_d"]) for r in rows] == [1e-4] * 4 + [5e-5] * 3 + [2.5e-5]
    assert torch.load("a/best.pt", weights_only=True)["state"]["best_fid"] == 30
    # the halved rates go on after a resume; given ones replace them; last.pt on its own starts the search afresh
    wgan_gp.main(["--resume", "a/last.pt", "--steps", "45"])
    wgan_gp.main(["--resume", "a/last.pt", "--steps", "50", "--lr-d", "3e-5"])
    rows = [r for r in csv.DictReader(open("a/log.csv")) if r["lr_g"]]
    # two evaluations at 99 since step 35: halved a third time at 45, after that row was written
    assert [(float(r["lr_g"]), float(r["lr_d"])) for r in rows[-2:]] == [(2.5e-5, 2.5e-5), (1.25e-5, 3e-5)]
    Path("moved").mkdir()
    shutil.copy("a/last.pt", "moved")
    wgan_gp.main(["--resume", "moved/last.pt", "--steps", "70"])
    assert Path("moved/best.pt").exists()


def test_linear_decay_reaches_zero_at_the_last_step():
    wgan_gp.main([*TINY, "--steps", "20", "--run-dir", "a", "--lr-decay", "linear"])
    assert [float(r["lr_g"]) for r in csv.DictReader(open("a/log.csv"))] == pytest.approx([1e-4, 7.5e-5, 5e-5, 2.5e-5])


def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(monkeypatch, capsys):
    loss, calls = wgan_gp.generator_loss, [0]

    def poisoned(score):
        calls[0] += 1
        return loss(score) * (float("nan") if calls[0] == 6 else 1)

    monkeypatch.setattr(wgan_gp, "generator_loss", poisoned)
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main([*TINY, "--steps", "100", "--run-dir", "a", "--checkpoint-every", "25", "--log-every", "0"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "step 30" in err and err.count("\n") == 1
    saved = torch.load("a/last.pt", weights_only=True)
    assert saved["step"] == 25 and all(p.isfinite().all() for net in saved["nets"].values() for p in net.values())


def test_no_sheet_of_nan_is_written(monkeypatch):
    monkeypatch.setattr(wgan_gp, "generator_loss", lambda score: score.mean() * float("nan"))
    with pytest.raises(SystemExit):
        wgan_gp.main([*TINY, "--steps", "20", "--run-dir", "a", "--log-every", "0", "--sample-every", "5"])
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
    (["--resume", "good/last.pt", "--generate", "2", "--z-file", "z.npy"], "z.npy"),
    (["--resume", "good/last.pt", "--generate", "2", "--z-file", "none.pt"], "none.pt"),
    (["--resume", "good/last.pt", "--generate", "2", "--z-file", "wide.npy"], "wide.npy"),
    (["--resume", "good/last.pt", "--generate", "2", "--generate-to", "used"], "used"),
    (["--resume", "good/last.pt", "--generate", "2", "--generate-to", "file/in"], "file/in"),
    (["--dataset", "mnist", "--data-dir", "nowhere/deep/er"], "deep/er"),
]


@pytest.mark.parametrize("flags, named", ERRORS, ids=[" ".join(f) for f, _ in ERRORS])
def test_a_users_mistake_is_one_line_and_leaves_nothing(flags, named, capsys, no_network, monkeypatch):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    wgan_gp.main([*TINY, "--steps", "5", "--run-dir", "good"])
    good = torch.load("good/last.pt", weights_only=True)
    torch.save(good | {"script": "dcgan"}, "other.pt")
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
        wgan_gp.main(flags if resumed else [*TINY, *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1 and named in err and "Traceback" not in err and "usage" not in err
    assert sorted(str(p) for p in Path(".").rglob("*")) == before


def test_damaged_data_is_one_line(capsys, no_network):
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main([*TINY, "--dataset", "mnist"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not Path("runs").exists()


# figures and generation -----------------------------------------------------------------------------------------------


def tiles(path, columns, side=28):
    """The pictures of a sheet (N, side, side), two pixels of margin around each."""
    sheet = np.asarray(Image.open(path))
    rows = (sheet.shape[0] - 2) // (side + 2)
    assert sheet.shape == (rows * (side + 2) + 2, columns * (side + 2) + 2)
    return np.stack([sheet[2 + r * (side + 2):, 2 + c * (side + 2):][:side, :side]
                     for r in range(rows) for c in range(columns)])


def loaded_generator(path):
    checkpoint = torch.load(path, weights_only=True)
    G = wgan_gp.make_generator(wgan_gp.parse_args(TINY), 1)
    G.load_state_dict(checkpoint["ema"])
    return G.eval()


@torch.no_grad()
def paint(G, z):
    return np.clip(np.round((G(z).double().numpy()[:, 0] + 1) * 127.5), 0, 255)


def test_figures_show_what_they_say():
    wgan_gp.main([*TINY, "--steps", "20", "--run-dir", "a", "--lr-g", "1e-2", "--traverse", "3", "--sample-every", "5"])
    G = loaded_generator("a/last.pt")
    noise = [wgan_gp.sample_z(wgan_gp.parse_args(TINY), n, "cpu", wgan_gp.seeded(0, key))
             for n, key in ((64, 1), (16, 4), (1, 5))]
    assert np.abs(tiles("a/samples.png", 8) - paint(G, noise[0])).max() <= 1
    a, b = noise[1][:8], noise[1][8:]
    latent, pixel = (tiles(f"a/interpolation_{k}.png", 10).reshape(8, 10, 28, 28).astype(float)
                     for k in ("latent", "pixel"))
    for j in range(10):
        assert np.abs(latent[:, j] - paint(G, a + (b - a) * j / 9)).max() <= 1
        assert np.abs(pixel[:, j] - (paint(G, a) + (paint(G, b) - paint(G, a)) * j / 9)).max() <= 1
    ends = [[paint(G, torch.where(torch.arange(6) == i, v, noise[2])) for v in (-4.0, 4.0)] for i in range(6)]
    change = [np.abs(low - high).mean() for low, high in ends]
    rows = tiles("a/traversal.png", 9).reshape(3, 9, 28, 28).astype(float)
    for row, i in zip(rows, np.argsort(change)[::-1]):
        for picture, v in zip(row, np.linspace(-4, 4, 9)):
            assert np.abs(picture - paint(G, torch.where(torch.arange(6) == int(i), float(v), noise[2]))[0]).max() <= 1
    gif = Image.open("a/training.gif")
    assert Path("a/training.gif").stat().st_size <= 300 * 1024 and gif.n_frames >= 5 and gif.size == (242, 242)


def test_gif_keeps_to_its_size():
    rng, paths = np.random.RandomState(0), []
    for i in range(60):
        paths.append(Path(f"step_{i:07}.png"))
        Image.fromarray(rng.randint(0, 255, (242, 242), dtype=np.uint8)).save(paths[-1])
    wgan_gp.save_gif(paths, Path("a.gif"))
    assert 100 * 1024 < Path("a.gif").stat().st_size <= 300 * 1024


def test_generation_from_z_and_from_a_seed():
    wgan_gp.main([*TINY, "--steps", "20", "--run-dir", "a", "--lr-g", "1e-2"])
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(7))
    np.save("z.npy", z.numpy())
    torch.save(z, "z.pt")
    before = Path("a/last.pt").read_bytes()
    for flags in (["--z-file", "z.npy"], ["--z-file", "z.pt"], ["--seed", "1"], ["--seed", "2"], ["--seed", "1"]):
        out = f"out{len(list(Path('.').glob('out*')))}"
        wgan_gp.main(["--resume", "a/last.pt", "--generate", "3", "--generate-to", out, *flags])
        assert sorted(os.listdir(out)) == ["00000.png", "00001.png", "00002.png"]
    shown = [np.stack([np.asarray(Image.open(f)) for f in sorted(Path(f"out{i}").iterdir())]).astype(float)
             for i in range(5)]
    assert np.abs(shown[0] - paint(loaded_generator("a/last.pt"), z)).max() <= 1
    assert (shown[0] == shown[1]).all() and (shown[2] == shown[4]).all()
    assert np.abs(shown[0] - shown[2]).max() > 5 and np.abs(shown[2] - shown[3]).max() > 5
    assert Path("a/last.pt").read_bytes() == before


def test_tensorboard_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main([*TINY, "--steps", "5", "--run-dir", "a", "--tensorboard"])
    assert stop.value.code == 2 and "pip install tensorboard" in capsys.readouterr().err and not Path("a").exists()


def test_terminal_redraws_and_file_gets_whole_lines(monkeypatch, capsys):
    wgan_gp.main([*TINY, "--steps", "10", "--run-dir", "a"])
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("epoch")]
    assert len(lines) == 2
    assert re.fullmatch(r"epoch 0\.3/0\.2703  D 10 G 2  d_loss \S+  g_loss \S+  w_dist \S+  grad_norm \S+  d_acc \S+  "
                        r"\d+ images/s  ETA 0:00:00", lines[1]), lines[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    wgan_gp.main([*TINY, "--steps", "10", "--run-dir", "b"])
    assert capsys.readouterr().out.count("\r\033[Kepoch") == 2


# the script alone -----------------------------------------------------------------------------------------------------


def test_copied_alone_it_trains_resumes_and_generates(tmp_path):
    """The whole chain through the shell: an empty folder, the script and nothing else."""
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(ROOT / "wgan_gp.py", folder)

    def call(*flags):
        done = subprocess.run([sys.executable, "wgan_gp.py", *flags], cwd=folder, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, out, err = call(*TINY, "--steps", "10", "--run-dir", "run")
    assert (code, err) == (0, "") and "no scores" in out
    made = {"args.json", "wgan_gp.py", "log.csv", "last.pt", "samples", "samples.png", "training.gif",
            "interpolation_latent.png", "interpolation_pixel.png", "traversal.png"}
    assert set(os.listdir(folder / "run")) == made
    code, out, err = call("--resume", "run/last.pt", "--steps", "20")
    assert (code, err) == (0, "") and torch.load(folder / "run/last.pt", weights_only=True)["step"] == 20
    code, out, err = call("--resume", "run/last.pt", "--generate", "2")
    assert (code, err) == (0, "") and len(os.listdir(folder / "run/generated")) == 2
    code, out, err = call("--steps", "no")
    assert code == 2 and err.count("\n") == 1 and err.startswith("wgan_gp.py: error: ")


# rejection ------------------------------------------------------------------------------------------------------------


def with_metrics(monkeypatch):
    monkeypatch.setattr(wgan_gp, "SCRIPT", ROOT / "wgan_gp.py")


def test_held_out_pictures_are_never_trained_on(monkeypatch):
    """Held out and trained on make up the data, once each; the order of the rest is still a function of the seed."""
    monkeypatch.setattr(wgan_gp, "render_digits",  # picture i holds the number i
                        lambda n, seed: (torch.arange(300).view(300, 1, 1, 1).expand(-1, 1, 28, 28)
                                         .remainder(251).byte().contiguous(), torch.arange(300)))
    args = wgan_gp.parse_args([*TINY, "--holdout", "44"])
    batch = wgan_gp.Batches(args, torch.device("cpu"))
    assert batch.per_epoch == (300 - 44) // 8
    trained = torch.cat([batch()[1] for _ in range(batch.per_epoch)])
    x, y = batch.held
    assert len(y) == 44 and sorted([*trained.tolist(), *y.tolist()]) == list(range(300))
    assert (x[:, 0, 0, 0] == (y % 251).byte()).all()
    again = wgan_gp.Batches(args, torch.device("cpu"))
    assert torch.equal(torch.cat([again()[1] for _ in range(again.per_epoch)]), trained)


def test_generation_by_naive_rejection_keeps_the_pictures_the_rule_keeps(monkeypatch):
    """What is written, against a replay of the rule: z in order, chance sigmoid(C(G(z))), one uniform each."""
    wgan_gp.main([*TINY, "--steps", "20", "--run-dir", "a", "--lr-g", "1e-2"])
    with_metrics(monkeypatch)
    said = []
    monkeypatch.setattr(wgan_gp.Run, "say", lambda run, text, redraw=False: said.append(text))
    wgan_gp.main(["--resume", "a/last.pt", "--generate", "6", "--generate-to", "out", "--reject", "naive"])
    args = wgan_gp.parse_args(TINY)
    G, C = loaded_generator("a/last.pt"), wgan_gp.make_critic(args, 1)
    C.load_state_dict(torch.load("a/last.pt", weights_only=True)["nets"]["D"])
    z = wgan_gp.sample_z(args, 1000, "cpu", wgan_gp.seeded(0, 6))
    uniform = torch.rand(1000, generator=wgan_gp.seeded(0, 6, 1), dtype=torch.float64)
    with torch.no_grad():
        chance = 1 / (1 + torch.exp(-C(G(z)).double()))
    wanted = (uniform < chance).nonzero().flatten()[:6]
    shown = np.stack([np.asarray(Image.open(f)) for f in sorted(Path("out").iterdir())]).astype(float)
    assert np.abs(shown - paint(G, z[wanted])).max() <= 1
    assert f"{int(wanted[-1]) + 1} attempts" in said[-1], said


def test_drs_is_calibrated_on_held_out_pictures_and_scored_at_the_end(monkeypatch):
    """The head is fitted on scores of the held-out pictures alone; scores.json holds what it took."""
    import metrics
    scripted_judge(monkeypatch, [])
    calls = []
    sys.modules["metrics"].rejected = metrics.rejected
    sys.modules["metrics"].platt = lambda real, fake: calls.append((real, fake)) or (1.0, 0.0, 0.7)
    wgan_gp.main([*TINY, "--steps", "20", "--run-dir", "a", "--holdout", "40", "--reject", "drs"])
    scores = json.loads(Path("a/scores.json").read_text())
    took = scores["last.pt --reject drs"]
    assert took["attempts"] >= 10 and took["auc"] == 0.7 and took["burn_in"] == 10_000 and took["fid"] == 1
    args = wgan_gp.parse_args([*TINY, "--holdout", "40"])
    C = wgan_gp.make_critic(args, 1)
    C.load_state_dict(torch.load("a/last.pt", weights_only=True)["nets"]["D"])
    held = wgan_gp.Batches(args, torch.device("cpu")).held[0]
    with torch.no_grad():
        torch.testing.assert_close(calls[0][0], C(held.float() / 127.5 - 1))
    assert len(calls[0][1]) == 40


@pytest.mark.parametrize("flags, named", [
    (["--reject", "drs"], "holdout"), (["--reject", "naive"], "metrics.py"), (["--holdout", "295"], "batch-size")])
def test_rejection_mistakes_are_one_line(flags, named, capsys):
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main([*TINY, "--steps", "5", *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and named in err and not Path("runs").exists()


def test_a_discriminator_of_no_use_is_one_line(monkeypatch, capsys):
    wgan_gp.main([*TINY, "--steps", "5", "--run-dir", "a", "--holdout", "40"])
    with_metrics(monkeypatch)
    import metrics

    def useless(real, fake):
        raise ValueError("AUC .4")

    monkeypatch.setattr(metrics, "platt", useless)
    with pytest.raises(SystemExit) as stop:
        wgan_gp.main(["--resume", "a/last.pt", "--generate", "6", "--reject", "drs", "--generate-to", "out"])
    assert stop.value.code == 2 and "AUC .4" in capsys.readouterr().err and not Path("out").exists()
