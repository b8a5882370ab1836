"""What a run was computed with: versions, hardware, the commit of the working directory."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

_PACKAGES: Final = (
    "turnout",
    "flwr",
    "torch",
    "numpy",
    "safetensors",
    "sqlalchemy",
    "pydantic",
    "scikit-learn",
)


def package_version(name: str) -> str | None:
    """Return the installed version of a distribution without importing it, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe_environment() -> dict[str, Any]:
    """Return versions, machine and git commit as a JSON-able mapping; nothing here identifies a person."""
    return {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu-count": os.cpu_count(),
        "git-commit": _git("rev-parse", "HEAD"),
        "git-dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
