"""RERCE-Fed's small study: weighted least squares over noisy links (arXiv 2409.13451).

The paper's recipe at K = 20 clients and L = 16 unknowns with 6 to 12 rows each, so that no client can solve
the problem alone. Every transmitted vector gets exactly one draw of Gaussian noise of variance 0.01. The
figure is NMSD, the mean of ``||w - w*||^2 / ||w*||^2`` in dB, w* being the pooled solution: over the clients'
own models ("local") or for the server's model ("global"). Local models carry the noise of their last
download, so local is compared with local and global with global.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import numpy as np

from turnout.reproduce.admm_clients import AdmmClients, Channel, Problem, recipe, weak
from turnout.reproduce.drive import drive
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.strategies import DualADMM, FedAvg, RerceFed
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import NDArray, register

SLUG: Final = "rerce-fed-admm"
RHO: Final = 1.0
SIGMA: Final = 0.1

DUAL: Final = "dual ADMM, slots"
TWO_COPIES: Final = "two noisy copies"
RERCE: Final = "RERCE"
CONTINUAL: Final = "RERCE + continual"
FEDAVG: Final = "FedAvg, 5 steps"
METHODS: Final = (DUAL, TWO_COPIES, RERCE, CONTINUAL, FEDAVG)
REFERENCE: Final = {20: (-16.5, -16.6, -22.4, -22.9), 4: (-16.7, float("inf"), -18.5, -22.5)}
REFERENCE_FEDAVG: Final = {20: -28.0, 4: -21.6}
View = Literal["local", "global"]


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    num_clients: int = 20
    dimension: int = 16
    min_examples: int = 6
    max_examples: int = 12
    scheduled: int = 4
    rounds: int = 300
    tail: int = 50
    runs: int = 20
    drift_rounds: int = 2000
    drift_runs: int = 8


FULL: Final = Sizes()


@dataclass(frozen=True)
class Course:
    """One method's NMSD per round (not in dB), shape (rounds,): of the local models and of the server's."""

    local: NDArray
    global_: NDArray

    def tail(self, view: View, rounds: int) -> float:
        """Return the mean over the last ``rounds`` rounds in dB."""
        return decibel(float((self.local if view == "local" else self.global_)[-rounds:].mean()))


def decibel(ratio: float) -> float:
    """Return ``10 log10(ratio)``."""
    return float(10 * np.log10(ratio))


def least_squares(sizes: Sizes, seed: int) -> Problem:
    """Return the paper's weighted least squares at the study's size."""
    return recipe(
        num_clients=sizes.num_clients,
        dimension=sizes.dimension,
        min_examples=sizes.min_examples,
        max_examples=sizes.max_examples,
        seed=seed,
    )


def strategies(num_clients: int, scheduled: int, seed: int) -> dict[str, StreamingStrategy]:
    """Return what is compared, ``scheduled`` clients a round."""
    return {
        DUAL: DualADMM(num_clients=num_clients, rho=RHO, clients_per_round=scheduled, seed=seed),
        TWO_COPIES: DualADMM(
            num_clients=num_clients, rho=RHO, clients_per_round=scheduled, form="two-copies", seed=seed
        ),
        RERCE: RerceFed(
            num_clients=num_clients, rho=RHO, clients_per_round=scheduled, continual=False, seed=seed
        ),
        CONTINUAL: RerceFed(num_clients=num_clients, rho=RHO, clients_per_round=scheduled, seed=seed),
        FEDAVG: FedAvg(num_clients=num_clients, weighting="uniform"),
    }


def observe_run(
    name: str, problem: Problem, *, scheduled: int, rounds: int, sigma: float, seed: int
) -> Course:
    """Run one method and return its NMSD per round."""
    n, dimension = problem.linear.shape
    clients = AdmmClients(
        problem.curvature, problem.linear, RHO, Channel(n, dimension, rounds, sigma=sigma, seed=seed)
    )
    solution = problem.solution
    power = float(solution @ solution)
    local, global_ = np.empty(rounds), np.empty(rounds)

    def present(server_round: int) -> list[int]:
        if name != FEDAVG or scheduled == n:
            return list(range(n))  # The ADMM strategies draw their cohort themselves.
        drawn = np.random.default_rng([seed, server_round]).choice(n, scheduled, replace=False)
        return sorted(drawn.tolist())

    def observe(server_round: int, model: NDArray) -> None:
        local[server_round - 1] = np.square(clients.models - solution).sum(axis=1).mean() / power
        global_[server_round - 1] = np.square(model - solution).sum() / power

    drive(
        strategies(n, scheduled, seed)[name],
        np.zeros(dimension),
        num_clients=n,
        rounds=rounds,
        present=present,
        work=clients.work,
        observe=observe,
    )
    return Course(local, global_)


Job = tuple[Literal["links", "drift"], int, float, Sizes, int]


def measure(job: Job) -> dict[str, Course]:
    """Return the courses of the methods compared in one setting (scheduled, sigma), for one seed."""
    kind, scheduled, sigma, sizes, seed = job
    if kind == "drift":
        problem, rounds = weak(seed), sizes.drift_rounds
        scheduled = len(problem.linear)
    else:
        problem, rounds = least_squares(sizes, seed), sizes.rounds
    names: tuple[str, ...] = (DUAL, RERCE) if kind == "drift" else METHODS
    return {
        name: observe_run(name, problem, scheduled=scheduled, rounds=rounds, sigma=sigma, seed=seed)
        for name in names
    }


@dataclass(frozen=True)
class Drift:
    """Growth of ``||w_n - w*||^2`` per round, measured and predicted, and both methods' error at the end."""

    measured: float
    predicted: float
    rerce: float
    dual: float


