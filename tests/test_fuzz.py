"""The command line on good, odd and broken input: a right score, or one line and exit code 2; never a traceback."""

import csv
import io
import json
import math
import os
import random
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import metrics

NAMES = ["a", "b c", "ü", "数字", "x'y", "c.d", "%s", "-", "UP"]


def encode(x, kind):
    """A picture x, uint8 (S, S) or (S, S, 3), as the bytes of a file: all kinds hold the same picture, but for JPEG.
    What is see-through is where x is white; a second frame is not looked at."""
    rgb = Image.fromarray(x).convert("RGB")
    grey = rgb.getchannel(0)
    save = {}
    if kind == "P":  # a palette out of order
        im = Image.new("P", grey.size)
        im.putdata([255 - v for v in np.asarray(grey).flatten().tolist()])
        im.putpalette([v for i in range(256) for v in (255 - i,) * 3])
        if np.asarray(rgb).std(2).max() > 0:
            im = rgb
    elif kind == "P, opaque":
        im = grey.convert("P")
        save["transparency"] = bytes([255] * 256)
        if np.asarray(rgb).std(2).max() > 0:
            im, save = rgb, {}
    elif kind == "see-through":
        white = np.asarray(rgb).min(2) == 255
        im = np.dstack([np.where(white[..., None], 77, np.asarray(rgb)), np.where(white, 0, 255)]).astype(np.uint8)
        im = Image.fromarray(im)
    elif kind == "GIF" and np.asarray(rgb).std(2).max() == 0:
        im = grey
        save = {"save_all": True, "append_images": [Image.fromarray(255 - np.asarray(grey))]}
    else:
        im = {"RGBA": lambda: rgb.convert("RGBA"), "plain": lambda: Image.fromarray(x)}.get(kind, lambda: rgb)()
    out = io.BytesIO()
    form = kind if kind in ("BMP", "PPM", "TIFF", "WEBP", "JPEG") or (kind == "GIF" and save) else "PNG"
    im.save(out, form, **save, **({"lossless": True} if form == "WEBP" else {}))
    return out.getvalue(), {"JPEG": ".jpg", "TIFF": ".tif"}.get(form, "." + form.lower())


def deep_png(size):
    """16 bits a channel, in colour, which Pillow would cut to 8 without a word."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(6 * size) for _ in range(size))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def bytes_of(im, form="PNG", **save):
    out = io.BytesIO()
    im.save(out, form, **save)
    return out.getvalue()


BROKEN = {
    "zero bytes": lambda size, good: b"",
    "text": lambda size, good: b"no picture",
    "deep colour": deep_png,
    "noise": lambda size, good: bytes(np.random.RandomState(size).randint(0, 256, 200, np.uint8)),
    "16 bits": lambda size, good: bytes_of(Image.new("I;16", (size, size))),
    "32 bits": lambda size, good: bytes_of(Image.new("I", (size, size)), "TIFF"),
    "float": lambda size, good: bytes_of(Image.new("F", (size, size)), "TIFF"),
    "not square": lambda size, good: bytes_of(Image.new("L", (size, size + 1))),
    "other size": lambda size, good: bytes_of(Image.new("L", (size + 1, size + 1))),
    "huge gif": lambda size, good: bytes_of(Image.new("P", (size, size)), "GIF")[:6] + b"\xff" * 4,
    "folded": lambda size, good: good[:30] + good[:30],
    "huge": lambda size, good: good[:16] + struct.pack(">II", 60_000, 60_000) + good[24:],
    "cut": lambda size, good: good[: random.Random(size).randrange(1, 50)],
    "cut half": lambda size, good: good[: len(good) // 2 + 10],
}
ARRAYS = {
    "float": lambda x: x.astype(np.float32),
    "flat": lambda x: x.reshape(len(x), -1),
    "one": lambda x: x[:1],
    "none": lambda x: x[:0],
    "channels": lambda x: np.repeat(x, 2, 1)[:, :2],
    "wide": lambda x: np.concatenate([x, x], 3),
    "empty": lambda x: x[:, :, :0, :0],
    "bool": lambda x: x > 0,
    "signed": lambda x: x.astype(np.int8),
    "scalar": lambda x: np.uint8(3),
    "object": lambda x: np.array([{}, None]),
}
SUFFIXES = ".bmp .gif .jpeg .jpg .png .tif .tiff .webp".split()
FLAGS = [
    ["--n", "1"],
    ["--n", "-3"],
    ["--n", "x"],
    ["--scores"],
    ["--scores", "fid", "beauty"],
    ["--features", "vgg"],
    ["--classifier", "cats"],
    ["--nonsense"],
    ["--plot", "nowhere"],
    ["--weights", "w.pth"],
]


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """Drawn networks and few pictures in place of the classifiers, Inception and the data sets; scores of so few."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:

        def net(channels, labelled):
            torch.manual_seed(3)
            net = metrics.Classifier(channels, 10 if labelled else 4)
            net.name, net.batch, net.accuracy, net.labelled = f"drawn/{channels}", 3, 0.5, labelled
            return net

        nets = {channels: net(channels, True) for channels in (1, 3)}

        def classifier(dataset, train, test, folder, device, say):
            assert all(x.dtype == torch.uint8 and len(x) == len(y) > 0 for x, y, *_ in (train, test))
            labelled = bool(train[1].min() >= 0)
            return nets[train[0].shape[1]] if labelled else net(3, False)

        patch.setattr(metrics, "classifier", classifier)
        patch.setattr(metrics, "inception", lambda *a, **k: nets[3])
        patch.setattr(metrics, "FEWEST", 2)
        data = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 9, 1, 28, 28), np.uint8))
        patch.setattr(
            metrics,
            "load_data",
            lambda name, folder, size, split: (
                metrics.resized(data[int(split == "test")], size),
                torch.arange(9),
                list("012345678"),
            ),
        )
        yield nets
    torch.set_num_threads(threads)


