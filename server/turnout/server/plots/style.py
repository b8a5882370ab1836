"""The look that all plots share: palette, sizes, deterministic files. Matplotlib is imported on first use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turnout.server.documents import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI: Final = 150
_DASHES: Final = ("-", (0, (5, 2)), (0, (1, 1.5)))


@cache
def palette() -> dict[str, Any]:
    """Return the colours; the list of series colours stays distinct for colour-blind readers."""
    text = Path(__file__).parent.with_name("palette.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def series_style(index: int) -> dict[str, Any]:
    """Return colour and dash of the ``index``-th line: colours first, then the same colours dashed."""
    colours = palette()["series"]
    dash = _DASHES[(index // len(colours)) % len(_DASHES)]
    return {"color": colours[index % len(colours)], "linestyle": dash}


@contextmanager
def plot_style() -> Iterator[None]:
    """Set the look while figures are built and saved; the caller's Matplotlib settings come back after."""
    import matplotlib

    colours = palette()
    settings: Any = {
        "font.family": "DejaVu Sans",  # Shipped with Matplotlib: the same letters on every machine.
        "font.size": 9.5,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.edgecolor": colours["muted"],
        "axes.labelcolor": colours["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colours["grid"],
        "grid.linewidth": 0.8,
        "xtick.color": colours["ink"],
        "ytick.color": colours["ink"],
        "text.color": colours["ink"],
        "legend.frameon": False,
        "figure.facecolor": colours["background"],
        "svg.fonttype": "none",  # Text stays text: searchable, small, readable to screen readers.
        "svg.hashsalt": "turnout",
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return a figure (inches) that no global Matplotlib state knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem``.png and ``stem``.svg (same input, same bytes) and return their paths."""
    written = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = BytesIO()
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
        figure.set_layout_engine("none")  # Positions are set now; laying out again would cost as much again.
        path = stem.with_name(f"{stem.name}.{kind}")
        write_atomically(path, buffer.getvalue())
        written.append(path)
    return written


def subtitle(axes: Axes, text: str) -> None:
    """Put one muted line between the title and the plot."""
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=24)
    axes.annotate(
        text, (0, 1), xycoords="axes fraction", xytext=(0, 8), textcoords="offset points",
        color=palette()["muted"], fontsize=9, annotation_clip=False,
    )  # fmt: skip
