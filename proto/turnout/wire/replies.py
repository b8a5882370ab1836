"""What a client answers, as it travels: a head with the metrics and layouts, and one body of raw arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from google.protobuf.message import DecodeError

from turnout.v1 import fleet_pb2 as pb
from turnout.wire import keys
from turnout.wire.arrays import NDArray
from turnout.wire.checksums import checksum
from turnout.wire.errors import LayoutError
from turnout.wire.flower import record_dict
from turnout.wire.packing import BlockLayout, pack, unpack
from turnout.wire.scalars import encode_scalars, scalar_record
from turnout.wire.text import harmless

INLINE_BYTES: Final = 16 << 10
"""A reply's body up to this size comes with its head and needs no upload slot."""
_ALIGNMENT: Final = 64
_MAX_RECORDS: Final = 32
_MAX_ERROR: Final = 8192
_MAX_NAME: Final = 128


@dataclass(frozen=True, slots=True)
class EncodedReply:
    """A finished reply, ready to be offered and sent. ``pieces`` are views of the reply's arrays."""

    head: bytes
    pieces: tuple[memoryview, ...]
    size: int
    checksum: int
    num_examples: int | None = None


def encode_reply(content: RecordDict, layouts: Mapping[bytes, BlockLayout]) -> EncodedReply:
    """Encode ``content``; layouts in ``layouts`` (those of the request) are named by digest only.

    Raises `LayoutError` for content that cannot travel.
    """
    head, pieces, end = pb.ReplyHead(), list[memoryview](), 0
    examples: int | None = None
    for name, record in content.items():
        entry = head.records.add(name=name)
        if isinstance(record, ArrayRecord):
            layout, parts = pack(record)
            entry.arrays.layout_digest = layout.digest
            entry.arrays.size = layout.size
            if layout.digest not in layouts:
                entry.arrays.layout.CopyFrom(layout.message)
            begin = _aligned(end)
            if begin > end:
                pieces.append(memoryview(bytes(begin - end)))
            pieces += parts
            end = begin + layout.size
        elif isinstance(record, MetricRecord):
            entry.metrics.CopyFrom(encode_scalars(record))
            said = record.get(keys.NUM_EXAMPLES)
            examples = said if isinstance(said, int) else examples
        else:
            entry.config.CopyFrom(encode_scalars(record))
    return EncodedReply(head.SerializeToString(), tuple(pieces), end, checksum(pieces), examples)


def encode_failure(reason: str) -> EncodedReply:
    """Return the reply of a client whose app failed."""
    return EncodedReply(pb.ReplyHead(error=reason[-_MAX_ERROR:] or "failed").SerializeToString(), (), 0, 0)


@dataclass(slots=True)
class ReplyPlan:
    """A checked head: what the body must hold before the reply can be read."""

    error: str = ""
    size: int = 0
    blocks: dict[str, tuple[BlockLayout, int]] = field(default_factory=dict)
    scalars: dict[str, MetricRecord | ConfigRecord] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def runs(self) -> list[tuple[str, int, int]]:
        """Return the stretches of the body that hold floats, as `BlockLayout.runs` does."""
        return [
            (kind, base + begin, base + end)
            for layout, base in self.blocks.values()
            for kind, begin, end in layout.runs
        ]

    def content(self, body: NDArray) -> RecordDict:
        """Return the reply's records as views of ``body``."""
        records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
        for name in self.order:
            if name in self.blocks:
                layout, base = self.blocks[name]
                records[name] = unpack(layout, body[base : base + layout.size])
            else:
                records[name] = self.scalars[name]
        return record_dict(records)


def parse_reply(
    head: bytes, find: Callable[[bytes], BlockLayout | None], *, max_bytes: int, size: int
) -> ReplyPlan:
    """Check a reply's head; ``find`` returns the request's layouts by digest.

    Raises `LayoutError` when it cannot be right, without having allocated anything for the body.
    """
    try:
        message = pb.ReplyHead.FromString(head)
    except (DecodeError, ValueError) as error:
        raise LayoutError(f"the reply's head is unreadable: {error}") from error
    plan = ReplyPlan(error=harmless(message.error[:_MAX_ERROR]))
    if len(message.records) > _MAX_RECORDS:
        raise LayoutError(f"the reply has {len(message.records)} records, at most {_MAX_RECORDS} are read.")
    end = 0
    for record in message.records:
        kind = record.WhichOneof("kind")
        if record.name in plan.order or len(record.name) > _MAX_NAME or kind is None:
            raise LayoutError(
                f"record {record.name[:64]!r} is empty, or its name comes twice or is too long."
            )
        plan.order.append(record.name)
        if kind == "arrays":
            layout = _layout(record.arrays, find)
            begin = _aligned(end)
            plan.blocks[record.name] = (layout, begin)
            end = begin + layout.size
        else:
            plan.scalars[record.name] = scalar_record(record)
    if end > max_bytes or end != size:
        raise LayoutError(
            f"the reply announces {size} bytes, its layouts need {end}, the limit is {max_bytes}."
        )
    plan.size = end
    return plan


def _layout(block: pb.ArrayBlock, find: Callable[[bytes], BlockLayout | None]) -> BlockLayout:
    known = find(block.layout_digest)
    if known is not None:
        return known
    if not block.HasField("layout"):
        raise LayoutError("the reply names a layout that the request did not have.")
    return BlockLayout.parse(block.layout)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
