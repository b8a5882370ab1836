"""Tables of options, from the fields and arguments that take them."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import annotated_types

from fields import field_texts
from turnout.experiment.options import accepted_options

# What an experiment file accepts beyond the annotation.
_WIDER = {"probabilities": "number, list or table"}


@dataclass(frozen=True)
class Row:
    """One option as a reader sees it: all Markdown."""

    name: str
    kind: str
    default: str
    meaning: str


def option_rows(
    target: Callable[..., Any], *, hidden: Collection[str] = (), more: Mapping[str, str] | None = None
) -> list[Row]:
    """Return the options of a registered class or function, in the order of its signature.

    ``more`` has texts for options that the target takes over from elsewhere. Raises LookupError for an
    option that no docstring explains.
    """
    texts = {**(more or {}), **documented(target)}
    rows = []
    for name, option in accepted_options(target)[0].items():
        if name in hidden:
            continue
        if name not in texts:
            raise LookupError(f"{target.__qualname__} has no text about {name!r} in its docstring")
        default = "required" if option.required else shown_default(option.default)
        default = "`run.seed`" if name == "seed" else default
        kind = _WIDER.get(name) or shown_type(option.annotation)
        meaning = re.sub(r"^[a-z]{2,}(?=[ ,])", lambda word: word[0].capitalize(), texts[name])
        rows.append(Row(name, kind, default, meaning))
    return rows


def documented(target: Any) -> dict[str, str]:
    """Return what the docstrings of a function, or of a class and its bases, say of each field."""
    if not inspect.isclass(target):
        return field_texts(target.__doc__)
    found: dict[str, str] = {}
    for base in reversed(target.__mro__):
        if base.__module__.startswith("turnout."):
            found |= field_texts(base.__dict__.get("__doc__"))
    return found


def table(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for row in rows:
        cells = (f"`{row.name}`", row.kind, row.default, row.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return '<div class="options" markdown>\n\n' + "\n".join(lines) + "\n\n</div>"


def shown_default(value: Any) -> str:
    """Return a default as it is written in an experiment file."""
    return "none" if value is None else f"`{json.dumps(value)}`"


def shown_type(annotation: Any) -> str:
    """Return an annotation in the words of somebody who writes TOML."""
    kinds: list[str] = []
    for member in _members(annotation):
        kind = _kind(member)
        if kind and kind not in kinds:
            kinds.append(kind)
    return " or ".join(kinds)


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


_LIMITS = {
    annotated_types.Ge: ("ge", "at least {}"),
    annotated_types.Gt: ("gt", "above {}"),
    annotated_types.Le: ("le", "at most {}"),
    annotated_types.Lt: ("lt", "below {}"),
}


def limits(details: Iterable[Any]) -> list[str]:
    """Return the bounds that pydantic holds a value to, in words."""
    found = [item for detail in details for item in (getattr(detail, "metadata", None) or [detail])]
    return [
        words.format("2^63" if bound == 2**63 else f"{bound:g}")
        for item in found
        for kind, (attribute, words) in _LIMITS.items()
        if isinstance(item, kind) and (bound := getattr(item, attribute)) is not None
    ]


_PLAIN: dict[Any, str] = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}


def _kind(member: Any) -> str:
    origin = typing.get_origin(member)
    if member in (None, type(None)):
        return ""
    if origin is typing.Annotated:
        inner, *details = typing.get_args(member)
        return ", ".join([_kind(inner), *limits(details)])
    if origin is typing.Literal:
        return " or ".join(f"`{json.dumps(choice)}`" for choice in typing.get_args(member))
    if origin in (tuple, list) or (inspect.isclass(origin) and issubclass(origin, typing.Sequence)):
        return "list"
    if member is dict or (inspect.isclass(origin) and issubclass(origin, Mapping)):
        return "table"
    return _PLAIN.get(member, "")
