"""Folders of images: which files are read, what their pixels become, what is kept; and metrics.py's command on them."""

import gzip
import json
import os
import re
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prdc import compute_prdc

import metrics

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    """Where caches go that cannot lie beside the images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(metrics.tempfile, "tempdir", str(tmp_path / "user"))
    metrics.warn_once.cache_clear()
    return tmp_path / "user"


def paint(path, colour=RED, **save):
    """A file of one colour. Its size in bytes depends on the suffix, not on the colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, **save)
    return path


def paint_all(folder, n, suffix=".bmp"):
    """n files of n colours, in a few classes or none."""
    for i in range(n):
        paint(folder / f"{i:03}{suffix}", (i, 255 - i, 7))
    return folder


def load(folder, split="train", size=8):
    return metrics.load_data("folder", folder, size, split)


def paths(folder):
    return sorted(metrics.list_images(folder)[0])


def one_line(capsys, call):
    """The one line on stderr with which a call ends the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    out = capsys.readouterr()
    assert stop.value.code == 2 and out.err.count("\n") == 1 and "error: " in out.err, out.err
    return out.err


# which files


def test_a_link_into_its_own_parent_adds_nothing(tmp_path):
    paint_all(tmp_path / "set" / "a", 12)
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "set")
    assert paths(tmp_path / "set") == [f"a/{i:03}.bmp" for i in range(12)]


def test_a_link_to_a_folder_around_this_one_is_left_out_and_said(tmp_path, capsys):
    paint_all(tmp_path / "set", 12)
    paint_all(tmp_path / "not these", 5)
    (tmp_path / "set" / "up").symlink_to(tmp_path)
    x, _, _ = load(tmp_path / "set")
    assert len(x) == 11 and "link to a folder around this one (1)" in capsys.readouterr().err


def test_links_elsewhere_are_followed_and_every_file_counts_once(tmp_path):
    far = paint_all(tmp_path / "far", 3)
    near = paint_all(tmp_path / "set", 2)
    (near / "z").symlink_to(far)
    (near / "a").symlink_to(far)
    (near / "again.bmp").symlink_to(near / "000.bmp")
    os.link(near / "001.bmp", near / "zz.bmp")
    assert paths(near) == ["000.bmp", "001.bmp", "a/000.bmp", "a/001.bmp", "a/002.bmp"]


def test_pipes_sockets_and_dead_links_are_counted(tmp_path, capsys, monkeypatch):
    paint_all(tmp_path / "set", 3)
    os.mkfifo(tmp_path / "set" / "p.png")
    here = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path / "set")  # a socket's name is short
    here.bind("s.png")
    (tmp_path / "set" / "gone.png").symlink_to("nowhere")
    (tmp_path / "set" / "round.png").symlink_to("round.png")
    (tmp_path / "set" / "notes.txt").write_text("")
    (tmp_path / "set" / "folder.png").mkdir()
    (tmp_path / "set" / "._000.png").write_bytes(b"\0\5\26\7")
    x, _, _ = load(tmp_path / "set")
    err = capsys.readouterr().err
    here.close()
    assert len(x) == 2 and err.count("\n") == 1
    assert "2 images to train, 1 to test; left out: " in err
    assert all(part in err for part in ("pipe, socket or device (2)", "link to nothing (2)", ".txt (1)", "hidden (1)"))


def test_what_may_not_be_read_is_counted_under_its_own_name(tmp_path, monkeypatch):
    """A folder without the right to enter it names its files, and says nothing else of them."""
    paint_all(tmp_path / "a", 3)
    paint_all(tmp_path / "b", 2)
    paint_all(tmp_path / ".thumbnails", 9)
    scandir, stat = os.scandir, os.stat

    def listed(path):
        if metrics.Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    def known(path, *more, **named):
        if str(path).endswith("001.bmp"):
            raise PermissionError(13, "Permission denied")
        return stat(path, *more, **named)

    monkeypatch.setattr(os, "scandir", listed)
    monkeypatch.setattr(os, "stat", known)
    found, left_out = metrics.list_images(tmp_path)
    assert sorted(found) == ["a/000.bmp", "a/002.bmp"]
    assert left_out == {"folder that cannot be listed": 1, "file that cannot be examined": 1, "hidden": 1}


def test_a_name_that_a_terminal_would_obey_is_written_out(tmp_path, capsys):
    paint_all(tmp_path / "two\nlines", 12)
    paint_all(tmp_path / "red \x1b[31m", 12)
    assert load(tmp_path)[2] == ["red \x1b[31m", "two\nlines"]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "classes: red \\x1b[31m (12), two lines (10)" in err


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_folder_whose_name_no_disk_takes_is_one_line(capsys, tmp_path, name):
    assert "--data-dir" in one_line(capsys, lambda: load(tmp_path / name))


def test_a_folder_that_one_may_not_look_into_is_one_line(capsys, tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(metrics.Path, "is_dir", denied)
    assert "Permission denied" in one_line(capsys, lambda: load(tmp_path))


def test_every_suffix_that_pillow_opens(tmp_path, capsys):
    suffixes = ["png", "JPG", "jfif", "jpe", "ppm", "pgm", "jp2", "tga", "avif", "webp", "tiff", "bmp", "gif", "qoi"]
    suffixes = [s for s in suffixes if Image.registered_extensions().get(f".{s.lower()}") in Image.SAVE]
    for i, suffix in enumerate(suffixes):
        image = Image.new("L" if suffix == "pgm" else "RGB", (8, 8), 9 * i if suffix == "pgm" else (9 * i, 0, 0))
        image.save(tmp_path / f"{i}.{suffix}")
    (tmp_path / "x.heic").write_bytes(b"no plugin here")
    found, left_out = metrics.list_images(tmp_path)
    assert len(found) == len(suffixes) > 10 and dict(left_out) == {".heic": 1}
    assert len(load(tmp_path)[0]) + len(load(tmp_path, "test")[0]) == len(suffixes)
    assert ".heic (1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "train, test",
    [
        ("train", "test"),
        ("train", "val"),
        ("Train", "Test"),
        ("TRAIN", "valid"),
        ("train", "Validation"),
        ("training", "testing"),
    ],
)
def test_train_and_another_are_the_split(tmp_path, train, test):
    for part, n in ((train, 5), (test, 3)):
        for name in ("cat", "dog"):
            paint_all(tmp_path / part / name, n)
    _, y, names = load(tmp_path)
    assert names == ["cat", "dog"] and y.bincount().tolist() == [5, 5]
    assert load(tmp_path, "test")[1].bincount().tolist() == [3, 3]


def test_of_three_parts_test_is_for_testing_and_the_third_is_said(tmp_path, capsys):
    for part, n in (("train", 5), ("test", 3), ("val", 4)):
        paint_all(tmp_path / part, n)
    assert len(load(tmp_path)[0]) == 5 and len(load(tmp_path, "test")[0]) == 3
    assert "in folders beside train and test (4)" in capsys.readouterr().err


@pytest.mark.parametrize("above", ["train", "images", "archive/Train", "a/b"])
def test_a_folder_around_all_classes_is_no_class(tmp_path, above):
    for name in ("cat", "dog"):
        paint_all(tmp_path / above / name, 20)
    _, y, names = load(tmp_path)
    assert names == ["cat", "dog"] and len(y) == 36 and set(y.tolist()) == {0, 1}


def test_a_folder_around_train_and_test_is_the_split(tmp_path):
    paint_all(tmp_path / "unpacked" / "train", 5)
    paint_all(tmp_path / "unpacked" / "test", 2)
    x, y, names = load(tmp_path)
    assert len(x) == 5 and names == [] and set(y.tolist()) == {-1} and len(load(tmp_path, "test")[0]) == 2


def test_a_class_may_be_called_train(tmp_path):
    for name in ("car", "train"):
        paint_all(tmp_path / name, 10)
    assert load(tmp_path)[2] == ["car", "train"]


def test_one_sub_folder_is_one_class_but_train_is_none(tmp_path):
    paint_all(tmp_path / "one" / "cats", 10)
    paint_all(tmp_path / "two" / "train", 10)
    assert load(tmp_path / "one")[2] == ["cats"] and load(tmp_path / "two")[2] == []


def test_classes_and_counts_are_said_in_the_order_of_the_labels(tmp_path, capsys):
    for name, n in (("0", 11), ("10", 12), ("2", 13)):
        paint_all(tmp_path / "train" / name, n)
        paint_all(tmp_path / "test" / name, 2)
    _, y, names = load(tmp_path)
    load(tmp_path, "test")
    err = capsys.readouterr().err
    assert "36 images to train, 6 to test; classes: 0 (11), 10 (12), 2 (13)\n" in err and err.count("classes: ") == 1
    assert names == ["0", "10", "2"] and y.bincount().tolist() == [11, 12, 13]


def test_a_picture_beside_the_classes_is_named(tmp_path, capsys):
    """One of it and no picture has a label, so a conditional script refuses the folder. Nobody finds it by looking."""
    for name in ("cat", "dog"):
        paint_all(tmp_path / "train" / name, 20)
        paint_all(tmp_path / "test" / name, 2)
    paint(tmp_path / "train" / "cover.bmp")
    _, y, _ = load(tmp_path)
    err = capsys.readouterr().err
    assert y.min() == -1 and "; without a label, as in no sub-folder: 1, such as train/cover.bmp\n" in err, err


def test_many_classes_take_linear_time(tmp_path, monkeypatch):
    """names.index would take 90 million steps here."""
    found = {f"{i:05}/{j}.png": (1, 1) for i in range(10_000) for j in range(2)}
    x = {"train": torch.zeros(18_000, 3, 8, 8, dtype=torch.uint8), "test": torch.zeros(2000, 3, 8, 8).byte()}
    monkeypatch.setattr(metrics, "list_images", lambda root: (found, metrics.Counter()))
    monkeypatch.setattr(metrics, "read_images", lambda root, size, split, files: (x[split], np.arange(len(x[split]))))
    start = metrics.time.process_time()
    _, y, names = load(tmp_path)
    assert metrics.time.process_time() - start < 2 and len(names) == 10_000 and len(y) == 18_000
    assert [names[i] for i in y[:3]] == [p.split("/")[0] for p in metrics.split_images(found)[0]["train"][:3]]


def test_copies_of_training_images_among_the_test_images_are_said_each_time(tmp_path, capsys):
    paint_all(tmp_path / "train", 10)
    paint_all(tmp_path / "test", 4)
    paint(tmp_path / "test" / "new.bmp", (99, 99, 99))
    for _ in range(2):
        metrics.warn_once.cache_clear()
        load(tmp_path, "test")
        assert "4 of 5 test images are also training images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: None, "no such folder"),
        (lambda p: p.write_bytes(b"PK"), "unpack it"),
        (lambda p: p.mkdir(), "0 images"),
        (lambda p: paint(p / "one.png"), "1 images"),
        (lambda p: paint(p / "x.png").rename(p / "x.heic"), ".heic (1)"),
    ],
)
def test_a_folder_without_images_says_what_is_wrong(tmp_path, capsys, make, words):
    make(tmp_path / "set")
    assert words in one_line(capsys, lambda: load(tmp_path / "set"))
    assert list(tmp_path.glob("*.npz")) == []


# pixels


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "I;16"])
def test_a_folder_of_grey_pictures_has_one_channel(tmp_path, mode):
    levels = list(range(64, 244, 9))  # in 16 bits none without its highest two
    for level in levels:
        if mode == "I;16":
            picture = Image.fromarray(np.full((8, 8), 257 * level, np.uint16))
        else:
            picture = Image.new("L", (8, 8), level).convert(mode)
        picture.save(tmp_path / f"{level}.png")
    train, test = load(tmp_path)[0], load(tmp_path, "test")[0]
    assert train.shape == (18, 1, 8, 8) and test.shape == (2, 1, 8, 8)
    assert sorted([*train[:, 0, 7, 7].tolist(), *test[:, 0, 7, 7].tolist()]) == levels


@pytest.mark.parametrize("part", ["train", "test"])
def test_one_picture_in_colour_makes_a_folder_one_of_colours(tmp_path, part):
    for i in range(3):
        paint(tmp_path / f"train/{i}.png", (i, i, i))
        paint(tmp_path / f"test/{i}.png", (i, i, i))
    assert load(tmp_path)[0].shape[1] == load(tmp_path, "test")[0].shape[1] == 1
    paint(tmp_path / f"{part}/3.png", (5, 5, 6))
    assert load(tmp_path)[0].shape[1] == load(tmp_path, "test")[0].shape[1] == 3


def read(path, **more):
    return metrics.read_image(path, **more)[0].numpy()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_16(path, values, colour, *more):
    """A PNG of 16 bits a channel, which Pillow cannot write in colour."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_to_8(tmp_path, suffix):
    Image.fromarray(RAMP).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read(tmp_path / f"a.{suffix}", channels=1)[0], (RAMP / 257).round())


