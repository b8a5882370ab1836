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
from typing import Final

import numpy as np
import torch
from torch import nn

from turnout.peft import BoneConfig, LoraConfig, MissConfig, attach
from turnout.reproduce.averaging import compare
from turnout.reproduce.report import Claim, Progress, StudyReport, Table
from turnout.reproduce.transfer import HIDDEN, Method, with_pissa
from turnout.reproduce.transfer_figures import plot_target
from turnout.reproduce.transfer_grid import RATES, TransferGrid, Tuned
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
    grid = TransferGrid.run(
        METHODS,
        sizes.rates,
        seeds=sizes.seeds,
        width=WIDTH,
        steps=sizes.steps,
        progress=progress,
        workers=workers,
    )
    early = {m.name: float(np.mean([o.losses[0] for o in grid.runs[m.name][COMMON]])) for m in METHODS}
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(early, grid.tuned(), sizes)),
        (
            grid.table(),
            Table.of(
                f"training loss after 50 steps at one learning rate for all, {COMMON:g}",
                ("method", "loss"),
                list(early.items()),
            ),
        ),
        {"bone-rates": partial(plot_target, "Bone", grid)},
    )


register(SLUG, "study", "2409.15371")(run)


def _claims(early: dict[str, float], named: dict[str, Tuned], sizes: Sizes) -> list[Claim]:
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
