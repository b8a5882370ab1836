"""TeRA's small study (arXiv 2509.03234): rank without numbers, and what averaging does to it.

First part: a change of a 64 x 64 weight is fitted by gradient descent. One target is another TeRA network's
value with noise, the other a random matrix of rank 32. TeRA has six modes of 4, so 24 numbers; VeRA (arXiv
2310.11454) needs 64 and r more, LoRA of rank 1 128. Second part: a network 64-64-64-10 trained on digits is
adapted to rotated ones. Third part: the same in a federation, one mode per round against all at once, which
is not exact; with the mean of the diagonals, and with the dense mean fitted again by the server.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Final, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from turnout.peft import AdapterConfig, AdapterLayer, Aggregation, LoraConfig, TeraConfig
from turnout.reproduce.federated_student import StudentTask, federate
from turnout.reproduce.figures import Line, panels
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table
from turnout.reproduce.transfer import BATCH, HIDDEN, Method, accuracy, digits, pretrained
from turnout.reproduce.transfer_grid import TransferGrid
from turnout.wire import register

SLUG: Final = "tera"
WIDTH: Final = 64
MODES: Final = (4, 4, 4)
CLIENTS: Final = 4
TERA: Final = "TeRA, six modes of 4"
TERA_8: Final = "TeRA, four modes of 8"
LORA: Final = "LoRA r=1"
CYCLIC: Final = "one mode per round"
ALL: Final = "all modes, diagonals averaged"
REFITTED: Final = "all modes, dense updates averaged and fitted again"
RATES: Final = (1e-2, 3e-2, 1e-1, 3e-1)
NEAR: Final = "near a TeRA network"
GENERIC: Final = "random, rank 32"


@dataclass(frozen=True)
class Sizes:
    """How large the study is."""

    fit_steps: int = 300
    steps: int = 200
    seeds: int = 2
    rounds: int = 40


STANDARD: Final = Sizes()


@dataclass(frozen=True, kw_only=True)
class VeraConfig(AdapterConfig):
    """VeRA, the baseline: ``diag(b) B diag(d) A``, B (d_out, r) and A (r, d_in) frozen and random."""

    aggregation: ClassVar[Aggregation] = "approximate"

    r: int = 8

    def layer(self, name: str, base_layer: nn.Module, generator: torch.Generator) -> Vera:
        """Return the adapter of ``base_layer``."""
        return Vera(base_layer, self, generator)


class Vera(AdapterLayer):
    """A linear layer with trained vectors ``vera_b`` (d_out,) and ``vera_d`` (r,)."""

    def __init__(self, base_layer: nn.Module, config: VeraConfig, generator: torch.Generator) -> None:
        super().__init__(base_layer, config)
        self.vera_A: Tensor
        self.vera_B: Tensor
        for name, shape in (
            ("vera_A", (config.r, self.in_features)),
            ("vera_B", (self.out_features, config.r)),
        ):
            drawn = nn.init.kaiming_uniform_(torch.empty(shape), generator=generator)
            self.register_buffer(name, drawn)
        self.vera_d = nn.Parameter(torch.full((config.r,), 0.1))
        self.vera_b = nn.Parameter(torch.zeros(self.out_features))

    def delta_weight(self) -> Tensor:
        """Return ``diag(b) B diag(d) A``."""
        delta: Tensor = self.vera_b[:, None] * (self.vera_B @ (self.vera_d[:, None] * self.vera_A))
        return delta


def vera(r: int) -> str:
    """Return the name of VeRA with ``r`` components."""
    return f"VeRA r={r}"


VERA_RANKS: Final = (8, 64, 256)


def config_of(method: str, seed: int) -> AdapterConfig:
    """Return the adapters of ``method``."""
    if method == TERA:
        return TeraConfig(
            out_modes=MODES, in_modes=MODES, target_modules=HIDDEN, seed=seed, train_modes="all"
        )
    if method == TERA_8:
        return TeraConfig(target_modules=HIDDEN, seed=seed, train_modes="all")
    if method == LORA:
        return LoraConfig(r=1, lora_alpha=1, target_modules=HIDDEN, seed=seed)
    return VeraConfig(r=int(method.rpartition("=")[2]), target_modules=HIDDEN, seed=seed)


FITTED: Final = (TERA, *map(vera, VERA_RANKS), LORA)


@dataclass(frozen=True)
class Fit:
    """Squared error relative to the target's, the rank of the change, and the number of trained numbers."""

    error: float
    rank: int
    numbers: int


def layer_of(method: str, seed: int) -> AdapterLayer:
    """Return the adapter of ``method`` on one 64 x 64 layer."""
    base = nn.Linear(WIDTH, WIDTH, bias=False)
    return next(iter(config_of(method, seed).layers({"0": base}).values()))


