"""Who took part when: the client x round heat map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from turnout.server.history import OUTCOMES, RunHistory
from turnout.server.plots.pooling import block_size, steps
from turnout.server.plots.style import new_figure, palette, plot_style, save_figure, subtitle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# How a trouble is drawn in its cell and told in the legend, for readers who do not see the colours.
_MARKERS: Final = {"failed": ("x", "×"), "rejected": ("s", "■"), "missing": ("_", "–")}
_MAX_MARKERS: Final = 2000
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
    rates = history.presence()
    order = np.argsort(-rates, kind="stable")
    rates = rates[order]
    with plot_style():
        figure = new_figure(9.0, min(7.5, max(3.6, 2.0 + 0.06 * len(rates))))
        axes, bars = figure.subplots(1, 2, width_ratios=[6, 1], sharey=True, gridspec_kw={"wspace": 0.04})
        _draw_cells(axes, history, order)
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.locator_params(axis="x", integer=True)
        together = block_size(len(rates))
        cells = f", {together} to a cell, the fullest is darkest" if together > 1 else ""
        axes.set_ylabel(f"clients, most present first (N = {len(rates)}{cells})")
        axes.grid(visible=False)
        subtitle(axes, _sentence(rates, history))
        steps(bars, rates, orientation="horizontal", color=palette()["outcomes"]["ok"])
        bars.set_xlim(0, max(float(rates.max(initial=0.0)) * 1.05, 0.05))
        bars.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        bars.set_xlabel("share of rounds")
        bars.grid(visible=False, axis="y")
        bars.tick_params(left=False)
        _legend(figure, history)
        return save_figure(figure, stem)


def _draw_cells(axes: Axes, history: RunHistory, order: Any) -> None:
    axes.set_yticks([])
    if not len(order) or not history.rounds.size:
        return
    last = int(history.rounds[-1])
    axes.imshow(
        cell_colours(cell_shares(history, order)), aspect="auto", interpolation="nearest",
        extent=(0.5, last + 0.5, len(order) - 0.5, -0.5),
    )  # fmt: skip
    rows = _positions(history, order)
    for name, (marker, _) in _MARKERS.items():
        found = history.outcome == OUTCOMES.index(name)
        if 0 < np.count_nonzero(found) <= _MAX_MARKERS:
            dark = "#000000" if name == "missing" else "#ffffff"
            axes.plot(
                history.client_round[found], rows[found], ls="", marker=marker, ms=3, color=dark, mew=0.9
            )


def _positions(history: RunHistory, order: Any) -> Any:
    """Return, for every invitation, where its client stands in ``order``."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return place[np.searchsorted(history.clients(), history.client)]


def cell_shares(history: RunHistory, order: Any) -> Any:
    """Return the share of each outcome in every cell, shape (outcomes, rows, columns).

    Rows are clients in ``order``, columns rounds; where there are more than an image can show, neighbours
    share a cell. Only invitations are gone through, never clients times rounds.
    """
    clients, last = len(order), int(history.rounds[-1])
    tall, wide = block_size(clients), block_size(last)
    shape = (len(OUTCOMES), -(-clients // tall), -(-last // wide))
    cells = (history.outcome, _positions(history, order) // tall, (history.client_round - 1) // wide)
    counts = np.bincount(np.ravel_multi_index(cells, shape), minlength=int(np.prod(shape))).reshape(shape)
    heights, widths = (np.minimum(b, n - np.arange(0, n, b)) for n, b in ((clients, tall), (last, wide)))
    return counts / (heights[:, None] * widths)


def cell_colours(shares: Any) -> Any:
    """Return an RGB image (rows, columns, 3) of the shares of outcomes (outcomes, rows, columns).

    A cell is as blue as the share that took part in it, the fullest entirely; one trouble colours it.
    """
    from matplotlib.colors import to_rgb

    colours = {name: np.array(to_rgb(palette()["outcomes"][name])) for name in OUTCOMES}
    present = shares[OUTCOMES.index("ok")]
    strength = (present / (present.max(initial=0.0) or 1.0))[..., None]
    image = colours["absent"] + strength * (colours["ok"] - colours["absent"])
    for name in _MARKERS:
        image[shares[OUTCOMES.index(name)] > 0] = colours[name]
    return image


def _legend(figure: Figure, history: RunHistory) -> None:
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
        if name in ("absent", "ok") or (history.outcome == index).any()
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))


def _label(name: str) -> str:
    return f"{_WORDS[name]} ({_MARKERS[name][1]})" if name in _MARKERS else _WORDS[name]


def _sentence(rates: Any, history: RunHistory) -> str:
    if not rates.size or not history.rounds.size:
        return "no round was committed"
    never = int((rates == 0).sum())
    text = (
        f"{history.participants.mean():.1f} clients a round on average; a client took part in "
        f"{100 * rates.min():.0f} to {100 * rates.max():.0f} % of the rounds"
    )
    return text + (f"; {never} never did" if never else "")
