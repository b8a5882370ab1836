"""What state a run is in: its row says how it ended, its lock and its heartbeat whether it lives."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from turnout.server.errors import RunDirectoryError
from turnout.server.run_directory import RunDirectory

if TYPE_CHECKING:
    from sqlalchemy import Row

    from turnout.dashboard.models.fields import RunStatus
    from turnout.dashboard.reader import StoreReader

_QUIET_SECONDS: Final = 60.0
_QUIET_ROUNDS: Final = 10.0


def run_status(reader: StoreReader, run: Row[Any], rounds_done: int) -> RunStatus:
    """Return the status of ``run``.

    ``lost`` when no process holds its directory; ``stale`` when it has not committed for ten rounds' time
    and a minute (it waits for clients, hangs, or ran on a machine that is gone).
    """
    if run.status != "running":
        ended: RunStatus = run.status
        return ended
    try:
        if not RunDirectory(reader.directory(run.directory)).in_use():
            return "lost"
    except (OSError, RunDirectoryError):
        pass  # The run is on another machine: only its heartbeat is known.
    quiet = (datetime.now(UTC) - run.heartbeat_at).total_seconds()
    per_round = run.seconds / rounds_done if rounds_done else 0.0
    return "stale" if quiet > max(_QUIET_SECONDS, _QUIET_ROUNDS * per_round) else "running"
