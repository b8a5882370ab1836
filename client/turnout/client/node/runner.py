"""One call of a ClientApp for one client: the same here as in a simulation, failures included."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from turnout.wire.flower import new_context, request
from turnout.wire.record_tree import isolated
from turnout.wire.torch_threads import one_torch_thread
from turnout.wire.work import DecodedWork


@dataclass(frozen=True, slots=True)
class Federation:
    """What the server told the node at its welcome."""

    run: str
    num_clients: int = 0
    run_config: Mapping[str, Any] = field(default_factory=dict)


class AppFailed(Exception):  # noqa: N818 - carries the app's own traceback
    """A ClientApp raised, or returned no reply; the message is its traceback."""


def run_app(
    app: ClientApp, work: DecodedWork, *, client: int, state: RecordDict, federation: Federation
) -> tuple[RecordDict, RecordDict]:
    """Run ``app`` for ``client`` and return the reply's content and the client's state after it.

    ``state`` is not changed. Raises `AppFailed`.
    """
    node_config = {"partition-id": client}
    if federation.num_clients:
        node_config["num-partitions"] = federation.num_clients
    context: Context = new_context(
        node_id=client, node_config=node_config, run_config=federation.run_config, state=isolated(state)
    )
    asked = request(
        isolated(work.content),
        dst_node_id=client,
        message_type=work.message_type,
        group_id=work.group,
        message_id=f"{work.group}-{client}",
    )
    try:
        with one_torch_thread():
            answer = app(asked, context)
        if not isinstance(answer, Message):
            raise TypeError(f"the ClientApp returned {type(answer).__name__}, not a Message.")
        if answer.has_error():
            raise AppFailed(answer.error.reason or f"error code {answer.error.code}")
    except AppFailed:
        raise
    except (Exception, SystemExit) as error:
        frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
        shown = "".join(traceback.format_exception(type(error), error, frames))
        raise AppFailed(f"client {client} raised in round {work.server_round}:\n{shown}") from error
    return answer.content, context.state
