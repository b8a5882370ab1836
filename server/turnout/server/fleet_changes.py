"""What a round's commit takes from the fleet it ran on: bytes moved, and clients whose entry has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


class _Counters(Protocol):
    sent_bytes: int
    received_bytes: int


class _Member(Protocol):
    id: int
    name: str
    attributes: dict[str, Any]
    offences: int


class _Roster(Protocol):
    @property
    def members(self) -> Mapping[int, _Member]: ...


class _Server(Protocol):
    @property
    def counters(self) -> _Counters: ...

    @property
    def roster(self) -> _Roster: ...


@runtime_checkable
class _OnFleet(Protocol):
    """A grid over remote clients; named by shape, so that recording a simulation needs no gRPC."""

    @property
    def server(self) -> _Server: ...


class FleetChanges:
    """Differences since the last call; empty for grids without a server."""

    def __init__(self) -> None:
        self._bytes = (0, 0)
        # Attributes are replaced, never changed in place, so the object tells whether they are the same.
        self._known: dict[int, tuple[dict[str, Any], int]] = {}

    def traffic(self, grid: object) -> tuple[int | None, int | None]:
        """Return the bytes sent and received since the last call; None when nobody counts."""
        if not isinstance(grid, _OnFleet):
            return None, None
        counters = grid.server.counters
        before, self._bytes = self._bytes, (counters.sent_bytes, counters.received_bytes)
        return self._bytes[0] - before[0], self._bytes[1] - before[1]

    def members(self, grid: object) -> list[dict[str, Any]]:
        """Return the columns of the clients that are new or differ from the last call."""
        if not isinstance(grid, _OnFleet):
            return []
        changed = []
        for member in list(grid.server.roster.members.values()):
            attributes, offences = member.attributes, member.offences
            known = self._known.get(member.id)
            if known is not None and known[0] is attributes and known[1] == offences:
                continue
            self._known[member.id] = attributes, offences
            changed.append(
                {
                    "client": member.id,
                    "name": member.name,
                    "device": str(attributes.get("device", "")),
                    "examples": int(attributes.get("examples", 0)),
                    "tags": dict(attributes.get("tags", {})),
                    "offences": offences,
                }
            )
        return changed
