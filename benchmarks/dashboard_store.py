"""A run store as large as the dashboard is made for: long runs with many clients, filled by bulk inserts."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from turnout.server.run_directory import RunDirectory
from turnout.server.store import RunStore

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
RUN_COLUMNS = (
    "id", "name", "strategy", "task", "status", "study", "seed", "num_rounds", "num_clients", "directory",
    "config", "created_at", "heartbeat_at", "finished_at", "seconds", "model_sha256", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """How large one run is."""

    rounds: int
    clients: int
    participation: float
    series: int


def fill(folder: Path, big: Shape, small_runs: int) -> str:
    """Make a store in ``folder``: a run of shape ``big``, whose id is returned, and small ones."""
    RunStore(folder).close()
    connection = sqlite3.connect(folder / "turnout.sqlite")
    connection.execute("PRAGMA synchronous=OFF")
    _add_run(connection, folder, "b1900001", big, seed=0)
    for number in range(small_runs):
        _add_run(connection, folder, f"a{number:07x}", Shape(200, 60, 0.1, 8), seed=number + 1)
    connection.commit()
    connection.close()
    return "b1900001"


def _add_run(connection: sqlite3.Connection, folder: Path, run: str, shape: Shape, seed: int) -> None:
    random = np.random.default_rng(seed)
    config = {"run": {"name": "bench", "seed": seed, "rounds": shape.rounds}, "strategy": {"name": "fedau"}}
    RunDirectory.create(folder / run, experiment=config, environment={"python": "3.11"})
    began = BEGAN + timedelta(minutes=seed)
    ended = _text(began + timedelta(seconds=shape.rounds))
    row = (
        run, f"bench-{seed % 7}", ("fedavg", "fedau", "fedstale")[seed % 3], "digits", "finished",
        f"study-{seed % 5}", seed, shape.rounds, shape.clients, run, json.dumps(config), _text(began), ended,
        ended, float(shape.rounds), "0" * 64, None,
    )  # fmt: skip
    connection.execute(
        f"INSERT INTO runs ({','.join(RUN_COLUMNS)}) VALUES ({','.join('?' * len(RUN_COLUMNS))})", row
    )
    connection.execute(
        "INSERT INTO events (run_id, round, kind, message, created_at) VALUES (?,?,?,?,?)",
        (run, None, "created", "made by the benchmark", _text(began)),
    )
    _add_metrics(connection, run, shape, random)
    _add_rounds(connection, run, shape, random, began)


def _add_metrics(connection: sqlite3.Connection, run: str, shape: Shape, random: np.random.Generator) -> None:
    names = [("evaluate", "accuracy"), ("evaluate", "loss"), ("train", "train-loss")]
    names += [("diagnostics", f"diagnostic-{number:03d}") for number in range(shape.series - len(names))]
    for kind, name in sorted(names):
        curve = 1 - np.exp(-np.arange(1, shape.rounds + 1) / (shape.rounds / 4))
        values = (curve + random.normal(0, 0.02, shape.rounds)).tolist()
        connection.executemany(
            "INSERT INTO metrics (run_id, kind, name, round, value) VALUES (?,?,?,?,?)",
            [(run, kind, name, number, value) for number, value in enumerate(values, 1)],
        )


def _add_rounds(
    connection: sqlite3.Connection, run: str, shape: Shape, random: np.random.Generator, began: datetime
) -> None:
    chance = np.clip(random.beta(1, 4, shape.clients) * shape.participation / 0.2, 0.005, 1)
    for number in range(1, shape.rounds + 1):
        cohort = np.flatnonzero(random.random(shape.clients) < chance).tolist()
        outcomes = random.choice(["ok", "failed", "missing"], len(cohort), p=[0.94, 0.02, 0.04]).tolist()
        counts = [outcomes.count(outcome) for outcome in ("ok", "failed", "rejected", "missing")]
        connection.execute(
            "INSERT INTO rounds (run_id, round, invited, participants, failed, rejected, missing,"
            " select_seconds, train_seconds, fold_seconds, finish_seconds, evaluate_seconds, committed_at,"
            " sent_bytes, received_bytes) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (run, number, len(cohort), *counts, 0.01, 0.7, 0.1, 0.05, 0.2,
             _text(began + timedelta(seconds=number)), 40_000 * len(cohort), 40_000 * counts[0]),
        )  # fmt: skip
        connection.executemany(
            "INSERT INTO client_rounds (run_id, round, client, outcome, role, reason, num_examples, weight,"
            " staleness, train_loss, train_seconds, update_norm, metrics)"
            " VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
            list(_client_rows(run, number, cohort, outcomes, random)),
        )


def _client_rows(
    run: str, number: int, cohort: list[int], outcomes: list[str], random: np.random.Generator
) -> Iterator[tuple[Any, ...]]:
    losses, norms = random.gamma(2, 0.3, len(cohort)).tolist(), random.gamma(3, 0.1, len(cohort)).tolist()
    for client, outcome, loss, norm in zip(cohort, outcomes, losses, norms, strict=True):
        if outcome != "ok":
            reason = "worker raised ValueError" if outcome == "failed" else None
            yield (run, number, client, outcome, "sgd", reason, 0, None, 3, None, None, None, None)
            continue
        metrics = {
            "num-examples": 100.0, "client-id": float(client), "train-loss": loss, "train-seconds": 0.5,
            "accuracy": 1 / (1 + loss), "samples-per-second": 200.0, "gpu-utilization": 0.5,
        }  # fmt: skip
        yield (
            run, number, client, outcome, "sgd", None, 100, 1 / len(cohort), 3, loss, 0.5, norm,
            json.dumps(metrics),
        )  # fmt: skip


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S.%f")
