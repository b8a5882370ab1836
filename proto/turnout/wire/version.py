"""The version that peers tell each other."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def package_version() -> str:
    """Return the installed version of Turnout, ``"unknown"`` when it runs from a bare source tree."""
    try:
        return version("turnout")
    except PackageNotFoundError:
        return "unknown"
