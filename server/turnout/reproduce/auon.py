"""AuON's small study: what a number per tensor changes, and what it does not (arXiv 2509.24320).

A perceptron on handwritten digits and a least-squares problem of condition number 1e4, each method at its
best learning rate of one grid: AuON as in the paper and as in the authors' code, the hybrid with one and
with five Newton-Schulz steps, and their controls: momentum SGD normalised per tensor (what the paper's AuON
is but for O(1/N)), momentum SGD (what the code's is), Muon, AdamW. Biases have Adam throughout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from turnout.optim import AuON, HybridAuON
from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.optimizer_runs import best, mean, perceptron, train
from turnout.reproduce.report import Claim, Progress, StudyReport, Table, Value
from turnout.wire import register
from turnout.wire.torch_threads import one_torch_thread

SLUG: Final = "auon"
WIDTHS: Final = (64, 256, 256, 10)
MOMENTUM: Final = 0.95
CONDITION: Final = 1e4
SGDM, NSGDM, PAPER, CODE = "SGD-M", "NSGD-M", "AuON (paper)", "AuON (code)"
HYBRID_1, HYBRID_5, MUON, ADAMW = "Hybrid, 1 step", "Hybrid, 5 steps", "Muon", "AdamW"
_LENGTHS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_RATES: Final = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_SPECTRAL: Final = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
GRIDS: Final[dict[str, tuple[float, ...]]] = {
    SGDM: _RATES,
    NSGDM: _LENGTHS,
    PAPER: _LENGTHS,
    CODE: _RATES,
    HYBRID_1: _SPECTRAL,
    HYBRID_5: _SPECTRAL,
    MUON: _SPECTRAL,
    ADAMW: (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}


@dataclass(frozen=True)
class Sizes:
    """How large the study is; `FULL` is the one to report."""

    steps: int = 300
    compared: int = 200
    seeds: int = 3
    regression_steps: int = 300
    timed: int = 10
    timed_side: int = 1024


FULL: Final = Sizes()
Job = tuple[str, str, float, int, Sizes]
"""What is measured, method, learning rate, seed, sizes."""


class Momentum(torch.optim.Optimizer):
    """The controls: EMA momentum with Nesterov's mix, as it is or normalised per tensor."""

    def __init__(self, params: Iterable[Tensor], lr: float, *, normalised: bool) -> None:
        super().__init__(params, {"lr": lr})
        self._normalised = normalised

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - MOMENTUM)
                G = torch.lerp(p.grad, m, MOMENTUM)
                p.sub_(G / G.norm() if self._normalised else G, alpha=group["lr"])


def make_optimizers(method: str, module: nn.Module, lr: float) -> Sequence[torch.optim.Optimizer]:
    """Return the method on the matrices of ``module`` and Adam on its vectors."""
    if method == ADAMW:
        return [torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)]
    if method in (PAPER, CODE):
        return [AuON(module.parameters(), lr=lr, variant="paper" if method == PAPER else "code")]
    if method in (HYBRID_1, HYBRID_5):
        return [HybridAuON(module.parameters(), lr=lr, ns_steps=1 if method == HYBRID_1 else 5)]
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    rest = [p for p in module.parameters() if p.dim() < 2]
    main: torch.optim.Optimizer
    if method == MUON:
        main = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, momentum=MOMENTUM)
    else:
        main = Momentum(matrices, lr, normalised=method == NSGDM)
    adam = [torch.optim.Adam(rest, lr=0.008, betas=(0.8, 0.95), eps=1e-10)] if rest else []
    return [main, *adam]


def measure(job: Job) -> Any:
    """Return a run on the digits, the excess loss of the regression, or times and condition numbers."""
    kind, method, rate, seed, sizes = job
    with one_torch_thread():
        if kind == "digits":
            make = partial(make_optimizers, method)
            return train(make, rate, widths=WIDTHS, steps=sizes.steps, batch=64, seed=seed)
        if kind == "regression":
            return _regression(method, rate, seed, sizes.regression_steps)
        return _conditions(seed) if kind == "conditions" else _seconds(sizes.timed, sizes.timed_side)


