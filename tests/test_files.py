"""The files themselves: one plumbing, every flag read, the four packages only, one direction of imports, the linter's
settings, and README's commands, which run."""

import ast
import importlib
import itertools
import math
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sync
import torch
from conftest import CASES, EVERY, ROOT, checkpoint, over, rendered, same
from PIL import Image

import metrics

IMAGE = [ROOT / name for name in ("wgan_gp.py", *sync.OTHERS)]
SCRIPTS = sorted(ROOT.glob("*.py"))
NAMES = {path.stem for path in SCRIPTS}
BY_NAME = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
RECORD = sorted((ROOT / "tests/gallery").glob("*.md"))


# the plumbing ---------------------------------------------------------------------------------------------------------


def test_the_plumbing_is_one():
    assert sync.main(check=True) == 0


@pytest.mark.parametrize("cut", [False, True])
def test_sync_names_the_first_line_that_differs_and_writes_it(tmp_path, monkeypatch, capsys, cut):
    home = sync.halves(ROOT / "wgan_gp.py")[1]
    for path in IMAGE:
        (tmp_path / path.name).write_text(sync.halves(path)[0] + home)
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    whole = {path.name: (tmp_path / path.name).read_bytes() for path in IMAGE}
    lines = (tmp_path / "mdgan.py").read_text().split("\n")
    i = next(i for i, line in enumerate(lines) if line.startswith("def save("))
    was = lines[i]
    lines[i] = "def keep(name):"
    changed = lines[:i] if cut else [*lines[: i + 2], "    pass", *lines[i + 2 :]]
    (tmp_path / "mdgan.py").write_text("\n".join(changed))
    assert sync.main(check=True) == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"mdgan.py:{i + 1}: ") and repr(was) in said, said
    assert cut or repr(lines[i]) in said
    assert sync.main(check=False) == 0 and sync.main(check=True) == 0 and capsys.readouterr().out == ""
    assert whole == {path.name: (tmp_path / path.name).read_bytes() for path in IMAGE}


# the code -------------------------------------------------------------------------------------------------------------


def names_in(tree):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("path", IMAGE, ids=lambda path: path.name)
def test_the_method_says_nothing_of_ranks(path):
    method = ast.parse(sync.halves(path)[0])
    assert not names_in(method) & {"RANK", "WORLD", "rank_0_first"}
    attributes = {node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)}
    assert "distributed" not in attributes and {"average_gradients", "seed_noise"} <= names_in(method)


def read_of_args(path):
    """The names x of every args.x or self.args.x or study.args.x that is read."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    nodes = [node for node in nodes if isinstance(node.ctx, ast.Load)]
    return {node.attr for node in nodes if "args" in (getattr(node.value, "id", ""), getattr(node.value, "attr", ""))}


@BY_NAME
def test_every_flag_is_read(path):
    """Each is read where it is declared, or by what watches the run."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    declared = [call.args for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    flags = {next(a.value for a in names if a.value.startswith("--")).strip("-") for names in declared}
    read = read_of_args(path) | read_of_args(ROOT / "metrics.py")
    assert len(flags) > 3
    never = {flag for flag in flags - {"help"} if flag.replace("-", "_") not in read}
    assert not never, f"{path.name} never reads {never}"


@BY_NAME
def test_imports_are_the_four_packages_and_go_one_way(path):
    """A script imports metrics.py, at its top, and no script; metrics.py imports none. TensorBoard and scikit-learn are
    imported where a flag asks for them."""
    allowed = set(sys.stdlib_module_names) | {"torch", "torchvision", "numpy", "PIL"}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names = [node.args[0].value]
        else:
            continue
        at_top = node in tree.body
        for name in names:
            package = name.split(".")[0]
            assert package not in NAMES - {"metrics"} and (package != "metrics" or at_top), f"{path.name}: {name}"
            if not at_top:
                assert package in {"sklearn", "torch", "fcntl"}, f"{path.name} imports {name} inside a function"
            elif package != "metrics":
                assert package in allowed and "tensorboard" not in name, f"{path.name} imports {name}"


