import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # -n: the workers, and the runs that they start,
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // workers))  # share the cores
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU; python -m pytest -m cuda runs these alone")


def pytest_collection_modifyitems(items):
    for item in items if not torch.cuda.is_available() else ():
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture(autouse=True)
def paper(request):
    """Tests are of the papers' settings, which do not move when defaults are searched for anew; those of the defaults
    and of README's commands are in test_defaults.py and test_files.py."""
    with pytest.MonkeyPatch.context() as m:  # of its own, as some tests undo theirs
        for name in ("wgan_gp", "dcgan", "cdcgan", "wgan_clip", "bigan", "unrolled", "mdgan"):
            module = importlib.import_module(name)
            if request.path.name not in ("test_defaults.py", "test_files.py"):
                m.setattr(module, "parse_args", lambda argv=None, parse=module.parse_args: parse(
                    ["--paper", *(sys.argv[1:] if argv is None else argv)]))
        yield