def _regression(method: str, rate: float, seed: int, steps: int) -> float:
    """Return the loss over the first loss of a matrix regression, learning rate falling to 0."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(32, 32, bias=False, device="meta").to_empty(device="cpu")
    target = torch.randn(32, 32, generator=generator)
    scales = torch.logspace(0.0, -0.5 * torch.log10(torch.tensor(CONDITION)).item(), 32)
    x = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q * scales
    with torch.no_grad():
        module.weight.zero_()
    optimizers = make_optimizers(method, module, rate)
    first = loss = float("nan")
    for step in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (1.0 - step / steps)
            optimizer.zero_grad()
        value = 0.5 * (module(x) - x @ target.mT).square().sum()
        torch.autograd.backward(value)
        loss = float(value.detach())
        first = loss if step == 0 else first
        for optimizer in optimizers:
            optimizer.step()
    return loss / first


def _conditions(seed: int) -> dict[str, float]:
    """Return the ratio of the 1st to the 64th singular value of one step, after ten on the digits' model."""
    ratios = {}
    for method in (NSGDM, PAPER, HYBRID_1, HYBRID_5, MUON):
        module = perceptron(WIDTHS, seed)
        weight = list(module.parameters())[2]
        optimizers = make_optimizers(method, module, 0.01)
        generator = torch.Generator().manual_seed(seed)
        before: Tensor = weight.detach()
        for _ in range(10):
            x = torch.randn(64, 64, generator=generator)
            y = torch.randint(0, 10, (64,), generator=generator)
            for optimizer in optimizers:
                optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(module(x), y))
            before = weight.detach().clone()
            for optimizer in optimizers:
                optimizer.step()
        values = torch.linalg.svdvals((before - weight.detach()).double())
        ratios[method] = float(values[0] / values[63])
    return ratios


def _seconds(repeats: int, size: int) -> dict[str, float]:
    """Return the shortest time of a step on one square matrix, all methods in turn."""
    shortest = {}
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(size, size, generator=generator)
    methods = {}
    for method in GRIDS:
        module = nn.Linear(size, size, bias=False, device="meta").to_empty(device="cpu")
        module.weight.data.zero_()
        module.weight.grad = gradient.clone()
        methods[method] = make_optimizers(method, module, 0.01)
        shortest[method] = float("inf")
    for _ in range(repeats):
        for method, optimizers in methods.items():
            started = time.perf_counter()
            for optimizer in optimizers:
                optimizer.step()
            shortest[method] = min(shortest[method], time.perf_counter() - started)
    return shortest


def run(progress: Progress | None = None, *, sizes: Sizes = FULL, workers: int | None = None) -> StudyReport:
    """One number per tensor: AuON against normalised momentum, SGD, Muon and AdamW, all tuned."""
    started = time.perf_counter()
    jobs: list[Job] = [
        (kind, method, rate, 0, sizes)
        for method, grid in GRIDS.items()
        for rate in grid
        for kind in ("digits", "regression")
    ]
    jobs += [("conditions", "", 0.0, 0, sizes), ("seconds", "", 0.0, 0, sizes)]
    results = run_jobs(measure, jobs, what="learning rates", progress=progress, workers=workers)
    runs = {job[:4]: result for job, result in zip(jobs, results, strict=True)}
    tuned = Found(runs, sizes)
    jobs = [
        (kind, method, tuned.rate(kind, method), seed, sizes)
        for method in GRIDS
        for kind in ("digits", "regression")
        for seed in range(1, sizes.seeds)
    ]
    results = run_jobs(measure, jobs, what="other seeds", progress=progress, workers=workers) if jobs else []
    runs |= {job[:4]: result for job, result in zip(jobs, results, strict=True)}
    found = Found(runs, sizes)
    return StudyReport(
        SLUG,
        time.perf_counter() - started,
        tuple(_claims(found)),
        (_table(found),),
        {"auon-loss": partial(_plot, found)},
    )


register(SLUG, "study", "2509.24320")(run)


@dataclass(frozen=True)
class Found:
    """All runs, by (kind, method, rate, seed)."""

    runs: Mapping[tuple[str, str, float, int], Any]
    sizes: Sizes

    def rate(self, kind: str, method: str) -> float:
        """Return the best learning rate for the first seed, by the final training loss."""
        read = _loss if kind == "digits" else float
        rate: float = best({r: read(self.runs[kind, method, r, 0]) for r in GRIDS[method]})
        return rate

    def tuned(self, kind: str, method: str, what: Callable[[Any], float]) -> float:
        """Return a figure at the best learning rate, averaged over the seeds."""
        rate = self.rate(kind, method)
        return mean(what(self.runs[kind, method, rate, seed]) for seed in range(self.sizes.seeds))

    def apart(self, ours: str, control: str, rate: float) -> float:
        """Return the largest relative distance of two curves of minibatch losses, over the first steps."""
        pairs = zip(
            self.runs["digits", ours, rate, 0].curve[: self.sizes.compared],
            self.runs["digits", control, rate, 0].curve[: self.sizes.compared],
            strict=True,
        )
        return float(max(abs(a - b) / max(b, 1e-3) for a, b in pairs))


