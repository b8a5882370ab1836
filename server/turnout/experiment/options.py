"""Checks a section's options against the class or function that they configure.

A strategy's fields, a task's arguments and so on are declared (and documented) once, where they are used; the
experiment file has no second list of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import SchemaError

from turnout.experiment.source import KeyPath
from turnout.wire import unknown_name

NONE_WORD: Final = "none"  # TOML has no null.


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an experiment: the key it is about, and a sentence with value and fix."""

    path: KeyPath
    message: str


@dataclass(frozen=True)
class Option:
    """One option that a target accepts; ``annotation`` is Any where it says nothing."""

    annotation: Any
    required: bool
    default: Any = None


def accepted_options(target: Callable[..., Any]) -> tuple[dict[str, Option], bool]:
    """Return the options ``target`` takes by name, and whether it takes others as well (``**options``)."""
    if dataclasses.is_dataclass(target):
        hints = _hints(target)
        return {
            f.name: Option(hints.get(f.name, Any), *_dataclass_default(f))
            for f in dataclasses.fields(target)
            if f.init
        }, False
    signature = inspect.signature(target)
    function = target.__init__ if inspect.isclass(target) else target
    hints = _hints(function)
    options, others = {}, False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            others = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            required = parameter.default is parameter.empty
            default = None if required else parameter.default
            options[parameter.name] = Option(hints.get(parameter.name, Any), required, default)
    return options, others


def check_options(
    section: str,
    options: Mapping[str, Any],
    known: Mapping[str, Option],
    *,
    hidden: Collection[str] = (),
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the options with their values converted, and what is wrong with them.

    ``hidden`` options are set by Turnout, not by the user: they are neither accepted nor listed.
    """
    shown = {name: option for name, option in known.items() if name not in hidden}
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, value in options.items():
        path = (*section.split("."), name)
        if name not in shown:
            problems.append(Problem(path, str(unknown_name(f"key in [{section}]", name, shown))))
            continue
        try:
            values[name] = convert(value, shown[name].annotation)
        except ValueError as error:
            problems.append(Problem(path, f"{section}.{name} = {shown_value(value)}: {error}"))
    return values, problems


def convert(value: Any, annotation: Any) -> Any:
    """Return ``value`` as ``annotation`` wants it; raises ValueError saying what was expected.

    The word ``"none"`` stands for None where None is allowed: TOML cannot write it.
    """
    if value == NONE_WORD and _allows_none(annotation) and not _literal_has(annotation, NONE_WORD):
        return None
    adapter = _adapter(annotation)
    if adapter is None:
        return value
    try:
        # As JSON, so that an integer may stand for a float and a table's text keys for client ids, but text
        # for a number may not.
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ValueError(_expectation(error)) from error
    except TypeError:
        raise ValueError("this kind of value is not possible here.") from None  # A date or time of TOML.


def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    """Return what checks the written form of ``annotation``; None when it cannot be written in a file."""
    writable = tuple(member for member in _members(annotation) if _is_writable(member))
    union: Any = typing.Union[writable] if writable else None  # noqa: UP007 - made at run time
    return None if union is None else TypeAdapter(union)


def _is_writable(annotation: Any) -> bool:
    try:
        TypeAdapter(annotation)
    except (PydanticUserError, SchemaError):
        return False  # An object of some class: it can be given in Python only.
    return True


def shown_value(value: Any) -> str:
    """Return a value as a short piece of an error message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError):
        return {}


def _dataclass_default(f: dataclasses.Field[Any]) -> tuple[bool, Any]:
    if f.default is not dataclasses.MISSING:
        return False, f.default
    if f.default_factory is not dataclasses.MISSING:
        return False, None
    return True, None


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _allows_none(annotation: Any) -> bool:
    return any(member in (type(None), None) for member in _members(annotation))


def _literal_has(annotation: Any, word: str) -> bool:
    return any(
        typing.get_origin(member) is typing.Literal and word in typing.get_args(member)
        for member in _members(annotation)
    )


def _expectation(error: ValidationError) -> str:
    """Return pydantic's findings as one sentence, without its jargon of union members."""
    messages: list[str] = []
    for found in error.errors(include_url=False, include_context=False, include_input=False):
        message = found["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if message not in messages:
            messages.append(message)
    return ", or ".join(messages) + "."
