"""Documents about several runs, and about what Turnout has."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from turnout.dashboard.models.fields import Document, MetricKind, Number
from turnout.dashboard.models.runs import RunSummary


class Difference(Document):
    """One key whose values differ; a value is null, and its ``has`` false, where a run has no such key."""

    path: str = Field(description="Keys from the top, joined by dots.")
    left: Any
    right: Any
    has_left: bool
    has_right: bool


class ConfigDiff(Document):
    """What two runs were told differently."""

    left: str
    right: str
    same: int = Field(description="How many keys are equal.")
    differences: list[Difference]


class ComparedSeries(Document):
    """One run's values on the common axis: null where it has none."""

    run: str
    values: list[Number]
    total: int
    exact: bool


class ComparedRun(Document):
    """One line of the final table."""

    run: RunSummary
    last: Number
    last_round: int | None
    best: Number
    best_round: int | None
    seconds: Number
    participants_mean: Number = Field(description="Participants per round.")
    sent_bytes: int | None
    received_bytes: int | None
    rounds_to_target: int | None = Field(description="First round at or beyond ``target``.")
    seconds_to_target: Number
    bytes_to_target: Number = Field(description="Sent and received; null where nobody counts.")


class Comparison(Document):
    """Series of several runs on one axis, and how they ended."""

    kind: MetricKind
    name: str
    higher_is_better: bool
    axis: Literal["round", "seconds", "bytes"]
    target: float | None = Field(description="What the runs should reach, as it was asked for.")
    x: list[Number]
    series: list[ComparedSeries]
    table: list[ComparedRun]
    available: list[str] = Field(description="kind/name of every series that any of the runs has.")


class Method(Document):
    """One entry of the method catalogue."""

    slug: str
    kind: str
    paper: str | None = Field(description="arXiv id.")
    url: str | None = Field(description="Where the paper is.")
    class_path: str
    summary: str


class MethodList(Document):
    """What an experiment can name."""

    items: list[Method]
    kinds: list[str]


class Info(Document):
    """What serves this."""

    version: str
    store: str = Field(description="What kind of store, and its file's name; no path and no password.")
    read_only: Literal[True]
    login_required: bool
    server_time: datetime
    outcomes: list[str]
    palette: dict[str, Any] = Field(description="The colours that Turnout's plots use.")


class Session(Document):
    """Whether the reader is logged in, and whether one has to be."""

    required: bool
    authenticated: bool


class Login(Document):
    """The token of the token file."""

    token: str = Field(min_length=1, max_length=512)
