"""Clients one after the other, in this thread."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable

from flwr.app import Message

from turnout.simulation.executors.base import Executor


class SerialExecutor(Executor):
    """One client at a time, in the order of the requests; one reply exists at a time."""

    def run(
        self, requests: Iterable[Message], *, server_round: int, deadline: float | None, ordered: bool
    ) -> Generator[Message, None, None]:
        """Yield the replies in the order of the requests."""
        for request in requests:
            if deadline is None:
                yield self.clients.deliver(request, server_round=server_round)
                continue
            if time.monotonic() > deadline:
                return
            reply = self.clients.deliver(request, server_round=server_round)
            if time.monotonic() > deadline:
                return
            yield reply
            del reply  # It must not live on while the next client runs.

    def settle(self) -> None:
        """Return at once: a client runs only while a reply is waited for."""
