"""What a fleet server shows to Prometheus. It is read when scraped, and costs nothing in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from turnout.server.fleet import FleetServer

OUTCOMES: Final = ("accepted", "failed", "late", "duplicate", "rejected", "retry")
#: Reasons become label values, so they are a fixed set; what is not in it counts as "other".
REASONS: Final = frozenset(
    (
        "already-connected", "bad-chunk", "bad-frame", "bad-hello", "bad-metric", "bad-name", "bad-request",
        "bad-size", "client-error", "damaged", "draining", "duplicate", "duplicate-client", "expired-token",
        "foreign-task", "late", "left", "lost", "no-metrics", "non-finite", "norm", "old-attempt",
        "partition-taken", "replaced", "revoked", "stalled", "too-large", "too-many-attempts",
        "too-many-clients", "too-many-metrics", "unknown-client", "unknown-partition", "unknown-task",
        "unknown-token", "used-token", "weak-key", "wrong-identity", "wrong-layout", "wrong-name",
        "wrong-partition", "wrong-version",
    )
)  # fmt: skip


class FleetCollector(Collector):
    """Reads ``server`` at each scrape: ``registry.register(FleetCollector(server))``."""

    def __init__(self, server: FleetServer) -> None:
        self._server = server

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics' names."""
        yield from self.collect()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        server, counters, slots = self._server, self._server.counters, self._server.hub.slots
        members = list(server.roster.members.values())
        limit = server.options.max_offences
        for name, text, value in (
            ("clients_connected", "Clients that have a stream now.", len(server.hub.connections)),
            ("clients_registered", "Clients ever enrolled.", len(members)),
            (
                "clients_quarantined",
                "Clients that get no more work.",
                sum(m.offences >= limit for m in members),
            ),
        ):
            yield GaugeMetricFamily(f"turnout_{name}", text, value=value)
        uploads = GaugeMetricFamily(
            "turnout_upload_slots",
            "Slots for receiving replies, by what they do, and replies that wait for one.",
            labels=("state",),
        )
        uploads.add_metric(("busy",), slots.busy)
        uploads.add_metric(("waiting",), slots.waiting)
        uploads.add_metric(("free",), max(0, server.options.upload_slots - slots.busy))
        yield uploads
        for name, text, count in (
            ("received_bytes", "Bytes of arrays received from clients.", counters.received_bytes),
            ("sent_bytes", "Bytes of arrays sent to clients.", counters.sent_bytes),
            ("fleet_connects", "Streams opened.", counters.connects),
            ("fleet_disconnects", "Streams ended.", counters.disconnects),
            ("fleet_offers", "Tasks offered to clients, repeats included.", counters.offers),
            ("fleet_lost_uploads", "Uploads that a lost stream cut off.", counters.lost_uploads),
        ):
            yield CounterMetricFamily(f"turnout_{name}", text, value=count)
        yield _counts("fleet_replies", "Replies by what they were answered.", "outcome",
                      dict.fromkeys(OUTCOMES, 0) | dict(counters.replies))  # fmt: skip
        reasons: Counter[str] = Counter()
        for reason, count in dict(counters.reasons).items():
            reasons[reason if reason in REASONS else "other"] += count
        yield _counts("refused", "Replies, tasks and connections refused or lost.", "reason", reasons)


def _counts(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"turnout_{name}", text, labels=(label,))
    for value, count in sorted(counts.items()):
        family.add_metric((value,), count)
    return family
