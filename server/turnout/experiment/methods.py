"""Fills the register of methods: importing a package registers what it offers."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from typing import Final

from turnout.experiment.sections import EXTERNAL
from turnout.wire import ConfigError, find, methods
from turnout.wire.registry import MethodEntry
from turnout.wire.uncollected import uncollected

SERVER_PACKAGES: Final = ("turnout.strategies", "turnout.strategies.stock_names", "turnout.simulation")
"""What a server needs of an experiment that was checked before; imports no PyTorch."""
EXTERNAL_PACKAGES: Final = (*SERVER_PACKAGES, "turnout.tasks.external")
"""What an experiment needs whose clients bring an app of their own; imports no PyTorch."""
_CLIENTS: Final = (
    "turnout.tasks",
    "turnout.client.app",
    "turnout.client.mods",
    "turnout.client.stock_mods",
    "turnout.optim",
    "turnout.peft",
)
# The sections that name methods of clients.
_OF_CLIENTS: Final = frozenset({"peft", "link", "strategies"})


def has_torch() -> bool:
    """Return whether PyTorch is installed, without importing it; servers of external tasks do without."""
    return find_spec("torch") is not None


@cache
def load_methods(*packages: str) -> None:
    """Import ``packages``, by default all whose methods an experiment can name (PyTorch: takes seconds)."""
    clients = _CLIENTS if has_torch() else ()
    with uncollected():
        for package in packages or (*EXTERNAL_PACKAGES, *clients):
            module = importlib.import_module(package)
            for name in getattr(module, "__all__", ()):  # Some load when they are asked for.
                getattr(module, name)


def load_methods_of(task: str | None, sections: Collection[str] = ()) -> None:
    """Import what an experiment with ``task`` can name that has these ``sections``."""
    served = task == EXTERNAL and _OF_CLIENTS.isdisjoint(sections)
    load_methods(*(EXTERNAL_PACKAGES if served else ()))


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
