"""A Flower ``Grid`` over a fleet of remote clients: work is pushed, replies come as they are complete."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import queue
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Message

from turnout.server.fleet.attendance import Attendance, Participation
from turnout.server.fleet.server import FleetServer
from turnout.server.fleet.tasks import Delivery, Exchange, Task, Verdict
from turnout.wire import keys
from turnout.wire.errors import CheckpointError, ConfigError
from turnout.wire.flower import records_of, stamp
from turnout.wire.grid import LocalRunGrid
from turnout.wire.work import WorkEncoder

if TYPE_CHECKING:
    from turnout.strategies.rounds import ClientReport
    from turnout.strategies.streaming import StreamingStrategy

log = logging.getLogger("turnout.server.fleet")
_SETTLE_SECONDS = 0.05
_PATIENCE_SECONDS = 10.0


class FleetGrid(LocalRunGrid):
    """Drives any Flower strategy over the clients of a running `FleetServer`.

    Node id and client id are the same stable number, given by enrolled name. Under our own strategies
    register `turnout.server.fleet.CommitCallback` behind the recorder: clients are then told their outcome
    when the round is durable, and told the strategy's verdict; without it, as soon as a reply was taken.

    Parameters
    ----------
    min_clients
        A round begins when this many clients are connected.
    wait
        Seconds to wait for them before giving up with `ConfigError`; None waits for ever.
    participation
        Who takes part in which round, so that a fleet sees what a simulation sees: a round waits for all
        clients that it names, and after ``wait`` seconds goes on with those that came, if ``min_clients``
        of them did or nobody is named. None: whoever is connected.
    eligible
        Chooses by a client's attributes (``device``, ``examples``, ``tags``) who is available at all.
    buffer_replies
        Return lists instead of generators, for strategies that go through the replies twice.
    """

    def __init__(
        self,
        server: FleetServer,
        *,
        min_clients: int = 1,
        wait: float | None = None,
        participation: Participation | None = None,
        eligible: Callable[[Mapping[str, Any]], bool] | None = None,
        buffer_replies: bool = False,
    ) -> None:
        super().__init__()
        self.server = server
        self._hub = server.hub
        self._attendance = Attendance(
            server, min_clients=min_clients, wait=wait, participation=participation, eligible=eligible
        )
        self._buffer_replies = buffer_replies
        self._accepted: dict[int, int] = {}
        self._hub.base_rounds, self._hub.keep_rounds = self._accepted, {}
        self._unacknowledged: list[Task] = []
        self._verdicts: list[Verdict] = []
        self._strategy: StreamingStrategy | None = None
        self._pushed: dict[str, tuple[Exchange, Task]] = {}
        self._task_ids = itertools.count(server.incarnation << 32 | 1)
        self._payload_ids = itertools.count(1)
        self._round = 1
        self._advances_itself = True
        self._registered: tuple[int, ...] = ()

    # Rounds and clients.

    @property
    def server_round(self) -> int:
        """The current round, counted from 1."""
        return self._round

    def start_round(self, server_round: int) -> None:
        """Make ``server_round`` the current round, once enough clients are connected."""
        if server_round < 1:
            raise ConfigError(f"server_round is {server_round}, but rounds are counted from 1.")
        self._advances_itself = False
        self._round = server_round
        self._attendance.wait(server_round)

    def registered_ids(self) -> tuple[int, ...]:
        """Return the ids of all clients that were ever enrolled, in ascending order.

        The same tuple until another is enrolled: who has gone through it need not do so again.
        """
        members = self.server.roster.members
        if len(self._registered) != len(members):
            self._registered = tuple(sorted(members))
        return self._registered

    def get_node_ids(self) -> list[int]:
        """Return the ids of the clients that can work now, in ascending order; waits for ``min_clients``."""
        return self._attendance.wait(self._round)

    def available_ids(self) -> list[int]:
        """Return the ids of the clients that can work now, without waiting."""
        return self._attendance.available()

    # Messages.

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send the requests now; return a generator of replies as they are complete and checked.

        The replies of the last requests still missing at the deadline (see `FleetOptions`) or after
        ``timeout`` seconds are refused when they come. Strategies that never call `start_round` get a list
        in the order of the requests, because the sums of Flower's strategies depend on it.

        Raises `ConfigError` for an unknown client and for a timeout that is not above 0.
        """
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"timeout must be above 0 seconds, or None for no limit, got {timeout!r}.")
        requests = list(messages)
        trains = any(message.metadata.message_type.startswith("train") for message in requests)
        exchange = self._open(requests)
        replies = self._replies(exchange, timeout, trains)
        if self._advances_itself:
            order = {message.metadata.message_id: at for at, message in enumerate(requests)}
            ordered = sorted(replies, key=lambda reply: order[reply.metadata.reply_to_message_id])
            self._round += trains
            return ordered
        return list(replies) if self._buffer_replies else replies

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send requests and return their ids; `pull_messages` fetches what has come."""
        requests = list(messages)
        exchange = self._open(requests)
        for task in exchange.tasks.values():
            self._pushed[task.message.metadata.message_id] = (exchange, task)
        return [message.metadata.message_id for message in requests]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come to these requests; each can be pulled once."""
        wanted = {i: self._pushed[i] for i in message_ids if i in self._pushed}
        replies = []
        for exchange in {id(exchange): exchange for exchange, _ in wanted.values()}.values():
            kept = []
            while (delivery := _take(exchange, 0)) is not None:
                if delivery.task.message.metadata.message_id in wanted:
                    replies.append(delivery.message())
                    self._decide(delivery, "accepted" if not delivery.error else "failed", delivery.error)
                    del self._pushed[delivery.task.message.metadata.message_id]
                else:
                    kept.append(delivery)
            for delivery in kept:
                exchange.inbox.put(delivery)
            if not any(pushed is exchange for pushed, _ in self._pushed.values()):
                self.server.call(self._hub.close, exchange, "every reply has been pulled.")
        return replies

    def _open(self, requests: list[Message]) -> Exchange:
        """Encode the requests, shared parts once, and send them."""
        server_round = self._round_of(requests)
        encoder = WorkEncoder(self._payload_ids, server_round=server_round)
        exchange = Exchange(server_round, 0)
        largest = 0
        members = self.server.roster.members
        for message in requests:
            metadata = message.metadata
            if metadata.dst_node_id not in members:
                raise ConfigError(
                    f"node id {metadata.dst_node_id} is not enrolled; get_node_ids() returns those available."
                )
            task_id = next(self._task_ids)
            if not metadata.message_id:
                stamp(message, f"{task_id:x}")
            if not metadata.group_id:
                metadata.group_id = str(server_round)
            work = encoder.encode(message.content, metadata.message_type, metadata.group_id)
            largest = max(largest, work.size)
            exchange.tasks[task_id] = Task(task_id, metadata.dst_node_id, message, work, exchange)
        limit = self.server.options.max_reply_bytes
        exchange.max_reply_bytes = 4 * largest + (1 << 20) if limit is None else limit
        self.server.call(self._hub.open, exchange)
        return exchange

    def _round_of(self, requests: list[Message]) -> int:
        """Return the round: what the strategy announced, else what its requests say."""
        if self._advances_itself and requests:
            for record in records_of(requests[0].content, ConfigRecord).values():
                said = record.get(keys.SERVER_ROUND)
                if isinstance(said, int) and said > 0:
                    self._round = said
        return self._round

    def _replies(
        self, exchange: Exchange, timeout: float | None, trains: bool
    ) -> Generator[Message, None, None]:
        options = self.server.options
        started = self._now()
        hard = math.inf if timeout is None else started + timeout
        soft = hard if options.deadline is None else min(hard, started + options.deadline)
        missing, good = len(exchange.tasks), 0
        needed = options.needed(missing)
        try:
            while missing and good < needed:
                limit = soft if good >= min(options.quorum, needed) else hard
                delivery = self._next(exchange, limit)
                if delivery is None:
                    if self._now() >= limit:
                        break
                    continue
                missing -= 1
                reply = delivery.message()
                before = self._reported()
                yield reply
                del reply
                good += self._judge(delivery, before, trains)
        finally:
            self._close(exchange, settled=missing == 0)

    def _next(self, exchange: Exchange, limit: float) -> Delivery | None:
        """Return the next delivery, None when ``limit`` has passed and the network was heard once more."""
        now = self._now()
        seconds = None if limit == math.inf else max(0.0, limit - now)
        delivery = _take(exchange, seconds)
        if delivery is None:
            # After a pause of this process what has arrived is still unread: look before judging.
            with contextlib.suppress(TimeoutError):  # A busy loop: the caller looks at the time again.
                self.server.wait_for(_settle(), _PATIENCE_SECONDS)
            delivery = _take(exchange, 0)
        return delivery

    def _now(self) -> float:
        """Return the time in which this process could work."""
        return time.monotonic() - self.server.paused

    def _close(self, exchange: Exchange, *, settled: bool) -> None:
        self._send_verdicts()
        if settled:
            self.server.call(self._hub.close, exchange, "the round is closed.")
            return
        self.server.wait_for(self._close_exchange(exchange))
        while (delivery := _take(exchange, 0)) is not None:
            if delivery.plan is not None:
                self._decide(delivery, "late", "the round was closed.")
        self._send_verdicts()

    async def _close_exchange(self, exchange: Exchange) -> None:
        self._hub.close(exchange, "the round is closed.")

    # Verdicts.

    def _reported(self) -> int:
        return len(self._strategy.reports) if self._strategy is not None else 0

    def _judge(self, delivery: Delivery, before: int, trains: bool) -> bool:
        """Note what became of a delivered reply; return whether it counts towards the quorum."""
        if delivery.error:
            if delivery.plan is not None:
                self._decide(delivery, "failed", delivery.error)
            return False
        outcome, detail = "accepted", ""
        if trains and self._strategy is not None and len(self._strategy.reports) > before:
            report = self._strategy.reports[before]
            if report.outcome != "ok":
                outcome, detail = "rejected", report.reason
            self._complete(report, delivery)
        if outcome == "accepted" and trains:
            self._accepted[delivery.task.client] = delivery.task.exchange.server_round
        self._decide(delivery, outcome, detail)
        return outcome == "accepted"

    @staticmethod
    def _complete(report: ClientReport, delivery: Delivery) -> None:
        """Add to the strategy's report what only the transport knows."""
        task, ready = delivery.task, delivery.task.ready
        report.task, report.attempt = task.id, task.attempt
        if ready is not None:
            report.reply_crc32 = ready.checksum
            report.metrics = {**report.metrics, **task.metrics}

    def _decide(self, delivery: Delivery, outcome: str, detail: str) -> None:
        task = delivery.task
        reason = delivery.reason or detail.partition(":")[0]
        tell = self._strategy is None or outcome != "accepted"
        if not tell:
            self._unacknowledged.append(task)
        self._verdicts.append(Verdict(task, outcome, reason, detail, tell))
        # A slot is wanted back at once; small replies have none, and waking the event loop costs more.
        if tell or task.receipt is not None:
            self._send_verdicts()

    def _send_verdicts(self) -> None:
        if self._verdicts:
            verdicts, self._verdicts = self._verdicts, []
            self.server.call(self._hub.decide, verdicts)

    def attach(self, strategy: StreamingStrategy) -> None:
        """Read the verdicts of ``strategy`` and tell clients of accepted replies at `commit`."""
        self._strategy = strategy

    def commit(self) -> None:
        """Tell the clients what was accepted since the last commit; the round is durable now."""
        self._send_verdicts()
        tasks, self._unacknowledged = self._unacknowledged, []
        self._hub.keep_rounds = dict(self._accepted)
        self.server.call(self._hub.acknowledge, tasks)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Return the round, and per client the last round of which its reply was accepted."""
        accepted = {str(client): server_round for client, server_round in sorted(self._accepted.items())}
        return {"round": self._round, "accepted": accepted}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned: clients go back to their state of that round."""
        try:
            accepted = {int(client): int(at) for client, at in tree["accepted"].items()}
            self._round = int(tree["round"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint holds no state of a fleet ({error!r}).") from error
        self._accepted.clear()
        self._accepted.update(accepted)
        self._hub.keep_rounds = dict(accepted)


def _take(exchange: Exchange, seconds: float | None) -> Delivery | None:
    try:
        return exchange.inbox.get(timeout=seconds) if seconds != 0 else exchange.inbox.get_nowait()
    except queue.Empty:
        return None


async def _settle() -> None:
    import asyncio

    await asyncio.sleep(_SETTLE_SECONDS)
