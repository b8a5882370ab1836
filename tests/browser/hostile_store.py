"""A run whose every text is an attack."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import insert

from turnout.server import RunStore
from turnout.server.schema import ClientRoundRow, EventRow, MetricRow, RoundRow, RunRow

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOSTILE = "<script>document.title='owned'</script>\n<img src=x onerror=alert(1)>\u202eevil"
ROUNDS = (1, 2, 3)
CLIENTS = (0, 2**64 - 1)


def hostile_run(store: RunStore) -> str:
    """Add the run and return its id."""
    store.create_run(
        RunRow(
            id="hostile0",
            name=HOSTILE,
            strategy=HOSTILE,
            task=HOSTILE,
            status="failed",
            study=HOSTILE,
            seed=0,
            num_rounds=3,
            num_clients=2,
            directory="hostile",
            config={HOSTILE: {HOSTILE: HOSTILE}, "strategy": {"name": HOSTILE}},
            created_at=MOMENT,
            heartbeat_at=MOMENT,
            finished_at=MOMENT,
            seconds=12.5,
            error=HOSTILE,
        )
    )
    common: dict[str, Any] = {"run_id": "hostile0"}
    with store._writer.begin() as connection:
        connection.execute(insert(RoundRow), [_round(number) | common for number in ROUNDS])
        connection.execute(
            insert(ClientRoundRow),
            [_client_round(number, client) | common for number in ROUNDS for client in CLIENTS],
        )
        connection.execute(
            insert(MetricRow),
            [
                {"kind": kind, "name": HOSTILE, "round": number, "value": 0.5} | common
                for kind in ("evaluate", "diagnostics")
                for number in ROUNDS
            ],
        )
        event = {"round": 1, "kind": HOSTILE, "message": HOSTILE, "created_at": MOMENT}
        connection.execute(insert(EventRow), [event | common])
    return "hostile0"


def _round(number: int) -> dict[str, Any]:
    counts = {"invited": 2, "participants": 0, "failed": 2, "rejected": 0, "missing": 0}
    phases = ("select", "train", "fold", "finish", "evaluate")
    return {
        "round": number,
        "committed_at": MOMENT,
        **counts,
        **{f"{phase}_seconds": 0.1 for phase in phases},
    }


def _client_round(number: int, client: int) -> dict[str, Any]:
    text = {"outcome": "failed", "role": HOSTILE, "reason": HOSTILE}
    return {"round": number, "client": client, "num_examples": 20, "staleness": 1, **text}
