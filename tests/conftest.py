import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU; python -m pytest -m cuda runs these alone")


def pytest_collection_modifyitems(items):
    for item in items if not torch.cuda.is_available() else ():
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
