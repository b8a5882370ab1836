"""ECO's small study: weights that exist on a grid only (arXiv 2601.22101).

A quadratic in 200 dimensions with curvatures from 0.2 to 1, weights on multiples of 1/8, noise in the
gradient: the mean loss over the last half, for momentum SGD with full-precision master weights (rounded
wherever they are used), with naive rounding (to nearest, and stochastic), and with ECO (both). The baseline
to beat is naive stochastic rounding.

The second part trains a perceptron on handwritten digits with INT4 weights: ECO-AdamW and naive rounding
against AdamW with weights that are never rounded, each at the best of the same learning rates.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from turnout.optim import ECOSGD, ECOAdamW
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.optimizer_runs import best, mean, train
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.wire import register
from turnout.wire.torch_threads import one_torch_thread

SLUG: Final = "eco"
STEP: Final = 0.125
NOISE: Final = 0.05
DIMENSION: Final = 200
MASTER, NAIVE_RTN, NAIVE_SR = "master weights", "naive RTN", "naive SR"
ECO_RTN, ECO_SR = "ECO RTN", "ECO SR"
METHODS: Final[dict[str, dict[str, Any]]] = {
    MASTER: {},
    NAIVE_RTN: {"rounding": "rtn", "error_feedback": False},
    NAIVE_SR: {"rounding": "sr", "error_feedback": False},
    ECO_RTN: {"rounding": "rtn"},
    ECO_SR: {"rounding": "sr"},
}
UNROUNDED: Final = "AdamW, unrounded"
DIGITS: Final = {UNROUNDED: {}, **{method: METHODS[method] for method in METHODS if method != MASTER}}
REFERENCE: Final[dict[float, tuple[float, ...]]] = {
    0.1: (0.156, 19.1, 0.260, 0.160, 0.249),
    0.03: (0.155, 53.4, 0.204, 0.161, 0.180),
    0.01: (0.154, 55.7, 0.183, 0.154, 0.161),
    0.003: (0.154, 55.7, 0.176, 0.153, 0.156),
}
WIDTHS: Final = (64, 64, 10)
RATES: Final = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    etas: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003)
    time: float = 60.0
    """Steps times learning rate, on the quadratic."""
    steps: int = 600
    seeds: int = 3
    rates: tuple[float, ...] = RATES


FULL: Final = Sizes()


def quadratic(method: str, eta: float, steps: int, seed: int = 0) -> float:
    """Return the mean loss over the last half of ``steps``."""
    generator = torch.Generator().manual_seed(seed)
    curvature = torch.linspace(0.2, 1.0, DIMENSION, dtype=torch.float64)
    optimum = torch.randn(DIMENSION, generator=generator, dtype=torch.float64)
    p = nn.Parameter(torch.zeros(1, DIMENSION, dtype=torch.float64))
    group = {"params": [p], "eco": method != MASTER}
    optimizer = ECOSGD([group], lr=eta, quantizer=STEP, seed=seed, **METHODS[method])
    losses, p.grad = [], torch.zeros_like(p)
    for step in range(steps):
        used = p.detach()[0]
        if method == MASTER:
            used = torch.round(used / STEP) * STEP
        difference = used - optimum
        if step >= steps // 2:
            losses.append(float(0.5 * (curvature * difference * difference).sum()))
        noise = torch.randn(DIMENSION, generator=generator, dtype=torch.float64)
        p.grad[0] = curvature * difference + NOISE * noise
        optimizer.step()
    return mean(losses)


def _adam(method: str, module: nn.Module, lr: float, seed: int) -> Sequence[torch.optim.Optimizer]:
    if method == UNROUNDED:
        return [torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)]
    optimizer = ECOAdamW(module.parameters(), lr=lr, quantizer="int4", seed=seed, **METHODS[method])
    optimizer.begin_round()  # The start, too, is on the grid.
    return [optimizer]


def measure(job: tuple[str, str, float, int, Sizes]) -> float:
    """Return a loss on the quadratic, or a test accuracy on the digits."""
    kind, method, rate, seed, sizes = job
    with one_torch_thread():
        if kind == "quadratic":
            return quadratic(method, rate, round(sizes.time / rate), seed)
        make = partial(_adam, method, seed=seed)
        return train(
            lambda m, lr: make(m, lr), rate, widths=WIDTHS, steps=sizes.steps, batch=64, seed=seed
        ).accuracy


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Weights on a grid: ECO against master weights and against naive rounding."""
    started = time.perf_counter()
    jobs = [("quadratic", method, eta, 0, sizes) for eta in sorted(sizes.etas) for method in METHODS]
    jobs += [
        ("digits", method, rate, seed, sizes)
        for method in DIGITS
        for rate in sizes.rates
        for seed in range(sizes.seeds)
    ]
    figures = dict(
        zip(
            [job[:4] for job in jobs],
            run_jobs(measure, jobs, what="weights on a grid", progress=progress, workers=workers),
            strict=True,
        )
    )
    losses = {(m, eta): figures["quadratic", m, eta, 0] for eta in sizes.etas for m in METHODS}
    accuracies = {
        m: {r: mean(figures["digits", m, r, seed] for seed in range(sizes.seeds)) for r in sizes.rates}
        for m in DIGITS
    }
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(losses, accuracies, sizes)),
        tuple(_tables(losses, accuracies, sizes)),
        {"eco-quadratic": partial(_plot, losses, sizes)},
    )


