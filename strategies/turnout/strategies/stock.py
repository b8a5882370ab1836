"""Flower's own strategies in Turnout's rounds: checked replies, records, checkpoints, seeded choices.

A stock strategy keeps its algorithm; what is added is what every strategy here has. Replies are checked one
by one before the strategy sees them, and are handed to it as the list that it needs, in the requests' order.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from turnout.strategies.cohort import CohortGrid
from turnout.strategies.coordinates import Coordinates
from turnout.strategies.intake import Intake, Parcel, read_metrics
from turnout.strategies.loop import EvaluateFn
from turnout.strategies.rounds import Callback, Instruction, Reply
from turnout.strategies.stock_state import StockState
from turnout.strategies.streaming import StreamingStrategy
from turnout.wire import ConfigError, NDArray, ReplyRejected, keys, view
from turnout.wire.flower import array_record, record_dict, records_of
from turnout.wire.grid import LocalRunGrid

_TRAIN: Final = 1
_EVALUATE: Final = 2
_AGGREGATE: Final = 3


@dataclass(kw_only=True)
class StockStrategy(StreamingStrategy):
    """Runs one of Flower's own strategies as one of Turnout's: ``StockStrategy(stock=FedAdam(eta=0.1))``.

    The model keeps its dtypes, where Flower's FedOpt family lets it drift to float64. Everything that Flower
    draws from the global generators (which clients, which noise) is drawn from ones seeded by (seed, round),
    so that runs repeat; noise from a seed that others know protects nobody. A round with fewer clients than
    the strategy's minimum passes unused, where Flower waits.

    stock
        The strategy; clients evaluate if its ``fraction_evaluate`` is above 0.
    """

    stock: Strategy

    state_names: ClassVar[tuple[str, ...]] = ("own",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.stock, Strategy) or isinstance(self.stock, StreamingStrategy):
            raise ConfigError(
                f"stock={type(self.stock).__name__}: give a strategy of flwr.serverapp.strategy; "
                "Turnout's own run by themselves."
            )
        self.own = StockState(self.stock)

    @property
    def _sampler(self) -> FedAvg | None:
        """The part of the strategy that chooses clients: of a wrapper, the strategy inside."""
        inner = self.stock
        while not isinstance(inner, FedAvg) and isinstance(getattr(inner, "strategy", None), Strategy):
            inner = inner.strategy  # type: ignore[attr-defined]
        return inner if isinstance(inner, FedAvg) else None

    def setup(self) -> None:
        """Start the strategy from nothing. Raises `ConfigError` for a model that it cannot average."""
        whole = [spec.name for spec in self.layout.buffers if np.dtype(spec.dtype).kind in "iu"]
        if whole and self.own.scales_arrays:
            raise ConfigError(
                f"{self.name} of Flower cannot average integers, such as {whole[0]!r} of this model; take "
                "another strategy, or a model without batch normalisation."
            )
        if type(self.coordinates) is not Coordinates:
            raise ConfigError(
                f"{self.name} of Flower averages tensors as they travel, which an aggregation such as "
                "'exact-svd' does not; leave aggregation out, or take a strategy of Turnout's."
            )
        self.own.reset()

    # --- rounds ----------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy choose and ask its clients; nobody, when too few are there."""
        started = time.perf_counter()
        available = self._enter_round(server_round, arrays, grid)
        model = self.arrays()
        messages = self._messages(_TRAIN, server_round, model, config, available)
        self._attach_shared(messages, grid)
        sent = self.layout.flatten(model)
        self._asked = {m.metadata.dst_node_id: Instruction() for m in messages}
        self._intake = Intake(self.layout, sent, self._asked, server_round, self._lent)
        self._intake.asked(messages)
        self._buffers.reset()
        self.seconds["select"] = time.perf_counter() - started
        return messages

    def _attach_shared(self, messages: Sequence[Message], grid: Grid) -> None:
        """Add what adapters share."""
        by_node = {message.metadata.dst_node_id: message.content for message in messages}
        contents = self.shared.attached(by_node, always=isinstance(grid, CohortGrid))
        for message in messages:
            message.content = contents[message.metadata.dst_node_id]

    def _messages(
        self,
        purpose: int,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        available: Sequence[int],
    ) -> list[Message]:
        sampler, trains = self._sampler, purpose == _TRAIN
        if sampler is not None:
            least = sampler.min_train_nodes if trains else sampler.min_evaluate_nodes
            if len(available) < max(least, sampler.min_available_nodes):
                return []
        configure = self.stock.configure_train if trains else self.stock.configure_evaluate
        entries = ConfigRecord({**config, keys.SERVER_ROUND: server_round})
        with _seeded(self.seed, server_round, purpose):
            messages = list(configure(server_round, arrays, entries, _Present(available)))
        for message in messages:
            message.metadata.group_id = message.metadata.group_id or str(server_round)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check each reply as it comes, then let the strategy aggregate those that are right."""
        metrics: list[tuple[int, int, Mapping[str, float]]] = []
        kept: dict[int, Message] = {}
        started = time.perf_counter()
        for message in replies:
            node = self._intake.sender(message)
            try:
                parcel = self._intake.open(message)
                self._check_norm(parcel.norm)
                self._check_needed(parcel)
                self._intake.claim(node, parcel.client)
                row = self.clients.identify(node, parcel.client, server_round)
                report = self.accept(server_round, parcel.reply(row))
            except ReplyRejected as refused:
                self._refuse(node, refused)
                continue
            report.train_loss, report.train_seconds = parcel.loss, parcel.seconds
            report.update_norm, report.metrics = parcel.norm, parcel.metrics
            metrics.append((report.client, parcel.num_examples, parcel.metrics))
            self.shared.received(node)
            kept[node] = message
        self._aggregate(server_round, [kept[node] for node in self._asked if node in kept])
        return self._close_round(server_round, metrics, started)

    def _check_needed(self, parcel: Parcel) -> None:
        """Refuse a reply without the metrics that the strategy computes with."""
        for name in self.own.needed_metrics:
            if name not in parcel.metrics:
                raise ReplyRejected("bad-metric", f"metric {name!r} is missing; {self.name} needs it.")

    def _aggregate(self, server_round: int, replies: Sequence[Message]) -> None:
        self._next = self.x
        if not replies:
            return
        with _seeded(self.seed, server_round, _AGGREGATE), _cheap_collections():
            arrays, _ = self.stock.aggregate_train(server_round, _alike(replies))
        if arrays is None:  # Bulyan had too few replies, say.
            return
        new = {spec.name: _like(view(arrays[spec.name]), spec.dtype) for spec in self.layout.tensors}
        self._buffers.values = {
            spec.name: _like(view(arrays[spec.name]), spec.dtype) for spec in self.layout.buffers
        }
        vector = np.concatenate([new[spec.name].reshape(-1) for spec in self.layout.tensors])
        self._next = vector.astype(self.layout.dtype, copy=False)

    def fold(self, reply: Reply) -> float:
        """Return NaN: what a reply weighs is the strategy's affair."""
        return float("nan")

    def finish(self, server_round: int) -> NDArray:
        """Return the strategy's model."""
        new: NDArray = self._next
        return new

    def diagnostics(self) -> dict[str, float]:
        """Return the clipping norm of strategies that adapt it."""
        return self.own.numbers()

    @property
    def name(self) -> str:
        """The stock strategy's class."""
        return type(self.stock).__name__

    def state_dict(self) -> dict[str, Any]:
        """Return the state, under the stock strategy's name."""
        return super().state_dict() | {"stock": self.name}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Continue from a tree of `state_dict`; `CheckpointError` for another strategy's."""
        self.own.check(str(tree.get("stock", "")))
        super().load_state_dict(tree)

    def summary(self) -> None:
        """Log the strategy's settings, as Flower does."""
        self.stock.summary()

    # --- evaluation by the clients ---------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy choose who evaluates."""
        messages = self._messages(_EVALUATE, server_round, arrays, config, list(grid.get_node_ids()))
        self._attach_shared(messages, grid)
        return messages

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        *,
        resume_from: str | Path | Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Result:
        """Run as every strategy does; clients evaluate if the stock strategy would ask them to."""
        sampler = self._sampler
        if evaluate_config is None and sampler is not None and sampler.fraction_evaluate > 0:
            evaluate_config = ConfigRecord()
        return super().start(
            grid,
            initial_arrays,
            num_rounds,
            timeout,
            train_config,
            evaluate_config,
            evaluate_fn,
            resume_from=resume_from,
            callbacks=callbacks,
        )


