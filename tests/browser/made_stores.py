"""Run stores with content that no quick run would have: very large, or hostile."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import insert

from turnout.server import RunStore
from turnout.server.schema import ClientRoundRow, EventRow, MetricRow, RoundRow, RunRow

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOSTILE = "<script>document.title='owned'</script>\n<img src=x onerror=alert(1)>\u202eevil\u0000"


def run_row(run_id: str, **changes: Any) -> RunRow:
    """Return a finished run's row."""
    columns: dict[str, Any] = {
        "id": run_id,
        "name": "made",
        "strategy": "fedavg",
        "task": "digits",
        "status": "finished",
        "study": None,
        "seed": 0,
        "num_rounds": 3,
        "num_clients": 4,
        "directory": run_id,
        "config": {"run": {"seed": 0}, "strategy": {"name": "fedavg"}},
        "created_at": START,
        "heartbeat_at": START,
        "finished_at": START,
        "seconds": 12.5,
    }
    return RunRow(**columns | changes)


def large_run(store: RunStore, *, clients: int = 1_000, rounds: int = 5_000, rate: float = 0.06) -> str:
    """Add a run in which each client takes part in about ``rate`` of the rounds, and return its id."""
    run_id = "large000"
    store.create_run(run_row(run_id, name="large", num_clients=clients, num_rounds=rounds))
    rng = np.random.default_rng(0)
    rates = rng.beta(0.8, 12, clients) * rate / (0.8 / 12.8)
    outcomes = np.array(["ok", "failed", "rejected", "missing"])
    with store._writer.begin() as connection:
        for first in range(1, rounds + 1, 250):
            numbers = range(first, min(first + 250, rounds + 1))
            invited = [np.flatnonzero(rng.random(clients) < rates) for _ in numbers]
            connection.execute(
                insert(RoundRow),
                [_round(run_id, number, len(who)) for number, who in zip(numbers, invited, strict=True)],
            )
            rows = [
                _client_round(run_id, number, int(client), str(rng.choice(outcomes, p=(0.96, 0.02, 0.01, 0.01))))
                for number, who in zip(numbers, invited, strict=True)
                for client in who
            ]
            connection.execute(insert(ClientRoundRow), rows)
            curve = {"accuracy": lambda at: 1 - float(np.exp(-at / 900)), "loss": lambda at: 2.3 * 0.999**at}
            for name, value in curve.items():
                connection.execute(
                    insert(MetricRow),
                    [
                        {"run_id": run_id, "kind": "evaluate", "name": name, "round": at, "value": value(at)}
                        for at in numbers
                    ],
                )
    return run_id


def hostile_run(store: RunStore) -> str:
    """Add a run whose every text is an attack, and return its id."""
    run_id = "hostile0"
    text = HOSTILE.replace("\0", "")
    store.create_run(
        run_row(
            run_id,
            name=text,
            strategy=text,
            task=text,
            status="failed",
            error=text,
            study=text,
            config={text: {text: text}, "strategy": {"name": text}},
        )
    )
    with store._writer.begin() as connection:
        connection.execute(insert(RoundRow), [_round(run_id, number, 2) for number in (1, 2, 3)])
        connection.execute(
            insert(ClientRoundRow),
            [
                {**_client_round(run_id, number, client, "failed"), "reason": text, "role": text[:40]}
                for number in (1, 2, 3)
                for client in (0, 2**64 - 1)
            ],
        )
        connection.execute(
            insert(MetricRow),
            [
                {"run_id": run_id, "kind": kind, "name": text, "round": number, "value": 0.5}
                for kind in ("evaluate", "diagnostics")
                for number in (1, 2, 3)
            ],
        )
        connection.execute(
            insert(EventRow),
            [{"run_id": run_id, "round": 1, "kind": text, "message": text, "created_at": START}],
        )
    return run_id


def make_large_store(folder: Path) -> str:
    """Make a store with one large run in ``folder`` and return the run's id."""
    with RunStore(folder) as store:
        return large_run(store)


def _round(run_id: str, number: int, invited: int) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "round": number,
        "invited": invited,
        "participants": invited,
        "failed": 0,
        "rejected": 0,
        "missing": 0,
        "select_seconds": 0.01,
        "train_seconds": 0.5,
        "fold_seconds": 0.1,
        "finish_seconds": 0.02,
        "evaluate_seconds": 0.1,
        "committed_at": START + timedelta(seconds=number),
        "sent_bytes": 40_000 * invited,
        "received_bytes": 39_000 * invited,
    }


def _client_round(run_id: str, number: int, client: int, outcome: str) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "round": number,
        "client": client,
        "outcome": outcome,
        "role": "train",
        "reason": None if outcome == "ok" else "deadline",
        "num_examples": 20 + client % 30,
        "weight": 0.01 if outcome == "ok" else None,
        "staleness": number % 17,
        "train_loss": 1.5 if outcome == "ok" else None,
        "train_seconds": 0.2,
    }
