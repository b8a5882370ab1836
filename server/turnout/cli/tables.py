"""The tables that end a run or a comparison, in words that need no paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from turnout.cli.wording import metric_text, seconds_text
from turnout.server.history import OUTCOMES, RunHistory
from turnout.server.plots import higher_is_better


def result_table(title: str | None = None) -> Table:
    """Return an empty table in the look of all results."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


@dataclass(frozen=True)
class Score:
    """How a run did by its main metric: accuracy where there is one, else loss."""

    metric: str
    final: float
    best: float
    best_round: int

    @classmethod
    def of(cls, history: RunHistory, metric: str | None = None) -> Score | None:
        """Return the score of a run, None when nothing was evaluated."""
        name = metric or main_metric([history])
        rounds, values = history.metric(name)
        known = np.isfinite(values)
        if not values.size:
            return None
        if not known.any():
            return cls(name, math.nan, math.nan, 0)
        candidates = np.where(known, values, -np.inf if higher_is_better(name) else np.inf)
        best = int(candidates.argmax() if higher_is_better(name) else candidates.argmin())
        return cls(name, float(values[-1]), float(values[best]), int(rounds[best]))


def main_metric(histories: Sequence[RunHistory]) -> str:
    """Return the metric that runs are judged by: accuracy, else what the task measures besides its loss."""
    shared = set.intersection(*(set(history.evaluate) for history in histories))
    if "accuracy" in shared:
        return "accuracy"
    return min(shared - {"loss"}, default="loss")


def rounds_to(history: RunHistory, metric: str, target: float) -> int | None:
    """Return the first round at which ``metric`` was at least as good as ``target``, None if never."""
    rounds, values = history.metric(metric)
    reached = values >= target if higher_is_better(metric) else values <= target
    return int(rounds[reached.argmax()]) if reached.any() else None


def run_table(history: RunHistory, *, title: str, seconds: float, metrics: dict[str, float]) -> Table:
    """Return the table that ends one run."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column(style="dim")
    table.add_column()
    score = Score.of(history)
    for name in sorted(metrics, key=lambda name: name != "accuracy"):
        text = metric_text(name, metrics[name])
        if score is not None and name == score.metric and score.best_round:
            text += f"   (best {metric_text(name, score.best)}, round {score.best_round})"
        table.add_row(f"{name} of the global model", text)
    for label, text in participation_rows(history):
        table.add_row(label, text)
    table.add_row("time", seconds_text(seconds))
    return table


def participation_rows(history: RunHistory) -> list[tuple[str, str]]:
    """Return who took part, in sentences: label and text."""
    if not history.rounds.size:
        return [("rounds", "none was committed")]
    rows = [("clients a round", f"{history.participants.mean():.1f} of {history.num_clients} on average")]
    empty = int((history.participants == 0).sum())
    if empty:
        rows[0] = (rows[0][0], f"{rows[0][1]}; nobody in {empty} of {len(history.rounds)} rounds")
    presence = history.presence()
    rare, often = int(presence.argmin()), int(presence.argmax())
    clients = history.clients()
    if presence[rare] == presence[often]:
        text = f"{100 * presence[often]:.0f} % of the rounds, every client"
    else:
        text = (
            f"{100 * presence[rare]:.0f} % (client {clients[rare]}) to {100 * presence[often]:.0f} % "
            f"(client {clients[often]}) of the rounds"
        )
    rows.append(("presence", text))
    gini = history.weight_gini()
    if math.isfinite(gini):
        rows.append(("weight skew", f"{gini:.2f}   (0: every client counted the same, 1: one decided alone)"))
    troubles = [
        f"{int((history.outcome == code).sum())} {name}"
        for code, name in enumerate(OUTCOMES)
        if name in ("failed", "rejected", "missing") and (history.outcome == code).any()
    ]
    if troubles:
        rows.append(("replies lost", ", ".join(troubles)))
    return rows


def comparison_rows(
    histories: Sequence[RunHistory], *, seconds: Sequence[float], target: float | None
) -> tuple[str, float, list[dict[str, Any]]]:
    """Return the metric, the target and one document per run of a comparison.

    Without a ``target`` it is the best value of the first run: how soon do the others get there?
    """
    metric = main_metric(histories)
    if target is None or metric != "accuracy":
        first = Score.of(histories[0], metric)
        target = first.best if first is not None else math.nan
    rows = []
    for history, spent in zip(histories, seconds, strict=True):
        score = Score.of(history, metric)
        losses = history.metric("loss")[1]
        rows.append(
            {
                "strategy": history.label,
                "metric": metric,
                "final": score.final if score else math.nan,
                "best": score.best if score else math.nan,
                "best-round": score.best_round if score else None,
                "loss": float(losses[-1]) if losses.size else math.nan,
                "target": target,
                "rounds-to-target": rounds_to(history, metric, target),
                "weight-gini": history.weight_gini(),
                "seconds": round(spent, 3),
            }
        )
    return metric, target, rows


def comparison_table(metric: str, target: float, rows: Sequence[dict[str, Any]], *, title: str) -> Table:
    """Return the table of a comparison; the best value of a column is bold."""
    table = result_table(title)
    table.add_column("strategy", no_wrap=True)
    table.add_column(f"final {metric}", justify="right")
    table.add_column(f"best {metric}", justify="right")
    if metric != "loss":
        table.add_column("final loss", justify="right")
    table.add_column(f"rounds to {metric_text(metric, target)}", justify="right")
    table.add_column("weight skew", justify="right")
    table.add_column("time", justify="right")
    higher = higher_is_better(metric)
    for row in rows:
        cells = [
            row["strategy"],
            _best(row["final"], [r["final"] for r in rows], higher, metric_text(metric, row["final"])),
            _best(row["best"], [r["best"] for r in rows], higher, metric_text(metric, row["best"])),
        ]
        if metric != "loss":
            cells.append(
                _best(row["loss"], [r["loss"] for r in rows], False, metric_text("loss", row["loss"]))
            )
        reached = row["rounds-to-target"]
        all_reached = [r["rounds-to-target"] for r in rows if r["rounds-to-target"] is not None]
        cells.append("never" if reached is None else _best(reached, all_reached, False, str(reached)))
        gini = row["weight-gini"]
        cells.append(f"{gini:.2f}" if math.isfinite(gini) else "-")
        cells.append(seconds_text(row["seconds"]))
        table.add_row(*cells)
    return table


def verdict(metric: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return one sentence on how the first strategy compares with the best of the others."""
    first, others = rows[0], [row for row in rows[1:] if math.isfinite(row["final"])]
    if not others or not math.isfinite(first["final"]):
        return ""
    sign = 1 if higher_is_better(metric) else -1
    best = max(others, key=lambda row: sign * row["final"])
    gain = sign * (best["final"] - first["final"])
    if gain <= 0:
        return f"None of the others ended better than {first['strategy']} here."
    size = f"{100 * gain:.1f} points of accuracy" if metric == "accuracy" else f"{gain:.3g} of {metric}"
    return f"{best['strategy']} ended {size} better than {first['strategy']}."


def _best(value: float, values: Sequence[float], higher: bool, text: str) -> str:
    known = [v for v in values if math.isfinite(v)]
    if not known or not math.isfinite(value):
        return text
    return f"[bold green]{text}[/]" if value == (max(known) if higher else min(known)) else text
