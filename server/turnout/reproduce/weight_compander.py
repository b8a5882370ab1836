"""Weight Compander's small study (arXiv 2306.16993): what it does to the weights, and whether that helps.

A network 64-128-128-10 is trained on 150 digits by SGD with momentum, at each of three weight decays.
Companded weights (fixed and trained shape) stand beside plain ones, dropout, and clipping at the same bound,
which has the bound without the expansion. Measured are test accuracy, how far the largest weights stand out,
excess kurtosis, the share of weights near zero, and what is left of the accuracy when the largest 1 % of each
weight are removed. In the federation clients of few labels average weights, or latent weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from turnout.peft import WeightCompanderConfig, attach
from turnout.peft.weight_compander import WeightCompander
from turnout.reproduce.federated_student import StudentTask, federate
from turnout.reproduce.figures import Line, panels
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.reproduce.transfer import Digits
from turnout.tasks.classification import split_examples
from turnout.tasks.digits import load_digits
from turnout.wire import register

SLUG: Final = "weight-compander"
TRAIN: Final = 150
WIDTH: Final = 128
DECAYS: Final = (0.0, 1e-3, 5e-3)
RATE: Final = 0.1
BATCH: Final = 32
LINEAR: Final = (0, 2, 4)
CLIENTS: Final = 5

PLAIN: Final = "plain"
CLIP: Final = "clipped at WC's bound"
DROPOUT: Final = "dropout 0.2"
FIXED: Final = "WC"
LEARNED: Final = "WC, shape trained"
ARMS: Final = (PLAIN, CLIP, DROPOUT, FIXED, LEARNED)


@dataclass(frozen=True)
class Sizes:
    """How large the study is."""

    steps: int = 400
    seeds: int = 3
    rounds: int = 40


STANDARD: Final = Sizes()


@dataclass(frozen=True)
class Outcome:
    """What came of one training: accuracy, the weights' distribution, accuracy without the largest 1 %."""

    accuracy: float
    largest: float
    kurtosis: float
    near_zero: float
    ablated: float


def network(seed: int) -> nn.Sequential:
    """Return the network as PyTorch initialises it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
        )


def digits(seed: int) -> tuple[Digits, Digits]:
    """Return 150 training digits and all others."""
    train, test = split_examples(load_digits(), 1 - TRAIN / 1797, seed)
    made = []
    for part in (train, test):
        pixels = part.x.astype(np.float32).reshape(len(part.labels), 64) / 16.0
        made.append(Digits(torch.from_numpy(pixels), torch.from_numpy(part.labels)))
    return made[0], made[1]


def train(job: tuple[str, float, int, Sizes]) -> Outcome:
    """Return how an arm did with a weight decay, for one seed."""
    arm, decay, seed, sizes = job
    data, test = digits(seed)
    module = network(seed)
    bounds = [1.5 * math.pi / 2 * float(_linear(module, k).weight.detach().abs().max()) for k in LINEAR]
    if arm in (FIXED, LEARNED):
        attach(module, WeightCompanderConfig(transfer="latent", learnable=arm == LEARNED))
    optimizer = torch.optim.SGD(_groups(module, decay), lr=RATE, momentum=0.9)
    rng, noise = np.random.default_rng([seed, 6]), torch.Generator().manual_seed(seed)
    for _ in range(sizes.steps):
        rows = torch.from_numpy(rng.integers(len(data.y), size=BATCH))
        optimizer.zero_grad()
        x = data.x[rows]
        output = _with_dropout(module, x, noise) if arm == DROPOUT else module(x)
        torch.autograd.backward(cross_entropy(output, data.y[rows]))
        optimizer.step()
        if arm == CLIP:
            with torch.no_grad():
                for k, bound in zip(LINEAR, bounds, strict=True):
                    _linear(module, k).weight.clamp_(-bound, bound)
    return measure(module, test)


def _groups(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return the parameters by decay and rate: of the shape a tenth of the rate and no decay."""
    shape = [p for name, p in module.named_parameters() if name.endswith((".wc_a", ".wc_b"))]
    others = [
        p
        for name, p in module.named_parameters()
        if p.requires_grad and not name.endswith((".wc_a", ".wc_b"))
    ]
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": decay}]
    if shape:
        groups.append({"params": shape, "weight_decay": 0.0, "lr": RATE / 10})
    return groups


