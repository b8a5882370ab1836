"""HUT's small study (arXiv 2409.13501): its cost, what it adapts well, and what it does to a pruned base.

Cost is counted, not timed: multiplications of matrices by PyTorch's counter, and two operations per entry for
the element-wise product. Quality: a network 64-w-w-10 trained on digits is adapted to inverted pixels,
darkened pixels (a change of scale, which a multiplication should follow easily) and rotated ones. HUT and
LoRA have the same rank, so the same number of trained parameters; "scaling" trains one factor per output and
input, HUT of rank 1. Every method is compared at its best learning rate. In the federation 70 % of the base's
weights are 0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from turnout.peft import AdapterConfig, HutConfig, LoraConfig, attach
from turnout.reproduce.federated_student import StudentTask, federate
from turnout.reproduce.figures import Line, panels
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Claim, Progress, StudyReport, Table
from turnout.reproduce.transfer import BATCH, HIDDEN, Digits, accuracy, pretrained
from turnout.tasks.classification import split_examples
from turnout.tasks.digits import load_digits
from turnout.wire import register

SLUG: Final = "hut"
RANK: Final = 4
RATES: Final = (3e-3, 1e-2, 3e-2)
INVERTED: Final = "inverted"
DARKER: Final = "darkened to 30 %"
ROTATED: Final = "rotated"
SHIFTS: Final = (INVERTED, DARKER, ROTATED)
HUT: Final = "HUT"
LORA: Final = "LoRA"
SCALING: Final = "scaling (HUT r=1)"
FULL: Final = "full fine-tuning"
METHODS: Final = (HUT, LORA, SCALING, FULL)
SIDE: Final = 256
TOKENS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
PRUNED: Final = 0.7
CLIENTS: Final = 4


@dataclass(frozen=True)
class Sizes:
    """How large the study is."""

    width: int = 128
    steps: int = 200
    seeds: int = 2
    rounds: int = 10


STANDARD: Final = Sizes()


def operations(config: AdapterConfig, tokens: int) -> int:
    """Return the adapter's operations in a forward pass over ``tokens`` inputs of a square layer."""
    (layer,) = attach(nn.Sequential(nn.Linear(SIDE, SIDE, bias=False)), config).layers.values()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(tokens, SIDE))
    own = int(counter.get_total_flops()) - 2 * tokens * SIDE * SIDE
    return own + (2 * SIDE * SIDE if isinstance(config, HutConfig) else 0)


def crossing(r: int) -> float:
    """Return the number of tokens at which LoRA's counted cost reaches HUT's, which is constant."""
    hut = operations(HutConfig(r=r), TOKENS[0])
    per_token = operations(LoraConfig(r=r), TOKENS[-1]) / TOKENS[-1]
    return hut / per_token


@lru_cache(maxsize=16)
def shifted(shift: str, seed: int) -> tuple[Digits, Digits]:
    """Return training and test digits of a shift."""
    made = []
    for part in split_examples(load_digits(), 0.2, seed):
        images = part.x.astype(np.float32) / 16.0
        if shift == INVERTED:
            images = 1.0 - images
        elif shift == DARKER:
            images = 0.3 * images
        else:
            images = np.ascontiguousarray(np.rot90(images, axes=(1, 2)))
        made.append(Digits(torch.from_numpy(images.reshape(-1, 64)), torch.from_numpy(part.labels)))
    return made[0], made[1]


def config_of(method: str, seed: int) -> AdapterConfig | None:
    """Return the adapters of ``method``; None trains the hidden layers' weights."""
    if method == LORA:
        return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=HIDDEN, seed=seed)
    if method == FULL:
        return None
    return HutConfig(r=1 if method == SCALING else RANK, target_modules=HIDDEN, seed=seed)


def train(job: tuple[str, str, float, int, Sizes]) -> float:
    """Return the test accuracy of a method on a shift."""
    shift, method, rate, seed, sizes = job
    data, test = shifted(shift, seed)
    network, config = pretrained(sizes.width, seed), config_of(method, seed)
    if config is None:
        network.requires_grad_(False)
        trained = [cast(nn.Linear, network.get_submodule(name)).weight.requires_grad_() for name in HIDDEN]
    else:
        attach(network, config)
        trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    rng = np.random.default_rng([seed, 5])
    for _ in range(sizes.steps):
        rows = torch.from_numpy(rng.integers(len(data.y), size=BATCH))
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(network(data.x[rows]), data.y[rows]))
        optimizer.step()
    return accuracy(network, test)


def pruned(width: int, seed: int) -> nn.Sequential:
    """Return the pretrained network with the smallest 70 % of its hidden weights at zero."""
    network = pretrained(width, seed)
    with torch.no_grad():
        for name in HIDDEN:
            weight: Tensor = cast(nn.Linear, network.get_submodule(name)).weight
            weight[weight.abs() < weight.abs().flatten().quantile(PRUNED)] = 0
    return network


