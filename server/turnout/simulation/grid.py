"""A Flower ``Grid`` whose clients live in this process and come and go by a participation model."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import Message
from flwr.app.user_config import UserConfigValue
from flwr.clientapp import ClientApp

from turnout.simulation.clients import LocalClients, reply_id
from turnout.simulation.executors import AUTO, choose_executor
from turnout.simulation.participation import Always, ParticipationModel
from turnout.simulation.probabilities import check_num_clients, check_seed
from turnout.strategies.cohort import Batch, Cohort
from turnout.wire.errors import ConfigError, ReplyRejected
from turnout.wire.flower import NODE_UNAVAILABLE, error_reply, stamp
from turnout.wire.grid import LocalRunGrid

log = logging.getLogger("turnout.simulation")

_MOST_SKIPPED_ROUNDS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Tally:
    """Requests without a good reply, counted since the grid was made."""

    failed: int
    """Clients that raised."""
    late: int
    """Requests without a reply by the deadline, whether their client had started or not."""
    absent: int
    """Training requests to clients that did not take part in that round."""


class LocalGrid(LocalRunGrid):
    """Runs a Flower ``ClientApp`` for ``num_clients`` clients inside this process.

    Node id, partition id and client id are the same number, 0 to ``num_clients - 1``. ``participation``
    decides who is available in which round (default: everyone). A client that raises gives an error reply
    with its own traceback, from its own node id, and the run goes on; what it did to its state is undone.

    Parameters
    ----------
    client_app
        Called as ``client_app(message, context)``. ``context.node_config`` holds ``partition-id`` and
        ``num-partitions``, ``context.run_config`` the given ``run_config`` and ``seed``; ``context.state``
        persists per client. Requests are private to a client; their arrays are shared and read-only.
    executor, workers, exact
        ``"serial"`` (one client at a time), ``"threads"`` or ``"processes"`` (``workers`` at a time, None:
        one per CPU) give the same bits; PyTorch uses one thread inside a client on each. ``"batched"`` trains
        many clients as one tensor program, with results equal up to rounding (1e-5). ``"auto"`` picks,
        says so in the attribute ``executor`` and in the log; only if ``exact`` is false it picks
        ``"batched"``.
    seed
        Passed to the clients as ``run_config["seed"]``.
    min_available_nodes
        Only for strategies that do not call `start_round`: rounds with fewer clients available pass unused,
        since Flower's strategies would wait in them for ever. Default 2, as in Flower.
    buffer_replies
        Return replies as a list instead of a generator, for strategies that go through them twice (Flower's
        adaptive clipping on the server side); costs memory for a whole cohort's replies.
    state_bytes
        Most memory for what clients keep between rounds, beyond that of one round's participants; the rest is
        in files, in a recorded run beside its checkpoints. Default 2 GiB.

    Raises
    ------
    ConfigError
        For an impossible setting, or a participation model made for another number of clients.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        *,
        participation: ParticipationModel | None = None,
        executor: str = "serial",
        workers: int | None = None,
        exact: bool = True,
        seed: int = 0,
        run_config: Mapping[str, UserConfigValue] | None = None,
        min_available_nodes: int = 2,
        buffer_replies: bool = False,
        state_bytes: int = 2 << 30,
    ) -> None:
        super().__init__()
        self.num_clients = check_num_clients(num_clients)
        self.participation = Always(self.num_clients) if participation is None else participation
        if self.participation.num_clients != self.num_clients:
            raise ConfigError(
                f"participation is for {self.participation.num_clients} clients but num_clients is "
                f"{self.num_clients}; make the model with one probability (or column) per client."
            )
        if min_available_nodes < 1:
            raise ConfigError(f"min_available_nodes must be at least 1, got {min_available_nodes}.")
        if state_bytes < 0:
            raise ConfigError(f"state_bytes must be at least 0, got {state_bytes}.")
        self._clients = LocalClients(
            client_app, self.num_clients, {"seed": check_seed(seed), **(run_config or {})}, state_bytes
        )
        choice = choose_executor(
            executor, self._clients, workers, exact=exact, cohort=_mean_cohort(self.participation)
        )
        self._executor = choice.executor
        self.executor = choice.words
        if executor == AUTO:
            log.info("executor: %s", choice.words)
        self._min_available = min(min_available_nodes, self.num_clients)
        self._buffer_replies = buffer_replies
        self._num_late = self._num_absent = 0
        self._round = 1
        self._advances_itself = True
        self._available: tuple[int, dict[int, None]] | None = None
        self._pushed: dict[str, Message] = {}
        self._message_numbers = itertools.count(1)

    @property
    def tally(self) -> Tally:
        """How many requests failed, were late, or went to absent clients so far."""
        return Tally(self._clients.num_failures, self._num_late, self._num_absent)

    # Rounds and nodes.

    @property
    def server_round(self) -> int:
        """The current round, counted from 1."""
        return self._round

    def start_round(self, server_round: int) -> None:
        """Make ``server_round`` the current round.

        Once called, the grid no longer moves on by itself after each exchange of training messages, as it
        does under strategies that never call this.
        """
        if server_round < 1:
            raise ConfigError(f"server_round is {server_round}, but rounds are counted from 1.")
        self._advances_itself = False
        self._round = server_round
        self._start_executor()

    def registered_ids(self) -> range:
        """Return the node ids of all clients, present or not."""
        return range(self.num_clients)

    def get_node_ids(self) -> list[int]:
        """Return the node ids of the clients that take part in the current round, in ascending order."""
        if self._advances_itself:
            self._skip_empty_rounds()
        return list(self._present())

    def _start_executor(self) -> None:
        executor = self._executor.started()
        if executor is not self._executor:
            self.executor = f"this process alone (instead of {self.executor}: they did not start)"
            self._executor = executor

    def _present(self) -> dict[int, None]:
        """Return the clients of the current round, ascending; a dict because membership is asked for."""
        if self._available is None or self._available[0] != self._round:
            present: list[int] = self.participation.present(self._round).tolist()
            self._available = (self._round, dict.fromkeys(present))
        return self._available[1]

    def _skip_empty_rounds(self) -> None:
        first = self._round
        while len(self._present()) < self._min_available:
            self._round += 1
            if self._round - first >= _MOST_SKIPPED_ROUNDS:
                raise ConfigError(
                    f"participation: none of rounds {first} to {self._round - 1} has {self._min_available} "
                    "clients available; raise the probabilities or lower min_available_nodes."
                )

    # Messages.

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Accept messages and return their ids; the clients run when the replies are pulled."""
        requests = self._accept(messages)
        self._pushed.update((message.metadata.message_id, message) for message in requests)
        return [message.metadata.message_id for message in requests]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to pushed messages as the clients complete them; each can be pulled once.

        Raises `ConfigError` for an id that is not waiting.
        """
        ids = list(message_ids)
        for message_id in ids:
            if message_id not in self._pushed:
                raise ConfigError(
                    f"message id {message_id!r} is not waiting: it was never pushed, or its reply was pulled "
                    "before; pass ids that push_messages returned, once each."
                )
        return self._replies([self._pushed.pop(message_id) for message_id in dict.fromkeys(ids)], None)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return a generator of replies, which come while it is read and of which only a few exist at a time.

        After `start_round` they come as clients complete. Otherwise they come in the order of the messages
        on every executor, because the sums of Flower's strategies depend on it. After ``timeout`` seconds,
        counted from the first reply asked for, the replies still missing are dropped and counted in `tally`;
        a client that is running then finishes before it does what it is asked next. A training message to a
        client that does not take part in this round gets an error reply.

        Raises `ConfigError` for an unknown node id and for a timeout that is not above 0.
        """
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"timeout must be above 0 seconds, or None for no limit, got {timeout!r}.")
        return self._replies(self._accept(messages), timeout)

    def _accept(self, messages: Iterable[Message]) -> list[Message]:
        """Check and number messages."""
        requests = list(messages)
        for message in requests:
            metadata = message.metadata
            if not 0 <= metadata.dst_node_id < self.num_clients:
                raise ConfigError(
                    f"node id {metadata.dst_node_id} is not registered; this grid has clients 0 to "
                    f"{self.num_clients - 1}, and get_node_ids() returns those available now."
                )
            if not metadata.message_id:
                stamp(message, f"{next(self._message_numbers):x}")
            if not metadata.group_id:
                metadata.group_id = str(self._round)
        return requests

    def _replies(self, requests: list[Message], timeout: float | None) -> Iterable[Message]:
        replies = self._exchange(requests, timeout)
        return list(replies) if self._buffer_replies else replies

    def _exchange(self, requests: list[Message], timeout: float | None) -> Generator[Message, None, None]:
        self._start_executor()
        self._executor.trim_states()
        server_round, here = self._round, self._present()
        trains = any(_is_training(message) for message in requests)
        present = [m for m in requests if m.metadata.dst_node_id in here or not _is_training(m)]
        unanswered = len(present)
        deadline = _deadline(timeout)
        try:
            if unanswered < len(requests):
                yield from self._refusals(requests, here, server_round)
            replies = self._executor.run(
                present, server_round=server_round, deadline=deadline, ordered=self._advances_itself
            )
            with closing(replies):
                for reply in replies:
                    unanswered -= 1
                    yield reply
                    del reply  # It must not live on while the next client runs.
            self._num_late += unanswered
        finally:
            if trains and self._advances_itself and self._round == server_round:
                self._round += 1

    # Cohorts.

    @property
    def trains_cohorts(self) -> bool:
        """Whether clients can be trained in bulk: see `turnout.strategies.cohort`."""
        return self._executor.trains_cohorts and not self._advances_itself

    def train_cohort(self, cohort: Cohort, *, timeout: float | None = None) -> Generator[Batch, None, None]:
        """Train ``cohort`` in bulk; times out and refuses absent clients as `send_and_receive` does."""
        self._executor.trim_states()
        deadline, here = _deadline(timeout), self._present()
        parts, unanswered = [], 0
        for part in cohort.parts:
            present = [node for node in part.nodes if node in here]
            if len(present) < len(part.nodes):
                absent = [node for node in part.nodes if node not in here]
                self._num_absent += len(absent)
                yield Batch.of_failures(
                    part.instruction, cohort, [(node, self._absence(node)) for node in absent]
                )
            parts.append(replace(part, nodes=present))
            unanswered += len(present)
        with closing(self._executor.train_cohort(replace(cohort, parts=parts), deadline=deadline)) as batches:
            for batch in batches:
                unanswered -= len(batch.nodes) + len(batch.failures)
                yield batch
                del batch
        self._num_late += unanswered

    def _absence(self, node: int) -> ReplyRejected:
        return ReplyRejected("client-error", _absence(node, self._round))

    def _refusals(
        self, requests: list[Message], here: Collection[int], server_round: int
    ) -> Generator[Message, None, None]:
        """Answer for the clients that should train but do not take part in this round."""
        for message in requests:
            node = message.metadata.dst_node_id
            if _is_training(message) and node not in here:
                self._num_absent += 1
                reply = error_reply(message, _absence(node, server_round), NODE_UNAVAILABLE)
                stamp(reply, reply_id(message))
                yield reply

    # Checkpoints.

    def keep_rows(self, directory: Path, run: str) -> None:
        """Let checkpoints refer to clients' states in files in ``directory`` instead of copying them.

        As `Algorithm.keep_rows` does for what strategies keep of clients.
        """
        self._clients.states.keep_in(directory)

    def state_dict(self) -> dict[str, Any]:
        """Return the round and every client's persistent state as a tree for a checkpoint.

        Waits for clients that still run after their deadline. Arrays are shared, not copied; after
        `keep_rows` the tree refers to files.
        """
        self._executor.settle()
        return {"round": self._round, "clients": self._clients.states.state_dict()}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; `CheckpointError` if it has clients unknown here."""
        self._executor.settle()
        self._clients.states.load_state_dict(tree["clients"])
        self._executor.states_replaced()
        self._round = int(tree["round"])


def _is_training(message: Message) -> bool:
    return message.metadata.message_type.startswith("train")


def _mean_cohort(participation: ParticipationModel) -> float:
    return float(np.sum(participation.rates))


def _absence(node: int, server_round: int) -> str:
    return f"client {node} does not take part in round {server_round}; ask those available."


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None or math.isinf(timeout) else time.monotonic() + timeout
