"""Clients of a run, who took part when, and how the run treats them."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from starlette.responses import Response

from turnout.dashboard.errors import documented
from turnout.dashboard.models.clients import Attention, ClientDetail, ClientPage, ClientRoundPage, Fairness
from turnout.dashboard.models.rounds import ParticipationLayout
from turnout.dashboard.queries.attention import attention
from turnout.dashboard.queries.clients import ClientSort, client_detail, client_page, client_rounds
from turnout.dashboard.queries.fairness import fairness
from turnout.dashboard.queries.participation import Matrix, RowOrder, Window, participation
from turnout.dashboard.routes.parameters import After, ClientId, Limit, Offset, Order, RunId, Span, Text, span
from turnout.dashboard.services import Parts

router = APIRouter(tags=["clients"])


@router.get("/runs/{run}/clients", responses=documented(404))
def list_clients(
    parts: Parts,
    run: RunId,
    q: Text = "",
    sort: ClientSort = "client",
    order: Order = "asc",
    limit: Limit = 50,
    offset: Offset = 0,
) -> ClientPage:
    """List clients; ``q`` looks into id, name and device; unknown numbers come last."""
    return client_page(
        parts.reader,
        parts.fleets,
        run,
        text=q,
        sort=sort,
        descending=order == "desc",
        limit=limit,
        offset=offset,
    )


@router.get("/runs/{run}/clients/{client}", responses=documented(404))
def show_client(parts: Parts, run: RunId, client: ClientId) -> ClientDetail:
    """Show one client with all numbers of its last taken reply."""
    return client_detail(parts.reader, parts.fleets, run, client)


@router.get("/runs/{run}/clients/{client}/rounds", responses=documented(404))
def list_client_rounds(
    parts: Parts, run: RunId, client: ClientId, after: After = None, limit: Limit = 100, order: Order = "desc"
) -> ClientRoundPage:
    """List what one client did in the rounds that it was invited to."""
    return client_rounds(
        parts.reader, parts.fleets, run, client, after=after, limit=limit, descending=order == "desc"
    )


@router.get("/runs/{run}/fairness", responses=documented(404))
def show_fairness(
    parts: Parts,
    run: RunId,
    metric: Annotated[
        str | None,
        Query(min_length=1, max_length=64, description="Left out: accuracy if reported, else loss."),
    ] = None,
) -> Fairness:
    """Show how a number is spread over the clients."""
    return fairness(parts.reader, parts.fleets, run, metric)


@router.get("/runs/{run}/attention", responses=documented(404))
def show_attention(parts: Parts, run: RunId, limit: Limit = 50) -> Attention:
    """Show which clients need attention, and why; the most serious first."""
    return attention(parts.reader, parts.fleets, run, limit)


def _participation(
    parts: Parts,
    run: RunId,
    rounds: Span = ":",
    clients: Annotated[
        Span, Query(description="Indices of rows in the order asked for, first:last, from 0.")
    ] = ":",
    sort: RowOrder = "client",
    order: Order = "asc",
    rows: Annotated[int, Query(ge=1, le=4_000, description="At most so many rows.")] = 2_000,
    columns: Annotated[int, Query(ge=1, le=4_000, description="At most so many columns.")] = 2_000,
) -> Matrix:
    first_round, last_round = span(rounds)
    first_client, last_client = span(clients)
    window = Window(1 if first_round is None else first_round, last_round, first_client or 0, last_client)
    return participation(
        parts.reader,
        parts.fleets.activities,
        run,
        window,
        most_rows=rows,
        most_columns=columns,
        order=sort,
        descending=order == "desc",
    )


_Participation = Annotated[Matrix, Depends(_participation)]
_BYTES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One byte per cell and plane, row by row; the layout is in the header "
        "X-Turnout-Layout (JSON, without the clients' ids) and at /participation/layout.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        "headers": {"X-Turnout-Layout": {"schema": {"type": "string"}}},
    }
}


@router.get("/runs/{run}/participation", responses=_BYTES | documented(404), response_class=Response)
def show_participation(found: _Participation) -> Response:
    """Send the participation matrix, or part of it, as bytes.

    A window that fits into ``rows`` and ``columns`` is exact; a larger one becomes an overview.
    """
    header = json.dumps(found.layout.model_dump(exclude={"clients"}), separators=(",", ":"))
    return Response(found.body(), media_type="application/octet-stream", headers={"X-Turnout-Layout": header})


@router.get("/runs/{run}/participation/layout", responses=documented(404))
def show_participation_layout(found: _Participation) -> ParticipationLayout:
    """Say how the bytes for the same parameters are laid out, with the clients' ids."""
    return found.layout
