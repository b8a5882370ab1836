"""Serving the dashboard: on the main thread for `turnout dashboard`, on its own beside a run."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final

import uvicorn

from turnout.dashboard.app import create_app
from turnout.dashboard.pages import STATIC
from turnout.dashboard.reader import StoreReader
from turnout.dashboard.services import Catalogue
from turnout.wire import ConfigError

_STOP_SECONDS: Final = 5
_START_SECONDS: Final = 10.0
_BACKLOG: Final = 128

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DashboardOptions:
    """Where a dashboard listens and who may read.

    ``token`` is needed beyond loopback. ``certificate`` and ``key`` (PEM files) make it HTTPS. ``hosts`` are
    further names that browsers ask for it by.
    """

    host: str = "127.0.0.1"
    port: int = 8050
    token: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    hosts: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self) -> None:
        """Raise `ConfigError` for a dashboard that anyone could read."""
        if not self.is_local and self.token is None:
            raise ConfigError(
                f"--host {self.host} can be reached from other machines: give --token-file FILE, or "
                "--generate-token to have one made."
            )
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("--tls-cert and --tls-key go together: give both or none.")
        for name, path in (("--tls-cert", self.certificate), ("--tls-key", self.key)):
            if path is not None and not path.is_file():
                raise ConfigError(f"{name} {path}: there is no such file.")


class Dashboard:
    """A dashboard that listens; `run` serves until a signal, entering it serves on a thread of its own.

    ``listener`` is what `listen` returned, for who wants to know early that the address can be used;
    ``static`` is the folder of the built page.

    Raises `ConfigError` for options or an address that cannot be used, `StoreError` without a store.
    """

    def __init__(
        self,
        store: str | Path,
        options: DashboardOptions,
        *,
        catalogue: Catalogue,
        listener: socket.socket | None = None,
        static: Path = STATIC,
    ) -> None:
        self._options = options
        self._socket = listen(options) if listener is None else listener
        try:
            reader = StoreReader(store)
        except BaseException:
            self._socket.close()
            raise
        # Beyond loopback the token protects, and only the owner knows by which names it is reached.
        hosts = (options.host, *options.hosts) if options.is_local or options.hosts else None
        self.app = create_app(reader, catalogue=catalogue, token=options.token, hosts=hosts, static=static)
        tls = {} if options.certificate is None else {
            "ssl_certfile": str(options.certificate), "ssl_keyfile": str(options.key)
        }  # fmt: skip
        config = uvicorn.Config(
            self.app,
            log_config=None,
            log_level="error",  # That someone sent nonsense is no event; and a run may be drawing here.
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=_STOP_SECONDS,
            timeout_keep_alive=30,
            limit_concurrency=512,
            h11_max_incomplete_event_size=32_768,
            http="h11",
            ws="none",
            **tls,  # type: ignore[arg-type]
        )
        try:
            config.load()
        except (OSError, ValueError) as error:
            self._socket.close()
            reader.close()
            raise ConfigError(f"--tls-cert {options.certificate}: not usable ({error}).") from error
        self._server = _Server(config, self.app.state.services.live.close)
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        """The address for a browser."""
        scheme = "http" if self._options.certificate is None else "https"
        host = self._options.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}/"

    def run(self) -> None:
        """Serve on this thread until SIGINT or SIGTERM, then return."""
        self._server.run(sockets=[self._socket])

    def __enter__(self) -> Dashboard:
        self._thread = threading.Thread(target=self._serve, name="turnout-dashboard", daemon=True)
        self._thread.start()
        self._server.ready.wait(_START_SECONDS)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._server.stop()
        if self._thread is not None:
            self._thread.join(2 * _STOP_SECONDS)

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except BaseException as error:  # The run beside it goes on, whatever happens here.
            _log.error("the dashboard stopped: %s: %s", type(error).__name__, error)


class _Server(uvicorn.Server):
    """Ends the live streams before it stops: an open stream would hold a graceful stop up."""

    def __init__(self, config: uvicorn.Config, end_streams: Callable[[], None]) -> None:
        super().__init__(config)
        self._end_streams = end_streams
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    def stop(self) -> None:
        """Stop soon; from any thread."""
        self._end_streams()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in good order, at once when asked twice; uvicorn would end the process by the signal."""
        self.force_exit = self.should_exit
        self.stop()


def listen(options: DashboardOptions) -> socket.socket:
    """Return a socket that listens. Raises `ConfigError` for options or an address that cannot be used."""
    options.check()
    host, port = options.host, options.port
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, number)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}.") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"--port {port} on {host} cannot be used: {error.strerror or error}. Choose another --port."
        ) from error
    return found