@BY_NAME
def test_uv_reads_the_packages_of_requirements_txt(path):
    """The block that `uv run` looks for, by the pattern of PEP 723."""
    (block,) = re.findall(r"(?m)^# /// script$\s(?P<content>(?:^#(?:| .*)$\s)+)^# ///$", path.read_text())
    lines = [line[2:] for line in block.splitlines()]
    metadata = tomllib.loads("\n".join(lines))
    assert metadata["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    assert metadata["requires-python"] == ">=3.11"


def test_the_oldest_packages_are_those_of_requirements_txt():
    """torch>=2.11 in the one is torch==2.11.0 in the other."""
    floors = dict(line.split(">=") for line in (ROOT / "requirements.txt").read_text().splitlines())
    lines = (ROOT / "tests/oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert oldest.keys() == floors.keys()
    for name, floor in floors.items():
        assert oldest[name].split(".") == [*floor.split("."), "0", "0"][:3]


def test_the_linter_has_no_waivers_for_layout_and_comes_before_the_tests():
    settings = tomllib.loads((ROOT / ".ruff.toml").read_text())
    assert settings["line-length"] == 120
    assert {"E", "F", "W", "I", "B", "UP", "NPY", "RUF"} <= set(settings["lint"]["select"])
    for waived in settings["lint"]["ignore"]:
        assert not any(rule.startswith(waived) for rule in ("E401", "E402", "E701", "E702", "I001")), waived
    assert not {"per-file-ignores", "extend-ignore"} & settings["lint"].keys() and "format" not in settings
    ci = (ROOT / ".ci/run").read_text()
    order = [ci.index(line) for line in ("\nruff format --check .\n", "\nruff check .\n", '\neval "${tests#* && }"\n')]
    assert order == sorted(order)


# commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", IMAGE, ids=lambda path: path.name)
def test_docstrings_commands_parse(path):
    module = importlib.import_module(path.stem)
    commands = re.findall(rf"^    python {path.name}(.*?)(?:  |$)", module.__doc__, re.M)
    assert len(commands) >= 2
    for flags in (c for c in commands if "--resume" not in c):
        module.parse_args(shlex.split(flags))


def commands_of(path):
    """`python SCRIPT.py FLAGS` in the shell blocks and the text of a page."""
    text = path.read_text()
    blocks = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S))
    inline = re.findall(r"`([^`\n]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
    start = r"(?:python|torchrun --nproc-per-node \d+) "
    found = re.findall(start + r"((?:tests/)?\w+\.py[^\n&;|#]*)", "\n".join([blocks, *inline]))
    return {command.strip() for command in found}


def ours(command):
    return command.split()[0] in {path.name for path in IMAGE}


README = sorted(commands_of(ROOT / "README.md"))
ALL = sorted({command for page in (ROOT / "README.md", *RECORD) for command in commands_of(page)})


def test_there_are_commands_of_each_kind():
    scripts = {command.split()[0] for command in README}
    assert {"wgan_gp.py", "dcgan.py", "toy2d.py", "metrics.py", "tests/bench.py", "tests/sync.py"} <= scripts
    assert len([command for command in README if ours(command)]) > 10


@pytest.mark.parametrize("command", ALL)
def test_every_command_of_readme_and_of_the_record_parses(command, capsys):
    """Of ours and of toy2d.py by their own parser; of the others each flag is one that the file names."""
    script, *flags = shlex.split(command)
    path = ROOT / script
    assert path.exists(), script
    if (ours(command) and "--resume" not in flags) or script == "toy2d.py":
        importlib.import_module(path.stem).parse_args(flags)
        return
    text = path.read_text()
    for flag in (f for f in flags if f.startswith("-")):
        assert f'"{flag.split("=")[0]}"' in text, f"{script} has no {flag}"


@pytest.fixture
def run(small, monkeypatch):
    """runs/NAME, a tiny run of wgan_gp.py of three updates; and data of every name, without a download."""
    x, y = rendered(300, 1)

    def from_torchvision(name, root, **part):
        data = {"cifar10": x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)}.get(name, x[:, 0])
        return SimpleNamespace(data=data.numpy(), targets=y.tolist(), classes=list("0123456789"))

    monkeypatch.setattr(metrics, "from_torchvision", from_torchvision)
    trained("wgan_gp", Path("runs/NAME"))


