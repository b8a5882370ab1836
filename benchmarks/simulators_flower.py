"""Flower's simulation engine on Ray in the simulator benchmark: Flower's FedAvg over Turnout's own clients.

Both engines so run the same client code. Each Ray actor has one core, no dependency is installed at run time,
and nothing is reported to anyone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fleet_parties import Turns
from simulators_turnout import ENDLESS, Ended, make_app
from simulators_turns import Gate, cores
from simulators_work import Federation, Workload
from turnout.wire import ParameterLayout

REGISTER_SECONDS = 0.01


@functools.cache
def _app(work: Workload) -> ClientApp:
    """Return the clients of this process; an actor makes them once."""
    torch.set_num_threads(1)
    return make_app(Federation(work))


def client_app(work: Workload) -> ClientApp:
    """Return an app that is small to send: it names the workload, and each actor builds its own."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        # Node ids are random in Flower, so the server says which client a node is in this round.
        context.node_config["partition-id"] = message.content["config"]["client"]
        return _app(work)(message, context)

    return app


class Cohort(FedAvg):
    """Flower's FedAvg, except that the workload says who takes part."""

    def __init__(self, work: Workload) -> None:
        super().__init__(fraction_evaluate=0.0)
        self._work = work

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        while len(nodes := list(grid.get_node_ids())) < self._work.clients:
            time.sleep(REGISTER_SECONDS)  # They register while the first round begins.
        cohort = self._work.cohort_of(server_round)
        messages = []
        for node, client in zip(nodes[: len(cohort)], cohort, strict=True):
            about = ConfigRecord({**config, "server-round": server_round, "client": client})
            content = RecordDict({"arrays": arrays, "config": about})
            messages.append(Message(content, dst_node_id=node, message_type="train"))
        return messages


def flower_ray(turns: Turns, work: Workload, pull_seconds: float) -> None:
    """``pull_seconds``: how often the server looks for replies; Flower's default is 0.1."""
    os.environ |= {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    from flwr.simulation import run_simulation

    for name in ("flwr", "ray"):
        logging.getLogger(name).setLevel("ERROR")
    torch.set_num_threads(1)
    gate, initial = Gate(turns), Federation(work).initial_arrays()
    app = ServerApp()

    def paused(server_round: int, arrays: ArrayRecord) -> None:
        layout = ParameterLayout.from_arrays(arrays)
        going = gate.passed(lambda: layout.flatten(arrays)) if server_round else gate.ready()
        if not going:
            raise Ended

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        grid.pull_interval = pull_seconds  # type: ignore[attr-defined]
        Cohort(work).start(grid, initial, num_rounds=ENDLESS, timeout=600, evaluate_fn=paused)

    with contextlib.suppress(Ended):
        run_simulation(
            app,
            client_app(work),
            num_supernodes=work.clients,
            backend_config=_backend(),
        )


def _backend() -> dict[str, Any]:
    return {
        "init_args": {"num_cpus": cores(), "num_gpus": 0, "logging_level": "ERROR", "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
