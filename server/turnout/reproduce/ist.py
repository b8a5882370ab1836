"""IST's small study (arXiv 2410.11772): do the scores find the layers that have to change, and does it help?

A transformer of 8 layers and width 32 maps sequences of 4 inputs to outputs; a teacher differs from it in
layers 2 and 5 (counted from 0). Students train LoRA of rank 4 on all layers, on a quarter of them drawn at
random at every step (RST), on a quarter drawn by score (IST), or on fixed layers: the two right ones
(oracle), the first or the last quarter. Every arm is run at each of two learning rates and compared at its
best one. In the federation the server draws the layers of a round for all clients.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from turnout.client.training_parts import TrainingParts
from turnout.peft import AdapterConfig, IstConfig, LoraConfig, attach
from turnout.peft.ist import Ist
from turnout.reproduce.federated_student import StudentTask, federate
from turnout.reproduce.figures import Line, panels
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table
from turnout.wire import register

SLUG: Final = "ist"
LAYERS: Final = 8
CHANGED: Final = (2, 5)
WIDTH: Final = 32
LENGTH: Final = 4
RANK: Final = 4
RATES: Final = (1e-2, 3e-2)
BATCH: Final = 16
CLIENTS: Final = 4

FULL: Final = "LoRA on all layers"
RST: Final = "RST, random quarter"
IST: Final = "IST, quarter by score"
ORACLE: Final = "layers 2 and 5 (oracle)"
FIRST: Final = "first quarter"
LAST: Final = "last quarter"
ARMS: Final = (FULL, RST, IST, ORACLE, FIRST, LAST)


@dataclass(frozen=True)
class Sizes:
    """How large the study is."""

    steps: int = 200
    seeds: int = 2
    rounds: int = 20


STANDARD: Final = Sizes()


@dataclass(frozen=True)
class Outcome:
    """Test error, area under the curve of the scores for the right layers, and bytes sent per round."""

    error: float
    auroc: float = float("nan")
    scores: tuple[float, ...] = ()
    uplink: float = 0.0


class Block(nn.Module):
    """A transformer layer before its norms: attention with one head, then two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, of the shape of x: (batch, length, width)."""
        y = self.first(x)
        x = x + scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        z: Tensor = x + self.down(torch.tanh(self.up(self.second(x))))
        return z


def transformer(seed: int, changed: bool) -> nn.Sequential:
    """Return 8 layers; ``changed`` moves the weights of layers 2 and 5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(*(Block() for _ in range(LAYERS)))
        if changed:
            with torch.no_grad():
                for index in CHANGED:
                    for name in ("up", "down"):
                        weight = cast(nn.Linear, made[index].get_submodule(name)).weight
                        weight += torch.randn(WIDTH, RANK) @ torch.randn(RANK, WIDTH) * (0.6 / WIDTH**0.5)
    return made


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 600 training and 200 test sequences and the teacher's outputs for them."""
    x = torch.randn(800, LENGTH, WIDTH, generator=torch.Generator().manual_seed(900 + seed))
    with torch.no_grad():
        y = transformer(seed, changed=True)(x)
    return x[:600], y[:600], x[600:], y[600:]


def config_of(arm: str, seed: int, **changes: Any) -> AdapterConfig:
    """Return the adapters of an arm."""
    targets = ("up", "down")
    fixed = {ORACLE: CHANGED, FIRST: (0, 1), LAST: (6, 7)}
    if arm in (RST, IST):
        options: dict[str, Any] = {"mode": "local", "score_lr": 10.0 if arm == IST else 0.0, **changes}
        base = {"name": "lora", "r": RANK, "lora_alpha": RANK}
        return IstConfig(base=base, target_modules=targets, seed=seed, **options)
    names = tuple(f"{k}.{name}" for k in fixed.get(arm, range(LAYERS)) for name in targets)
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, seed=seed)


def train(job: tuple[str, float, int, Sizes]) -> Outcome:
    """Return how an arm did at a learning rate, for one seed."""
    arm, rate, seed, sizes = job
    x, y, test_x, test_y = data(seed)
    module = transformer(seed, changed=False)
    adapted = attach(module, config_of(arm, seed))
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=rate)
    parts, rng = TrainingParts(module), np.random.default_rng([seed, 3])
    parts.start(1, (seed,))
    for _ in range(sizes.steps):
        rows = torch.from_numpy(rng.integers(len(y), size=BATCH))

        def loss(rows: Tensor = rows) -> Tensor:
            error: Tensor = (module(x[rows]) - y[rows]).square().mean()
            return error

        parts.before_step(loss)
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()
        parts.leave_step()
    parts.end()
    with torch.no_grad():
        error = float((module(test_x) - test_y).square().mean())
    scored = adapted.companions.get("ist")
    return Outcome(error) if scored is None else _scored(error, cast(Ist, scored), 0.0)


def _scored(error: float, part: Ist, uplink: float) -> Outcome:
    q = part.running_scores.numpy().astype(float)
    right = [-q[k] for k in CHANGED]
    wrong = [-q[k] for k in range(LAYERS) if k not in CHANGED]
    wins = [0.5 if a == b else float(a > b) for a in right for b in wrong]
    return Outcome(error, float(np.mean(wins)), tuple(q.tolist()), uplink)