def target_of(kind: str, seed: int) -> Tensor:
    """Return what is fitted, of norm 8, as a matrix with entries of standard deviation 1/8 has."""
    generator = torch.Generator().manual_seed(500 + seed)
    if kind == GENERIC:
        target = torch.randn(WIDTH, 32, generator=generator) @ torch.randn(32, WIDTH, generator=generator)
    else:
        teacher = layer_of(TERA, seed)  # The same frozen network, other diagonals.
        with torch.no_grad():
            for parameter in teacher.parameters():
                if parameter.requires_grad:
                    parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
            target = teacher.delta_weight()
        target = target / target.norm() + 0.1 / WIDTH * torch.randn(WIDTH, WIDTH, generator=generator)
    scaled: Tensor = 8 * target / target.norm()
    return scaled


def fit(job: tuple[str, str, float, int, Sizes]) -> Fit:
    """Return how near a method comes to a target."""
    kind, method, rate, seed, sizes = job
    layer, target = layer_of(method, seed), target_of(kind, seed)
    trained = [p for name, p in layer.named_parameters() if not name.startswith("base_layer")]
    optimizer = torch.optim.Adam(trained, lr=rate)
    for _ in range(sizes.fit_steps):
        optimizer.zero_grad()
        torch.autograd.backward((layer.delta_weight() - target).square().sum())
        optimizer.step()
    numbers = sum(p.numel() for p in trained)
    with torch.no_grad():
        delta = layer.double().delta_weight()  # In float32 rounding would have a rank of its own.
        error = float((delta - target).square().sum() / target.square().sum())
    return Fit(error, int(torch.linalg.matrix_rank(delta)), numbers)


def head_bias(job: tuple[int, Sizes]) -> float:
    """Return the accuracy on rotated digits when only the last layer's bias is trained."""
    seed, sizes = job
    train, test, _ = digits(seed, None)
    network = pretrained(WIDTH, seed).requires_grad_(False)
    bias = cast(nn.Linear, network[4]).bias.requires_grad_()
    optimizer = torch.optim.AdamW([bias], lr=3e-2, weight_decay=0.0)
    rng = np.random.default_rng([seed, 5])
    for _ in range(sizes.steps):
        rows = torch.from_numpy(rng.integers(len(train.y), size=BATCH))
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(network(train.x[rows]), train.y[rows]))
        optimizer.step()
    return accuracy(network, test)


def together(job: tuple[str, int, Sizes]) -> tuple[float, int]:
    """Return a federation's accuracy on rotated digits, and the bytes that a client sent in a round."""
    kind, seed, sizes = job
    train, test, _ = digits(seed, None)
    order = train.y.argsort(stable=True)  # Clients of few labels each.
    task = StudentTask(
        lambda: pretrained(WIDTH, seed), train.x[order], train.y[order], cross_entropy, CLIENTS
    )
    config: AdapterConfig
    if kind == LORA:
        config = config_of(LORA, seed)
    elif kind == CYCLIC:
        config = TeraConfig(target_modules=HIDDEN, seed=seed)
    else:
        averaged: Literal["approximate", "exact-als"] = "exact-als" if kind == REFITTED else "approximate"
        config = TeraConfig(target_modules=HIDDEN, seed=seed, train_modes="all", aggregation=averaged)
    done = federate(
        task, config, rounds=sizes.rounds, steps=10, lr=3e-2, optimizer="adam", batch_size=BATCH, seed=seed
    )
    return accuracy(done.adapted.module, test), max(done.uplink_bytes)


KINDS: Final = (CYCLIC, ALL, REFITTED, LORA)
Fits = Mapping[tuple[str, str], tuple[float, list[Fit]]]


def run(
    progress: Progress | None = None, *, sizes: Sizes = STANDARD, workers: int | None = None
) -> StudyReport:
    """Fit matrices, adapt to rotated digits, and federate one mode per round against all."""
    started = time.perf_counter()
    seeds = range(sizes.seeds)
    fits = _fits(sizes, progress, workers)
    methods = [Method(name, config_of(name, 0)) for name in (TERA, TERA_8, *map(vera, VERA_RANKS), LORA)] + [
        Method("full fine-tuning", None)
    ]
    grid = TransferGrid.run(
        methods,
        RATES,
        seeds=sizes.seeds,
        width=WIDTH,
        steps=sizes.steps,
        progress=progress,
        workers=workers,
    )
    adapted = grid.tuned().values()
    control = float(np.mean([head_bias((seed, sizes)) for seed in seeds]))
    federations = [(kind, seed, sizes) for kind in KINDS for seed in seeds]
    outcomes = run_jobs(together, federations, what="federations", progress=progress, workers=workers)
    fed = {
        kind: [o for job, o in zip(federations, outcomes, strict=True) if job[0] == kind] for kind in KINDS
    }
    rows: list[tuple[str, int, float, float]] = [(t.name, t.numbers, t.rate, t.target) for t in adapted]
    rows.append(("bias of the last layer", 10, 3e-2, control))
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(fits, {row[0]: (row[1], row[3]) for row in rows}, fed)),
        tuple(_tables(fits, rows, fed, sizes)),
        {"tera-accuracy": partial(_plot, rows)},
    )


register(SLUG, "study", "2509.03234")(run)


