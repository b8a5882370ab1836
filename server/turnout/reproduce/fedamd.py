"""FedAMD's small study: random quadratics, 5 of 20 clients per round (arXiv 2206.05891).

M clients with ``f_i = (x - c_i)' H_i (x - c_i) / 2``; ``c_i ~ 2 N(0, I)`` and ``H_i = A A' / d + I / 2`` with
A standard normal (the reference leaves curvature and start open; these give FedAvg about its error). A
small-batch gradient has noise of standard deviation 1, a large-batch one (50 times the examples) 1/sqrt(50).
Both gradients of a miner's correction see the same noise. In the main table the noise does not depend on the
point, so it cancels in the corrections; the last table repeats the comparison with noise that grows with the
distance to the client's centre and does not cancel.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from turnout.reproduce.drive import drive
from turnout.reproduce.fedamd_clients import (
    CANCELLING,
    GROWING,
    LARGE_BATCH,
    QUIET,
    Noise,
    Quadratics,
    scaffold_work,
    work,
)
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.strategies import FedAMD, FedAvg, Scaffold, suggested_anchor_probability
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import NDArray, register

SLUG: Final = "fedamd"
TARGETS: Final = (0.1, 0.02)
POINTS: Final = (10, 50, 100)

FEDAVG: Final = "FedAvg"
SCAFFOLD: Final = "SCAFFOLD"
RULE_C: Final = "FedAMD rule C"
TAU_2: Final = "FedAMD tau 2"
SMALL_P: Final = "FedAMD p 0.2"
REFERENCE: Final = {
    FEDAVG: (1.72, 1.34, 1.06, 1.28),
    SCAFFOLD: (0.037, 0.027, 0.035, 0.027),
    SMALL_P: (9.9, 2.2, 4.8, 0.83),
    "FedAMD p 0.5": (2.98, 0.52, 0.027, 0.023),
    RULE_C: (1.02, 0.019, 0.006, 0.006),
    TAU_2: (0.36, 0.009, 0.007, 0.005),
    "FedAMD tau 5": (6.1, 1.2, 0.28, 0.024),
}


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    num_clients: int = 20
    participants: int = 5
    dimension: int = 10
    rounds: int = 300
    seeds: int = 5
    tail: int = 50


FULL: Final = Sizes()


@dataclass(frozen=True)
class Course:
    """One method's run, per round: ``F(x) - F*``, and the clients' work and uploads so far."""

    errors: NDArray
    gradients: NDArray
    uploads: NDArray


def strategies(sizes: Sizes) -> dict[str, StreamingStrategy]:
    """Return what is compared, by name."""
    n = sizes.num_clients
    rule_c = suggested_anchor_probability(sizes.participants)
    return {
        FEDAVG: FedAvg(num_clients=n, weighting="uniform"),
        SCAFFOLD: Scaffold(num_clients=n),
        SMALL_P: FedAMD(num_clients=n, anchor_probability=0.2),
        "FedAMD p 0.5": FedAMD(num_clients=n, anchor_probability=0.5),
        RULE_C: FedAMD(num_clients=n, anchor_probability=rule_c),
        TAU_2: FedAMD(num_clients=n, schedule="sequential", period=2),
        "FedAMD tau 5": FedAMD(num_clients=n, schedule="sequential", period=5),
    }


def measure(job: tuple[Noise, Sizes, int]) -> dict[str, Course]:
    """Return the course of every method for one kind of noise and one seed."""
    noise, sizes, seed = job
    courses = {}
    for name, strategy in strategies(sizes).items():
        strategy.seed = seed
        problem = Quadratics(sizes.num_clients, sizes.participants, sizes.dimension, noise, seed)
        records: list[tuple[float, int, int]] = []

        def present(
            server_round: int, problem: Quadratics = problem, plain: bool = name == FEDAVG
        ) -> list[int]:
            everyone = server_round == 1 and not plain
            return list(range(sizes.num_clients)) if everyone else problem.present(server_round)

        def observe(
            server_round: int,
            x: NDArray,
            problem: Quadratics = problem,
            records: list[tuple[float, int, int]] = records,
        ) -> None:
            records.append((problem.excess(x), problem.gradients, problem.uploads))

        drive(
            strategy,
            problem.start,
            num_clients=sizes.num_clients,
            rounds=sizes.rounds,
            present=present,
            work=partial(scaffold_work if name == SCAFFOLD else work, problem),
            observe=observe,
        )
        errors, gradients, uploads = np.array(records).T
        courses[name] = Course(errors, gradients, uploads)
    return courses


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Quadratics with 5 of 20 clients per round: FedAMD against FedAvg and SCAFFOLD."""
    started = time.perf_counter()
    noises = (CANCELLING, GROWING, QUIET)
    jobs = [(noise, sizes, seed) for noise in noises for seed in range(sizes.seeds)]
    results = run_jobs(measure, jobs, what="anchors and miners", progress=progress, workers=workers)
    means: dict[Noise, dict[str, Course]] = {}
    for noise in noises:
        runs = [result for job, result in zip(jobs, results, strict=True) if job[0] == noise]
        means[noise] = {name: _mean([r[name] for r in runs]) for name in runs[0]}
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(means, sizes)),
        tuple(_tables(means, sizes)),
        {"fedamd-error": partial(_plot, means)},
    )


register(SLUG, "study", "2206.05891")(run)


def _mean(courses: Sequence[Course]) -> Course:
    return Course(
        np.mean([c.errors for c in courses], axis=0),
        np.mean([c.gradients for c in courses], axis=0),
        np.mean([c.uploads for c in courses], axis=0),
    )


def rounds_to(course: Course, target: float) -> float:
    """Return the first round whose error is at most ``target``, infinity if there is none."""
    reached = np.flatnonzero(course.errors <= target)
    return float(reached[0] + 1) if reached.size else float("inf")


