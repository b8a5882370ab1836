"""The clients of a simulation: their contexts, one call of one client, and what happens when it raises."""

from __future__ import annotations

import copy
import threading
import traceback
from collections.abc import Mapping

from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfigValue
from flwr.clientapp import ClientApp

from turnout.simulation.client_states import ClientStates
from turnout.wire.flower import error_reply, new_context, stamp
from turnout.wire.record_tree import isolated
from turnout.wire.torch_threads import one_torch_thread


class LocalClients:
    """All clients of one ``ClientApp`` in this process, and their states."""

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        run_config: Mapping[str, UserConfigValue],
        state_bytes: int,
    ) -> None:
        self.num_clients = num_clients
        self.num_failures = 0
        self.client_app = client_app
        self.states = ClientStates(num_clients, state_bytes)
        self._run_config = run_config
        self._lock = threading.Lock()

    def deliver(self, message: Message, *, server_round: int) -> Message:
        """Run the client that ``message`` is for and return its reply, an error reply if it raised.

        May be called on several threads, for different clients.
        """
        node = message.metadata.dst_node_id
        reply, state = self.call(message, self.states.get(node), server_round=server_round)
        self.states.put(node, state)
        return reply

    def call(self, message: Message, state: RecordDict, *, server_round: int) -> tuple[Message, RecordDict]:
        """Run the client on ``state`` and return its reply and its state afterwards.

        The message stays as it is: the client gets its own records around the shared arrays. So does
        ``state``, which is what is returned for a client that raised.
        """
        node = message.metadata.dst_node_id
        context = self.new_context(node, isolated(state))
        delivered = copy.copy(message)
        delivered.content = isolated(message.content)
        try:
            with one_torch_thread():
                reply = self.client_app(delivered, context)
            _check_reply(reply, message)
            state = context.state
        except (Exception, SystemExit) as error:
            self.count_failures(1)
            reply = error_reply(message, failure(node, server_round, error))
        stamp(reply, reply_id(message))
        return reply, state

    def count_failures(self, number: int) -> None:
        """Count clients that raised."""
        with self._lock:
            self.num_failures += number

    def new_context(self, node: int, state: RecordDict) -> Context:
        """Return a context of the client around ``state``, which nobody keeps."""
        return new_context(
            node_id=node,
            node_config={"partition-id": node, "num-partitions": self.num_clients},
            run_config=self._run_config,
            state=state,
        )


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
