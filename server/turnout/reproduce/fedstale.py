"""FedStale's small study: noisy quadratics, half of the clients rare (arXiv 2405.04171).

N clients with ``f_i = ||x - c_i||^2 / 2``; the centres c_i have spread h and mean zero, so the optimum is 0.
A local round of K = 5 steps returns ``(1 - (1 - lr)^5) (c_i - x) + lr sqrt(5) noise``. The first half of the
clients takes part always, the second with probability p_low. The figure is ``||x||^2``, averaged over the
second half of the rounds: how far from the optimum the noise of participation keeps the model.

Server rules act on each coordinate alone, so one vector carries several problems with the same p_low side by
side, and several draws of each; the runs are ``histories`` of participation times ``draws``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from turnout.reproduce.drive import Sent, drive
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.simulation import Bernoulli, two_group
from turnout.strategies import MIFA, FedStale, FedVARP, UnbiasedFedAvg
from turnout.strategies.rounds import Instruction
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import NDArray, register

SLUG: Final = "fedstale"
LOCAL_STEPS: Final = 5
START: Final = 3.0
NAN: Final = float("nan")
MIFA_NAME: Final = "MIFA"
ESTIMATED: Final = "0.5, p estimated"


@dataclass(frozen=True)
class Cell:
    """One problem: local learning rate, spread h of the centres, p of the rare half, scale of the noise."""

    learning_rate: float
    spread: float
    p_low: float
    noise: float = 1.0

    def __str__(self) -> str:
        quiet = "" if self.noise else ", no noise"
        return f"lr {self.learning_rate:g}, h {self.spread:g}, p {self.p_low:g}{quiet}"


ROWS: Final = (Cell(0.05, 0.6, 0.1), Cell(0.2, 1.2, 0.9), Cell(0.2, 1.2, 0.1), Cell(0.2, 1.2, 0.03))
REFERENCE_ROWS: Final = (
    (0.315, 0.227, 0.291, 0.5),
    (0.227, 0.207, 0.208, 0.7),
    (4.00, 2.22, 2.49, 0.7),
    (26.9, 16.2, 52.1, 0.5),
)
SWEEP: Final = tuple(Cell(0.05, spread, 0.2) for spread in (0.0, 0.3, 1.0, 3.0))
REFERENCE_SWEEP: Final = (0.0, 0.2, 0.8, 1.0)
ESTIMATED_ON: Final = (ROWS[0], ROWS[3])
QUIET: Final = Cell(0.05, 0.6, 0.1, noise=0.0)


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    num_clients: int = 24
    dimension: int = 20
    rounds: int = 1200
    histories: int = 2
    draws: int = 3
    betas: tuple[float, ...] = tuple(round(0.1 * i, 1) for i in range(11))
    sweep_betas: tuple[float, ...] = (0.0, 0.2, 0.5, 0.8, 1.0)
    # Where nearly everybody comes the error is flat in beta and rounds are long: fewer values do.
    often_betas: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.8, 1.0)

    def betas_for(self, cell: Cell) -> tuple[float, ...]:
        """Return the values of beta tried on ``cell``."""
        if cell in SWEEP:
            return self.sweep_betas
        return self.often_betas if cell.p_low > 0.5 else self.betas


FULL: Final = Sizes()
Errors = dict[Cell, dict[str, float]]
"""``||x||^2`` by problem and by strategy; FedStale's strategies are named by their beta."""


