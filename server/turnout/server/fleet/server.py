"""The fleet server: an event loop in a thread of its own, listening for nodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from turnout.server.fleet.counters import FleetCounters
from turnout.server.fleet.hub import Hub
from turnout.server.fleet.options import FleetOptions
from turnout.server.fleet.revocation import RevocationList
from turnout.server.fleet.roster import Roster
from turnout.server.fleet.servicer import SERVICE, FleetServicer
from turnout.server.fleet.tls import ServerTls
from turnout.v1 import fleet_pb2 as pb
from turnout.wire.address import is_loopback as is_loopback
from turnout.wire.errors import ConfigError
from turnout.wire.event_loop import new_event_loop

log = logging.getLogger("turnout.server.fleet")
T = TypeVar("T")
_START_SECONDS: Final = 30.0
_REVOCATION_SECONDS: Final = 0.5
_CLOCK_SECONDS: Final = 0.25
_PAUSE_SECONDS: Final = 0.75
_TICK_SECONDS: Final = 0.01
_LAST_SECONDS: Final = 0.2


class FleetServer:
    """Listens on ``address`` (``host:port``, port 0 for any free one) from `start` to `stop`.

    Parameters
    ----------
    run
        Name of the run; clients keep their state under it.
    directory
        Where the roster of enrolled names is kept; None keeps it in memory.
    names
        The only names admitted, with their client ids; None admits any.
    num_clients, run_config
        Told to every client, as a simulation tells them to its own.
    tls
        Certificates; with a CA for clients the enrolled name must be the certificate's.
    insecure
        Allow plain text beyond loopback.

    Raises
    ------
    ConfigError
        For an address that cannot be listened on, and for plain text beyond loopback without ``insecure``.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:0",
        *,
        run: str = "run",
        directory: str | Path | None = None,
        names: Mapping[str, int] | None = None,
        num_clients: int = 0,
        run_config: Mapping[str, Any] | None = None,
        tls: ServerTls | None = None,
        insecure: bool = False,
        options: FleetOptions | None = None,
    ) -> None:
        if tls is None and not insecure and not is_loopback(address):
            raise ConfigError(
                f"address={address!r} is reachable from other machines; give certificates (tls), or say "
                "insecure=True to send models and accept clients in plain text."
            )
        self.options = options or FleetOptions()
        self.counters = FleetCounters()
        path = None if directory is None else Path(directory) / "roster.json"
        self.roster = Roster(path, names=names)
        self.hub = Hub(self.options, self.roster, self.counters)
        self.incarnation = secrets.randbits(31) or 1
        self._requested = address
        self._tls = tls
        self._servicer = FleetServicer(
            self.hub,
            run=run,
            num_clients=num_clients,
            run_config=run_config or {},
            secure=tls is not None and tls.client_ca is not None,
            revocations=RevocationList(None if tls is None else tls.revocations()),
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping: asyncio.Event | None = None
        self._reconnect, self._grace = False, 5.0
        self.port = 0
        self.paused = 0.0
        """Seconds in which this process was stopped, or its machine asleep: nobody was late in them."""

    @property
    def address(self) -> str:
        """Where the server listens, with the real port."""
        return f"{self._requested.rpartition(':')[0]}:{self.port}"

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop; RuntimeError before `start` and after `stop`."""
        if self._loop is None:
            raise RuntimeError("the fleet server is not running; call start() first.")
        return self._loop

    def start(self) -> FleetServer:
        """Listen and return. Raises `ConfigError` when the address cannot be used."""
        started: list[BaseException | None] = []
        ready = threading.Event()

        def report(error: BaseException | None) -> None:
            started.append(error)
            ready.set()

        self._thread = threading.Thread(target=self._main, args=(report,), name="turnout-fleet", daemon=True)
        self._thread.start()
        if not ready.wait(_START_SECONDS):
            raise RuntimeError(f"the fleet server did not start within {_START_SECONDS:g} seconds.")
        if started[0] is not None:
            self._thread.join()
            self._loop = None
            raise ConfigError(f"address={self._requested!r} cannot be used: {started[0]}") from started[0]
        return self

    def stop(self, *, reconnect: bool = False, grace: float = 5.0) -> None:
        """End all streams and the thread. ``reconnect`` tells nodes to come back to a restarted server."""
        if self._loop is None or self._thread is None or self._stopping is None:
            return
        self._reconnect, self._grace = reconnect, grace
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(grace + 10)
        self._loop = None

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run ``function(*args)`` on the event loop soon, from any thread."""
        self.loop.call_soon_threadsafe(function, *args)

    def wait_for(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run ``coroutine`` on the event loop and return its result, from another thread."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        if timeout is not None:
            return future.result(timeout)
        while True:  # As long as there is someone to wait for.
            with contextlib.suppress(TimeoutError):
                return future.result(1.0)
            if self._thread is None or not self._thread.is_alive():
                raise RuntimeError("the fleet server has ended.")

    def __enter__(self) -> FleetServer:
        return self.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop(reconnect=kind is not None)  # After an error the run may go on.

    def _main(self, report: Callable[[BaseException | None], None]) -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(self._serve(report))

    async def _serve(self, report: Callable[[BaseException | None], None]) -> None:
        server = grpc.aio.server(options=self.options.channel())
        server.add_generic_rpc_handlers((self._servicer.handler(),))
        state = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(state, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            if self._tls is None:
                self.port = server.add_insecure_port(self._requested)
            else:
                self.port = server.add_secure_port(self._requested, self._tls.credentials())
            await server.start()
        except Exception as error:
            await server.stop(None)
            report(error)
            return
        for name in ("", SERVICE):
            await state.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        log.info("listening on %s", self.address)
        if self._tls is None and not is_loopback(self._requested):
            log.warning("%s is open to other machines in plain text: models can be read and changed on their "
                        "way, and nobody's name is checked.", self.address)  # fmt: skip
        report(None)
        watching = [asyncio.create_task(self._watch_revocations()), asyncio.create_task(self._watch_clock())]
        await self._stopping.wait()
        for task in watching:
            task.cancel()
        self._servicer.draining = True
        await state.enter_graceful_shutdown()
        farewell = pb.Farewell(reason="the server stops.", reconnect=self._reconnect)
        for connection in set(self.hub.connections.values()):
            connection.close(farewell=farewell)
        deadline = asyncio.get_running_loop().time() + self._grace
        while self.hub.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_TICK_SECONDS)
        await server.stop(_LAST_SECONDS)  # Whoever watches our health would keep us for ever.

    async def _watch_revocations(self) -> None:
        while True:
            await asyncio.sleep(_REVOCATION_SECONDS)
            self._servicer.apply_revocations()

    async def _watch_clock(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(_CLOCK_SECONDS)
            late = loop.time() - before - _CLOCK_SECONDS
            if late > _PAUSE_SECONDS:
                self.paused += late
                log.warning("this process did not run for %.1f seconds; deadlines wait as long.", late)
