"""Plots of runs as PNG and SVG: the same input gives the same bytes."""

from __future__ import annotations

from turnout.server.plots.curves import higher_is_better, metric_title, plot_metric
from turnout.server.plots.participation import plot_participation
from turnout.server.plots.partition import plot_partition
from turnout.server.plots.weights import plot_weights

__all__ = [
    "higher_is_better",
    "metric_title",
    "plot_metric",
    "plot_participation",
    "plot_partition",
    "plot_weights",
]
