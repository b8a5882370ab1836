"""The loss-curvature edit's study: planted wrong labels, memorised and then edited away (arXiv 2510.24256).

Digits, a perceptron 64-256-256-10, 1,200 training examples of which 120 have random wrong labels. It is
trained until all are memorised; then the curvature of the middle layer is gathered from ten clients with
skewed labels, and the layer is edited. Beside it: truncated SVD and magnitude pruning of the same layer,
eigenvalues in random order, labels sampled from the model, early stopping, and AdamW with its weight decay
tuned.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord

from turnout.client import client_app
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.simulation import LocalGrid
from turnout.strategies import FedAvg
from turnout.strategies.loss_curvature_edit import Factors, edit_arrays, gather_curvature
from turnout.tasks import PlantedLabels
from turnout.wire import NDArray, as_array, register, view

SLUG: Final = "loss-curvature-edit"
LAYER: Final = "3"
RHOS: Final = (0.99, 0.95, 0.9, 0.8)
ENERGIES: Final = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2)
KEPT: Final = (0.3, 0.2, 0.1, 0.05, 0.02)
WEIGHT_DECAYS: Final = (0.1, 1.0, 3.0)
METRICS: Final = ("accuracy", "memorised", "recovered", "train-accuracy")
REFERENCE: Final = {
    "none": "1.00/.00/.935", "K-FAC 0.99": ".90/.10/.931", "K-FAC 0.95": ".10/.78/.878",
    "K-FAC 0.9": ".03/.81/.868", "SVD 0.8": "1.00/.00/.935", "SVD 0.6": ".70/.27/.915",
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    epochs: int = 400
    every: int = 20
    width: int = 256
    train_examples: int = 1200
    statistics_clients: int = 10


FULL: Final = Sizes()
Row = dict[str, float]


def train(job: tuple[float, Sizes]) -> tuple[list[Row], dict[str, NDArray]]:
    """Return the metrics while training with this weight decay (0: Adam), and the last model."""
    weight_decay, sizes = job
    task = _task(sizes, 1)
    app = client_app(
        task,
        optimizer="adamw" if weight_decay else "adam",
        weight_decay=weight_decay,
        lr=1e-3,
        batch_size=128,
        local_epochs=sizes.every,
    )
    curve: list[Row] = []
    strategy = FedAvg()
    strategy.start(
        LocalGrid(app, 1),
        task.initial_arrays(),
        num_rounds=sizes.epochs // sizes.every,
        evaluate_fn=lambda server_round, arrays: curve.append(task.evaluate(arrays)),
    )
    return curve, {name: np.array(view(array)) for name, array in strategy.arrays().items()}


def _task(sizes: Sizes, num_clients: int) -> PlantedLabels:
    partition: dict[str, Any] = {"partition": "dirichlet", "alpha": 0.3} if num_clients > 1 else {}
    return PlantedLabels(
        num_clients=num_clients, train_examples=sizes.train_examples, width=sizes.width, **partition
    )


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Planted labels: memorised by training, forgotten by an edit."""
    started = time.perf_counter()
    jobs = [(decay, sizes) for decay in (0.0, *WEIGHT_DECAYS)]
    trained = run_jobs(train, jobs, what="models to memorise", progress=progress, workers=workers)
    curve, arrays = trained[0]
    model = ArrayRecord()
    for name, array in arrays.items():
        model[name] = as_array(array)
    rows, details = _edits(model, sizes)
    stopped = max(range(1, len(curve)), key=lambda index: curve[index]["accuracy"])
    rows[f"early stopping, epoch {stopped * sizes.every}"] = curve[stopped]
    decays = {decay: curve[-1] for (decay, _), (curve, _) in zip(jobs[1:], trained[1:], strict=True)}
    for decay, last in decays.items():
        rows[f"AdamW, weight decay {decay:g}"] = last
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(rows, details)),
        (_table(rows, sizes),),
        {"loss-curvature-edit": partial(_plot, rows)},
    )


register(SLUG, "study", "2510.24256")(run)


