"""The plumbing's one writer: what stands below the ruled line of wgan_gp.py goes into the other six image scripts.

    python tests/sync.py            write it
    python tests/sync.py --check    compare instead: names the first line that differs, exit code 1
"""
import sys
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[1]
OTHERS = ("dcgan.py", "cdcgan.py", "wgan_clip.py", "bigan.py", "unrolled.py", "mdgan.py")


def halves(path):
    """The method, and the plumbing from the first ruled line on."""
    method, line, plumbing = path.read_text().partition("\n# =====")
    return method, line + plumbing


def main(check):
    home, differs = halves(ROOT / "wgan_gp.py")[1], False
    for path in (ROOT / name for name in OTHERS):
        method, plumbing = halves(path)
        if plumbing != home and not check:
            path.write_text(method + home)
        elif plumbing != home:
            pairs = zip_longest(home.split("\n"), plumbing.split("\n"))
            i, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            print(f"{path.name}:{method.count(chr(10)) + i + 1}: {theirs!r} where wgan_gp.py has {ours!r}")
            differs = True
    return int(differs)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
