"""A Flower ``Grid`` over Flower's own: replies one at a time, and clients by ids that stay."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from turnout.server.flower.roll import Roll
from turnout.wire import ConfigError, NDArray, keys
from turnout.wire.flower import (
    NODE_UNAVAILABLE,
    Run,
    drop_encodings,
    error_reply,
    record_dict,
    records_of,
    reply,
    request,
    stamp,
)

if TYPE_CHECKING:
    from turnout.strategies.streaming import StreamingStrategy

log = logging.getLogger("turnout.server.flower")

_PUSHED_AT_ONCE: Final = 64
_SHORTEST_PAUSE: Final = 0.01
_REST: Final = 5.0
_LOOK_SECONDS: Final = 0.5


class Participation(Protocol):
    """Says who takes part in a round, as the simulation's models do."""

    def mask(self, server_round: int, /) -> NDArray:
        """Return one flag per client."""


class FlowerGrid(Grid):
    """Wraps the grid that Flower gives a ``ServerApp``, on a SuperLink or in its simulation.

    Replies are pulled one by one and handed on as they come: the server holds one, however many clients
    there are. Clients are known by the id that they give (see `turnout.client.at_home`) instead of by the
    node id that Flower draws, in requests, replies and errors, so that a client that comes back is the same.

    Parameters
    ----------
    inner
        Flower's grid.
    num_clients
        How many clients the federation has; their ids are then 0 to ``num_clients - 1``. None: whoever comes.
    participation
        Who takes part in which round, as in a simulation; a round waits for all. Needs ``num_clients``.
    min_clients
        A round begins when this many clients are there; with ``participation``, after ``wait`` seconds it
        goes on with so many of those named.
    wait
        Seconds to wait for clients before giving up with `ConfigError`; None waits for ever.
    run
        A name under which clients keep their state, so that it outlives this process. None: Flower's run.
    longest_pause
        Seconds between two looks for replies, at most. The first looks follow each other quickly.
    """

    def __init__(
        self,
        inner: Grid,
        *,
        num_clients: int | None = None,
        participation: Participation | None = None,
        min_clients: int = 1,
        wait: float | None = None,
        run: str | None = None,
        longest_pause: float = 0.5,
    ) -> None:
        if min_clients < 1:
            raise ConfigError(f"min_clients must be at least 1, got {min_clients}.")
        if participation is not None and num_clients is None:
            raise ConfigError("participation names clients by number; give num_clients as well.")
        if not longest_pause > 0:
            raise ConfigError(f"longest_pause must be above 0 seconds, got {longest_pause!r}.")
        self.inner = inner
        self.num_clients = num_clients
        self._roll = Roll(inner, num_clients=num_clients, patience=_LOOK_SECONDS)
        self._participation = participation
        self._min_clients, self._wait = min_clients, wait
        self._name = run
        self._longest_pause = longest_pause
        self._pushed: dict[str, Message] = {}
        self._strategy: StreamingStrategy | None = None
        self._accepted: dict[int, int] = {}
        self._durable: dict[int, int] = {}
        self._round = 1
        self._advances_itself = True
        self.late = 0
        """Requests without a reply by their deadline, counted since the grid was made."""

    def set_run(self, run: Run) -> None:
        """Set Flower's run."""
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        """Flower's run."""
        return self.inner.run

    # Rounds and clients.

    @property
    def server_round(self) -> int:
        """The current round, counted from 1."""
        return self._round

    def start_round(self, server_round: int) -> None:
        """Make ``server_round`` the current round."""
        if server_round < 1:
            raise ConfigError(f"server_round is {server_round}, but rounds are counted from 1.")
        self._advances_itself = False
        self._round = server_round

    def registered_ids(self) -> range | tuple[int, ...]:
        """Return the ids of all clients, or of all that were ever seen if their number is not known."""
        return self._roll.registered if self.num_clients is None else range(self.num_clients)

    def get_node_ids(self) -> list[int]:
        """Return the ids of the clients that can take part now, in ascending order; waits for them.

        Raises `ConfigError` when too few come within ``wait`` seconds.
        """
        deadline = math.inf if self._wait is None else time.monotonic() + self._wait
        told: list[int] | None = None
        while True:
            present, expected = self._roll.call(), self._expected()
            if expected is not None:
                present = [client for client in present if client in expected]
            if len(present) >= (self._min_clients if expected is None else len(expected)):
                return present
            if time.monotonic() >= deadline:
                if expected is not None and len(present) >= self._min_clients:
                    return present
                raise ConfigError(
                    f"round {self._round}: only clients {present[:8]} came within {self._wait:g} seconds; "
                    f"at least {self._min_clients} are needed."
                )
            if present != told:
                told = present
                log.info("round %s: waiting for clients; %s are here.", self._round, len(present))
            time.sleep(_LOOK_SECONDS)

    def _expected(self) -> set[int] | None:
        if self._participation is None:
            return None
        return set(np.flatnonzero(self._participation.mask(self._round)).tolist())

    # Messages.

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message from the server to the client ``dst_node_id``; ``ttl`` is in seconds."""
        message = request(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id)
        if ttl is not None:
            message.metadata.ttl = ttl
        return message

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages to clients by their ids and return the messages' ids."""
        sent = self._send(list(messages), None)
        self._pushed |= sent
        return list(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have come to these messages; each can be pulled once."""
        wanted = [message_id for message_id in message_ids if message_id in self._pushed]
        answers = list(self.inner.pull_messages(wanted)) if wanted else []
        return [
            _translated(answer, self._pushed.pop(answer.metadata.reply_to_message_id)) for answer in answers
        ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send the requests now; return a generator of replies, which are fetched one by one as it is read.

        After ``timeout`` seconds the replies still missing are given up and counted in ``late``. An error,
        also of a node that was lost, comes from the client that was asked. Strategies that never call
        `start_round` get a list in the order of the requests: the sums of Flower's strategies depend on it.

        Raises `ConfigError` for a client never seen and for a timeout that is not above 0.
        """
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"timeout must be above 0 seconds, or None for no limit, got {timeout!r}.")
        requests = list(messages)
        trains = any(message.metadata.message_type.startswith("train") for message in requests)
        if self._advances_itself and requests:
            self._round = _round_of(requests[0], self._round)
        replies = self._replies(self._send(requests, timeout), timeout, trains)
        if not self._advances_itself:
            return replies
        order = {message.metadata.message_id: at for at, message in enumerate(requests)}
        ordered = sorted(replies, key=lambda answer: order[answer.metadata.reply_to_message_id])
        self._round += trains
        return ordered

    def _send(self, requests: list[Message], timeout: float | None) -> dict[str, Message]:
        """Push ``requests`` and return them by the ids that Flower gave them; the rest get empty ids."""
        sent: dict[str, Message] = {}
        for begin in range(0, len(requests), _PUSHED_AT_ONCE):
            batch = requests[begin : begin + _PUSHED_AT_ONCE]
            ids = list(self.inner.push_messages([self._addressed(message, timeout) for message in batch]))
            ids += [""] * (len(batch) - len(ids))
            for at, (message, message_id) in enumerate(zip(batch, ids, strict=True)):
                known = message_id or f"unsent-{begin + at}"
                stamp(message, known)
                sent[known] = message
        for message in requests:
            drop_encodings(message.content)  # SuperLink has the model now.
        return sent

    def _addressed(self, message: Message, timeout: float | None) -> Message:
        """Return ``message`` for the node that works for its client now, with which state counts."""
        metadata = message.metadata
        try:
            node = self._roll.node(metadata.dst_node_id)
        except KeyError:
            raise ConfigError(
                f"client {metadata.dst_node_id} was never here; get_node_ids() returns those available."
            ) from None
        metadata.group_id = metadata.group_id or str(self._round)
        addressed = request(
            self._told(message.content, metadata.dst_node_id),
            dst_node_id=node,
            message_type=metadata.message_type,
            group_id=metadata.group_id,
        )
        addressed.metadata.ttl = metadata.ttl if timeout is None else min(metadata.ttl, timeout)
        return addressed

    def _told(self, content: RecordDict, client: int) -> RecordDict:
        config = content.get(keys.CONFIG)
        if self._name is None or not isinstance(config, ConfigRecord):
            return content
        told = ConfigRecord(
            {
                **config,
                keys.RUN: self._name,
                keys.BASE_ROUND: self._accepted.get(client, 0),
                keys.KEEP_ROUND: self._durable.get(client, 0),
            }
        )
        # The arrays stay one object, which Flower uploads once.
        return record_dict({**dict(content.items()), keys.CONFIG: told})

    def _replies(
        self, waiting: dict[str, Message], timeout: float | None, trains: bool
    ) -> Generator[Message, None, None]:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        for message_id in [known for known in waiting if known.startswith("unsent-")]:
            asked = waiting.pop(message_id)
            yield error_reply(asked, "Flower's SuperLink did not take the request.", NODE_UNAVAILABLE)
        pause = _SHORTEST_PAUSE
        while waiting:
            found, began = False, time.monotonic()
            for message_id in list(waiting):
                answers = list(self.inner.pull_messages([message_id]))
                if time.monotonic() >= deadline and not answers:
                    self.late += len(waiting)
                    return
                if answers:
                    found, asked = True, waiting.pop(message_id)
                    before = self._reported()
                    answer = _translated(answers.pop(), asked)
                    failed = answer.has_error()
                    yield answer
                    del answer  # The next one must not come while this one is still there.
                    if trains and not failed:
                        self._note(asked.metadata.dst_node_id, before)
            # Looking costs SuperLink work, which on a small machine the clients wait for.
            rested = max(2 * pause, _REST * (time.monotonic() - began))
            pause = _SHORTEST_PAUSE if found else min(rested, self._longest_pause)
            if waiting and not found:
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))

    # Which state of a client counts.

    def _reported(self) -> int:
        return len(self._strategy.reports) if self._strategy is not None else 0

    def _note(self, client: int, before: int) -> None:
        reports = self._strategy.reports[before:] if self._strategy is not None else []
        if all(report.outcome == "ok" for report in reports):
            self._accepted[client] = self._round

    def attach(self, strategy: StreamingStrategy) -> None:
        """Read the verdicts of ``strategy``: a client goes on from its state of the last reply taken."""
        self._strategy = strategy

    def commit(self) -> None:
        """Note that the rounds so far are durable: clients need not keep states from before them."""
        self._durable = dict(self._accepted)

    def state_dict(self) -> dict[str, Any]:
        """Return the round, and per client the last round of which its reply was accepted."""
        return {
            "round": self._round,
            "accepted": {str(c): server_round for c, server_round in sorted(self._accepted.items())},
        }

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned: clients go back to their state of that round."""
        self._round = int(tree["round"])
        self._accepted = {int(client): int(at) for client, at in tree["accepted"].items()}
        self._durable = dict(self._accepted)


def _translated(answer: Message, asked: Message) -> Message:
    """Return ``answer`` as the reply of the client that was ``asked``."""
    if answer.has_error():
        return error_reply(asked, answer.error.reason or f"error code {answer.error.code}", answer.error.code)
    return reply(answer.content, to=asked)


def _round_of(message: Message, known: int) -> int:
    """Return the round that a request names, for strategies that do not announce it."""
    for record in records_of(message.content, ConfigRecord).values():
        said = record.get(keys.SERVER_ROUND)
        if isinstance(said, int) and said > 0:
            return said
    return known