def _with_dropout(module: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    for k, part in enumerate(module):
        x = part(x)
        if k in (1, 3):
            x = x * (torch.rand(x.shape, generator=generator) >= 0.2) / 0.8
    return x


def _linear(module: nn.Sequential, index: int) -> nn.Linear:
    return cast(nn.Linear, module[index])


def weights(module: nn.Sequential) -> list[Tensor]:
    """Return the effective weights."""
    found = []
    for k in LINEAR:
        part = module[k]
        found.append(
            part.trained_weight() if isinstance(part, WeightCompander) else cast(Tensor, part.weight)
        )
    return [w.detach() for w in found]


def measure(module: nn.Sequential, test: Digits) -> Outcome:
    """Return test accuracy and the shape of the weights, the mean over the three layers."""
    matrices = weights(module)
    scaled = [(w - w.mean()) / w.std() for w in matrices]
    plain = network(0)
    with torch.no_grad():
        for k, w in zip(LINEAR, matrices, strict=True):
            limit = w.abs().flatten().quantile(0.99)
            _linear(plain, k).weight.copy_(torch.where(w.abs() > limit, 0.0, w))
            part = module[k]
            bias = part.wc_bias if isinstance(part, WeightCompander) else part.bias
            _linear(plain, k).bias.copy_(cast(Tensor, bias))
        reached = float((module(test.x).argmax(1) == test.y).double().mean())
        ablated = float((plain(test.x).argmax(1) == test.y).double().mean())
    return Outcome(
        reached,
        float(np.mean([float(w.abs().max() / w.std()) for w in matrices])),
        float(np.mean([float(z.pow(4).mean()) - 3.0 for z in scaled])),
        float(np.mean([float((w.abs() < 0.1 * w.std()).float().mean()) for w in matrices])),
        ablated,
    )


def together(job: tuple[str, int, Sizes]) -> tuple[float, int]:
    """Return a federation's test accuracy and the bytes up per round, with ``transfer`` as given."""
    transfer, seed, sizes = job
    data, test = digits(seed)
    order = data.y.argsort(stable=True)
    task = StudentTask(lambda: network(seed), data.x[order], data.y[order], cross_entropy, CLIENTS)
    config = WeightCompanderConfig(transfer=transfer, seed=seed)  # type: ignore[arg-type]
    done = federate(task, config, rounds=sizes.rounds, steps=5, lr=0.05, batch_size=BATCH, seed=seed)
    with torch.no_grad():
        reached = float((done.adapted.module(test.x).argmax(1) == test.y).double().mean())
    return reached, done.uplink_bytes[-1]


Grid = Mapping[tuple[str, float], list[Outcome]]


def run(
    progress: Progress | None = None, *, sizes: Sizes = STANDARD, workers: int | None = None
) -> StudyReport:
    """150 digits: plain, clipped, dropout and companded weights; then a federation of either kind."""
    started = time.perf_counter()
    jobs = [(a, d, s, sizes) for a in ARMS for d in DECAYS for s in range(sizes.seeds)]
    found = dict(
        zip(jobs, run_jobs(train, jobs, what="150 digits", progress=progress, workers=workers), strict=True)
    )
    grid = {(a, d): [found[a, d, s, sizes] for s in range(sizes.seeds)] for a in ARMS for d in DECAYS}
    kinds = [(t, s, sizes) for t in ("effective", "latent") for s in range(sizes.seeds)]
    outcomes = run_jobs(together, kinds, what="federations", progress=progress, workers=workers)
    fed = {
        t: [o for job, o in zip(kinds, outcomes, strict=True) if job[0] == t] for t in ("effective", "latent")
    }
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(grid, fed)),
        tuple(_tables(grid, fed, sizes)),
        {"weight-compander-weights": partial(_plot, grid)},
    )


