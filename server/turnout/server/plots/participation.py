"""Who took part when: the client x round heat map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from turnout.server.history import OUTCOMES, RunHistory
from turnout.server.plots.style import new_figure, palette, plot_style, save_figure, subtitle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# How a trouble is drawn in its cell and told in the legend, for readers who do not see the colours.
_MARKERS: Final = {"failed": ("x", "×"), "rejected": ("s", "■"), "missing": ("_", "–")}
_MAX_MARKERS: Final = 2000
_MAX_CELLS: Final = 800
_WORDS: Final = {
    "absent": "not available or not asked",
    "ok": "took part",
    "failed": "failed",
    "rejected": "reply rejected",
    "missing": "no reply",
}


def plot_participation(history: RunHistory, stem: Path, *, title: str = "Who took part") -> list[Path]:
    """Plot clients (rows, most present first) against rounds (columns) and return the files written.

    Troubles are told by marker as well as by colour. The bars give each client's share of the rounds.
    """
    outcomes, clients = history.outcome_matrix()
    rates = (outcomes == OUTCOMES.index("ok")).mean(axis=1) if outcomes.size else np.zeros(len(clients))
    order = np.argsort(-rates, kind="stable")
    outcomes, rates = outcomes[order], rates[order]
    with plot_style():
        figure = new_figure(9.0, min(7.5, max(3.6, 2.0 + 0.06 * len(clients))))
        axes, bars = figure.subplots(1, 2, width_ratios=[6, 1], sharey=True, gridspec_kw={"wspace": 0.04})
        _draw_cells(axes, outcomes, history)
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylabel(f"clients, most present first (N = {len(clients)})")
        axes.grid(visible=False)
        subtitle(axes, _sentence(rates, outcomes))
        edges = np.arange(len(rates) + 1) - 0.5
        bars.stairs(rates, edges, orientation="horizontal", fill=True, color=palette()["outcomes"]["ok"])
        bars.set_xlim(0, max(float(rates.max(initial=0.0)) * 1.05, 0.05))
        bars.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        bars.set_xlabel("share of rounds")
        bars.grid(visible=False, axis="y")
        bars.tick_params(left=False)
        _legend(figure, outcomes)
        return save_figure(figure, stem)


def _draw_cells(axes: Axes, outcomes: Any, history: RunHistory) -> None:
    axes.set_yticks([])
    if not outcomes.size:
        return
    last = int(history.rounds[-1])
    axes.imshow(
        cell_colours(outcomes), aspect="auto", interpolation="nearest",
        extent=(0.5, last + 0.5, len(outcomes) - 0.5, -0.5),
    )  # fmt: skip
    for name, (marker, _) in _MARKERS.items():
        rows, columns = np.nonzero(outcomes == OUTCOMES.index(name))
        if 0 < rows.size <= _MAX_MARKERS:
            dark = "#000000" if name == "missing" else "#ffffff"
            axes.plot(columns + 1, rows, ls="", marker=marker, ms=3, color=dark, mew=0.9)


def cell_colours(outcomes: Any) -> Any:
    """Return an RGB image (rows, columns, 3) of outcome codes (clients, rounds).

    Where there are more clients or rounds than an image can show, neighbours share a cell, as blue as
    their share of rounds taken part in; one trouble colours it.
    """
    from matplotlib.colors import to_rgb

    colours = {name: np.array(to_rgb(palette()["outcomes"][name])) for name in OUTCOMES}
    present = _pooled((outcomes == OUTCOMES.index("ok")).astype(float), np.mean)[..., None]
    image = colours["absent"] + present * (colours["ok"] - colours["absent"])
    for name in _MARKERS:
        image[_pooled((outcomes == OUTCOMES.index(name)).astype(float), np.max) > 0] = colours[name]
    return image


def _pooled(cells: Any, pool: Any) -> Any:
    """Pool a matrix over blocks so that no side exceeds `_MAX_CELLS`; cells beyond the edge repeat it."""
    for axis in (0, 1):
        block = -(-cells.shape[axis] // _MAX_CELLS)
        if block > 1:
            missing = -cells.shape[axis] % block
            widths = [(0, missing if axis == side else 0) for side in (0, 1)]
            padded = np.moveaxis(np.pad(cells, widths, mode="edge"), axis, 0)
            cells = np.moveaxis(pool(padded.reshape(-1, block, padded.shape[1]), axis=1), 0, axis)
    return cells


def _legend(figure: Figure, outcomes: Any) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            ls="",
            marker="s",
            ms=9,
            color=palette()["outcomes"][name],
            label=_label(name),
            markeredgecolor=palette()["muted"],
            markeredgewidth=0.5,
        )
        for index, name in enumerate(OUTCOMES)
        if name in ("absent", "ok") or (outcomes == index).any()
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))


def _label(name: str) -> str:
    return f"{_WORDS[name]} ({_MARKERS[name][1]})" if name in _MARKERS else _WORDS[name]


def _sentence(rates: Any, outcomes: Any) -> str:
    if not outcomes.size:
        return "no round was committed"
    per_round = (outcomes == OUTCOMES.index("ok")).sum(axis=0)
    never = int((rates == 0).sum())
    text = (
        f"{per_round.mean():.1f} clients a round on average; a client took part in "
        f"{100 * rates.min():.0f} to {100 * rates.max():.0f} % of the rounds"
    )
    return text + (f"; {never} never did" if never else "")
