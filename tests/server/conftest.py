from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turnout.server import RunDescription, RunStore
from turnout.strategies import ClientReport, RoundReport
from turnout.wire import ParameterLayout, as_array

sys.path[:0] = [str(Path(__file__).parent)]  # For `stopping`.


class CountingStrategy:
    """Stands for a strategy: its state is what a checkpoint must bring back."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def keep_rows(self, directory: Path, run: str) -> None:
        """It keeps nothing per client."""

    def state_dict(self) -> dict[str, Any]:
        return self.state


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


@pytest.fixture
def description() -> RunDescription:
    return RunDescription(
        name="trial",
        strategy="fedavg",
        task="digits",
        seed=7,
        num_rounds=6,
        num_clients=4,
        config={"run": {"rounds": 6, "seed": 7}, "strategy": {"name": "fedavg"}},
    )


@pytest.fixture
def arrays() -> Any:
    from flwr.app import ArrayRecord

    record = ArrayRecord()
    record["w"] = as_array(np.arange(6, dtype=np.float32).reshape(2, 3))
    record["steps"] = as_array(np.array([3], dtype=np.int64))
    assert ParameterLayout.from_arrays(record).size == 6
    return record


@pytest.fixture
def report(arrays: Any) -> Callable[..., RoundReport]:
    """Make the report of a round: two clients took part, one failed, the strategy's state is the round."""
    strategy = CountingStrategy()

    def make(
        server_round: int, *, clients: list[ClientReport] | None = None, **metrics: float
    ) -> RoundReport:
        strategy.state = {"round": server_round, "x": np.full(3, float(server_round))}
        if clients is None:
            clients = [
                ClientReport(2, "ok", "", 30, 0.75, 1, 0.5, 0.01),
                ClientReport(0, "ok", "", 10, 0.25, 0, 0.7, 0.02),
                ClientReport(3, "failed", "client-error: Traceback\nValueError: boom"),
            ]
        return RoundReport(
            server_round=server_round,
            arrays=arrays,
            train_metrics={"train-loss": 1.0 / server_round},
            evaluate_metrics={"accuracy": 0.1 * server_round, **metrics},
            diagnostics={"max-weight": 2.0},
            clients=clients,
            seconds={"select": 0.1, "train": 0.2, "fold": 0.05, "finish": 0.01, "evaluate": 0.02},
            strategy=strategy,  # type: ignore[arg-type]
            grid=object(),  # type: ignore[arg-type]
        )

    return make
