"""The node's tasks: what was offered, what is being worked on, which replies wait for the server."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from flwr.clientapp import ClientApp
from google.protobuf.message import DecodeError

from turnout.client.node.journal import ClientJournal, Entry, OpenJournal, request_digest
from turnout.client.node.runner import AppFailed, Federation, run_app
from turnout.client.node.watch import NodeWatch
from turnout.v1 import fleet_pb2 as pb
from turnout.wire.arrays import NDArray
from turnout.wire.buffer_pool import BufferPool
from turnout.wire.framing import Chunk, FrameError
from turnout.wire.replies import EncodedReply, encode_failure, encode_reply
from turnout.wire.work import DecodedWork, decode_work, payload_ids

log = logging.getLogger("turnout.client.node")

CountExamples = Callable[[int, Mapping[str, Any]], int]
_QUICK_SECONDS: Final = 0.005
_BURST_SECONDS: Final = 0.05
_KEPT_BUFFERS: Final = 2
_OUTCOMES: Final = {
    pb.OUTCOME_ACCEPTED: "accepted",
    pb.OUTCOME_LATE: "late",
    pb.OUTCOME_DUPLICATE: "duplicate",
}


@dataclass(slots=True, eq=False)
class NodeTask:
    """One task of one logical client."""

    offer: pb.TaskOffer
    work: pb.Work
    missing: set[int]
    reply: EncodedReply | None = None
    cancelled: bool = False
    failed: bool = False
    began: float = 0.0
    seconds: float = 0.0
    upload: int = 0
    """Counts uploads; frames of an earlier one are not sent any more."""

    @property
    def trains(self) -> bool:
        """Whether the client's state goes on with this task."""
        return self.work.message_type.startswith("train")

    @property
    def request_bytes(self) -> int:
        """Bytes of the request's arrays."""
        return sum(record.arrays.size for record in self.work.records)


@dataclass(slots=True)
class _Incoming:
    """A payload; ``buffer`` may be longer than its ``size``."""

    buffer: NDArray
    size: int
    received: int = 0

    def release(self) -> NDArray:
        buffer, self.buffer = self.buffer, np.empty(0, np.uint8)
        return buffer


@dataclass(slots=True)
class _Hosted:
    """One logical client: it does one task at a time.

    ``seconds`` is what the app last took for a message type.
    """

    journal: ClientJournal
    seconds: dict[str, float] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    rounds: int = 0


