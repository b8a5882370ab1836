"""SNELLA's small study (arXiv 2510.24037): a sparse change of full rank from thin matrices.

First part: a 64 x 64 matrix with 10 % non-zeros is fitted by gradient descent from r = 8: SNELLA, its
sparsity rising from 0 to 0.9, LoRA, and LoRA made sparse by the same rule. Second part: a network
64-64-64-10, trained on digits, is adapted to rotated ones. Third part: of four layers one has to change; a
federation's server shares out the non-zeros.
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

from turnout.peft import Adapted, AdapterConfig, LoraConfig, SnellaConfig, attach
from turnout.peft.allocating import update_and_allocate
from turnout.reproduce.federated_student import StudentTask, federate
from turnout.reproduce.figures import Line, panels
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table
from turnout.reproduce.transfer import HIDDEN, Method
from turnout.reproduce.transfer_grid import TransferGrid, Tuned
from turnout.wire import register

SLUG: Final = "snella"
SIDE: Final = 64
RANK: Final = 8
RATES: Final = (1e-2, 3e-2, 1e-1)
DIGIT_RATES: Final = (3e-3, 1e-2, 3e-2, 1e-1)
DENSITY: Final = 0.1
SNELLA: Final = "SNELLA, kernel scale 0.1"
SNELLA_1: Final = "SNELLA, kernel scale 1"
LORA: Final = "LoRA r=8"
SPARSE: Final = "sparse LoRA r=8"
METHODS: Final = (SNELLA, SNELLA_1, LORA, SPARSE)
LAYERS: Final = 4
CHANGED: Final = 2
CLIENTS: Final = 4
WIDTH: Final = 16


@dataclass(frozen=True)
class Sizes:
    """How large the study is."""

    fit_steps: int = 1200
    fit_seeds: int = 1
    steps: int = 300
    seeds: int = 2
    rounds: int = 60


STANDARD: Final = Sizes()


@dataclass(frozen=True)
class Fit:
    """Squared error relative to the target's, the rank of the change, and the number of trained numbers."""

    error: float
    rank: int
    numbers: int


def snella(scale: float, steps: int) -> SnellaConfig:
    """Return SNELLA's configuration for the matrix: sparsity to 0.9 by 70 % of the run."""
    return SnellaConfig(
        r=RANK, kernel_scale=scale, target_sparsity=1 - DENSITY, tfinal=3 * steps // 10, deltaT=5,
        total_step=steps, checkpointing=False,
    )  # fmt: skip


def fit(job: tuple[str, float, int, Sizes]) -> Fit:
    """Return how near a method comes to a sparse matrix."""
    method, rate, seed, sizes = job
    generator = torch.Generator().manual_seed(700 + seed)
    mask = torch.rand(SIDE, SIDE, generator=generator) < DENSITY
    target = torch.randn(SIDE, SIDE, generator=generator) * mask
    config: AdapterConfig = LoraConfig(r=RANK, lora_alpha=RANK, seed=seed)
    if method in (SNELLA, SNELLA_1):
        config = snella(0.1 if method == SNELLA else 1.0, sizes.fit_steps)
    schedule = snella(1.0, sizes.fit_steps).allocator(1).schedule(SIDE * SIDE)
    adapted = attach(nn.Sequential(nn.Linear(SIDE, SIDE, bias=False)), config)
    (layer,) = adapted.layers.values()
    trained = [p for p in adapted.module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    for step in range(1, sizes.fit_steps + 1):
        optimizer.zero_grad()
        kept = schedule.budget(step) if method == SPARSE else None
        torch.autograd.backward((_change(layer.delta_weight(), kept) - target).square().sum())
        optimizer.step()
        if isinstance(config, SnellaConfig):
            update_and_allocate(adapted, step)
    with torch.no_grad():
        delta = _change(layer.delta_weight(), schedule.end if method == SPARSE else None)
        error = float((delta - target).square().sum() / target.square().sum())
        values = torch.linalg.svdvals(delta.double())
    return Fit(error, int((values > 1e-4 * values[0]).sum()), sum(p.numel() for p in trained))


def _change(delta: Tensor, kept: int | None) -> Tensor:
    """Return ``delta`` with all but its ``kept`` largest entries at 0."""
    if kept is None or kept >= delta.numel():
        return delta
    size = delta.detach().abs()
    limit = float(size.flatten().kthvalue(delta.numel() - kept).values)
    return torch.where(size > limit, delta, 0.0) if limit else delta  # All is 0 at first.


def chain(seed: int, changed: bool) -> nn.Sequential:
    """Return four tanh layers of 16 units; ``changed`` adds a sparse matrix to the third one's weight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(*(p for _ in range(LAYERS) for p in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
        for part in made:
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=WIDTH**-0.5)
        if changed:
            with torch.no_grad():
                mask = torch.rand(WIDTH, WIDTH) < 0.3
                cast(nn.Linear, made[2 * CHANGED]).weight += 0.7 * torch.randn(WIDTH, WIDTH) * mask
    return made


def together(job: tuple[int, Sizes]) -> list[float]:
    """Return each layer's density at the end of a federation whose server shares out the non-zeros."""
    seed, sizes = job
    x = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(800 + seed))
    with torch.no_grad():
        y = chain(seed, changed=True)(x)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return WIDTH * (output - y).square().mean()

    task = StudentTask(lambda: chain(seed, changed=False), x, y, loss, CLIENTS)
    config = SnellaConfig(
        r=RANK, kernel_scale=1.0, target_sparsity=0.8, tinit=5 * sizes.rounds // 6,
        tfinal=5 * sizes.rounds // 3, deltaT=5, total_step=5 * sizes.rounds, seed=seed,
    )  # fmt: skip
    done = federate(
        task, config, rounds=sizes.rounds, steps=5, lr=3e-2, optimizer="adam", batch_size=64, seed=seed
    )
    return densities(done.adapted)


