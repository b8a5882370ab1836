"""The fleet: a gRPC server that remote clients connect to, and the Flower ``Grid`` over them."""

from __future__ import annotations

from turnout.server.commit import CommitCallback
from turnout.server.fleet.counters import FleetCounters
from turnout.server.fleet.grid import FleetGrid
from turnout.server.fleet.options import FleetOptions
from turnout.server.fleet.roster import Member, Roster
from turnout.server.fleet.server import FleetServer
from turnout.server.fleet.tls import ServerTls

__all__ = [
    "CommitCallback",
    "FleetCounters",
    "FleetGrid",
    "FleetOptions",
    "FleetServer",
    "Member",
    "Roster",
    "ServerTls",
]
