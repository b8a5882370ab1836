"""Bone's small study: Bat and MiSS beside LoRA with as many numbers (arXiv 2409.15371).

A network trained on digits is adapted to digits turned by 90 degrees; 64 inputs, two hidden layers of 64. The
paper's claim of faster convergence is for one small learning rate for all; here it is looked at there, and
with each method at its own best rate, where it does not have to hold. PiSSA-initialised LoRA and full
fine-tuning stand beside them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from turnout.peft import BoneConfig, LoraConfig, MissConfig, attach
from turnout.reproduce.averaging import compare
from turnout.reproduce.figures import panels
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table
from turnout.reproduce.transfer import (
    COLUMNS,
    HIDDEN,
    RATES,
    Adaptation,
    Job,
    Method,
    Tuned,
    adapt,
    table_rows,
    tuned,
    with_pissa,
)
from turnout.reproduce.transfer_figures import rate_lines
from turnout.wire import register

SLUG: Final = "bone"
WIDTH: Final = 64
COMMON: Final = 1e-3  # One small learning rate for all, as in the paper.

BAT, MISS, LORA, PISSA, FULL_TUNING = "Bat r=8", "MiSS r=8", "LoRA r=4", "PiSSA r=4", "full"
METHODS: Final = (
    Method(BAT, BoneConfig(r=8, target_modules=HIDDEN)),
    Method(MISS, MissConfig(r=8, target_modules=HIDDEN)),
    Method(LORA, LoraConfig(r=4, lora_alpha=4, target_modules=HIDDEN)),
    Method(PISSA, LoraConfig(r=4, lora_alpha=4, target_modules=HIDDEN), with_pissa),
    Method(FULL_TUNING, None),
)


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    steps: int = 300
    seeds: int = 5
    rounds: int = 5
    rates: tuple[float, ...] = RATES


FULL: Final = Sizes()


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Adapt to rotated digits: Bat and MiSS against LoRA, PiSSA and full fine-tuning."""
    started = time.perf_counter()
    jobs = [
        Job(method, rate, seed, WIDTH, sizes.steps)
        for method in METHODS
        for rate in sizes.rates
        for seed in range(sizes.seeds)
    ]
    outcomes = run_jobs(adapt, jobs, what="adapting to rotated digits", progress=progress, workers=workers)
    early = {m.name: _early(m.name, jobs, outcomes) for m in METHODS}
    best = tuned(jobs, outcomes)
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(early, best, sizes)),
        (
            Table.of("each method at its best learning rate", COLUMNS, table_rows(best)),
            Table.of(
                f"training loss after 50 steps at one learning rate for all, {COMMON:g}",
                ("method", "loss"),
                list(early.items()),
            ),
        ),
        {"bone-rates": partial(_plot, jobs, outcomes)},
    )


register(SLUG, "study", "2409.15371")(run)


def _early(name: str, jobs: list[Job], outcomes: list[Adaptation]) -> float:
    losses = [
        o.losses[0] for j, o in zip(jobs, outcomes, strict=True) if j.method.name == name and j.rate == COMMON
    ]
    return float(np.mean(losses))


def _claims(early: dict[str, float], best: list[Tuned], sizes: Sizes) -> list[Claim]:
    named = {t.name: t for t in best}
    bat_rank, miss_rank = (_rank(m) for m in METHODS[:2])
    bat, lora = (
        compare(m.config, width=WIDTH, rounds=sizes.rounds, seed=0)
        for m in (METHODS[0], METHODS[2])
        if m.config
    )
    return [
        Claim(
            "at one small learning rate, training loss after 50 steps: Bat < MiSS < LoRA",
            early[BAT],
            f"{early[MISS]:.3g} (MiSS), {early[LORA]:.3g} (LoRA)",
            early[BAT] < early[MISS] < early[LORA],
        ),
        Claim(
            "with each at its own best rate, Bat is as accurate on the target as LoRA (to 1 point)",
            named[BAT].target,
            named[LORA].target,
            named[BAT].target >= named[LORA].target - 0.01,
        ),
        Claim(
            "Bat's update has a rank above its r = 8; MiSS's has not",
            bat_rank,
            miss_rank,
            miss_rank <= 8 < bat_rank,
        ),
        Claim(
            "averaging Bat's blocks is averaging the weights (largest relative gap); LoRA's factors are not",
            bat.gap,
            lora.gap,
            bat.gap < 1e-4 < 1e-3 < lora.gap,
        ),
        Claim(
            "what a client sends, in numbers: as many as LoRA's",
            bat.numbers,
            lora.numbers,
            bat.numbers == lora.numbers,
        ),
    ]


def _rank(method: Method) -> int:
    """Return the rank of the update of a random weight."""
    assert method.config is not None
    torch.manual_seed(0)
    adapted = attach(
        nn.ModuleDict({"0": nn.Linear(WIDTH, WIDTH), "2": nn.Linear(WIDTH, WIDTH)}), method.config
    )
    adapted.load_trainable_state_dict(
        {name: torch.randn_like(tensor) for name, tensor in adapted.trainable_state_dict().items()}
    )
    return int(torch.linalg.matrix_rank(adapted.delta_weights()["0"]))


def _plot(jobs: list[Job], outcomes: list[Adaptation], stem: Path) -> list[Path]:
    return panels(
        stem,
        "Bone: adapting to rotated digits",
        [("target accuracy", "mean over seeds, after training", rate_lines(jobs, outcomes))],
        x_label="learning rate (log10)",
        y_label="accuracy",
        log=False,
    )
