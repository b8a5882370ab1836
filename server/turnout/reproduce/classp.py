"""CLASSP's small study: a task after another, without stored data (arXiv 2405.09637).

A perceptron learns handwritten digits (task A, 20 epochs) and then the same digits with their pixels in
another order (task B, 5 epochs). Test accuracy on both at the end; a method's setting is the one of its grid
with the largest sum. Beside SGD, AdaGrad and AdamW stand elastic weight consolidation, which keeps the old
weights and a Fisher diagonal, and SGD with a learning rate of its own for B. The last row forgets the
accumulator between the tasks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from turnout.optim import CLASSP
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.optimizer_runs import TRAIN, DigitImages, mean, perceptron, take_step
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.wire import register
from turnout.wire.torch_threads import one_torch_thread

SLUG: Final = "classp"
WIDTHS: Final = (64, 64, 10)
BATCH: Final = 32
SGD, SGD_SLOW, ADAGRAD, ADAMW, EWC = "SGD", "SGD, own lr for B", "AdaGrad", "AdamW", "EWC"
P2, P1, RESET = "CLASSP p=2", "CLASSP p=1", "CLASSP p=1, reset"
GRIDS: Final[dict[str, list[dict[str, float]]]] = {
    SGD: [{"lr": lr} for lr in (0.01, 0.03, 0.1, 0.3)],
    SGD_SLOW: [{"lr": lr, "lr_b": lr_b} for lr in (0.1, 0.3) for lr_b in (0.01, 0.03, 0.1)],
    ADAGRAD: [{"lr": lr} for lr in (0.03, 0.1, 0.3)],
    ADAMW: [{"lr": lr} for lr in (3e-4, 1e-3, 3e-3)],
    EWC: [{"lr": 0.1, "strength": s} for s in (10.0, 30.0, 100.0, 300.0)],
    P2: [{"lr": lr, "threshold": t} for lr in (0.03, 0.1) for t in (1e-5, 1e-4)],
    P1: [{"lr": lr, "threshold": t} for lr in (0.1, 0.3) for t in (1e-6, 1e-5, 1e-4)],
    RESET: [{"lr": 0.3, "threshold": 1e-5}],
}
REFERENCE: Final = {
    SGD: (0.768, 0.929),
    ADAGRAD: (0.818, 0.923),
    P2: (0.836, 0.923),
    P1: (0.919, 0.879),
    RESET: (0.373, 0.890),
}
_BYTES: Final = {SGD: 0, SGD_SLOW: 0, ADAGRAD: 4, ADAMW: 8, EWC: 8, P2: 4, P1: 4, RESET: 4}


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    epochs_a: int = 20
    epochs_b: int = 5
    seeds: int = 2


FULL: Final = Sizes()


@dataclass(frozen=True)
class Figures:
    """Test accuracy on A after A, on A and B at the end, and the share of weights that a step moved."""

    a_before: float
    a: float
    b: float
    density: float


def make_optimizer(method: str, module: nn.Module, setting: Mapping[str, float]) -> torch.optim.Optimizer:
    """Return the optimizer of ``method``."""
    lr = setting["lr"]
    if method == ADAGRAD:
        return torch.optim.Adagrad(module.parameters(), lr=lr)
    if method == ADAMW:
        return torch.optim.AdamW(module.parameters(), lr=lr)
    if method in (P1, P2, RESET):
        power = 2.0 if method == P2 else 1.0
        return CLASSP(
            module.parameters(), lr=lr, threshold=setting["threshold"], power=power, count_active=True
        )
    return torch.optim.SGD(module.parameters(), lr=lr)


def measure(job: tuple[str, int, int, Sizes]) -> Figures:
    """Return how one setting of a method ends, for one seed."""
    method, number, seed, sizes = job
    setting = GRIDS[method][number]
    with one_torch_thread():
        a = DigitImages.shuffled(seed)
        b, module = a.permuted(seed), perceptron(WIDTHS, seed)
        optimizer = make_optimizer(method, module, setting)
        densities: list[float] = []

        def learn(digits: DigitImages, epochs: int, seed: int, penalty: Callable[[], Tensor] | None) -> None:
            for x, y in digits.batches(epochs * (TRAIN // BATCH), BATCH, seed):
                take_step([optimizer], partial(_loss, module, x, y, penalty))
                if isinstance(optimizer, CLASSP):
                    densities.append(optimizer.mask_density())

        learn(a, sizes.epochs_a, 2 * seed, None)
        before = a.accuracy(module)
        if method == RESET:
            optimizer = make_optimizer(method, module, setting)
        for group in optimizer.param_groups:
            group["lr"] = setting.get("lr_b", group["lr"])
        penalty = _elastic(module, a, setting["strength"]) if method == EWC else None
        learn(b, sizes.epochs_b, 2 * seed + 1, penalty)
        return Figures(
            before, a.accuracy(module), b.accuracy(module), mean(densities) if densities else float("nan")
        )


def _loss(module: nn.Module, x: Tensor, y: Tensor, penalty: Callable[[], Tensor] | None) -> Tensor:
    loss = nn.functional.cross_entropy(module(x), y)
    return loss if penalty is None else loss + penalty()


def _elastic(module: nn.Module, digits: DigitImages, strength: float) -> Callable[[], Tensor]:
    """Return EWC's penalty: distance to the present weights, by the Fisher diagonal of the present model."""
    params = list(module.parameters())
    kept = [p.detach().clone() for p in params]
    fisher = [torch.zeros_like(p) for p in params]
    count = 300
    for i in range(count):
        logits = module(digits.x[i : i + 1])
        likely = nn.functional.cross_entropy(logits, digits.y[i : i + 1])
        for total, g in zip(fisher, torch.autograd.grad(likely, params), strict=True):
            total.add_(g * g, alpha=1.0 / count)

    def penalty() -> Tensor:
        parts = [(f * (p - k).square()).sum() for f, p, k in zip(fisher, params, kept, strict=True)]
        return 0.5 * strength * torch.stack(parts).sum()

    return penalty


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """Two tasks in sequence: CLASSP against AdaGrad, SGD, AdamW and EWC, all tuned."""
    started = time.perf_counter()
    jobs = [
        (method, number, seed, sizes)
        for method, grid in GRIDS.items()
        for number in range(len(grid))
        for seed in range(sizes.seeds)
    ]
    results = run_jobs(measure, jobs, what="two tasks", progress=progress, workers=workers)
    found = {job[:3]: result for job, result in zip(jobs, results, strict=True)}
    chosen = {method: _best(method, found, sizes) for method in GRIDS}
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims({method: figures for method, (_, figures) in chosen.items()})),
        (_table(chosen, sizes),),
        {"classp-tasks": partial(_plot, found, sizes)},
    )