def trained(name, folder):
    """A run of three updates with a last.pt and a best.pt."""
    flags = [*CASES[name].tiny, "--dataset", "mnist", "--run-dir", str(folder), "--holdout", "100"]
    CASES[name].main([*flags, "--steps", "3"])
    shutil.copy(folder / "last.pt", folder / "best.pt")


@pytest.mark.parametrize("command", [command for command in README if ours(command)])
def test_readmes_commands_of_the_scripts_run(command, run):
    """Two updates of D each, of small networks, or two images: what is tried are the flags."""
    script, *flags = shlex.split(command)
    given = dict(itertools.pairwise(flags))
    if "--resume" in flags and not Path(given["--resume"]).exists():
        trained(Path(script).stem, Path(given["--resume"]).parent)
    if given.get("--dataset") == "folder":
        for i, image in enumerate(rendered(300, 1)[0]):
            path = Path(given["--data-dir"]) / f"{i % 3}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            metrics.save_sheet(image[None], path)
    if "--generate" in flags:
        flags[flags.index("--generate") + 1] = "2"
    elif "--resume" in flags:
        flags += ["--steps", "5"]
    else:
        flags += ["--steps", "2", "--ngf", "2", "--ndf", "2"]
    flags += ["--device", "cpu"]
    if "--resume" not in flags and "--run-dir" not in flags:
        flags += ["--run-dir", "run"]
    importlib.import_module(Path(script).stem).main(flags)
    if "--generate" in flags:
        folder = Path(given.get("--generate-to", Path(given["--resume"]).parent / "generated"))
        labels = {"labels.csv"} if script == "cdcgan.py" else set()
        assert {path.name for path in folder.iterdir()} == {"00000.png", "00001.png"} | labels
        return
    default = Path(given["--resume"]).parent if "--resume" in flags else "run"
    folder = Path(given.get("--run-dir", default))
    made = {path.name for path in folder.iterdir()}
    assert {"samples.png", "last.pt", "traversal.png", "interpolation_latent.png", "args.json", script} <= made
    saved = checkpoint(folder / "last.pt")
    d_steps = saved["args"]["d_steps"]
    assert saved["step"] == (5 if "--resume" in flags else math.ceil(2 / d_steps) * d_steps)


# load -----------------------------------------------------------------------------------------------------------------


def images_of(sheet, side):
    """The images (64, side, side) of a sheet of eight by eight, two pixels apart."""
    rows = sheet[2:, 2:].reshape(8, side + 2, 8, side + 2)
    return rows.swapaxes(1, 2)[:, :, :side, :side].reshape(64, side, side)


@EVERY
def test_load_is_the_averaged_generator(w, small):
    """It draws samples.png again, from that picture's z."""
    w.main([*w.tiny, "--steps", "2", "--run-dir", "a"])
    args = SimpleNamespace(**checkpoint("a/last.pt")["args"])
    G = w.load("a/last.pt")
    saved = checkpoint("a/last.pt")
    same(dict(G.state_dict()), dict(saved["ema"]))
    assert any(not torch.equal(saved["ema"][name], p) for name, p in saved["G"].items())
    seeded = metrics.seeded(args.seed, metrics.SHEETS)
    y = [torch.arange(8).repeat_interleave(8)] if w.told else []
    z = metrics.sample_z(args, 8, "cpu", seeded).repeat(8, 1) if w.told else metrics.sample_z(args, 64, "cpu", seeded)
    with torch.no_grad():
        x = w.to_uint8(G(z, *y))[:, 0].numpy()
    sheet = np.asarray(Image.open("a/samples.png"))
    if w.told:  # ten rows, of the ten classes
        sheet = sheet[: -2 * (args.image_size + 2)]
    assert np.array_equal(images_of(sheet, args.image_size), x)
    assert not G.training and not any(p.requires_grad for p in G.parameters())


