"""FRUGAL's small study: state for a quarter of each matrix (arXiv 2411.07837).

A perceptron on handwritten digits, cosine learning rate, the subspace (columns) changed every 50 steps: the
loss on all training images at the end, at every learning rate of one grid, for AdamW, AdamW restarted as
often as FRUGAL restarts its state, FRUGAL with a quarter and with none of the state, FRUGAL that leaves the
rest alone, and signSGD on everything.

The second part is a federation: ten clients of twenty local steps a round, state reset each round or kept.
What the reset costs should be less for FRUGAL, whose own windows end with the rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from turnout.optim import FRUGAL
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.optimizer_runs import mean, train
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.wire import register
from turnout.wire.torch_threads import one_torch_thread

SLUG: Final = "frugal"
WIDTHS: Final = (64, 128, 128, 10)
GAP: Final = 50
LOCAL_STEPS: Final = 20
ADAMW, RESTARTED, SIGN = "AdamW", "AdamW, restarted", "signSGD"
QUARTER, NOTHING, LOW = "FRUGAL 0.25", "FRUGAL 0", "FRUGAL 0.25, rest: no"
METHODS: Final[dict[str, dict[str, Any] | None]] = {
    ADAMW: None,
    RESTARTED: {"density": 1.0},
    QUARTER: {"density": 0.25},
    NOTHING: {"density": 0.0},
    LOW: {"density": 0.25, "inactive_rule": "no"},
    SIGN: {"density": 0.0},
}
REFERENCE: Final[dict[str, dict[float, float]]] = {
    ADAMW: {3e-4: 0.225, 1e-3: 0.047, 3e-3: 0.0075},
    QUARTER: {3e-4: 0.233, 1e-3: 0.044, 3e-3: 0.0043},
    NOTHING: {3e-4: 0.240, 1e-3: 0.051, 3e-3: 0.0133},
    LOW: {3e-4: 1.257, 1e-3: 0.299, 3e-3: 0.069},
}
PAIRED: Final = (3e-4, 1e-3, 3e-3)
"""The learning rates at which the card of the paper compares the methods."""
FEDERATED: Final = ("adamw", "frugal")


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    steps: int = 600
    seeds: int = 2
    rounds: int = 20
    federated_rates: tuple[float, ...] = (1e-3, 3e-3)


FULL: Final = Sizes()


def make_optimizer(method: str, module: nn.Module, lr: float, seed: int) -> Sequence[torch.optim.Optimizer]:
    """Return the optimizer of ``method``: all matrices projected, biases with state but for signSGD."""
    options = METHODS[method]
    if options is None:
        return [torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)]
    if method == SIGN:
        groups = [{"params": list(module.parameters()), "is_proj": True}]
        return [FRUGAL(groups, lr=lr, projector="block", update_gap=GAP, **options)]
    return [FRUGAL(module.parameters(), lr=lr, projector="columns", update_gap=GAP, seed=seed, **options)]


def state_floats(optimizer: torch.optim.Optimizer) -> int:
    """Return how many numbers the moments of an optimizer have."""
    return sum(
        value.numel()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key.startswith("exp_avg")
    )


def measure(job: tuple[str, str, float, int, Sizes]) -> tuple[float, float, float]:
    """Return final training loss, test accuracy and numbers of state (of a federation: per client)."""
    kind, method, rate, seed, sizes = job
    if kind == "federated":
        return _federated(method, rate, seed, sizes)
    made: list[torch.optim.Optimizer] = []

    def make(module: nn.Module, lr: float) -> Sequence[torch.optim.Optimizer]:
        made.extend(make_optimizer(method, module, lr, seed))
        return made

    ended = train(
        make,
        rate,
        widths=WIDTHS,
        steps=sizes.steps,
        batch=64,
        seed=seed,
        schedule=lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    )
    return ended.loss, ended.accuracy, float(state_floats(made[0]))


def _federated(method: str, rate: float, seed: int, sizes: Sizes) -> tuple[float, float, float]:
    """Return loss and accuracy of the global model on the test set; ``method`` is "frugal reset", ..."""
    from turnout.client import client_app
    from turnout.simulation import LocalGrid
    from turnout.strategies import FedAvg
    from turnout.tasks import Digits

    optimizer, policy = method.split()
    task = Digits(num_clients=10, alpha=0.5, min_examples=10, seed=seed)
    options = {"projector": "columns", "update_gap": LOCAL_STEPS} if optimizer == "frugal" else {}
    app = client_app(
        task,
        optimizer=optimizer,
        optimizer_options=options,
        optimizer_state="keep" if policy == "keep" else "reset",
        lr=rate,
        local_steps=LOCAL_STEPS,
        seed=seed,
    )
    with one_torch_thread():
        grid = LocalGrid(app, 10, executor="serial", seed=seed)
        result = FedAvg(seed=seed).start(grid, task.initial_arrays(), num_rounds=sizes.rounds)
        metrics = task.evaluate(result.arrays)
    return metrics["loss"], metrics["accuracy"], float("nan")


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """State for a quarter of the weights: FRUGAL against AdamW, its restarts, and signSGD."""
    started = time.perf_counter()
    jobs = [
        ("federated", f"{optimizer} {policy}", rate, seed, sizes)
        for optimizer in FEDERATED
        for policy in ("reset", "keep")
        for rate in sizes.federated_rates
        for seed in range(sizes.seeds)
    ]
    jobs += [
        ("alone", method, rate, seed, sizes)
        for method in METHODS
        for rate in sizes.rates
        for seed in range(sizes.seeds)
    ]
    results = run_jobs(measure, jobs, what="a quarter of the state", progress=progress, workers=workers)
    found: dict[tuple[str, float], tuple[float, float, float]] = {}
    for key in {(method, rate): None for _, method, rate, _, _ in jobs}:
        runs = [r for job, r in zip(jobs, results, strict=True) if job[1:3] == key]
        found[key] = (mean(r[0] for r in runs), mean(r[1] for r in runs), runs[0][2])
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(found, sizes)),
        tuple(_tables(found, sizes)),
        {"frugal-loss": partial(_plot, found, sizes)},
    )


register(SLUG, "study", "2411.07837")(run)

Found = Mapping[tuple[str, float], tuple[float, float, float]]


def _tuned(found: Found, method: str, rates: Sequence[float]) -> tuple[float, float]:
    """Return the lowest loss of ``method`` and its learning rate."""
    return min((found[method, rate][0], rate) for rate in rates)


def _claims(found: Found, sizes: Sizes) -> list[Claim]:
    claims = []
    for rate in [r for r in PAIRED if r in sizes.rates]:
        ours, full, low = (found[m, rate][0] for m in (QUARTER, ADAMW, LOW))
        text = f"lr {rate:g}: loss of FRUGAL 0.25 at most 1.5 times AdamW's"
        claims.append(Claim(text, ours, full, ours <= 1.5 * full))
        text = f"lr {rate:g}: leaving the rest alone costs at least 4 times the loss of FRUGAL 0.25"
        claims.append(Claim(text, low, ours, low >= 4 * ours))
        between = found[NOTHING, rate][0]
        text = f"lr {rate:g}: FRUGAL 0 lies between FRUGAL 0.25 and leaving the rest alone"
        claims.append(Claim(text, between, ours, ours <= between <= low))
    ours, full = _tuned(found, QUARTER, sizes.rates)[0], _tuned(found, ADAMW, sizes.rates)[0]
    text = "each at its best lr: loss of FRUGAL 0.25 at most 1.5 times AdamW's"
    claims.append(Claim(text, ours, full, ours <= 1.5 * full))
    restarted = _tuned(found, RESTARTED, sizes.rates)[0]
    text = "each at its best lr: loss of FRUGAL 0.25 at most 1.5 times that of AdamW restarted as often"
    claims.append(Claim(text, ours, restarted, ours <= 1.5 * restarted))
    low = _tuned(found, LOW, sizes.rates)[0]
    text = "each at its best lr: FRUGAL 0.25 below leaving the rest alone"
    claims.append(Claim(text, ours, low, ours < low))
    kept = found[QUARTER, sizes.rates[0]][2], found[ADAMW, sizes.rates[0]][2]
    text = "numbers of state: FRUGAL 0.25 at most 0.3 of AdamW's"
    claims.append(Claim(text, int(kept[0]), int(kept[1]), kept[0] <= 0.3 * kept[1]))
    costs = {optimizer: _cost(found, optimizer, sizes) for optimizer in FEDERATED}
    text = "federation: a reset each round raises the loss by a smaller factor for FRUGAL than for AdamW"
    claims.append(Claim(text, costs["frugal"], costs["adamw"], costs["frugal"] < costs["adamw"]))
    return claims


def _cost(found: Found, optimizer: str, sizes: Sizes) -> float:
    """Return the loss with reset state over that with kept state, each at its best learning rate."""
    reset, keep = (_tuned(found, f"{optimizer} {p}", sizes.federated_rates)[0] for p in ("reset", "keep"))
    return reset / keep


def _tables(found: Found, sizes: Sizes) -> list[Table]:
    rows: list[list[Value]] = []
    for method in METHODS:
        cells: list[Value] = [method]
        for rate in sizes.rates:
            loss, accuracy, _ = found[method, rate]
            known = REFERENCE.get(method, {}).get(rate)
            cells.append(f"{loss:.3g} / {accuracy:.3f}" + (f" ({known:g})" if known else ""))
        cells.append(str(int(found[method, sizes.rates[0]][2])))
        rows.append(cells)
    first = Table.of(
        f"Digits, perceptron {'-'.join(map(str, WIDTHS))}, {sizes.steps} steps, {sizes.seeds} seeds: final "
        "training loss / test accuracy; in brackets the reference loss (an independent implementation)",
        ("method", *(f"lr {rate:g}" for rate in sizes.rates), "numbers of state"),
        rows,
    )
    rows = []
    for optimizer in FEDERATED:
        for policy in ("reset", "keep"):
            name = f"{optimizer} {policy}"
            loss, rate = _tuned(found, name, sizes.federated_rates)
            rows.append([optimizer, policy, f"{loss:.4f}", f"{found[name, rate][1]:.3f}", f"{rate:g}"])
    second = Table.of(
        f"Ten clients, {LOCAL_STEPS} local steps, {sizes.rounds} rounds of FedAvg: test loss and accuracy of "
        "the global model at the best learning rate",
        ("optimizer", "state", "test loss", "accuracy", "lr"),
        rows,
    )
    return [first, second]


def _plot(found: Found, sizes: Sizes, stem: Path) -> list[Path]:
    """Draw the final loss over the learning rate."""
    from turnout.reproduce.figures import Line, panels

    lines = [
        Line(method, list(sizes.rates), [found[method, rate][0] for rate in sizes.rates])
        for method in METHODS
    ]
    return panels(
        stem,
        "State for a quarter of the weights is enough, if the rest moves too",
        [("digits", "training loss at the end", lines)],
        x_label="learning rate",
        y_label="loss",
    )
