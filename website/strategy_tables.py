"""Strategies: their options, their papers."""

from __future__ import annotations

from typing import Any

from option_rows import Row, option_rows, table
from turnout.experiment.methods import load_methods
from turnout.wire import ConfigError, find, methods

# A value other than the default of the base's fields, some of which a method has no use for.
_OTHER = {"client_weights": "examples", "server_lr": 0.5}


def strategy_table(slug: str) -> str:
    """Return the options of one strategy, its own before those that all have."""
    return table(strategy_rows(slug))


def strategy_rows(slug: str) -> list[Row]:
    """Return the options that the strategy takes; those it refuses every other value of are left out."""
    load_methods()
    target = find("strategy", slug).target
    rows = [row for row in option_rows(target) if row.name not in _OTHER or _takes(target, row.name)]
    own = set(target.__annotations__)
    return sorted(rows, key=lambda row: row.name not in own)


def _takes(target: Any, name: str) -> bool:
    for needed in ({}, {"participation": 0.5}):
        try:
            target(**needed, **{name: _OTHER[name]})
        except (ConfigError, TypeError):
            continue
        return True
    return False


def strategy_tables() -> str:
    """Return links to every strategy's page, with its one-line summary."""
    load_methods()
    lines = ["| name | what it is |", "| --- | --- |"]
    for entry in methods("strategy"):
        summary = entry.summary.replace("|", "\\|")
        lines.append(f"| [`{entry.slug}`](../strategies/{entry.slug}.md#options) | {summary} |")
    return "\n".join(lines)


def paper(slug: str) -> str:
    """Return where the strategy was published, as registered."""
    load_methods()
    entry = find("strategy", slug)
    if entry.paper is None:
        raise ValueError(f"strategy {slug!r} is registered without a paper")
    address = f"https://arxiv.org/abs/{entry.paper}"
    name = entry.class_path.rsplit(".", 1)[1]
    file = entry.class_path.rsplit(".", 1)[0].replace(".", "/")
    return (
        f"`{slug}` in an experiment file · `turnout.strategies.{name}` in Python · "
        f"[arXiv {entry.paper}]({address}) · source `strategies/{file}.py`"
    )