@over("dcgan")
def test_load_in_a_fresh_process_as_in_a_notebook(w, small):
    w.main([*w.tiny, "--steps", "2", "--run-dir", "runs/NAME"])
    shutil.copy("runs/NAME/last.pt", "runs/NAME/best.pt")
    code = """
import torch
from dcgan import load
G = load("runs/NAME/best.pt")
x = G(torch.randn(4, 6))
print(tuple(x.shape), x.requires_grad, bool(x.abs().max() <= 1))
"""
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stderr == "" and done.stdout == "(4, 1, 28, 28) False True\n"


@EVERY
def test_load_knows_the_size_of_z_and_the_default_of_a_flag_that_the_file_lacks(w, small):
    """Somebody adds a flag to a copy, and loads what the script made before."""
    w.main([*w.tiny, "--steps", "1", "--run-dir", "a"])
    saved = checkpoint("a/last.pt")
    assert w.load("a/last.pt").latent_dim == saved["args"]["latent_dim"]
    lacking = "g_norm" if "g_norm" in saved["args"] else "arch"
    del saved["args"][lacking]
    torch.save(saved, "b.pt")
    same(dict(w.load("b.pt").state_dict()), dict(saved["ema"]))
    if w.name == "bigan":
        same(dict(w.load_encoder("b.pt").state_dict()), dict(saved["ema_e"]))


@EVERY
def test_a_resume_takes_the_default_of_a_flag_that_the_file_lacks(w, small):
    """And not what colour images or --paper set today: the run was made without it."""
    w.main([*w.tiny, "--steps", "1", "--run-dir", "a"])
    saved = checkpoint("a/last.pt")
    saved["args"] |= {"dataset": "cifar10", "image_size": 32, "arch": "dcgan"}
    del saved["args"]["upsample"], saved["args"]["lr_decay"]
    torch.save(saved, "b.pt")
    args = w.parse_args(["--resume", "b.pt"])
    assert (args.upsample, args.lr_decay) == ("deconv", "linear")
    assert (args.ngf, args.batch_size) == (saved["args"]["ngf"], saved["args"]["batch_size"])
    assert w.parse_args(["--resume", "b.pt", "--amp"]).amp


def test_load_of_what_is_no_checkpoint_is_one_line(small, capsys):
    Path("x.pt").write_bytes(b"PK")
    torch.save({"step": 3}, "y.pt")
    for path in ("x.pt", "y.pt", "none.pt"):
        with pytest.raises(SystemExit) as stop:
            CASES["wgan_gp"].load(path)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and path in err


def test_readmes_lines_that_load_a_checkpoint_run(run):
    [code] = re.findall(r"```python\n([^`]*import load,.*?)```", (ROOT / "README.md").read_text(), re.S)
    shutil.rmtree("runs")
    CASES["wgan_gp"].main(["--ngf", "2", "--ndf", "2", "--steps", "1", "--run-dir", "runs/NAME", "--device", "cpu"])
    shutil.copy("runs/NAME/last.pt", "runs/NAME/best.pt")
    space = {}
    exec(code, space)
    assert space["x"].shape == (64, 1, 28, 28) and space["x"].abs().max() <= 1
    sheet = np.asarray(Image.open("sheet.png"))
    assert np.array_equal(images_of(sheet, 28), space["to_uint8"](space["x"])[:, 0].numpy())


def anchors(page):
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *RECORD], ids=lambda page: page.name)
def test_every_link_to_a_file_or_heading_resolves(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if not link.startswith("http")]
    for link in links:
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


@pytest.mark.parametrize("name", ["lite0.py", "bench.py", "bench_metrics.py", "judges/make.py"])
def test_tools_use_names_that_metrics_has(name):
    """No test runs the whole of these."""
    tree = ast.parse((ROOT / "tests" / name).read_text())
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "metrics":
            used.add(node.attr)
    assert used
    assert not [attribute for attribute in used if not hasattr(metrics, attribute)]
