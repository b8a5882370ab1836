"""Field space's small study: binary weights that learn one task after the other (arXiv 2212.02846).

Digits, 64-200-200-10, three tasks that shuffle the pixels, eight epochs each; evaluated on all tasks at the
end, with the weights' means and with their signs, 1 bit each. First in one place, against constant
temperatures, other priors, binary weights with straight-through gradients and metaplasticity, and ordinary
networks (SGD and AdamW, tuned, with a decaying rate; with and without EWC). Then over five clients, by merge
rule.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from flwr.app import ArrayRecord

from turnout.client import client_app
from turnout.reproduce.continual_baselines import EWC, sequence_of_tasks
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.simulation import LocalGrid
from turnout.strategies import FedAvg, FieldSpaceContinual, StreamingStrategy
from turnout.tasks import Permuted
from turnout.wire import register, view

SLUG: Final = "field-space-continual"
ANNEALED: Final = "annealed beta"
KLS: Final = (0.03, 0.1, 0.3)
BETAS: Final = (1.0, 3.0, 9.7)
FIELDS: Final[dict[str, dict[str, Any]]] = {
    "constant beta 1, small start": {"beta": 1.0, "scale": 0.1},
    "constant beta 1": {"beta": 1.0},
    "constant beta 1, task KL 0.03": {"beta": 1.0, "kl_weight": 0.03},
    "constant beta 3": {"beta": 3.0},
    "constant beta 9.7": {"beta": 9.7},
    ANNEALED: {},
    **{f"{ANNEALED}, task KL {kl:g}": {"kl_weight": kl} for kl in KLS},
    f"{ANNEALED}, streaming KL": {"kl_weight": 1.0, "prior": "stream"},
    f"{ANNEALED}, steps scaled by s": {"natural": True},
    f"{ANNEALED}, small start": {"scale": 0.1},
    f"{ANNEALED}, grey values from 0 to 1": {"normalised": False},
}
OTHERS: Final[dict[str, dict[str, Any]]] = {
    "binary, straight-through": {"net": "straight-through", "lr": (0.003, 0.01)},
    "binary, metaplastic": {"net": "straight-through", "lr": (0.003, 0.01), "metaplasticity": 1.3},
    "float, SGD": {"net": "float", "optimizer": "sgd", "lr": (0.03, 0.1)},
    "float, AdamW": {"net": "float", "optimizer": "adamw", "lr": (0.001, 0.003)},
    "float, AdamW and EWC": {"net": "float", "optimizer": "adamw", "lr": (0.001, 0.003), "ewc": EWC},
}
FEDERATED: Final[dict[str, dict[str, Any]]] = {
    "annealed, log-odds": {},
    "annealed, moments kept": {"moments": "keep"},
    "annealed, task KL 0.1": {"kl_weight": 0.1, "prior": "task"},
    "annealed, task KL 0.1, moments kept": {"kl_weight": 0.1, "prior": "task", "moments": "keep"},
    "annealed, magnetisation": {"merge": "magnetisation"},
    "annealed, posterior product": {"merge": "posterior-product", "weighting": "uniform"},
    **{f"constant beta {beta:g}": {"temperature": "constant", "beta": beta} for beta in BETAS},
    **{
        f"constant beta {beta:g}, moments kept": {"temperature": "constant", "beta": beta, "moments": "keep"}
        for beta in BETAS
    },
    "FedAvg, AdamW (float)": {},
}
REFERENCE: Final = {
    "constant beta 1, small start": ".462/.470", "constant beta 1": ".748/.692",
    "constant beta 1, task KL 0.03": ".755/.704", "constant beta 9.7": ".702/.703",
    ANNEALED: ".840/.840", f"{ANNEALED}, task KL 0.03": ".845/.842", f"{ANNEALED}, task KL 0.1": ".844/.850",
    f"{ANNEALED}, streaming KL": ".818/.805", f"{ANNEALED}, small start": ".767/.763",
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    width: int = 200
    tasks: int = 3
    epochs: int = 8
    seeds: int = 3
    clients: int = 5


FULL: Final = Sizes()
Job = tuple[str, str, Sizes, int]
Row = dict[str, float]


def measure(job: Job) -> Row:
    """Return the accuracies of one setting under one seed."""
    kind, name, sizes, seed = job
    torch.set_num_threads(1)
    if kind == "federated":
        return _federated(name, sizes, seed)
    net: Any = "float" if OTHERS.get(name, {}).get("net") == "float" else "binary"
    task = Permuted(
        num_clients=1, model=net, width=sizes.width, num_tasks=sizes.tasks, rounds_per_task=1, seed=seed
    )
    settings = dict(FIELDS[name] if kind == "field" else OTHERS[name])
    if not settings.pop("normalised", True):
        task.mean, task.std = 0.0, 1.0
    if kind == "field":
        return sequence_of_tasks(task, epochs=sizes.epochs, seed=seed, **settings)
    rates, penalties = settings.pop("lr"), settings.pop("ewc", (0.0,))
    tried = [
        sequence_of_tasks(task, epochs=sizes.epochs, seed=seed, lr=lr, ewc=ewc, **settings)
        for lr in rates
        for ewc in penalties
    ]
    return max(tried, key=lambda row: row["accuracy"])


def _federated(name: str, sizes: Sizes, seed: int) -> Row:
    """Return the accuracies of a federated run, and the bytes of its fields and of what is deployed."""
    rounds = sizes.tasks * sizes.epochs
    floating = name.startswith("FedAvg")
    task = Permuted(
        num_clients=sizes.clients,
        model="float" if floating else "binary",
        width=sizes.width,
        num_tasks=sizes.tasks,
        rounds_per_task=sizes.epochs,
        seed=seed,
    )
    optimizer: dict[str, Any] = {"optimizer": "adamw", "lr": 0.001} if floating else {"lr": 0.01}
    app = client_app(task, batch_size=16, seed=seed, **optimizer)
    strategy: StreamingStrategy = FedAvg()
    if not floating:
        options = {"total_rounds": rounds, "rounds_per_task": sizes.epochs, **FEDERATED[name]}
        strategy = FieldSpaceContinual(**options)
    strategy.start(LocalGrid(app, sizes.clients), task.initial_arrays(), num_rounds=rounds)
    arrays = strategy.arrays()
    found = task.evaluate(arrays)
    deployed = strategy.deployed() if isinstance(strategy, FieldSpaceContinual) else arrays
    mean_field = task.evaluate_tasks(_at_the_end(task, arrays, strategy), "mean-field")
    return {
        **{key: value for key, value in mean_field.items() if key != "loss"},
        "binary": found["accuracy"],
        "sent": float(_bytes(arrays)),
        "deployed": float(_bytes(deployed)),
    }


def _at_the_end(task: Permuted, arrays: ArrayRecord, strategy: StreamingStrategy) -> torch.nn.Module:
    from turnout.optim import set_temperature

    model = task.loaded_model(arrays)
    if isinstance(strategy, FieldSpaceContinual):
        set_temperature(model, strategy.inverse_temperature(strategy.total_rounds))
    return model


def _bytes(arrays: ArrayRecord) -> int:
    return sum(
        len(array.data) if array.stype.startswith("turnout") else view(array).nbytes
        for array in arrays.values()
    )


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Three tasks in a row, in one place and over five clients."""
    started = time.perf_counter()
    kinds = {"federated": FEDERATED, "other": OTHERS, "field": FIELDS}
    jobs: list[Job] = [
        (kind, name, sizes, seed)
        for kind, settings in kinds.items()
        for name in settings
        for seed in range(1 if kind == "federated" else sizes.seeds)
    ]
    results = run_jobs(measure, jobs, what="sequences of tasks", progress=progress, workers=workers)
    rows: dict[tuple[str, str], Row] = {}
    for kind, settings in kinds.items():
        for name in settings:
            runs = [r for job, r in zip(jobs, results, strict=True) if job[:2] == (kind, name)]
            rows[kind, name] = {key: float(np.mean([r[key] for r in runs])) for key in runs[0]}
    central = {name: row for (kind, name), row in rows.items() if kind != "federated"}
    federated = {name: row for (kind, name), row in rows.items() if kind == "federated"}
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(central, federated, sizes)),
        (_central_table(central, sizes), _federated_table(federated, sizes)),
        {"field-space-continual": partial(_plot, central, sizes)},
    )


