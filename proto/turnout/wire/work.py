"""What a client is asked, as it travels: a head, shared by all who are asked the same, and payloads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from turnout.v1 import fleet_pb2 as pb
from turnout.wire import keys
from turnout.wire.arrays import NDArray
from turnout.wire.checksums import checksum
from turnout.wire.errors import LayoutError
from turnout.wire.flower import record_dict
from turnout.wire.framing import chunk_frames
from turnout.wire.packing import BlockLayout, pack, unpack
from turnout.wire.scalars import encode_scalars, scalar_record

INLINE_BYTES: Final = 64 << 10
"""Arrays up to this size travel inside the offer."""


@dataclass(slots=True, eq=False)
class Payload:
    """One broadcast block, cut into frames once and shared by every connection it is sent on.

    ``retired`` is set when nobody needs it any more.
    """

    id: int
    size: int
    frames: tuple[bytes, ...]
    retired: bool = False

    def retire(self) -> None:
        """Let the frames go; streams that are sending them stop."""
        self.retired, self.frames = True, ()

    def unless_retired(self) -> Iterator[bytes]:
        """Yield the frames, and stop when the payload is retired on the way."""
        for frame in self.frames:
            if self.retired:
                return
            yield frame


@dataclass(frozen=True, slots=True)
class EncodedWork:
    """A serialised `pb.Work` with what it refers to.

    ``partial`` says that the reply may leave out some of the arrays.
    """

    head: bytes
    payloads: tuple[Payload, ...]
    layouts: Mapping[str, BlockLayout]
    size: int
    partial: bool


class WorkEncoder:
    """Encodes the requests of one exchange; records and contents that several share are encoded once."""

    def __init__(self, payload_ids: itertools.count[int], *, server_round: int) -> None:
        self._ids = payload_ids
        self._round = server_round
        # The key objects are kept, so that an id() cannot come back as another object's.
        self._blocks: dict[int, tuple[ArrayRecord, pb.ArrayBlock, BlockLayout, Payload | None]] = {}
        self._works: dict[tuple[int, str, str], tuple[RecordDict, EncodedWork]] = {}

    def encode(self, content: RecordDict, message_type: str, group: str) -> EncodedWork:
        """Return the encoding of one request. Raises `LayoutError` for content that cannot travel."""
        key = (id(content), message_type, group)
        if key not in self._works:
            self._works[key] = (content, self._encode(content, message_type, group))
        return self._works[key][1]

    def _encode(self, content: RecordDict, message_type: str, group: str) -> EncodedWork:
        work = pb.Work(message_type=message_type, group=group, server_round=self._round)
        payloads: list[Payload] = []
        layouts: dict[str, BlockLayout] = {}
        size, partial = 0, False
        for name, record in content.items():
            entry = work.records.add(name=name)
            if isinstance(record, ArrayRecord):
                block, layout, payload = self._block(record)
                entry.arrays.CopyFrom(block)
                layouts[name] = layout
                size += layout.size
                if payload is not None and payload not in payloads:
                    payloads.append(payload)
            elif isinstance(record, MetricRecord):
                entry.metrics.CopyFrom(encode_scalars(record))
            else:
                entry.config.CopyFrom(encode_scalars(record))
                partial = partial or bool(record.get(keys.PARTIAL))
        return EncodedWork(work.SerializeToString(), tuple(payloads), layouts, size, partial)

    def _block(self, record: ArrayRecord) -> tuple[pb.ArrayBlock, BlockLayout, Payload | None]:
        known = self._blocks.get(id(record))
        if known is not None:
            return known[1:]
        layout, pieces = pack(record)
        block = pb.ArrayBlock(layout_digest=layout.digest, layout=layout.message, size=layout.size)
        block.checksum = checksum(pieces)
        payload = None
        if layout.size <= INLINE_BYTES:
            block.data = b"".join(pieces)
        else:
            block.payload = next(self._ids)
            payload = Payload(block.payload, layout.size, tuple(chunk_frames(block.payload, pieces)))
        self._blocks[id(record)] = (record, block, layout, payload)
        return block, layout, payload


@dataclass(slots=True)
class DecodedWork:
    """A request as the client's app sees it, and the layouts of its records by digest."""

    message_type: str
    group: str
    server_round: int
    content: RecordDict
    layouts: dict[bytes, BlockLayout]


def payload_ids(work: pb.Work) -> list[int]:
    """Return the payloads that ``work`` needs."""
    return [r.arrays.payload for r in work.records if r.WhichOneof("kind") == "arrays" and r.arrays.payload]


def decode_work(work: pb.Work, payload: Callable[[int], NDArray]) -> DecodedWork:
    """Return the request; ``payload`` returns a received block by id.

    Raises `LayoutError` for what does not fit together, a wrong checksum included.
    """
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
    layouts: dict[bytes, BlockLayout] = {}
    for record in work.records:
        kind = record.WhichOneof("kind")
        if kind == "arrays":
            block = record.arrays
            layout = BlockLayout.parse(block.layout)
            raw = payload(block.payload) if block.payload else aligned_copy(block.data)
            if layout.size != len(raw) or checksum([raw.data]) != block.checksum:
                raise LayoutError(f"record {record.name[:64]!r} arrived damaged: size or checksum differ.")
            layouts[block.layout_digest] = layout
            records[record.name] = unpack(layout, raw)
        else:
            records[record.name] = scalar_record(record)
    return DecodedWork(work.message_type, work.group, work.server_round, record_dict(records), layouts)


def aligned_copy(data: bytes) -> NDArray:
    """Return ``data`` as a writable uint8 array of its own, aligned for any element."""
    block: np.ndarray[Any, Any] = np.empty(len(data), np.uint8)
    block[:] = np.frombuffer(data, np.uint8)
    return block
