"""Numbers as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def metric_text(name: str, value: float | None) -> str:
    """Return a metric's value: accuracies in percent, others with three digits."""
    if value is None or not math.isfinite(value):
        return "diverged"
    return f"{100 * value:.1f} %" if name == "accuracy" else f"{value:.3g}"


def seconds_text(seconds: float) -> str:
    """Return a duration: ``3.2 s``, ``4 min 10 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def age_text(moment: datetime) -> str:
    """Return how long ago ``moment`` was."""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for size, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def claim_text(value: float | int | str) -> str:
    """Return a claim's figure: text as it is, numbers with three digits."""
    if isinstance(value, str):
        return value
    return f"{value:.3g}" if math.isfinite(value) else "not finite"
