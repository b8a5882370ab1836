"""Local training in mixed precision: near to float32, and the same bits wherever it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from turnout.client import client_app
from turnout.client.batched.trainer import BatchedTrainer
from turnout.client.options import TrainOptions
from turnout.experiment import Experiment
from turnout.experiment.build import build
from turnout.simulation import LocalGrid
from turnout.strategies import EGGROLL, FedAvg
from turnout.tasks import Digits
from turnout.wire import ConfigError


def trained(precision: str, executor: str = "serial", **sections: Any) -> np.ndarray[Any, Any]:
    made = build(
        Experiment.from_dict(
            {
                "run": {"rounds": 2, "seed": 2},
                "task": {"name": "digits", "num_clients": 3},
                "client": {"lr": 0.1, "local_steps": 3, "precision": precision},
                "simulation": {"executor": executor, "workers": 2},
                **sections,
            }
        )
    )
    made.strategy.start(made.grid, made.task.initial_arrays(), num_rounds=2)
    assert {report.outcome for report in made.strategy.reports} == {"ok"}
    vector: np.ndarray[Any, Any] = made.strategy.x
    assert vector.dtype == np.float32
    return vector.copy()


ADAPTERS: list[dict[str, Any]] = [
    {},
    {"peft": {"name": "lora", "r": 4, "base_dtype": "bfloat16"}},
    {"peft": {"name": "lift", "r": 2, "filter_rank": 4}},
    {"peft": {"name": "tera"}},
]


@pytest.mark.parametrize("sections", ADAPTERS, ids=["whole", "lora", "lift", "tera"])
def test_it_is_near_to_float32(sections: dict[str, Any]) -> None:
    exact, mixed = trained("float32", **sections), trained("bf16-mixed", **sections)
    assert not np.array_equal(exact, mixed)
    assert np.abs(exact - mixed).max() < 0.01


def test_executors_end_with_the_same_bits() -> None:
    serial = trained("bf16-mixed")
    for executor in ("threads", "processes"):
        np.testing.assert_array_equal(trained("bf16-mixed", executor), serial)


def test_the_loss_sees_float32_outputs() -> None:
    seen: list[torch.dtype] = []

    class Watched(Digits):
        def loss(self, output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            seen.append(output.dtype)
            assert not torch.is_autocast_enabled("cpu")
            return super().loss(output, y)

    task = Watched(num_clients=1)
    grid = LocalGrid(client_app(task, precision="bf16-mixed", local_steps=2), 1, executor="serial")
    FedAvg().start(grid, task.initial_arrays(), num_rounds=1)
    assert set(seen) == {torch.float32}


def test_where_it_is_not_possible_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'bf16-mixed'"):
        TrainOptions(precision="bf16-mixd")  # type: ignore[arg-type]
    together = BatchedTrainer(Digits(num_clients=2), TrainOptions(precision="bf16-mixed"))
    assert "precision" in (together.refusal("sgd") or "")
    task, strategy = Digits(num_clients=2), EGGROLL()
    grid = LocalGrid(client_app(task, precision="bf16-mixed", local_steps=1), 2, executor="serial")
    strategy.start(grid, task.initial_arrays(), num_rounds=1)
    assert all("precision='bf16-mixed'" in report.reason for report in strategy.reports)
