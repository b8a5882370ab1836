"""What the routes work with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends
from starlette.requests import HTTPConnection

from turnout.dashboard.access import Access
from turnout.dashboard.live import LiveHub
from turnout.dashboard.queries.fleet import Fleets
from turnout.dashboard.reader import StoreReader
from turnout.dashboard.telemetry import Telemetry

#: Returns what `turnout methods --json` prints.
Catalogue = Callable[[], Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Services:
    """One dashboard's parts."""

    reader: StoreReader
    fleets: Fleets
    live: LiveHub
    access: Access
    telemetry: Telemetry
    catalogue: Catalogue


def services(connection: HTTPConnection) -> Services:
    """Return the parts of the dashboard that answers."""
    found: Services = connection.app.state.services
    return found


Parts = Annotated[Services, Depends(services)]
