"""FedAU's small study: participation that is unknown and goes with the labels (arXiv 2306.03401).

Softmax regression on a ten-class Gaussian mixture in 20 dimensions, 50 clients whose label mixes are
Dirichlet(0.1) and whose participation rates follow their labels (about 0.1 on average, at least 0.02). The
figure is the test accuracy, averaged over the second half of the rounds. Three models of participation:
independent coins, a Markov chain that comes back with probability 0.05, and a cycle of 100 rounds. The two
averages that know nothing of p are tuned over their server learning rate; FedAU is not.

A second part has ten quadratics of one curvature: how far the time average of the model is from the optimum,
in units of the bias of participation (the distance of the p-weighted optimum).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from turnout.reproduce.drive import Sent, drive
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.reproduce.softmax_clients import Mixture, SoftmaxClients
from turnout.simulation import Bernoulli, Cyclic, Markov, ParticipationModel, label_correlated
from turnout.strategies import MIFA, AverageAll, FedAU, FedAvg, FedVARP, UnbiasedFedAvg
from turnout.strategies.rounds import Instruction
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import NDArray, register

SLUG: Final = "fedau"
LEARNING_RATE: Final = 0.1
LOCAL_STEPS: Final = 5
BATCH: Final = 16
EVALUATE_EVERY: Final = 5

PARTICIPATING: Final = "average participating"
ALL: Final = "average all"
KNOWN: Final = "known p"
FEDAU_INF: Final = "FedAU K=inf"
FEDAU_50: Final = "FedAU K=50"
MIFA_NAME: Final = "MIFA"
FEDVARP: Final = "FedVARP"
METHODS: Final = (PARTICIPATING, ALL, KNOWN, FEDAU_INF, FEDAU_50, MIFA_NAME, FEDVARP)
REFERENCE: Final = {
    PARTICIPATING: 0.762,
    ALL: 0.766,
    KNOWN: 0.800,
    FEDAU_INF: 0.799,
    FEDAU_50: 0.800,
    MIFA_NAME: 0.807,
    FEDVARP: 0.807,
}
REFERENCE_QUADRATIC: Final = {PARTICIPATING: 1.1, ALL: 1.0, KNOWN: 0.05, FEDAU_INF: 0.07}
ETAS: Final = {PARTICIPATING: (0.3, 1.0, 3.0), ALL: (3.0, 10.0, 30.0)}

MODELS: Final[dict[str, Callable[[NDArray, int], ParticipationModel]]] = {
    "Bernoulli": lambda p, seed: Bernoulli(p, seed, allow_zero=True),
    "Markov 0.05": lambda p, seed: Markov(p, 0.05, seed, allow_zero=True),
    "Cyclic 100": lambda p, seed: Cyclic(p, 100, seed, allow_zero=True),
}
MAIN: Final = "Bernoulli"
QUADRATIC: Final = "quadratic"


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    num_clients: int = 50
    train_examples: int = 4000
    test_examples: int = 2000
    rounds: int = 600
    seeds: int = 4
    quadratic_clients: int = 10
    quadratic_dimension: int = 5
    quadratic_rounds: int = 4000


FULL: Final = Sizes()
Curves = dict[tuple[str, float], NDArray]
"""By method and server learning rate: accuracy at every `EVALUATE_EVERY`-th round, or one distance."""


def strategies(num_clients: int, rates: NDArray) -> dict[tuple[str, float], StreamingStrategy]:
    """Return what is compared, by name and server learning rate; clients that never come have rate 0."""
    known = {client: rate for client, rate in enumerate(rates.tolist()) if rate > 0}
    n = num_clients
    compared: dict[tuple[str, float], StreamingStrategy] = {}
    for eta in ETAS[PARTICIPATING]:
        compared[PARTICIPATING, eta] = FedAvg(num_clients=n, weighting="uniform", server_lr=eta)
    for eta in ETAS[ALL]:
        compared[ALL, eta] = AverageAll(num_clients=n, server_lr=eta)
    compared[KNOWN, 1.0] = UnbiasedFedAvg(num_clients=n, participation=known)
    compared[FEDAU_INF, 1.0] = FedAU(num_clients=n, cutoff=None)
    compared[FEDAU_50, 1.0] = FedAU(num_clients=n, cutoff=50)
    compared[MIFA_NAME, 1.0] = MIFA(num_clients=n)
    compared[FEDVARP, 1.0] = FedVARP(num_clients=n)
    return compared


def measure(job: tuple[str, Sizes, int]) -> Curves:
    """Return what all strategies reach under one model of participation, for one seed."""
    kind, sizes, seed = job
    return _quadratic(sizes, seed) if kind == QUADRATIC else _mixture(MODELS[kind], sizes, seed)


def _mixture(make: Callable[[NDArray, int], ParticipationModel], sizes: Sizes, seed: int) -> Curves:
    data = Mixture.draw(
        num_clients=sizes.num_clients, train=sizes.train_examples, test=sizes.test_examples, seed=seed
    )
    # Another seed than the data's: the preference for labels must not repeat a draw of the partition.
    model = make(label_correlated(data.label_distribution, seed=1000 + seed), seed)
    masks = [np.flatnonzero(model.mask(r)).tolist() for r in range(1, sizes.rounds + 1)]
    clients = SoftmaxClients(data, LEARNING_RATE, LOCAL_STEPS, BATCH, seed)
    curves: Curves = {}
    for name, strategy in strategies(sizes.num_clients, model.rates).items():
        accuracies: list[float] = []

        def observe(server_round: int, x: NDArray, accuracies: list[float] = accuracies) -> None:
            if server_round % EVALUATE_EVERY == 0:
                accuracies.append(data.accuracy(x))

        drive(
            strategy,
            data.start,
            num_clients=sizes.num_clients,
            rounds=sizes.rounds,
            present=lambda server_round: masks[server_round - 1],
            work=clients.work,
            observe=observe,
        )
        curves[name] = np.array(accuracies)
    return curves


def _quadratic(sizes: Sizes, seed: int) -> Curves:
    """Return the time-averaged model's distance to the optimum, relative to the p-weighted optimum's."""
    n, rounds = sizes.quadratic_clients, sizes.quadratic_rounds
    centres = np.random.default_rng([seed, 3]).standard_normal((n, sizes.quadratic_dimension))
    p = np.linspace(0.05, 0.9, n)
    optimum, biased = centres.mean(axis=0), p @ centres / p.sum()
    bias = float(np.linalg.norm(biased - optimum))
    model = Bernoulli(p, seed)
    pull = 1.0 - (1.0 - 0.01) ** LOCAL_STEPS

    def work(server_round: int, received: NDArray, cohort: Mapping[int, Instruction]) -> list[Sent]:
        clients = list(cohort)
        return [Sent(clients, received + pull * (centres[clients] - received))]

    distances: Curves = {}
    for name, strategy in strategies(n, p).items():
        if name[0] in ETAS and name[1] not in (1.0, 3.0):
            continue
        total = np.zeros_like(optimum)

        def observe(server_round: int, x: NDArray, total: NDArray = total) -> None:
            if server_round > rounds // 2:
                total += x

        drive(
            strategy,
            np.zeros_like(optimum),
            num_clients=n,
            rounds=rounds,
            present=lambda server_round: np.flatnonzero(model.mask(server_round)).tolist(),
            work=work,
            observe=observe,
        )
        mean = total / (rounds - rounds // 2)
        distances[name] = np.array([np.linalg.norm(mean - optimum) / bias])
    return distances


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Label-correlated participation: FedAU against averages, known p, MIFA and FedVARP."""
    started = time.perf_counter()
    jobs = [(kind, sizes, seed) for kind in (*MODELS, QUADRATIC) for seed in range(sizes.seeds)]
    results = run_jobs(measure, jobs, what="unknown participation", progress=progress, workers=workers)
    means: dict[str, Curves] = {}
    for kind in (*MODELS, QUADRATIC):
        runs = [result for job, result in zip(jobs, results, strict=True) if job[0] == kind]
        means[kind] = {name: np.mean([r[name] for r in runs], axis=0) for name in runs[0]}
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(means)),
        tuple(_tables(means, sizes)),
        {"fedau-accuracy": partial(_plot, means)},
    )