register(SLUG, "study", "2306.16993")(run)


def _mean(outcomes: Sequence[Outcome], name: str) -> float:
    return float(np.mean([getattr(outcome, name) for outcome in outcomes]))


def _best(grid: Grid, arm: str) -> tuple[float, list[Outcome]]:
    decay = max(DECAYS, key=lambda d: _mean(grid[arm, d], "accuracy"))
    return decay, grid[arm, decay]


def _claims(grid: Grid, fed: Mapping[str, list[tuple[float, int]]]) -> list[Claim]:
    claims = []
    described = {
        "largest": "largest weight over standard deviation",
        "kurtosis": "excess kurtosis",
        "near_zero": "share of weights within 0.1 standard deviations of zero",
    }
    for name, text in described.items():
        for baseline in (PLAIN, CLIP):
            pairs = [(_mean(grid[FIXED, d], name), _mean(grid[baseline, d], name)) for d in DECAYS]
            mine, other = max(pairs, key=lambda pair: pair[0] - pair[1])  # Where it is closest.
            told = f"{text} lower with WC than {baseline}, at every weight decay"
            claims.append(Claim(told, mine, other, all(a < b for a, b in pairs)))
    loss, other = (
        _mean(grid[arm, 0.0], "accuracy") - _mean(grid[arm, 0.0], "ablated") for arm in (FIXED, PLAIN)
    )
    text = "removing the largest 1 % of the weights costs WC less accuracy than plain, without decay"
    claims.append(Claim(text, loss, other, loss < other))
    for baseline in (PLAIN, DROPOUT):
        mine, theirs = (_mean(_best(grid, arm)[1], "accuracy") for arm in (FIXED, baseline))
        claims.append(
            Claim(
                f"test accuracy of WC above {baseline}, each at its best decay", mine, theirs, mine > theirs
            )
        )
    effective, latent = (float(np.mean([a for a, _ in fed[t]])) for t in ("effective", "latent"))
    text = "federation: averaging weights at least as accurate as averaging latent weights"
    claims.append(Claim(text, effective, latent, effective >= latent))
    return claims


def _tables(grid: Grid, fed: Mapping[str, list[tuple[float, int]]], sizes: Sizes) -> list[Table]:
    rows: list[tuple[Value, ...]] = []
    for (arm, decay), outcomes in grid.items():
        values = [o.accuracy for o in outcomes]
        spread = 2 * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else math.nan
        cells = [_mean(outcomes, name) for name in ("largest", "kurtosis", "near_zero", "ablated")]
        rows.append((arm, decay, f"{np.mean(values):.3f} +- {spread:.3f}", *cells))
    return [
        Table.of(
            f"150 digits, {sizes.steps} steps of SGD (rate {RATE}, momentum 0.9), {sizes.seeds} seeds; +- two"
            " standard errors",
            (
                "weights",
                "decay",
                "test accuracy",
                "max / std",
                "kurtosis",
                "near zero",
                "accuracy without 1 %",
            ),
            rows,
        ),
        Table.of(
            f"Federation: {CLIENTS} clients sorted by label, {sizes.rounds} rounds of 5 steps",
            ("what is averaged", "bytes up per round", "test accuracy"),
            [(t, runs[0][1], float(np.mean([a for a, _ in runs]))) for t, runs in fed.items()],
        ),
    ]


def _plot(grid: Grid, stem: Path) -> list[Path]:
    """Draw the largest weight and the kurtosis over weight decay."""
    places = list(range(len(DECAYS)))

    def lines(name: str) -> list[Line]:
        return [Line(arm, places, [_mean(grid[arm, d], name) for d in DECAYS]) for arm in ARMS]

    return panels(
        stem,
        "Companded weights: none stands out",
        [
            ("largest weight / standard deviation", f"weight decays {DECAYS}", lines("largest")),
            ("excess kurtosis", f"weight decays {DECAYS}", lines("kurtosis")),
        ],
        x_label="weight decay, from left to right",
        y_label="",
        log=False,
    )
