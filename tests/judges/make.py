"""Trains the networks that come with the collection, so that every machine scores MNIST, the rendered digits and
CIFAR-10 on one scale: python tests/judges/make.py [data]. One to three minutes each on two cores."""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import metrics

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    data = sys.argv[1] if len(sys.argv) > 1 else "data"
    metrics.JUDGES = Path("none")
    for name, side in (("digits", 28), ("mnist", 28), ("cifar10", 32)):
        with tempfile.TemporaryDirectory() as folder:
            metrics.classifier(name, *(metrics.load_data(name, data, side, s) for s in ("train", "test")), folder)
            saved = torch.load(next(Path(folder).glob("*.pt")), weights_only=True)
        if name == "mnist":  # also for the single digits of stacked MNIST: the same ones, drawn again
            x, y, _ = metrics.load_data("stacked_mnist", data, 28, "train")
            saved["pictures"].append(metrics.image_key(x[:, :1], y // 100))
        torch.save(saved, HERE / f"{name}.pt")
