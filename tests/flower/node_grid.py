"""A Flower grid as SuperLink's is: nodes with random ids, replies that come later, nodes that get lost."""

from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from turnout.wire.flower import (
    NODE_UNAVAILABLE,
    Run,
    error_reply,
    local_run,
    new_context,
    reply,
    request,
    stamp,
)

SUPERLINK = 1


class NodeGrid(Grid):
    """Runs an app on nodes; a reply can be pulled ``delay`` pulls after it was asked for.

    ``held`` counts the replies that the puller keeps alive at the moment; ``most_held`` is their maximum.
    """

    def __init__(self, app: ClientApp, clients: Iterable[int], *, seed: int = 0, delay: int = 0) -> None:
        self._rng = random.Random(seed)
        self._app = app
        self._delay = delay
        self._states: dict[int, RecordDict] = {}
        self._numbers = itertools.count(1)
        self._waiting: dict[str, tuple[Message, int]] = {}
        self.held = self.most_held = self.pulls = 0
        self.nodes: dict[int, int] = {}
        self.lost: set[int] = set()
        self.configs: dict[int, dict[str, int | str]] = {}
        self.run_config: dict[str, bool | float | int | str] = {}
        self.refusing = False
        for client in clients:
            self.connect(client)

    def connect(self, client: int) -> int:
        """Let ``client`` connect, as a new node with an empty state."""
        node = self._rng.getrandbits(64)
        self.nodes[node] = client
        self._states[node] = RecordDict()
        return node

    def disconnect(self, client: int) -> None:
        for node in [node for node, known in self.nodes.items() if known == client]:
            del self.nodes[node]

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return local_run()

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return request(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        if self.refusing:  # SuperLink's payload was too large.
            return []
        ids = []
        for message in messages:
            stamp(message, f"m{next(self._numbers)}")
            ids.append(message.metadata.message_id)
            self._waiting[ids[-1]] = message, self._delay
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls += 1
        answers = []
        for message_id in message_ids:
            message, left = self._waiting.get(message_id, (None, 0))
            if message is None:
                continue
            if left:
                self._waiting[message_id] = message, left - 1
                continue
            del self._waiting[message_id]
            answers.append(self._answer(message))
        return answers

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        client = self.nodes.get(node)
        if client is None or client in self.lost:
            # SuperLink answers in its own name for a node that is gone.
            answer = error_reply(message, "Node Unavailable", NODE_UNAVAILABLE)
            answer.metadata.__dict__["_src_node_id"] = SUPERLINK
            return answer
        config = self.configs.get(client, {"partition-id": client})
        context = new_context(
            node_id=node, node_config=config, run_config=self.run_config, state=self._states[node]
        )
        try:
            answer = self._app(message, context)
        except Exception as error:
            return error_reply(message, repr(error))
        self._states[node] = context.state
        answer = reply(answer.content, to=message)
        if message.metadata.message_type == "train":
            self.held += 1
            self.most_held = max(self.most_held, self.held)
            weakref.finalize(answer.content, self._let_go)
        return answer

    def _let_go(self) -> None:
        self.held -= 1

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))