@dataclass(frozen=True)
class Findings:
    """All that is reported; courses are means over runs, by method."""

    full: dict[str, Course]
    few: dict[str, Course]
    quiet: dict[str, Course]
    gap: float
    drift: Drift
    recipe_drift: float


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Least squares over noisy links: RERCE-Fed against dual ADMM, two noisy copies and FedAvg."""
    started = time.perf_counter()
    n, m = sizes.num_clients, sizes.scheduled
    jobs: list[Job] = [("links", n, SIGMA, sizes, seed) for seed in range(sizes.runs)]
    jobs += [("drift", 0, SIGMA, sizes, seed) for seed in range(sizes.drift_runs)]
    jobs += [("links", n, 0.0, sizes, seed) for seed in range(min(4, sizes.runs))]
    jobs += [("links", m, SIGMA, sizes, seed) for seed in range(sizes.runs)]
    results = run_jobs(measure, jobs, what="noisy links", progress=progress, workers=workers)

    def mean(kind: str, scheduled: int, sigma: float) -> dict[str, Course]:
        picked = [r for job, r in zip(jobs, results, strict=True) if job[:3] == (kind, scheduled, sigma)]
        return {
            name: Course(
                np.mean([r[name].local for r in picked], axis=0),
                np.mean([r[name].global_ for r in picked], axis=0),
            )
            for name in picked[0]
        }

    quiet = mean("links", n, 0.0)
    gaps = [
        np.abs(np.log10(quiet[name].local / quiet[RERCE].local)) for name in (DUAL, TWO_COPIES, CONTINUAL)
    ]
    drifted = [r for job, r in zip(jobs, results, strict=True) if job[0] == "drift"]
    example = least_squares(sizes, 0)
    findings = Findings(
        full=mean("links", n, SIGMA),
        few=mean("links", m, SIGMA),
        quiet=quiet,
        gap=float(10 * np.max(gaps)),
        drift=_drift(drifted, sizes),
        recipe_drift=example.drift(RHO, SIGMA) * sizes.rounds / float(example.solution @ example.solution),
    )
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(findings, sizes)),
        tuple(_tables(findings, sizes)),
        {"rerce-fed-nmsd": partial(_plot, findings, sizes), "rerce-fed-drift": partial(_plot_drift, drifted)},
    )


register(SLUG, "study", "2409.13451")(run)


def _drift(runs: Sequence[Mapping[str, Course]], sizes: Sizes) -> Drift:
    """Return squared errors (not relative) of the weak-curvature problems, averaged over their seeds."""
    problems = [weak(seed) for seed in range(len(runs))]
    powers = [float(p.solution @ p.solution) for p in problems]
    rerce = np.mean([power * r[RERCE].global_ for power, r in zip(powers, runs, strict=True)], axis=0)
    dual = np.mean([power * r[DUAL].global_ for power, r in zip(powers, runs, strict=True)], axis=0)
    # The mean of a random walk's square grows in proportion to time: one-parameter least squares.
    rounds = np.arange(1, len(rerce) + 1)
    slope = float(rounds @ rerce / (rounds @ rounds))
    predicted = float(np.mean([p.drift(RHO, SIGMA) for p in problems]))
    tail = min(sizes.tail, len(rerce))
    return Drift(slope, predicted, float(rerce[-tail:].mean()), float(dual[-tail:].mean()))


def _claims(f: Findings, sizes: Sizes) -> list[Claim]:
    n, m, tail = sizes.num_clients, sizes.scheduled, sizes.tail
    at = {(n, name): course for name, course in f.full.items()} | {(m, name): c for name, c in f.few.items()}

    def compare(
        text: str, better: tuple[int, str], worse: tuple[int, str], margin: float, view: View
    ) -> Claim:
        measured, baseline = at[better].tail(view, tail), at[worse].tail(view, tail)
        return Claim(f"{view} NMSD in dB: {text}", measured, baseline, bool(measured <= baseline - margin))

    claims = [
        compare(
            f"RERCE at least 4 below dual ADMM at {n}/{n} (theory: at most 7)",
            (n, RERCE),
            (n, DUAL),
            4,
            "local",
        ),
        compare(f"RERCE more than 1 below dual ADMM at {m}/{n}", (m, RERCE), (m, DUAL), 1, "local"),
        compare(f"continual at least 3 below RERCE at {m}/{n}", (m, CONTINUAL), (m, RERCE), 3, "local"),
        compare(
            f"continual at {m}/{n} within 1 of itself at {n}/{n}", (m, CONTINUAL), (n, CONTINUAL), -1, "local"
        ),
        Claim(
            f"without noise all forms of ADMM agree at {n}/{n}: largest gap to RERCE below 0.01 dB",
            f.gap,
            0.0,
            f.gap < 0.01,
        ),
        compare(f"RERCE below FedAvg at {n}/{n}", (n, RERCE), (n, FEDAVG), 0, "local"),
        compare(f"RERCE + continual below FedAvg at {m}/{n}", (m, CONTINUAL), (m, FEDAVG), 0, "local"),
        compare(f"RERCE below FedAvg at {m}/{n}", (m, RERCE), (m, FEDAVG), 0, "local"),
        compare(f"RERCE below FedAvg at {n}/{n}", (n, RERCE), (n, FEDAVG), 0, "global"),
        compare(f"RERCE below FedAvg at {m}/{n}", (m, RERCE), (m, FEDAVG), 0, "global"),
        compare(f"RERCE + continual below FedAvg at {m}/{n}", (m, CONTINUAL), (m, FEDAVG), 0, "global"),
        compare(f"RERCE + continual below dual ADMM at {m}/{n}", (m, CONTINUAL), (m, DUAL), 0, "global"),
    ]
    near = 0.5 < f.drift.measured / f.drift.predicted < 2.0
    text = "with curvature below rho RERCE's error grows per round as predicted (within a factor of 2)"
    claims.append(Claim(text, f.drift.measured, f.drift.predicted, near))
    text = (
        f"there dual ADMM stays bounded: its squared error after {sizes.drift_rounds} rounds, against RERCE's"
    )
    return [*claims, Claim(text, f.drift.dual, f.drift.rerce, f.drift.dual < 0.05 * f.drift.rerce)]


def _tables(f: Findings, sizes: Sizes) -> list[Table]:
    n, m, tail = sizes.num_clients, sizes.scheduled, sizes.tail

    def row(
        label: str, courses: Mapping[str, Course], view: View, reference: Sequence[float] = ()
    ) -> list[Value]:
        cells: list[Value] = [label]
        for index, name in enumerate(METHODS):
            value = courses[name].tail(view, tail)
            ours = "diverges" if value > 0 else f"{value:.1f}"
            known = index < len(reference)
            theirs = (
                (" (diverges)" if np.isinf(reference[index]) else f" ({reference[index]:g})") if known else ""
            )
            cells.append(ours + theirs)
        return cells

    runs = f"rounds {sizes.rounds - tail + 1} to {sizes.rounds}, {sizes.runs} runs, lower is better"
    local = Table.of(
        f"NMSD of the clients' own models in dB, noise variance {SIGMA**2:g} on both links, {runs}; in "
        "brackets the reference (an independent implementation)",
        ("scheduled", *METHODS),
        [
            row(f"{n}/{n}", f.full, "local", REFERENCE.get(n, ())),
            row(f"{m}/{n}", f.few, "local", REFERENCE.get(m, ())),
            row(f"{n}/{n}, no noise", f.quiet, "local"),
        ],
    )
    averaged: list[list[Value]] = []
    for scheduled, courses in ((n, f.full), (m, f.few)):
        cells = row(f"{scheduled}/{n}", courses, "global")
        cells[-1] = f"{cells[-1]} ({REFERENCE_FEDAVG.get(scheduled, float('nan')):g})"
        averaged.append(cells)
    averaged.append(row(f"{n}/{n}, no noise", f.quiet, "global"))
    global_ = Table.of("NMSD of the server's model in dB, likewise", ("scheduled", *METHODS), averaged)
    drift = Table.of(
        f"Drift of RERCE's consensus, squared error; weak curvature: {sizes.drift_rounds} rounds, "
        f"{sizes.drift_runs} runs, curvature 0.5, rho 1",
        ("problem", "growth per round", "predicted", "RERCE at the end", "dual ADMM at the end"),
        [
            ["weak curvature", f.drift.measured, f.drift.predicted, f.drift.rerce, f.drift.dual],
            [
                "the study's",
                "not measurable",
                f"{f.recipe_drift:.1e} of ||w*||^2 in {sizes.rounds} rounds",
                "-",
                "-",
            ],
        ],
    )
    return [local, global_, drift]


def _plot(f: Findings, sizes: Sizes, stem: Path) -> list[Path]:
    """Draw NMSD over rounds: local models on the left, the server's on the right, with few scheduled."""
    from turnout.reproduce.figures import Line, panels

    def lines(view: View) -> list[Line]:
        drawn = []
        for name in (DUAL, RERCE, CONTINUAL, FEDAVG):
            course = f.few[name].local if view == "local" else f.few[name].global_
            drawn.append(Line(name, list(range(1, len(course) + 1)), (10 * np.log10(course)).tolist()))
        return drawn

    return panels(
        stem,
        f"Noisy links, {sizes.scheduled} of {sizes.num_clients} clients scheduled",
        [
            ("The clients' own models", "each carries the noise of its last download", lines("local")),
            ("The server's model", "an average: most of the noise is gone", lines("global")),
        ],
        x_label="iteration",
        y_label="NMSD in dB, lower is better",
        log=False,
    )


def _plot_drift(runs: Sequence[Mapping[str, Course]], stem: Path) -> list[Path]:
    """Draw how RERCE's consensus drifts where the curvature is weak."""
    from turnout.reproduce.figures import Line, panels

    lines = []
    for name in (DUAL, RERCE):
        mean = np.mean([r[name].global_ for r in runs], axis=0)
        lines.append(Line(name, list(range(1, len(mean) + 1)), mean.tolist()))
    return panels(
        stem,
        "Keep rho well below the curvature",
        [("Consensus drift", "curvature 0.5, rho 1, noise variance 0.01", lines)],
        x_label="iteration",
        y_label="||w - w*||^2 / ||w*||^2 of the server's model",
    )
