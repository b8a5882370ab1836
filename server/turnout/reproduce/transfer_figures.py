"""Figures of the studies that adapt a network to rotated digits: accuracy over learning rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from turnout.reproduce.figures import Line, panels
from turnout.reproduce.transfer import Adaptation, Job


def plot_both_accuracies(name: str, jobs: list[Job], outcomes: list[Adaptation], stem: Path) -> list[Path]:
    """Draw accuracy on the 200 rotated digits and on the upright ones; return the files."""
    sources = [replace(o, target=o.source) for o in outcomes]
    return panels(
        stem,
        f"{name}: adapting to 200 rotated digits",
        [
            ("target accuracy", "rotated digits", rate_lines(jobs, outcomes)),
            ("source accuracy", "upright digits: what is not forgotten", rate_lines(jobs, sources)),
        ],
        x_label="learning rate (log10)",
        y_label="accuracy",
        log=False,
    )


def rate_lines(jobs: list[Job], outcomes: list[Adaptation]) -> list[Line]:
    """Return target accuracy over learning rates, one line per method."""
    grouped: dict[str, dict[float, list[float]]] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        grouped.setdefault(job.method.name, {}).setdefault(job.rate, []).append(outcome.target)
    return [
        Line(name, [float(np.log10(r)) for r in by_rate], [float(np.mean(v)) for v in by_rate.values()])
        for name, by_rate in grouped.items()
    ]