def _edits(model: ArrayRecord, sizes: Sizes) -> tuple[dict[str, Row], Row]:
    """Return the metrics of the model under each edit, and figures about the statistics themselves."""
    task = _task(sizes, sizes.statistics_clients)
    grid = LocalGrid(client_app(task), task.num_clients)
    pooled = _factors(model, LocalGrid(client_app(_task(sizes, 1)), 1), "dataset")
    factors = _factors(model, grid, "dataset")
    rows = {"none": _judged(task, model, 1.0, 1.0)}
    for rho in RHOS:
        rows[f"K-FAC {rho:g}"] = _edited(task, model, factors, rho)
    for energy in ENERGIES:
        rows[f"SVD {energy:g}"] = _replaced(task, model, lambda w, e=energy: _svd(w, energy=e))
    alike = rows["K-FAC 0.95"]["kept"]
    rows["SVD, as many numbers as K-FAC 0.95"] = _replaced(task, model, lambda w: _svd(w, numbers=alike))
    for kept in KEPT:
        rows[f"magnitude {kept:g}"] = _replaced(task, model, lambda w, k=kept: _largest(w, k))
    rows["K-FAC 0.95, shuffled eigenvalues"] = _edited(task, model, _shuffled(factors), 0.95)
    for labels in ("expected", "sampled"):
        rows[f"K-FAC 0.95, {labels} labels"] = _edited(task, model, _factors(model, grid, labels), 0.95)
    difference = _difference(model, factors, pooled)
    return rows, {"difference": difference}


def _factors(model: ArrayRecord, grid: LocalGrid, labels: Any) -> Mapping[str, Factors]:
    sums, missing = gather_curvature(grid, model, [LAYER], labels=labels)
    assert not missing
    return sums.factors()


def _difference(model: ArrayRecord, one: Mapping[str, Factors], other: Mapping[str, Factors]) -> float:
    """Return the largest relative difference of the edited weights under two sets of factors."""
    first, second = (edit_arrays(model, f, 0.95)[1][LAYER].weight for f in (one, other))
    return float(np.abs(first - second).max() / np.abs(second).max())


def _edited(task: PlantedLabels, model: ArrayRecord, factors: Mapping[str, Factors], rho: float) -> Row:
    edited, layers = edit_arrays(model, factors, rho)
    return _judged(task, edited, layers[LAYER].kept, layers[LAYER].energy)


def _replaced(task: PlantedLabels, model: ArrayRecord, change: Any) -> Row:
    weight = view(model[f"{LAYER}.weight"])
    changed, kept = change(weight.astype(np.float64))
    record = ArrayRecord()
    for name, array in model.items():
        record[name] = as_array(changed.astype(np.float32)) if name == f"{LAYER}.weight" else array
    energy = float((changed**2).sum() / (weight.astype(np.float64) ** 2).sum())
    return _judged(task, record, kept, energy)


def _judged(task: PlantedLabels, model: ArrayRecord, kept: float, energy: float) -> Row:
    found = task.evaluate(model)
    module = task.loaded_model(model)
    own = [
        task.evaluate_model(module, task.client_data(client))["accuracy"]
        for client in range(task.num_clients)
    ]
    return {**found, "kept": kept, "energy": energy, "worst-client": min(own)}


def _svd(weight: NDArray, *, energy: float = 0.0, numbers: float = 0.0) -> tuple[NDArray, float]:
    """Keep the largest singular values: up to a share of the energy, or as many numbers as a share of all."""
    u, s, vt = np.linalg.svd(weight)
    per_rank = (sum(weight.shape) + 1) / weight.size
    rank = max(1, int(numbers / per_rank))
    if energy:
        rank = int(np.searchsorted(np.cumsum(s**2), energy * (s**2).sum())) + 1
    return (u[:, :rank] * s[:rank]) @ vt[:rank], min(1.0, rank * per_rank)


def _largest(weight: NDArray, kept: float) -> tuple[NDArray, float]:
    threshold = np.quantile(np.abs(weight), 1 - kept)
    return np.where(np.abs(weight) >= threshold, weight, 0.0), kept


def _shuffled(factors: Mapping[str, Factors]) -> Mapping[str, Factors]:
    """Return the factors with each one's eigenvalues given to its eigenvectors at random."""
    rng = np.random.default_rng(0)

    def mixed(matrix: NDArray) -> NDArray:
        values, vectors = np.linalg.eigh(matrix)
        result: NDArray = (vectors * rng.permutation(values)) @ vectors.T
        return result

    return {name: Factors(mixed(f.inputs), mixed(f.gradients)) for name, f in factors.items()}


