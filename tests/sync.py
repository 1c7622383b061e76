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


def first_difference(home, other):
    """(number of the line, line in home, line in other), None for a line that one of them lacks."""
    pairs = enumerate(zip_longest(home.split("\n"), other.split("\n")))
    return next((i, ours, theirs) for i, (ours, theirs) in pairs if ours != theirs)


def main(check):
    """Returns the exit code."""
    _, home = halves(ROOT / "wgan_gp.py")
    code = 0
    for name in OTHERS:
        method, plumbing = halves(ROOT / name)
        if plumbing == home:
            continue
        if check:
            i, ours, theirs = first_difference(home, plumbing)
            line = method.count("\n") + 1 + i
            print(f"{name}:{line}: {theirs!r} where wgan_gp.py has {ours!r}")
            code = 1
        else:
            (ROOT / name).write_text(method + home)
    return code


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
