"""S2FT's small study: what is learned, forgotten and kept in memory (arXiv 2412.06289).

The paper's claims are about language models. Here a network trained on digits is adapted to 200 digits turned
by 90 degrees; forgetting is the loss of accuracy on upright ones. The exact properties (a function-preserving
permutation, adapters that add up, exact averaging, bytes kept for the backward pass) do not depend on the
task.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import nn

from turnout.peft import LoraConfig, S2ftConfig, attach
from turnout.peft.co_permutation import permute_channels, selected_first
from turnout.reproduce import paca
from turnout.reproduce.averaging import compare
from turnout.reproduce.report import Claim, Progress, StudyReport
from turnout.reproduce.saved_tensors import Footprint
from turnout.reproduce.transfer import HIDDEN, Method
from turnout.reproduce.transfer_figures import plot_target_and_source
from turnout.reproduce.transfer_grid import RATES, TransferGrid, Tuned
from turnout.wire import register

SLUG: Final = "s2ft"
WIDTH: Final = 128
S2FT, LORA, FULL_TUNING = "S2FT 12%", "LoRA r=8", "full"
METHODS: Final = (
    Method(S2FT, S2ftConfig(d_ratio=0.125, target_modules=HIDDEN)),
    Method(LORA, LoraConfig(lora_alpha=8, target_modules=HIDDEN)),
    Method(FULL_TUNING, None),
)


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    steps: int = 250
    seeds: int = 5
    train_examples: int = 200
    rates: tuple[float, ...] = (3e-4, *RATES)
    steps_measured: paca.Sizes = paca.FULL


FULL: Final = Sizes()


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Adapt to 200 rotated digits: what S2FT, LoRA and full tuning learn and forget, and what they keep."""
    started = time.perf_counter()
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
    ratio = paca.RANK / sizes.steps_measured.chain_width
    prints = paca.footprints(
        sizes.steps_measured, SLUG, S2ftConfig(d_ratio=ratio), LoraConfig(r=paca.RANK // 2)
    )
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(grid.tuned(), prints)),
        (
            grid.table(),
            paca.footprint_table(sizes.steps_measured, prints),
        ),
        {"s2ft-rates": partial(plot_target_and_source, "S2FT", grid)},
    )


register(SLUG, "study", "2412.06289")(run)


def _claims(named: dict[str, Tuned], prints: dict[str, Footprint]) -> list[Claim]:
    averaged = compare(S2ftConfig(d_ratio=0.125, target_modules=HIDDEN), width=WIDTH, rounds=3, seed=0)
    return [
        Claim(
            "as accurate on the target as LoRA of about as many numbers (to 1 point)",
            named[S2FT].target,
            named[LORA].target,
            named[S2FT].target >= named[LORA].target - 0.01,
        ),
        Claim(
            "less is forgotten than by full fine-tuning: accuracy on the source",
            named[S2FT].source,
            named[FULL_TUNING].source,
            named[S2FT].source > named[FULL_TUNING].source,
        ),
        Claim(
            "fewer bytes are kept for backward than with LoRA of as many numbers, and than with full tuning",
            prints[SLUG].saved_bytes,
            f"{prints['lora'].saved_bytes} (LoRA), {prints[FULL_TUNING].saved_bytes} (full)",
            prints[SLUG].saved_bytes < min(prints["lora"].saved_bytes, prints[FULL_TUNING].saved_bytes),
        ),
        Claim(
            "a network whose channels are permuted together computes the same (largest difference)",
            _permuted(),
            0.0,
            _permuted() < 1e-5,
        ),
        Claim("adapters of disjoint channels add up (largest difference)", _added(), 0.0, _added() < 1e-6),
        Claim("averaging its slices is averaging the weights", averaged.gap, 0.0, averaged.gap < 1e-4),
    ]


def _permuted() -> float:
    torch.manual_seed(0)
    up, down, x = nn.Linear(16, 64), nn.Linear(64, 16), torch.randn(8, 16)
    with torch.no_grad():
        before = down(torch.relu(up(x)))
        permute_channels([up], down, selected_first(torch.tensor([7, 40, 3]), 64))
        return float((down(torch.relu(up(x))) - before).abs().max())


def _added() -> float:
    """Return how far merging one adapter after another of disjoint channels is from adding both changes."""
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    deltas = []
    for part in (slice(0, 32), slice(32, 64)):
        linear = nn.Linear(64, 16, bias=False)
        with torch.no_grad():
            linear.weight.copy_(weight)
        adapted = attach(nn.Sequential(linear), S2ftConfig(d_ratio=0.5))
        layer = adapted.layers["0"]
        layer.load_shared_state({"s2_indices": torch.arange(64)[part]})
        adapted.load_trainable_state_dict({"0.s2": torch.randn(16, 32)})
        deltas.append(layer.delta_weight().detach())
    one_by_one = (weight + deltas[0]) + deltas[1]
    return float((one_by_one - (weight + (deltas[0] + deltas[1]))).abs().max())
