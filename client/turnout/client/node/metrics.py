"""What a node shows to Prometheus, for sites that watch their own machines.

Import it only where metrics are asked for: nothing else needs ``prometheus_client``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client import Counter, Gauge, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from turnout.client.node import telemetry
from turnout.client.node.watch import NodeWatch
from turnout.wire.metrics_registry import MetricsRegistry

OUTCOMES: Final = ("accepted", "late", "duplicate", "rejected", "failed", "cancelled")
SECONDS: Final = (0.01, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
# Gauges by the names under which a node reports the same numbers to its server.
_GPU: Final = {
    "gpu-memory-bytes": ("turnout_node_gpu_memory_bytes", "GPU memory that this process has reserved."),
    "gpu-device-memory-bytes": (
        "turnout_node_gpu_device_memory_bytes",
        "Memory in use on the GPUs that this process may use, by anyone.",
    ),
    "gpu-device-memory-total-bytes": (
        "turnout_node_gpu_device_memory_total_bytes",
        "Memory of the GPUs that this process may use.",
    ),
    "gpu-utilization": (
        "turnout_node_gpu_utilization_ratio",
        "Mean utilization of the GPUs that this process may use.",
    ),
}


class NodeMetrics(NodeWatch):
    """Puts what a node does into ``registry``: `NodeOptions.watch`. No client, round or address is a label.

    A machine without a GPU has no GPU metrics.
    """

    def __init__(self, registry: MetricsRegistry) -> None:
        self._connected = Gauge("turnout_node_connected", "1 while the server has this node.",
                                registry=registry)  # fmt: skip
        self._clients = Gauge("turnout_node_clients", "Clients that this node works for.", registry=registry)
        self._sessions = Counter("turnout_node_sessions", "Streams that the server accepted.",
                                 registry=registry)  # fmt: skip
        self._tasks = Counter("turnout_node_tasks", "Tasks by what became of them.", ("outcome",),
                              registry=registry)  # fmt: skip
        for outcome in OUTCOMES:
            self._tasks.labels(outcome)
        self._seconds = Histogram("turnout_node_train_seconds", "Time that a training task took.",
                                  buckets=SECONDS, registry=registry)  # fmt: skip
        self._samples = Counter("turnout_node_samples", "Examples of the clients that trained, per task.",
                                registry=registry)  # fmt: skip
        self._sent = Counter("turnout_node_sent_bytes", "Bytes of messages to the server.", registry=registry)
        self._received = Counter("turnout_node_received_bytes", "Bytes of messages from the server.",
                                 registry=registry)  # fmt: skip
        registry.register(_Devices())

    def connected(self, clients: int) -> None:
        """Note that a stream has begun or ended."""
        self._connected.set(bool(clients))
        self._clients.set(clients)
        self._sessions.inc(bool(clients))

    def traffic(self, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes."""
        self._sent.inc(sent)
        self._received.inc(received)

    def worked(self, seconds: float, *, trained: bool, examples: int, failed: bool) -> None:
        """Count a training that did not fail."""
        if trained and not failed:
            self._seconds.observe(seconds)
            self._samples.inc(examples)

    def settled(self, outcome: str) -> None:
        """Count a task."""
        self._tasks.labels(outcome).inc()


class _Devices(Collector):
    """Asks the devices at each scrape, once a second at most; yields nothing where there are none."""

    def describe(self) -> Iterator[Metric]:
        """Yield all names, so that registering asks no device."""
        for name, text in _GPU.values():
            yield GaugeMetricFamily(name, text)

    def collect(self) -> Iterator[Metric]:
        """Yield what can be measured here."""
        measured = telemetry.of_node()
        for key, (name, text) in _GPU.items():
            if key in measured:
                yield GaugeMetricFamily(name, text, value=measured[key])
