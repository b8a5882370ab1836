"""Says who comes to a fleet and who goes, a few lines a second at most."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import groupby
from typing import Final

from turnout.cli.output import Output
from turnout.server.fleet import FleetServer

_FIRST_SECONDS: Final = 0.02  # A short run may be over soon after its clients came.
_PAUSE_SECONDS: Final = 0.3
_SHOWN_NODES: Final = 5


class FleetWatch:
    """Tells of clients of ``server`` that connect and leave; ``num_clients`` is how many there can be.

    Make it when the grid is made: both want to know of changes.
    """

    def __init__(self, server: FleetServer, output: Output, num_clients: int) -> None:
        self._server, self._output, self._num_clients = server, output, num_clients
        self._shown: dict[int, str] = {}
        self._due = False
        self._others = server.hub.changed
        server.hub.changed = self._changed

    def _changed(self) -> None:
        self._others()
        if not self._due:  # A thousand nodes that come together are one line.
            self._due = True
            pause = _PAUSE_SECONDS if self._shown else _FIRST_SECONDS
            asyncio.get_running_loop().call_later(pause, self._tell)

    def _tell(self) -> None:
        self._due = False
        members = self._server.roster.members
        now = {client: members[client].name.partition("/")[0] for client in self._server.hub.connections}
        came = {client: node for client, node in now.items() if self._shown.get(client) != node}
        gone = {client: node for client, node in self._shown.items() if client not in now}
        self._shown = now
        counted = f"{len(now)} of {self._num_clients} clients connected"
        for verb, clients in (("connected", came), ("gone", gone)):
            if clients:
                self._output.say(f"{_nodes(clients)} {verb}; {counted}", markup=False)


def _nodes(clients: dict[int, str]) -> str:
    """Return ``edge-1 (clients 0-4), edge-2 (client 7)``."""
    by_node: dict[str, list[int]] = {}
    for client, node in clients.items():
        by_node.setdefault(node, []).append(client)
    shown = [
        f"{node} (client{'s' if len(ids) > 1 else ''} {ranges(ids)})"
        for node, ids in list(by_node.items())[:_SHOWN_NODES]
    ]
    more = len(by_node) - len(shown)
    return ", ".join(shown) + (f" and {more} other nodes" if more else "")


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as people write them: ``0-4,7``; long lists are cut."""
    runs = []
    for _, group in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ",".join(runs) if len(runs) <= 8 else ",".join(runs[:8]) + ",..."
