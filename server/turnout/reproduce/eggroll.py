"""EGGROLL's small study: a federation trained by forward passes, seeds and scalars (arXiv 2511.16652).

A 64-32-10 perceptron on the digits, ten clients with Dirichlet(0.1) labels, 150 rounds, 20 antithetic pairs a
client and round, server momentum 0.9. What is compared: ranks 1 and 4 with full-rank noise (FedKSeed's way),
each with its own learning rate; pairs shared by all clients with pairs of their own; and FedAvg with one and
with ten local steps, by round and by bytes. Accuracy is the mean of the last three evaluations.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from turnout.reproduce.drive import Sent, drive
from turnout.reproduce.eggroll_clients import DigitsClients
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.strategies import EGGROLL, FedAvg
from turnout.strategies.rounds import Instruction, Reply
from turnout.wire import NDArray, keys, register
from turnout.wire.seed_log import HEAD_BYTES, Fitness

SLUG: Final = "eggroll"
EVALUATE_EVERY: Final = 5
SKEWED: Final = 0.1
EVEN: Final = 100.0
TARGET: Final = 0.9


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    num_clients: int = 10
    rounds: int = 150
    seeds: int = 2
    pairs: int = 20
    batch: int = 64


FULL: Final = Sizes()


@dataclass(frozen=True)
class Method:
    """One way to train, its learning rates to try, and what a client sends and receives in a round.

    ``steps`` is the number of FedAvg's local steps; 0 is EGGROLL.
    """

    name: str
    lrs: tuple[float, ...]
    alpha: float = SKEWED
    rank: int | None = 1
    mode: str = "shared"
    steps: int = 0

    def bytes_up(self, sizes: Sizes, parameters: int) -> int:
        """Payload that a client sends in a round."""
        return 4 * parameters if self.steps else HEAD_BYTES + 4 * sizes.pairs

    def bytes_down(self, sizes: Sizes, parameters: int) -> int:
        """Payload that a client receives in a round."""
        if self.steps:
            return 4 * parameters
        return HEAD_BYTES + 4 * sizes.pairs * (1 if self.mode == "shared" else sizes.num_clients)


RANK_1: Final = "rank 1"
FULL_RANK: Final = "full rank"
DISJOINT: Final = "rank 1, disjoint"
ONE_STEP: Final = "FedAvg, 1 step"
TEN_STEPS: Final = "FedAvg, 10 steps"
METHODS: Final = (
    Method(DISJOINT, (0.0075, 0.015, 0.03), mode="disjoint"),
    Method(RANK_1, (0.015, 0.03, 0.06)),
    Method("rank 4", (0.015, 0.03, 0.06), rank=4),
    Method(FULL_RANK, (0.015, 0.03, 0.06), rank=None),
    Method("rank 1, near-IID", (0.03,), alpha=EVEN),
    Method(ONE_STEP, (0.3, 1.0), steps=1),
    Method(TEN_STEPS, (0.1, 0.3), steps=10),
)
REFERENCE: Final = {RANK_1: "0.924", FULL_RANK: "0.934", "rank 1, near-IID": "0.924", DISJOINT: "0.825"}
Job = tuple[Method, float, Sizes, int]


def measure(job: Job) -> NDArray:
    """Return the accuracy before the first round and after every `EVALUATE_EVERY`-th."""
    method, lr, sizes, seed = job
    clients = DigitsClients.draw(
        num_clients=sizes.num_clients, alpha=method.alpha, batch=sizes.batch, seed=seed
    )
    run = _descend if method.steps else _search
    return run(method, lr, sizes, clients)


def _search(method: Method, lr: float, sizes: Sizes, clients: DigitsClients) -> NDArray:
    n = sizes.num_clients
    strategy = EGGROLL(
        num_clients=n,
        pairs=sizes.pairs,
        rank=method.rank,
        mode=method.mode,  # type: ignore[arg-type]
        server_lr=lr,
        seed=clients.seed,
    )
    strategy.adopt(clients.start())
    search = strategy.search
    source, accuracies = search.source(strategy.layout), [clients.accuracy(strategy.x)]
    for t in range(1, sizes.rounds + 1):
        strategy.begin_round(t, range(n))
        told = strategy.select(t, range(n))
        first = [int(told[k].config[keys.FIRST_PAIR]) for k in range(n)]
        found = clients.differences(t, strategy.x, source, first, sizes.pairs, search.sigma)
        for k in range(n):
            record = Fitness(t, k, first[k], found[k], search.digest).record()
            strategy.accept(
                t,
                Reply(
                    k,
                    strategy.x[:0],
                    int(clients.sizes[k]),
                    0.0,
                    records={keys.FITNESS: record},
                    told=told[k],
                ),
            )
        model = strategy.end_round(t)
        if t % EVALUATE_EVERY == 0:
            accuracies.append(clients.accuracy(model))
    return np.array(accuracies)


def _descend(method: Method, lr: float, sizes: Sizes, clients: DigitsClients) -> NDArray:
    strategy, n = FedAvg(num_clients=sizes.num_clients, weighting="examples"), sizes.num_clients
    strategy.adopt(clients.start())
    start, accuracies = strategy.x, [clients.accuracy(strategy.x)]
    # Every reply weighs alike where it is driven without messages: weighted here, n times its share.
    shares = (clients.sizes / clients.sizes.sum() * n)[:, None].astype(np.float32)

    def work(server_round: int, received: NDArray, cohort: Mapping[int, Instruction]) -> list[Sent]:
        models = clients.descend(lr, method.steps, server_round, received)
        return [Sent(list(cohort), received + shares * (models - received))]

    def observe(server_round: int, model: NDArray) -> None:
        if server_round % EVALUATE_EVERY == 0:
            accuracies.append(clients.accuracy(model))

    drive(
        strategy,
        start,
        num_clients=n,
        rounds=sizes.rounds,
        present=lambda _: range(n),
        work=work,
        observe=observe,
    )
    return np.array(accuracies)


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Evolution strategies over seeds and scalars: ranks, shared against disjoint pairs, FedAvg."""
    started = time.perf_counter()
    jobs = [(m, lr, sizes, seed) for m in METHODS for lr in m.lrs for seed in range(sizes.seeds)]
    curves = run_jobs(measure, jobs, what="forward passes only", progress=progress, workers=workers)
    means: dict[str, dict[float, NDArray]] = {}
    for (method, lr, _, _), curve in zip(jobs, curves, strict=True):
        mine = means.setdefault(method.name, {})
        share: NDArray = curve / sizes.seeds
        mine[lr] = mine[lr] + share if lr in mine else share
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(means, sizes)),
        tuple(_tables(means, sizes)),
        {"eggroll-accuracy": partial(_plot, means)},
    )


