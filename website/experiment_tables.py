"""The experiment file's sections, from the models and signatures that read it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import griffe

from option_rows import Row, documented, limits, option_rows, shown_default, shown_type, table
from turnout.experiment.methods import load_methods
from turnout.experiment.model import FIXED
from turnout.wire import find, methods


def section_table(name: str) -> str:
    """Return the keys of ``[run]``, ``[simulation]`` or ``[fleet]``."""
    return table(section_rows(name))


def section_rows(name: str) -> list[Row]:
    """Return the keys of a section with fixed keys, with the text that stands below each field."""
    model = FIXED[name]
    file = Path(inspect.getfile(model))
    module = griffe.visit(model.__module__, file, file.read_text(encoding="utf-8"))
    rows = []
    for key, field in model.model_fields.items():
        docstring = module[f"{model.__name__}.{key}"].docstring
        if docstring is None:
            raise LookupError(f"{model.__name__}.{key} has no text below it")
        default = field.get_default(call_default_factory=True)
        kind = ", ".join([shown_type(field.annotation), *limits(field.metadata)])
        meaning = " ".join(docstring.value.split())
        rows.append(Row(key, kind, shown_default(default), meaning))
    return rows


def client_table() -> str:
    """Return the keys of ``[client]``: the arguments of `client_app`."""
    from turnout.client import TrainOptions, client_app

    return table(option_rows(client_app, hidden=("task", "mods"), more=documented(TrainOptions)))


def link_table() -> str:
    """Return the keys of ``[link]``."""
    load_methods()
    return table(option_rows(find("link", "noisy").target))


def task_tables() -> str:
    """Return every task with its options."""
    return _each("task", hidden=("train", "test"))


def partition_tables() -> str:
    """Return every partitioner with its options, which are written into ``[task]``."""
    return _each("partitioner")


def participation_tables() -> str:
    """Return every participation model with its options."""
    return _each("participation", hidden=("num_clients", "allow_zero"))


def probability_tables() -> str:
    """Return the rules that ``probabilities`` may name."""
    from turnout.experiment.participation import RULES

    parts = []
    for name, rule in RULES.items():
        rows = option_rows(rule, hidden=("num_clients", "label_distribution"))
        parts += [f'#### `kind = "{name}"`', _first_line(rule), table(rows)]
    return "\n\n".join(parts)


def _each(kind: str, *, hidden: tuple[str, ...] = ()) -> str:
    load_methods()
    parts = []
    for entry in methods(kind):
        summary = _first_line(entry.target)
        parts += [f"#### `{entry.slug}` {{ #{kind}-{entry.slug} }}", summary]
        rows = option_rows(entry.target, hidden=hidden)
        parts.append(table(rows) if rows else "It has no options.")
    return "\n\n".join(parts)


def _first_line(target: Any) -> str:
    return " ".join((target.__doc__ or "").strip().split("\n\n")[0].split())
