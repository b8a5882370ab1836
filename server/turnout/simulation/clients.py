"""The clients of a simulation: their contexts, one call of one client, and what happens when it raises."""

from __future__ import annotations

import copy
import threading
import traceback
from collections.abc import Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfigValue
from flwr.clientapp import ClientApp

from turnout.wire.errors import CheckpointError
from turnout.wire.flower import error_reply, new_context, stamp
from turnout.wire.record_tree import decode_records, encode_records, isolated
from turnout.wire.torch_threads import one_torch_thread


class LocalClients:
    """All clients of one ``ClientApp`` in this process; a context is made when its client is first called."""

    def __init__(
        self, client_app: ClientApp, num_clients: int, run_config: Mapping[str, UserConfigValue]
    ) -> None:
        self.num_clients = num_clients
        self.num_failures = 0
        self.client_app = client_app
        self._run_config = run_config
        self._contexts: dict[int, Context] = {}
        self._lock = threading.Lock()

    def deliver(self, message: Message, *, server_round: int) -> Message:
        """Run the client that ``message`` is for and return its reply, an error reply if it raised.

        May be called on several threads, for different clients. The message stays as it is: the client gets
        its own records around the shared arrays. State that a failing client changed is put back.
        """
        node = message.metadata.dst_node_id
        context = self.context(node)
        before = isolated(context.state)
        delivered = copy.copy(message)
        delivered.content = isolated(message.content)
        try:
            with one_torch_thread():
                reply = self.client_app(delivered, context)
            _check_reply(reply, message)
        except (Exception, SystemExit) as error:
            context.state = before
            self.count_failures(1)
            reply = error_reply(message, failure(node, server_round, error))
        stamp(reply, reply_id(message))
        return reply

    def count_failures(self, number: int) -> None:
        """Count clients that raised."""
        with self._lock:
            self.num_failures += number

    def context(self, node: int) -> Context:
        """Return the client's context, which is made when it is first asked for."""
        context = self._contexts.get(node)
        if context is None:
            context = self._contexts[node] = self.new_context(node, RecordDict())
        return context

    def new_context(self, node: int, state: RecordDict) -> Context:
        """Return a context of the client around ``state``, which nobody keeps."""
        return new_context(
            node_id=node,
            node_config={"partition-id": node, "num-partitions": self.num_clients},
            run_config=self._run_config,
            state=state,
        )

    def state(self, node: int) -> RecordDict:
        """Return the client's present state; an empty one, which nobody keeps, if it has none."""
        context = self._contexts.get(node)
        return RecordDict() if context is None else context.state

    def keep(self, node: int, state: RecordDict) -> None:
        """Make ``state`` the client's state."""
        if state or node in self._contexts:
            self.context(node).state = state

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every client that has any, by client number. Arrays are shared, not copied."""
        return {
            str(node): encode_records(self._contexts[node].state)
            for node in sorted(self._contexts)
            if self._contexts[node].state
        }

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace every client's state; raises `CheckpointError` for clients that do not exist here."""
        states = {int(node): decode_records(state) for node, state in tree.items()}
        strangers = [node for node in states if not 0 <= node < self.num_clients]
        if strangers:
            raise CheckpointError(
                f"the checkpoint holds the state of client {min(strangers)}, but this grid has clients 0 to "
                f"{self.num_clients - 1}; resume with the number of clients that the run had."
            )
        self._contexts.clear()
        for node, state in states.items():
            self.context(node).state = state


def reply_id(message: Message) -> str:
    """Return the id of the reply to ``message``, the same on every executor."""
    return f"{message.metadata.message_id}-reply"


def _check_reply(reply: object, message: Message) -> None:
    if not isinstance(reply, Message):
        raise TypeError(
            f"the ClientApp returned {type(reply).__name__}, not a Message; "
            "return Message(content, reply_to=message)."
        )
    if reply.metadata.reply_to_message_id != message.metadata.message_id:
        raise ValueError(
            "the ClientApp returned a message that does not answer the request; "
            "return Message(content, reply_to=message)."
        )


def failure(node: int, server_round: int, error: BaseException) -> str:
    """Return what is told of a client that raised ``error``, its own traceback included."""
    return f"client {node} raised in round {server_round}:\n{_own_traceback(error)}"


def _own_traceback(error: BaseException) -> str:
    """Format the error from the ClientApp on, without this module's frame above it."""
    frames = error.__traceback__
    if frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))