class Quadratics:
    """Several problems in one vector of shape (cells * draws * dimension,), all noise drawn beforehand.

    Every strategy meets the same centres, the same noise and the same participation.
    """

    def __init__(self, cells: Sequence[Cell], sizes: Sizes, seed: int) -> None:
        rng = np.random.default_rng([seed, round(1000 * cells[0].p_low)])
        width = sizes.draws * sizes.dimension
        shape = (sizes.num_clients, len(cells) * width)
        centres = rng.standard_normal(shape)
        centres -= centres.mean(axis=0)
        rates = np.repeat([cell.learning_rate for cell in cells], width)
        self.centres = centres * np.repeat([cell.spread for cell in cells], width)
        self.contraction = 1.0 - (1.0 - rates) ** LOCAL_STEPS
        scale = rates * np.sqrt(LOCAL_STEPS) * np.repeat([cell.noise for cell in cells], width)
        self.noise = scale * rng.standard_normal((sizes.rounds, *shape))
        self.start = np.full(shape[1], START)

    def models(self, server_round: int, received: NDArray, clients: Sequence[int]) -> NDArray:
        """Return the clients' models after local training from ``received``, shape (clients, P)."""
        chosen = list(clients)
        pull = self.contraction * (self.centres[chosen] - received)
        trained: NDArray = received + (pull + self.noise[server_round - 1, chosen])
        return trained

    def work(self, server_round: int, received: NDArray, cohort: Mapping[int, Instruction]) -> list[Sent]:
        """Return what the cohort sends."""
        clients = list(cohort)
        return [Sent(clients, self.models(server_round, received, clients))]


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Noisy quadratics with rare clients: FedStale against unbiased FedAvg, FedVARP and MIFA."""
    started = time.perf_counter()
    cells = (*ROWS, *SWEEP, QUIET)
    groups = [tuple(c for c in cells if c.p_low == p) for p in dict.fromkeys(c.p_low for c in cells)]
    # The more clients take part the longer a job takes.
    groups.sort(key=lambda group: -group[0].p_low)
    jobs = [(group, sizes, seed) for group in groups for seed in range(sizes.histories)]
    results = run_jobs(measure, jobs, what="noisy quadratics", progress=progress, workers=workers)
    errors: Errors = {}
    for cell in cells:
        runs = [result[cell] for result in results if cell in result]
        errors[cell] = {name: float(np.mean([r[name] for r in runs])) for name in runs[0]}
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(errors)),
        tuple(_tables(errors, sizes)),
        {"fedstale-beta": partial(_plot, errors)},
    )


register(SLUG, "study", "2405.04171")(run)


def strategies(cells: Sequence[Cell], sizes: Sizes) -> dict[str, StreamingStrategy]:
    """Return what is compared on ``cells``, which share p_low: the endpoints of beta are the baselines."""
    n = sizes.num_clients
    p = participation(cells[0].p_low, n)
    compared: dict[str, StreamingStrategy] = {}
    for beta in sizes.betas_for(cells[0]):
        if beta == 0:
            compared["0"] = UnbiasedFedAvg(num_clients=n, participation=p)
        elif beta == 1:
            compared["1"] = FedVARP(num_clients=n, participation=p)
        else:
            compared[f"{beta:g}"] = FedStale(num_clients=n, participation=p, beta=beta)
    if cells[0] in ROWS:
        compared[MIFA_NAME] = MIFA(num_clients=n)
    if cells[0] in ESTIMATED_ON:
        compared[ESTIMATED] = FedStale(num_clients=n, participation="estimate", beta=0.5)
    return compared


def participation(p_low: float, num_clients: int) -> list[float]:
    """Return p of every client: 1 for the first half, ``p_low`` for the second."""
    probabilities: list[float] = two_group(num_clients, p_low).tolist()
    return probabilities


def measure(job: tuple[Sequence[Cell], Sizes, int]) -> Errors:
    """Return the errors of all strategies on problems that share p_low, for one history."""
    cells, sizes, seed = job
    problem = Quadratics(cells, sizes, seed)
    model = Bernoulli(participation(cells[0].p_low, sizes.num_clients), seed=seed)
    masks = [np.flatnonzero(model.mask(r)).tolist() for r in range(1, sizes.rounds + 1)]
    first, errors = sizes.rounds // 2, {cell: dict[str, float]() for cell in cells}
    for name, strategy in strategies(cells, sizes).items():
        sums = np.zeros(len(cells))

        def observe(server_round: int, model: NDArray, sums: NDArray = sums) -> None:
            if server_round > first:
                sums += np.square(model).reshape(len(cells), -1).sum(axis=1)

        drive(
            strategy,
            problem.start,
            num_clients=sizes.num_clients,
            rounds=sizes.rounds,
            present=lambda server_round: masks[server_round - 1],
            work=problem.work,
            observe=observe,
        )
        for cell, total in zip(cells, sums.tolist(), strict=True):
            errors[cell][name] = total / ((sizes.rounds - first) * sizes.draws)
    return errors


def curve(by_name: Mapping[str, float]) -> dict[float, float]:
    """Return the errors over beta, ascending."""
    return {float(name): error for name, error in by_name.items() if name not in (MIFA_NAME, ESTIMATED)}


def best_beta(by_name: Mapping[str, float]) -> float:
    """Return the beta with the least error."""
    by_beta = curve(by_name)
    return min(by_beta, key=by_beta.__getitem__)


def _interior(by_name: Mapping[str, float]) -> tuple[float, float]:
    inner = {beta: error for beta, error in curve(by_name).items() if 0 < beta < 1}
    best = min(inner, key=inner.__getitem__)
    return best, inner[best]


def _claims(errors: Errors) -> list[Claim]:
    claims = []
    for cell in (ROWS[0], ROWS[3]):
        beta, error = _interior(errors[cell])
        ends = min(errors[cell]["0"], errors[cell]["1"])
        text = (
            f"({cell}): FedStale at beta {beta:g} has > 15 % less error than both unbiased FedAvg and FedVARP"
        )
        claims.append(Claim(text, error, ends, error < 0.85 * ends))
    bests = [best_beta(errors[cell]) for cell in SWEEP]
    claims.append(
        Claim(
            "best beta does not fall as the spread h of the data grows (0, 0.3, 1, 3 at p 0.2)",
            ", ".join(f"{beta:g}" for beta in bests),
            "reference: " + ", ".join(f"{beta:g}" for beta in REFERENCE_SWEEP),
            all(a <= b for a, b in pairwise(bests)),
        )
    )
    often, rare = best_beta(errors[ROWS[2]]), best_beta(errors[ROWS[3]])
    claims.append(Claim("best beta falls when p falls from 0.1 to 0.03", rare, often, rare < often))
    bests_by_row = [_interior(errors[cell])[1] for cell in ROWS]
    mifa = [errors[cell][MIFA_NAME] for cell in ROWS]
    claims.append(
        Claim(
            "FedStale at its best beta beats MIFA on all four problems",
            ", ".join(f"{error:.3g}" for error in bests_by_row),
            ", ".join(f"{error:.3g}" for error in mifa),
            all(ours < theirs for ours, theirs in zip(bests_by_row, mifa, strict=True)),
        )
    )
    for cell in ESTIMATED_ON:
        known, estimated = errors[cell]["0.5"], errors[cell][ESTIMATED]
        text = f"({cell}): estimating p costs FedStale (beta 0.5) at most 25 %"
        claims.append(Claim(text, estimated, known, estimated <= 1.25 * known))
    quiet = errors[QUIET]
    _, interior = _interior(quiet)
    memory = max(quiet["1"], quiet[MIFA_NAME])
    text = f"({QUIET}): FedVARP and MIFA win where there is no noise, FedStale does not pay there"
    return [*claims, Claim(text, memory, interior, memory < interior)]


def _tables(errors: Errors, sizes: Sizes) -> list[Table]:
    rows: list[list[Value]] = []
    for cell, reference in zip(ROWS, REFERENCE_ROWS, strict=True):
        ours = errors[cell]
        pairs = [
            f"{ours[beta]:.3g} ({figure:g})"
            for beta, figure in zip(("0", "0.5", "1"), reference[:3], strict=True)
        ]
        beta = best_beta(ours)
        rows.append(
            [
                str(cell),
                *pairs,
                f"{beta:g} ({reference[3]:g})",
                curve(ours)[beta],
                ours[MIFA_NAME],
                ours.get(ESTIMATED, NAN),
            ]
        )
    columns = (
        "problem", "beta 0: unbiased FedAvg", "beta 0.5", "beta 1: FedVARP", "best beta", "error at best",
        "MIFA", "beta 0.5, p estimated",
    )  # fmt: skip
    title = (
        f"Mean ||x||^2 over the second half of {sizes.rounds} rounds, {sizes.histories} histories of "
        f"participation x {sizes.draws} draws, lower is better; in brackets the reference (an "
        "independent implementation)"
    )
    table = Table.of(title, columns, rows)
    betas = [f"{beta:g}" for beta in sizes.betas]
    grid: list[list[Value]] = [
        [str(cell), *(errors[cell].get(beta, NAN) for beta in betas)] for cell in (*ROWS, QUIET)
    ]
    curves = Table.of("The same over beta", ("problem", *betas), grid)
    betas = [f"{beta:g}" for beta in sizes.sweep_betas]
    sweep: list[list[Value]] = [
        [
            f"{cell.spread:g}",
            *(errors[cell][beta] for beta in betas),
            f"{best_beta(errors[cell]):g} ({reference:g})",
        ]
        for cell, reference in zip(SWEEP, REFERENCE_SWEEP, strict=True)
    ]
    spread = Table.of(
        "The same at lr 0.05, p 0.2 over the spread h", ("h", *betas, "best beta (reference)"), sweep
    )
    return [table, curves, spread]


def _plot(errors: Errors, stem: Path) -> list[Path]:
    """Draw error over beta: left by participation, right by heterogeneity."""
    from turnout.reproduce.figures import Line, panels

    def lines(cells: Sequence[Cell], label: str) -> list[Line]:
        drawn = []
        for cell in cells:
            by_beta = curve(errors[cell])
            relative = [error / by_beta[0.0] for error in by_beta.values()]
            name = label.format(p=cell.p_low, h=cell.spread, lr=cell.learning_rate)
            drawn.append(Line(name, list(by_beta), relative, mark=int(np.argmin(relative))))
        return drawn

    return panels(
        stem,
        "A little staleness is better than none or all",
        [
            ("Rare clients", "p = how often the rare half comes", lines(ROWS, "p {p:g}, lr {lr:g}, h {h:g}")),
            ("Unlike clients", "h = spread of the clients' optima, p 0.2", lines(SWEEP, "h {h:g}")),
        ],
        x_label="beta: weight of the stored updates",
        y_label="error / error of unbiased FedAvg",
    )
