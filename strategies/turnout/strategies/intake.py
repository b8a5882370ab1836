"""The gate: what arrives from the network is checked here before a strategy sees it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict

from turnout.allocation import Allocator, KeptPart, ModelView, widened
from turnout.strategies.coordinates import Coordinates
from turnout.strategies.exact_sum import ExactSum
from turnout.strategies.measure import check_range, extremes, measured
from turnout.strategies.rounds import ClientReport, Instruction, Reply
from turnout.wire import LayoutError, NDArray, ParameterLayout, ReplyRejected, as_array, keys, view
from turnout.wire.flower import REPLY_REFUSED, records_of
from turnout.wire.step_counts import STEP_COUNTS_STYPE, step_counts_view

# Such metrics can be weighted and added up without overflow.
_LARGEST_METRIC: Final = 1e250
_MAX_EXAMPLES: Final = 2**40
_MAX_METRICS: Final = 256
_MAX_METRIC_NAME: Final = 128


@dataclass(slots=True)
class Parcel:
    """A checked reply. ``update`` and ``vectors`` live in the intake's buffers until the next `open`.

    ``records`` are for the strategy to check.
    """

    client: int
    update: NDArray
    peak: float
    norm: float
    num_examples: int
    told: Instruction
    vectors: dict[str, NDArray]
    records: dict[str, ArrayRecord]
    buffers: dict[str, NDArray] | None
    loss: float
    seconds: float
    metrics: Mapping[str, float]

    def reply(self, row: int) -> Reply:
        """Return what the strategy folds, for the client in ``row`` of the register."""
        told = self.told
        return Reply(
            row,
            self.update,
            self.num_examples,
            self.peak,
            told.local_update,
            self.vectors,
            self.metrics,
            self.records,
            told,
        )


class Intake:
    """Checks the replies of one round against the layout and against what was asked.

    ``buffers`` hold a reply's vectors while it is folded. They are kept from round to round: the first pass
    over fresh memory takes several times as long as the check itself. A reply may leave out
    tensors of which ``unchanged`` says what they were when they were sent, and of those in ``kept`` all but
    that part. It may say by how many steps it moved those in ``received``, the tensors as they were sent.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        sent: NDArray,
        cohort: Mapping[int, Instruction],
        server_round: int,
        buffers: dict[str, NDArray] | None = None,
        *,
        coordinates: Coordinates | None = None,
        received: ArrayRecord | None = None,
        unchanged: ArrayRecord | None = None,
        kept: Mapping[str, KeptPart] | None = None,
    ) -> None:
        self._coordinates = coordinates or Coordinates()
        self._layout = layout
        self._sent = sent
        self._received = ArrayRecord() if received is None else received
        self._unchanged = ArrayRecord() if unchanged is None else unchanged
        self._kept = kept or {}
        self._cohort = cohort
        self._round = str(server_round)
        self._answered: set[int] = set()
        self._claimed: set[int] = set()
        self._asked: list[Metadata] = []
        self._buffers = {} if buffers is None else buffers

    def role(self, node: int) -> str:
        """Return the local update that ``node`` was asked for."""
        return self._cohort[node].local_update if node in self._cohort else "none"

    def unanswered(self) -> list[int]:
        """Return the nodes that were asked and did not answer at all."""
        return [node for node in self._cohort if node not in self._answered]

    def asked(self, messages: Sequence[Message]) -> None:
        """Note the requests, whose ids tell which node an error from the engine itself is about."""
        self._asked = [message.metadata for message in messages]

    def sender(self, message: Message) -> int:
        """Return the node that ``message`` is about.

        Flower's SuperLink reports a lost node under its own id; the request it could not deliver tells whose.
        """
        metadata = message.metadata
        if message.has_error() and metadata.src_node_id not in self._cohort:
            for request in self._asked:
                if request.message_id and request.message_id == metadata.reply_to_message_id:
                    return request.dst_node_id
        return metadata.src_node_id

    def answered(self, node: int) -> None:
        """Note that ``node`` answered, by a way of its own."""
        self._answered.add(node)

    def claim(self, node: int, client: int) -> None:
        """Note that ``node`` speaks for ``client``; a second claim in one round is refused."""
        if client in self._claimed:
            raise ReplyRejected(
                "duplicate", f"node {node} replied for client {client}, which has replied already."
            )
        self._claimed.add(client)

    def open(self, message: Message) -> Parcel:
        """Return the checked content of ``message``; raise `ReplyRejected` saying what is wrong with it."""
        metadata = message.metadata
        node = self.sender(message)
        instruction = self._cohort.get(node)
        if instruction is None:
            raise ReplyRejected("unknown-client", f"node {node} replied without having been asked.")
        if metadata.group_id and metadata.group_id != self._round:
            raise ReplyRejected("late", f"node {node} replied to round {metadata.group_id}.")
        if node in self._answered:
            raise ReplyRejected("duplicate", f"node {node} replied twice.")
        self._answered.add(node)
        if message.has_error():
            error = message.error
            if error.code == REPLY_REFUSED:
                slug, _, detail = (error.reason or "refused").partition(": ")
                raise ReplyRejected(slug, detail)
            raise ReplyRejected("client-error", error.reason or f"error code {error.code}")
        content = message.content
        metrics = read_metrics(content)
        examples = _whole(metrics, keys.NUM_EXAMPLES, 1, _MAX_EXAMPLES)
        client = node  # Unsigned 64-bit, unlike what a metric can say.
        if keys.CLIENT_ID in metrics:
            client = _whole(metrics, keys.CLIENT_ID, -(2**63), 2**63 - 1)
        try:
            arrays = records_of(content, ArrayRecord)
            vectors, records, buffers = dict[str, NDArray](), dict[str, ArrayRecord](), None
            if instruction.reply == "records":
                update, peak, norm = self._sent[:0], 0.0, math.nan
                records = {name: self._record(name, arrays) for name in instruction.extras}
            else:
                update, peak, norm = self._vector(arrays, instruction)
                vectors = {name: self._extra(name, arrays) for name in instruction.extras}
            if self._layout.buffers and instruction.reply in ("update", "model"):
                buffers = self._layout.buffers_of(arrays[keys.ARRAYS])
        except LayoutError as error:
            raise ReplyRejected("wrong-layout", str(error)) from error
        for name, value in (buffers or {}).items():
            check_range(name, *extremes(value))
        return Parcel(
            client,
            update,
            peak,
            norm,
            examples,
            instruction,
            vectors,
            records,
            buffers,
            float(metrics.get(keys.TRAIN_LOSS, math.nan)),
            float(metrics.get(keys.TRAIN_SECONDS, math.nan)),
            metrics,
        )

    def _vector(
        self, arrays: Mapping[str, ArrayRecord], instruction: Instruction
    ) -> tuple[NDArray, float, float]:
        """Return the reply's vector as the instruction reads it, its largest absolute value and norm."""
        name = keys.GRADIENT if instruction.reply == "gradient" else keys.ARRAYS
        if name not in arrays:
            raise LayoutError(
                f"record {name!r} is missing; a {instruction.local_update!r} reply must have it."
            )
        record: Mapping[str, Array] = arrays[name]
        if name == keys.ARRAYS:
            whole, given = self._unchanged, self._moved(record)
            record = {**whole, **widened(given, self._kept, lambda tensor: view(whole[tensor]))}
        vector = self._layout.flatten(record, with_buffers=name == keys.ARRAYS)
        vector = self._coordinates.record_inside(name, vector)
        minus = self._sent if instruction.reply == "update" else None
        peak, norm = measured(vector, minus, out := self._buffer(keys.ARRAYS), name)
        return out, peak, norm

    def _moved(self, record: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``record`` with the tensors of which it says by how many steps they moved."""
        made = dict(record.items())
        for name, array in made.items():
            if array.stype == STEP_COUNTS_STYPE and name in self._received:
                made[name] = as_array(step_counts_view(array, view(self._received[name])))
        return made

    @staticmethod
    def _record(name: str, arrays: Mapping[str, ArrayRecord]) -> ArrayRecord:
        if name not in arrays:
            raise LayoutError(f"record {name!r} is missing; the strategy needs it.")
        return arrays[name]

    def _extra(self, name: str, arrays: Mapping[str, ArrayRecord]) -> NDArray:
        vector = self._layout.flatten(self._record(name, arrays), with_buffers=False)
        vector = self._coordinates.record_inside(name, vector)
        measured(vector, None, out := self._buffer(name), name)
        return out

    def _buffer(self, name: str) -> NDArray:
        if name not in self._buffers:
            self._buffers[name] = np.empty_like(self._sent)
        return self._buffers[name]

    @staticmethod
    def mean_evaluation(replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean of the clients' evaluation metrics by examples, independent of order."""
        rows: list[tuple[int, int, Mapping[str, float]]] = []
        for message in replies:
            if message.has_error():
                continue
            try:
                metrics = read_metrics(message.content)
                examples = _whole(metrics, keys.NUM_EXAMPLES, 1, _MAX_EXAMPLES)
            except ReplyRejected:
                continue
            rows.append((message.metadata.src_node_id, examples, metrics))
        return MetricRecord(dict(_means(rows))) if rows else None


class BufferMean:
    """Plain mean over the participants of the tensors that travel beside the vector.

    ``values`` are those in force; ``sent`` what they were when the round opened.
    """

    def __init__(self, layout: ParameterLayout, values: Mapping[str, NDArray]) -> None:
        self.values = self.sent = {name: np.array(value) for name, value in values.items()}
        # A sum's rounding is relative to its largest element, and a step count dwarfs a running mean.
        self._sums = {spec.name: ExactSum(np.zeros(spec.shape).reshape(-1)) for spec in layout.buffers}
        self._count = 0

    def reset(self) -> None:
        """Open a round."""
        self._count, self.sent = 0, dict(self.values)
        for total in self._sums.values():
            total.reset()

    def add(self, buffers: Mapping[str, NDArray]) -> None:
        """Add one participant's buffers."""
        self._count += 1
        for name, total in self._sums.items():
            total.add(np.asarray(buffers[name], np.float64).reshape(-1))

    def finish(self) -> None:
        """Set ``values`` to the mean; integers are rounded to the nearest. Nobody came: unchanged."""
        if not self._count:
            return
        for name, total in self._sums.items():
            old = self.values[name]
            mean = (total.value() / self._count).reshape(old.shape)
            # An array even if it is a scalar: a checkpoint keeps an array's dtype.
            self.values[name] = np.asarray(np.rint(mean) if old.dtype.kind in "iub" else mean, old.dtype)

    def allocate(self, allocator: Allocator, server_round: int, tensors: dict[str, NDArray]) -> None:
        """Let ``allocator`` change ``tensors`` and ``values``; what it decides it finds as it was sent."""
        self.values = {
            name: np.array(self.sent[name] if allocator.decides(name) else value)
            for name, value in self.values.items()
        }
        allocator.allocate(server_round, ModelView(tensors, self.values))


def read_metrics(content: RecordDict) -> dict[str, float]:
    """Return the scalar metrics of a reply; raise `ReplyRejected` when there are none, or far too many."""
    records = records_of(content, MetricRecord)
    if keys.METRICS not in records and len(records) != 1:
        raise ReplyRejected("no-metrics", f"record {keys.METRICS!r} is missing.")
    record = records[keys.METRICS] if keys.METRICS in records else next(iter(records.values()))
    if len(record) > _MAX_METRICS:
        raise ReplyRejected("too-many-metrics", f"{len(record)} metrics, at most {_MAX_METRICS} are read.")
    for name in record:
        # Names are stored and shown: no control characters, no marks that turn the text around.
        if len(name) > _MAX_METRIC_NAME or not name.isprintable():
            raise ReplyRejected(
                "bad-metric",
                f"metric name {name[:40]!r}: use at most {_MAX_METRIC_NAME} printable characters.",
            )
    # Integers of any length are metrics to Flower as long as they do not travel.
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**64)
    }


