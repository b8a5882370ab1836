"""Documents about rounds, series and events."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from turnout.dashboard.models.fields import ClientText, Document, MetricKind, Number


class PhaseSeconds(Document):
    """Seconds by phase; folding happens inside training, as replies arrive."""

    select: Number
    train: Number
    fold: Number
    finish: Number
    evaluate: Number
    checkpoint: Number


class RoundMetrics(Document):
    """What was measured in one round."""

    train: dict[str, Number]
    evaluate: dict[str, Number]
    diagnostics: dict[str, Number]


class RoundItem(Document):
    """One committed round."""

    round: int
    invited: int
    participants: int
    failed: int
    rejected: int
    missing: int
    seconds: PhaseSeconds
    sent_bytes: int | None
    received_bytes: int | None
    has_checkpoint: bool
    committed_at: datetime
    metrics: RoundMetrics | None = Field(description="Only when asked for with metrics=true.")


class RoundPage(Document):
    """Rounds in the order asked for; ``next`` is the cursor of the next page, null at the end."""

    items: list[RoundItem]
    rounds_done: int
    next: int | None


class Series(Document):
    """One series; ``exact`` says that no point was left out."""

    kind: MetricKind
    name: str
    rounds: list[int]
    values: list[Number]
    total: int = Field(description="Points that the store has.")
    exact: bool


class SeriesList(Document):
    """Series of one run. ``seconds`` has the seconds of work up to each round of ``clock_rounds``."""

    run: str
    rounds_done: int
    series: list[Series]
    clock_rounds: list[int]
    seconds: list[Number]


class EventItem(Document):
    """One thing that happened to a run."""

    id: int
    run: str
    round: int | None
    kind: str
    message: str
    created_at: datetime


class EventPage(Document):
    """Events in order; ``next`` is the ``after`` to go on with, whether there is more or not."""

    items: list[EventItem]
    next: int
    more: bool


class ParticipationLayout(Document):
    """How the bytes of ``/participation`` with the same parameters are laid out.

    Rows are clients, columns rounds, row by row. In an exact window a cell is ``outcome + 16 * role``,
    indices into ``outcomes`` and ``roles`` (role 0 is none). In an overview (``planes`` = 2) a cell stands
    for ``row_step`` clients and ``column_step`` rounds (fewer at the edges); the first plane has the share of
    those cells in which a client took part, 0 to 255; the second the worst outcome among them, as an index
    into ``outcomes``, where rejected is worse than failed, failed than missing, missing than ok.
    """

    rows: int
    columns: int
    planes: int
    row_step: int
    column_step: int
    first_round: int
    last_round: int
    first_client: int = Field(description="Index of the first row's client in the order asked for.")
    total_rounds: int
    total_clients: int
    outcomes: list[str]
    roles: list[str]
    clients: list[ClientText] = Field(
        description="Ids of the window's clients in row order; in an overview the first of each row."
    )
