"""Who takes part in a round: whoever is connected and eligible, or those whom a participation model names."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from turnout.server.fleet.server import FleetServer
from turnout.wire import NDArray
from turnout.wire.errors import ConfigError

_SHOWN = 8
_LOOK_SECONDS = 1.0


class Participation(Protocol):
    """Says who takes part in a round, as the simulation's models do."""

    def mask(self, server_round: int, /) -> NDArray:
        """Return one flag per client."""


class Attendance:
    """Waits for a round's clients; parameters as `FleetGrid`."""

    def __init__(
        self,
        server: FleetServer,
        *,
        min_clients: int,
        wait: float | None,
        participation: Participation | None,
        eligible: Callable[[Mapping[str, Any]], bool] | None,
    ) -> None:
        if min_clients < 1:
            raise ConfigError(f"min_clients must be at least 1, got {min_clients}.")
        self._server = server
        self._min_clients = min_clients
        self._wait = wait
        self._participation = participation
        self._eligible = eligible
        self._changed = threading.Condition()
        # Ten thousand clients that connect must not have ten thousand counted each time.
        self._enough = 0
        self._in_vain = 0
        server.hub.changed = self._notify

    def available(self) -> list[int]:
        """Return the clients that can work now, in ascending order."""
        streams = list(self._server.hub.connections.items())
        return sorted(c for c, stream in streams if not stream.closing and self._may_work(c))

    def expected(self, server_round: int) -> list[int] | None:
        """Return who takes part in ``server_round``; None when no participation model says so."""
        if self._participation is None:
            return None
        named: list[int] = np.flatnonzero(self._participation.mask(server_round)).tolist()
        return [client for client in named if self._is_awaited(client)]

    def wait(self, server_round: int) -> list[int]:
        """Return the round's clients once they are connected. Raises `ConfigError` when too few come."""
        seconds = 0.0 if server_round == self._in_vain else self._wait
        present: list[int] = []

        def enough() -> bool:
            expected = self.expected(server_round)
            self._enough = self._min_clients if expected is None else len(expected)
            present[:] = self.available()
            if expected is None:
                return len(present) >= self._min_clients
            present[:] = sorted(set(present) & set(expected))
            return len(present) == len(expected)

        complete = self._wait_for(enough, seconds)
        if not complete:
            self._in_vain = server_round  # Nobody waits for the same clients again in this round.
        if not complete and (self._participation is None or len(present) < self._min_clients):
            expected = self.expected(server_round)
            asked = f"min_clients={self._min_clients}"
            if expected is not None:
                asked = f"round {server_round} is for clients {_brief(expected)}"
            raise ConfigError(
                f"{asked}, but after {self._wait or 0:g} seconds only {len(present)} are connected to "
                f"{self._server.address}."
            )
        return present

    def _wait_for(self, enough: Callable[[], bool], seconds: float | None) -> bool:
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        with self._changed:
            while not enough():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                # Who may work can also change without anyone coming or going.
                self._changed.wait(min(left, _LOOK_SECONDS))
        return True

    def _is_awaited(self, client: int) -> bool:
        """Whether a round that names ``client`` waits for it: not if it came and may not work."""
        member, stream = self._server.roster.members.get(client), self._server.hub.connections.get(client)
        if member is None or (stream is None and member.offences < self._server.options.max_offences):
            return True
        undecided = self._eligible is not None and not member.settled
        return stream is not None and (undecided or self._may_work(client))

    def _may_work(self, client: int) -> bool:
        member = self._server.roster.members[client]
        if member.offences >= self._server.options.max_offences:
            return False
        return self._eligible is None or self._eligible(member.attributes)

    def _notify(self) -> None:
        if len(self._server.hub.connections) >= self._enough:
            with self._changed:
                self._changed.notify_all()


def _brief(clients: list[int]) -> str:
    shown = ", ".join(map(str, clients[:_SHOWN]))
    return shown + (f" and {len(clients) - _SHOWN} more" if len(clients) > _SHOWN else "")