def run(capsys, argv):
    """(scores, None) or (None, the one line). What lies in a folder beside images is said once, and does not count."""
    capsys.readouterr()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metrics.main([str(a) for a in argv])
    except SystemExit as stop:
        out = capsys.readouterr()
        lines = [line for line in out.err.splitlines() if not line.startswith("left out of ")]
        assert stop.code == 2 and out.out == "" and len(lines) == 1 and "error: " in lines[0], out.err
        return None, lines[0]
    return json.loads(capsys.readouterr().out), None


def good_folder(rng, folder, channels, kinds, n=None, size=None):
    """Pictures on disk in an order of their names, and the same as one array."""
    folder.mkdir()
    n, size = n or rng.randint(4, 8), size or rng.choice([1, 2, 8, 28, 28, 32, 33])
    x = np.random.RandomState(rng.randrange(10**6)).randint(0, 280, (n, size, size, 3)).clip(0, 255).astype(np.uint8)
    x = x if channels == 3 and rng.random() < 0.5 else x[..., :1]
    data = [encode(p[..., 0] if p.shape[-1] == 1 else p, rng.choice(kinds)) for p in x]
    for i, (content, suffix) in enumerate(data):
        suffix = suffix.upper() if rng.random() < 0.2 else suffix
        (folder / f"{i:02} {rng.choice(NAMES)}{suffix}").write_bytes(content)
    (folder / "notes.txt").write_text("no picture")
    if rng.random() < 0.3:
        (folder / f"._{rng.choice(NAMES)}.png").write_bytes(b"\0\5\26\7")  # macOS leaves such files
    return x.transpose(0, 3, 1, 2)


KINDS = (
    "good",
    "picture",
    "array",
    "folder",
    "unlabelled",
    "flags",
    "jpeg",
    "damaged",
    "good",
    "picture",
    "features",
    "bits",
    "sizes",
    "links",
    "streams",
    "spreadsheet",
)


def add_what_is_no_new_picture(rng, folder, files):
    """Links to pictures that are there, links that go round, pipes, sockets and hidden files, in folders or not."""
    inner = folder / rng.choice(["inner", "z", "0"])
    (inner / "deep").mkdir(parents=True)
    picture = rng.choice(files)
    ways = {
        "link": lambda where: (where / "link.png").symlink_to(picture),
        "hard link": lambda where: os.link(picture, where / f"zz hard{picture.suffix}"),
        "round": lambda where: (where / "round").symlink_to(folder),
        "itself": lambda where: (where / "itself.png").symlink_to("itself.png"),
        "dead": lambda where: (where / "dead.png").symlink_to(folder / "nowhere"),
        "pipe": lambda where: os.mkfifo(where / "pipe.png"),
        "folder": lambda where: (where / "folder.png").mkdir(),
        "hidden": lambda where: (where / ".hidden.png").write_bytes(picture.read_bytes()),
        "text": lambda where: (where / "words.txt").write_text("no picture"),
    }
    used = rng.sample(list(ways), rng.randint(1, len(ways)))
    for how in used:
        ways[how](rng.choice([folder, inner, inner / "deep"]))
    return used


