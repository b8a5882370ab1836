"""Clients of a run: a sorted page of them, one in full, and what one did round by round."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from sqlalchemy import select

from turnout.dashboard.models.clients import (
    ClientDetail,
    ClientPage,
    ClientRoundItem,
    ClientRoundPage,
    ClientSummary,
)
from turnout.dashboard.queries.fleet import Fleet, Fleets
from turnout.dashboard.queries.replies import numbers_only
from turnout.dashboard.queries.runs import find_run
from turnout.dashboard.reader import StoreReader
from turnout.server.documents import finite
from turnout.server.errors import StoreError
from turnout.server.history import OUTCOMES
from turnout.server.schema import ClientRoundRow
from turnout.wire import NDArray

ClientSort = Literal[
    "client", "participation", "staleness", "max-staleness", "weight-share", "failures", "num-examples",
    "train-loss", "train-seconds", "update-norm", "accuracy", "samples-per-second", "memory-bytes",
    "gpu-memory-bytes", "gpu-utilization",
]  # fmt: skip
_REASON_CHARACTERS = 8_000


class UnknownClient(StoreError):  # noqa: N818 - what it is, not that it is an error
    """The run has no such client."""


def client_page(
    reader: StoreReader,
    fleets: Fleets,
    run: str,
    *,
    text: str,
    sort: ClientSort,
    descending: bool,
    limit: int,
    offset: int,
) -> ClientPage:
    """Return one page of a run's clients; those without the number sorted by come last."""
    with reader.connect() as connection:
        fleet = fleets.of(connection, run)
    order = _ranked(fleet, sort, descending)
    if text:
        order = np.array(
            [place for place in order if _matches(fleet, int(place), text.lower())], dtype=np.int64
        )
    page = order[offset : offset + limit]
    return ClientPage(
        items=[client_summary(fleet, int(place)) for place in page],
        total=len(order),
        limit=limit,
        offset=offset,
        rounds_done=fleet.numbers.rounds_done,
    )


def client_detail(reader: StoreReader, fleets: Fleets, run: str, client: int) -> ClientDetail:
    """Return one client. Raises `UnknownClient`."""
    with reader.connect() as connection:
        fleet = fleets.of(connection, run)
    place = fleet.activity.index_of(client)
    if place is None:
        raise UnknownClient(f"client {client} is not one of run {run}.")
    member, reply = fleet.members.get(client), fleet.replies.get(client)
    mine = fleet.activity.client == place
    by_role: dict[str, dict[str, int]] = {}
    roles = ("", *fleet.activity.roles)
    pairs, counts = np.unique(
        np.stack((fleet.activity.role[mine], fleet.activity.outcome[mine])), axis=1, return_counts=True
    )
    for role, outcome, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
        by_role.setdefault(roles[role], {})[OUTCOMES[outcome]] = count
    return ClientDetail(
        **client_summary(fleet, place).model_dump(),
        tags=finite(member.tags) if member is not None and isinstance(member.tags, dict) else {},
        updated_at=None if member is None else member.updated_at,
        metrics={} if reply is None else dict(reply.metrics),
        metrics_round=None if reply is None else reply.round,
        outcomes_by_role=by_role,
    )


def client_rounds(
    reader: StoreReader,
    fleets: Fleets,
    run: str,
    client: int,
    *,
    after: int | None,
    limit: int,
    descending: bool,
) -> ClientRoundPage:
    """Return what one client did, by round, beyond the cursor ``after``. Raises `UnknownClient`."""
    with reader.connect() as connection:
        activity = fleets.activities.of(connection, find_run(connection, run))
        place = activity.index_of(client)
        if place is None:
            raise UnknownClient(f"client {client} is not one of run {run}.")
        rounds = activity.round[activity.client == place]
        if descending:
            rounds = rounds[::-1]
        if after is not None:
            rounds = rounds[rounds < after] if descending else rounds[rounds > after]
        wanted = rounds[:limit].tolist()
        # The rounds are known, so each row is one look-up by the primary key.
        query = select(ClientRoundRow.__table__).where(
            ClientRoundRow.run_id == run, ClientRoundRow.round.in_(wanted), ClientRoundRow.client == client
        )
        order = ClientRoundRow.round.desc() if descending else ClientRoundRow.round.asc()
        items = [client_round_item(row) for row in connection.execute(query.order_by(order))]
    return ClientRoundPage(items=items, next=wanted[-1] if len(rounds) > limit else None)


def client_summary(fleet: Fleet, place: int) -> ClientSummary:
    """Return one line of the clients' table."""
    numbers = fleet.numbers
    client = int(numbers.clients[place])
    member, reply = fleet.members.get(client), fleet.replies.get(client)
    metrics = {} if reply is None else reply.metrics
    seen = int(numbers.seen[place])
    return ClientSummary(
        client=str(client),
        name=None if member is None else member.name,
        device=None if member is None else member.device,
        invited=int(numbers.invited[place]),
        seen=seen,
        failed=int(numbers.failed[place]),
        rejected=int(numbers.rejected[place]),
        missing=int(numbers.missing[place]),
        participation=seen / numbers.rounds_done if numbers.rounds_done else None,
        last_round=int(numbers.last_round[place]) or None,
        staleness=int(numbers.staleness[place]),
        max_staleness=int(numbers.max_staleness[place]),
        mean_weight=float(numbers.mean_weight[place]),
        weight_share=float(numbers.weight_share[place]),
        examples=member.examples if member is not None else None if reply is None else reply.num_examples,
        train_loss=None if reply is None else reply.train_loss,
        train_seconds=None if reply is None else reply.train_seconds,
        update_norm=None if reply is None else reply.update_norm,
        accuracy=metrics.get("accuracy", metrics.get("train-accuracy")),
        samples_per_second=metrics.get("samples-per-second"),
        memory_bytes=metrics.get("memory-bytes"),
        gpu_memory_bytes=metrics.get("gpu-memory-bytes"),
        gpu_utilization=metrics.get("gpu-utilization"),
        offences=None if member is None else member.offences,
    )


def client_round_item(row: Any) -> ClientRoundItem:
    """Return the document of one invitation."""
    return ClientRoundItem(
        round=row.round,
        client=str(row.client),
        outcome=row.outcome,
        role=row.role,
        reason=row.reason[-_REASON_CHARACTERS:] if row.reason else None,
        num_examples=row.num_examples,
        weight=row.weight,
        staleness=row.staleness,
        train_loss=row.train_loss,
        train_seconds=row.train_seconds,
        update_norm=row.update_norm,
        metrics=dict(numbers_only(row.metrics)),
    )


def _ranked(fleet: Fleet, sort: ClientSort, descending: bool) -> NDArray:
    """Return the clients' places in the order asked for: unknown values last, equal ones by id."""
    count = len(fleet.numbers.clients)
    values = np.arange(count, dtype=np.float64) if sort == "client" else fleet.column(sort)
    keys = np.where(np.isnan(values), np.inf, -values if descending else values)
    return np.argsort(keys, kind="stable")


def _matches(fleet: Fleet, place: int, text: str) -> bool:
    client = int(fleet.numbers.clients[place])
    member = fleet.members.get(client)
    words = (str(client),) if member is None else (str(client), member.name.lower(), member.device.lower())
    return any(text in word for word in words)
