"""The server: FedAvg over all clients, with a clock; Flower's own, or with Turnout's parts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class TimedFedAvg(FedAvg):
    """Notes when each round begins. Evaluation is off: a round is one exchange with all clients."""

    def __init__(self, clients: int) -> None:
        super().__init__(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self.began: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        # From here on all clients are there; waiting for them is no part of a round.
        self.began.append(time.perf_counter())
        return messages


def run(grid: Grid, *, clients: int, rounds: int, parameters: int) -> list[float]:
    """Return the seconds of each round."""
    strategy = TimedFedAvg(clients)
    initial = ArrayRecord([np.zeros(parameters, np.float32)])
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds, timeout=600)
    ends = [*strategy.began[1:], time.perf_counter()]
    return [end - begin for begin, end in zip(strategy.began, ends, strict=True)]


def peak_mb() -> float:
    """Return this process's peak resident memory in MB of 1e6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6


def run_turnout(grid: Grid, *, clients: int, rounds: int, parameters: int) -> list[float]:
    """Return the seconds of each round of Turnout's FedAvg on Flower's grid, replies pulled one by one."""
    from turnout.server.flower import FlowerGrid
    from turnout.strategies import Callback, FedAvg, RoundReport

    seconds: list[float] = []

    class Clock(Callback):
        def on_round_end(self, report: RoundReport) -> None:
            if any(client.outcome != "ok" for client in report.clients):
                raise RuntimeError(f"round {report.server_round}: {report.clients}")
            seconds.append(sum(report.seconds[name] for name in ("select", "train", "finish")))

    initial = ArrayRecord([np.zeros(parameters, np.float32)])
    engine = FlowerGrid(grid, min_clients=clients)
    engine.get_node_ids()  # Waiting for them is no part of a round.
    FedAvg(num_clients=clients).start(engine, initial, num_rounds=rounds, timeout=600, callbacks=[Clock()])
    return seconds


@app.main()
def main(grid: Grid, context: Context) -> None:
    config: dict[str, Any] = dict(context.run_config)
    settings = {name: config[name] for name in ("clients", "rounds", "parameters")}
    if hasattr(grid, "pull_interval"):
        grid.pull_interval = 0.01  # 0.1 s otherwise, in the simulation; SuperLink's 3 s are fixed.
    if config["engine"] == "turnout":
        seconds = run_turnout(grid, **settings)
    elif config["engine"] == "stock":
        from turnout.server.flower import FlowerGrid

        seconds = run(FlowerGrid(grid, min_clients=config["clients"]), **settings)
    else:
        seconds = run(grid, **settings)
    document = {"seconds": seconds, "server_peak_mb": peak_mb()}
    Path(config["result"]).write_text(json.dumps(document))
