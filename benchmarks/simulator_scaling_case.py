"""One case of the scaling benchmark: a recorded run in a process of its own."""

from __future__ import annotations

import logging
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fleet_parties import Turns, memory_mb
from simulators_work import Cohorts, Workload
from turnout.server.recorder import RunDescription, RunRecorder
from turnout.server.store import RunStore
from turnout.simulation import LocalGrid
from turnout.strategies import Callback, RoundReport
from turnout.wire import ParameterLayout, as_array, find

CHECKPOINT_EVERY = 10
WARM_UP = 3
MOVES = 8


@dataclass(frozen=True)
class Case:
    """A strategy, N clients, k of them per round, d parameters.

    ``memory`` is that of strategies with one; ``budget_gb`` bounds the process's own (0: no bound).
    """

    strategy: str
    clients: int
    cohort: int
    parameters: int
    rounds: int
    memory: str = "ram"
    budget_gb: float = 0.0


def moving_app(parameters: int) -> ClientApp:
    """Return clients that reply the received model, moved by one of eight fixed vectors."""
    moves = np.random.default_rng(1).standard_normal((MOVES, parameters), np.float32) * np.float32(1e-3)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        received = message.content["arrays"]
        layout = ParameterLayout.from_arrays(received)
        arrays = layout.record(layout.flatten(received) + moves[client % MOVES])
        metrics = MetricRecord({"num-examples": 100, "client-id": client})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


class Clock(Callback):
    """Notes when each round ends, after it was recorded."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_round_end(self, report: RoundReport) -> None:
        self.ends.append(time.perf_counter())


def run_case(turns: Turns, case: Case) -> None:
    """Answer with milliseconds per round and memory."""
    logging.getLogger("turnout").setLevel("ERROR")
    if case.budget_gb:
        # What is not backed by a file; the file's pages are the kernel's to drop.
        resource.setrlimit(resource.RLIMIT_DATA, (int(case.budget_gb * 1e9),) * 2)
    work = Workload(model="mlp", clients=case.clients, cohort=case.cohort)
    grid = LocalGrid(moving_app(case.parameters), case.clients, participation=Cohorts(work))
    options = {} if case.memory == "ram" else {"memory": case.memory}
    strategy = find("strategy", case.strategy).target(num_clients=case.clients, **options)
    arrays, clock = ArrayRecord(), Clock()
    arrays["0"] = as_array(np.zeros(case.parameters, np.float32))
    rounds = WARM_UP + case.rounds
    # A checkpoint waits until the file's new rows are on disk: what that costs is another question.
    every = CHECKPOINT_EVERY if case.memory == "ram" else rounds + 1
    turns.ready()
    turns.wait()
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder, RunStore(folder) as store:
        description = RunDescription(
            name="scaling", strategy=case.strategy, task="none", seed=0, num_rounds=rounds + 1,
            num_clients=case.clients, config={},
        )  # fmt: skip
        recorder = RunRecorder.create(store, Path(folder), description, checkpoint_every=every)
        clock.ends = [time.perf_counter()]
        with recorder:
            strategy.start(grid, arrays, num_rounds=rounds, callbacks=[recorder, clock])
    seconds = np.diff(clock.ends)
    turns.answer(
        first_ms=1e3 * float(seconds[0]),
        median_ms=1e3 * statistics.median(seconds[WARM_UP:]),
        mean_ms=1e3 * float(np.mean(seconds[WARM_UP:])),
        peak_mb=memory_mb("VmHWM"),
        own_mb=memory_mb("RssAnon"),
        mapped_mb=memory_mb("RssFile"),
        stored_gb=strategy.memory_bytes() / 1e9,
        limit_ms=1e3 * _limit(case) if case.memory != "ram" else 0.0,
    )


def _limit(case: Case) -> float:
    """Return the seconds that reading and writing one cohort's rows in such a file takes by itself."""
    place = case.memory.partition(":")[2] or None
    row = np.ones(case.parameters, np.float32)
    with tempfile.NamedTemporaryFile(dir=place) as file:
        rows = np.memmap(file.name, np.float32, "w+", shape=(case.clients, case.parameters))
        started = time.perf_counter()
        for client in Workload(model="mlp", clients=case.clients, cohort=case.cohort).cohort_of(1):
            rows[client] = rows[client] + row
        return time.perf_counter() - started
