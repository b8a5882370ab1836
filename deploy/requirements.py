"""Writes what the images install, deploy/requirements/*.txt: each package as constraints.txt pins it.

    python deploy/requirements.py          # write
    python deploy/requirements.py --check  # exit 1 when they are not what they should be

The server's list leaves out PyTorch and the data sets' packages: a server whose clients bring their own app
(task ``external``) needs neither. The clients' list leaves out only PyTorch, which comes from another index
for machines without a GPU; what PyTorch itself needs is in it. Run it where Turnout is installed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
CONSTRAINTS = HERE.parent / "constraints.txt"
LISTS = {"server": ("torch", "scikit-learn"), "client": ("torch",)}
# These come with the CUDA build of PyTorch, and with nothing else.
CUDA = re.compile(r"nvidia-|triton|cuda-")


def pins() -> dict[str, str]:
    """Return the pinned versions by canonical name."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def needed(roots: Iterable[str], without: Iterable[str]) -> set[str]:
    """Return what ``roots`` need on Linux, by canonical name, themselves included but not ``without``."""
    found: set[str] = set()
    open_names = [canonicalize_name(root) for root in roots]
    while open_names:
        name = open_names.pop()
        if name in found or name in without or CUDA.match(name):
            continue
        found.add(name)
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                open_names.append(canonicalize_name(requirement.name))
    return found


def render(image: str) -> str:
    """Return the list of ``image``. Raises KeyError for a package that constraints.txt does not have."""
    names = needed(["turnout"], LISTS[image]) - {"turnout", "setuptools"}
    if image == "client":
        names |= needed(["torch"], ["setuptools"]) - {"torch"}
    versions = pins()
    lines = [f"{name}=={versions[name]}" for name in sorted(names)]
    return "\n".join(["# Written by deploy/requirements.py from constraints.txt.", *lines, ""])


def main() -> int:
    """Write the lists, or compare them."""
    stale = 0
    for image in LISTS:
        path = HERE / "requirements" / f"{image}.txt"
        if "--check" not in sys.argv:
            path.write_text(render(image), encoding="utf-8")
        elif path.read_text(encoding="utf-8") != render(image):
            print(f"{path} is not what it should be; run python deploy/requirements.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
