"""Fills the register of methods: importing a package registers what it offers."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Final

SERVER_PACKAGES: Final = ("turnout.strategies", "turnout.simulation")
"""What a server needs of an experiment that was checked before; imports no PyTorch."""
_PACKAGES: Final = (*SERVER_PACKAGES, "turnout.tasks", "turnout.client.app", "turnout.client.mods")


@cache
def load_methods(*packages: str) -> None:
    """Import ``packages``, by default all whose methods an experiment can name (PyTorch: takes seconds)."""
    for package in packages or _PACKAGES:
        importlib.import_module(package)