class TaskBoard:
    """Takes offers and payloads from the session, runs the app, keeps replies until they are acknowledged.

    ``finished`` is called on the event loop with each task whose reply is ready.
    """

    def __init__(
        self,
        app: ClientApp,
        open_journal: OpenJournal,
        pool: Executor,
        finished: Callable[[NodeTask], None],
        *,
        max_request_bytes: int = 16 << 30,
        watch: NodeWatch | None = None,
    ) -> None:
        self._app = app
        self._watch = watch or NodeWatch()
        self._open_journal = open_journal
        self._pool = pool
        self._max_bytes = max_request_bytes
        self._finished = finished
        self._federation = Federation("")
        self._hosted: dict[int, _Hosted] = {}
        self._tasks: dict[int, NodeTask] = {}
        self._payloads: dict[int, _Incoming] = {}
        self._buffers = BufferPool(_KEPT_BUFFERS)
        self._burst: float | None = None
        self._running: set[asyncio.Task[None]] = set()
        # The last request's head, decoded: logical clients are mostly asked the same.
        self._decoded: tuple[bytes, DecodedWork, str] | None = None
        self.replies = 0

    def holding(self, client: int) -> list[int]:
        """Return the tasks of ``client`` that need not be offered again."""
        return [task.offer.id for task in self._tasks.values() if task.offer.client == client]

    def begin(self) -> None:
        """Forget what a lost stream left unfinished: payloads, and tasks that wait for them."""
        self._decoded = None
        self._payloads.clear()
        self._tasks = {i: t for i, t in self._tasks.items() if not t.missing}

    def welcome(self, federation: Federation, clients: list[int]) -> None:
        """Open the clients' journals for the server's run."""
        if federation.run != self._federation.run:
            self._hosted.clear()
        self._federation = federation
        for client in clients:
            if client not in self._hosted:
                self._hosted[client] = _Hosted(self._open_journal(federation.run, client))

    async def count_examples(self, clients: list[int], count: CountExamples) -> dict[int, int]:
        """Return how many examples each client has, as ``count`` says on a worker thread."""
        config = self._federation.run_config
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: {c: count(c, config) for c in clients})

    def ready(self) -> list[NodeTask]:
        """Return the tasks whose replies wait."""
        return [task for task in self._tasks.values() if task.reply is not None]

    def running(self) -> list[tuple[NodeTask, float]]:
        """Return the tasks that are being worked on, and since how many seconds."""
        now = time.monotonic()
        return [(t, now - t.began) for t in self._tasks.values() if t.began and t.reply is None]

    def busy(self) -> bool:
        """Return whether any task is not acknowledged yet."""
        return bool(self._tasks)

    def rounds(self) -> int:
        """Return the accepted training replies of the client that has fewest."""
        return min((hosted.rounds for hosted in self._hosted.values()), default=0)

    def find(self, task_id: int) -> NodeTask | None:
        """Return a task that has not been acknowledged."""
        return self._tasks.get(task_id)

    # What the server sends.

    def offer(self, offer: pb.TaskOffer) -> None:
        """Take a task; one that is known already only gets its new attempt."""
        known = self._tasks.get(offer.id)
        if known is not None:
            known.offer = offer
            if known.reply is not None:
                self._finished(known)
            return
        if offer.client not in self._hosted:
            return
        try:
            work = pb.Work.FromString(offer.work)
        except DecodeError as error:
            raise FrameError(f"task {offer.id} is unreadable: {error}") from error
        task = NodeTask(offer, work, set())
        for record in work.records:
            block = record.arrays
            if block.size > self._max_bytes:
                raise FrameError(
                    f"task {offer.id} brings {block.size} bytes, max_request_bytes is {self._max_bytes}."
                )
            if record.WhichOneof("kind") == "arrays" and block.payload:
                if block.payload not in self._payloads:
                    self._payloads[block.payload] = _Incoming(self._buffers.take(block.size), block.size)
                if self._payloads[block.payload].received < block.size:
                    task.missing.add(block.payload)
        self._tasks[offer.id] = task
        if not task.missing:
            self._start(task)

    def chunk(self, chunk: Chunk) -> None:
        """Store a piece of a payload and start the tasks that waited for its last."""
        incoming = self._payloads.get(chunk.id)
        if incoming is None:
            return
        end = incoming.received + len(chunk.data)
        if chunk.offset != incoming.received or end > incoming.size:
            raise FrameError(
                f"payload {chunk.id}: a chunk at {chunk.offset}, expected at {incoming.received}."
            )
        incoming.buffer[incoming.received : end] = np.frombuffer(chunk.data, np.uint8)
        incoming.received = end
        if end == incoming.size:
            for task in list(self._tasks.values()):
                if chunk.id in task.missing:
                    task.missing.discard(chunk.id)
                    if not task.missing:
                        self._start(task)

    def release(self, payloads: list[int]) -> None:
        """Drop payloads that no further task needs."""
        self._decoded = None
        for payload in payloads:
            incoming = self._payloads.pop(payload, None)
            if incoming is not None:
                self._buffers.give(incoming)

    def cancel(self, task_id: int) -> None:
        """Give a task up; an app that runs is left to finish and its reply is dropped."""
        task = self._tasks.pop(task_id, None)
        if task is not None:
            task.cancelled = True
            self._watch.settled("cancelled")

    def acknowledged(self, ack: pb.Ack) -> None:
        """Take note of a reply's outcome and let it go."""
        task = self._tasks.pop(ack.task, None)
        if task is None:
            return
        task.cancelled = True
        self._watch.settled("failed" if task.failed else _OUTCOMES.get(ack.outcome, "rejected"))
        if ack.outcome == pb.OUTCOME_ACCEPTED and task.trains:
            hosted = self._hosted[task.offer.client]
            hosted.rounds += 1
            hosted.journal.accepted(task.work.server_round)
            log.debug("client %s, round %s: the reply counts",
                      task.offer.client, task.work.server_round, extra=self._about(task))  # fmt: skip
        elif ack.outcome != pb.OUTCOME_ACCEPTED:
            log.warning("client %s, round %s: the reply is refused, %s: %s",
                        task.offer.client, task.work.server_round, ack.reason, ack.detail,
                        extra=self._about(task))  # fmt: skip

    # Work.

    def _about(self, task: NodeTask) -> dict[str, Any]:
        return {"run": self._federation.run, "round": task.work.server_round, "client": task.offer.client}

    def _start(self, task: NodeTask) -> None:
        blocks = {i: self._payloads[i].buffer[: self._payloads[i].size] for i in payload_ids(task.work)}
        hosted = self._hosted[task.offer.client]
        if self._is_quick(task, hosted):
            task.began = time.monotonic()
            reply = self._work(task, hosted, blocks, here=True)
            if reply is not None:
                self._done(task, reply)
                return
        running = asyncio.create_task(self._run(task, hosted, blocks))
        self._running.add(running)
        running.add_done_callback(self._running.discard)

    async def _run(self, task: NodeTask, hosted: _Hosted, blocks: dict[int, NDArray]) -> None:
        loop = asyncio.get_running_loop()
        async with hosted.lock:
            if task.cancelled:
                return
            task.began = time.monotonic()
            reply = await loop.run_in_executor(self._pool, self._work, task, hosted, blocks)
            assert reply is not None
            self._done(task, reply)

    def _is_quick(self, task: NodeTask, hosted: _Hosted) -> bool:
        """Whether to work on the event loop: a thread's hand-over would take longer than such a task."""
        if self._running or not hosted.seconds.get(task.work.message_type, math.inf) < _QUICK_SECONDS:
            return False
        now = time.monotonic()
        if self._burst is None:  # Many quick tasks together are a long one: the stream needs the loop too.
            self._burst = now
            asyncio.get_running_loop().call_soon(self._end_burst)
        return now - self._burst < _BURST_SECONDS

    def _end_burst(self) -> None:
        self._burst = None

    def _done(self, task: NodeTask, reply: EncodedReply) -> None:
        task.reply = reply
        task.seconds = time.monotonic() - task.began
        self.replies += 1
        self._watch.worked(
            task.seconds, trained=task.trains, examples=reply.num_examples or 0, failed=task.failed
        )
        if not task.cancelled:
            self._finished(task)

    def _decode(self, task: NodeTask, blocks: dict[int, NDArray]) -> tuple[DecodedWork, str]:
        known = self._decoded
        if known is None or known[0] != task.offer.work:
            work = decode_work(task.work, blocks.__getitem__)
            known = self._decoded = (task.offer.work, work, request_digest(task.work))
        return known[1:]

    def _work(
        self, task: NodeTask, hosted: _Hosted, blocks: dict[int, NDArray], *, here: bool = False
    ) -> EncodedReply | None:
        """Run the app, then the journal; then the reply may be offered. Mostly on a worker thread.

        None is for an app that failed on the event loop (``here``): it may need a thread without one.
        """
        try:
            return self._reply(task, hosted, blocks)
        except AppFailed as failure:
            if here:
                hosted.seconds[task.work.message_type] = math.inf
                return None
            task.failed = True
            log.warning("%s", failure, extra=self._about(task))
            return encode_failure(str(failure))
        except Exception as error:
            client, task.failed = task.offer.client, True
            log.exception("client %s: the task failed outside the ClientApp", client, extra=self._about(task))
            return encode_failure(f"client {client}: {type(error).__name__}: {error}")

    def _reply(self, task: NodeTask, hosted: _Hosted, blocks: dict[int, NDArray]) -> EncodedReply:
        began, offer, journal = time.perf_counter(), task.offer, hosted.journal
        work, digest = self._decode(task, blocks)
        if task.trains:
            kept = journal.reply(work.server_round, digest, offer.base_round)
            if kept is not None:
                return encode_reply(kept, work.layouts)
        state = journal.state(offer.base_round)
        content, after = run_app(
            self._app, work, client=offer.client, state=state, federation=self._federation
        )
        encoded = encode_reply(content, work.layouts)
        if task.trains:
            entry = Entry(digest, offer.base_round, after, content)
            journal.commit(work.server_round, entry, keep_round=offer.keep_round)
        # A long task keeps its client off the event loop for many rounds, a failure there for ever.
        took, before = time.perf_counter() - began, hosted.seconds.get(work.message_type, 0.0)
        hosted.seconds[work.message_type] = max(took, 0.9 * before)
        return encoded