register(SLUG, "study", "2511.16652")(run)


def _final(curve: NDArray) -> float:
    return float(curve[-3:].mean())


def _best(means: Mapping[str, Mapping[float, NDArray]], name: str) -> tuple[float, NDArray]:
    """Return learning rate and mean curve of the best setting of a method."""
    return max(means[name].items(), key=lambda entry: _final(entry[1]))


def _rounds_to_target(means: Mapping[str, Mapping[float, NDArray]], name: str) -> float:
    """Return the fewest rounds to the target with any of a method's rates; NaN if it is never reached."""
    reached = [
        np.flatnonzero(curve >= TARGET)[0] * EVALUATE_EVERY
        for curve in means[name].values()
        if (curve >= TARGET).any()
    ]
    return float(min(reached)) if reached else float("nan")


def _parameters() -> int:
    return 64 * 32 + 32 + 32 * 10 + 10


def _claims(means: Mapping[str, Mapping[float, NDArray]], sizes: Sizes) -> list[Claim]:
    reached = {name: _final(_best(means, name)[1]) for name in means}
    one, d = reached[RANK_1], _parameters()
    by_name = {method.name: method for method in METHODS}
    up = by_name[RANK_1].bytes_up(sizes, d)
    # FedAvg at equal bytes: as many rounds as its uploads fit into what EGGROLL sent.
    uploads = max(1, up * sizes.rounds // (4 * d))
    equal = max(
        float(np.interp(uploads, EVALUATE_EVERY * np.arange(len(curve)), curve))
        for name in (ONE_STEP, TEN_STEPS)
        for curve in means[name].values()
    )
    spent = {
        name: _rounds_to_target(means, name) * by_name[name].bytes_up(sizes, d) / 1e3
        for name in (RANK_1, ONE_STEP, TEN_STEPS)
    }
    fedavg = float(np.nanmin([spent[ONE_STEP], spent[TEN_STEPS]]))
    return [
        Claim(
            "rank 1 within 0.03 of full rank, each at its own rate",
            one,
            reached[FULL_RANK],
            one >= reached[FULL_RANK] - 0.03,
        ),
        Claim(
            "shared pairs above disjoint pairs, Dirichlet(0.1)",
            one,
            reached[DISJOINT],
            one > reached[DISJOINT],
        ),
        Claim(
            f"accuracy above 0.9 with {up} bytes up a client and round, Dirichlet(0.1)",
            one,
            TARGET,
            one > TARGET,
        ),
        Claim(
            f"as many bytes up ({up * sizes.rounds / 1e3:g} kB a client): accuracy above FedAvg's "
            f"after {uploads} of its uploads",
            one,
            equal,
            one > equal,
        ),
        Claim(
            "kB up a client to 0.9: fewer than FedAvg's (better of 1 and 10 steps)",
            spent[RANK_1],
            fedavg,
            spent[RANK_1] < fedavg,
        ),
    ]


def _tables(means: Mapping[str, Mapping[float, NDArray]], sizes: Sizes) -> list[Table]:
    d, rows = _parameters(), list[list[Value]]()
    for method in METHODS:
        lr, curve = _best(means, method.name)
        rounds = _rounds_to_target(means, method.name)
        up, down = method.bytes_up(sizes, d), method.bytes_down(sizes, d)
        rows.append(
            [
                method.name,
                lr,
                f"{_final(curve):.3f}",
                REFERENCE.get(method.name, "-"),
                up,
                down,
                rounds,
                rounds * up / 1e3,
                rounds * down / 1e3,
            ]
        )
    return [
        Table.of(
            f"64-32-10 perceptron ({d} parameters) on the digits, {sizes.num_clients} clients, "
            f"Dirichlet(0.1), {sizes.rounds} rounds, {sizes.seeds} seeds, {sizes.pairs} pairs a client and "
            "round; learning rate tuned for each row; reference: an independent implementation (one seed); "
            "bytes are payload for one client",
            (
                "method",
                "rate",
                "accuracy",
                "reference",
                "B up",
                "B down",
                "rounds to 0.9",
                "kB up to 0.9",
                "kB down to 0.9",
            ),
            rows,
        )
    ]


def _plot(means: Mapping[str, Mapping[float, NDArray]], stem: Path) -> list[Path]:
    """Draw test accuracy over rounds: ranks and modes, and beside FedAvg."""
    from turnout.reproduce.figures import Line, panels

    def lines(*names: str) -> list[Line]:
        drawn = []
        for name in names:
            lr, curve = _best(means, name)
            rounds = (EVALUATE_EVERY * np.arange(len(curve))).tolist()
            drawn.append(Line(f"{name}, rate {lr:g}", rounds, curve.tolist()))
        return drawn

    return panels(
        stem,
        "EGGROLL: forward passes, seeds and scalars",
        [
            (
                "Ranks and pairs",
                "100 bytes up a client and round",
                lines(RANK_1, "rank 4", FULL_RANK, DISJOINT),
            ),
            ("Beside FedAvg", "which sends 9640 bytes each way", lines(RANK_1, ONE_STEP, TEN_STEPS)),
        ],
        x_label="round",
        y_label="test accuracy",
        log=False,
    )
