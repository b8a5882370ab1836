"""Metrics for Prometheus: of a run, of a fleet server, and the HTTP endpoint that serves them.

Import it only where metrics are asked for: nothing else needs ``prometheus_client``.
"""

from __future__ import annotations

from turnout.server.metrics.endpoint import MetricsServer
from turnout.server.metrics.fleet_metrics import FleetCollector
from turnout.server.metrics.registry import MetricsRegistry
from turnout.server.metrics.run_metrics import MetricsCallback

__all__ = ["FleetCollector", "MetricsCallback", "MetricsRegistry", "MetricsServer"]
