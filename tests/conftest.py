"""What the tests share: tiny runs of the seven scripts, and how their checkpoints and logs are compared."""

import csv
import functools
import importlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the cores with the runs they start
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // workers))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

metrics = importlib.import_module("metrics")  # found from here on

TINY = ["--ngf", "2", "--ndf", "2", "--latent-dim", "6", "--batch-size", "8", "--device", "cpu"]
TINY += ["--log-every", "5", "--sample-every", "20", "--eval-every", "0"]
SCORES = ["fid", "fid_train", "coverage", "inception_score", "mode_score", "classes", "class_min", "class_max"]


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU; python -m pytest tests/test_cuda.py runs these alone")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


class Case:
    """A script and the flags of a tiny run of it; every other attribute is the script's own."""

    def __init__(self, name, *flags, figures=()):
        self.name = name
        self.tiny = [*TINY, *flags]
        self.told = name == "cdcgan" or "--conditional" in flags  # G takes a label
        self.figures = set(figures)  # beside everyone's

    @functools.cached_property
    def module(self):
        return importlib.import_module(self.name)

    def __getattr__(self, name):
        return getattr(self.module, name)


CASES = {name: Case(name) for name in ("wgan_gp", "dcgan", "cdcgan", "wgan_clip", "unrolled", "mdgan")}
CASES["conditional"] = Case("wgan_clip", "--conditional", figures=["interpolation_classes.png"])
CASES["bigan"] = Case("bigan", figures=["reconstructions.png", "interpolation_real.png"])


def over(*names):
    return pytest.mark.parametrize("w", names, indirect=True)


EVERY = over(*CASES)  # tests without such a mark are of what all share: wgan_gp stands for them


@pytest.fixture
def w(request):
    return CASES[getattr(request, "param", "wgan_gp")]


rendered = functools.cache(metrics.render_digits)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """300 digits in place of 20,000, too few to be scored, and an empty working folder. Signals do what they do by
    default, also in a job in the background, which ignores Ctrl-C.

    Not for every test: a file says pytestmark = pytest.mark.usefixtures("small")."""
    monkeypatch.setattr(metrics, "render_digits", lambda n, seed: rendered(300, seed))
    monkeypatch.setattr(metrics, "FEWEST", 301)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def scripted_judge(monkeypatch, fids, w=CASES["wgan_gp"]):
    """Scores in place of metrics.Judge. fids: each call's fid_train, 99 when the list is empty, None a Ctrl-C; or a
    function of the images. Returns the list of (images, labels) that it is asked to judge."""
    given = None if callable(fids) else list(fids)
    judged = []

    class Judge:
        n = 10
        line = staticmethod(str)

        def __init__(self, dataset, load, folder=None, device="cpu", n=None, epochs=None, say=print):
            assert load("train")[0].shape[1:] == load("test")[0].shape[1:]

        def __call__(self, x, y=None):
            assert x.dtype == torch.uint8 and len(x) == 10
            assert (y is not None) == w.told
            judged.append((x, y))
            if given is None:
                fid = fids(x)
            else:
                fid = given.pop(0) if given else 99.0
            if fid is None:
                raise KeyboardInterrupt
            scores = dict.fromkeys(SCORES, 1.0) | {"fid_train": float(fid), "n_real": 10, "n_fake": 10, "floor": 1.0}
            scores |= {"accuracy": 1.0, "features": "none"}
            return scores | ({"label_accuracy": 0.5} if w.told else {})

    monkeypatch.setattr(metrics, "Judge", Judge)
    return judged


def same(a, b, path=""):
    """Every leaf of two checkpoints is equal, tensors bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}/{i}")
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


def checkpoint(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def tensors(path):
    """A checkpoint without what two equal runs may differ in: the rate is set anew before every update."""
    parts = {name: part for name, part in checkpoint(path).items() if name not in ("args", "seconds")}
    for name in ("opt_g", "opt_d"):
        for group in parts[name]["param_groups"]:
            del group["lr"]
    return parts


def leaves(tree):
    """The tensors of nested dicts and lists."""
    if torch.is_tensor(tree):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [leaf for branch in tree for leaf in leaves(branch)]


def rows(folder, name="log.csv"):
    """The rows of a CSV file as dicts of texts; none where there is no file."""
    path = Path(folder) / name
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def timeless(folder, name="log.csv"):
    """rows() without what takes another time in another run."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows(folder, name)]
