"""PaCA's small study: memory for the backward pass, time of a step, accuracy (arXiv 2503.01905).

The paper's claims are about memory and time, with LoRA of as many numbers beside it; they are measured on a
chain of linear layers with GELU between them. (With ReLU there is nothing to save: it keeps the same tensor
itself.) Accuracy is measured on digits turned by 90 degrees, where random input columns are a handicap: LoRA
is better.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Final

import torch
from torch import nn

from turnout.peft import AdapterConfig, LoraConfig, PacaConfig
from turnout.reproduce.averaging import compare
from turnout.reproduce.report import Claim, Progress, StudyReport, Table
from turnout.reproduce.saved_tensors import Footprint, chain, footprint
from turnout.reproduce.transfer import HIDDEN, Method
from turnout.reproduce.transfer_figures import plot_target
from turnout.reproduce.transfer_grid import RATES, TransferGrid, Tuned
from turnout.wire import register

SLUG: Final = "paca"
WIDTH: Final = 128
RANK: Final = 16
LORA, FULL_TUNING = "LoRA r=8", "full"


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    steps: int = 250
    seeds: int = 5
    ranks: tuple[int, ...] = (4, 16, 64)
    rates: tuple[float, ...] = RATES
    chain_width: int = 1024
    chain_depth: int = 6
    chain_batch: int = 512
    repeats: int = 10


FULL: Final = Sizes()


def methods(ranks: tuple[int, ...]) -> list[Method]:
    """Return what is compared on the digits; LoRA has the numbers of PaCA with r = 16."""
    paca = [Method(f"PaCA r={r}", PacaConfig(r=r, paca_alpha=r, target_modules=HIDDEN)) for r in ranks]
    return [*paca, Method(LORA, LoraConfig(lora_alpha=8, target_modules=HIDDEN)), Method(FULL_TUNING, None)]


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Memory and time of a step, and accuracy on rotated digits: PaCA, LoRA, full fine-tuning."""
    started = time.perf_counter()
    grid = TransferGrid.run(
        methods(sizes.ranks),
        sizes.rates,
        seeds=sizes.seeds,
        width=WIDTH,
        steps=sizes.steps,
        progress=progress,
        workers=workers,
    )
    prints = footprints(sizes, SLUG, PacaConfig(r=RANK, paca_alpha=RANK), LoraConfig(r=RANK // 2))
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(grid.tuned(), prints, sizes)),
        (
            grid.table(),
            footprint_table(sizes, prints),
        ),
        {"paca-rates": partial(plot_target, "PaCA", grid)},
    )


register(SLUG, "study", "2503.01905")(run)


def _claims(named: dict[str, Tuned], prints: dict[str, Footprint], sizes: Sizes) -> list[Claim]:
    paca = [named[f"PaCA r={r}"] for r in sizes.ranks]
    middle = named.get(f"PaCA r={RANK}", paca[-1])
    averaged = compare(
        PacaConfig(r=RANK, paca_alpha=RANK, target_modules=HIDDEN), width=WIDTH, rounds=3, seed=0
    )
    activations = sizes.chain_depth * sizes.chain_batch * sizes.chain_width * 4
    allowed = prints[FULL_TUNING].saved_bytes - round(activations * (1 - RANK / sizes.chain_width))
    return [
        Claim(
            "bytes kept for backward: of the layers' inputs only the selected columns",
            prints[SLUG].saved_bytes,
            prints[FULL_TUNING].saved_bytes,
            prints[SLUG].saved_bytes <= allowed + sizes.chain_depth * RANK * sizes.chain_width * 4,
        ),
        Claim(
            "fewer bytes are kept than with LoRA of as many numbers",
            prints[SLUG].saved_bytes,
            prints["lora"].saved_bytes,
            prints[SLUG].saved_bytes < prints["lora"].saved_bytes,
        ),
        Claim(
            "a step takes less time than with LoRA of as many numbers (seconds, the least of several)",
            prints[SLUG].seconds,
            prints["lora"].seconds,
            prints[SLUG].seconds < prints["lora"].seconds,
        ),
        Claim(
            "accuracy on the target rises with r",
            " < ".join(f"{t.target:.3f}" for t in paca),
            f"{named[FULL_TUNING].target:.3f} (full)",
            all(a.target < b.target for a, b in pairwise(paca)),
        ),
        Claim("PaCA with r = 16 is above 0.85", middle.target, 0.85, middle.target > 0.85),
        Claim(
            "PaCA is as accurate as LoRA of as many numbers (to 1 point)",
            middle.target,
            named[LORA].target,
            middle.target >= named[LORA].target - 0.01,
        ),
        Claim("averaging its columns is averaging the weights", averaged.gap, 0.0, averaged.gap < 1e-4),
    ]


def footprints(sizes: Sizes, slug: str, config: AdapterConfig, lora: LoraConfig) -> dict[str, Footprint]:
    """Return what a step takes with the adapter, with LoRA and with full fine-tuning."""
    x = torch.randn(sizes.chain_batch, sizes.chain_width, generator=torch.Generator().manual_seed(1))
    made = {}
    for name, chosen in ((slug, config), ("lora", lora), (FULL_TUNING, None)):
        module = chain(sizes.chain_width, sizes.chain_depth, nn.GELU, trained=chosen is None)
        made[name] = footprint(module, chosen, x, sizes.repeats)
    return made


def footprint_table(sizes: Sizes, prints: dict[str, Footprint]) -> Table:
    """Return the measured bytes and seconds as a table."""
    rows = [(n, p.numbers, p.saved_bytes / 2**20, 1e3 * p.seconds) for n, p in prints.items()]
    return Table.of(
        f"one step: {sizes.chain_depth} layers {sizes.chain_width} x {sizes.chain_width} with GELU, "
        f"batch {sizes.chain_batch}",
        ("method", "trained numbers", "kept for backward (MiB)", "least time (ms)"),
        rows,
    )
