"""The gate: what arrives from the network is checked here before a strategy sees it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from turnout.strategies.blockwise import BLOCK, blockwise
from turnout.strategies.exact_sum import ExactSum
from turnout.strategies.rounds import ClientReport, Instruction, Reply
from turnout.wire import LayoutError, NDArray, ParameterLayout, ReplyRejected, keys
from turnout.wire.flower import records_of

# A float32 sum of squares of such values still is finite, and no honest model comes near.
_LARGEST: Final = 1e18
_MAX_EXAMPLES: Final = 2**40
_MAX_METRICS: Final = 256


@dataclass(slots=True)
class Parcel:
    """A checked reply. ``update`` lives in the intake's buffer until the next `Intake.open`."""

    client: int
    update: NDArray
    peak: float
    norm: float
    num_examples: int
    role: str
    vectors: dict[str, NDArray]
    buffers: dict[str, NDArray] | None
    loss: float
    seconds: float
    metrics: Mapping[str, float]

    def reply(self, row: int) -> Reply:
        """Return what the strategy folds, for the client in ``row`` of the register."""
        return Reply(row, self.update, self.num_examples, self.peak, self.role, self.vectors)


class Intake:
    """Checks the replies of one round against the layout and against what was asked."""

    def __init__(
        self, layout: ParameterLayout, sent: NDArray, cohort: Mapping[int, Instruction], server_round: int
    ) -> None:
        self._layout = layout
        self._sent = sent
        self._cohort = cohort
        self._round = str(server_round)
        self._answered: set[int] = set()
        self._rows: set[int] = set()
        self._staging = np.empty_like(sent)

    def role(self, node: int) -> str:
        """Return the local update that ``node`` was asked for."""
        return self._cohort[node].local_update if node in self._cohort else "none"

    def unanswered(self) -> list[int]:
        """Return the nodes that were asked and did not answer at all."""
        return [node for node in self._cohort if node not in self._answered]

    def claim(self, node: int, row: int) -> None:
        """Note that ``node`` speaks for client ``row``; a second claim in one round is refused."""
        if row in self._rows:
            raise ReplyRejected("duplicate", f"node {node} replied for a client that has replied already.")
        self._rows.add(row)

    def open(self, message: Message) -> Parcel:
        """Return the checked content of ``message``; raise `ReplyRejected` saying what is wrong with it."""
        metadata = message.metadata
        node = metadata.src_node_id
        instruction = self._cohort.get(node)
        if instruction is None:
            raise ReplyRejected("unknown-client", f"node {node} replied without having been asked.")
        if metadata.group_id and metadata.group_id != self._round:
            raise ReplyRejected("late", f"node {node} replied to round {metadata.group_id}.")
        if node in self._answered:
            raise ReplyRejected("duplicate", f"node {node} replied twice.")
        self._answered.add(node)
        if message.has_error():
            raise ReplyRejected("client-error", message.error.reason or f"error code {message.error.code}")
        content = message.content
        metrics = read_metrics(content)
        examples = _whole(metrics, keys.NUM_EXAMPLES, 1, _MAX_EXAMPLES)
        client = _whole(metrics, keys.CLIENT_ID, -(2**63), 2**63 - 1, default=node)
        try:
            arrays = records_of(content, ArrayRecord)
            update, peak, norm = self._vector(arrays, instruction)
            vectors = {
                name: self._extra(name, record)
                for name, record in arrays.items()
                if name not in (keys.ARRAYS, keys.GRADIENT)
            }
            buffers = (
                self._layout.buffers_of(arrays[keys.ARRAYS])
                if self._layout.buffers and keys.ARRAYS in arrays
                else None
            )
        except LayoutError as error:
            raise ReplyRejected("wrong-layout", str(error)) from error
        if buffers is not None:
            for name, value in buffers.items():
                if not np.isfinite(value).all():
                    raise ReplyRejected("non-finite", f"buffer {name!r} holds NaN or infinity.")
        return Parcel(
            client,
            update,
            peak,
            norm,
            examples,
            instruction.local_update,
            vectors,
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
        record = arrays[name]
        vector = self._layout.flatten(record, with_buffers=name == keys.ARRAYS)
        minus = self._sent if instruction.reply == "update" else None
        return self._check(vector, minus, self._staging, name)

    def _extra(self, name: str, record: ArrayRecord) -> NDArray:
        vector = self._layout.flatten(record, with_buffers=False)
        return self._check(vector, None, np.empty_like(vector), name)[0]

    def _check(
        self, vector: NDArray, minus: NDArray | None, out: NDArray, name: str
    ) -> tuple[NDArray, float, float]:
        """Copy ``vector - minus`` to ``out`` block by block; refuse what is not finite or absurd."""

        def piece(begin: int, end: int) -> list[tuple[float, float, float]]:
            figures = []
            for start in range(begin, end, BLOCK):
                stop = min(start + BLOCK, end)
                block = out[start:stop]
                if minus is None:
                    block[...] = vector[start:stop]
                else:
                    with np.errstate(invalid="ignore", over="ignore"):  # Inf - Inf: refused just below.
                        np.subtract(vector[start:stop], minus[start:stop], out=block)
                high, low = float(block.max()), float(block.min())
                if not (high < _LARGEST and low > -_LARGEST):  # False for NaN too.
                    if math.isfinite(high) and math.isfinite(low):
                        raise ReplyRejected("too-large", f"{name!r} holds values beyond {_LARGEST:g}.")
                    raise ReplyRejected("non-finite", f"{name!r} holds NaN or infinity.")
                figures.append((high, low, float(np.dot(block, block))))
            return figures

        figures = blockwise(vector.size, piece)
        largest = max(max(high, -low) for high, low, _ in figures)
        return out, largest, math.sqrt(math.fsum(squares for _, _, squares in figures))

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
    """Plain mean over the participants of the tensors that travel beside the vector."""

    def __init__(self, layout: ParameterLayout, values: Mapping[str, NDArray]) -> None:
        self.values = {name: np.array(value) for name, value in values.items()}
        self._specs = layout.buffers
        self._count = 0
        self._sum = ExactSum(np.zeros(sum(spec.size for spec in self._specs)))

    def reset(self) -> None:
        """Open a round."""
        self._sum.reset()
        self._count = 0

    def add(self, buffers: Mapping[str, NDArray]) -> None:
        """Add one participant's buffers."""
        if self._specs:
            flat = [np.asarray(buffers[spec.name], np.float64).reshape(-1) for spec in self._specs]
            self._sum.add(np.concatenate(flat))
            self._count += 1

    def finish(self) -> None:
        """Set ``values`` to the mean; integers are rounded to the nearest. Nobody came: unchanged."""
        if not self._count:
            return
        mean, offset = self._sum.value() / self._count, 0
        for spec in self._specs:
            block = mean[offset : offset + spec.size].reshape(spec.shape)
            dtype = self.values[spec.name].dtype
            self.values[spec.name] = (np.rint(block) if dtype.kind in "iub" else block).astype(dtype)
            offset += spec.size


def read_metrics(content: RecordDict) -> dict[str, float]:
    """Return the scalar metrics of a reply; raise `ReplyRejected` when there are none, or far too many."""
    records = records_of(content, MetricRecord)
    if keys.METRICS not in records and len(records) != 1:
        raise ReplyRejected("no-metrics", f"record {keys.METRICS!r} is missing.")
    record = records[keys.METRICS] if keys.METRICS in records else next(iter(records.values()))
    if len(record) > _MAX_METRICS:
        raise ReplyRejected("too-many-metrics", f"{len(record)} metrics, at most {_MAX_METRICS} are read.")
    return {name: value for name, value in record.items() if isinstance(value, (int, float))}


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
        pairs = [(m[name], n) for _, n, m in ordered if name in m and math.isfinite(m[name])]
        if pairs:
            means[name] = math.fsum(v * n for v, n in pairs) / sum(n for _, n in pairs)
    return means


def _whole(metrics: Mapping[str, float], name: str, low: int, high: int, default: int | None = None) -> int:
    value: Any = metrics.get(name, default)
    if value is None:
        raise ReplyRejected("bad-metric", f"metric {name!r} is missing.")
    if not (math.isfinite(value) and float(value).is_integer() and low <= value <= high):
        raise ReplyRejected("bad-metric", f"metric {name!r} must be a whole number >= {low}, got {value!r}.")
    return int(value)
