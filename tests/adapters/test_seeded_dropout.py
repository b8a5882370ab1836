"""Dropout of adapters: the draws of a client's round, the same wherever it trains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from turnout.experiment import Experiment
from turnout.experiment.build import build
from turnout.peft.seeded_dropout import SeededDropout
from turnout.wire import ConfigError

X = torch.ones(200, 50)


def drawn(seed: tuple[int, ...], name: str = "layer", server_round: int = 1) -> torch.Tensor:
    layer = SeededDropout(0.3, name)
    layer.start_training(server_round, seed)
    first: torch.Tensor = layer(X)
    assert not torch.equal(layer(X), first)  # Every step draws anew.
    return first


def test_entries_are_dropped_and_the_mean_stays() -> None:
    y = drawn((0, 1, 2))
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


def test_draws_follow_from_seed_and_layer_alone() -> None:
    torch.manual_seed(0)
    first = drawn((0, 1, 2))
    state = torch.get_rng_state()
    assert torch.equal(drawn((0, 1, 2)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(drawn((0, 1, 3)), first)
    assert not torch.equal(drawn((0, 1, 2), "other"), first)


def test_nothing_is_dropped_in_evaluation() -> None:
    layer = SeededDropout(0.3, "layer")
    layer.start_training(1, (0,))
    layer.eval()
    assert torch.equal(layer(X), X)
    layer.train()
    layer.end_training()
    torch.manual_seed(1)
    expected = torch.nn.functional.dropout(X, 0.3)
    torch.manual_seed(1)
    assert torch.equal(layer(X), expected)  # An ordinary loop has ordinary dropout.


def trained(executor: str, **peft: Any) -> np.ndarray[Any, Any]:
    made = build(
        Experiment.from_dict(
            {
                "run": {"rounds": 2, "seed": 2},
                "task": {"name": "digits", "num_clients": 3},
                "peft": {"name": "lora", "r": 2, **peft},
                "client": {"lr": 0.1, "local_steps": 3},
                "simulation": {"executor": executor, "workers": 2},
            }
        )
    )
    made.strategy.start(made.grid, made.task.initial_arrays(), num_rounds=2)
    assert {report.outcome for report in made.strategy.reports} == {"ok"}
    vector: np.ndarray[Any, Any] = made.strategy.x
    return vector.copy()


def test_executors_draw_the_same() -> None:
    serial = trained("serial", lora_dropout=0.3)
    assert not np.array_equal(trained("serial"), serial)
    for executor in ("threads", "processes"):
        np.testing.assert_array_equal(trained(executor, lora_dropout=0.3), serial)


def test_a_probability_is_below_1() -> None:
    with pytest.raises(ConfigError, match="lora_dropout"):
        trained("serial", lora_dropout=1.0)
