"""The server: Flower's own FedAvg over all clients, with a clock."""

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


@app.main()
def main(grid: Grid, context: Context) -> None:
    config: dict[str, Any] = dict(context.run_config)
    seconds = run(grid, clients=config["clients"], rounds=config["rounds"], parameters=config["parameters"])
    Path(config["result"]).write_text(json.dumps({"seconds": seconds, "server_peak_mb": peak_mb()}))
