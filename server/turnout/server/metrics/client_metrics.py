"""Clients as distributions: histograms over all replies, whose exemplars name a client and a round.

A client's id is no label: ten thousand clients would be sixteen megabytes per scrape. In a small fleet one
may ask for gauges by client all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import Gauge, Histogram

from turnout.strategies import ClientReport, RoundReport
from turnout.wire.metrics_registry import MetricsRegistry

_LARGEST: Final = 1e15  # Numbers come from clients, and a sum must not be spoiled by one of them.


@dataclass(frozen=True)
class _Distribution:
    """One histogram: how its value is read from an accepted reply; None where the client did not say."""

    name: str
    help: str
    buckets: Sequence[float]
    read: Callable[[ClientReport, float], float | None]


def _said(*names: str) -> Callable[[ClientReport, float], float | None]:
    def read(client: ClientReport, _mean_weight: float) -> float | None:
        return next((client.metrics[name] for name in names if name in client.metrics), None)

    return read


def _powers(base: float, first: float, count: int) -> list[float]:
    return [first * base**i for i in range(count)]


_DISTRIBUTIONS: Final = (
    _Distribution(
        "turnout_client_reply_seconds",
        "Time that clients took for a task, as they measured it.",
        (0.01, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600),
        lambda client, _: client.metrics.get("task-seconds", client.train_seconds),
    ),
    _Distribution(
        "turnout_client_staleness_rounds",
        "Rounds between a client's reply and the one before.",
        (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500),
        lambda client, _: float(client.staleness),
    ),
    _Distribution(
        "turnout_client_weight_ratio",
        "Weight of a reply over the mean weight in its round.",
        (0, 0.1, 0.25, 0.5, 0.75, 0.95, 1.05, 1.5, 2, 3, 5, 10, 20),
        lambda client, mean: client.weight / mean if mean else None,
    ),
    _Distribution(
        "turnout_client_samples_per_second",
        "Examples that clients trained on per second.",
        _powers(4, 1, 12),
        _said("samples-per-second"),
    ),
    _Distribution(
        "turnout_client_reply_bytes",
        "Size of the replies' arrays.",
        _powers(8, 1024, 8),
        _said("reply-bytes"),
    ),
    _Distribution(
        "turnout_client_memory_bytes",
        "Resident memory of the clients' processes.",
        _powers(2, 64 << 20, 12),
        _said("memory-bytes"),
    ),
    _Distribution(
        "turnout_client_gpu_memory_bytes",
        "GPU memory that the clients' processes have reserved.",
        _powers(2, 256 << 20, 10),
        _said("gpu-memory-bytes"),
    ),
    _Distribution(
        "turnout_client_gpu_utilization_ratio",
        "Utilization of the clients' GPUs.",
        [i / 10 for i in range(11)],
        _said("gpu-utilization"),
    ),
)

# Per client, on request: gauge and help.
_GAUGES: Final = {
    "turnout_per_client_train_loss": "Loss in a client's last training.",
    "turnout_per_client_update_norm": "Euclidean norm of a client's last update.",
    "turnout_per_client_reply_seconds": "Time that a client took for its last task.",
    "turnout_per_client_weight": "Share of a client's last reply in its round's step.",
    "turnout_per_client_last_round": "Round of a client's last accepted reply.",
}


class ClientMetrics:
    """Histograms over the accepted replies, and gauges by client if ``per_client``."""

    def __init__(self, registry: MetricsRegistry, *, per_client: bool) -> None:
        self._histograms = [
            (each, Histogram(each.name, each.help, buckets=each.buckets, registry=registry))
            for each in _DISTRIBUTIONS
        ]
        self._stalest = Gauge(
            "turnout_client_staleness_rounds_max",
            "Rounds since the client that has been away longest last took part.",
            registry=registry,
        )
        self._gauges = {
            name: Gauge(name, text, ("client",), registry=registry)
            for name, text in (_GAUGES.items() if per_client else ())
        }

    def add(self, report: RoundReport) -> None:
        """Add the replies of one round."""
        accepted = [client for client in report.clients if client.outcome == "ok"]
        weights = [client.weight for client in accepted if math.isfinite(client.weight)]
        mean = math.fsum(weights) / len(weights) if weights else 0.0
        for each, histogram in self._histograms:
            _observe(each, histogram, accepted, mean, report.server_round)
        self._stalest.set(report.strategy.clients.longest_absence(report.server_round))
        for client in accepted if self._gauges else ():
            values = (
                client.train_loss,
                client.update_norm,
                client.metrics.get("task-seconds", client.train_seconds),
                client.weight,
                float(report.server_round),
            )
            for gauge, value in zip(self._gauges.values(), values, strict=True):
                gauge.labels(str(client.client)).set(value)


def _observe(
    each: _Distribution, histogram: Histogram, accepted: list[ClientReport], mean: float, server_round: int
) -> None:
    """Add the replies' values; the largest of the round is the exemplar, as making one is slow."""
    largest: tuple[float, ClientReport] | None = None
    for client in accepted:
        value = each.read(client, mean)
        if value is None or not 0 <= value < _LARGEST:
            continue
        if largest is None or value > largest[0]:
            if largest is not None:
                histogram.observe(largest[0])
            largest = value, client
        else:
            histogram.observe(value)
    if largest is not None:
        exemplar = {"client": str(largest[1].client), "round": str(server_round)}
        histogram.observe(largest[0], exemplar)