def mean_metrics(
    rows: Sequence[tuple[int, int, Mapping[str, float]]], reports: Sequence[ClientReport]
) -> MetricRecord:
    """Return training metrics averaged by examples, and how many clients had which outcome."""
    outcomes = {"participants": "ok", "failed": "failed", "rejected": "rejected", "missing": "missing"}
    counts = {name: sum(r.outcome == outcome for r in reports) for name, outcome in outcomes.items()}
    return MetricRecord({**_means(rows), **counts})


def _means(rows: Sequence[tuple[int, int, Mapping[str, float]]]) -> dict[str, float]:
    skipped = {keys.NUM_EXAMPLES, keys.CLIENT_ID}
    ordered = sorted(rows, key=lambda row: row[0])
    names = sorted({name for _, _, metrics in ordered for name in metrics} - skipped)
    means = {}
    for name in names:
        pairs = [(m[name], n) for _, n, m in ordered if name in m and abs(m[name]) < _LARGEST_METRIC]
        if pairs:
            means[name] = math.fsum(v * n for v, n in pairs) / sum(n for _, n in pairs)
    return means


def _whole(metrics: Mapping[str, float], name: str, low: int, high: int) -> int:
    value = metrics.get(name)
    if value is None:
        raise ReplyRejected("bad-metric", f"metric {name!r} is missing.")
    # A NaN or infinity fails the comparison, so that is_integer is asked of finite numbers only.
    if not (low <= value <= high and float(value).is_integer()):
        raise ReplyRejected(
            "bad-metric", f"metric {name!r} must be a whole number in [{low}, {high}], got {value!r}."
        )
    return int(value)
