"""Runs, their rounds, series and events."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from turnout.dashboard.errors import documented
from turnout.dashboard.models.fields import RunStatus
from turnout.dashboard.models.rounds import EventPage, RoundPage, SeriesList
from turnout.dashboard.models.runs import RunDetail, RunList
from turnout.dashboard.queries.rounds import event_page, round_page
from turnout.dashboard.queries.runs import RunFilter, RunSort, run_detail, run_list
from turnout.dashboard.queries.selected_series import selected_series
from turnout.dashboard.routes.parameters import (
    After,
    AfterEvent,
    Limit,
    Offset,
    Order,
    RunId,
    SeriesName,
    Text,
    Values,
    series_key,
)
from turnout.dashboard.services import Parts

router = APIRouter(tags=["runs"])


@router.get("/runs", responses=documented())
def list_runs(
    parts: Parts,
    status: Annotated[list[RunStatus], Query(max_length=6)] = [],  # noqa: B006 - FastAPI copies it
    strategy: Values = [],  # noqa: B006
    task: Values = [],  # noqa: B006
    study: Values = [],  # noqa: B006
    q: Text = "",
    sort: RunSort = "created",
    order: Order = "desc",
    limit: Limit = 50,
    offset: Offset = 0,
) -> RunList:
    """List runs, filtered by values (any of several) and by words anywhere in what the list shows."""
    wanted = RunFilter(status=status, strategy=strategy, task=task, study=study, text=q)
    return run_list(parts.reader, wanted, sort=sort, descending=order == "desc", limit=limit, offset=offset)


@router.get("/runs/{run}", responses=documented(404))
def show_run(parts: Parts, run: RunId) -> RunDetail:
    """Show one run: its experiment, environment, totals and which series it has."""
    return run_detail(parts.reader, run)


@router.get("/runs/{run}/rounds", responses=documented(404))
def list_rounds(
    parts: Parts,
    run: RunId,
    after: After = None,
    limit: Limit = 100,
    order: Order = "asc",
    metrics: Annotated[bool, Query(description="With each round's metrics.")] = False,
) -> RoundPage:
    """List committed rounds: phases in seconds, bytes, who took part; ``next`` is the next ``after``."""
    return round_page(
        parts.reader, run, after=after, limit=limit, descending=order == "desc", metrics=metrics
    )


@router.get("/runs/{run}/series", responses=documented(404))
def show_series(
    parts: Parts,
    run: RunId,
    name: Annotated[
        list[SeriesName],
        Query(min_length=1, max_length=32, description="kind/name, such as evaluate/accuracy."),
    ],
    points: Annotated[
        int, Query(ge=4, le=20_000, description="At most so many points; a longer series keeps its extremes.")
    ] = 1_000,
) -> SeriesList:
    """Show series over the rounds; kind "round" has participants, phases' seconds and bytes."""
    return selected_series(parts.reader, run, [series_key(each) for each in name], points=points)


@router.get("/runs/{run}/events", responses=documented(404))
def list_events(parts: Parts, run: RunId, after: AfterEvent = 0, limit: Limit = 200) -> EventPage:
    """List what happened to a run, in order."""
    return event_page(parts.reader, run, after=after, limit=limit)


@router.get("/events", responses=documented())
def list_all_events(parts: Parts, after: AfterEvent = 0, limit: Limit = 200) -> EventPage:
    """List what happened to all runs, in order."""
    return event_page(parts.reader, None, after=after, limit=limit)
