"""Flower has every name and parameter that Turnout uses, and Turnout uses none that is not in the table."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from surface import ABSTRACT, METHODS, PRIVATE, PUBLIC, STRATEGIES

from turnout.strategies.stock_names import KIND, PREFIX
from turnout.wire import find, methods

REPOSITORY = Path(__file__).resolve().parents[3]
ROOTS = ("proto", "strategies", "client", "server", "examples")
NAMES = [(module, name) for table in (PUBLIC, PRIVATE) for module, names in table.items() for name in names]


def parameters(target: Any) -> list[str]:
    return [name for name in inspect.signature(target).parameters if name not in ("self", "args", "kwargs")]


def resolved(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@cache
def used() -> frozenset[tuple[str, str]]:
    """Return every (module, name) that our packages import from Flower."""
    return frozenset(_used())


def _used() -> Iterator[tuple[str, str]]:
    for root in ROOTS:
        for path in (REPOSITORY / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
                    yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{m}.{n}" for m, n in NAMES])
def test_flower_has_the_name_and_its_parameters(module: str, name: str) -> None:
    target = getattr(importlib.import_module(module), name)
    wanted = (PUBLIC | PRIVATE)[module][name]
    if wanted:
        assert set(wanted) <= set(parameters(target)), f"{module}.{name} takes {parameters(target)}"


def test_what_we_import_is_in_the_table() -> None:
    table = {(module, name) for module, name in NAMES}
    allowed = table | {("flwr.serverapp.strategy", name) for name in STRATEGIES}
    assert len(used()) > 10
    assert used() <= allowed, f"not pinned: {sorted(used() - allowed)}; add it to surface.py"
    assert {pair for pair in table if pair[0] in PRIVATE} <= used(), "no longer used: take it off the table"


@pytest.mark.parametrize("path", METHODS)
def test_methods_take_our_parameters_in_our_order(path: str) -> None:
    for method, wanted in METHODS[path].items():
        own = parameters(getattr(resolved(path), method))
        assert [name for name in own if name in wanted] == list(wanted), f"{path}.{method} takes {own}"


@pytest.mark.parametrize("path", ABSTRACT)
def test_nothing_further_must_be_implemented(path: str) -> None:
    assert sorted(resolved(path).__abstractmethods__) == sorted(ABSTRACT[path])


@pytest.mark.parametrize("name", STRATEGIES)
def test_stock_strategies_have_their_options(name: str) -> None:
    own = parameters(resolved(f"flwr.serverapp.strategy.{name}"))
    assert set(STRATEGIES[name]) <= set(own), f"{name} takes {own}"
    offered = inspect.signature(find(KIND, PREFIX + name).target).parameters
    assert set(STRATEGIES[name]) <= set(offered)
    assert {"seed", "num_clients", "max_update_norm"} <= set(offered)


def test_every_stock_strategy_is_offered() -> None:
    assert {entry.slug for entry in methods(KIND)} == {PREFIX + name for name in STRATEGIES}


def test_new_stock_strategies_are_noticed() -> None:
    import flwr.serverapp.strategy as stock

    others = {"Strategy", "Result", "FedXgbBagging", "FedXgbCyclic"}  # Trees: no arrays to check or average.
    assert set(stock.__all__) == set(STRATEGIES) | others, "decide whether the new one can be offered"