def _rivals(rows: Mapping[str, Row], word: str, accuracy: float) -> Row:
    """Return a family's row that memorises least with at least this test accuracy, else its most accurate."""
    family = [row for name, row in rows.items() if name.startswith(word) and "," not in name]
    good = [row for row in family if row["accuracy"] >= accuracy]
    return (
        min(good, key=lambda row: row["memorised"]) if good else max(family, key=lambda row: row["accuracy"])
    )


def _claims(rows: Mapping[str, Row], details: Row) -> list[Claim]:
    before, edited = rows["none"], rows["K-FAC 0.95"]
    svd, magnitude = (_rivals(rows, word, edited["accuracy"]) for word in ("SVD", "magnitude"))
    shuffled = rows["K-FAC 0.95, shuffled eigenvalues"]
    text = "K-FAC 0.95: memorised labels fall by at least 80 points"
    fell, cost = before["memorised"] - edited["memorised"], before["accuracy"] - edited["accuracy"]
    claims = [
        Claim(text, edited["memorised"], before["memorised"], fell >= 0.8),
        Claim(
            "K-FAC 0.95: test accuracy falls by at most 8 points",
            edited["accuracy"],
            before["accuracy"],
            cost <= 0.08,
        ),
    ]
    stronger = rows["K-FAC 0.9"]
    both = (
        before["memorised"] - stronger["memorised"] >= 0.8
        and before["accuracy"] - stronger["accuracy"] <= 0.08
    )
    text = "K-FAC 0.9: both at once, memorised labels 80 points down and test accuracy at most 8"
    claims.append(Claim(text, stronger["memorised"], before["memorised"], both))
    recovered = edited["recovered"]
    claims.append(
        Claim(
            "K-FAC 0.95: true labels come back for most planted examples",
            recovered,
            before["recovered"],
            recovered > 0.5,
        )
    )
    for name, rival in (("SVD", svd), ("magnitude pruning", magnitude)):
        text = f"K-FAC 0.95 memorises less than {name} swept to no lower test accuracy"
        claims.append(
            Claim(text, edited["memorised"], rival["memorised"], edited["memorised"] < rival["memorised"])
        )
    text = "K-FAC 0.95 keeps more test accuracy than with eigenvalues in random order"
    claims.append(
        Claim(text, edited["accuracy"], shuffled["accuracy"], edited["accuracy"] > shuffled["accuracy"])
    )
    difference = details["difference"]
    text = "ten clients' statistics give the edit of one pool (largest relative difference below 1e-3)"
    claims.append(Claim(text, difference, 0.0, difference < 1e-3))
    early = next(row for name, row in rows.items() if name.startswith("early stopping"))
    text = "K-FAC 0.95 is no worse in test accuracy than early stopping"
    claims.append(Claim(text, edited["accuracy"], early["accuracy"], edited["accuracy"] >= early["accuracy"]))
    return claims


def _table(rows: Mapping[str, Row], sizes: Sizes) -> Table:
    cells: list[Sequence[Value]] = []
    for name, row in rows.items():
        shares = [f"{row[key]:.3f}" if key in row else "" for key in ("kept", "energy")]
        figures = [f"{row[key]:.3f}" for key in METRICS]
        worst = f"{row['worst-client']:.3f}" if "worst-client" in row else ""
        cells.append([name, *shares, *figures, worst, REFERENCE.get(name, "")])
    return Table.of(
        f"Middle layer of a {sizes.width}-{sizes.width} perceptron after {sizes.epochs} epochs; edits by the "
        f"curvature of {sizes.statistics_clients} clients. Reference (an independent implementation): "
        "memorised/recovered/test accuracy",
        (
            "edit",
            "numbers kept",
            "energy kept",
            "test accuracy",
            "memorised",
            "recovered",
            "clean train",
            "worst client",
            "reference",
        ),
        cells,
    )


def _plot(rows: Mapping[str, Row], stem: Path) -> list[Path]:
    """Draw what is memorised over test accuracy, along each kind of edit."""
    from turnout.reproduce.figures import Line, panels

    lines = []
    for word in ("K-FAC", "SVD", "magnitude"):
        family = [rows["none"]] + [r for n, r in rows.items() if n.startswith(word) and "," not in n]
        lines.append(Line(word, [r["accuracy"] for r in family], [r["memorised"] for r in family], mark=0))
    return panels(
        stem,
        "Planted labels: what an edit costs, and what it makes a model forget",
        [("one layer edited", "the dot is the model before; lower right is better", lines)],
        x_label="test accuracy",
        y_label="planted labels memorised",
        log=False,
    )
