"""AdaLoRA's small study: does the budget go where the task needs it? (arXiv 2303.10512)

Six tanh layers of 32 units; a teacher differs from them by low-rank changes of ranks (8, 0, 0, 4, 0, 0). A
student with adapters on all layers learns the teacher's outputs from 2,000 examples. AdaLoRA begins at rank 8
everywhere and ends with 12 triplets in all; LoRA has rank 2 everywhere, the same 12, or rank 3. Every method
is run at each of two learning rates and compared at its best one. "Magnitude" prunes by the size of the
singular values alone. The last part is a federation of four clients in which the server allocates.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor, nn

from turnout.client.training_parts import TrainingParts
from turnout.peft import AdaLoraConfig, Adapted, AdapterConfig, LoraConfig, attach
from turnout.peft.adalora import AdaLora
from turnout.peft.allocating import allocate, update_and_allocate
from turnout.reproduce.federated_student import StudentTask, federate
from turnout.reproduce.figures import Line, panels
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table
from turnout.wire import register

SLUG: Final = "adalora"
LAYERS: Final = 6
WIDTH: Final = 32
RANKS: Final = (8, 0, 0, 4, 0, 0)
RATES: Final = (1e-2, 3e-2)
SMALLER_RATES: Final = (3e-3, 1e-2)  # Full fine-tuning is best at one of these.
BATCH: Final = 128
CLIENTS: Final = 4
SCALE: Final = 32.0  # Of the loss: the sum over outputs.

ADALORA: Final = "AdaLoRA"
MAGNITUDE: Final = "AdaLoRA by magnitude"
LORA_2: Final = "LoRA r=2"
LORA_3: Final = "LoRA r=3"
FULL: Final = "full fine-tuning"
METHODS: Final = (ADALORA, MAGNITUDE, LORA_2, LORA_3, FULL)


@dataclass(frozen=True)
class Sizes:
    """How large the study is."""

    steps: int = 600
    seeds: int = 2
    rounds: int = 60


STANDARD: Final = Sizes()


@dataclass(frozen=True)
class Outcome:
    """Mean squared test error, ranks left per layer, and trained numbers, of a federation the bytes sent."""

    error: float
    ranks: tuple[int, ...]
    numbers: int


def network(seed: int) -> nn.Sequential:
    """Return the student: six layers of 32 with tanh between them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(*(part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
        for part in made:
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=WIDTH**-0.5)  # Signals keep their size.
    return made


def teacher(seed: int) -> nn.Sequential:
    """Return the student with changes of rank `RANKS` in its layers."""
    made = network(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for k, rank in enumerate(RANKS):
            left = torch.randn(WIDTH, rank, generator=generator)
            right = torch.randn(rank, WIDTH, generator=generator)
            cast(nn.Linear, made[2 * k]).weight += left @ right * (0.9 / WIDTH)
    return made


@dataclass(frozen=True)
class Data:
    """Inputs and the teacher's outputs, for training and testing."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def data(seed: int) -> Data:
    """Return 2,000 training and 1,000 test examples."""
    generator = torch.Generator().manual_seed(2000 + seed)
    x = torch.randn(3000, WIDTH, generator=generator)
    with torch.no_grad():
        y = teacher(seed)(x)
    return Data(x[:2000], y[:2000], x[2000:], y[2000:])


def config_of(method: str, steps: int) -> AdapterConfig | None:
    """Return the adapters of ``method``; None trains everything."""
    if method == FULL:
        return None
    if method in (LORA_2, LORA_3):
        r = 2 if method == LORA_2 else 3
        return LoraConfig(r=r, lora_alpha=r)
    return adalora(steps)


def adalora(steps: int, delta: int = 5) -> AdaLoraConfig:
    """Return AdaLoRA's configuration for a run of ``steps`` steps: the card's, in proportion."""
    return AdaLoraConfig(
        init_r=8, target_r=2, lora_alpha=8, tinit=steps // 10, tfinal=2 * steps // 5, deltaT=delta,
        total_step=steps, orth_reg_weight=0.1, init_std=WIDTH**-0.5,
    )  # fmt: skip


def rates_of(method: str) -> tuple[float, ...]:
    """Return the learning rates that ``method`` is tried at."""
    return SMALLER_RATES if method == FULL else RATES


def train(job: tuple[str, float, int, Sizes]) -> Outcome:
    """Return how one method did at one learning rate, for one seed."""
    method, rate, seed, sizes = job
    module, examples = network(seed), data(seed)
    config = config_of(method, sizes.steps)
    adapted = None if config is None else attach(module, config)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer, parts = torch.optim.Adam(trained, lr=rate), TrainingParts(module)
    rng = np.random.default_rng([seed, 7])
    for step in range(1, sizes.steps + 1):
        rows = torch.from_numpy(rng.integers(len(examples.y), size=BATCH))
        optimizer.zero_grad()
        loss = SCALE * (module(examples.x[rows]) - examples.y[rows]).square().mean()
        torch.autograd.backward(parts.penalty(loss))
        optimizer.step()
        if method == ADALORA:
            update_and_allocate(cast(Adapted, adapted), step)
        elif method == MAGNITUDE:
            _by_magnitude(cast(Adapted, adapted), step)
    with torch.no_grad():
        error = float((module(examples.test_x) - examples.test_y).square().mean())
    return Outcome(error, ranks_of(adapted), sum(p.numel() for p in trained))


def ranks_of(adapted: Adapted | None) -> tuple[int, ...]:
    """Return the triplets alive in every layer; empty for adapters without."""
    layers = [] if adapted is None else list(adapted.layers.values())
    return tuple(int(layer.kept().sum()) for layer in layers if isinstance(layer, AdaLora))


def _by_magnitude(adapted: Adapted, step: int) -> None:
    """Allocate as AdaLoRA does, but by the absolute singular values."""
    for layer in adapted.layers.values():
        assert isinstance(layer, AdaLora)
        layer.running_importance.copy_(layer.lora_E.detach()[:, 0].abs())
    allocate(adapted, step)


def federated(job: tuple[str, int, Sizes]) -> Outcome:
    """Return how a federation of four clients did, in as many local steps as the others had steps."""
    method, seed, sizes = job
    steps = max(1, sizes.steps // sizes.rounds)
    config = adalora(sizes.rounds * steps, steps) if method == ADALORA else config_of(method, sizes.steps)
    assert config is not None
    examples = data(seed)
    task = StudentTask(
        lambda: network(seed),
        examples.x,
        examples.y,
        lambda out, y: SCALE * (out - y).square().mean(),
        CLIENTS,
    )
    done = federate(
        task, config, rounds=sizes.rounds, steps=steps, lr=1e-2, optimizer="adam", batch_size=BATCH, seed=seed
    )
    with torch.no_grad():
        error = float((done.adapted.module(examples.test_x) - examples.test_y).square().mean())
    return Outcome(error, ranks_of(done.adapted), done.uplink_bytes[-1])


def run(
    progress: Progress | None = None, *, sizes: Sizes = STANDARD, workers: int | None = None
) -> StudyReport:
    """Planted ranks (8, 0, 0, 4, 0, 0): AdaLoRA against LoRA of the same budget and of 1.5 times it."""
    started = time.perf_counter()
    jobs = [(m, rate, seed, sizes) for m in METHODS for rate in rates_of(m) for seed in range(sizes.seeds)]
    runs = run_jobs(train, jobs, what="planted ranks", progress=progress, workers=workers)
    by: dict[str, dict[float, list[Outcome]]] = {m: {rate: [] for rate in rates_of(m)} for m in METHODS}
    for job, outcome in zip(jobs, runs, strict=True):
        by[job[0]][job[1]].append(outcome)
    best = {m: min(rates.items(), key=lambda item: _error(item[1])) for m, rates in by.items()}
    together = [(m, seed, sizes) for m in (ADALORA, LORA_2) for seed in range(sizes.seeds)]
    fed = run_jobs(federated, together, what="federation", progress=progress, workers=workers)
    by_fed = {m: [o for job, o in zip(together, fed, strict=True) if job[0] == m] for m in (ADALORA, LORA_2)}
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(best, by_fed)),
        tuple(_tables(best, by_fed, sizes)),
        {"adalora-ranks": partial(_plot, best[ADALORA][1], by_fed[ADALORA])},
    )


register(SLUG, "study", "2303.10512")(run)


def _error(outcomes: Sequence[Outcome]) -> float:
    return float(np.mean([outcome.error for outcome in outcomes]))


def _hits(outcomes: Sequence[Outcome]) -> float:
    """Return the mean number of triplets left in the two layers that changed."""
    return float(np.mean([o.ranks[0] + o.ranks[3] for o in outcomes]))


def _claims(best: Mapping[str, tuple[float, list[Outcome]]], fed: Mapping[str, list[Outcome]]) -> list[Claim]:
    mine = best[ADALORA][1]
    error, budget = _error(mine), max(sum(o.ranks) for o in mine)
    claims = [
        Claim("at least 10 of 12 triplets end in layers 1 and 4", _hits(mine), 10, _hits(mine) >= 10),
        Claim("no more triplets are left than the budget", budget, 12, budget <= 12),
    ]
    for baseline in (LORA_2, LORA_3, MAGNITUDE):
        other = _error(best[baseline][1])
        claims.append(
            Claim(
                f"test error of AdaLoRA below {baseline}, each at its best rate", error, other, error < other
            )
        )
    hits, other = _hits(fed[ADALORA]), _error(fed[LORA_2])
    claims.append(
        Claim("federation, server allocates: at least 10 of 12 in the same layers", hits, 10, hits >= 10)
    )
    error = _error(fed[ADALORA])
    claims.append(Claim("federation: test error of AdaLoRA below LoRA r=2", error, other, error < other))
    return claims


def _tables(
    best: Mapping[str, tuple[float, list[Outcome]]], fed: Mapping[str, list[Outcome]], sizes: Sizes
) -> list[Table]:
    def ranks(outcomes: Sequence[Outcome]) -> str:
        return "; ".join(" ".join(map(str, o.ranks)) for o in outcomes) if outcomes[0].ranks else "-"

    rows = [
        (m, outcomes[0].numbers, rate, _error(outcomes), ranks(outcomes))
        for m, (rate, outcomes) in best.items()
    ]
    title = f"{sizes.steps} steps of Adam, {sizes.seeds} seeds, each method at the best of two rates"
    first = Table.of(
        title, ("method", "trained numbers", "best lr", "test MSE", "ranks left, per seed"), rows
    )
    rounds = (
        f"{CLIENTS} clients, {sizes.rounds} rounds of {max(1, sizes.steps // sizes.rounds)} steps, lr 0.01"
    )
    second = Table.of(
        f"Federation: {rounds}",
        ("method", "bytes up per round", "test MSE", "ranks left, per seed"),
        [(m, outcomes[0].numbers, _error(outcomes), ranks(outcomes)) for m, outcomes in fed.items()],
    )
    return [first, second]


def _plot(alone: Sequence[Outcome], together: Sequence[Outcome], stem: Path) -> list[Path]:
    """Draw the ranks left per layer beside the planted ones."""
    layers = list(range(1, LAYERS + 1))

    def lines(outcomes: Sequence[Outcome]) -> list[Line]:
        mean = np.mean([o.ranks for o in outcomes], axis=0).tolist()
        return [Line("planted", layers, list(RANKS)), Line("left, mean over seeds", layers, mean)]

    return panels(
        stem,
        "AdaLoRA finds the layers that have to change",
        [
            ("one machine", "after every fifth step", lines(alone)),
            ("federation", "the server allocates after every round", lines(together)),
        ],
        x_label="layer",
        y_label="rank",
        log=False,
    )
