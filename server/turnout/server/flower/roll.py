"""Which of Flower's nodes is which client: asked once of each node, since node ids are drawn anew."""

from __future__ import annotations

import logging
import time
from typing import Final

from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from turnout.wire import keys
from turnout.wire.flower import IDENTITY, LOST, record_dict, records_of, request

log = logging.getLogger("turnout.server.flower")

_LOOK_SECONDS: Final = 0.1


class Roll:
    """The clients of a Flower grid by their stable ids.

    A node is asked ``query.identity`` when it is first seen. One whose app does not know the question is a
    client by its node id. ``patience`` is how long one call waits for answers, in seconds; a node that
    takes longer is asked for no second time, and joins when its answer comes.
    """

    def __init__(self, grid: Grid, *, num_clients: int | None, patience: float) -> None:
        self._grid = grid
        self._num_clients = num_clients
        self._patience = patience
        self._known: set[int] = set()
        self._heard: dict[int, int] = {}  # Node to client, in the order of their answers.
        self._node_of: dict[int, int] = {}
        self._asked: dict[str, int] = {}

    @property
    def registered(self) -> tuple[int, ...]:
        """Every client that was ever there, in ascending order."""
        return tuple(sorted(self._node_of))

    def node(self, client: int) -> int:
        """Return the node that works for ``client``; raises KeyError for a client never seen."""
        return self._node_of[client]

    def call(self) -> list[int]:
        """Return the clients that are connected now, in ascending order.

        Of two nodes that say that they are the same client, the one heard of last is it: the other is mostly
        the same one before it was started anew, which SuperLink has not missed yet.
        """
        online = list(self._grid.get_node_ids())
        self._ask([node for node in online if node not in self._known])
        self._listen()
        here = set(online)
        heard = [node for node in self._heard if node in here]
        current = {self._heard[node]: node for node in heard}
        if len(current) < len(heard):
            log.info("%s nodes speak for %s clients.", len(heard), len(current))
        self._node_of |= current
        return sorted(current)

    def _ask(self, nodes: list[int]) -> None:
        if not nodes:
            return
        questions = [
            request(record_dict({}), dst_node_id=node, message_type=IDENTITY, group_id="identity")
            for node in nodes
        ]
        ids = list(self._grid.push_messages(questions))
        for node, message_id in zip(nodes, ids, strict=False):
            if message_id:
                self._asked[message_id] = node
                self._known.add(node)

    def _listen(self) -> None:
        deadline = time.monotonic() + self._patience
        while self._asked:
            for answer in self._grid.pull_messages(list(self._asked)):
                node = self._asked.pop(answer.metadata.reply_to_message_id, None)
                if node is not None:
                    self._enter(node, answer)
            if not self._asked or time.monotonic() >= deadline:
                return
            time.sleep(_LOOK_SECONDS)

    def _enter(self, node: int, answer: Message) -> None:
        client = node
        if answer.has_error():
            if answer.error.code in LOST:
                self._known.discard(node)  # It went away meanwhile; another time.
                return
            level = logging.INFO if self._num_clients is None else logging.WARNING
            log.log(level, "node %s does not say which client it is: %s", node, answer.error.reason)
        elif (said := _client_id(answer.content)) is not None:
            client = said
        if self._num_clients is not None and not 0 <= client < self._num_clients:
            log.warning("node %s: client %s is not one of 0 to %s.", node, client, self._num_clients - 1)
            return
        self._heard[node] = client


def _client_id(content: RecordDict) -> int | None:
    for record in records_of(content, MetricRecord).values():
        said = record.get(keys.CLIENT_ID)
        if isinstance(said, int) and 0 <= said < 2**64:
            return said
    return None
