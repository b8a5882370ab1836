"""Turnout in the simulator benchmark: its public API, with everything on that `turnout simulate` has."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fleet_parties import Turns
from simulators_turns import Gate
from simulators_work import Cohorts, Federation, Workload
from turnout.client import client_app
from turnout.server.recorder import RunDescription, RunRecorder
from turnout.server.store import RunStore
from turnout.simulation import LocalGrid
from turnout.strategies import Callback, FedAvg, RoundReport
from turnout.wire import ParameterLayout

CHECKPOINT_EVERY = 10
ENDLESS = 10**9


class Ended(Exception):  # noqa: N818 - not an error
    """No more rounds are asked for."""


class Pause(Callback):
    """Holds the run between two rounds, after everything of the round is recorded."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def on_round_end(self, report: RoundReport) -> None:
        layout = ParameterLayout.from_arrays(report.arrays)
        if not self._gate.passed(lambda: layout.flatten(report.arrays)):
            raise Ended


def make_app(task: Federation) -> ClientApp:
    """Return the clients: plain SGD, or, without epochs, clients that return what they received."""
    work = task.work
    if work.epochs:
        return client_app(
            task,
            lr=work.lr,
            batch_size=work.batch_size,
            local_epochs=work.epochs,
            seed=work.seed,
            device=work.device,
        )
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord(
            {"num-examples": work.examples, "client-id": int(context.node_config["partition-id"])}
        )
        content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def turnout(turns: Turns, work: Workload, executor: str) -> None:
    """A recorded run: participation model, FedAvg, metrics, run store, a checkpoint every 10 rounds."""
    logging.getLogger("turnout").setLevel("ERROR")
    task, gate = Federation(work), Gate(turns)
    grid = LocalGrid(
        make_app(task), work.clients, participation=Cohorts(work), executor=executor, seed=work.seed
    )
    strategy = FedAvg(num_clients=work.clients, seed=work.seed)
    with tempfile.TemporaryDirectory(prefix="simulators-") as folder, RunStore(folder) as store:
        description = RunDescription(
            name="simulators", strategy="fedavg", task=task.name, seed=work.seed, num_rounds=ENDLESS,
            num_clients=work.clients, config={},
        )  # fmt: skip
        recorder = RunRecorder.create(store, Path(folder), description, checkpoint_every=CHECKPOINT_EVERY)
        try:
            with recorder:
                if gate.ready():
                    strategy.start(
                        grid, task.initial_arrays(), num_rounds=ENDLESS, callbacks=[recorder, Pause(gate)]
                    )
        except Ended:
            pass
