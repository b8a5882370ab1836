"""A third-party Flower `Grid` in a few lines: real messages, scripted availability, any order of replies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid

from turnout.wire import as_array, keys, view
from turnout.wire.flower import Run, error_reply, local_run, reply, request

Client = Callable[[Message], Message | Iterable[Message] | None]
Order = Callable[[int, list[Message]], list[Message]]


class ScriptedGrid(Grid):
    """Delivers requests to ``clients`` (by node id) and their replies in the order that ``order`` says.

    ``available(server_round)`` are the nodes present. The grid counts rounds itself, ``exchanges`` calls of
    `send_and_receive` each, as a grid must that nobody tells. ``lazily`` yields replies one by one;
    ``through_bytes`` sends every message through Flower's protobuf serialisation.
    """

    def __init__(
        self,
        clients: dict[int, Client],
        available: Callable[[int], Sequence[int]] | None = None,
        *,
        order: Order = lambda server_round, replies: replies,
        lazily: bool = False,
        through_bytes: bool = False,
        first_round: int = 1,
        exchanges: int = 1,
    ) -> None:
        self.clients = clients
        self.available = available or (lambda _: list(clients))
        self.order = order
        self.lazily = lazily
        self.through_bytes = through_bytes
        self.exchanges = exchanges
        self.calls = (first_round - 1) * exchanges
        self.sent: list[list[Message]] = []

    @property
    def server_round(self) -> int:
        return self.calls // self.exchanges + 1

    @property
    def run(self) -> Run:
        return local_run()

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return request(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return iter(self.available(self.server_round))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        requests = list(messages)
        self.sent.append(requests)
        replies = [answer for message in requests for answer in self._ask(message)]
        replies = self.order(self.server_round, replies)
        self.calls += 1
        return iter(replies) if self.lazily else replies

    def _ask(self, message: Message) -> Iterator[Message]:
        answer = self.clients[message.metadata.dst_node_id](self._carried(message))
        answers = [] if answer is None else [answer] if isinstance(answer, Message) else answer
        yield from (self._carried(item) for item in answers)

    def _carried(self, message: Message) -> Message:
        if not self.through_bytes:
            return message
        proto = message_to_proto(message)
        return message_from_proto(type(proto).FromString(proto.SerializeToString()))


class SyntheticClient:
    """Replies to any local update with what it received plus numbers made of (seed, client, round) only.

    ``key`` is the id it names in its metrics; None names none.
    """

    def __init__(
        self, key: int | None, *, number: int, examples: int = 1, seed: int = 0, scale: float = 0.1
    ) -> None:
        self.key = key
        self.number = number
        self.examples = examples
        self.seed = seed
        self.scale = scale

    def __call__(self, message: Message) -> Message | Iterable[Message] | None:
        return reply(self.content(message), to=message)

    def content(self, message: Message) -> RecordDict:
        config, received = message.content[keys.CONFIG], message.content[keys.ARRAYS]
        server_round = int(config[keys.SERVER_ROUND])
        rng = np.random.default_rng([self.seed, self.number, server_round])
        names = [name for name, array in received.items() if is_parameter(name, array)]
        content = RecordDict()
        if gives_gradient(config):
            content[keys.GRADIENT] = self.noise(rng, received, names)
        else:
            trained = ArrayRecord()
            for name, array in received.items():
                x = view(array)
                if name in names:
                    y = x + self.scale * rng.standard_normal(x.shape)
                    if keys.INITIAL in message.content:
                        y = y + 0.1 * view(message.content[keys.INITIAL][name])
                else:
                    y = x + rng.integers(1, 4, x.shape) / (1 if x.dtype.kind == "i" else 7)
                trained[name] = as_array(np.asarray(y, x.dtype))
            content[keys.ARRAYS] = trained
        if config.get(keys.LOCAL_UPDATE) == "scaffold":
            content[keys.CONTROL] = self.noise(rng, received, names)
        content[keys.METRICS] = self.metrics(server_round)
        if config.get(keys.LOCAL_UPDATE) == "bo-rep-local-upper":
            content[keys.METRICS][keys.MOMENTUM_SQUARE] = float(self.number)
        return content

    def noise(self, rng: np.random.Generator, like: ArrayRecord, names: list[str]) -> ArrayRecord:
        record = ArrayRecord()
        for name in names:
            x = view(like[name])
            record[name] = as_array(np.asarray(rng.standard_normal(x.shape), x.dtype))
        return record

    def metrics(self, server_round: int) -> MetricRecord:
        metrics = MetricRecord({keys.NUM_EXAMPLES: self.examples, keys.TRAIN_LOSS: 1.0 / server_round})
        if self.key is not None:
            metrics[keys.CLIENT_ID] = self.key
        return metrics


def gives_gradient(config: Mapping[str, object]) -> bool:
    """Whether the reply to a request is a gradient, and not a model."""
    asked = config.get(keys.LOCAL_UPDATE)
    return asked in ("anchor", "bo-rep") or (asked == "bo-rep-local-upper" and not config[keys.REFRESH])


def is_parameter(name: str, array: Array) -> bool:
    return array.dtype.startswith("float") and not name.startswith("bn.running")


def failing(message: Message) -> Message:
    """A client whose app raises."""
    return error_reply(message, "RuntimeError: out of memory")


def silent(message: Message) -> None:
    """A client that never answers."""


def shuffled(seed: int) -> Order:
    """Replies in another order each round."""

    def order(server_round: int, replies: list[Message]) -> list[Message]:
        permutation = np.random.default_rng([seed, server_round]).permutation(len(replies))
        return [replies[i] for i in permutation]

    return order
