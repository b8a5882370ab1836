"""The heart of the fleet server: who is connected, what each was asked, and what becomes of the answers.

Everything here runs on the event loop's thread, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from turnout.server.fleet.connection import Connection
from turnout.server.fleet.counters import FleetCounters
from turnout.server.fleet.flush_timer import FlushTimer
from turnout.server.fleet.gate import check_identity, inline_body
from turnout.server.fleet.options import FleetOptions
from turnout.server.fleet.roster import Roster
from turnout.server.fleet.tasks import OUTCOMES, Delivery, Exchange, Stage, Task, Verdict
from turnout.server.fleet.uploads import UploadSlots
from turnout.v1 import fleet_pb2 as pb
from turnout.wire import keys
from turnout.wire.arrays import NDArray
from turnout.wire.errors import LayoutError, ReplyRejected
from turnout.wire.framing import Chunk, FrameError, split_frames
from turnout.wire.packing import differing
from turnout.wire.replies import ReplyPlan, parse_reply
from turnout.wire.text import harmless

log = logging.getLogger("turnout.server.fleet")

_REMEMBERED: Final = 100_000
_MAX_DETAIL: Final = 500
_ACK_SECONDS: Final = 0.05
_LONGEST_ACK_SECONDS: Final = 10.0
_MAX_METRICS: Final = 64
_MAX_BATCH: Final = 5_000
_MAX_WAITING: Final = 10_000
Outcome = tuple[str, str, str]  # Outcome, reason, detail.


class Hub:
    """Offers tasks to connected clients, receives their replies and hands complete ones to the exchanges."""

    def __init__(self, options: FleetOptions, roster: Roster, counters: FleetCounters) -> None:
        self.options = options
        self.roster = roster
        self.counters = counters
        self.slots = UploadSlots(options, grant=self._grant, stalled=self._stalled)
        self.connections: dict[int, Connection] = {}
        self.base_rounds: Mapping[int, int] = {}
        self.keep_rounds: Mapping[int, int] = {}
        self.changed: Callable[[], None] = lambda: None
        self._tasks: dict[int, Task] = {}
        self._by_client: dict[int, dict[int, Task]] = {}
        self._times_gone: dict[int, int] = {}
        self._flushing = FlushTimer(self._flush)
        # By task: its client, its outcome, and whether the client may know it (what it got is durable).
        self._decided: OrderedDict[int, tuple[int, Outcome, bool]] = OrderedDict()

    # Connections.

    def attach(self, connection: Connection, holding: Sequence[Sequence[int]]) -> None:
        """Take ``connection`` for its clients, instead of older ones, and offer what is open for them.

        ``holding`` lists, per client, the tasks that the node still has.
        """
        self.counters.connects += 1
        for client, held in zip(connection.ids, holding, strict=True):
            older = self.connections.get(client)
            if older is not None and older is not connection:
                log.warning(
                    "client %s connects from %s; its older stream is closed.", client, connection.peer
                )
                self.counters.reasons["replaced"] += 1
                self._drop_uploads(older)
                older.close(refusal=pb.Refusal(reason="replaced", detail="the client connected again."))
            self.connections[client] = connection
            for task in list(self._by_client.get(client, {}).values()):
                if task.id not in held:
                    self._offer(task, connection)
        self.changed()

    def detach(self, connection: Connection) -> None:
        """Forget a stream that ended; its clients may come back and go on."""
        self.counters.disconnects += 1
        self._drop_uploads(connection)
        loop = asyncio.get_running_loop()
        for client in connection.ids:
            if self.connections.get(client) is connection:
                del self.connections[client]
                self._times_gone[client] = gone = self._times_gone.get(client, 0) + 1
                for task in self._by_client.get(client, {}).values():
                    loop.call_later(self.options.reconnect, self._lost, task.id, gone)
        self.changed()

    def leave(self, connection: Connection, reason: str) -> None:
        """Take back the unfinished tasks of clients that say goodbye."""
        for client in connection.ids:
            for task in list(self._by_client.get(client, {}).values()):
                if task.stage is not Stage.DELIVERED:
                    self._fail(task, "left", f"client {client} left: {harmless(reason[:_MAX_DETAIL])}")

    def revoke(self, name: str) -> None:
        """Refuse ``name`` from now on: its stream is closed, its pending replies are refused."""
        for client in self.roster.revoke(name):
            for task in list(self._by_client.get(client, {}).values()):
                if task.stage is not Stage.DELIVERED:
                    self._fail(task, "revoked", f"client {client} has been revoked.")
            connection = self.connections.get(client)
            if connection is not None:
                connection.close(refusal=pb.Refusal(reason="revoked", detail=f"{name!r} has been revoked."))

    def _drop_uploads(self, connection: Connection) -> None:
        """Give up what is being received on ``connection``: nothing of it was folded."""
        for client in connection.ids:
            for task in self._by_client.get(client, {}).values():
                if self.connections.get(client) is connection and task.stage in (
                    Stage.WAITING,
                    Stage.RECEIVING,
                ):
                    self.counters.lost_uploads += task.stage is Stage.RECEIVING
                    self.slots.free(task)
                    task.stage = Stage.OFFERED

    # Tasks.

    def open(self, exchange: Exchange) -> None:
        """Offer the exchange's tasks to every client that is connected, now or later."""
        loop = asyncio.get_running_loop()
        for task in exchange.tasks.values():
            self._tasks[task.id] = task
            self._by_client.setdefault(task.client, {})[task.id] = task
            connection = self.connections.get(task.client)
            if connection is None:
                gone = self._times_gone.get(task.client, 0)
                loop.call_later(self.options.reconnect, self._lost, task.id, gone)
            else:
                self._offer(task, connection)

    def close(self, exchange: Exchange, reason: str) -> None:
        """Cancel what is left of ``exchange``; replies that come later are refused as late."""
        exchange.closed = True
        for task in list(exchange.tasks.values()):
            if task.stage in (Stage.OFFERED, Stage.WAITING, Stage.RECEIVING):
                connection = self.connections.get(task.client)
                if connection is not None:
                    connection.send(cancel=pb.Cancel(task=task.id, reason=reason))
                self._decide(task, ("late", "late", reason), tell=False)
        payloads = exchange.payloads()
        for payload in payloads:
            payload.retire()
        for connection in set(self.connections.values()):
            connection.release(payloads)
        self._flushing.within(_ACK_SECONDS)

    def decide(self, verdicts: Sequence[Verdict]) -> None:
        """Note what the strategy made of delivered replies and free their slots."""
        for verdict in verdicts:
            self.counters.replies[verdict.outcome] += 1
            if verdict.outcome == "rejected":
                self._offend(verdict.task.client, verdict.reason)
            self._decide(verdict.task, (verdict.outcome, verdict.reason, verdict.detail), tell=verdict.tell)
        self._flushing.within(_LONGEST_ACK_SECONDS)

    def acknowledge(self, tasks: Sequence[Task]) -> None:
        """Tell the clients of decided ``tasks`` their outcomes, with the next offers: nobody waits."""
        for task in tasks:
            self._tell(task.id)
        self._flushing.within(_ACK_SECONDS)

    def _offer(self, task: Task, connection: Connection) -> None:
        if task.stage is Stage.DELIVERED:
            return
        task.attempt += 1
        self.counters.offers += 1
        offer = pb.TaskOffer(
            id=task.id,
            attempt=task.attempt,
            client=task.client,
            base_round=self.base_rounds.get(task.client, 0),
            keep_round=self.keep_rounds.get(task.client, 0),
        )
        self.counters.sent_bytes += connection.offer(offer, task.work)

    def _decide(self, task: Task, outcome: Outcome, *, tell: bool) -> None:
        self.slots.free(task)
        task.stage = Stage.CLOSED
        self._tasks.pop(task.id, None)
        self._by_client.get(task.client, {}).pop(task.id, None)
        self._decided[task.id] = (task.client, outcome, tell)
        # What a client may not know yet is kept: it is told when its round is durable.
        while len(self._decided) > _REMEMBERED and next(iter(self._decided.values()))[2]:
            self._decided.popitem(last=False)
        if tell:
            self._tell(task.id)

    def _tell(self, task_id: int) -> None:
        if task_id not in self._decided:
            return
        client, (outcome, reason, detail), _ = self._decided[task_id]
        self._decided[task_id] = (client, (outcome, reason, detail), True)
        connection = self.connections.get(client)
        if connection is not None:
            self._ack(connection, task_id, outcome, reason, detail)

    def _fail(self, task: Task, reason: str, detail: str, *, outcome: str = "failed") -> None:
        """Close a task that brings no reply, tell the client, and let the round go on."""
        self.counters.replies[outcome] += 1
        self.counters.reasons[reason] += 1
        self._decide(task, (outcome, reason, detail), tell=True)
        task.exchange.inbox.put(Delivery(task, error=f"{reason}: {detail}", reason=reason, outcome=outcome))

    def _lost(self, task_id: int, gone: int) -> None:
        """Give up on a client that has not come back since it was ``gone`` for the so-manieth time."""
        task = self._tasks.get(task_id)
        if task is None or self._times_gone.get(task.client, 0) != gone:
            return
        if task.stage is Stage.OFFERED and self.connections.get(task.client) is None:
            self._fail(task, "lost", f"client {task.client} is not connected any more.")

    # What clients send.

    def receive(self, connection: Connection, message: Chunk | pb.ClientMessage) -> None:
        """Handle one message. Raises `FrameError` for one that a correct client never sends."""
        if connection.closing:
            return
        if connection.outbox.waiting > _MAX_WAITING:
            raise FrameError(f"{_MAX_WAITING} messages wait; read what is sent before sending more.")
        if isinstance(message, Chunk):
            self._chunk(connection, message)
            return
        kind = message.WhichOneof("body")
        if kind == "ready":
            self._ready(connection, message.ready)
        elif kind == "batch":
            if len(message.batch.messages) > _MAX_BATCH:
                raise FrameError(f"a batch of {len(message.batch.messages)} messages, at most {_MAX_BATCH}.")
            for part in split_frames(message.batch, pb.ClientMessage):
                self.receive(connection, part)
        elif kind == "heartbeat":
            connection.send(heartbeat=message.heartbeat)
        elif kind == "progress":
            self._progress(connection, message.progress.client, message.progress.metrics)
        elif kind == "goodbye":
            self.leave(connection, message.goodbye.reason)
        elif kind == "hello":
            raise FrameError("a second hello on one stream.")

    def _ready(self, connection: Connection, ready: pb.Ready) -> None:
        task = self._tasks.get(ready.task)
        if task is None:
            self._too_late(connection, ready.task)
        elif not connection.speaks_for(task.client):
            self._offend(connection.ids[0], "foreign-task")
            self._refuse(connection, ready.task, "foreign-task", "the task is another client's.")
        elif ready.attempt != task.attempt:
            self.counters.replies["late"] += 1
            self._ack(connection, ready.task, "late", "old-attempt", f"attempt {task.attempt} is out.")
        elif task.stage is not Stage.OFFERED:
            # The outcome is told when it is known; until then a repeated reply changes nothing.
            self.counters.replies["duplicate"] += 1
        else:
            if ready.metrics:
                task.metrics = self._progress(connection, task.client, ready.metrics)
            self._accept(task, ready)

    def _accept(self, task: Task, ready: pb.Ready) -> None:
        try:
            plan = self._plan(task, ready)
            body = inline_body(ready, plan) if ready.data or not plan.size else None
        except (LayoutError, ReplyRejected) as error:
            self._reject(task, error)
            return
        task.plan, task.ready = plan, ready
        if body is not None:
            self.counters.received_bytes += len(ready.data)
            self._deliver(task, body)
        else:
            self.slots.enqueue(task)

    def _plan(self, task: Task, ready: pb.Ready) -> ReplyPlan:
        limit = task.exchange.max_reply_bytes
        plan = parse_reply(ready.head, task.find_layout, max_bytes=limit, size=ready.size)
        for name, (layout, _) in plan.blocks.items():
            expected, partial = task.work.layouts.get(name), task.work.partial and name == keys.ARRAYS
            difference = differing(expected, layout, partial=partial) if expected is not None else None
            if difference is not None:
                raise LayoutError(f"record {name!r}: {difference}.")
        check_identity(plan, task.client)
        return plan

    def _chunk(self, connection: Connection, chunk: Chunk) -> None:
        self.counters.received_bytes += len(chunk.data)
        task = self._tasks.get(chunk.id)
        if task is None or task.stage is not Stage.RECEIVING or not connection.speaks_for(task.client):
            if task is None and chunk.id in self._decided:
                return  # Sent before the client knew.
            waits = task is not None and task.stage in (Stage.OFFERED, Stage.WAITING)
            if task is not None and waits and connection.speaks_for(task.client):
                return  # Its slot was freed while chunks were on the way.
            raise FrameError(f"a chunk for task {chunk.id}, which has not been granted a slot.")
        try:
            complete = self.slots.receive(task, chunk)
        except ReplyRejected as error:
            self._reject(task, error)
            return
        if complete:
            self._deliver(task, None)

    def _deliver(self, task: Task, body: NDArray | None) -> None:
        assert task.plan is not None
        task.stage = Stage.DELIVERED
        reason = "client-error" if task.plan.error else ""
        task.exchange.inbox.put(Delivery(task, task.plan, body, task.plan.error, reason))

    def _grant(self, task: Task) -> None:
        self.connections[task.client].send(grant=pb.Grant(task=task.id))

    def _stalled(self, task: Task) -> None:
        self.counters.replies["retry"] += 1
        self.counters.reasons["stalled"] += 1
        self.slots.free(task)
        task.stage = Stage.OFFERED
        detail = f"the upload fell below {self.options.min_rate:g} bytes per second."
        self._ack(self.connections[task.client], task.id, "retry", "stalled", detail)

    def _progress(
        self, connection: Connection, client: int, metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Note what a client says of itself, cut to a bounded size."""
        if not connection.speaks_for(client):
            raise FrameError("progress of another client.")
        names = sorted(metrics)[:_MAX_METRICS]
        kept = {harmless(name[:64]): metrics[name] for name in names if math.isfinite(metrics[name])}
        member = self.roster.members[client]
        merged = {**member.metrics, **kept}
        member.metrics = merged if len(merged) <= _MAX_METRICS else dict(kept)
        if keys.NUM_EXAMPLES in kept:
            self.roster.settle(client, kept[keys.NUM_EXAMPLES])
            self.changed()
        return kept

    # Refusals.

    def _too_late(self, connection: Connection, task_id: int) -> None:
        unknown = (-1, ("late", "unknown-task", ""), True)
        client, (outcome, reason, detail), known = self._decided.get(task_id, unknown)
        if client >= 0 and not connection.speaks_for(client):
            self._offend(connection.ids[0], "foreign-task")
            outcome, reason, detail = "rejected", "foreign-task", "the task was another client's."
        self.counters.replies["duplicate" if outcome == "accepted" else "late"] += 1
        if known or outcome != "accepted":
            self._ack(connection, task_id, outcome, reason, detail)
            self._flushing.within(_ACK_SECONDS)

    def _reject(self, task: Task, error: LayoutError | ReplyRejected) -> None:
        reason = error.reason if isinstance(error, ReplyRejected) else "wrong-layout"
        self._offend(task.client, reason, counted=True)
        self._fail(task, reason, str(error), outcome="rejected")

    def _refuse(self, connection: Connection, task_id: int, reason: str, detail: str) -> None:
        self.counters.replies["rejected"] += 1
        self._ack(connection, task_id, "rejected", reason, detail)

    def _ack(
        self,
        connection: Connection,
        task_id: int,
        outcome: str,
        reason: str,
        detail: str,
    ) -> None:
        ack = pb.Ack(task=task_id, outcome=OUTCOMES[outcome], reason=reason, detail=detail[:_MAX_DETAIL])
        if outcome != "accepted":
            connection.send(ack=ack)
            return
        # Mostly the next offer follows soon: both then go as one frame, which is half the work.
        connection.send_later(ack=ack)

    def _flush(self) -> None:
        for connection in set(self.connections.values()):
            connection.outbox.flush()

    def _offend(self, client: int, reason: str, *, counted: bool = False) -> None:
        member = self.roster.members[client]
        member.offences += 1
        self.counters.reasons[reason] += not counted
        if member.offences == self.options.max_offences:
            log.warning("client %s (%s) is quarantined: %s.", client, member.name, reason)
            self.changed()

    def offend(self, connection: Connection, reason: str) -> None:
        """Count a broken protocol against every client of ``connection``."""
        for client in connection.ids:
            self._offend(client, reason)
