"""What a node can be told."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc

from turnout.client.node.watch import NodeWatch
from turnout.wire.errors import ConfigError
from turnout.wire.framing import MAX_FRAME_BYTES
from turnout.wire.pem import read_certificate, read_key


@dataclass(frozen=True, slots=True)
class ClientTls:
    """Paths of PEM files: the CA that signed the server's certificate and, for mutual TLS, our own pair.

    ``server_name`` replaces the address's host when the certificate names the server otherwise.
    """

    ca: str | Path
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return gRPC's credentials. Raises `ConfigError` for unreadable files and loose key permissions."""
        authority = read_certificate(self.ca)
        if self.certificate is None or self.key is None:
            return grpc.ssl_channel_credentials(authority)
        return grpc.ssl_channel_credentials(authority, read_key(self.key), read_certificate(self.certificate))


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """Settings of a node. Durations are in seconds.

    Parameters
    ----------
    name
        The enrolled name, stable over restarts (default: the host's).
    clients
        Partitions of the logical clients that this node hosts; None for one whose number the server chooses.
    state_dir
        Where clients' states survive a restart; None keeps them in memory.
    store_replies
        ``"stateful"`` writes a finished reply to disk if its client keeps state, ``"always"`` in any case,
        so that a killed node does not train again.
    examples
        Says how many examples a client has, given its id and the server's run config. Asked on a worker
        thread after each welcome, and told to the server, which can choose clients by it.
    workers
        Clients that work at the same time (default 1).
    max_rounds
        Leave after this many accepted training replies per client.
    max_request_bytes
        Longest array record that the server may send; more ends the stream.
    drain
        After a stop was asked for, time for tasks under way.
    connect_timeout
        Longest wait for the first contact with a server; None waits for ever. Later a node always comes back.
    watch
        Is told what the node does, such as `turnout.client.node.metrics.NodeMetrics`.
    """

    name: str = field(default_factory=lambda: socket.gethostname().split(".")[0] or "node")
    clients: Sequence[int] | None = None
    state_dir: str | Path | None = None
    store_replies: Literal["stateful", "always"] = "stateful"
    workers: int = 1
    max_rounds: int | None = None
    device: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    examples: Callable[[int, Mapping[str, Any]], int] | None = None
    tls: ClientTls | None = None
    insecure: bool = False
    max_request_bytes: int = 16 << 30
    drain: float = 10.0
    connect_timeout: float | None = None
    watch: NodeWatch = field(default_factory=NodeWatch)
    keepalive: float = 10.0
    keepalive_timeout: float = 10.0
    backoff: float = 0.1
    max_backoff: float = 10.0

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}.")
        if self.max_rounds is not None and self.max_rounds < 1:
            raise ConfigError(f"max_rounds must be at least 1, got {self.max_rounds}.")
        if self.clients is not None and (not self.clients or min(self.clients) < 0):
            raise ConfigError(f"clients={list(self.clients)!r}: name at least one partition, none below 0.")
        if self.connect_timeout is not None and not self.connect_timeout > 0:
            raise ConfigError(f"connect_timeout must be above 0 or None, got {self.connect_timeout}.")
        if not 0 < self.backoff <= self.max_backoff:
            raise ConfigError(f"backoff must be above 0 and at most {self.max_backoff}, got {self.backoff}.")

    def channel(self) -> list[tuple[str, Any]]:
        """Return gRPC's settings: bounded frames, keepalive that the server permits, quick reconnects."""
        settings: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
            ("grpc.max_send_message_length", MAX_FRAME_BYTES),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 4 << 20),
            ("grpc.keepalive_time_ms", int(self.keepalive * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", int(self.backoff * 1000)),
            ("grpc.max_reconnect_backoff_ms", int(self.max_backoff * 1000)),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if self.tls is not None and self.tls.server_name is not None:
            settings.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return settings


def parse_clients(text: str) -> list[int]:
    """Return the partitions that ``"0-49,60"`` names. Raises `ConfigError`."""
    clients: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise ConfigError(f"clients={text!r}: write numbers and ranges, such as 0-49,60.")
        clients.extend(range(int(first), int(last or first) + 1))
    if len(set(clients)) < len(clients):
        raise ConfigError(f"clients={text!r} names a client twice.")
    return clients
