"""Accuracy, loss and other metrics over rounds, one line per run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from turnout.server.history import RunHistory
from turnout.server.plots.style import new_figure, palette, plot_style, save_figure, series_style, subtitle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_DECADES: Final = 1.5
_HIGHER_IS_BETTER: Final = frozenset({"accuracy", "auc", "f1", "precision", "recall", "r2"})


def higher_is_better(metric: str) -> bool:
    """Return whether a larger value of ``metric`` is the better one."""
    return metric in _HIGHER_IS_BETTER


def metric_title(metric: str) -> str:
    """Return a metric's name as a heading begins: ``Accuracy``, ``Loss``, ``RMSE``."""
    return metric.upper() if len(metric) <= 4 and metric != "loss" else metric.capitalize()


def plot_metric(histories: Sequence[RunHistory], metric: str, stem: Path, *, title: str = "") -> list[Path]:
    """Plot ``metric`` over rounds for every history and return the files written.

    A line is broken at a round in which no client took part: nothing was learned there from anyone, and a
    drawn-through line would hide it.
    """
    with plot_style():
        figure = new_figure(8.2 if len(histories) > 1 else 7.2, 4.4)
        axes = figure.add_subplot()
        ends = []
        for index, history in enumerate(histories):
            rounds, values = broken_series(history, metric)
            if not rounds.size:
                continue
            style = series_style(index)
            axes.plot(rounds, values, lw=1.7, solid_capstyle="round", **style)
            _mark_isolated(axes, rounds, values, style["color"])
            ends.append((_last_finite(values), index, history.label))
        axes.set_title(title or f"{metric_title(metric)} over rounds")
        axes.set_xlabel("round")
        axes.set_ylabel(f"{metric} of the global model")
        axes.locator_params(axis="x", integer=True)
        axes.margins(x=0.01)
        _scale(axes, histories, metric)
        _empty_rounds(axes, histories)
        better = "higher" if higher_is_better(metric) else "lower"
        subtitle(axes, f"{better} is better · number: value at the end")
        _legend(axes, ends, metric)
        return save_figure(figure, stem)


def broken_series(history: RunHistory, metric: str) -> tuple[Any, Any]:
    """Return rounds and values of ``metric`` with a NaN at every round in which nobody took part."""
    rounds, values = history.metric(metric)
    empty = history.rounds[history.participants == 0]
    values = np.where(np.isin(rounds, empty), np.nan, values)
    unseen = np.setdiff1d(empty, rounds)
    rounds = np.concatenate([rounds, unseen])
    values = np.concatenate([values, np.full(unseen.size, np.nan)])
    order = np.argsort(rounds, kind="stable")
    return rounds[order], values[order]


def _mark_isolated(axes: Axes, rounds: Any, values: Any, colour: str) -> None:
    """Draw a dot where a point has no neighbour to be joined with."""
    known = np.isfinite(values)
    alone = known & ~np.r_[False, known[:-1]] & ~np.r_[known[1:], False]
    axes.plot(rounds[alone], values[alone], ls="", marker="o", ms=3, color=colour)


def _scale(axes: Axes, histories: Sequence[RunHistory], metric: str) -> None:
    values = np.concatenate([history.metric(metric)[1] for history in histories])
    values = values[np.isfinite(values)]
    if metric == "accuracy" and values.size and values.min() >= 0 and values.max() <= 1:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.set_ylim(top=min(1.0, max(values.max() * 1.05, 0.05)))
    elif values.size and values.min() > 0 and np.log10(values.max() / values.min()) > _LOG_DECADES:
        axes.set_yscale("log")


def _empty_rounds(axes: Axes, histories: Sequence[RunHistory]) -> None:
    """Mark rounds that were empty in every run shown (they share participation in a comparison)."""
    empty = [set(h.rounds[h.participants == 0].tolist()) for h in histories]
    shared = sorted(set.intersection(*empty)) if empty else []
    if shared:
        count = "1 round" if len(shared) == 1 else f"{len(shared)} rounds"
        axes.plot(
            shared, [0.03] * len(shared), transform=axes.get_xaxis_transform(), ls="", marker="v", ms=4.5,
            color=palette()["muted"], label=f"nobody took part ({count})",
        )  # fmt: skip


def _legend(axes: Axes, ends: list[tuple[float, int, str]], metric: str) -> None:
    from matplotlib.lines import Line2D

    sign = -1 if higher_is_better(metric) else 1
    ends = sorted(ends, key=lambda end: (np.isnan(end[0]), sign * end[0]))
    handles: list[Any] = [
        Line2D([], [], lw=2, label=f"{label}  {_number(value, metric)}", **series_style(index))
        for value, index, label in ends
    ]
    handles += axes.get_legend_handles_labels()[0]
    outside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(ends) > 1 else {"loc": "best"}
    axes.legend(handles=handles, handlelength=2.2, labelspacing=0.7, **outside)


def _number(value: float, metric: str) -> str:
    if not np.isfinite(value):
        return "diverged"
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.3g}"


def _last_finite(values: Any) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else float("nan")
