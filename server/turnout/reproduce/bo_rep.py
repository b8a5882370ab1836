"""BO-REP's small studies: bilevel optimisation with unbounded smoothness (arXiv 2401.09587).

A toy problem whose upper gradient grows with its cube: ``g = 1/2 ||y - B x||^2``, ``f = 1/4 ||y||^4 -
1/2 ||y||^2``, ten dimensions, gradient noise 0.1. Steps of a fixed size explode unless they are tiny;
normalised ones do not. Then federated data hyper-cleaning (digits, 40 % of the training labels wrong) and
federated hyper-representation (each client numbers the classes in its own way), through the strategies
themselves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from turnout.optim import BORep, descend_lower, hypergradient, refine_lower
from turnout.reproduce.bo_rep_federated import CLEANING, REPRESENTATION, cleaning, representation
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.wire import NDArray, register

SLUG: Final = "bo-rep"
NOISE: Final = 0.1
DIMENSION: Final = 10
BOREP, BARE, CLIPPED, PLAIN, SINGLE, ADAMW = (
    "BO-REP",
    "no refinement",
    "momentum, clipped",
    "momentum SGD",
    "single loop",
    "AdamW",
)
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    BOREP: {"init_steps": 100},
    BARE: {},
    CLIPPED: {"init_steps": 100, "normalize": False, "clip": 1.0},
    PLAIN: {"init_steps": 100, "normalize": False},
    SINGLE: {"interval": 1, "inner_steps": 1, "normalize": False},
}
ETAS: Final = {
    BOREP: (3e-3, 1e-2, 3e-2),
    BARE: (1e-2,),
    CLIPPED: (1e-2, 3e-2),
    PLAIN: (1e-5, 1e-4, 1e-3),
    SINGLE: (1e-4,),
    ADAMW: (1e-2, 3e-2),
}
REFERENCE: Final = {
    (BOREP, 3e-3): "138", (BOREP, 1e-2): "0.08", (BOREP, 3e-2): "0.68",
    (BARE, 1e-2): "0.18", (PLAIN, 1e-5): "57", (PLAIN, 1e-4): "2.0",
    (PLAIN, 1e-3): "diverges", (SINGLE, 1e-4): "2.1",
}  # fmt: skip
_DIVERGED: Final = 1e12


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    steps: int = 2000
    seeds: int = 2
    cleaning_rounds: int = 450
    representation_rounds: int = 60


FULL: Final = Sizes()


@dataclass
class Toy:
    """The toy problem of one seed, with noisy losses and its exact gradient."""

    matrix: Tensor
    x: Tensor
    y: Tensor
    rng: torch.Generator

    @classmethod
    def draw(cls, seed: int) -> Toy:
        """Draw B and a start of norm about 10."""
        rng = torch.Generator().manual_seed(seed)
        matrix = torch.randn(DIMENSION, DIMENSION, generator=rng, dtype=torch.float64) / DIMENSION**0.5
        x = 10 / DIMENSION**0.5 * torch.randn(DIMENSION, generator=rng, dtype=torch.float64)
        return cls(matrix, x.requires_grad_(), torch.zeros_like(x).requires_grad_(), rng)

    def noise(self) -> Tensor:
        """Return a draw of the gradient's noise."""
        return NOISE * torch.randn(DIMENSION, generator=self.rng, dtype=torch.float64)

    def upper(self) -> Tensor:
        """Return f with a noisy gradient."""
        square = self.y.square().sum()
        return 0.25 * square**2 - 0.5 * square + self.noise() @ self.y

    def lower(self) -> Tensor:
        """Return g with a noisy gradient."""
        return 0.5 * (self.y - self.matrix @ self.x).square().sum() + self.noise() @ self.y

    def exact(self) -> float:
        """Return the norm of the exact gradient of ``Phi(x) = f(B x)``."""
        with torch.no_grad():
            y = self.matrix @ self.x
            return float((self.matrix.T @ (y * (y @ y) - y)).norm())


def toy(method: str, eta: float, sizes: Sizes, seed: int) -> NDArray:
    """Return the norm of the exact gradient at the end, or infinity for a run that diverged."""
    problem = Toy.draw(seed)
    step = _adamw(problem, eta) if method == ADAMW else _trainer(problem, method, eta)
    for t in range(sizes.steps):
        step(t)
        if not (problem.x.detach().abs() < _DIVERGED).all():
            return np.array([np.inf])
    return np.array([problem.exact()])


def _trainer(problem: Toy, method: str, eta: float) -> Any:
    groups = [{"params": [problem.x], "role": "upper"}, {"params": [problem.y], "role": "lower"}]
    trainer = BORep(groups, lr=eta, lower_lr=0.1, nu=0.1, **SETTINGS[method])
    return lambda t: trainer.step(problem.upper, problem.lower)


