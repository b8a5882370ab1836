"""What the dashboard shows to Prometheus of itself."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from turnout.server.metrics import MetricsRegistry

_SECONDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Telemetry:
    """Counters of one dashboard in a registry of its own; routes are templates, never addresses."""

    def __init__(self) -> None:
        self.registry = MetricsRegistry()
        self.requests = Counter(
            "turnout_dashboard_requests", "Requests answered, by route and status.",
            ("route", "status"), registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "turnout_dashboard_request_seconds", "Time until an answer was complete; streams are left out.",
            ("route",), buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.subscribers = Gauge(
            "turnout_dashboard_subscribers", "Live streams that are open.", registry=self.registry
        )
        self.messages = Counter(
            "turnout_dashboard_messages", "Messages sent on live streams, by event.",
            ("event",), registry=self.registry,
        )  # fmt: skip
        self.logins = Counter(
            "turnout_dashboard_logins",
            "Attempts to log in, by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        for outcome in ("accepted", "refused", "limited"):
            self.logins.labels(outcome)
