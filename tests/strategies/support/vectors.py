"""Drives strategies vector by vector, without messages, in float64 where formulas are checked to 1e-12."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from turnout.strategies import Reply, StreamingStrategy
from turnout.strategies.exact_sum import peak

Vector = np.ndarray[Any, np.dtype[np.float64]]


def prepared(strategy: Any, size: int = 5, x: Any = None) -> Any:
    """Return the strategy with a model to start from, zero unless given."""
    strategy.prepare(np.zeros(size) if x is None else x)
    return strategy


def one_round(
    strategy: StreamingStrategy,
    server_round: int,
    num_clients: int,
    updates: Mapping[int, Any],
    *,
    role: str = "sgd",
    controls: Mapping[int, Any] | None = None,
    examples: Mapping[int, int] | None = None,
) -> Any:
    """Run a round in which the clients of ``updates`` reply, and return the new model."""
    strategy.begin_round(server_round, range(num_clients))
    for client, update in updates.items():
        vectors = {"control": controls[client]} if controls else {}
        count = examples[client] if examples else 1
        strategy.accept(server_round, Reply(client, update, count, peak(update), role, vectors))
    return strategy.end_round(server_round)


def step_of(strategy: StreamingStrategy, *args: Any, **options: Any) -> Vector:
    """Run a round and return how the model moved."""
    before = np.array(strategy.x)
    return np.asarray(one_round(strategy, *args, **options)) - before


def random_updates(rng: np.random.Generator, clients: Iterable[int], size: int = 5) -> dict[int, Vector]:
    return {client: rng.standard_normal(size) for client in clients}