def sparsity(job: tuple[str, int, Sizes]) -> tuple[float, float, float]:
    """Return the share of the base's zeros left after a federation, and accuracy before and after."""
    method, seed, sizes = job
    data, test = shifted(ROTATED, seed)
    base = pruned(sizes.width, seed)
    task = StudentTask(lambda: pruned(sizes.width, seed), data.x, data.y, cross_entropy, CLIENTS)
    config = config_of(method, seed)
    assert config is not None
    done = federate(
        task, config, rounds=sizes.rounds, steps=10, lr=1e-2, optimizer="adam", batch_size=BATCH, seed=seed
    )
    done.adapted.merge()
    zeros = kept = 0
    for name, layer in done.adapted.layers.items():
        before = cast(nn.Linear, base.get_submodule(name)).weight == 0
        zeros += int(before.sum())
        kept += int((before & (layer.weight == 0)).sum())
    return kept / zeros, accuracy(base, test), accuracy(done.adapted.module, test)


Means = Mapping[tuple[str, str], tuple[float, float]]
"""By shift and method: the best learning rate and the mean accuracy at it."""


def run(
    progress: Progress | None = None, *, sizes: Sizes = STANDARD, workers: int | None = None
) -> StudyReport:
    """Count operations, adapt to three shifts, and federate on a pruned base."""
    started = time.perf_counter()
    jobs = [
        (shift, method, rate, seed, sizes)
        for shift in SHIFTS for method in METHODS for rate in RATES for seed in range(sizes.seeds)
    ]  # fmt: skip
    runs = dict(
        zip(jobs, run_jobs(train, jobs, what="shifts", progress=progress, workers=workers), strict=True)
    )
    means: dict[tuple[str, str], tuple[float, float]] = {}
    for shift in SHIFTS:
        for method in METHODS:
            tried = [
                (
                    float(np.mean([runs[shift, method, rate, seed, sizes] for seed in range(sizes.seeds)])),
                    rate,
                )
                for rate in RATES
            ]
            accuracy_, rate = max(tried)
            means[shift, method] = rate, accuracy_
    sparse = {m: sparsity((m, 0, sizes)) for m in (HUT, LORA)}
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(means, sparse)),
        tuple(_tables(means, sparse, sizes)),
        {"hut-operations": partial(_plot)},
    )


register(SLUG, "study", "2409.13501")(run)


def _claims(means: Means, sparse: Mapping[str, tuple[float, float, float]]) -> list[Claim]:
    formula = (RANK + 1) * SIDE * SIDE / (RANK * 2 * SIDE)
    at = crossing(RANK)
    constant = {operations(HutConfig(r=RANK), n) for n in TOKENS}
    claims = [
        Claim("HUT's operations do not grow with the number of tokens", len(constant), 1, len(constant) == 1),
        Claim(
            "LoRA's cost reaches HUT's within 10 % of (r+1) d_in d_out / (r (d_in+d_out)) tokens",
            at, formula, abs(at - formula) <= 0.1 * formula,
        ),
    ]  # fmt: skip
    for shift in SHIFTS:
        mine, other = means[shift, HUT][1], means[shift, LORA][1]
        if shift == ROTATED:
            text, holds = (
                "rotated digits: accuracy of HUT within 0.01 of LoRA of equal rank",
                mine >= other - 0.01,
            )
        else:
            text, holds = (
                f"{shift} digits: accuracy of HUT at least that of LoRA of equal rank",
                mine >= other,
            )
        claims.append(Claim(text, mine, other, holds))
    kept, other = sparse[HUT][0], sparse[LORA][0]
    claims.append(Claim("federation on a pruned base: HUT keeps every zero of the base", kept, 1, kept == 1))
    claims.append(Claim("LoRA of equal rank fills more than half of them", 1 - other, 0.5, other < 0.5))
    return claims


def _tables(means: Means, sparse: Mapping[str, tuple[float, float, float]], sizes: Sizes) -> list[Table]:
    cost = [
        (n, operations(HutConfig(r=RANK), n) / 1e6, operations(LoraConfig(r=RANK), n) / 1e6) for n in TOKENS
    ]
    rows = [
        (shift, *(f"{means[shift, m][1]:.3f} (lr {means[shift, m][0]:g})" for m in METHODS))
        for shift in SHIFTS
    ]
    title = (
        f"Test accuracy, network 64-{sizes.width}-{sizes.width}-10, {sizes.steps} steps, {sizes.seeds} seeds"
    )
    return [
        Table.of(
            f"Millions of operations of the adapter, d = {SIDE}, r = {RANK}", ("tokens", "HUT", "LoRA"), cost
        ),
        Table.of(f"{title}, r = {RANK}, best of the rates {RATES}", ("shift", *METHODS), rows),
        Table.of(
            f"Federation on a base with 70 % zeros: {CLIENTS} clients, {sizes.rounds} rounds, rotated digits",
            ("method", "zeros kept", "accuracy before", "accuracy after"),
            [(m, f"{100 * s[0]:.1f} %", f"{s[1]:.3f}", f"{s[2]:.3f}") for m, s in sparse.items()],
        ),
    ]


def _plot(stem: Path) -> list[Path]:
    """Draw operations over the number of tokens."""

    def line(name: str, config: AdapterConfig) -> Line:
        counted: Sequence[int] = [operations(config, n) for n in TOKENS]
        return Line(name, TOKENS, [count / 1e6 for count in counted])

    lines = [line("HUT", HutConfig(r=RANK)), line("LoRA", LoraConfig(r=RANK))]
    return panels(
        stem,
        "HUT builds one weight, LoRA works on every token",
        [(f"d = {SIDE}, r = {RANK}", "operations of the adapter, forward", lines)],
        x_label="tokens",
        y_label="millions of operations",
    )
