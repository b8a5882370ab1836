"""What the dashboard's tests show: small runs, simulated for real or written row by row; commands; a reader
of server-sent events.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from turnout.experiment import Experiment
from turnout.experiment.source import Source
from turnout.server import RoundRow, RunRow, RunStore
from turnout.simulation.run import simulate

STRATEGIES = ("fedavg", "fedau", "fedamd")
METHODS = [
    {"slug": "fedau", "kind": "strategy", "paper": "2306.03401", "class": "a.FedAU", "summary": "Adaptive."},
    {"slug": "digits", "kind": "task", "paper": None, "class": "b.Digits", "summary": "Digits."},
]
EXPERIMENT: dict[str, Any] = {
    "run": {"name": "shown", "rounds": 30, "evaluate_every": 2},
    "task": {
        "name": "digits",
        "model": "softmax",
        "num_clients": 12,
        "partition": "label-mix",
        "min_examples": 1,
    },
    "client": {"lr": 0.1, "batch_size": 16, "local_steps": 2},
    "strategy": {"name": "fedavg"},
    "participation": {"model": "bernoulli", "probabilities": 0.4},
}


def experiment(folder: Path, strategy: str = "fedavg", **run: Any) -> dict[str, Any]:
    return EXPERIMENT | {
        "run": EXPERIMENT["run"] | {"directory": str(folder)} | run,
        "strategy": {"name": strategy},
    }


def simulate_into(folder: Path, strategy: str, **run: Any) -> str:
    """Simulate a run in this process; return its id."""
    document = experiment(folder, strategy, **run)
    return simulate(Experiment.from_dict(document, source=Source("the test")), plots=False).run_id


def written_run(store: RunStore, run: str, **columns: Any) -> str:
    """Add a run's row, as a recorder would."""
    now = datetime.now(UTC)
    row = {
        "name": "written",
        "strategy": "fedavg",
        "task": "digits",
        "status": "finished",
        "study": None,
        "seed": 0,
        "num_rounds": 100,
        "num_clients": 4,
        "directory": "nowhere",
        "config": {"run": {"name": "written"}},
        "created_at": now,
        "heartbeat_at": now,
        "seconds": 1.0,
    }
    store.create_run(RunRow(id=run, **(row | columns)))
    return run


def commit(
    store: RunStore,
    run: str,
    number: int,
    outcomes: dict[int, str],
    *,
    measured: dict[str, float] | None = None,
    role: str = "sgd",
    **client: Any,
) -> None:
    """Commit one round in which clients had ``outcomes``."""
    values = list(outcomes.values())
    row = RoundRow(
        run_id=run,
        round=number,
        invited=len(values),
        participants=values.count("ok"),
        failed=values.count("failed"),
        rejected=values.count("rejected"),
        missing=values.count("missing"),
        select_seconds=0.0,
        train_seconds=0.5,
        fold_seconds=0.1,
        finish_seconds=0.0,
        evaluate_seconds=0.0,
        committed_at=datetime.now(UTC),
    )
    common = {
        "role": role, "reason": None, "num_examples": 3, "weight": 0.25, "staleness": 1, "train_loss": 0.5,
        "train_seconds": 0.1, "update_norm": 1.0, "metrics": None,
    }  # fmt: skip
    clients = [{"client": who, "outcome": outcome} | common | client for who, outcome in outcomes.items()]
    store.commit_round(row, {"evaluate": measured or {}}, clients, seconds=float(number))


@dataclass
class Event:
    """One server-sent event."""

    event: str
    data: Any
    id: str | None
    retry: int | None


def sse_events(lines: Iterator[str]) -> Iterator[Event]:
    """Parse server-sent events as a browser does (the parts of the format that a server may use)."""
    fields: dict[str, list[str]] = {}
    for line in lines:
        if line == "":
            if "data" in fields:
                retry = fields.get("retry")
                yield Event(
                    event=fields.get("event", ["message"])[-1],
                    data=json.loads("\n".join(fields["data"])),
                    id=fields["id"][-1] if "id" in fields else None,
                    retry=int(retry[-1]) if retry else None,
                )
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            fields.setdefault(name, []).append(value.removeprefix(" "))


def lines_of(response: httpx.Response) -> Iterator[str]:
    """Split at line feeds only: httpx would also split at separators that may be inside a name."""
    held = ""
    for text in response.iter_text():
        held += text
        *whole, held = held.split("\n")
        yield from (line.rstrip("\r") for line in whole)


def follow(url: str, params: Sequence[tuple[str, str]] = (), **options: Any) -> Iterator[Event]:
    """Open a stream and yield its events until it ends."""
    with httpx.stream("GET", url, params=list(params), timeout=httpx.Timeout(30), **options) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield from sse_events(lines_of(response))


class Command:
    """A running ``turnout`` command."""

    def __init__(self, place: Path, *arguments: object) -> None:
        self.log = place / f"{arguments[0]}-{time.monotonic_ns()}.err"
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "turnout.cli", *map(str, arguments)],
                cwd=place,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "COLUMNS": "200"},
            )

    def wait_for(self, text: str) -> str:
        """Wait until ``text`` was said; return the rest of that line."""
        deadline = time.monotonic() + 60
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"no {text!r} in {self.log.read_text()}"
            time.sleep(0.02)
        return self.log.read_text().partition(text)[2].partition("\n")[0].strip()

    def end(self, code: int = 0) -> str:
        out, _ = self.process.communicate(timeout=90)
        assert self.process.returncode == code, self.log.read_text()
        return out