def _adamw(problem: Toy, eta: float) -> Any:
    """AdamW on the same hypergradients, with the same y and z."""
    z = [torch.zeros_like(problem.y)]
    outer = torch.optim.AdamW([problem.x], lr=eta, weight_decay=0.0)

    def step(t: int) -> None:
        if t == 0:
            refine_lower([problem.y], problem.lower, lr=0.1, steps=100)
        elif t % 2 == 0:
            descend_lower([problem.y], problem.lower, lr=0.1, steps=3)
        found = hypergradient([problem.x], [problem.y], z, 0.1, problem.upper, problem.lower)
        problem.x.grad = found.upper[0]
        outer.step()

    return step


Job = tuple[str, str, float, Sizes, int]


def measure(job: Job) -> Mapping[str, NDArray]:
    """Return what one method reaches on one problem."""
    kind, method, eta, sizes, seed = job
    torch.set_num_threads(1)
    if kind == "toy":
        return {"gradient": toy(method, eta, sizes, seed)}
    if kind == "cleaning":
        return cleaning(method, eta, sizes.cleaning_rounds, seed)
    return representation(method, eta, sizes.representation_rounds, seed)


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """A toy that explodes, federated hyper-cleaning and federated hyper-representation."""
    started = time.perf_counter()
    jobs: list[Job] = [
        ("representation", m, eta, sizes, 0) for m, etas in REPRESENTATION.items() for eta in etas
    ]
    jobs += [("cleaning", m, eta, sizes, 0) for m, etas in CLEANING.items() for eta in etas]
    jobs += [
        ("toy", m, eta, sizes, s) for m, etas in ETAS.items() for eta in etas for s in range(sizes.seeds)
    ]
    results = run_jobs(measure, jobs, what="bilevel problems", progress=progress, workers=workers)
    found: dict[tuple[str, str, float], list[Mapping[str, NDArray]]] = {}
    for job, result in zip(jobs, results, strict=True):
        found.setdefault(job[:3], []).append(result)
    gradients = {
        (method, eta): float(np.mean([r["gradient"][0] for r in runs]))
        for (kind, method, eta), runs in found.items()
        if kind == "toy"
    }
    clean = {(m, eta): runs[0] for (kind, m, eta), runs in found.items() if kind == "cleaning"}
    shared = {(m, eta): runs[0] for (kind, m, eta), runs in found.items() if kind == "representation"}
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        (*_toy_claims(gradients, found), *_cleaning_claims(clean), *_representation_claims(shared)),
        (_toy_table(gradients, sizes), _cleaning_table(clean), _representation_table(shared, sizes)),
        {"bo-rep-federated": partial(_plot, clean, shared)},
    )


register(SLUG, "study", "2401.09587")(run)

Figures = Mapping[tuple[str, float], Mapping[str, NDArray]]


def _best_of(gradients: Mapping[tuple[str, float], float], method: str) -> float:
    return min(value for (name, _), value in gradients.items() if name == method)


def _toy_claims(gradients: Mapping[tuple[str, float], float], found: Any) -> list[Claim]:
    best = _best_of(gradients, BOREP)
    plain = min(_best_of(gradients, PLAIN), _best_of(gradients, SINGLE))
    runs = [r["gradient"][0] for (kind, m, _), rs in found.items() if (kind, m) == ("toy", BOREP) for r in rs]
    clipped, adamw = _best_of(gradients, CLIPPED), _best_of(gradients, ADAMW)
    return [
        Claim(
            "toy: gradient of the best BO-REP at least 10 times below the best unnormalised",
            best,
            plain,
            best * 10 <= plain,
        ),
        Claim("toy: no run of BO-REP diverges", float(max(runs)), "finite", bool(np.isfinite(max(runs)))),
        Claim(
            "toy: BO-REP within a factor 2 of momentum with clipping, the strong baseline",
            best,
            clipped,
            best <= 2 * clipped,
        ),
        Claim(
            "toy: BO-REP within a factor 2 of AdamW on the same hypergradients",
            best,
            adamw,
            best <= 2 * adamw,
        ),
    ]


def _last(figures: Figures, method: str, name: str, largest: bool = True) -> tuple[float, float]:
    """Return (figure at the end, eta) of the method's best setting by accuracy."""
    tried = [
        (float(r["accuracy"][-1]), float(r[name][-1]), eta) for (m, eta), r in figures.items() if m == method
    ]
    _, value, eta = max(tried)
    return value, eta


