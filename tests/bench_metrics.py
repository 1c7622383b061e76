"""FID's cost beside pytorch_fid, as Markdown: python tests/bench_metrics.py

The whole command on 500 against 500 PNG (32x32), float32, no cache on either side, the same drawn weights; and the
statistics and the distance alone, 4,000 features of 2,048 on each side, against np.cov and pytorch_fid's function
(scipy's sqrtm). The two take turns, each in a process of its own; the peak is that process's largest resident set."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PRELUDE = """
import sys, time, warnings
import numpy as np, torch
warnings.simplefilter("ignore")
sys.path.insert(0, {root!r})
x, y = (np.random.RandomState(i).randn({n}, 2048) @ np.random.RandomState(7).randn(2048, 2048) for i in (0, 1))
"""
ALONE = {
    "ours": """
import metrics
start = time.time()
d = metrics.frechet_distance(*(t for f in (x, y) for t in metrics.mean_and_covariance(torch.from_numpy(f))))
print(d, time.time() - start)
""",
    "theirs": """
from pytorch_fid.fid_score import calculate_frechet_distance
start = time.time()
d = calculate_frechet_distance(*(t for f in (x, y) for t in (f.mean(0), np.cov(f, rowvar=False))))
print(d, time.time() - start)
""",
}


def timed(command, **environment):
    """(seconds, peak in MB, output) of a command in a process of its own."""
    start = time.time()
    child = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, (command, status)
    return time.time() - start, usage.ru_maxrss / 1024, out.strip()


def drawn_weights(path):
    """He-normal: under default weights hardly anything differs between pictures."""
    from torchvision.models import Inception3

    torch.manual_seed(0)
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight)
    path.parent.mkdir(parents=True)
    torch.save(net.state_dict(), path)


def report(what, results):
    if not results["metrics.py"]:
        return
    for name, runs in results.items():
        seconds, peaks = [r[0] for r in runs], [r[1] for r in runs]
        print(
            f"| {what} | {name} | {statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) "
            f"| {max(peaks):.0f} | {runs[-1][2]} |"
        )
    ratios = sorted(b[0] / a[0] for a, b in zip(results["metrics.py"], results["pytorch_fid"]))
    ours, theirs = (max(r[1] for r in runs) for runs in results.values())
    print(
        f"| {what} | **ratio** | **{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
        f"| {theirs / ours:.2f} | |",
        flush=True,
    )


def main():
    import metrics

    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--n", type=int, default=500, help="pictures on each side")
    p.add_argument("--rounds", type=int, default=3, help="turns of the whole command; 0: none")
    p.add_argument("--rounds-alone", type=int, default=3, help="turns of the statistics and the distance alone")
    args = p.parse_args()
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}; the ratio is the median over turns\n")
    print("| what | by | seconds | peak, MB | FID |\n|---|---|---|---|---|")
    results = {"metrics.py": [], "pytorch_fid": []}
    for _ in range(args.rounds_alone):
        for name, key in (("metrics.py", "ours"), ("pytorch_fid", "theirs")):
            _, peak, line = timed(["-c", PRELUDE.format(root=str(ROOT), n=4000) + ALONE[key]])
            results[name].append((float(line.split()[1]), peak, f"{float(line.split()[0]):.6g}"))
    report("statistics and distance, d 2,048", results)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        weights = folder / "hub/checkpoints" / metrics.INCEPTION.rsplit("/", 1)[1]
        drawn_weights(weights)
        for seed, name in enumerate("ab"):
            (folder / name).mkdir()
            coarse = torch.rand(args.n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * (1 - 0.2 * seed)
            x = (torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear") * 255).byte()
            for i, picture in enumerate(x.permute(0, 2, 3, 1).numpy()):
                Image.fromarray(picture).save(folder / name / f"{i:04}.png")
        pair, results = [folder / "a", folder / "b"], {"metrics.py": [], "pytorch_fid": []}
        for _ in range(args.rounds):
            flags = ["--features", "inception", "--weights", weights, "--scores", "fid", "--no-cache", "--json"]
            seconds, peak, out = timed(["metrics.py", "--real", pair[0], "--fake", pair[1], *flags])
            results["metrics.py"].append((seconds, peak, f"{json.loads(out)['fid']:.6g}"))
            seconds, peak, line = timed(
                ["-m", "pytorch_fid", *pair, "--device", "cpu"], TORCH_HOME=str(folder), XDG_CACHE_HOME=str(folder)
            )
            results["pytorch_fid"].append((seconds, peak, f"{float(line.split()[-1]):.6g}"))
            print({name: runs[-1] for name, runs in results.items()}, file=sys.stderr, flush=True)
        report(f"{args.n} against {args.n} PNG, whole command", results)


if __name__ == "__main__":
    main()
