"""How much each client counted: its share of all weight given, against the fair share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turnout.server.history import RunHistory
from turnout.server.plots.pooling import steps
from turnout.server.plots.style import new_figure, palette, plot_style, save_figure, series_style, subtitle


def plot_weights(histories: Sequence[RunHistory], stem: Path, *, title: str = "") -> list[Path]:
    """Plot each client's share of the total weight, one panel per run, and return the files written.

    The order of clients (most present first) is the first run's in every panel; dashed: the fair share 1/N.
    """
    with plot_style():
        columns = min(3, len(histories))
        rows = -(-len(histories) // columns)
        figure = new_figure(3.1 * columns + 1.2 if columns > 1 else 7.2, 2.6 * rows + 1.1)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        order = np.argsort(-histories[0].presence(), kind="stable")
        top = max(float(history.weight_shares().max(initial=0.0)) for history in histories)
        for index, (panel, history) in enumerate(zip(panels.flat, histories, strict=False)):
            _draw_panel(panel, history, order, series_style(index)["color"])
            if len(histories) > 1:
                panel.set_title(history.label, fontsize=10)
                subtitle(panel, _gini_text(history))
        for panel in panels.flat[len(histories) :]:
            panel.set_visible(False)
        panels.flat[0].set_ylim(0, max(top * 1.08, 1e-6))
        figure.supxlabel("clients, most present first", fontsize=9.5)
        figure.supylabel("share of all weight given", fontsize=9.5)
        heading = title or "How much each client counted"
        if len(histories) == 1:
            panels.flat[0].set_title(heading)
            fair = f"dashed: the fair share {_fair_text(histories[0])}"
            subtitle(panels.flat[0], f"{fair} · {_gini_text(histories[0])}")
        else:
            figure.suptitle(
                f"{heading} · dashed: the fair share {_fair_text(histories[0])}",
                fontsize=11,
                x=0.01,
                ha="left",
            )
        return save_figure(figure, stem)


def _draw_panel(panel: Any, history: RunHistory, order: Any, colour: str) -> None:
    shares = history.weight_shares()
    if len(shares) == len(order):
        shares = shares[order]
    fair = 1.0 / max(history.num_clients, 1)
    steps(panel, shares, color=colour, alpha=0.85)
    panel.axhline(fair, color=palette()["ink"], lw=1.2, ls=(0, (4, 2)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    panel.set_xticks([])
    panel.margins(x=0.01)


def _fair_text(history: RunHistory) -> str:
    return f"1/N = {100 / max(history.num_clients, 1):.3g} %"


def _gini_text(history: RunHistory) -> str:
    return f"inequality (Gini) {history.weight_gini():.2f}"
