"""Checks of user values, with errors that name field, value and fix."""

from __future__ import annotations

import math

import numpy as np

from turnout.wire.errors import ConfigError


def check_number(
    field: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise `ConfigError` unless ``value`` is a finite number from ``low`` to ``high``, ends open as said."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    at = float(value) if number else math.nan  # type: ignore[arg-type]
    above = low < at if open_low else low <= at
    below = at < high if open_high else at <= high
    if not (math.isfinite(at) and above and below):
        span = f"{'>' if open_low else '>='} {low:g}"
        if math.isfinite(high):
            span += f" and {'<' if open_high else '<='} {high:g}"
        raise ConfigError(f"{field}={value!r} is not possible; use a number {span}.")


def check_count(field: str, value: object, *, low: int) -> None:
    """Raise `ConfigError` unless ``value`` is a whole number of at least ``low``."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < low:  # type: ignore[operator]
        raise ConfigError(f"{field}={value!r} is not possible; use a whole number >= {low}.")
