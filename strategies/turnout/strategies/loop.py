"""The round loop behind `StreamingStrategy.start`: Flower's, with resume and callbacks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from turnout.strategies.cohort import CohortGrid
from turnout.strategies.rounds import Callback, RoundReport
from turnout.wire import CheckpointError, ConfigError, load_checkpoint

if TYPE_CHECKING:
    from turnout.strategies.streaming import StreamingStrategy

log = logging.getLogger("turnout.strategies")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


def run_rounds(
    strategy: StreamingStrategy,
    grid: Grid,
    initial_arrays: ArrayRecord,
    *,
    num_rounds: int,
    timeout: float,
    train_config: ConfigRecord | None,
    evaluate_config: ConfigRecord | None,
    evaluate_fn: EvaluateFn | None,
    resume_from: str | Path | Mapping[str, Any] | None,
    callbacks: Sequence[Callback],
) -> Result:
    """Run rounds up to ``num_rounds`` and return Flower's ``Result``; see `StreamingStrategy.start`."""
    if num_rounds < 1:
        raise ConfigError(f"num_rounds must be at least 1, got {num_rounds}.")
    strategy.adopt(initial_arrays)
    first = 1
    if resume_from is not None:
        first = _resume(strategy, grid, resume_from)
    strategy.summary()
    result = Result(arrays=strategy.arrays())
    for callback in callbacks:
        callback.on_start(strategy, num_rounds=num_rounds, first_round=first)
    if evaluate_fn is not None and first == 1 and (before := evaluate_fn(0, initial_arrays)) is not None:
        result.evaluate_metrics_serverapp[0] = before
    for server_round in range(first, num_rounds + 1):
        report = _run_round(
            strategy,
            grid,
            server_round,
            timeout,
            train_config or ConfigRecord(),
            evaluate_config,
            evaluate_fn,
            result,
        )
        for callback in callbacks:
            callback.on_round_end(report)
    for callback in callbacks:
        callback.on_finish(strategy, result)
    return result


def _resume(strategy: StreamingStrategy, grid: Grid, resume_from: str | Path | Mapping[str, Any]) -> int:
    tree = resume_from if isinstance(resume_from, Mapping) else load_checkpoint(resume_from)
    try:
        strategy.load_state_dict(tree["strategy"])
        if "grid" in tree and hasattr(grid, "load_state_dict"):
            grid.load_state_dict(tree["grid"])
        return int(tree["round"]) + 1
    except KeyError as error:
        raise CheckpointError(f"checkpoint has no entry {error}; it is not one of a run.") from error


def _run_round(
    strategy: StreamingStrategy,
    grid: Grid,
    server_round: int,
    timeout: float,
    train_config: ConfigRecord,
    evaluate_config: ConfigRecord | None,
    evaluate_fn: EvaluateFn | None,
    result: Result,
) -> RoundReport:
    if hasattr(grid, "start_round"):
        grid.start_round(server_round)
    if strategy.folds_cohorts and isinstance(grid, CohortGrid) and grid.trains_cohorts:
        cohort = strategy.configure_cohort(server_round, strategy.arrays(), train_config, grid)
        with closing(grid.train_cohort(cohort, timeout=timeout)) as batches:
            arrays, train_metrics = strategy.aggregate_cohort(server_round, batches)
    else:
        messages = strategy.configure_train(server_round, strategy.arrays(), train_config, grid)
        replies = grid.send_and_receive(messages, timeout=timeout)
        del messages
        arrays, train_metrics = strategy.aggregate_train(server_round, replies)
    arrays = arrays if arrays is not None else strategy.arrays()
    result.arrays = arrays
    if train_metrics is not None:
        result.train_metrics_clientapp[server_round] = train_metrics
    if evaluate_config is not None:
        answers = grid.send_and_receive(
            strategy.configure_evaluate(server_round, arrays, evaluate_config, grid), timeout=timeout
        )
        if (by_clients := strategy.aggregate_evaluate(server_round, answers)) is not None:
            result.evaluate_metrics_clientapp[server_round] = by_clients
    started = time.perf_counter()
    evaluated: MetricRecord | None = evaluate_fn(server_round, arrays) if evaluate_fn is not None else None
    if evaluated is not None:
        result.evaluate_metrics_serverapp[server_round] = evaluated
    return RoundReport(
        server_round=server_round,
        arrays=arrays,
        train_metrics=_scalars(train_metrics),
        evaluate_metrics=_scalars(evaluated),
        diagnostics=strategy.diagnostics() | {"memory-bytes": float(strategy.memory_bytes())},
        clients=strategy.reports,
        seconds=strategy.seconds | {"evaluate": time.perf_counter() - started},
        strategy=strategy,
        grid=grid,
    )


def _scalars(record: MetricRecord | None) -> dict[str, float]:
    return {name: float(v) for name, v in (record or {}).items() if isinstance(v, (int, float))}
