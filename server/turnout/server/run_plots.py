"""The plots that belong to a run or a comparison of runs, drawn from the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turnout.server.history import RunHistory
from turnout.server.plots import metric_title, plot_metric, plot_participation, plot_partition, plot_weights
from turnout.server.schema import RunRow
from turnout.server.store import RunStore


def plot_run(store: RunStore, run: RunRow, folder: Path) -> list[Path]:
    """Plot a run's held-out metrics, participation and client weights; return the files written."""
    return plot_comparison([RunHistory.load(store, run)], folder, title=f"{run.strategy} on {run.task}")


def plot_comparison(histories: Sequence[RunHistory], folder: Path, *, title: str = "") -> list[Path]:
    """Plot runs that share their participation against each other; return the files written."""
    written: list[Path] = []
    suffix = f": {title}" if title else ""
    for metric in sorted({name for history in histories for name in history.evaluate}):
        heading = f"{metric_title(metric)} over rounds{suffix}"
        written += plot_metric(histories, metric, folder / metric, title=heading)
    if histories and histories[0].rounds.size:
        written += plot_participation(histories[0], folder / "participation", title=f"Who took part{suffix}")
        heading = f"How much each client counted{suffix}"
        written += plot_weights(histories, folder / "weights", title=heading)
    return written


def plot_task(label_distribution: Any, num_examples: Any, probabilities: Any, folder: Path) -> list[Path]:
    """Plot which client holds which labels, how many examples, and how often it can take part."""
    return plot_partition(label_distribution, num_examples, folder / "partition", probabilities=probabilities)
