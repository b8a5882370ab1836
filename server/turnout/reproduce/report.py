"""What a study hands back: claims that hold or do not, tables, and figures to draw on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Value = float | int | str
Plot = Callable[[Path], list[Path]]
Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` while a study runs."""

_DIVERGED = 1e9


@dataclass(frozen=True, slots=True)
class Claim:
    """One sentence to be observed, the figure measured, what it is compared with, and the verdict."""

    claim: str
    measured: Value
    baseline: Value
    holds: bool


@dataclass(frozen=True, slots=True)
class Table:
    """Measured figures as text, ready to print; ``rows`` are as long as ``columns``."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, title: str, columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> Table:
        """Return the table, numbers formatted by `number`; raises ValueError for a row of another length."""
        cells = tuple(tuple(cell if isinstance(cell, str) else number(cell) for cell in row) for row in rows)
        for row in cells:
            if len(row) != len(columns):
                raise ValueError(f"table {title!r}: row {row} has {len(row)} cells, not {len(columns)}.")
        return cls(title, tuple(columns), cells)


@dataclass(frozen=True)
class StudyReport:
    """The outcome of ``turnout reproduce SLUG``.

    Each of ``plots`` writes its figure as PNG and SVG beside the stem it is given and returns the files.
    """

    slug: str
    seconds: float
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...]
    plots: dict[str, Plot] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return slug, seconds and claims as values that JSON can hold (NaN and infinity become text)."""
        claims = [
            {
                "claim": claim.claim,
                "measured": _plain(claim.measured),
                "baseline": _plain(claim.baseline),
                "holds": bool(claim.holds),
            }
            for claim in self.claims
        ]
        return {"slug": self.slug, "seconds": round(self.seconds, 3), "claims": claims}


def number(value: float) -> str:
    """Return ``value`` with three significant digits; what is not finite or absurdly large says so."""
    if math.isnan(value):
        return "-"
    if abs(value) > _DIVERGED:
        return "diverges"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}"


def _plain(value: Value) -> Value:
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "not finite"
    return value if isinstance(value, int) else float(f"{float(value):.6g}")
