"""Who takes part in a round: whoever is connected and eligible, or those whom a participation model names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from turnout.server.fleet.server import FleetServer
from turnout.wire import NDArray
from turnout.wire.errors import ConfigError

_SHOWN = 8


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
        server.hub.changed = self._notify

    def available(self) -> list[int]:
        """Return the clients that can work now, in ascending order."""
        return sorted(client for client in list(self._server.hub.connections) if self._may_work(client))

    def expected(self, server_round: int) -> list[int] | None:
        """Return who takes part in ``server_round``; None when no participation model says so."""
        if self._participation is None:
            return None
        named: list[int] = np.flatnonzero(self._participation.mask(server_round)).tolist()
        members = self._server.roster.members
        return [client for client in named if client not in members or self._may_work(client)]

    def wait(self, server_round: int) -> list[int]:
        """Return the round's clients once they are connected. Raises `ConfigError` when too few come."""
        present: list[int] = []

        def enough() -> bool:
            expected = self.expected(server_round)
            self._enough = self._min_clients if expected is None else len(expected)
            present[:] = self.available()
            if expected is None:
                return len(present) >= self._min_clients
            present[:] = sorted(set(present) & set(expected))
            return len(present) == len(expected)

        with self._changed:
            complete = self._changed.wait_for(enough, self._wait)
        if not complete and (self._participation is None or len(present) < self._min_clients):
            expected = self.expected(server_round)
            asked = f"min_clients={self._min_clients}"
            if expected is not None:
                asked = f"round {server_round} is for clients {_brief(expected)}"
            raise ConfigError(
                f"{asked}, but after {self._wait:g} seconds only {len(present)} are connected to "
                f"{self._server.address}."
            )
        return present

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