def _fits(sizes: Sizes, progress: Progress | None, workers: int | None) -> Fits:
    """Return every method's best learning rate on a target, and its fits there."""
    seeds = range(sizes.seeds)
    jobs = [
        (k, m, rate, seed, sizes) for k in (NEAR, GENERIC) for m in FITTED for rate in RATES for seed in seeds
    ]
    found = dict(
        zip(jobs, run_jobs(fit, jobs, what="matrices", progress=progress, workers=workers), strict=True)
    )
    best = {}
    for kind in (NEAR, GENERIC):
        for method in FITTED:
            tried = {rate: [found[kind, method, rate, seed, sizes] for seed in seeds] for rate in RATES}
            best[kind, method] = min(tried.items(), key=lambda item: _mean([f.error for f in item[1]]))
    return best


def _mean(values: Sequence[float]) -> float:
    return float(np.mean([v if math.isfinite(v) else math.inf for v in values]))


def _claims(
    fits: Fits, reached: Mapping[str, tuple[int, float]], fed: Mapping[str, list[tuple[float, int]]]
) -> list[Claim]:
    rank = min(f.rank for f in fits[NEAR, TERA][1])
    other = max(f.rank for f in fits[NEAR, vera(8)][1])
    claims = [
        Claim(
            "24 numbers of TeRA make a change of rank 64, VeRA r=8 of at most 8",
            rank,
            other,
            rank == 64 and other <= 8,
        )
    ]
    for baseline in (vera(8), vera(64), LORA):
        mine, theirs = (_mean([f.error for f in fits[NEAR, m][1]]) for m in (TERA, baseline))
        numbers = fits[NEAR, baseline][1][0].numbers
        text = f"target {NEAR}: error of TeRA (24 numbers) below {baseline} ({numbers})"
        claims.append(Claim(text, mine, theirs, mine < theirs))
    best_vera = max(reached[vera(r)][1] for r in VERA_RANKS)
    mine = reached[TERA][1]
    text = "rotated digits: TeRA (six modes) within 2 points of VeRA r=8 with a third of its numbers"
    claims.append(Claim(text, mine, reached[vera(8)][1], mine >= reached[vera(8)][1] - 0.02))
    claims.append(
        Claim("... and within 2 points of the best VeRA", mine, best_vera, mine >= best_vera - 0.02)
    )
    control = reached["bias of the last layer"][1]
    claims.append(Claim("... and above training the last layer's bias only", mine, control, mine > control))
    cyclic, all_ = (_mean([a for a, _ in fed[kind]]) for kind in (CYCLIC, ALL))
    claims.append(
        Claim(
            "federation: one mode per round (exact) at least as accurate as all modes",
            cyclic,
            all_,
            cyclic >= all_,
        )
    )
    refitted = _mean([a for a, _ in fed[REFITTED]])
    text = "federation: all modes, dense updates averaged and fitted again, more accurate than mean diagonals"
    claims.append(Claim(text, refitted, all_, refitted > all_))
    sent, lora = fed[CYCLIC][0][1], fed[LORA][0][1]
    claims.append(
        Claim(
            "federation: bytes up per round of one mode below 1/10 of LoRA r=1", sent, lora, sent < lora / 10
        )
    )
    return claims


def _tables(
    fits: Fits,
    rows: Sequence[tuple[str, int, float, float]],
    fed: Mapping[str, list[tuple[float, int]]],
    sizes: Sizes,
) -> list[Table]:
    fitted = [
        (kind, m, chosen[0].numbers, rate, _mean([f.error for f in chosen]), chosen[0].rank)
        for (kind, m), (rate, chosen) in fits.items()
    ]
    return [
        Table.of(
            f"A 64 x 64 change fitted: {sizes.fit_steps} steps of Adam, {sizes.seeds} seeds, best of {RATES}",
            ("target", "method", "trained numbers", "best lr", "relative squared error", "rank"),
            fitted,
        ),
        Table.of(
            f"Rotated digits, network 64-64-64-10, {sizes.steps} steps, {sizes.seeds} seeds",
            ("method", "trained numbers", "best lr", "test accuracy"),
            rows,
        ),
        Table.of(
            f"Federation: {CLIENTS} clients sorted by label, {sizes.rounds} rounds of 10 steps, Adam at 0.03",
            ("what is trained", "bytes up per round", "test accuracy"),
            [(k, max(b for _, b in runs), _mean([a for a, _ in runs])) for k, runs in fed.items()],
        ),
    ]


def _plot(rows: Sequence[tuple[str, int, float, float]], stem: Path) -> list[Path]:
    """Draw accuracy over the number of trained parameters."""
    families: Mapping[str, Callable[[str], bool]] = {
        "TeRA": lambda name: name.startswith("TeRA"),
        "VeRA": lambda name: name.startswith("VeRA"),
        "LoRA r=1": lambda name: name == LORA,
        "bias of the last layer": lambda name: name.startswith("bias"),
    }
    lines = []
    for label, belongs in families.items():
        points = sorted((row[1], row[3]) for row in rows if belongs(row[0]))
        lines.append(Line(label, [n for n, _ in points], [a for _, a in points], mark=0))
    return panels(
        stem,
        "Rotated digits: accuracy by trained numbers",
        [("adaptation", "each at its best learning rate", lines)],
        x_label="trained numbers",
        y_label="test accuracy",
        log=False,
    )