register(SLUG, "study", "2405.09637")(run)

Found = Mapping[tuple[Any, ...], Figures]


def _mean(found: Found, method: str, number: int, sizes: Sizes) -> Figures:
    runs = [found[method, number, seed] for seed in range(sizes.seeds)]
    return Figures(*(mean(getattr(r, name) for r in runs) for name in ("a_before", "a", "b", "density")))


def _best(method: str, found: Found, sizes: Sizes) -> tuple[dict[str, float], Figures]:
    """Return the setting with the largest sum of accuracies, and its figures."""
    numbers = range(len(GRIDS[method]))
    figures = {n: _mean(found, method, n, sizes) for n in numbers}
    number = max(numbers, key=lambda n: figures[n].a + figures[n].b)
    return GRIDS[method][number], figures[number]


def _claims(reached: Mapping[str, Figures]) -> list[Claim]:
    total = {method: f.a + f.b for method, f in reached.items()}
    ours = total[P1]
    claims = [
        Claim("sum of accuracies: CLASSP p=1 above AdaGrad, both tuned", ours, total[ADAGRAD],
              ours > total[ADAGRAD]),
        Claim("sum of accuracies: AdaGrad above SGD, both tuned", total[ADAGRAD], total[SGD],
              total[ADAGRAD] > total[SGD]),
        Claim("sum of accuracies: CLASSP p=1 above AdamW, both tuned", ours, total[ADAMW],
              ours > total[ADAMW]),
        Claim("sum of accuracies: CLASSP p=1 (4 bytes a weight) above EWC (8 bytes), both tuned", ours,
              total[EWC], ours > total[EWC]),
        Claim("sum of accuracies: CLASSP p=1 above SGD with a learning rate of its own for B", ours,
              total[SGD_SLOW], ours > total[SGD_SLOW]),
        Claim("CLASSP p=1 moves less than half of the weights in a step", reached[P1].density, 1.0,
              reached[P1].density < 0.5),
    ]  # fmt: skip
    lost, before = reached[RESET].a, reached[RESET].a_before
    text = "a reset of the accumulator between the tasks costs A at least 0.3 of its accuracy"
    return [*claims, Claim(text, lost, before, lost <= before - 0.3)]


def _table(chosen: Mapping[str, tuple[dict[str, float], Figures]], sizes: Sizes) -> Table:
    rows: list[list[Value]] = []
    for method, (setting, figures) in chosen.items():
        a, b = REFERENCE.get(method, (float("nan"), float("nan")))
        words = ", ".join(f"{name} {value:g}" for name, value in setting.items())
        known = "" if a != a else f" ({a:.3f})", "" if b != b else f" ({b:.3f})"
        rows.append(
            [
                method,
                f"{figures.a_before:.3f}",
                f"{figures.a:.3f}{known[0]}",
                f"{figures.b:.3f}{known[1]}",
                f"{figures.a + figures.b:.3f}",
                figures.density,
                str(_BYTES[method]),
                words,
            ]
        )
    return Table.of(
        f"Digits ({sizes.epochs_a} epochs), then digits with permuted pixels ({sizes.epochs_b} epochs), "
        f"{sizes.seeds} seeds, best setting of each grid; in brackets the reference (an independent "
        "implementation)",
        ("method", "A after A", "A", "B", "A + B", "moved", "bytes a weight", "setting"),
        rows,
    )


def _plot(found: Found, sizes: Sizes, stem: Path) -> list[Path]:
    """Draw every setting's accuracy on B over that on A."""
    from turnout.reproduce.figures import Line, panels

    lines = []
    for method in (SGD, SGD_SLOW, ADAGRAD, EWC, P2, P1):
        figures = [_mean(found, method, n, sizes) for n in range(len(GRIDS[method]))]
        figures.sort(key=lambda f: f.a)
        lines.append(Line(method, [f.a for f in figures], [f.b for f in figures]))
    return panels(
        stem,
        "A second task: what is kept of the first",
        [("all settings of each grid", "right: A kept; top: B learnt", lines)],
        x_label="accuracy on A, at the end",
        y_label="accuracy on B",
        log=False,
    )