def densities(adapted: Adapted) -> list[float]:
    """Return the share of each layer's entries that may be non-zero."""
    kept = [int(t) for name, t in adapted.allocation_state().items() if name.endswith("num_kept")]
    return [n / WIDTH**2 for n in kept]


def run(
    progress: Progress | None = None, *, sizes: Sizes = STANDARD, workers: int | None = None
) -> StudyReport:
    """Fit a sparse matrix, adapt to rotated digits, and share out non-zeros in a federation."""
    started = time.perf_counter()
    jobs = [(m, rate, seed, sizes) for m in METHODS for rate in RATES for seed in range(sizes.fit_seeds)]
    found = dict(
        zip(jobs, run_jobs(fit, jobs, what="matrix", progress=progress, workers=workers), strict=True)
    )
    fits: dict[str, tuple[float, list[Fit]]] = {}
    for method in METHODS:
        tried = {r: [found[method, r, s, sizes] for s in range(sizes.fit_seeds)] for r in RATES}
        fits[method] = min(tried.items(), key=lambda item: _error(item[1]))
    fixed = SnellaConfig(
        r=RANK, kernel_scale=1.0, init_sparsity=0.5, target_sparsity=0.5, total_step=1, target_modules=HIDDEN
    )
    methods = [
        Method("SNELLA r=8, half of the entries", fixed),
        Method(LORA, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=HIDDEN)),
        Method("full fine-tuning", None),
    ]
    grid = TransferGrid.run(
        methods,
        DIGIT_RATES,
        seeds=sizes.seeds,
        width=64,
        steps=sizes.steps,
        progress=progress,
        workers=workers,
    )
    rotated = list(grid.tuned().values())
    shares = [together((seed, sizes)) for seed in range(sizes.seeds)]
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(fits, rotated, shares)),
        tuple(_tables(fits, rotated, shares, sizes)),
        {"snella-shares": partial(_plot, shares)},
    )


register(SLUG, "study", "2510.24037")(run)


def _error(fits: Sequence[Fit]) -> float:
    return float(np.mean([f.error for f in fits]))


def _claims(
    fits: Mapping[str, tuple[float, list[Fit]]], rotated: Sequence[Tuned], shares: Sequence[Sequence[float]]
) -> list[Claim]:
    claims = []
    for name in (SNELLA, SNELLA_1):
        for baseline in (LORA, SPARSE):
            mine, other = _error(fits[name][1]), _error(fits[baseline][1])
            claims.append(
                Claim(f"sparse matrix: error of {name} below {baseline}", mine, other, mine < other)
            )
    rank = min(f.rank for f in fits[SNELLA][1])
    claims.append(Claim("its change has a rank above that of LoRA", rank, RANK, rank > RANK))
    mine, other = rotated[0].target, rotated[1].target
    text = "rotated digits: accuracy of SNELLA at least that of LoRA with 6 numbers less"
    claims.append(Claim(text, mine, other, mine >= other))
    hits = sum(int(np.argmax(s) == CHANGED) for s in shares)
    text = "federation: the layer that has to change gets the largest density, in every seed"
    claims.append(Claim(text, hits, len(shares), hits == len(shares)))
    return claims


def _tables(
    fits: Mapping[str, tuple[float, list[Fit]]],
    rotated: Sequence[Tuned],
    shares: Sequence[Sequence[float]],
    sizes: Sizes,
) -> list[Table]:
    title = (
        f"A sparse 64 x 64 matrix fitted: {sizes.fit_steps} steps of Adam, {sizes.fit_seeds} seeds, best of"
    )
    return [
        Table.of(
            f"{title} {RATES}",
            ("method", "trained numbers", "best lr", "relative squared error", "rank"),
            [(m, f[0].numbers, rate, _error(f), f[0].rank) for m, (rate, f) in fits.items()],
        ),
        Table.of(
            f"Rotated digits, network 64-64-64-10, {sizes.steps} steps, {sizes.seeds} seeds",
            ("method", "trained numbers", "best lr", "test accuracy"),
            [(t.name, t.numbers, t.rate, t.target) for t in rotated],
        ),
        Table.of(
            f"Federation, {CLIENTS} clients, {sizes.rounds} rounds: density by layer; the third must change",
            ("seed", *(f"layer {k + 1}" for k in range(LAYERS))),
            [(str(seed), *row) for seed, row in enumerate(shares)],
        ),
    ]


def _plot(shares: Sequence[Sequence[float]], stem: Path) -> list[Path]:
    """Draw the density of every layer."""
    layers = list(range(1, LAYERS + 1))
    lines = [Line(f"seed {seed}", layers, list(row)) for seed, row in enumerate(shares)]
    return panels(
        stem,
        "SNELLA's server gives the non-zeros to the layer that has to change",
        [("federation", "the third layer differs from the teacher's", lines)],
        x_label="layer",
        y_label="density",
        log=False,
    )
