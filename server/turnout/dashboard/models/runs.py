"""Documents about runs."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from turnout.dashboard.models.fields import Document, MetricKind, Number, RunStatus


class Headline(Document):
    """The metric that stands for a run: accuracy where it is measured, else the first held-out metric."""

    kind: MetricKind
    name: str
    higher_is_better: bool
    last: Number
    last_round: int
    best: Number
    best_round: int
    sparkline: list[Number] = Field(
        description="At most 60 values, evenly spaced over the rounds measured; null for not-a-number."
    )


class RunSummary(Document):
    """One line of the run list."""

    id: str
    name: str
    strategy: str
    task: str
    study: str | None
    status: RunStatus
    seed: int
    rounds_done: int
    num_rounds: int
    num_clients: int
    created_at: datetime
    heartbeat_at: datetime = Field(description="When the run last committed or changed its state.")
    finished_at: datetime | None
    seconds: Number = Field(description="Seconds of work so far, over all parts of the run.")
    error: str | None = Field(description="First line of what ended it.")
    headline: Headline | None


class Facet(Document):
    """How many of the store's runs have one value."""

    value: str
    count: int


class Facets(Document):
    """What the list can be filtered by: counts over the whole store, most frequent first, at most 100."""

    status: list[Facet]
    strategy: list[Facet]
    task: list[Facet]
    study: list[Facet]


class RunList(Document):
    """A page of runs; ``total`` counts those that match the filter."""

    items: list[RunSummary]
    total: int
    limit: int
    offset: int
    facets: Facets


class SeriesSummary(Document):
    """One series that a run has, and how it ended."""

    kind: MetricKind
    name: str
    last: Number
    last_round: int


class Totals(Document):
    """Sums over the committed rounds."""

    invited: int
    participants: int
    failed: int
    rejected: int
    missing: int
    sent_bytes: int | None = Field(description="Model bytes to the clients; null where nobody counts.")
    received_bytes: int | None


class RunDetail(RunSummary):
    """One run with what it was told and computed on."""

    directory: str = Field(description="Name of the run's directory, without its path.")
    config: dict[str, Any] = Field(description="The experiment as it was resolved.")
    environment: dict[str, Any] | None = Field(
        description="Versions and hardware; null where the run's directory is not on this machine."
    )
    error_text: str | None = Field(description="All of what ended it.")
    model_sha256: str | None
    totals: Totals
    series: list[SeriesSummary]
    median_round_seconds: Number = Field(description="Over the last 50 rounds.")
    eta_seconds: Number = Field(description="Until the last round, for a live run.")
