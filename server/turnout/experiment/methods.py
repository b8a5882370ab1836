"""Fills the register of methods: importing a package registers what it offers."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Final

from turnout.wire import ConfigError, find, methods
from turnout.wire.registry import MethodEntry

SERVER_PACKAGES: Final = ("turnout.strategies", "turnout.strategies.stock_names", "turnout.simulation")
"""What a server needs of an experiment that was checked before; imports no PyTorch."""
_TASKS: Final = "turnout.tasks"
_CLIENTS: Final = (
    "turnout.client.app",
    "turnout.client.mods",
    "turnout.client.stock_mods",
    "turnout.optim",
    "turnout.peft",
)


def has_torch() -> bool:
    """Return whether PyTorch is installed, without importing it; servers of external tasks do without."""
    return find_spec("torch") is not None


@cache
def load_methods(*packages: str) -> None:
    """Import ``packages``, by default all whose methods an experiment can name (PyTorch: takes seconds)."""
    clients = _CLIENTS if has_torch() else ()
    for package in packages or (*SERVER_PACKAGES, _TASKS, *clients):
        importlib.import_module(package)


def find_strategy(name: str) -> MethodEntry:
    """Return the strategy ``name``, or Flower's when it begins with ``flwr:``; `ConfigError` if unknown."""
    from turnout.strategies.stock_names import KIND, PREFIX

    if name.startswith(PREFIX):
        return find(KIND, name)
    try:
        return find("strategy", name)
    except ConfigError as error:
        if PREFIX + name in {entry.slug for entry in methods(KIND)}:
            raise ConfigError(f"{error} Flower's {name} is called {PREFIX + name!r}.") from None
        raise