register(SLUG, "study", "2306.03401")(run)


def _best(curves: Curves, method: str) -> tuple[float, float, NDArray]:
    """Return (accuracy over the second half, server rate, curve) of the best setting of ``method``."""
    tried = [
        (float(curve[len(curve) // 2 :].mean()), eta, curve)
        for (name, eta), curve in curves.items()
        if name == method
    ]
    return max(tried, key=lambda entry: entry[0])


def _claims(means: Mapping[str, Curves]) -> list[Claim]:
    claims = []
    for kind in MODELS:
        reached = {method: _best(means[kind], method)[0] for method in METHODS}
        worse = min(reached[FEDAU_INF], reached[FEDAU_50])
        for baseline in (PARTICIPATING, ALL):
            text = (
                f"{kind}: accuracy of FedAU (worse of K = inf and 50) at least 0.02 above {baseline}, tuned"
            )
            claims.append(Claim(text, worse, reached[baseline], worse >= reached[baseline] + 0.02))
        gap = max(abs(reached[name] - reached[KNOWN]) for name in (FEDAU_INF, FEDAU_50))
        text = f"{kind}: FedAU (worse of K = inf and 50) within 0.01 of known p"
        claims.append(Claim(text, worse, reached[KNOWN], gap <= 0.01))
        memory = max(reached[MIFA_NAME], reached[FEDVARP])
        text = f"{kind}: FedAU (3 numbers a client) within 0.02 of the better of MIFA and FedVARP (N x d)"
        claims.append(Claim(text, worse, memory, worse >= memory - 0.02))
    distances = {name: float(value[0]) for (name, _), value in means[QUADRATIC].items()}
    text = "quadratics: FedAU's distance to the optimum below 0.2 of that of average participating"
    claims.append(
        Claim(
            text,
            distances[FEDAU_INF],
            distances[PARTICIPATING],
            distances[FEDAU_INF] < 0.2 * distances[PARTICIPATING],
        )
    )
    return claims


def _tables(means: Mapping[str, Curves], sizes: Sizes) -> list[Table]:
    rows: list[list[Value]] = []
    for kind in MODELS:
        cells: list[Value] = [kind]
        for method in METHODS:
            accuracy, eta, _ = _best(means[kind], method)
            tuned = f" eta {eta:g}" if method in ETAS else ""
            reference = f" ({REFERENCE[method]:.3f})" if kind == MAIN else ""
            cells.append(f"{accuracy:.3f}{reference}{tuned}")
        rows.append(cells)
    accuracies = Table.of(
        f"Test accuracy over the second half of {sizes.rounds} rounds, {sizes.seeds} seeds; local rate "
        f"{LEARNING_RATE}, server rate eta 1, tuned over {ETAS[PARTICIPATING]} and {ETAS[ALL]} for the "
        "averages; in brackets the reference (an independent implementation)",
        ("participation", *METHODS),
        rows,
    )
    cells = ["quadratics"]
    distances = {name: float(value[0]) for (name, _), value in means[QUADRATIC].items()}
    for method in METHODS:
        reference = f" ({REFERENCE_QUADRATIC[method]:g})" if method in REFERENCE_QUADRATIC else ""
        cells.append(f"{distances[method]:.2g}{reference}")
    quadratic = Table.of(
        f"Distance to the optimum relative to the bias of participation, {sizes.quadratic_clients} "
        "quadratics, p from 0.05 to 0.9, lower is better",
        ("problem", *METHODS),
        [cells],
    )
    return [accuracies, quadratic]


def _plot(means: Mapping[str, Curves], stem: Path) -> list[Path]:
    """Draw test accuracy over rounds, one panel per model of participation."""
    from turnout.reproduce.figures import Line, panels

    def lines(
        kind: str, shown: Sequence[str] = (PARTICIPATING, ALL, KNOWN, FEDAU_50, MIFA_NAME)
    ) -> list[Line]:
        drawn = []
        for method in shown:
            _, eta, accuracies = _best(means[kind], method)
            rounds = [EVALUATE_EVERY * (i + 1) for i in range(len(accuracies))]
            label = f"{method}, eta {eta:g}" if method in ETAS else method
            drawn.append(Line(label, rounds, accuracies.tolist()))
        return drawn

    explanations = ("independent coins", "long stays, long absences", "a timetable of 100 rounds")
    return panels(
        stem,
        "Unknown participation: FedAU does as well as if p were known",
        [(kind, text, lines(kind)) for kind, text in zip(MODELS, explanations, strict=True)],
        x_label="round",
        y_label="test accuracy",
        log=False,
    )
