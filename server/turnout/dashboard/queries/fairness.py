"""How a number is spread over the clients: does the model serve only those who show up?"""

from __future__ import annotations

from typing import Final

import numpy as np

from turnout.dashboard.models.clients import Bin, Fairness, FairPoint
from turnout.dashboard.queries.fleet import Fleet, Fleets
from turnout.dashboard.queries.series import higher_is_better
from turnout.dashboard.reader import StoreReader
from turnout.server.errors import StoreError
from turnout.wire import NDArray

_QUANTILES: Final = {"min": 0.0, "p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
_BINS: Final = 30
_POINTS: Final = 2_000
_WORST: Final = 10
_GROWS: Final = ("participation", "weight-share", "num-examples", "samples-per-second")


class UnknownMetric(StoreError):  # noqa: N818 - what it is, not that it is an error
    """The run has no such number."""


def fairness(reader: StoreReader, fleets: Fleets, run: str, metric: str | None) -> Fairness:
    """Return the spread of ``metric`` (None: accuracy where clients report it, else their loss).

    Raises `UnknownRun`, `UnknownMetric`.
    """
    with reader.connect() as connection:
        fleet = fleets.of(connection, run)
    name = metric or next(
        (each for each in ("accuracy", "train-accuracy") if each in fleet.columns), "train-loss"
    )
    if name not in fleet.columns:
        raise UnknownMetric(f"metric {name[:64]!r}: no client of run {run} has it.")
    return _spread(fleet, name)


def gini(values: NDArray) -> float:
    """Return the Gini coefficient of values from 0 up; NaN for others, and when all are 0."""
    if not len(values) or float(values.min()) < 0 or float(values.sum()) <= 0:
        return float("nan")
    ordered, count = np.sort(values), len(values)
    ranks = np.arange(1, count + 1)
    return float(2 * (ranks * ordered).sum() / (count * ordered.sum()) - (count + 1) / count)


def _spread(fleet: Fleet, name: str) -> Fairness:
    every = fleet.column(name)
    known = np.flatnonzero(np.isfinite(every))
    values = every[known]
    rate = fleet.numbers.seen / max(fleet.numbers.rounds_done, 1)
    grows = higher_is_better(name) or name in _GROWS
    worst = known[np.argsort(values if grows else -values, kind="stable")]
    tenth = every[worst[: max(len(known) // 10, 1)]]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    counts, edges = np.histogram(
        values, bins=_BINS if high > low else 1, range=(low, high) if high > low else None
    )
    sample = known[:: -(-len(known) // _POINTS)] if len(known) else known

    def point(place: int) -> FairPoint:
        client = str(int(fleet.numbers.clients[place]))
        return FairPoint(client=client, participation=float(rate[place]), value=float(every[place]))

    return Fairness(
        metric=name,
        available=fleet.columns,
        higher_is_better=grows,
        clients=len(known),
        without=len(every) - len(known),
        mean=float(values.mean()) if len(values) else None,
        deviation=float(values.std()) if len(values) else None,
        quantiles={
            key: float(np.quantile(values, share)) if len(values) else None
            for key, share in _QUANTILES.items()
        },
        worst_tenth=float(tenth.mean()) if len(tenth) else None,
        gini=gini(values),
        correlation=_correlation(values, rate[known]),
        histogram=[
            Bin(low=float(edges[i]), high=float(edges[i + 1]), count=int(count))
            for i, count in enumerate(counts)
        ]
        if len(values)
        else [],
        worst=[point(int(place)) for place in worst[:_WORST]],
        points=[point(int(place)) for place in sample],
    )


def _correlation(one: NDArray, other: NDArray) -> float | None:
    if len(one) < 2 or float(one.std()) == 0 or float(other.std()) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])
