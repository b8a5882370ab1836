"""The figures of the studies: panels of lines in the look that all plots share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Line:
    """One curve; ``mark`` is the index of a point to be set off with a dot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    mark: int | None = None


def panels(
    stem: Path,
    title: str,
    parts: Sequence[tuple[str, str, Sequence[Line]]],
    *,
    x_label: str,
    y_label: str,
    log: bool = True,
) -> list[Path]:
    """Draw one panel per (heading, explanation, lines), write ``stem``.png and .svg and return the files."""
    from turnout.server.plots.style import new_figure, plot_style, save_figure, series_style, subtitle

    with plot_style():
        figure = new_figure(5.0 * len(parts) + 1.2, 4.2)
        figure.suptitle(title, fontweight="bold", x=0.01, ha="left")
        for index, (heading, explanation, lines) in enumerate(parts, start=1):
            axes = figure.add_subplot(1, len(parts), index)
            for number, line in enumerate(lines):
                style = series_style(number)
                axes.plot(line.x, line.y, lw=1.7, label=line.label, **style)
                if line.mark is not None:
                    axes.plot(line.x[line.mark], line.y[line.mark], "o", ms=6, color=style["color"])
            if log:
                _log_scale(axes, lines)
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.set_title(heading)
            axes.margins(x=0.02)
            subtitle(axes, explanation)
            axes.legend(fontsize=8)
        return save_figure(figure, stem)


def _log_scale(axes: Axes, lines: Sequence[Line]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    values = [value for line in lines for value in line.y if value > 0]
    if max(values) < 100 * min(values):  # Decades alone would leave too few labels.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
