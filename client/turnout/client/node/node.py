"""The node: one lasting process, one channel, many logical clients; it comes back until the run is over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from flwr.clientapp import ClientApp

from turnout.client.node.board import NodeTask, TaskBoard
from turnout.client.node.journal import journals
from turnout.client.node.options import ClientTls, NodeOptions
from turnout.client.node.session import Session
from turnout.wire.errors import ConfigError, TurnoutError
from turnout.wire.event_loop import new_event_loop
from turnout.wire.framing import FrameError

log = logging.getLogger("turnout.client.node")

_HEARTBEAT_SECONDS: Final = 15.0
_LEAVE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class NodeSummary:
    """What a node did: training rounds accepted per client (the fewest), replies made, streams opened.

    ``unfinished`` are tasks that still run in this process and were handed back.
    """

    rounds: int
    replies: int
    sessions: int
    reason: str
    unfinished: int = 0


class NodeUnreachable(TurnoutError):  # noqa: N818 - an outcome
    """No server answered within ``connect_timeout`` seconds of the node's start."""


class Node:
    """Serves one server until the run is over, `stop` is called, or ``max_rounds`` are done."""

    def __init__(self, address: str, app: ClientApp, options: NodeOptions) -> None:
        self._address = address
        self._options = options
        self._pool = ThreadPoolExecutor(options.workers, thread_name_prefix="turnout-client")
        always = options.store_replies == "always"
        self._board = TaskBoard(
            app,
            journals(options.state_dir, always=always),
            self._pool,
            self._finished,
            max_request_bytes=options.max_request_bytes,
            watch=options.watch,
        )
        self._session: Session | None = None
        self._stopping = asyncio.Event()
        self._reason = "the run is over"
        self._ids: list[int] = []
        self._patient_until: float | None = None
        self._trouble = "nothing answers"

    def stop(self, reason: str = "asked to stop") -> None:
        """Finish what is under way, within ``options.drain`` seconds, hand back the rest, and leave."""
        if not self._stopping.is_set():
            self._reason = reason
            if self._session is not None:
                self._session.draining = True
            self._stopping.set()

    async def run(self) -> NodeSummary:
        """Serve. Raises `NodeRefused` when the server does not want this node, and `NodeUnreachable`."""
        sessions = attempts = 0
        if self._options.connect_timeout is not None:
            self._patient_until = asyncio.get_running_loop().time() + self._options.connect_timeout
        async with self._channel() as channel:
            while not self._stopping.is_set():
                self._session = session = Session(channel, self._board, self._options, self._settled)
                await self._serve(session)
                sessions += session.welcomed
                if session.over:
                    break
                attempts = 0 if session.welcomed else attempts + 1
                self._lose_patience(session)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), self._pause(attempts))
        self._pool.shutdown(wait=False, cancel_futures=True)
        board, unfinished = self._board, sum(1 for _ in self._board.running())
        return NodeSummary(board.rounds(), board.replies, sessions, self._reason, unfinished)

    async def _serve(self, session: Session) -> None:
        """Run one session beside its heartbeat and the wish to stop."""
        serving = asyncio.create_task(session.run(self._ids))
        leaving = asyncio.create_task(self._leave(session, serving))
        beating = asyncio.create_task(_beat(session))
        try:
            await asyncio.wait({serving}, timeout=self._patience())
            self._lose_patience(session)
            await serving
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, FrameError) as error:
            self._trouble = _shown(error)
            log.info("the stream was lost: %s", self._trouble)
        except asyncio.CancelledError:
            if not serving.cancelled():
                raise
        finally:
            self._options.watch.connected(0)
            for task in (serving, leaving, beating):
                task.cancel()

    def _patience(self) -> float | None:
        """Return the seconds left for the first contact; None when there was one, or for ever."""
        if self._patient_until is None:
            return None
        return max(0.0, self._patient_until - asyncio.get_running_loop().time())

    def _lose_patience(self, session: Session) -> None:
        if session.welcomed:
            self._patient_until = None
        elif self._patience() == 0.0 and not self._stopping.is_set():
            raise NodeUnreachable(
                f"no server at {self._address} took this node within {self._options.connect_timeout:g} "
                f"seconds ({self._trouble}); check the address, that turnout server runs there, and that "
                "both or neither use certificates."
            )

    async def _leave(self, session: Session, serving: asyncio.Task[None]) -> None:
        await self._stopping.wait()
        deadline = asyncio.get_running_loop().time() + self._options.drain
        while self._board.busy() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        if session.welcomed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(session.leave(self._reason), _LEAVE_SECONDS)
            await asyncio.wait({serving}, timeout=_LEAVE_SECONDS)
        serving.cancel()

    def _finished(self, task: NodeTask) -> None:
        if self._session is not None and self._session.welcomed:
            self._session.offer_reply(task)

    def _settled(self) -> None:
        limit = self._options.max_rounds
        if limit is not None and self._board.rounds() >= limit:
            self.stop(f"{limit} rounds are done")

    def _pause(self, attempts: int) -> float:
        """Return a jittered pause, so that a thousand nodes do not come back in the same moment."""
        longest = min(self._options.max_backoff, self._options.backoff * 2 ** min(attempts, 20))
        pause, patience = random.uniform(0, longest), self._patience()
        return pause if patience is None else min(pause, patience)

    def _channel(self) -> grpc.aio.Channel:
        settings = self._options.channel()
        if self._options.tls is not None:
            return grpc.aio.secure_channel(self._address, self._options.tls.credentials(), settings)
        return grpc.aio.insecure_channel(self._address, settings)


def _stop_on(number: signal.Signals, node: Node) -> None:
    """Stop at the first signal; the next one has its usual effect."""
    asyncio.get_running_loop().remove_signal_handler(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
    node.stop(number.name)


async def _beat(session: Session) -> None:
    sequence = 0
    while True:
        await asyncio.sleep(_HEARTBEAT_SECONDS)
        sequence += 1
        session.heartbeat(sequence)


def _shown(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {error.details()}"
    return str(error)


def run_node(
    address: str,
    app: ClientApp,
    clients: Sequence[int] | None = None,
    *,
    name: str | None = None,
    state_dir: str | Path | None = None,
    tls: ClientTls | None = None,
    **settings: Any,
) -> NodeSummary:
    """Serve ``address`` (``host:port``) with ``app`` until the run is over; ``settings`` as `NodeOptions`.

    SIGTERM and SIGINT stop the node in good order, a second one at once. Raises `ConfigError` for impossible
    settings, `NodeRefused` when the server does not want this node, and `NodeUnreachable` after
    ``connect_timeout``.
    """
    if name is not None:
        settings["name"] = name
    options = NodeOptions(clients=clients, state_dir=state_dir, tls=tls, **settings)
    host = address.rpartition(":")[0].strip("[]")
    local = host in ("localhost", "::1") or host.startswith("127.") or address.startswith("unix:")
    if options.tls is None and not options.insecure and not local:
        raise ConfigError(
            f"address={address!r} is another machine; give certificates (tls), or say insecure=True to send "
            "updates in plain text."
        )

    async def main() -> NodeSummary:
        node = Node(address, app, options)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError):  # Not in the main thread.
                loop.add_signal_handler(number, _stop_on, number, node)
        return await node.run()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main())
