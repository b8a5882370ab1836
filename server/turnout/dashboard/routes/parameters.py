"""Parameters that several routes take; their bounds keep every value inside what a database can compare."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

from fastapi import Path, Query

MOST_ROUNDS: Final = 2**31 - 1

RunId: TypeAlias = Annotated[
    str, Path(min_length=1, max_length=64, pattern=r"^[\w.-]+$", description="A run's id, in full.")
]
ClientId: TypeAlias = Annotated[int, Path(ge=0, lt=2**64, description="A client's id.")]
Limit: TypeAlias = Annotated[int, Query(ge=1, le=500, description="At most so many items.")]
Offset: TypeAlias = Annotated[int, Query(ge=0, le=MOST_ROUNDS, description="Skip so many items.")]
After: TypeAlias = Annotated[
    int | None, Query(ge=0, le=MOST_ROUNDS, description="Cursor: the last round of the page before.")
]
AfterEvent: TypeAlias = Annotated[
    int, Query(ge=0, lt=2**63, description="Cursor: the last event that was seen.")
]
Order: TypeAlias = Annotated[Literal["asc", "desc"], Query(description="Ascending or descending.")]
Text: TypeAlias = Annotated[str, Query(max_length=200, description="Words to search for.")]
Values: TypeAlias = Annotated[list[Annotated[str, Query(max_length=200)]], Query(max_length=50)]
Runs: TypeAlias = Annotated[
    list[Annotated[str, Query(max_length=64, pattern=r"^[\w.-]+$")]],
    Query(min_length=1, max_length=8, description="One to eight runs' ids."),
]
SERIES_PATTERN: Final = r"^(train|evaluate|diagnostics|round)/[\s\S]{1,200}$"
SeriesName: TypeAlias = Annotated[str, Query(pattern=SERIES_PATTERN, max_length=220)]
SPAN_PATTERN: Final = r"^[0-9]{0,9}:[0-9]{0,9}$"
Span: TypeAlias = Annotated[
    str,
    Query(
        pattern=SPAN_PATTERN, max_length=19, description="first:last, both included; either may be left out."
    ),
]


def span(text: str) -> tuple[int | None, int | None]:
    """Return the ends of ``first:last``; None for one that was left out."""
    first, _, last = text.partition(":")
    return int(first) if first else None, int(last) if last else None


def series_key(name: str) -> tuple[str, str]:
    """Return kind and name of ``kind/name``."""
    kind, _, rest = name.partition("/")
    return kind, rest