class _Present(LocalRunGrid):
    """What a stock strategy sees of the engine: who is there in this round; nothing can be sent."""

    def __init__(self, nodes: Sequence[int]) -> None:
        super().__init__()
        self._nodes = nodes

    def get_node_ids(self) -> list[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise self._not_here()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise self._not_here()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise self._not_here()

    @staticmethod
    def _not_here() -> ConfigError:
        return ConfigError(
            "a stock strategy that sends messages by itself cannot be wrapped in StockStrategy; call its own "
            "start(grid, ...)."
        )


@contextmanager
def _seeded(seed: int, server_round: int, purpose: int) -> Iterator[None]:
    """Seed the global generators, from which Flower draws, and put them back."""
    python, numpy = random.getstate(), np.random.get_state()
    first, second = np.random.SeedSequence([seed, server_round, purpose]).generate_state(2)
    try:
        random.seed(int(first))
        np.random.seed(int(second))
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _cheap_collections() -> Iterator[None]:
    """Leave what exists out of garbage collections: Bulyan and QFedAvg ask for a full one for each reply."""
    if gc.get_freeze_count():  # Frozen by somebody else, who must not find it thawed.
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _alike(replies: Sequence[Message]) -> list[Message]:
    """Return the replies with the model and the metrics that all of them have, which Flower insists on."""
    metrics = [read_metrics(message.content) for message in replies]
    shared = [name for name in metrics[0] if all(name in other for other in metrics)]
    for message, numbers in zip(replies, metrics, strict=True):
        # A record of its own: some strategies take the arrays out of the reply's.
        model = array_record(dict(records_of(message.content, ArrayRecord)[keys.ARRAYS].items()))
        message.content = record_dict(
            {keys.ARRAYS: model, keys.METRICS: MetricRecord({name: numbers[name] for name in shared})}
        )
    return list(replies)


def _like(values: NDArray, dtype: Any) -> NDArray:
    whole = np.dtype(dtype).kind in "iub"
    return np.asarray(np.rint(values) if whole else values).astype(dtype, copy=False)