def _cleaning_claims(clean: Figures) -> list[Claim]:
    reached, _ = _last(clean, BOREP, "accuracy")
    wrong, right = (_last(clean, BOREP, f"weight-{kind}")[0] for kind in ("wrong", "right"))
    uniform = _last(clean, "uniform weights", "accuracy")[0]
    return [
        Claim(
            "cleaning: mean weight of wrong labels below half that of right ones",
            wrong,
            right,
            wrong < 0.5 * right,
        ),
        Claim(
            "cleaning: accuracy at least 0.02 above uniform weights",
            reached,
            uniform,
            reached >= uniform + 0.02,
        ),
    ]


def _representation_claims(shared: Figures) -> list[Claim]:
    reached = _last(shared, BOREP, "accuracy")[0]
    start = float(next(iter(shared.values()))["accuracy"][0])
    plain, first = _last(shared, PLAIN, "accuracy")[0], _last(shared, "first order", "accuracy")[0]
    return [
        Claim(
            "representation: accuracy at least 0.05 above the random one",
            reached,
            start,
            reached >= start + 0.05,
        ),
        Claim(
            "representation: not below momentum SGD, tuned, by more than 0.02",
            reached,
            plain,
            reached >= plain - 0.02,
        ),
        Claim(
            "representation: not below first order (no z), tuned, by more than 0.02",
            reached,
            first,
            reached >= first - 0.02,
        ),
    ]


def _toy_table(gradients: Mapping[tuple[str, float], float], sizes: Sizes) -> Table:
    etas = sorted({eta for _, eta in gradients})
    rows: list[list[Value]] = []
    for method in ETAS:
        row: list[Value] = [method]
        for eta in etas:
            value = gradients.get((method, eta))
            cell = "" if value is None else "diverges" if value > _DIVERGED else f"{value:.2g}"
            reference = REFERENCE.get((method, eta))
            row.append(f"{cell} ({reference})" if reference and cell else cell)
        rows.append(row)
    return Table.of(
        f"Toy: mean norm of the gradient after {sizes.steps} steps, {sizes.seeds} seeds; in brackets the "
        "reference (an independent implementation)",
        ("method", *(f"eta {eta:g}" for eta in etas)),
        rows,
    )


def _cleaning_table(clean: Figures) -> Table:
    rows: list[list[Value]] = []
    for method in CLEANING:
        values: list[Value] = [
            _last(clean, method, n)[0] for n in ("accuracy", "weight-wrong", "weight-right")
        ]
        rows.append(
            [
                f"{method}, eta {_last(clean, method, 'accuracy')[1]:g}"
                if len(CLEANING[method]) > 1
                else method,
                *values,
            ]
        )
    return Table.of(
        "Hyper-cleaning, digits, 500 training examples (200 wrong labels), 150 clean: test accuracy and mean "
        "weights at the end. Reference (an independent implementation, one pool): uniform .879, BO-REP .923, "
        "oracle .919, clean examples alone .925, unnormalised .923",
        ("method", "accuracy", "weight of wrong", "weight of right"),
        rows,
    )


def _representation_table(shared: Figures, sizes: Sizes) -> Table:
    rows: list[list[Value]] = [
        ["random representation", "", float(next(iter(shared.values()))["accuracy"][0]), ""]
    ]
    for method in REPRESENTATION:
        accuracy, eta = _last(shared, method, "accuracy")
        rows.append([method, f"{eta:g}", accuracy, _last(shared, method, "loss")[0]])
    return Table.of(
        "Hyper-representation, digits, 5 clients with class numbers of their own, "
        f"{sizes.representation_rounds} rounds: test accuracy and loss of heads fitted to 20 examples",
        ("method", "eta (tuned)", "accuracy", "loss"),
        rows,
    )


def _plot(clean: Figures, shared: Figures, stem: Path) -> list[Path]:
    """Draw accuracy over rounds for both federated tasks, each method at its best step."""
    from turnout.reproduce.figures import Line, panels

    def lines(figures: Figures) -> list[Line]:
        drawn = []
        for method in dict.fromkeys(m for m, _ in figures):
            eta = _last(figures, method, "accuracy")[1]
            result = figures[method, eta]
            if len(result["rounds"]) > 1:
                drawn.append(
                    Line(f"{method}, eta {eta:g}", result["rounds"].tolist(), result["accuracy"].tolist())
                )
        return drawn

    parts = [
        ("hyper-cleaning", "weights of 500 examples stay with their clients", lines(clean)),
        ("hyper-representation", "heads stay with their clients", lines(shared)),
    ]
    title = "Two federated bilevel problems: normalised steps need no small step size"
    return panels(stem, title, parts, x_label="round", y_label="test accuracy", log=False)
