"""What keeps a federation's runs: store, run directories, recorder, plots. Never imports PyTorch."""

from __future__ import annotations

from turnout.server.errors import RunDirectoryError, StoreError
from turnout.server.history import RunHistory
from turnout.server.recorder import RunDescription, RunRecorder, model_sha256
from turnout.server.run_directory import RunDirectory
from turnout.server.schema import ClientRoundRow, ClientRow, EventRow, MetricRow, RoundRow, RunRow
from turnout.server.store import RunStore

__all__ = [
    "ClientRoundRow",
    "ClientRow",
    "EventRow",
    "MetricRow",
    "RoundRow",
    "RunDescription",
    "RunDirectory",
    "RunDirectoryError",
    "RunHistory",
    "RunRecorder",
    "RunRow",
    "RunStore",
    "StoreError",
    "model_sha256",
]
