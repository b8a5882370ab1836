"""The dashboard: a read-only web API over a run store, live updates, and the page that shows them."""

from __future__ import annotations

from turnout.dashboard.app import create_app
from turnout.dashboard.reader import StoreReader
from turnout.dashboard.serving import Dashboard, DashboardOptions, listen

__all__ = ["Dashboard", "DashboardOptions", "StoreReader", "create_app", "listen"]