register(SLUG, "study", "2601.22101")(run)

Losses = Mapping[tuple[str, float], float]
Accuracies = Mapping[str, Mapping[float, float]]


def _tuned(accuracies: Accuracies, method: str) -> tuple[float, float]:
    """Return the best accuracy of ``method`` and its learning rate."""
    rate = best({r: -a for r, a in accuracies[method].items()})
    return accuracies[method][rate], rate


def _claims(losses: Losses, accuracies: Accuracies, sizes: Sizes) -> list[Claim]:
    claims = []
    for eta in sizes.etas:
        ours, naive = losses[ECO_SR, eta], losses[NAIVE_SR, eta]
        text = f"quadratic, eta {eta:g}: ECO SR no worse than naive SR"
        claims.append(Claim(text, ours, naive, ours <= naive))
    gaps = [losses[ECO_SR, eta] - losses[MASTER, eta] for eta in sorted(sizes.etas, reverse=True)]
    shrinks = all(b < a for a, b in pairwise(gaps))
    text = "quadratic: ECO SR's gap to master weights shrinks with every smaller eta (largest, smallest)"
    claims.append(Claim(text, gaps[-1], gaps[0], shrinks))
    smallest = min(sizes.etas)
    stuck, master = losses[NAIVE_RTN, smallest], losses[MASTER, smallest]
    text = f"quadratic, eta {smallest:g}: naive RTN is stuck, above 100 times the loss of master weights"
    claims.append(Claim(text, stuck, master, stuck > 100 * master))
    (ours, _), (master, _) = _tuned(accuracies, ECO_SR), _tuned(accuracies, UNROUNDED)
    text = "digits, INT4 weights: ECO-AdamW SR within 0.01 of AdamW without rounding, both tuned"
    claims.append(Claim(text, ours, master, ours >= master - 0.01))
    naive, _ = _tuned(accuracies, NAIVE_SR)
    text = "digits, INT4 weights: ECO-AdamW SR at least as accurate as naive SR, both tuned"
    claims.append(Claim(text, ours, naive, ours >= naive))
    return claims


def _tables(losses: Losses, accuracies: Accuracies, sizes: Sizes) -> list[Table]:
    rows: list[list[Value]] = []
    for eta in sizes.etas:
        reference = REFERENCE.get(eta, (float("nan"),) * len(METHODS))
        cells = [
            f"{losses[method, eta]:.3g} ({known:g})" for method, known in zip(METHODS, reference, strict=True)
        ]
        rows.append([f"{eta:g}", *cells])
    first = Table.of(
        f"Quadratic, mean loss over the last half of {sizes.time:g}/eta steps, grid of step {STEP:g}; in "
        "brackets the reference (an independent implementation)",
        ("eta", *METHODS),
        rows,
    )
    rows = []
    for method in DIGITS:
        accuracy, rate = _tuned(accuracies, method)
        others = [f"{accuracies[method][r]:.3f}" for r in sizes.rates]
        rows.append([method, f"{accuracy:.3f}", f"{rate:g}", *others])
    columns = ("weights", "test accuracy, tuned", "lr", *(f"lr {r:g}" for r in sizes.rates))
    second = Table.of(
        f"Digits, perceptron {'-'.join(map(str, WIDTHS))}, AdamW's rule, {sizes.steps} steps, mean of "
        f"{sizes.seeds} seeds; both layers on INT4 grids but for the first row",
        columns,
        rows,
    )
    return [first, second]


def _plot(losses: Losses, sizes: Sizes, stem: Path) -> list[Path]:
    """Draw loss over learning rate."""
    from turnout.reproduce.figures import Line, panels

    etas = sorted(sizes.etas)
    shown = (MASTER, NAIVE_SR, ECO_RTN, ECO_SR)
    lines = [Line(method, etas, [losses[method, eta] for eta in etas]) for method in shown]
    return panels(
        stem,
        "Weights on a grid: the momentum repays what rounding takes",
        [("quadratic", "naive rounding to nearest is stuck at its start, far above", lines)],
        x_label="learning rate",
        y_label="mean loss, last half",
    )
