"""The live stream: server-sent events, one stream per page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException

from turnout.dashboard.errors import documented
from turnout.dashboard.queries.runs import find_run
from turnout.dashboard.services import Parts

router = APIRouter(tags=["live"])

_RETRY_MILLISECONDS: Final = 2_000
_Cursor = Annotated[
    str | None,
    Query(
        max_length=110, description="The id of the last message that was seen; Last-Event-ID is the stronger."
    ),
]
_Runs = Annotated[
    list[Annotated[str, Query(max_length=64, pattern=r"^[\w.-]+$")]],
    Query(max_length=8, description="Runs to follow, at most eight; none for the run list."),
]


def _followed(parts: Parts, run: _Runs = []) -> list[str]:  # noqa: B006 - FastAPI copies it
    """Return the runs to follow. Raises `UnknownRun`, and 429 when there are too many streams."""
    if parts.live.full:
        raise HTTPException(429, "too many live streams are open; close one.", {"Retry-After": "10"})
    runs = list(dict.fromkeys(run))
    with parts.reader.connect() as connection:
        for each in runs:
            find_run(connection, each)
    return runs


@router.get("/stream", responses=documented(404, 429), response_class=EventSourceResponse)
async def stream(
    parts: Parts,
    runs: Annotated[list[str], Depends(_followed)],
    after: _Cursor = None,
    last_event_id: Annotated[str | None, Header(max_length=110)] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Follow runs, or the run list, as server-sent events.

    Events: ``hello`` (`Hello`), ``update`` (`Update`), ``resync`` (`Resync`: load what is shown again),
    ``bye`` (`Bye`: the server stops). Every id is a cursor; a reader that comes back with it misses nothing.
    """
    async for message in parts.live.messages(runs, last_event_id or after):
        yield ServerSentEvent(
            raw_data=message.text, event=message.event, id=message.id, retry=_RETRY_MILLISECONDS
        )
