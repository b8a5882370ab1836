"""Which client holds which data: labels per client and, beside them, how often each client can take part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from turnout.server.plots.pooling import pooled, steps
from turnout.server.plots.style import new_figure, palette, plot_style, save_figure, subtitle


def plot_partition(
    label_distribution: Any,
    num_examples: Any,
    stem: Path,
    *,
    probabilities: Any = None,
    title: str = "Who holds which data",
) -> list[Path]:
    """Plot the mix of labels of every client and return the files written.

    ``label_distribution`` has shape (clients, classes), its rows sum to 1 (or 0 without data);
    ``num_examples`` and ``probabilities`` (of taking part in a round; None: left out) have shape (clients,).
    """
    mix, sizes = np.asarray(label_distribution, float), np.asarray(num_examples, float)
    chances = None if probabilities is None else np.asarray(probabilities, float)
    order = np.argsort(-(sizes if chances is None else chances), kind="stable")
    with plot_style():
        from matplotlib.colors import LinearSegmentedColormap

        figure = new_figure(9.0, min(7.5, max(3.6, 2.0 + 0.06 * len(mix))))
        ratios = [5, 1.1] if chances is None else [5, 1.1, 1.1]
        panels = figure.subplots(1, len(ratios), width_ratios=ratios, sharey=True)
        axes = panels[0]
        colours = LinearSegmentedColormap.from_list("turnout", palette()["sequential"])
        image = axes.imshow(
            pooled(mix[order]), aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=1,
            extent=(-0.5, mix.shape[1] - 0.5, len(mix) - 0.5, -0.5),
        )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("label")
        axes.set_xticks(range(mix.shape[1])) if mix.shape[1] <= 20 else None
        first = "largest" if chances is None else "most often available"
        axes.set_ylabel(f"clients, {first} first (N = {len(mix)})")
        axes.set_yticks([])
        axes.grid(visible=False)
        subtitle(axes, f"{sizes.sum():.0f} examples, {sizes.min():.0f} to {sizes.max():.0f} a client")
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=30, pad=0.02)
        bar.set_label("share of the client's examples")
        bar.outline.set_visible(False)
        _bars(panels[1], sizes[order], "examples", palette()["series"][2])
        if chances is not None:
            _bars(panels[2], chances[order], "chance to take\npart in a round", palette()["series"][0])
            panels[2].xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        return save_figure(figure, stem)


def _bars(panel: Any, values: Any, label: str, colour: str) -> None:
    steps(panel, values, orientation="horizontal", color=colour)
    panel.set_xlabel(label)
    panel.set_xlim(0, max(float(values.max(initial=0.0)) * 1.05, 1e-9))
    panel.grid(visible=False, axis="y")
    panel.tick_params(left=False)
    panel.locator_params(axis="x", nbins=3)
