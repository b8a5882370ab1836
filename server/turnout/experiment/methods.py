"""Fills the register of methods: importing a package registers what it offers."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Final

SERVER_PACKAGES: Final = ("turnout.strategies", "turnout.simulation")
"""What a server needs of an experiment that was checked before; imports no PyTorch."""
_TASKS: Final = "turnout.tasks"
_CLIENTS: Final = ("turnout.client.app", "turnout.client.mods", "turnout.optim")


def has_torch() -> bool:
    """Return whether PyTorch is installed, without importing it; servers of external tasks do without."""
    return find_spec("torch") is not None


@cache
def load_methods(*packages: str) -> None:
    """Import ``packages``, by default all whose methods an experiment can name (PyTorch: takes seconds)."""
    clients = _CLIENTS if has_torch() else ()
    for package in packages or (*SERVER_PACKAGES, _TASKS, *clients):
        importlib.import_module(package)
