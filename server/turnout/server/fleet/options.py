"""What a fleet server can be told, and the transport's settings that follow from measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from turnout.wire.errors import ConfigError
from turnout.wire.framing import MAX_FRAME_BYTES


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """Limits of a fleet server. Durations are in seconds, sizes in bytes.

    Parameters
    ----------
    upload_slots
        Replies that are received at the same time; each has one staging buffer of the reply's size.
    deadline
        A round closes this long after its requests went out, if ``quorum`` replies are in (None: only
        the strategy's own timeout closes it).
    quorum
        Good replies that a round waits for beyond its deadline, until the strategy's timeout.
    enough
        A round closes at once when this many good replies are in (below 1.0 or exactly 1.0: that share of the
        clients asked); the others are cancelled. None waits for all.
    reconnect
        A client whose connection is lost has this long to come back before its task counts as failed.
    min_rate
        Bytes per second that an upload must sustain; with ``stall`` seconds of grace its slot is freed.
    max_reply_bytes
        Largest reply; None allows four times the request's arrays and 1 MiB.
    same_identity
        What happens when a client that is connected connects again, which a stolen key would look like:
        ``"newest"`` closes the older stream; ``"refuse"`` keeps it and lets the newer one try again until the
        older has ended. Either way it is logged and counted.
    max_offences
        A client with this many refused replies or broken frames gets no more work.
    probe_bandwidth
        True lets gRPC widen receive windows by itself, for few, far, fast clients; memory is then bounded
        by the upload slots only.
    hello
        A stream that has not said who it is after so long is ended.
    stall
        Grace of ``min_rate``; an upload that does not begin within it loses its slot.
    max_clients_per_connection
        Logical clients that one node may host.
    keepalive, keepalive_timeout
        A silent peer is asked for a sign of life every so often, and given up after so long.
    """

    upload_slots: int = 4
    deadline: float | None = None
    quorum: int = 1
    enough: float | None = None
    reconnect: float = 30.0
    hello: float = 10.0
    stall: float = 10.0
    min_rate: float = 64e3
    max_reply_bytes: int | None = None
    same_identity: Literal["newest", "refuse"] = "newest"
    max_offences: int = 3
    max_clients_per_connection: int = 4096
    keepalive: float = 20.0
    keepalive_timeout: float = 10.0
    probe_bandwidth: bool = False

    def __post_init__(self) -> None:
        positive = ("reconnect", "hello", "stall", "min_rate", "keepalive", "keepalive_timeout")
        for name in ("upload_slots", "quorum", "max_offences", "max_clients_per_connection"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("deadline", "enough", "max_reply_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0 or None, got {value}.")

        if self.same_identity not in ("newest", "refuse"):
            raise ConfigError(f"same_identity must be 'newest' or 'refuse', got {self.same_identity!r}.")

    def needed(self, asked: int) -> int:
        """Return how many good replies close a round of ``asked`` clients."""
        if self.enough is None:
            return asked
        count = round(self.enough * asked) if self.enough <= 1 else int(self.enough)
        return max(1, min(asked, count))

    def channel(self) -> list[tuple[str, Any]]:
        """Return gRPC's settings: bounded windows and frames, keepalive in step with the clients'."""
        return [
            ("grpc.http2.bdp_probe", int(self.probe_bandwidth)),
            ("grpc.http2.lookahead_bytes", 4 << 20),
            ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
            ("grpc.max_send_message_length", MAX_FRAME_BYTES),
            ("grpc.max_concurrent_streams", 8),
            ("grpc.keepalive_time_ms", int(self.keepalive * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.so_reuseport", 0),
        ]
