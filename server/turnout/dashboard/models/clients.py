"""Documents about clients."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from turnout.dashboard.models.fields import ClientText, Document, Number, Outcome


class ClientSummary(Document):
    """One client of a run. Numbers that it never reported are null."""

    client: ClientText
    name: str | None
    device: str | None
    invited: int
    seen: int = Field(description="Rounds in which its reply was taken.")
    failed: int
    rejected: int
    missing: int
    participation: Number = Field(description="Rounds seen over rounds committed.")
    last_round: int | None = Field(description="Last round in which its reply was taken.")
    staleness: int = Field(description="Rounds since then; rounds committed, if it never took part.")
    max_staleness: int = Field(description="Longest absence so far, in rounds.")
    mean_weight: Number
    weight_share: Number = Field(description="Its part of all the weight given in the run.")
    examples: int | None
    train_loss: Number
    train_seconds: Number = Field(description="In its last taken reply, as are the numbers below.")
    update_norm: Number
    accuracy: Number = Field(description="The accuracy that it last reported.")
    samples_per_second: Number
    memory_bytes: Number
    gpu_memory_bytes: Number
    gpu_utilization: Number = Field(description="0 to 1.")
    offences: int | None


class ClientPage(Document):
    """A page of clients; ``total`` counts those that match."""

    items: list[ClientSummary]
    total: int
    limit: int
    offset: int
    rounds_done: int


class ClientDetail(ClientSummary):
    """One client with everything that it said of itself."""

    tags: dict[str, Any]
    updated_at: datetime | None
    metrics: dict[str, Number] = Field(description="All numbers of its last taken reply.")
    metrics_round: int | None
    outcomes_by_role: dict[str, dict[str, int]] = Field(description="Counts by role, then by outcome.")


class ClientRoundItem(Document):
    """What one client did in one round."""

    round: int
    client: ClientText
    outcome: Outcome
    role: str
    reason: str | None
    num_examples: int
    weight: Number
    staleness: int
    train_loss: Number
    train_seconds: Number
    update_norm: Number
    metrics: dict[str, Number]


class ClientRoundPage(Document):
    """Rounds of one client; ``next`` is the cursor of the next page, null at the end."""

    items: list[ClientRoundItem]
    next: int | None


class FairPoint(Document):
    """One client: how often it took part and how it fares."""

    client: ClientText
    participation: Number
    value: Number


class Bin(Document):
    """One bar of a histogram: values from ``low`` to ``high``."""

    low: Number
    high: Number
    count: int


class Fairness(Document):
    """How a number is spread over the clients."""

    metric: str
    available: list[str] = Field(description="Metrics that this can be asked for.")
    higher_is_better: bool
    clients: int = Field(description="Clients that have a value.")
    without: int = Field(description="Clients without one.")
    mean: Number
    deviation: Number
    quantiles: dict[str, Number] = Field(description="min, p5, p25, p50, p75, p95, max.")
    worst_tenth: Number = Field(description="Mean over the worst tenth of the clients, at least one.")
    gini: Number = Field(description="0 when all are alike; null where values are negative.")
    correlation: Number = Field(description="Pearson correlation of the value with participation.")
    histogram: list[Bin]
    worst: list[FairPoint] = Field(description="The ten worst clients, worst first.")
    points: list[FairPoint] = Field(description="Every client, or an even sample of 2,000.")


class AttentionItem(Document):
    """One reason to look at a client, in words; the worst come first."""

    client: ClientText
    kind: Literal[
        "silent", "never-seen", "failing", "missing", "overweight", "large-update", "slow", "offences"
    ]
    severity: Number = Field(description="0 to 1.")
    message: str


class Attention(Document):
    """What needs attention; empty when nothing does."""

    items: list[AttentionItem]
    total: int
    rounds_done: int
