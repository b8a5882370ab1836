"""Everything that is known of a run's clients at one moment, and columns of it to sort and to spread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from sqlalchemy import Connection, Row, select

from turnout.dashboard.queries.activities import Activities
from turnout.dashboard.queries.activity import Activity
from turnout.dashboard.queries.client_numbers import ClientNumbers
from turnout.dashboard.queries.replies import LastReplies, Reply
from turnout.dashboard.queries.runs import find_run
from turnout.dashboard.reader import StoreReader
from turnout.server.schema import ClientRow
from turnout.wire import NDArray

_OF_REPLY: Final[dict[str, Callable[[Reply], float | None]]] = {
    "train-loss": lambda reply: reply.train_loss,
    "train-seconds": lambda reply: reply.train_seconds,
    "update-norm": lambda reply: reply.update_norm,
    "num-examples": lambda reply: float(reply.num_examples),
}
_OF_NUMBERS: Final[dict[str, Callable[[ClientNumbers], NDArray]]] = {
    "participation": lambda numbers: numbers.seen / max(numbers.rounds_done, 1),
    "weight-share": lambda numbers: numbers.weight_share,
    "staleness": lambda numbers: numbers.staleness,
    "max-staleness": lambda numbers: numbers.max_staleness,
    "failures": lambda numbers: numbers.failed + numbers.rejected + numbers.missing,
}


@dataclass(frozen=True)
class Fleet:
    """A run's clients: what they did, what they last replied, how its members described themselves."""

    run: Row[Any]
    activity: Activity
    numbers: ClientNumbers
    replies: dict[int, Reply]
    members: dict[int, Row[Any]]

    @cached_property
    def columns(self) -> list[str]:
        """Names that `column` takes."""
        reported = sorted({name for reply in self.replies.values() for name in reply.metrics} - {"client-id"})
        return list(dict.fromkeys((*_OF_REPLY, *_OF_NUMBERS, *reported)))

    def column(self, name: str) -> NDArray:
        """Return one number of every client, NaN where it is unknown, in the order of `ClientNumbers`."""
        if name in _OF_NUMBERS:
            return np.asarray(_OF_NUMBERS[name](self.numbers), dtype=np.float64)
        read = _OF_REPLY.get(name) or (lambda reply: reply.metrics.get(name))
        values = np.full(len(self.numbers.clients), np.nan)
        for place, client in enumerate(self.numbers.clients.tolist()):
            reply = self.replies.get(client)
            value = None if reply is None else read(reply)
            if value is not None and np.isfinite(value):
                values[place] = value
        return values


class Fleets:
    """Makes `Fleet`s, with what is remembered of the runs looked at last."""

    def __init__(self, reader: StoreReader) -> None:
        self.activities = Activities(reader)
        self._replies = LastReplies()

    def of(self, connection: Connection, run: str) -> Fleet:
        """Return the clients of ``run``. Raises `UnknownRun`."""
        row = find_run(connection, run)
        activity = self.activities.of(connection, row)
        numbers = self.activities.numbers(connection, run, activity)
        replies = self._replies.of(connection, run, activity.generation, numbers)
        members = connection.execute(select(ClientRow.__table__).where(ClientRow.run_id == run))
        return Fleet(row, activity, numbers, replies, {member.client: member for member in members})

    def clear(self) -> None:
        """Forget everything: the store is another one."""
        self.activities.clear()
        self._replies.clear()