def _when(rounds: float) -> int | str:
    return "never" if np.isinf(rounds) else int(rounds)


def _floor(course: Course, sizes: Sizes) -> float:
    return float(course.errors[-sizes.tail :].mean())


def _claims(means: Mapping[Noise, Mapping[str, Course]], sizes: Sizes) -> list[Claim]:
    main, quiet = means[CANCELLING], means[QUIET]
    floors = {name: _floor(course, sizes) for name, course in main.items()}
    claims = []
    for name in (RULE_C, TAU_2):
        for baseline, factor in ((SCAFFOLD, 0.5), (FEDAVG, 0.05)):
            text = f"{name} ends with less than {factor:g} times the error of {baseline}"
            claims.append(
                Claim(text, floors[name], floors[baseline], floors[name] < factor * floors[baseline])
            )
    shaky = {name: float(main[name].errors[-sizes.tail :].std()) for name in (SMALL_P, RULE_C)}
    worse = floors[SMALL_P] > floors[RULE_C] and shaky[SMALL_P] > shaky[RULE_C]
    text = "few anchors (p 0.2) end worse and noisier than rule C"
    claims.append(
        Claim(
            text,
            f"{floors[SMALL_P]:.3g} +- {shaky[SMALL_P]:.2g}",
            f"{floors[RULE_C]:.3g} +- {shaky[RULE_C]:.2g}",
            worse,
        )
    )
    fast = rounds_to(main[SCAFFOLD], TARGETS[0])
    slow = min(rounds_to(main[name], TARGETS[0]) for name in (RULE_C, TAU_2))
    text = (
        f"at first SCAFFOLD is faster: rounds until F - F* <= {TARGETS[0]:g}, against the better of FedAMD "
        "rule C and tau 2, initial pass and anchor rounds counted"
    )
    claims.append(Claim(text, _when(fast), _when(slow), fast < slow))
    exact, stuck = _floor(quiet[RULE_C], sizes), _floor(quiet[FEDAVG], sizes)
    text = "without noise FedAMD (rule C) reaches the true optimum with 5 of 20 clients; FedAvg does not"
    claims.append(Claim(text, exact, stuck, exact < 1e-6 * stuck))
    grown = {name: _floor(course, sizes) for name, course in means[GROWING].items()}
    text = "where noise does not cancel, FedAMD (rule C) still ends below SCAFFOLD"
    return [*claims, Claim(text, grown[RULE_C], grown[SCAFFOLD], grown[RULE_C] < grown[SCAFFOLD])]


def _tables(means: Mapping[Noise, Mapping[str, Course]], sizes: Sizes) -> list[Table]:
    main = means[CANCELLING]
    points = [point for point in POINTS if point <= sizes.rounds]
    rows: list[list[Value]] = []
    costs: list[list[Value]] = []
    for name, course in main.items():
        reference = REFERENCE[name]
        shown = [course.errors[point - 1] for point in points]
        cells = [f"{ours:.2g} ({theirs:g})" for ours, theirs in zip(shown, reference, strict=False)]
        rows.append([name, *cells, f"{_floor(course, sizes):.2g} ({reference[-1]:g})"])
        cost: list[Value] = [name]
        for target in TARGETS:
            reached = rounds_to(course, target)
            if np.isinf(reached):
                cost += ["never"] * 3
            else:
                at = int(reached) - 1
                cost += [int(reached), float(course.uploads[at]), float(course.gradients[at])]
        costs.append(cost)
    head = ("method", *(f"round {point}" for point in points), f"last {sizes.tail}")
    errors = Table.of(
        f"F - F*, {sizes.participants} of {sizes.num_clients} clients a round, mean of {sizes.seeds} seeds, "
        "lower is better; FedAMD and SCAFFOLD start with a gradient from every client, which counts as round "
        "1; in brackets the reference (an independent implementation)",
        head,
        rows,
    )
    names = [f"{part} to {target:g}" for target in TARGETS for part in ("rounds", "uploads", "gradients")]
    to_target = Table.of(
        "Cost until F - F* first falls to a target: rounds (initial pass and anchor rounds counted), vectors "
        f"uploaded, small-batch gradients computed (a large batch is {LARGE_BATCH})",
        ("method", *names),
        costs,
    )
    floors: list[list[Value]] = [
        [name, *(_floor(means[noise][name], sizes) for noise in (CANCELLING, GROWING, QUIET))]
        for name in main
    ]
    kinds = Table.of(
        f"F - F* over the last {sizes.tail} rounds by kind of noise",
        ("method", "cancels in corrections", "grows with distance", "none"),
        floors,
    )
    return [errors, to_target, kinds]


def _plot(means: Mapping[Noise, Mapping[str, Course]], stem: Path) -> list[Path]:
    """Draw F - F* over rounds, without and with noise that cancels."""
    from turnout.reproduce.figures import Line, panels

    shown = (FEDAVG, SCAFFOLD, SMALL_P, RULE_C, TAU_2)

    def lines(noise: Noise) -> list[Line]:
        return [
            Line(name, list(range(1, len(course.errors) + 1)), np.maximum(course.errors, 1e-16).tolist())
            for name, course in means[noise].items()
            if name in shown
        ]

    return panels(
        stem,
        "Anchors and miners reach a lower floor; SCAFFOLD is there sooner",
        [
            ("Noisy gradients", "5 of 20 clients a round, mean over seeds", lines(CANCELLING)),
            (
                "Noise that grows with the distance",
                "it does not cancel in the miners' corrections",
                lines(GROWING),
            ),
        ],
        x_label="round, the initial pass counted",
        y_label="F(x) - F*",
    )