def test_white_may_be_zero(tmp_path):
    """PhotometricInterpretation 0 of TIFF: Pillow turns it with 8 bits, not with 16."""
    n = RAMP.size * 2
    tags = [(256, 8), (257, 8), (258, 16), (259, 1), (262, 0), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 8), (279, n)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    (tmp_path / "a.tif").write_bytes(head + RAMP.astype("<u2").tobytes())
    assert np.array_equal(read(tmp_path / "a.tif", channels=1)[0], ((65535 - RAMP.astype(int)) / 257).round())


def test_16_bits_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(RAMP).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png", channels=1)[0], np.rot90((RAMP / 257).round(), -1))


def test_what_is_transparent_in_16_bits_is_white(tmp_path):
    png_16(tmp_path / "a.png", RAMP[:, :, None], 0, chunk(b"tRNS", RAMP[2, 3:4].astype(">u2").tobytes()))
    wanted = (RAMP / 257).round()
    wanted[2, 3] = 255
    assert np.array_equal(read(tmp_path / "a.png"), [wanted] * 3)
    colours = np.stack([RAMP, RAMP // 2, RAMP // 3], 2)
    png_16(tmp_path / "b.png", colours, 2, chunk(b"tRNS", colours[4, 4].astype(">u2").tobytes()))
    wanted = colours.transpose(2, 0, 1) >> 8
    wanted[:, 4, 4] = 255
    assert np.array_equal(read(tmp_path / "b.png"), wanted)


def narrow(bits):
    return (RAMP.astype(int) >> (16 - bits)).astype(np.uint16)


@pytest.mark.parametrize(
    "name, image",
    [
        ("float.tif", Image.fromarray(RAMP.astype(np.float32) / 65535)),
        ("float 255.tif", Image.fromarray(RAMP.astype(np.float32) / 257)),
        ("int32.tif", Image.fromarray(RAMP.astype(np.int32))),
        ("10.png", Image.fromarray(narrow(10))),
        ("12.png", Image.fromarray(narrow(12))),
        ("12.tif", Image.fromarray(narrow(12))),
        ("14.png", Image.fromarray(narrow(14))),
    ],
)
def test_numbers_without_a_clear_scale_are_left_out_and_counted(tmp_path, capsys, name, image):
    image.save(tmp_path / name)
    with pytest.raises(ValueError, match="no clear scale"):
        read(tmp_path / name)
    for i in range(20):
        paint(tmp_path / f"{i} fine.png", (i, i, i))
    xs = [load(tmp_path, split)[0] for split in ("train", "test")]
    assert sum(map(len, xs)) == 20 and "left out 1 of " in capsys.readouterr().err


def test_12_bits_of_colour_in_16_have_no_clear_scale(tmp_path):
    colours = np.stack([RAMP, RAMP, RAMP], 2)
    png_16(tmp_path / "16.png", colours, 2)
    png_16(tmp_path / "12.png", colours >> 4, 2)
    assert np.array_equal(read(tmp_path / "16.png")[0], RAMP >> 8)
    with pytest.raises(ValueError, match="no clear scale"):
        read(tmp_path / "12.png")


def test_a_large_jpeg_is_decoded_small_and_a_small_one_as_ever(tmp_path):
    """48 megapixels took over a second each and 300 MB."""
    rng = np.random.RandomState(0)
    image = Image.fromarray(rng.randint(0, 256, (6, 8, 3), np.uint8)).resize((4000, 3000), Image.Resampling.BICUBIC)
    image.save(tmp_path / "large.jpg", quality=90)
    sizes = []
    fit = metrics.ImageOps.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.ImageOps, "fit", lambda image, *more: sizes.append(image.size) or fit(image, *more))
        small = read(tmp_path / "large.jpg", size=64)
    with Image.open(tmp_path / "large.jpg") as whole:
        wanted = np.array(fit(whole, (64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert sizes == [(500, 375)] and np.abs(small.astype(int) - wanted).max() <= 4
    image.resize((200, 150)).save(tmp_path / "small.jpg")
    with Image.open(tmp_path / "small.jpg") as whole:
        wanted = np.array(fit(whole, (64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(read(tmp_path / "small.jpg", size=64), wanted)


def test_few_images_are_held_in_full_at_a_time(tmp_path, monkeypatch):
    """As many as there are threads, and these are eight at most."""
    open_now, most = set(), []

    def slow(path, size):
        open_now.add(path)
        most.append(len(open_now))
        metrics.time.sleep(0.005)
        open_now.discard(path)
        return torch.zeros(3, size, size, dtype=torch.uint8), "PNG"

    monkeypatch.setattr(metrics, "read_image", slow)
    monkeypatch.setattr(metrics.os, "cpu_count", lambda: 64)
    paint_all(tmp_path, 100)
    load(tmp_path)
    assert 2 <= max(most) <= 8


# what is kept


def test_the_cache_lies_beside_the_folder_and_the_old_one_goes(tmp_path):
    folder = paint_all(tmp_path / "data" / "my [set]", 12)
    (tmp_path / "data" / "my [set]-8-train-notes.npz").write_text("mine")
    for i in range(3):
        paint(folder / f"new {i}.bmp", (9, 9, i))
        load(folder), load(folder, "test")
    assert len(list((tmp_path / "data").glob("*.npz"))) == 3  # with the user's own
    assert {path.suffix for path in folder.iterdir()} == {".bmp"} and not (tmp_path / "user").exists()
    load(folder, size=16)
    assert len(list((tmp_path / "data").glob("*.npz"))) == 4  # another size is no older one


def test_a_part_of_a_cache_that_a_kill_left_goes_with_the_next(tmp_path):
    """Its name has the number of the process, so each kill left another; one of today may still be written."""
    folder = paint_all(tmp_path / "set", 12)
    old, new = (tmp_path / f"set-8-train-0123456789ab.npz.{number}.tmp" for number in (123, 456))
    for path in (old, new):
        path.write_bytes(b"PK")
    os.utime(old, (1, 1))
    load(folder)
    assert not old.exists() and new.exists() and len(list(tmp_path.glob("*.npz"))) == 1


def test_many_images_are_announced_before_they_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "read_image", lambda path, size: (torch.zeros(3, size, size).byte(), "PNG"))
    for n in (1999, 2000):
        files = {"train": [(f"{i}.png", 1, 1) for i in range(n)], "test": []}
        assert len(metrics.read_images(tmp_path / f"set {n}", 1, "train", files)[0]) == n
        line = f"reading {n} train images of {tmp_path / f'set {n}'}, once: what becomes of them is kept\n"
        assert capsys.readouterr().err == (line if n == 2000 else "")


def test_a_cache_serves_until_a_file_changes(tmp_path, monkeypatch):
    folder = paint_all(tmp_path / "set", 12)
    first = load(folder)
    monkeypatch.setattr(metrics.Image, "open", lambda *a: pytest.fail("decoded again"))
    again = load(folder)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    monkeypatch.undo()
    path = folder / metrics.split_images(paths(folder))[0]["train"][3]
    paint(path, (50, 60, 70))
    os.utime(path, (1, 1))
    assert load(folder)[0][3, :, 0, 0].tolist() == [50, 60, 70]


@pytest.mark.parametrize("content", [b"", b"PK\3\4 cut", b"no archive"])
def test_a_damaged_cache_is_made_again(tmp_path, content):
    folder = paint_all(tmp_path / "set", 12)
    x = load(folder)[0]
    [cache] = tmp_path.glob("*.npz")
    cache.write_bytes(content)
    assert torch.equal(load(folder)[0], x) and cache.stat().st_size > 1000


def test_without_a_place_beside_it_the_cache_is_in_the_users_folder(tmp_path, monkeypatch, user_folder, capsys):
    folder = paint_all(tmp_path / "set", 12)
    replace_file = metrics.replace_file

    def read_only(path, *more):
        if path.parent == tmp_path:
            raise PermissionError(13, "read-only")
        replace_file(path, *more)

    monkeypatch.setattr(metrics, "replace_file", read_only)
    x = load(folder)[0]
    assert not list(tmp_path.glob("*.npz")) and len(list(user_folder.rglob("*.npz"))) == 1
    monkeypatch.setattr(metrics.Image, "open", lambda *a: pytest.fail("decoded again"))
    assert torch.equal(load(folder)[0], x) and "not kept" not in capsys.readouterr().err


def test_a_network_is_kept_in_the_users_folder_where_the_datas_cannot_be_written(
    tmp_path, monkeypatch, user_folder, untrained
):
    """As on Kaggle, where it was trained anew each time."""
    replace_file = metrics.replace_file

    def read_only(path, *more):
        if path.parent == tmp_path / "input":
            raise OSError(30, "Read-only file system")
        replace_file(path, *more)

    monkeypatch.setattr(metrics, "replace_file", read_only)
    train, test = (noise(60, 0), torch.arange(60) % 3), (noise(40, 1), torch.arange(40) % 3)
    said = []
    for _ in range(2):
        metrics.classifier("folder", train, test, tmp_path / "input", say=said.append)
    assert len(untrained) == 1 and len(list(user_folder.rglob("classifier-folder-*.pt"))) == 1
    assert not any("not kept" in line for line in said)


@pytest.mark.parametrize("lacks", ["home", "temporary"])
def test_a_machine_without_a_home_or_a_temporary_folder_has_one_place_less(tmp_path, monkeypatch, lacks):
    """In a container under a number without a name "~" stays "~": a folder of that name appeared."""
    if lacks == "home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(metrics.os.path, "expanduser", str)
        rest = metrics.tempfile.gettempdir()
    else:

        def none():
            raise FileNotFoundError(2, "No usable temporary directory found")

        monkeypatch.setattr(metrics.tempfile, "gettempdir", none)
        rest = os.environ["XDG_CACHE_HOME"]
    first, second = metrics.cache_folders(tmp_path / "a")
    assert first == tmp_path / "a" and str(second.parent) == rest


def test_what_cannot_be_kept_anywhere_costs_a_line(tmp_path, monkeypatch, capsys):
    folder = paint_all(tmp_path / "set", 12)

    def full(path, write, apart=""):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics, "replace_file", full)
    assert len(load(folder)[0]) == 11 and len(load(folder)[0]) == 11
    assert capsys.readouterr().err.count("not kept for the next run") == 1


# MNIST as it is often unpacked


@pytest.mark.parametrize("place", ["MNIST/raw", "MNIST"])
@pytest.mark.parametrize(
    "form", ["{}-{}-idx{}-ubyte", "{}-{}.idx{}-ubyte", "{}-{}-idx{}-ubyte.gz", "{}-{}.idx{}-ubyte.gz"]
)
def test_mnist_under_other_names(tmp_path, monkeypatch, form, place):
    monkeypatch.setattr(metrics.torchvision.datasets, "MNIST", type("MNIST", (), {"classes": list("0123456789")}))
    rng = np.random.RandomState(0)
    (tmp_path / place).mkdir(parents=True)
    made = {}
    for part, n in (("train", 30), ("t10k", 20)):
        x, y = made[part] = rng.randint(0, 256, (n, 28, 28), np.uint8), rng.randint(0, 10, n).astype(np.uint8)
        for name, array in (("images", x), ("labels", y)):
            path = tmp_path / place / form.format(part, name, array.ndim)
            data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    for part, split in (("train", "train"), ("t10k", "test")):
        x, y, names = metrics.load_data("mnist", tmp_path, 28, split)
        assert np.array_equal(x[:, 0], made[part][0]) and np.array_equal(y, made[part][1]) and len(names) == 10


def test_a_download_cut_short_is_fetched_again(tmp_path, monkeypatch):
    """torchvision writes the .gz where it will stay; only it compares the MD5 sum."""
    asked = []

    class MNIST:
        classes = tuple("0123456789")
        data = np.zeros((3, 28, 28), np.uint8)
        targets = (1, 2, 3)

        def __init__(self, root, **flags):
            asked.append(flags)

    monkeypatch.setattr(metrics.torchvision.datasets, "MNIST", MNIST)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    whole = gzip.compress(bytes([0, 0, 8, 3]) + np.array((9, 28, 28), ">i4").tobytes() + bytes(9 * 784))
    for cut in (whole[: len(whole) // 2], whole[:12], whole[:-20] + bytes(20)):
        (raw / "train-images-idx3-ubyte.gz").write_bytes(cut)
        assert metrics.load_data("mnist", tmp_path, 28, "train")[1].tolist() == [1, 2, 3]
    assert asked == 3 * [{"download": True, "train": True}]


# the command and the library


@pytest.fixture
def untrained(monkeypatch):
    """Networks with drawn weights. Returns the images that they were asked to train on."""
    asked = []

    def train_classifier(x, y, classes, device, epochs, say):
        asked.append(x)
        torch.manual_seed(3)
        return metrics.Classifier(x.shape[1], classes).half().float().eval()

    def train_rotation_net(x, device, epochs, say):
        asked.append(x)
        torch.manual_seed(3)
        return metrics.RotationNet(*x.shape[1:3]).half().float().eval()

    monkeypatch.setattr(metrics, "train_classifier", train_classifier)
    monkeypatch.setattr(metrics, "train_rotation_net", train_rotation_net)
    return asked


def command(capsys, *argv):
    capsys.readouterr()
    metrics.main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


def noise(n, seed, channels=3, size=8):
    return torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def test_one_set_of_images_in_every_form_scores_alike(tmp_path, capsys, untrained):
    x = noise(60, 0)
    for i, image in enumerate(x):
        path = tmp_path / "nested" / str(i % 3) / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        metrics.save_sheet(image[None], path)
    order = [int(path[2:4]) for path in paths(tmp_path / "nested")]
    x = x[order]
    last = x.permute(0, 2, 3, 1).contiguous()
    np.save(tmp_path / "a.npy", last.numpy())
    np.savez(tmp_path / "b.npz", images=x.numpy(), labels=np.arange(60))
    np.savez_compressed(tmp_path / "c.NPZ", last.numpy())
    (tmp_path / "c.NPZ.npz").rename(tmp_path / "c.NPZ")
    torch.save(x, tmp_path / "d.pt")
    torch.save(last, tmp_path / "e.pth")
    torch.save(noise(60, 1), tmp_path / "real.pt")
    flags = ["--real", tmp_path / "real.pt", "--data-dir", tmp_path, "--fake"]
    names = ("nested", "a.npy", "b.npz", "c.NPZ", "d.pt", "e.pth")
    scores = [command(capsys, *flags, tmp_path / name) for name in names]
    for other in scores[1:]:
        assert other == scores[0]
    assert scores[0]["n_fake"] == 60


def test_fakes_of_a_grey_folder_are_scored_by_a_network_of_one_channel(tmp_path, capsys, untrained):
    for split, x in (("train", noise(60, 0, 1)), ("test", noise(60, 1, 1))):
        for i, image in enumerate(x):
            (tmp_path / "photos" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(tmp_path / f"photos/{split}/{i:02}.png")
    flags = ["--real", "folder", "--data-dir", tmp_path / "photos", "--fake"]
    same = command(capsys, *flags, tmp_path / "photos/test")
    assert [x.shape[1] for x in untrained] == [1]
    assert same["fid"] < 1e-6 and same["coverage"] == 1
    np.save(tmp_path / "other.npy", noise(60, 1, 1)[:, 0].numpy() // 2)
    assert command(capsys, *flags, tmp_path / "other.npy")["fid"] > 1e-3
    np.save(tmp_path / "colour.npy", noise(60, 2).numpy())
    assert "(60, 3, 8, 8)" in one_line(capsys, lambda: metrics.main([*map(str, flags), str(tmp_path / "colour.npy")]))


def test_grey_fakes_in_three_equal_channels_are_taken(tmp_path):
    x = noise(4, 0, 1)
    assert torch.equal(next(metrics.Images(x.expand(-1, 3, -1, -1), 1).batches(4)), x)
    with pytest.raises(ValueError, match="3, 8, 8"):
        metrics.Images(noise(4, 0), 1)


def test_colours_held_against_grey_images_are_left_out_with_a_line(tmp_path, capsys):
    """A sheet saved in three equal channels is grey, and so is a folder of which only the pixel values differ."""
    (tmp_path / "grey").mkdir()
    (tmp_path / "colour").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (9 * i,) * 3).save(tmp_path / "grey" / f"{i}.png")
        Image.new("RGB", (8, 8), (9 * i, 0, 99)).save(tmp_path / "colour" / f"{i}.png")
    metrics.Images(tmp_path / "grey", 1)
    metrics.Images(tmp_path / "colour", 3)
    assert capsys.readouterr().err == ""
    metrics.Images(tmp_path / "colour", 1)
    assert f"the images of {tmp_path / 'colour'} have colours, which are left out" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--real", "--classifier"])
def test_the_data_set_folder_needs_its_folder(tmp_path, capsys, monkeypatch, flag):
    """Without it that would be all pictures below ./data."""
    monkeypatch.chdir(tmp_path)  # where there are none, should this fail
    torch.save(noise(4, 0), tmp_path / "x.pt")
    argv = ["--fake", str(tmp_path / "x.pt"), "--real", str(tmp_path / "x.pt"), flag, "folder"]
    assert "needs --data-dir" in one_line(capsys, lambda: metrics.main(argv))


def test_fakes_of_two_sizes_have_no_mean(tmp_path, capsys, untrained, monkeypatch):
    monkeypatch.setattr(
        metrics, "load_data", lambda name, folder, size, split: (noise(60, 1, 3, size), torch.zeros(60), [])
    )
    for side in (8, 16):
        torch.save(noise(60, 0, 3, side), tmp_path / f"{side}.pt")
    argv = ["--real", "cifar10", "--data-dir", tmp_path, "--fake", tmp_path / "8.pt", tmp_path / "16.pt"]
    with pytest.raises(SystemExit):
        metrics.main([*map(str, argv)])
    out, err = capsys.readouterr()
    assert "error: the sets of fakes are scored by different networks" in err and "mean and standard" not in out


def test_a_tensor_of_a_gpu_is_read_on_the_cpu(tmp_path, monkeypatch):
    torch.save(noise(3, 0), tmp_path / "x.pt")
    where = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **more: where.append(more["map_location"]) or load(path, **more))
    assert len(metrics.Images(tmp_path / "x.pt", 3)) == 3 and where == ["cpu"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.png", b"\x89PNG", "a folder of images"),
        ("x.zip", b"PK", "a folder of images"),
        ("nowhere", None, "not there"),
        ("x.npz", b"PK", "x.npz"),
    ],
)
def test_what_is_no_set_of_images_is_one_line(tmp_path, capsys, name, content, words):
    if content:
        (tmp_path / name).write_bytes(content)
    argv = ["--real", str(tmp_path / name), "--fake", str(tmp_path / name)]
    assert words in one_line(capsys, lambda: metrics.main(argv))


@pytest.mark.parametrize("n", ["0", "-3", "1.5"])
def test_a_number_of_images_that_is_none_is_one_line(tmp_path, capsys, n):
    argv = ["--real", str(tmp_path), "--fake", str(tmp_path), "--n", n]
    assert f"argument --n: {n} is not " in one_line(capsys, lambda: metrics.main(argv))


def test_a_sparse_tensor_and_a_number_with_an_exponent_are_taken(tmp_path, capsys, untrained):
    x = noise(60, 0) * (noise(60, 1) > 99)
    torch.save(x, tmp_path / "x.pt")
    torch.save(x.to_sparse(), tmp_path / "sparse.pt")
    torch.save(noise(60, 2), tmp_path / "real.pt")
    flags = ["--real", tmp_path / "real.pt", "--data-dir", tmp_path, "--n", "1e3", "--fake"]
    assert command(capsys, *flags, tmp_path / "sparse.pt") == command(capsys, *flags, tmp_path / "x.pt")


def test_arrays_of_numpy_are_features_too():
    rng = np.random.RandomState(0)
    a, b = rng.randn(90, 5), rng.randn(80, 5).astype(np.float32)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    assert metrics.fid(a, b) == metrics.fid(x, y) and metrics.kid(a, b) == metrics.kid(x, y)
    assert metrics.coverage(a, b) == metrics.coverage(x, y)
    assert metrics.density_coverage(a, b) == metrics.density_coverage(x, y)
    assert metrics.precision_recall(a, b) == metrics.precision_recall(x, y)
    assert metrics.inception_score(a) == metrics.inception_score(x)
    with pytest.raises(ValueError, match="tables"):
        metrics.fid(a, rng.randn(80, 6))


@pytest.mark.parametrize("score", [metrics.fid, metrics.kid, metrics.coverage, metrics.precision_recall])
@pytest.mark.parametrize("size", [1e80, 1e150, 1e300])
def test_features_too_large_to_square_have_no_score(score, size):
    x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="not finite, or"):
        score(x, x * size)


def test_large_features_that_can_be_scored_are():
    x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for few in (x, x[:3]):
        assert metrics.fid(few * 1e30, few * 3e30) == pytest.approx(metrics.fid(few, few * 3) * 1e60, rel=1e-6)


# whose floor, whose accuracy


def stand_in(monkeypatch, sets):
    """{name: {split: (images, labels)}} in place of the data sets."""
    monkeypatch.setattr(metrics, "load_data", lambda name, folder, size, split: (*sets[name][split], []))


def test_the_floor_and_the_training_fid_are_of_the_real_sides_own(tmp_path, capsys, monkeypatch, untrained):
    """--classifier names the network alone. They were of its data set."""
    labels = torch.arange(80) % 10
    dark = {s: (noise(80, i, 1, 28) // 4, labels) for i, s in enumerate(("train", "test"))}
    light = {s: (255 - noise(80, 9 + i, 1, 28) // 4, labels) for i, s in enumerate(("train", "test"))}
    stand_in(monkeypatch, {"digits": dark, "mnist": light})
    torch.save(dark["train"][0], tmp_path / "x.pt")
    flags = ["--classifier", "digits", "--data-dir", tmp_path, "--fake", tmp_path / "x.pt", "--real"]
    own, other = (command(capsys, *flags, name) for name in ("digits", "mnist"))
    net = metrics.classifier("digits", dark["train"], dark["test"], say=str)
    train, test, far = (metrics.embed(net, x).moments for x in (light["train"][0], light["test"][0], dark["train"][0]))
    assert own["fid_train"] < 1e-9 < own["floor"]
    assert other["floor"] == pytest.approx(train.fid(test), rel=1e-3)
    assert other["fid_train"] == pytest.approx(far.fid(train), rel=1e-3)
    real, others = (net.embed(light[split][0])[0].double().numpy() for split in ("test", "train"))
    for names, k in ((("precision", "recall"), 3), (("density", "coverage"), 5)):
        of_real = compute_prdc(real, others, k)
        assert [other[f"{name}_real"] for name in names] == pytest.approx([of_real[name] for name in names], abs=0.02)
    torch.save(light["test"][0], tmp_path / "real.pt")
    filed = command(capsys, *flags, tmp_path / "real.pt")
    assert "fid_train" not in filed and filed["floor"] > 0 and filed["floor_n"] == 40


def test_a_folder_of_many_is_scored_on_those_that_its_network_has_not_seen(tmp_path, capsys, untrained):
    real = noise(2000, 0, 3, 4)
    torch.save(real, tmp_path / "real.pt")
    torch.save(noise(1200, 1, 3, 4), tmp_path / "fake.pt")
    flags = ["--real", tmp_path / "real.pt", "--fake", tmp_path / "fake.pt", "--data-dir", tmp_path]
    s = command(capsys, *flags, "--scores", "fid")
    [seen] = untrained
    assert s["n_real"] == s["floor_n"] == len(seen) == 1000
    known = {image.numpy().tobytes() for image in seen}
    unseen = torch.stack([image for image in real if image.numpy().tobytes() not in known])
    torch.manual_seed(3)
    net = metrics.RotationNet(3, 4).half().float().eval()
    scored, others, fake = (
        metrics.embed(net, x).moments for x in (unseen, seen, metrics.some(noise(1200, 1, 3, 4), 1000))
    )
    assert s["fid"] == pytest.approx(fake.fid(scored)) and s["floor"] == pytest.approx(others.fid(scored))


def test_a_folder_of_few_has_a_floor_too_and_a_warning(tmp_path, capsys, untrained):
    torch.save(noise(101, 0), tmp_path / "real.pt")
    torch.save(noise(70, 1), tmp_path / "fake.pt")
    s = command(capsys, "--real", tmp_path / "real.pt", "--fake", tmp_path / "fake.pt", "--data-dir", tmp_path)
    assert s["n_real"] == 70 and s["floor"] > 0 and s["floor_n"] == 50 and "fid_train" not in s
    metrics.main(
        ["--real", str(tmp_path / "real.pt"), "--fake", str(tmp_path / "fake.pt"), "--data-dir", str(tmp_path)]
    )
    out = capsys.readouterr()
    assert "the network knows most of" in out.err and "n 50" in out.out


def test_the_accuracy_is_of_the_test_set_that_is_there(tmp_path, monkeypatch):
    """A kept network once printed that of another: labels shifted by one, and still 100 % right."""
    x, y = metrics.render_digits(200, 1)
    test = metrics.render_digits(100, 2)
    key = metrics.image_key(x, y)
    shipped = torch.load(metrics.JUDGES / "digits.pt", weights_only=True)
    torch.save({**shipped, "pictures": [key]}, tmp_path / f"classifier-d-32-{key}.pt")
    monkeypatch.setattr(metrics, "train_classifier", lambda *a: pytest.fail("trained"))
    for labels, right in ((test[1], 1.0), ((test[1] + 1) % 10, 0.0), (test[1], 1.0)):
        said = []
        net = metrics.classifier("d", (x, y), (test[0], labels), tmp_path, say=said.append)
        assert net.accuracy == right and f"{right:.2%}" in said[-1]
    assert len(list(tmp_path.iterdir())) == 1


def test_two_test_sets_share_one_kept_network(tmp_path, untrained):
    train = noise(60, 0), torch.arange(60) % 3
    for seed in (1, 2, 1):
        metrics.classifier("d", train, (noise(40, seed), torch.arange(40) % 3), tmp_path, say=str)
    assert len(untrained) == 1 and len(list(tmp_path.iterdir())) == 1


def test_equal_images_have_axes_that_half_precision_holds():
    net = metrics.RotationNet(1, 32).eval()
    net.find_axes(torch.zeros(64, 1, 32, 32, dtype=torch.uint8))
    assert net.axes.half().isfinite().all() and net.embed(torch.zeros(2, 1, 32, 32).byte())[0].isfinite().all()


def test_rendering_the_default_digits_takes_little_memory():
    """The 20,000 images are 16 MB. All at once in float64 they took a gigabyte on their way."""
    code = "import resource, metrics; a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
    code += "metrics.render_digits(20_000, 1); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a)"
    kilobytes = int(
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(metrics.__file__).parent, capture_output=True, check=True
        ).stdout
    )
    if sys.platform == "darwin":
        kilobytes //= 1024
    assert kilobytes < 400_000


@pytest.mark.parametrize("data", [b"", b"\x1f", b"\x1f\x8b", b"\x00\x00\x08", gzip.compress(b"", mtime=0)])
def test_mnist_files_cut_short_within_their_header_count_as_missing(tmp_path, data):
    """torchvision then downloads them again."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(data)
    assert metrics.unpacked_mnist(raw, train=True) is None


# what users of other collections met


def test_drives_that_number_no_file(tmp_path, monkeypatch):
    """sshfs on Windows and some WebDAV drives give every file and folder the number 0: all looked like one file."""
    paint_all(tmp_path / "a", 3)
    paint_all(tmp_path / "b", 2)
    (tmp_path / "link.bmp").symlink_to(tmp_path / "a" / "000.bmp")
    (tmp_path / "around").symlink_to(tmp_path)
    found = paths(tmp_path)
    numbered = os.stat

    def unnumbered(path, *a, **k):
        facts = numbered(path, *a, **k)
        return os.stat_result([facts.st_mode, 0, *facts[2:]])

    monkeypatch.setattr(os, "stat", unnumbered)
    assert paths(tmp_path) == found == ["a/000.bmp", "a/001.bmp", "a/002.bmp", "b/000.bmp", "b/001.bmp"]


def test_a_run_within_the_pictures_is_no_picture(tmp_path):
    """--run-dir photos/run: a resume would train on the run's own sheets and curves."""
    paint_all(tmp_path / "photos", 3)
    paint_all(tmp_path / "photos" / "run" / "samples", 2, ".png")
    paint(tmp_path / "photos" / "run" / "curves.png")
    (tmp_path / "photos" / "run" / "args.json").write_text("{}")
    images, left_out = metrics.list_images(tmp_path / "photos")
    assert sorted(images) == ["000.bmp", "001.bmp", "002.bmp"] and left_out == {"folder of a run": 1}
    assert len(paths(tmp_path / "photos" / "run")) == 3  # who names it by --data-dir wants it


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_a_picture_with_a_damaged_description_is_read_as_it_lies(tmp_path, suffix):
    """Its EXIF block has no TIFF header. Pillow opens the picture, and fails to turn it."""
    path = tmp_path / f"x{suffix}"
    Image.new("RGB", (8, 8), RED).save(path, exif=b"\x00\x08\x00\x02\x01\x12\x00\x03abcdef", lossless=True)
    x, _ = metrics.read_image(path)
    assert x.shape == (3, 8, 8) and x[:, 0, 0].tolist() == list(RED)


def test_a_damaged_file_of_mnist_is_named(tmp_path):
    """Not gzipped, and with fewer pictures than its header says."""
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (9, 28, 28))
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(header + bytes(8 * 28 * 28))
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged: cannot reshape")):
        metrics.unpacked_mnist(tmp_path, train=True)
