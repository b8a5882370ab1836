"""The base of every strategy: replies are checked and folded one by one as they arrive.

Here an `Algorithm` meets Flower's ``Strategy`` interface: messages, refusal of bad replies, buffers beside
the vector, the round loop. However many clients reply, one reply is held at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from turnout.allocation import Allocator, KeptPart, narrowed
from turnout.strategies.algorithm import Algorithm
from turnout.strategies.carried import CarriedVectors
from turnout.strategies.checks import names, number
from turnout.strategies.cohort import Batch, Cohort, CohortGrid, CohortPart
from turnout.strategies.coordinates import Coordinates
from turnout.strategies.intake import BufferMean, Intake, mean_metrics
from turnout.strategies.loop import EvaluateFn, run_rounds
from turnout.strategies.rounds import Callback, ClientReport, Reply
from turnout.strategies.shared_state import SharedState
from turnout.wire import CheckpointError, NDArray, ParameterLayout, ReplyRejected, keys, view
from turnout.wire.flower import request

log = logging.getLogger("turnout.strategies")


@dataclass(kw_only=True)
class StreamingStrategy(Algorithm, Strategy):
    """An `Algorithm` as a Flower strategy: for any ``Grid`` and ``ClientApp``.

    Replies may come in any order, as a list or one by one, with errors or missing ones among them; the result
    is the same to the bit.

    max_update_norm
        A reply whose vector (update, model or gradient, as it is asked for) has a larger Euclidean norm is
        refused with the reason ``norm``: a bound on what one client can do. None refuses none.
    carried_vectors
        Records, laid out as the parameters are, that every reply must have; clients get their mean over the
        participants, by examples, with the next model. ``optimizer_state = "send"`` of an experiment's
        ``[client]`` sets it.
    """

    max_update_norm: float | None = None
    carried_vectors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_update_norm is not None:
            number("max_update_norm", self.max_update_norm, "a positive number", above=0.0)
        names("carried_vectors", self.carried_vectors)
        self._layout: ParameterLayout | None = None
        self.coordinates = Coordinates()
        self.shared = SharedState()
        #: Decides between rounds what clients may train, for an adapter that needs it.
        self.allocator: Allocator | None = None
        #: Whether clients may leave tensors out that they did not change, and know of masks.
        self.partial_replies = False

    def state_dict(self) -> dict[str, Any]:
        """Return the algorithm's state and the buffers."""
        state = super().state_dict()
        if self._layout:
            state |= {"buffers": dict(self._buffers.values), "layout": self._layout.digest}
            state |= {"coordinates": self.coordinates.state_dict(), "shared": self.shared.state_dict()}
            if self.carried_vectors:
                state["carried"] = self._carried.state_dict()
        return state

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Continue from a tree of `state_dict`; the model must be known (`adopt`, or `prepare`)."""
        if self._layout and tree["layout"] != self._layout.digest:
            raise CheckpointError(
                "checkpoint is of a model with other names, shapes or dtypes than this run's."
            )
        super().load_state_dict(tree)
        if self._layout:
            self._buffers.values = {name: np.array(value) for name, value in tree["buffers"].items()}
            self.coordinates.decided(self._buffers.values)
            self.shared.load_state_dict(tree.get("shared", {}))
            self.coordinates.load_state_dict(tree.get("coordinates", {}))  # May ask for what is shared.
            self._carried.load_state_dict(tree.get("carried", {"rounds": 0, "means": {}}))

    @property
    def folds_cohorts(self) -> bool:
        """Whether replies may come in bulk: no coordinates, shared state or messages of an own kind."""
        own, base = type(self), StreamingStrategy
        if type(self.coordinates) is not Coordinates or self.shared:
            return False
        return own.configure_train is base.configure_train and own.aggregate_train is base.aggregate_train

    @property
    def layout(self) -> ParameterLayout:
        """The model's layout, known from the first `configure_train` on."""
        if self._layout is None:
            raise RuntimeError("the strategy has no model yet; call start() or configure_train() first.")
        return self._layout

    def adopt(self, arrays: ArrayRecord) -> None:
        """Take ``arrays`` as the initial model."""
        self._layout = ParameterLayout.from_arrays(arrays)
        self._buffers = BufferMean(self._layout, self._layout.buffers_of(arrays))
        self._lent: dict[str, NDArray] = {}
        vector = self._layout.flatten(arrays)
        self.coordinates.bind(self._layout, vector)
        self.coordinates.decided(self._buffers.values)
        self.prepare(self.coordinates.inside(vector).copy())
        self.shared.begin()
        self._allocate(0)
        self._carried = CarriedVectors(self.carried_vectors, self.x)

    def arrays(self) -> ArrayRecord:
        """Return the global model with its buffers, without copying."""
        return self.layout.record(self.coordinates.outside(self.x), self._buffers.values)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the cohort and return one request per client, all sharing one copy of the model."""
        started = time.perf_counter()
        cohort = self._open_round(server_round, arrays, config, grid)
        by_node = {node: part.content for part in cohort.parts for node in part.nodes}
        always = isinstance(grid, CohortGrid)  # In this process nothing travels, and no client keeps it.
        contents = self.shared.attached(by_node, always=always)
        messages = [request(contents[n], dst_node_id=n, group_id=str(server_round)) for n in self._asked]
        self._intake.asked(messages)
        self.seconds["select"] = time.perf_counter() - started
        return messages

    def configure_cohort(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Cohort:
        """Choose the cohort, as `configure_train` does, without a message per client."""
        started = time.perf_counter()
        cohort = self._open_round(server_round, arrays, config, grid)
        self.seconds["select"] = time.perf_counter() - started
        return cohort

    def _open_round(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Cohort:
        available = self._enter_round(server_round, arrays, grid)
        # Clients get, and send, the carried vectors beside what the algorithm asks for.
        self._asked = self._carried.open_round(self.select(server_round, available))
        model = self.travelling(self.coordinates.outside(self.broadcast()))
        travelling = self.layout.flatten(model)  # What updates are relative to: 16-bit tensors round.
        self.coordinates.sent(travelling)
        sent, kept = self.coordinates.inside(travelling), self._kept()
        self._intake = Intake(
            self.layout,
            sent,
            self._asked,
            server_round,
            self._lent,
            coordinates=self.coordinates,
            received=model,
            unchanged=self.layout.record(travelling) if self.partial_replies else None,
            kept=kept,
        )
        self._buffers.reset()
        parts = self._parts(server_round, narrowed(model, kept), config)
        return Cohort(server_round, self.layout, sent, parts)

    def travelling(self, vector: NDArray) -> ArrayRecord:
        """Return the model ``vector``, in the messages' layout, as clients are sent it for training."""
        return self.layout.record(vector, self._buffers.values)

    def _kept(self) -> dict[str, KeptPart]:
        """Return by tensor what is left of it, both in requests and in replies."""
        allocator = self.allocator if self.partial_replies else None
        return {} if allocator is None else allocator.kept(self._buffers.values)

    def _enter_round(self, server_round: int, arrays: ArrayRecord, grid: Grid) -> list[int]:
        """Open the round for everyone the engine knows, and return the nodes that can be asked."""
        if self._layout is None or server_round == 1:
            self.adopt(arrays)
        else:
            self._take(arrays)
        available = list(grid.get_node_ids())
        self.clients.growing = not hasattr(grid, "registered_ids")
        registered = available if self.clients.growing else grid.registered_ids()  # type: ignore[attr-defined]
        self.seconds = {"fold": 0.0}
        self.begin_round(server_round, registered)
        for row in self.clients.register(available, server_round):
            self.on_register(row, server_round)
        return available

    def _take(self, arrays: ArrayRecord) -> None:
        """Go on from ``arrays`` if they are not the model that this strategy returned.

        Strategies that wrap another change the model between rounds (differential privacy adds noise).
        """
        given, own = self.layout.flatten(arrays), self.arrays()
        if not np.array_equal(given, self.layout.flatten(own)):
            self.x = self.coordinates.inside(given).copy()
        for name, value in self.layout.buffers_of(arrays).items():
            if not np.array_equal(value, view(own[name])):
                self._buffers.values[name] = value.copy()

    def _parts(self, server_round: int, model: ArrayRecord, config: ConfigRecord) -> list[CohortPart]:
        # Instructions are mostly one shared object: its records are made once for all who get it.
        parts: dict[int, CohortPart] = {}
        for node, instruction in self._asked.items():
            part = parts.get(id(instruction))
            if part is None:
                entries = {**config, **instruction.config}
                entries[keys.SERVER_ROUND] = server_round
                entries[keys.LOCAL_UPDATE] = instruction.local_update
                if self.partial_replies:
                    entries[keys.PARTIAL] = True
                content = RecordDict({keys.ARRAYS: model} if instruction.model else {})
                content[keys.CONFIG] = ConfigRecord(entries)
                for name, vector in instruction.vectors.items():
                    trimmed = self.partial_replies or name in self.carried_vectors
                    outside = self.coordinates.record_outside(name, vector)
                    content[name] = self.layout.record(outside, trimmed=trimmed)
                content.update(instruction.records)
                part = parts[id(instruction)] = CohortPart(content, instruction, [])
            part.nodes.append(node)
        return list(parts.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check and fold each reply as it comes, then return the new model and the mean training metrics."""
        metrics: list[tuple[int, int, Mapping[str, float]]] = []
        started = time.perf_counter()
        for message in replies:
            node = self._intake.sender(message)
            try:
                parcel = self._intake.open(message)
                self._check_norm(parcel.norm)
                self._intake.claim(node, parcel.client)
                row = self.clients.identify(node, parcel.client, server_round)
                self.on_register(row, server_round)
                report = self.accept(server_round, parcel.reply(row))
                self._carried.add(parcel.vectors, parcel.num_examples)
            except ReplyRejected as refused:
                self._refuse(node, refused)
                continue
            report.train_loss, report.train_seconds = parcel.loss, parcel.seconds
            report.update_norm, report.metrics = parcel.norm, parcel.metrics
            if parcel.buffers is not None:
                self._buffers.add(parcel.buffers)
            metrics.append((report.client, parcel.num_examples, parcel.metrics))
            self.shared.received(node)
            del message, parcel
        return self._close_round(server_round, metrics, started)

    def aggregate_cohort(
        self, server_round: int, batches: Iterable[Batch]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold replies that come in bulk and were checked where they were made; see `aggregate_train`."""
        metrics: list[tuple[int, int, Mapping[str, float]]] = []
        started = time.perf_counter()
        for batch in batches:
            for node, refused in batch.failures:
                self._intake.answered(node)
                self._refuse(node, refused)
            self.sum.lend(batch.vectors)
            for index, node in enumerate(batch.nodes):
                self._intake.answered(node)
                try:
                    report = self._fold_row(server_round, batch, index)
                except ReplyRejected as refused:
                    self._refuse(node, refused)
                    continue
                metrics.append((report.client, report.num_examples, report.metrics))
            folding = time.perf_counter()
            self.sum.settle()
            self.seconds["fold"] += time.perf_counter() - folding
        return self._close_round(server_round, metrics, started)

    def _fold_row(self, server_round: int, batch: Batch, index: int) -> ClientReport:
        node, norm = batch.nodes[index], batch.norms[index]
        self._check_norm(norm)
        row = self.clients.identify(node, node, server_round)
        self.on_register(row, server_round)
        extras = {name: rows[index] for name, rows in batch.extras.items()}
        examples, role = batch.examples[index], batch.instruction.local_update
        report = self.accept(
            server_round, Reply(row, self.sum.row(index), examples, batch.peaks[index], role, extras)
        )
        self._carried.add(extras, examples)
        if batch.buffers and batch.instruction.reply != "gradient":
            self._buffers.add({name: rows[index] for name, rows in batch.buffers.items()})
        loss, seconds = batch.losses[index], batch.seconds[index]
        report.train_loss, report.train_seconds, report.update_norm = loss, seconds, norm
        report.metrics = {
            keys.NUM_EXAMPLES: examples,
            keys.CLIENT_ID: node,
            keys.TRAIN_LOSS: loss,
            keys.TRAIN_SECONDS: seconds,
        }
        return report

    def _check_norm(self, norm: float) -> None:
        if self.max_update_norm is not None and norm > self.max_update_norm:
            raise ReplyRejected("norm", f"norm {norm:.6g} is above max_update_norm={self.max_update_norm:g}.")

    def _close_round(
        self, server_round: int, metrics: list[tuple[int, int, Mapping[str, float]]], started: float
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.seconds["train"] = time.perf_counter() - started
        started = time.perf_counter()
        for node in self._intake.unanswered():
            self._book(node, "missing", "")
        self._buffers.finish()
        self._carried.close_round()
        self.end_round(server_round)
        # The model is always one that clients can hold.
        self.x = self.coordinates.project(self.x)
        self.shared.end_round(self, server_round)
        self._allocate(server_round)
        self.seconds["finish"] = time.perf_counter() - started
        return self.arrays(), mean_metrics(metrics, self.reports)

    def _allocate(self, server_round: int) -> None:
        """Let the allocator, if there is one, change the model for the next round."""
        if self.allocator is None:
            return
        held = np.array(self.coordinates.outside(self.x))
        self._buffers.allocate(self.allocator, server_round, self.layout.split(held))
        self.x = self.coordinates.adopted(held)
        self.coordinates.decided(self._buffers.values)

    def _refuse(self, node: int, refused: ReplyRejected) -> None:
        outcome: Literal["failed", "rejected"] = "failed" if refused.reason == "client-error" else "rejected"
        log.warning("client %s %s: %s", node, outcome, refused)
        self.shared.failed(node)
        self._book(node, outcome, f"{refused.reason}: {refused}")

    def _book(self, node: int, outcome: Literal["failed", "rejected", "missing"], reason: str) -> None:
        try:
            key = self.clients.key(self.clients.row_of_node(node))
        except KeyError:
            key = node
        self.reports.append(ClientReport(key, outcome, reason, role=self._intake.role(node)))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every available client to evaluate the global model."""
        told = ConfigRecord({**config, keys.SERVER_ROUND: server_round})
        content = RecordDict({keys.ARRAYS: narrowed(arrays, self._kept()), keys.CONFIG: told})
        group, always = str(server_round), isinstance(grid, CohortGrid)
        contents = self.shared.attached(dict.fromkeys(grid.get_node_ids(), content), always=always)
        return [
            request(own, dst_node_id=node, message_type=MessageType.EVALUATE, group_id=group)
            for node, own in contents.items()
        ]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the clients' metrics averaged by examples; failed clients are left out."""
        return Intake.mean_evaluation(replies)

    def summary(self) -> None:
        """Log the strategy's name and hyperparameters."""
        values = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        log.info("%s(%s)", type(self).__name__, values)

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
        """Run the federation for ``num_rounds`` rounds in all, as Flower's ``start`` does.

        ``resume_from`` is a checkpoint file or its tree: the run goes on after its round, bit for bit.
        ``callbacks`` see each round's `RoundReport`. Clients evaluate only if ``evaluate_config`` is given.
        """
        return run_rounds(
            self,
            grid,
            initial_arrays,
            num_rounds=num_rounds,
            timeout=timeout,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=evaluate_fn,
            resume_from=resume_from,
            callbacks=callbacks,
        )