def together(job: tuple[str, int, Sizes]) -> Outcome:
    """Return how a federation did whose server draws the layers of a round (or LoRA on all)."""
    arm, seed, sizes = job
    x, y, test_x, test_y = data(seed)
    task = StudentTask(
        lambda: transformer(seed, changed=False), x, y, lambda out, y: (out - y).square().mean(), CLIENTS
    )
    config = config_of(arm, seed, mode="shared") if arm in (IST, RST) else config_of(arm, seed)
    done = federate(
        task, config, rounds=sizes.rounds, steps=10, lr=1e-2, optimizer="adam", batch_size=BATCH, seed=seed
    )
    with torch.no_grad():
        error = float((done.adapted.module(test_x) - test_y).square().mean())
    uplink = float(np.mean(done.uplink_bytes))
    scored = done.adapted.companions.get("ist")
    return Outcome(error, uplink=uplink) if scored is None else _scored(error, cast(Ist, scored), uplink)


def run(
    progress: Progress | None = None, *, sizes: Sizes = STANDARD, workers: int | None = None
) -> StudyReport:
    """Layers 2 and 5 of 8 have to change: IST against random layers, all layers and fixed ones."""
    started = time.perf_counter()
    jobs = [(arm, rate, seed, sizes) for arm in ARMS for rate in RATES for seed in range(sizes.seeds)]
    found = dict(
        zip(jobs, run_jobs(train, jobs, what="layers", progress=progress, workers=workers), strict=True)
    )
    best: dict[str, tuple[float, list[Outcome]]] = {}
    for arm in ARMS:
        tried = {rate: [found[arm, rate, seed, sizes] for seed in range(sizes.seeds)] for rate in RATES}
        best[arm] = min(tried.items(), key=lambda item: _error(item[1]))
    federations = [(arm, seed, sizes) for arm in (IST, RST, FULL) for seed in range(sizes.seeds)]
    outcomes = run_jobs(together, federations, what="federations", progress=progress, workers=workers)
    fed = {
        arm: [o for job, o in zip(federations, outcomes, strict=True) if job[0] == arm]
        for arm in (IST, RST, FULL)
    }
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(best, fed)),
        tuple(_tables(best, fed, sizes)),
        {"ist-scores": partial(_plot, best[IST][1], fed[IST])},
    )


register(SLUG, "study", "2410.11772")(run)


def _error(outcomes: Sequence[Outcome]) -> float:
    return float(np.mean([outcome.error for outcome in outcomes]))


def _auroc(outcomes: Sequence[Outcome]) -> float:
    return float(np.mean([outcome.auroc for outcome in outcomes]))


def _uplink(outcomes: Sequence[Outcome]) -> float:
    return float(np.mean([outcome.uplink for outcome in outcomes]))


def _claims(best: Mapping[str, tuple[float, list[Outcome]]], fed: Mapping[str, list[Outcome]]) -> list[Claim]:
    claims = []
    for where, outcomes in (("", best[IST][1]), ("federation: ", fed[IST])):
        area = _auroc(outcomes)
        text = f"{where}the scores rank layers 2 and 5 as important (area under the curve above 0.5)"
        claims.append(Claim(text, area, 0.5, area > 0.5))
    for baseline in (RST, FIRST, LAST, FULL):
        mine, other = _error(best[IST][1]), _error(best[baseline][1])
        claims.append(Claim(f"test error of IST below {baseline}", mine, other, mine < other))
    mine, other = _error(fed[IST]), _error(fed[RST])
    claims.append(Claim("federation: test error of IST below RST", mine, other, mine < other))
    # 8 scores of 4 bytes and 8 flags come on top.
    share = (_uplink(fed[IST]) - 5 * LAYERS) / _uplink(fed[FULL])
    claims.append(Claim("federation: a quarter of LoRA's bytes go up", share, 0.25, abs(share - 0.25) < 1e-6))
    return claims


def _tables(
    best: Mapping[str, tuple[float, list[Outcome]]], fed: Mapping[str, list[Outcome]], sizes: Sizes
) -> list[Table]:
    title = f"{sizes.steps} steps of Adam, {sizes.seeds} seeds, each arm at the best of the rates {RATES}"
    return [
        Table.of(
            title,
            ("what trains", "best lr", "test MSE", "AUROC of the scores"),
            [(arm, rate, _error(o), _auroc(o)) for arm, (rate, o) in best.items()],
        ),
        Table.of(
            f"Federation: {CLIENTS} clients, {sizes.rounds} rounds of 10 steps; the server draws the layers",
            ("what trains", "bytes up per round", "test MSE", "AUROC of the scores"),
            [(arm, _uplink(o), _error(o), _auroc(o)) for arm, o in fed.items()],
        ),
    ]


def _plot(alone: Sequence[Outcome], fed: Sequence[Outcome], stem: Path) -> list[Path]:
    """Draw the scores of every layer."""

    def lines(outcomes: Sequence[Outcome]) -> list[Line]:
        layers = list(range(LAYERS))
        return [Line(f"seed {seed}", layers, list(o.scores)) for seed, o in enumerate(outcomes)]

    return panels(
        stem,
        "IST's scores: low is important; layers 2 and 5 have to change",
        [
            ("one machine", "a new quarter at every step", lines(alone)),
            ("federation", "one quarter per round, the same for all clients", lines(fed)),
        ],
        x_label="layer",
        y_label="score q",
        log=False,
    )
