"""Metrics for Prometheus: of a run, of a fleet server, and the HTTP endpoint that serves them.

Import it only where metrics are asked for: nothing else needs ``prometheus_client``.
"""

from __future__ import annotations

from turnout.server.metrics.fleet_metrics import FleetCollector
from turnout.server.metrics.run_metrics import MetricsCallback
from turnout.wire.metrics_endpoint import MetricsServer
from turnout.wire.metrics_registry import MetricsRegistry

__all__ = ["FleetCollector", "MetricsCallback", "MetricsRegistry", "MetricsServer"]
