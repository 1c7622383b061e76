"""What Windows, a Mac and several GPUs ask for, as far as a CPU under Linux can show it."""

import os
import shutil
import signal
import types

import pytest
import torch
from conftest import TINY, checkpoint
from test_disk import one_line

import metrics
import toy2d
import wgan_gp


@pytest.mark.parametrize(
    "device, wanted", [("cpu", torch.channels_last), ("cuda", torch.channels_last), ("mps", torch.contiguous_format)]
)
def test_networks_on_a_macs_gpu_keep_pytorchs_order(device, wanted):
    """In channels_last PyTorch 2.11 to 2.13 gets batch norm's gradients wrong there: its issue 175189."""
    asked = {}
    net = types.SimpleNamespace(to=lambda where, **order: asked.update(order, device=where))
    wgan_gp.placed(net, torch.device(device))
    assert asked == {"device": torch.device(device), "memory_format": wanted}


def test_weights_are_channels_last(w):
    """Row-major strides of (8, 8, 4, 4) would end in 4, 1."""
    net = w.module.placed(torch.nn.Conv2d(8, 8, 4), torch.device("cpu"))
    assert net.weight.stride() == (128, 1, 32, 8)


@pytest.mark.parametrize("cuda, mps, wanted", [(True, True, "cuda"), (False, True, "cpu"), (False, False, "cpu")])
def test_auto_takes_no_device_that_the_scripts_never_ran_on(w, cuda, mps, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert w.parse_args([*TINY, "--device", "auto"]).device == wanted
    if mps and not cuda:
        assert w.parse_args([*TINY, "--device", "mps"]).device == "mps"


def test_too_little_memory_of_a_macs_gpu_is_one_line(w, monkeypatch, capsys):
    def train(args):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GiB).\nMore lines.")

    monkeypatch.setattr(w.module, "train", train)
    assert "too little memory" in one_line(capsys, lambda: w.main([*TINY]))


@pytest.fixture
def two_ranks(monkeypatch):
    """WORLD is 2; the list says what was called of torch.distributed."""
    calls = []
    monkeypatch.setattr(metrics, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("destroy"))
    return calls


def test_a_rank_that_fails_alone_does_not_wait_for_the_others(w, two_ranks, monkeypatch):
    """With NCCL destroy_process_group() would wait for them, and they for this rank: torchrun would never end."""
    monkeypatch.setattr(w.module, "train", lambda args: None)
    w.main([*TINY])
    assert two_ranks == ["destroy"]

    for error in (SystemExit(2), RuntimeError("of the code"), KeyboardInterrupt()):

        def train(args, error=error):
            raise error

        monkeypatch.setattr(w.module, "train", train)
        with pytest.raises((SystemExit, RuntimeError)):
            w.main([*TINY])
    assert two_ranks == ["destroy"]


def test_ranks_leave_together_after_a_signal(two_ranks, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(metrics, "from_rank_0", lambda value=None: value)
    stop = metrics.Stop()
    stop.catch(signal.SIGTERM, None)
    with pytest.raises(SystemExit):
        stop.leave_if_set(5, types.SimpleNamespace(folder=tmp_path))
    assert two_ranks == ["destroy"]


@pytest.fixture
def busy(monkeypatch):
    """os.replace() that refuses as often as the list has entries, as Windows does while a scanner reads the file."""
    refusals = []
    waits = []
    replace = os.replace

    def busy_replace(*paths):
        if refusals:
            raise refusals.pop()
        replace(*paths)

    monkeypatch.setattr(os, "replace", busy_replace)
    monkeypatch.setattr(metrics.time, "sleep", waits.append)
    return refusals, waits


def test_windows_tries_again_where_a_scanner_holds_the_file(tmp_path, busy, monkeypatch):
    refusals, waits = busy
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(metrics, "WINDOWS", True)
    refusals += [PermissionError(13, "in use")] * 3
    metrics.replace_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and len(waits) == 3 and sum(waits) < 2

    refusals += [PermissionError(13, "in use")] * 4
    with pytest.raises(PermissionError):
        metrics.replace_file(path, lambda file: file.write(b"newer"))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["last.pt"]


def test_elsewhere_a_refusal_is_one_at_once(tmp_path, busy):
    refusals, waits = busy
    refusals.append(PermissionError(13, "read only"))
    with pytest.raises(PermissionError):
        metrics.replace_file(tmp_path / "last.pt", lambda file: file.write(b"new"))
    assert waits == []


@pytest.mark.parametrize("name", [".DS_Store", "desktop.ini", "Thumbs.db"])
def test_a_folder_with_only_a_file_managers_notes_is_empty(name, tmp_path, capsys):
    (tmp_path / name).touch()
    assert metrics.contents(tmp_path) == metrics.contents(tmp_path / "none") == []
    (tmp_path / "mine.txt").touch()
    assert metrics.contents(tmp_path) == [tmp_path / "mine.txt"]
    line = one_line(capsys, lambda: toy2d.main(["--run-dir", str(tmp_path), "--steps", "1"]))
    assert "is in use" in line


def test_a_run_starts_in_a_folder_that_finder_has_opened(w, small, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".DS_Store").touch()
    w.main([*w.tiny, "--steps", "2", "--run-dir", str(folder)])
    assert (folder / "last.pt").exists()
    copied = tmp_path / "copied"  # a checkpoint alone in a folder may go on there
    copied.mkdir()
    (copied / ".DS_Store").touch()
    shutil.copy(folder / "last.pt", copied)
    w.main(["--resume", str(copied / "last.pt"), "--steps", "4"])
    assert checkpoint(copied / "last.pt")["step"] == 4


def test_ctrl_break_of_windows_saves_too(monkeypatch):
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    stop = metrics.Stop()
    try:
        assert signal.getsignal(signal.SIGUSR1) == stop.catch
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.is_set()
    finally:
        stop.put_back()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_images_below_a_folder_that_may_not_be_asked_about(tmp_path, monkeypatch):
    """The root of a network drive may refuse os.stat()."""
    metrics.save_sheet(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), tmp_path / "a.png")
    stat = os.stat

    def refuses(path, **more):
        if str(path) == "/":
            raise PermissionError(5, "Access is denied")
        return stat(path, **more)

    monkeypatch.setattr(os, "stat", refuses)
    assert list(metrics.list_images(tmp_path)[0]) == ["a.png"]


def test_the_nearest_training_image_is_found_in_float32(tmp_path, monkeypatch):
    """cdist multiplies matrices: under TF32, which training allows on CUDA, distances would be off by some per cent."""
    seen = []
    cdist = torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda *a: seen.append(torch.get_float32_matmul_precision()) or cdist(*a))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    x = torch.zeros(16, 1, 8, 8, dtype=torch.uint8)
    try:
        metrics.reconstruction_figures(
            tmp_path,
            lambda split: (x, None, []),
            lambda x: torch.zeros(len(x), 2),
            lambda z: x[:1].repeat(len(z), 1, 1, 1),
            x,
        )
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]
