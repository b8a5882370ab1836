"""Fills the register of methods: importing a package registers what it offers."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Final

_PACKAGES: Final = ("turnout.strategies", "turnout.tasks", "turnout.client", "turnout.simulation")


@cache
def load_methods() -> None:
    """Import the packages whose methods an experiment can name (PyTorch among them: takes seconds)."""
    for package in _PACKAGES:
        importlib.import_module(package)
