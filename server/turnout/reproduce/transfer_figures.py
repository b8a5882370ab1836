"""Figures of the studies that adapt a network to rotated digits: accuracy over learning rates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from turnout.reproduce.figures import Line, panels
from turnout.reproduce.transfer import Adaptation
from turnout.reproduce.transfer_grid import TransferGrid


def plot_target(name: str, grid: TransferGrid, stem: Path) -> list[Path]:
    """Draw accuracy on the rotated digits; return the files."""
    return panels(
        stem,
        f"{name}: adapting to rotated digits",
        [("target accuracy", "mean over seeds, after training", _lines(grid, lambda o: o.target))],
        x_label="learning rate (log10)",
        y_label="accuracy",
        log=False,
    )


def plot_target_and_source(name: str, grid: TransferGrid, stem: Path) -> list[Path]:
    """Draw accuracy on the 200 rotated digits and on the upright ones; return the files."""
    return panels(
        stem,
        f"{name}: adapting to 200 rotated digits",
        [
            ("target accuracy", "rotated digits", _lines(grid, lambda o: o.target)),
            ("source accuracy", "upright digits: what is not forgotten", _lines(grid, lambda o: o.source)),
        ],
        x_label="learning rate (log10)",
        y_label="accuracy",
        log=False,
    )


def _lines(grid: TransferGrid, accuracy: Callable[[Adaptation], float]) -> list[Line]:
    """Return the accuracy over learning rates, one line per method."""
    lines = []
    for name, by_rate in grid.runs.items():
        means = [float(np.mean([accuracy(outcome) for outcome in runs])) for runs in by_rate.values()]
        lines.append(Line(name, [float(np.log10(rate)) for rate in by_rate], means))
    return lines