register(SLUG, "study", "2212.02846")(run)


def _claims(central: Mapping[str, Row], federated: Mapping[str, Row], sizes: Sizes) -> list[Claim]:
    annealed = central[ANNEALED]
    constants = [f"constant beta {beta:g}" for beta in BETAS]
    constant = max(central[name]["accuracy"] for name in constants)
    first = [annealed["accuracy-1"], *(central[f"{ANNEALED}, task KL {kl:g}"]["accuracy-1"] for kl in KLS)]
    gap = abs(annealed["binary"] - annealed["accuracy"])
    rises = all(b >= a for a, b in itertools.pairwise(first))
    ours, plain = federated["annealed, log-odds"], max(federated[name]["binary"] for name in constants)
    kept = federated["annealed, moments kept"]["binary"]
    kept_plain = max(federated[f"{name}, moments kept"]["binary"] for name in constants)
    best = max(central[n]["accuracy"] for n in OTHERS)
    floating = federated["FedAvg, AdamW (float)"]
    pixels, classes = 64, 10
    bits = [sizes.width * pixels, sizes.width**2, classes * sizes.width]
    packed = sum(-(-count // 8) for count in bits)
    return [
        Claim(
            "annealing beats the best constant beta by at least 5 points on average",
            annealed["accuracy"],
            constant,
            annealed["accuracy"] >= constant + 0.05,
        ),
        Claim(
            "annealed: 1-bit weights within 3 points of mean-field",
            annealed["binary"],
            annealed["accuracy"],
            gap <= 0.03,
        ),
        Claim(
            "annealed: accuracy on task 1 grows with the weight of the task KL",
            " ".join(f"{a:.3f}" for a in first),
            "growing",
            rises,
        ),
        Claim(
            "annealed, 1 bit: no worse than straight-through, metaplastic, SGD, AdamW and EWC (tuned)",
            annealed["binary"],
            best,
            annealed["binary"] >= best,
        ),
        Claim(
            "federated: annealing beats the best constant beta by at least 5 points (1-bit weights)",
            ours["binary"],
            plain,
            ours["binary"] >= plain + 0.05,
        ),
        Claim(
            "federated, moments kept: annealing beats the best constant beta by at least 5 points (1-bit)",
            kept,
            kept_plain,
            kept >= kept_plain + 0.05,
        ),
        Claim(
            "federated: 1-bit weights at least as good as FedAvg with AdamW on a float network",
            ours["binary"],
            floating["binary"],
            ours["binary"] >= floating["binary"],
        ),
        Claim(
            "deployed model: one bit per weight",
            int(ours["deployed"]),
            packed,
            int(ours["deployed"]) == packed,
        ),
    ]


def _central_table(central: Mapping[str, Row], sizes: Sizes) -> Table:
    tasks = [f"accuracy-{t}" for t in range(1, sizes.tasks + 1)]
    cells: list[Sequence[Value]] = [
        [
            name,
            *(f"{row[key]:.3f}" for key in (*tasks, "accuracy")),
            f"{row['binary']:.3f}" if "binary" in row else "",
            REFERENCE.get(name, ""),
        ]
        for name, row in central.items()
    ]
    return Table.of(
        f"In one place: accuracy after {sizes.tasks} tasks of {sizes.epochs} epochs, {sizes.seeds} seeds. "
        "Reference (an independent implementation, one seed): average with means / with 1-bit weights",
        (
            "method",
            *(f"task {t}" for t in range(1, sizes.tasks + 1)),
            "average",
            "1-bit average",
            "reference",
        ),
        cells,
    )


def _federated_table(federated: Mapping[str, Row], sizes: Sizes) -> Table:
    cells: list[Sequence[Value]] = [
        [
            name,
            *(f"{row[f'accuracy-{t}']:.3f}" for t in range(1, sizes.tasks + 1)),
            f"{row['accuracy']:.3f}",
            f"{row['binary']:.3f}",
            int(row["sent"]),
            int(row["deployed"]),
        ]
        for name, row in federated.items()
    ]
    return Table.of(
        f"Over {sizes.clients} clients, {sizes.epochs} rounds a task, one local epoch a round",
        (
            "method", *(f"task {t}" for t in range(1, sizes.tasks + 1)), "average", "1-bit average",
            "bytes of a model in training", "bytes deployed",
        ),
        cells,
    )  # fmt: skip


def _plot(central: Mapping[str, Row], sizes: Sizes, stem: Path) -> list[Path]:
    """Draw each task's accuracy at the end, per method."""
    from turnout.reproduce.figures import Line, panels

    shown = (
        "constant beta 1",
        ANNEALED,
        f"{ANNEALED}, task KL 0.1",
        "binary, straight-through",
        "float, AdamW",
    )
    tasks = list(range(1, sizes.tasks + 1))
    lines = [Line(name, tasks, [central[name][f"accuracy-{t}"] for t in tasks]) for name in shown]
    return panels(
        stem,
        "What is left of earlier tasks",
        [("permuted digits", "accuracy after the whole sequence", lines)],
        x_label="task",
        y_label="test accuracy",
        log=False,
    )
