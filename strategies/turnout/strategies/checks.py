"""Checks of hyperparameters: each raises `ConfigError` naming the field, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

from turnout.wire.errors import ConfigError


def whole_number(field: str, value: Any, minimum: int, *, optional: bool = False) -> None:
    """Refuse what is not an integer of at least ``minimum`` (or None, if ``optional``)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        alternative = " or None" if optional else ""
        raise ConfigError(
            f"{field} must be a whole number of at least {minimum}{alternative}, got {value!r}."
        )


def number(
    field: str,
    value: Any,
    allowed: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    """Refuse what is not a finite number within the bounds, which ``allowed`` puts in words."""
    plain = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not (math.isfinite(plain) and above < plain < below and least <= plain <= most):
        raise ConfigError(f"{field} must be {allowed}, got {value!r}.")


def choice(field: str, value: Any, allowed: Collection[str | None]) -> None:
    """Refuse what is not one of the words ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"{field} must be {' or '.join(map(repr, allowed))}, got {value!r}.")


def names(field: str, value: Any) -> None:
    """Refuse what is not a sequence of different, non-empty words."""
    words = isinstance(value, (tuple, list)) and all(isinstance(word, str) and word for word in value)
    if not words or len(set(value)) < len(value):
        raise ConfigError(f"{field} must be a list of different names, got {value!r}.")


def unused(owner: str, field: str, value: Any, default: Any, reason: str = "") -> None:
    """Refuse a setting that ``owner`` would ignore."""
    if value != default:
        raise ConfigError(
            f"{owner} has no {field}{reason}; leave {field} at its default {default!r}, got {value!r}."
        )