def _loss(run: Any) -> float:
    return float(run.loss)


def _accuracy(run: Any) -> float:
    return float(run.accuracy)


def _claims(found: Found) -> list[Claim]:
    claims = []
    for ours, control in ((PAPER, NSGDM), (CODE, SGDM)):
        rate = found.rate("digits", control)
        apart = found.apart(ours, control, rate)
        text = (
            f"{ours} and {control} at lr {rate:g}: minibatch losses within 1% over the first "
            f"{found.sizes.compared} steps (largest distance)"
        )
        claims.append(Claim(text, apart, 0.01, apart <= 0.01))
    pair = [found.tuned("digits", method, _accuracy) for method in (HYBRID_5, MUON)]
    text = "digits: test accuracy of the hybrid with 5 steps within 0.01 of Muon's, both tuned"
    claims.append(Claim(text, pair[0], pair[1], abs(pair[0] - pair[1]) <= 0.01))
    pair = [found.tuned("digits", method, _accuracy) for method in (PAPER, ADAMW)]
    text = "digits: test accuracy of AuON (paper) within 0.01 of AdamW's, both tuned"
    claims.append(Claim(text, pair[0], pair[1], pair[0] >= pair[1] - 0.01))
    ratios = found.runs["conditions", "", 0.0, 0]
    text = "plain AuON's step is as ill-conditioned as NSGD-M's (1st over 64th singular value, within 1%)"
    same = abs(ratios[PAPER] / ratios[NSGDM] - 1) <= 0.01
    claims.append(Claim(text, ratios[PAPER], ratios[NSGDM], same))
    for method in (HYBRID_1, HYBRID_5):
        text = f"{method}: the step is better conditioned than plain AuON's"
        claims.append(Claim(text, ratios[method], ratios[PAPER], ratios[method] < ratios[PAPER]))
    seconds = found.runs["seconds", "", 0.0, 0]
    side = found.sizes.timed_side
    text = f"a step on a {side} x {side} matrix: AuON takes less than half of Muon's time (seconds)"
    claims.append(Claim(text, seconds[PAPER], seconds[MUON], seconds[PAPER] < 0.5 * seconds[MUON]))
    return claims


def _table(found: Found) -> Table:
    ratios, seconds = found.runs["conditions", "", 0.0, 0], found.runs["seconds", "", 0.0, 0]
    rows: list[list[Value]] = [
        [
            method,
            f"{found.tuned('digits', method, _loss):.3g}",
            f"{found.tuned('digits', method, _accuracy):.3f}",
            f"{found.rate('digits', method):g}",
            f"{found.tuned('regression', method, float):.3g}",
            f"{found.rate('regression', method):g}",
            ratios.get(method, float("nan")),
            f"{1e3 * seconds[method]:.2f}",
        ]
        for method in GRIDS
    ]
    return Table.of(
        f"Digits, perceptron {'-'.join(map(str, WIDTHS))}, {found.sizes.steps} steps, and a regression of "
        f"condition number {CONDITION:g}, mean of {found.sizes.seeds} seeds, each at the best of six "
        "learning rates for the first; there are no reference figures",
        (
            "method",
            "training loss",
            "accuracy",
            "lr",
            "regression",
            "lr of it",
            "s1/s64 of a step",
            f"ms per step, {found.sizes.timed_side}^2",
        ),
        rows,
    )


def _plot(found: Found, stem: Path) -> list[Path]:
    """Draw the digits' loss over the learning rate."""
    from turnout.reproduce.figures import Line, panels

    parts = []
    for heading, text, shown in (
        ("one number per tensor", "AuON and what it equals", (NSGDM, PAPER, SGDM, CODE, ADAMW)),
        ("Newton-Schulz", "the hybrids and Muon", (HYBRID_1, HYBRID_5, MUON, ADAMW)),
    ):
        lines = [
            Line(m, list(GRIDS[m]), [_loss(found.runs["digits", m, r, 0]) for r in GRIDS[m]]) for m in shown
        ]
        parts.append((heading, text, lines))
    return panels(
        stem, "AuON is normalised momentum; the hybrid is not", parts, x_label="learning rate",
        y_label="final training loss",
    )  # fmt: skip
