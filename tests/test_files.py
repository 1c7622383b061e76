"""The files themselves: shared blocks identical, every flag read, the four packages only, README's commands real."""
import ast
import difflib
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMAGE = [ROOT / f"{n}.py" for n in ("dcgan", "cdcgan", "wgan_clip", "wgan_gp", "bigan", "unrolled", "mdgan")
         if (ROOT / f"{n}.py").exists()]
SCRIPTS = sorted(ROOT.glob("*.py"))


def blocks(path):
    return dict(re.findall(r"^# --- shared: (.+?) ---\n(.*?)^# --- end shared ---$", path.read_text(), re.S | re.M))


def test_shared_blocks_are_byte_identical_and_everywhere():
    wanted = blocks(ROOT / "wgan_gp.py")
    assert list(wanted) == ["data", "flags", "step", "ranks", "graph", "checkpoint", "run", "figures", "main"]
    for path in IMAGE:
        assert blocks(path) == wanted, path.name
    assert blocks(ROOT / "metrics.py")["data"] == wanted["data"]
    assert {n for p in SCRIPTS for n in blocks(p)} <= set(wanted)


def test_every_flag_is_read():
    for path in SCRIPTS:
        text = path.read_text()
        for flag in re.findall(r"""\ba?(?:\.add_argument)?\("--([a-z0-9-]+)",""", text):
            assert re.search(rf"args\.{flag.replace('-', '_')}\b", text), f"{path.name}: --{flag} is never read"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_imports_are_the_four_packages_and_no_script(path):
    allowed = set(sys.stdlib_module_names) | {"torch", "torchvision", "numpy", "PIL"}
    optional = {"metrics"} if path.name != "metrics.py" else set()
    tree = ast.parse(path.read_text())
    top = {id(n) for n in tree.body}
    for node in ast.walk(tree):
        names = ([a.name for a in node.names] if isinstance(node, ast.Import) else
                 [node.module] if isinstance(node, ast.ImportFrom) else [])
        for name in names:
            lazy = optional | {"torch"}  # torch.utils.tensorboard among them
            assert name.split(".")[0] in (allowed if id(node) in top else allowed | lazy), f"{path.name} imports {name}"
            assert "tensorboard" not in name or id(node) not in top


def test_the_method_is_about_as_long_as_designed(capsys):
    """The method in about 200 lines; and, printed, what differs between each pair of scripts above the ruled line.
    wgan_clip.py's eight flags for the ablations of reports A, D and E (labels, norms, dropout, ...) earn it 300,
    bigan.py's encoder and the three classifiers of --probe 400."""
    methods = {p.name: p.read_text().split("\n# ====")[0].splitlines() for p in IMAGE}
    for name, lines in methods.items():
        limit = {"wgan_clip.py": 300, "bigan.py": 400}.get(name, 240)
        assert len(lines) <= limit, f"{name}: the method takes {len(lines)} lines"
    for a in methods:
        for b in methods:
            if a < b:
                diff = [x for x in difflib.unified_diff(methods[a], methods[b], a, b, n=0, lineterm="")]
                print(f"{a} -> {b}: {sum(x[0] in '+-' for x in diff)} lines")


@pytest.mark.parametrize("path", IMAGE, ids=lambda p: p.name)
def test_docstrings_commands_parse(path):
    module = importlib.import_module(path.stem)
    commands = re.findall(rf"^    python {path.name}(.*?)(?:  |$)", module.__doc__, re.M)
    assert len(commands) >= 2
    for flags in (c for c in commands if "--resume" not in c): module.parse_args(shlex.split(flags))


def readme_commands():
    text = (ROOT / "README.md").read_text()
    code = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S))
    found = re.findall(r"python ((?:tests/)?\w+\.py[^\n&;|#]*)", code)
    return sorted({c.strip() for c in found})


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_parse(command):
    """Each command in README names a file that is here and flags that it knows; the training ones also run, dry."""
    script, *flags = shlex.split(command)
    path = ROOT / script
    assert path.exists(), script
    text = path.read_text()
    for flag in (f for f in flags if f.startswith("-")):
        assert f'"{flag.split("=")[0]}"' in text, f"{script} has no {flag}"


@pytest.mark.parametrize("command", [c for c in readme_commands() if c.split()[0] in {p.name for p in IMAGE}
                                     and "--resume" not in c])
def test_readme_training_commands_run_dry(command, tmp_path, monkeypatch):
    script, *flags = shlex.split(command)
    module, metrics = (importlib.import_module(n) for n in (Path(script).stem, "metrics"))
    monkeypatch.chdir(tmp_path)
    name = flags[flags.index("--dataset") + 1] if "--dataset" in flags else "digits"
    x, y = module.render_digits(300, 1)
    if name == "folder":  # no test needs a download: the same flags on rendered digits, as a folder of classes
        for i, picture in enumerate(x):
            path = Path(flags[flags.index("--data-dir") + 1]) / ("train" if i % 4 else "test") / f"{y[i] % 3}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            module.to_image(picture).save(path)
    elif name in ("mnist", "fashion"):
        flags[flags.index("--dataset") + 1] = "digits"
    for width in {"--ngf", "--ndf"} & set(flags):  # what is tried are the flags; the widths of report B take a minute
        flags[flags.index(width) + 1] = "8"
    for m in (module, metrics):
        monkeypatch.setattr(m, "render_digits", lambda n, seed: (x, y))
        if name == "stacked_mnist":
            monkeypatch.setattr(m, "torchvision_data", lambda *a: (x, y))
            monkeypatch.setattr(m, "stack", lambda x, y, n, seed, stack=m.stack: stack(x, y, 300, seed))
        if name in ("cifar10", "celeba"):
            monkeypatch.setattr(m, "load_data", lambda name, root, size, split, limit=None: (
                module.fit(x, size).expand(-1, 3, -1, -1)[:limit], (y if name == "cifar10" else 0 * y - 1)[:limit]))
    module.main([*flags, "--dry-run", "--device", "cpu", "--run-dir", "run"])
    assert (tmp_path / "run/samples.png").exists()
    assert (tmp_path / "run/scores.json").exists() == (name != "celeba")  # faces have no classes to score by