def stream(kind):
    """A standard stream that is gone, closed or lacks letters; None for "gone"."""
    if kind == "gone":
        return None
    made = io.TextIOWrapper(io.BytesIO(), "utf-8" if kind == "closed" else kind, newline="\n")
    if kind == "closed":
        made.close()
    return made


def save_as_a_spreadsheet_does(rng, path):
    """A table of numbers with other separators, quotes, line ends or a byte-order mark."""
    with open(path, newline="") as file:
        table = list(csv.reader(file))
    with open(path, "w", newline="", encoding=rng.choice(["utf-8", "utf-8-sig"])) as file:
        quotes = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        ends = rng.choice(["\n", "\r\n"])
        csv.writer(file, delimiter=rng.choice(",;\t"), quoting=quotes, lineterminator=ends).writerows(table)


@pytest.mark.parametrize("chunk", range(25))
def test_ten_cases(chunk, tmp_path, capsys, small_world):
    for case in range(10):
        rng = random.Random(10 * chunk + case)
        here = tmp_path / f"{case} {rng.choice(NAMES)}"
        here.mkdir()
        channels = rng.choice([1, 3])
        flags = ["--data-dir", here / "data", "--json"] + (
            ["--classifier", "digits"] if channels == 1 else ["--features", "inception"]
        )
        kinds = ["plain", "P", "P, opaque", "RGBA", "see-through", "BMP", "PPM", "TIFF", "WEBP", "GIF"]
        x = good_folder(rng, here / "good", channels, kinds)
        np.save(here / "good.npy", x)
        torch.save(torch.from_numpy(x.copy()), here / "good.pt")
        files = sorted(f for f in (here / "good").iterdir() if f.suffix != ".txt" and f.name[0] != ".")
        real = rng.choice(["digits", here / "good", here / "good.npy"])
        kind = KINDS[(10 * chunk + case) % len(KINDS)]
        base = [*flags, "--real", real, "--fake"]
        if kind == "good":
            some = rng.choice([[], ["--n", 4], ["--scores", "fid"], ["--scores", "kid", "is"], ["--no-cache"]])
            np.savez(here / "good.npz", x=x, y=np.arange(len(x)))
            np.save(here / "last.npy", x if x.shape[2] in (1, 3) else x.transpose(0, 2, 3, 1))  # else it is not clear
            names = "good", "good.npy", "good.pt", "good.npz", "last.npy"
            results = [run(capsys, [*base, here / name, *some])[0] for name in names]
            assert results[0] == results[1] == results[2] == results[3]
            assert results[4].keys() == results[0].keys()
            if "fid" in results[0]:  # its bytes lie in another order, which moves the last digits
                assert results[4]["fid"] == pytest.approx(results[0]["fid"], rel=1e-4, abs=1e-6)
            assert all(math.isfinite(v) for k, v in results[0].items() if k not in ("features", "real"))
            if real != "digits" and "kid" not in some:
                assert results[0]["fid"] < 1e-6
            assert results[0]["n_fake"] == min(
                len(x), 9 if real == "digits" else 99, *(some[1:] if "--n" in some else [])
            )
        elif kind == "picture":
            how, victim = rng.choice(list(BROKEN)), rng.choice(files)
            good = encode(np.random.RandomState(case).randint(0, 256, x.shape[2:], np.uint8), "plain")[0]
            make = BROKEN[how]
            victim.write_bytes(make(x.shape[2], good) if make.__code__.co_argcount == 2 else make(x.shape[2]))
            scores, line = run(capsys, [*base, here / "good"])
            assert scores is None and (victim.name in line or how == "other size"), (how, line)
        elif kind == "array":
            how, suffix = rng.choice(list(ARRAYS)), rng.choice([".npy", ".pt"])
            wrong = np.asarray(ARRAYS[how](np.repeat(x[:, :1], channels, 1)))
            path = here / f"wrong{suffix}"
            if suffix == ".npy":
                np.save(path, wrong, allow_pickle=True)
            else:
                torch.save(wrong.tolist() if how == "object" else torch.from_numpy(np.array(wrong)), path)
            if rng.random() < 0.3:
                path.write_bytes(path.read_bytes()[: rng.randrange(60)])
            scores, line = run(capsys, [*base, path])
            assert scores is None and path.name in line, how
        elif kind == "folder":
            how = rng.choice(["missing", "empty", "file", "single", "folder inside", "broken link", "text only"])
            path = here / "odd"
            if how == "file":
                path.write_bytes(b"\x89PNG")
            elif how != "missing":
                path.mkdir()
            if how in ("single", "folder inside", "broken link"):
                (path / "a.png").write_bytes(files[0].read_bytes())
            if how == "folder inside":
                (path / "b.png").mkdir()
            elif how == "broken link":
                (path / "b.png").symlink_to(here / "nowhere")
            elif how == "text only":
                (path / "a.txt").write_text("")
            scores, line = run(capsys, [*base, path])
            assert scores is None and "odd" in line, how
        elif kind == "flags":
            wrong = rng.choice(FLAGS if channels == 1 else FLAGS[:-1])
            assert run(capsys, [*base, here / "good", *wrong])[0] is None, wrong
        elif kind == "jpeg":
            folder = here / "jpeg"
            good_folder(rng, folder, channels, ["JPEG", "plain"], size=x.shape[2])
            n = sum(f.suffix.lower() == ".jpg" for f in folder.iterdir())
            scores, _ = run(capsys, [*base, folder, "--n", 100])
            read = sorted(f for f in folder.iterdir() if f.suffix != ".txt" and f.name[0] != ".")
            read = metrics.some(read, scores["n_fake"])
            assert scores["jpeg_fake"] == sum(f.suffix.lower() == ".jpg" for f in read) <= n
        elif kind == "features":
            weight = small_world[channels].body[-2].bias.data
            kept = weight[0].item()
            weight[0] = rng.choice([math.nan, math.inf])
            try:
                assert "not finite" in run(capsys, [*base, here / "good"])[1]
            finally:
                weight[0] = kept
        elif kind == "bits":  # single bytes changed: most are noticed, some do no harm, none may end in a traceback
            victim = rng.choice(files)
            data = bytearray(victim.read_bytes())
            for _ in range(3):
                data[rng.randrange(len(data))] = rng.randrange(256)
            victim.write_bytes(data)
            scores, _ = run(capsys, [*base, here / "good"])
            assert scores is None or math.isfinite(scores["fid"])
        elif kind == "unlabelled":  # a folder, or an array, against a folder: no classifier is named
            wanted = rng.choice([[], ["--scores", "fid"], ["--scores", "is", "mode", "dc"]])
            pair = [
                "--real",
                rng.choice([here / "good", here / "good.npy"]),
                "--fake",
                rng.choice([here / "good", here / "good.pt"]),
            ]
            scores, _ = run(capsys, [*flags[:3], *pair, *wanted])
            assert scores["labelled"] is False and scores["n_real"] == len(x)
            assert not {"inception_score", "mode_score", "classes", "class_min"} & set(scores)
            assert scores["density" if wanted[1:2] == ["is"] else "fid"] >= 0
            assert scores.get("fid", 0) < 1e-6 and scores.get("coverage", 1) == 1
        elif kind == "damaged":  # up to 1 % are left out, more are an error; the line says how many, and three of them
            folder, n, size = here / "large", rng.choice([100, 150, 205]), x.shape[2]
            good_folder(rng, folder, channels, kinds, n, size)
            good = encode(np.zeros((size, size), np.uint8), "plain")[0]
            few = [k for k in BROKEN if k in ("zero bytes", "text", "noise", "huge", "cut", "folded", "huge gif")]
            bad = rng.randint(1, 4)
            for i in range(bad):
                name = f"{rng.choice(['0', '5', 'zz'])} bad {i}{rng.choice(SUFFIXES)}"
                (folder / name).write_bytes(BROKEN[rng.choice(few)](size, good))
            names = sorted(f.name for f in folder.iterdir() if " bad " in f.name)
            scores, line = run(capsys, [*flags, "--fake", folder, "--real", rng.choice([here / "good", folder])])
            assert (scores is None) == (bad > 0.01 * (n + bad)), (bad, n)
            if scores is None:
                assert f"{bad} of {n + bad} images" in line and all(name in line for name in names[:3])
                assert not any(name in line for name in names[3:])
            else:
                assert math.isfinite(scores["fid"]) and scores["n_fake"] in (n, len(x), 9)
        elif kind == "links":
            wanted = run(capsys, [*base, here / "good"])[0]
            used = add_what_is_no_new_picture(rng, here / "good", files)
            scores = run(capsys, [*base, here / "good"])[0]
            assert scores["n_fake"] == wanted["n_fake"], used
            assert scores["fid"] == pytest.approx(wanted["fid"], rel=1e-4, abs=1e-6), used
        elif kind == "streams":  # the same numbers where a stream takes them, and no traceback where none does
            real_copy = real if real == "digits" else here / "good.npy"
            wanted = run(capsys, [*flags, "--real", real_copy, "--fake", here / "good"])[0]
            out, err = rng.choice(["gone", "closed", "ascii", "cp1252"]), rng.choice(["gone", "closed", "ascii"])
            (here / "good").rename(here / "ü \U0001f600")  # named in the line that says that notes.txt was left out
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stdout", stream(out))
                patch.setattr(sys, "stderr", stream(err))
                metrics.main([str(a) for a in [*flags, "--real", real_copy, "--fake", here / "ü \U0001f600"]])
                written, warned = sys.stdout, sys.stderr
            if out in ("ascii", "cp1252"):
                assert json.loads(written.buffer.getvalue().decode(out)) == wanted
            if err == "ascii":
                assert "\\xfc \\U0001f600" in warned.buffer.getvalue().decode(err)
        elif kind == "spreadsheet":
            steps = sorted(rng.sample(range(1, 1000), rng.randint(2, 6)))
            table = metrics.CsvLog(here / "log.csv")
            for step in steps:
                table.add({"step": step, "g_loss": round(rng.gauss(0, 1), 3)})
            plain = metrics.CsvLog(here / "log.csv").keep(10**6)
            save_as_a_spreadsheet_does(rng, here / "log.csv")
            assert metrics.CsvLog(here / "log.csv").keep(10**6) == plain
            last = rng.choice(steps)
            save_as_a_spreadsheet_does(rng, here / "log.csv")
            kept = metrics.CsvLog(here / "log.csv").keep(last)
            assert [int(row["step"]) for row in kept] == [step for step in steps if step <= last]
        elif kind == "sizes":  # one picture of another side, or fakes of another side than the real ones
            folder, other = here / "other", rng.choice([s for s in (3, 8, 31, 64) if s != x.shape[2]])
            shape = rng.choice([(other, other), (other, x.shape[2]), (x.shape[2], other), (1, other)])
            if rng.random() < 0.5:
                Image.new("L", shape).save(here / "good" / f"{rng.choice(['!', 'zz'])}.png")
                assert "must be" in run(capsys, [*base, here / "good"])[1]
            else:
                folder.mkdir()
                for i in range(5):
                    Image.new("L", (other, other), i).save(folder / f"{i}.png")
                scores, line = run(
                    capsys, ["--data-dir", here / "data", "--json", "--real", here / "good", "--fake", folder]
                )
                assert scores is None and f"fakes of {other} pixels, real images of {x.shape[2]}" in line


def test_jpeg_is_warned_of_with_the_size_of_the_effect(tmp_path, capsys):
    rng = random.Random(0)
    good_folder(rng, tmp_path / "png", 1, ["plain"], size=28)
    good_folder(rng, tmp_path / "jpg", 1, ["JPEG"], size=28)
    for name, warned in (("png", False), ("jpg", True)):
        metrics.main(["--real", "digits", "--fake", str(tmp_path / name), "--data-dir", str(tmp_path)])
        out = capsys.readouterr()
        assert ("JPEG" in out.err and metrics.JPEG_EFFECT in out.err) == warned == ("JPEG" in out.out)
        assert ("PNG" in out.out) != warned and str(tmp_path / name) in out.out
    folder = str(tmp_path / "jpg")
    for _ in range(2):  # made, then from the cache
        metrics.main(
            [
                "--real",
                folder,
                "--fake",
                str(tmp_path / "png"),
                "--classifier",
                "digits",
                "--data-dir",
                str(tmp_path),
                "--json",
            ]
        )
        out = capsys.readouterr()
        assert json.loads(out.out)["jpeg_real"] > 1 and json.loads(out.out)["jpeg_fake"] == 0 and folder in out.err
