"""Makes any ClientApp at home on Flower's engines: it says which client it is and keeps its state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from turnout.wire import keys
from turnout.wire.errors import ConfigError
from turnout.wire.flower import IDENTITY
from turnout.wire.record_tree import isolated
from turnout.wire.torch_threads import one_torch_thread

_CLIENT_ID = "client-id"
_PARTITION_ID = "partition-id"
_STATE_DIR = "state-dir"


def at_home(app: ClientApp, state_dir: str | Path | None = None) -> ClientApp:
    """Return ``app`` for SuperNodes and Flower's simulation, as the fleet's own nodes and `LocalGrid` run it.

    It answers the question ``query.identity`` of `turnout.server.flower.FlowerGrid`: a client is
    ``client-id`` of its node's config, else ``partition-id``, else the id that Flower drew for the node. With
    ``state_dir`` (else ``state-dir`` of the node's config) what the app keeps in ``context.state`` is on disk
    before its reply leaves, so that it outlives the node, and the client goes on from its state of the last
    reply that the server took. PyTorch uses one thread, as on the other engines.
    """
    return HomeApp(app, state_dir)


class HomeApp(ClientApp):
    """The app that `at_home` makes."""

    def __init__(self, app: ClientApp, state_dir: str | Path | None = None) -> None:
        super().__init__()
        self.app = app
        self.state_dir = state_dir

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer ``message`` as the app does. Raises what it raises, `ConfigError` for a bad node config."""
        client = client_of(context)
        if message.metadata.message_type == IDENTITY:
            known = MetricRecord() if client is None else MetricRecord({keys.CLIENT_ID: client})
            return Message(RecordDict({keys.METRICS: known}), reply_to=message)
        if client is not None:
            context.node_config.setdefault(_PARTITION_ID, client)
        state_dir = self.state_dir or context.node_config.get(_STATE_DIR)
        with one_torch_thread():
            if not state_dir:
                return self.app(message, context)
            return self._durably(
                message, context, str(state_dir), context.node_id if client is None else client
            )

    def _durably(self, message: Message, context: Context, state_dir: str, client: int) -> Message:
        from turnout.client.node.journal import Entry, journals

        config = message.content.get(keys.CONFIG)
        told: Mapping[str, Any] = config if isinstance(config, ConfigRecord) else {}
        server_round = _whole(told, keys.SERVER_ROUND, 0)
        base = _whole(told, keys.BASE_ROUND, server_round - 1)
        journal = journals(state_dir, always=False)(str(told.get(keys.RUN, context.run_id)), client)
        context.state = isolated(journal.state(base))
        reply = self.app(message, context)
        if message.metadata.message_type.startswith("train") and not reply.has_error():
            entry = Entry("", base, isolated(context.state), None)
            journal.commit(server_round, entry, keep_round=_whole(told, keys.KEEP_ROUND, base))
        return reply


def client_of(context: Context) -> int | None:
    """Return the client that this node is, by its node config; None when that does not say."""
    for name in (_CLIENT_ID, _PARTITION_ID):
        said = context.node_config.get(name)
        if said is None:
            continue
        if not isinstance(said, int) or isinstance(said, bool) or said < 0:
            raise ConfigError(f"{name}={said!r} in the node's config; use a whole number >= 0.")
        return said
    return None


def _whole(told: Mapping[str, Any], name: str, otherwise: int) -> int:
    said = told.get(name, otherwise)
    if not isinstance(said, int) or isinstance(said, bool):
        raise ConfigError(f"{name}={said!r} in the request's config; it must be a whole number.")
    return max(0, said)
