"""LIFT's small study: are principal weights found, and what is forgotten (arXiv 2506.00772)?

The mechanism: of a low-rank matrix under noise, entries picked by the filter are compared with the true
largest ones, beside those picked by magnitude. The transfer: digits to 200 rotated digits, with masks by
LIFT, by magnitude (the filter at full rank) and at random, LoRA and full fine-tuning at their best learning
rates.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from turnout.peft import AdapterConfig, LiftConfig, LoraConfig, attach
from turnout.reproduce.averaging import compare
from turnout.reproduce.report import Claim, Progress, StudyReport, Table
from turnout.reproduce.transfer import HIDDEN, Method
from turnout.reproduce.transfer_figures import plot_target_and_source
from turnout.reproduce.transfer_grid import RATES, TransferGrid, Tuned
from turnout.wire import register

SLUG: Final = "lift"
WIDTH: Final = 128
SIDE, LATENT, SHARE = 128, 4, 0.05
NOISES: Final = (0.5, 1.0, 2.0)
LIFT, MAGNITUDE, RANDOM, LORA, FULL_TUNING = "LIFT", "magnitude", "random", "LoRA r=4", "full"


def with_random_mask(network: nn.Sequential, config: AdapterConfig) -> nn.Module:
    """Return ``network`` with as many entries trained as LIFT's, at random places."""
    adapted = attach(network, config)
    for name, layer in adapted.layers.items():
        state = layer.shared_state()
        order = torch.randperm(layer.weight.numel(), generator=config.generator(name))
        state["lift_index"] = order[: len(state["lift_index"])].sort().values.to(torch.int32)
        layer.load_shared_state(state)
    return adapted.module


METHODS: Final = (
    Method(LIFT, LiftConfig(r=4, filter_rank=8, target_modules=HIDDEN)),
    Method(MAGNITUDE, LiftConfig(r=4, filter_rank=WIDTH, target_modules=HIDDEN)),
    Method(RANDOM, LiftConfig(r=4, filter_rank=8, target_modules=HIDDEN), with_random_mask),
    Method(LORA, LoraConfig(r=4, lora_alpha=4, target_modules=HIDDEN)),
    Method(FULL_TUNING, None),
)


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    steps: int = 200
    seeds: int = 5
    train_examples: int = 200
    rates: tuple[float, ...] = RATES


FULL: Final = Sizes()


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Principal weights under noise; LIFT, magnitude, random masks, LoRA, full tuning on rotated digits."""
    started = time.perf_counter()
    found = {noise: recall(noise, sizes.seeds) for noise in NOISES}
    grid = TransferGrid.run(
        METHODS,
        sizes.rates,
        seeds=sizes.seeds,
        width=WIDTH,
        steps=sizes.steps,
        train_examples=sizes.train_examples,
        progress=progress,
        workers=workers,
    )
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(found, grid.tuned())),
        (
            Table.of(
                "share of the true largest entries that are picked",
                ("noise", "LIFT", "magnitude"),
                [(noise, *pair) for noise, pair in found.items()],
            ),
            grid.table(),
        ),
        {"lift-rates": partial(plot_target_and_source, "LIFT", grid)},
    )


register(SLUG, "study", "2506.00772")(run)


def recall(noise: float, seeds: int) -> tuple[float, float]:
    """Return which share of a low-rank matrix's largest entries LIFT and magnitude find under ``noise``."""
    k = round(SHARE * SIDE * SIDE)
    config = LiftConfig(r=round(k / (2 * SIDE)), filter_rank=LATENT)
    shares = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        low = (
            torch.randn(SIDE, LATENT, generator=generator)
            @ torch.randn(LATENT, SIDE, generator=generator)
            / 2
        )
        weight = low + noise * torch.randn(SIDE, SIDE, generator=generator)
        true = _largest(low, k)
        picked = [config.principal(weight, "w"), replace(config, filter_rank=SIDE).principal(weight, "w")]
        shares.append([len(set(index.tolist()) & true) / len(index) for index in picked])
    lift, magnitude = np.mean(shares, axis=0)
    return float(lift), float(magnitude)


def _largest(matrix: Tensor, k: int) -> set[int]:
    return set(matrix.abs().reshape(-1).topk(k).indices.tolist())


def _claims(found: dict[float, tuple[float, float]], named: dict[str, Tuned]) -> list[Claim]:
    averaged = compare(LiftConfig(r=4, filter_rank=8, target_modules=HIDDEN), width=WIDTH, rounds=3, seed=0)
    claims = [
        Claim(
            f"of the largest entries under noise {noise:g}, LIFT finds at least 0.15 more than magnitude",
            lift,
            magnitude,
            lift >= magnitude + 0.15,
        )
        for noise, (lift, magnitude) in found.items()
    ]
    return [
        *claims,
        Claim(
            "on the digits, LIFT is more accurate on the target than a random mask",
            named[LIFT].target,
            named[RANDOM].target,
            named[LIFT].target > named[RANDOM].target,
        ),
        Claim(
            "on the digits, LIFT is as accurate on the target as LoRA of as many numbers (to 1 point)",
            named[LIFT].target,
            named[LORA].target,
            named[LIFT].target >= named[LORA].target - 0.01,
        ),
        Claim(
            "on the digits, LIFT forgets less than full fine-tuning: accuracy on the source",
            named[LIFT].source,
            named[FULL_TUNING].source,
            named[LIFT].source > named[FULL_TUNING].source,
        ),
        Claim("averaging its values is averaging the weights", averaged.gap, 0.0, averaged.gap < 1e-4),
    ]
