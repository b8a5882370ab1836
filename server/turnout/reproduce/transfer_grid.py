"""Methods compared at their own best learning rate: each is run at every one of a list, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from turnout.reproduce.jobs import run_jobs
from turnout.reproduce.report import Progress, Table
from turnout.reproduce.transfer import Adaptation, Job, Method, adapt

RATES: Final = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Tuned:
    """One method at its best learning rate, by mean target accuracy over seeds."""

    name: str
    rate: float
    numbers: int
    target: float
    source: float
    loss: float


@dataclass(frozen=True)
class TransferGrid:
    """How every method went: ``runs[method][learning rate]`` has one `Adaptation` per seed."""

    runs: dict[str, dict[float, list[Adaptation]]]

    @classmethod
    def run(
        cls,
        methods: Sequence[Method],
        rates: Sequence[float],
        *,
        seeds: int,
        width: int,
        steps: int,
        train_examples: int | None = None,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> TransferGrid:
        """Adapt networks of ``width``; ``train_examples`` None: all the rotated digits."""
        jobs = [
            Job(method, rate, seed, width, steps, train_examples)
            for method in methods
            for rate in rates
            for seed in range(seeds)
        ]
        done = run_jobs(adapt, jobs, what="adapting to rotated digits", progress=progress, workers=workers)
        runs: dict[str, dict[float, list[Adaptation]]] = {}
        for job, outcome in zip(jobs, done, strict=True):
            runs.setdefault(job.method.name, {}).setdefault(job.rate, []).append(outcome)
        return cls(runs)

    def tuned(self) -> dict[str, Tuned]:
        """Return every method at its best learning rate, by name, in order."""
        return {name: _best(name, by_rate) for name, by_rate in self.runs.items()}

    def table(self) -> Table:
        """Return a row for every method at its best learning rate."""
        return Table.of(
            "each method at its best learning rate",
            ("method", "trained numbers", "best lr", "target accuracy", "source accuracy", "final loss"),
            [(t.name, t.numbers, t.rate, t.target, t.source, t.loss) for t in self.tuned().values()],
        )


def _best(name: str, by_rate: dict[float, list[Adaptation]]) -> Tuned:
    rate = max(by_rate, key=lambda r: float(np.mean([o.target for o in by_rate[r]])))
    runs = by_rate[rate]
    return Tuned(
        name,
        rate,
        runs[0].numbers,
        float(np.mean([o.target for o in runs])),
        float(np.mean([o.source for o in runs])),
        float(np.mean([o.losses[-1] for o in runs])),
    )
