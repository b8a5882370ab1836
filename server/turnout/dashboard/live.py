"""Live updates: one watcher of the store wakes all streams, and each reads what is new since its cursor.

The store is the queue. A stream holds nothing but its place in it, so that a slow reader costs no memory and
slows nobody: when it asks again, it gets the newest state; when it has fallen far behind, it is told to load
the page's data anew.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

import anyio
from sqlalchemy import Connection, Row, select, text

from turnout.dashboard.models.fields import Document
from turnout.dashboard.models.live import Bye, Hello, NewRounds, Resync, Update
from turnout.dashboard.models.rounds import EventItem
from turnout.dashboard.models.runs import RunSummary
from turnout.dashboard.queries.rounds import events_after, last_event, rounds_after
from turnout.dashboard.queries.runs import rounds_done, server_time, summary
from turnout.dashboard.reader import StoreReader
from turnout.dashboard.telemetry import Telemetry
from turnout.server.environment import package_version
from turnout.server.errors import StoreError
from turnout.server.schema import RunRow

MOST_SUBSCRIBERS: Final = 100
_WATCH_SECONDS: Final = 0.25
_LIVENESS_SECONDS: Final = 5.0
_PAUSE_SECONDS: Final = 0.2  # Between two messages: at most five a second.
_ROUNDS_PER_MESSAGE: Final = 100
_EVENTS_PER_MESSAGE: Final = 200
_RUNS_PER_MESSAGE: Final = 200
_BEHIND_ROUNDS: Final = 2_000
_CURSOR: Final = re.compile(r"\d{1,18}(?:\.\d{1,9}){0,8}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cursor:
    """A place in the store: the last event seen, and the last round seen of every run that is followed."""

    event: int
    rounds: tuple[int, ...]

    @classmethod
    def parse(cls, words: str, runs: int) -> Cursor | None:
        """Return the cursor that ``words`` says for so many runs; None when it says none."""
        if not _CURSOR.fullmatch(words):
            return None
        event, *rounds = (int(part) for part in words.split("."))
        return cls(event, tuple(rounds)) if len(rounds) == runs else None

    def __str__(self) -> str:
        return ".".join(str(part) for part in (self.event, *self.rounds))


@dataclass(frozen=True)
class Message:
    """One message of a stream, ready to be sent."""

    event: str
    data: Document
    id: str | None = None

    @property
    def text(self) -> str:
        """The data as ASCII: FastAPI would tear JSON apart at the line separators of other alphabets."""
        return json.dumps(self.data.model_dump(mode="json"), allow_nan=False, separators=(",", ":"))


@dataclass
class _Follower:
    """What one stream was sent last."""

    runs: list[str]
    cursor: Cursor
    sent: dict[str, tuple[object, ...]] = field(default_factory=dict)


class LiveHub:
    """Watches the store while anyone listens. `close` ends all streams with a last message."""

    def __init__(self, reader: StoreReader, telemetry: Telemetry) -> None:
        self._reader, self._telemetry = reader, telemetry
        self._news = asyncio.Event()
        self._closing = asyncio.Event()
        self._subscribers = 0
        self._watcher: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def full(self) -> bool:
        """Whether no further stream may be opened."""
        return self._subscribers >= MOST_SUBSCRIBERS

    def start(self) -> None:
        """Remember the loop that streams run on; called on it."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """End all streams soon; from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._closing.set)

    async def messages(self, runs: list[str], after: str | None) -> AsyncIterator[Message]:
        """Yield the messages of a stream that follows ``runs`` (the run list, if empty) from ``after`` on."""
        self._subscribers += 1
        self._telemetry.subscribers.inc()
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
        try:
            async for message in self._stream(runs, after):
                self._telemetry.messages.labels(message.event).inc()
                yield message
        finally:
            self._subscribers -= 1
            self._telemetry.subscribers.dec()
            if not self._subscribers and self._watcher is not None:
                self._watcher.cancel()
                self._watcher = None

    async def _stream(self, runs: list[str], after: str | None) -> AsyncIterator[Message]:
        try:
            now = await anyio.to_thread.run_sync(self._place, runs)
        except StoreError:
            yield Message("bye", Bye(reason="store-gone"))
            return
        cursor = now if after is None else Cursor.parse(after, len(runs))
        lost = cursor is None or cursor.event > now.event
        follower = _Follower(runs, now if cursor is None or lost else cursor)
        hello = Hello(version=package_version("turnout") or "", server_time=server_time(), runs=runs)
        yield Message("hello", hello, str(follower.cursor))
        if lost:
            yield Message("resync", Resync(runs=runs, reason="unknown-cursor"), str(follower.cursor))
        while not self._closing.is_set():
            news = self._news
            try:
                messages, more = await anyio.to_thread.run_sync(self._changes, follower)
            except StoreError as error:  # Gone for now: the page says so by /readyz; the stream waits.
                _log.debug("%s", error)
                messages, more = [], False
            for message in messages:
                yield message
                await self._until(None, _PAUSE_SECONDS)
            if not more:
                await self._until(news, _LIVENESS_SECONDS)
        yield Message("bye", Bye(reason="shutdown"))

    async def _until(self, news: asyncio.Event | None, seconds: float) -> None:
        """Wait for news, for the end, or for so long."""
        waits = [asyncio.create_task(event.wait()) for event in (self._closing, news) if event is not None]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _watch(self) -> None:
        """Wake the streams whenever something was committed."""
        seen: object = None
        with _Watched(self._reader) as watched:
            while True:
                try:
                    now = await anyio.to_thread.run_sync(watched.version)
                except Exception as error:
                    _log.debug("store not readable: %s", error)
                    now = None
                if now != seen:
                    seen = now
                    news, self._news = self._news, asyncio.Event()
                    news.set()
                await asyncio.sleep(_WATCH_SECONDS)

    def _place(self, runs: list[str]) -> Cursor:
        with self._reader.connect() as connection:
            return Cursor(last_event(connection), tuple(rounds_done(connection, run) for run in runs))

    def _changes(self, follower: _Follower) -> tuple[list[Message], bool]:
        """Return the messages that bring ``follower`` up to date, and whether there is yet more."""
        with self._reader.connect() as connection:
            events = events_after(
                connection, follower.runs or None, follower.cursor.event, _EVENTS_PER_MESSAGE
            )
            messages = self._rewinds(connection, follower, events)
            fresh, more = self._new_rounds(connection, follower)
            summaries = self._summaries(connection, follower, events)
        if events:
            follower.cursor = replace(follower.cursor, event=events[-1].id)
        if events or fresh or summaries:
            update = Update(runs=summaries, rounds=fresh, events=events)
            messages.append(Message("update", update, str(follower.cursor)))
        return messages, more or len(events) == _EVENTS_PER_MESSAGE

    def _rewinds(self, connection: Connection, follower: _Follower, events: list[EventItem]) -> list[Message]:
        """Move cursors that rounds were taken away from, or that are too far behind; say so."""
        found: dict[str, list[str]] = {"rewound": [], "behind": []}
        places = list(follower.cursor.rounds)
        for index, run in enumerate(follower.runs):
            done = rounds_done(connection, run)
            back = [event.round or 0 for event in events if event.run == run and event.kind == "resumed"]
            rewound = min([*back, done])
            if rewound < places[index]:
                places[index] = rewound
                found["rewound"].append(run)
            if done - places[index] > _BEHIND_ROUNDS:
                places[index] = done
                found["behind"].append(run)
        follower.cursor = replace(follower.cursor, rounds=tuple(places))
        return [
            Message("resync", Resync(runs=runs, reason=reason), str(follower.cursor))  # type: ignore[arg-type]
            for reason, runs in found.items()
            if runs
        ]

    def _new_rounds(self, connection: Connection, follower: _Follower) -> tuple[list[NewRounds], bool]:
        found, places = [], list(follower.cursor.rounds)
        for index, run in enumerate(follower.runs):
            items = rounds_after(connection, run, places[index], _ROUNDS_PER_MESSAGE)
            if items:
                places[index] = items[-1].round
                found.append(NewRounds(run=run, items=items, more=len(items) == _ROUNDS_PER_MESSAGE))
        follower.cursor = replace(follower.cursor, rounds=tuple(places))
        return found, any(each.more for each in found)

    def _summaries(
        self, connection: Connection, follower: _Follower, events: list[EventItem]
    ) -> list[RunSummary]:
        """Return the runs whose state differs from what was sent last."""
        if follower.runs:
            wanted = set(follower.runs)
        else:
            running = select(RunRow.id).where(RunRow.status == "running").order_by(RunRow.heartbeat_at.desc())
            wanted = {row[0] for row in connection.execute(running.limit(_RUNS_PER_MESSAGE))}
            wanted |= {event.run for event in events}
            wanted |= {
                run for run, state in follower.sent.items() if state[0] in ("running", "stale", "lost")
            }
        rows: list[Row[Any]] = list(
            connection.execute(
                select(RunRow.__table__).where(RunRow.id.in_(list(wanted)[:_RUNS_PER_MESSAGE]))
            )
        )
        changed = []
        for row in rows:
            brief = summary(self._reader, connection, row)
            state = (brief.status, brief.heartbeat_at, brief.rounds_done)
            if follower.sent.get(row.id) != state:
                follower.sent[row.id] = state
                changed.append(brief)
        return changed


class _Watched:
    """Asks the store whether anything was committed: SQLite by its data version, others by their contents."""

    def __init__(self, reader: StoreReader) -> None:
        self._reader = reader

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.forget_watch()

    def version(self) -> object:
        """Return what differs after every commit of another connection."""
        if self._reader.path is not None:
            return self._reader.data_version()
        with self._reader.connect() as connection:
            return tuple(
                connection.execute(
                    text("SELECT (SELECT max(id) FROM events), max(heartbeat_at), count(*) FROM runs")
                ).one()
            )
