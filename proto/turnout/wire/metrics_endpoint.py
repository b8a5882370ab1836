"""The HTTP endpoint that Prometheus scrapes, ``/metrics``, and ``/healthz`` for whoever runs the process.

Import it only where metrics are asked for: nothing else needs ``prometheus_client``.
"""

from __future__ import annotations

import gzip
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted

from turnout.wire.address import is_loopback
from turnout.wire.errors import ConfigError

_MOST_AT_ONCE: Final = 8
_PATIENCE_SECONDS: Final = 10.0


class MetricsServer:
    """Serves ``registry`` at ``http://ADDRESS/metrics`` while it is entered; ``host:0`` takes any free port.

    The text format or OpenMetrics, as the scraper asks. There is no authentication; so beyond loopback it
    must be said with ``insecure``. Raises `ConfigError` for an address that cannot be used.
    """

    def __init__(self, address: str, registry: CollectorRegistry, *, insecure: bool = False) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ConfigError(f"metrics address {address!r}: give host:port, such as 127.0.0.1:9100.")
        if not insecure and not is_loopback(address):
            raise ConfigError(
                f"metrics address {address!r} is reachable from other machines, and anyone there could read "
                "the metrics; use 127.0.0.1 (and a proxy), or say that it may be insecure."
            )
        self._host = host.strip("[]")
        try:
            self._server = _Server(self._host, int(port), registry)
        except OSError as error:
            raise ConfigError(f"metrics address {address!r} cannot be used: {error}.") from error
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """The address for a scraper."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/metrics"

    def __enter__(self) -> MetricsServer:
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="turnout-metrics", daemon=True, args=(0.1,)
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.registry = registry
        self._places = threading.BoundedSemaphore(_MOST_AT_ONCE)
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection, or drop it when as many as may be are being served."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection and free its place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a scraper that hangs up is no event."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _PATIENCE_SECONDS
    server_version = "turnout"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, encode(self.server.registry), content_type)
        elif path == "/healthz":
            self._answer(200, b"ok\n")
        else:
            self._answer(404, b"not found; there are /metrics and /healthz\n")

    do_HEAD = do_GET  # noqa: N815 - named by the base class

    def _answer(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        zipped = len(body) > 1024 and gzip_accepted(self.headers.get("Accept-Encoding", ""))
        if zipped:
            body = gzip.compress(body, 1)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        if zipped:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not worth a line each."""
