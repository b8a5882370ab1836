"""Mutated messages for every parser of bytes from the network or from disk, from one seed.

A run is reproduced by its seed; an input that lets a wrong exception out is kept in ``corpus/`` for good.
"""

from __future__ import annotations

import hashlib
import io
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from google.protobuf.message import DecodeError, EncodeError

from turnout.server.fleet.gate import check_identity, inline_body
from turnout.strategies.intake import Intake
from turnout.strategies.rounds import Instruction
from turnout.v1 import fleet_pb2 as pb
from turnout.wire import (
    CheckpointError,
    LayoutError,
    ParameterLayout,
    ReplyRejected,
    as_array,
    load_checkpoint,
    save_checkpoint,
    view,
)
from turnout.wire.flower import NUMPY_STYPE, reply, stamp
from turnout.wire.framing import (
    MAX_FRAME_BYTES,
    Chunk,
    FrameError,
    decode_client,
    decode_server,
    split_frames,
)
from turnout.wire.packing import BlockLayout, differing, unpack
from turnout.wire.replies import parse_reply
from turnout.wire.scalars import decode_scalars, encode_scalars
from turnout.wire.work import decode_work

TYPED: Final = (FrameError, LayoutError, ReplyRejected, CheckpointError)
CORPUS: Final = Path(__file__).parent / "corpus"
_MAX_REPLY: Final = 1 << 20
_EXTREMES: Final = (0, 1, 2, 127, 128, 2**31, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS: Final = (0.0, -0.0, float("nan"), float("inf"), 1e38, 1e308, 5e-324, -1.0, 2.0**62)
_TEXTS: Final = ("", "\0", "../../x", "a\nb", "\u202e", "x" * 70, "y" * 5000, "float32", "bfloat16",
                 "numpy.ndarray", "turnout.bf16", "arrays", "metrics", "num-examples", "client-id", "w",
                 "b")  # fmt: skip
Parser = Callable[[bytes], None]


# Parsers, each as the server or the node goes through it.


def client_frame(raw: bytes) -> None:
    message = decode_client(raw)
    if isinstance(message, Chunk):
        return
    for part in split_frames(message.batch, pb.ClientMessage) if message.HasField("batch") else [message]:
        if isinstance(part, pb.ClientMessage) and part.HasField("ready"):
            ready = part.ready
            plan = parse_reply(ready.head, find_layout, max_bytes=_MAX_REPLY, size=ready.size)
            check_identity(plan, 0)
            if not plan.error and (ready.data or not plan.size):
                gate(plan.content(inline_body(ready, plan)))


def server_frame(raw: bytes) -> None:
    message = decode_server(raw)
    if isinstance(message, Chunk):
        return
    for part in split_frames(message.batch, pb.ServerMessage) if message.HasField("batch") else [message]:
        if isinstance(part, pb.ServerMessage) and part.HasField("task"):
            work(part.task.work)
        elif isinstance(part, pb.ServerMessage) and part.HasField("welcome"):
            decode_scalars(part.welcome.run_config)


def reply_head(raw: bytes) -> None:
    plan = parse_reply(raw, find_layout, max_bytes=_MAX_REPLY, size=_announced(raw))
    check_identity(plan, 0)
    plan.runs()
    if not plan.error:
        gate(plan.content(np.zeros(plan.size, np.uint8)))


def _announced(raw: bytes) -> int:
    """Return the size that fits the head, so that it is not refused for the one announced beside it."""
    size = 0
    for record in _parsed(pb.ReplyHead, raw).records:
        if record.HasField("arrays"):
            found = find_layout(record.arrays.layout_digest) or BlockLayout.parse(record.arrays.layout)
            size = -(-size // 64) * 64 + found.size
    return size


def layout(raw: bytes) -> None:
    parsed = BlockLayout.parse(_parsed(pb.Layout, raw))
    _ = parsed.digest, parsed.runs, differing(MODEL, parsed)
    if parsed.size <= _MAX_REPLY:
        unpack(parsed, np.zeros(parsed.size, np.uint8))


def scalars(raw: bytes) -> None:
    values = decode_scalars(_parsed(pb.Scalars, raw))
    again = decode_scalars(encode_scalars(values))
    assert repr(again) == repr(values)


def work(raw: bytes) -> None:
    decoded = decode_work(_parsed(pb.Work, raw), lambda payload: np.zeros(64, np.uint8))
    for record in decoded.content.values():
        if isinstance(record, ArrayRecord):
            for array in record.values():
                view(array)


def npy(raw: bytes) -> None:
    view(Array("float32", (3, 4), NUMPY_STYPE, raw))


def npy_seeds() -> list[bytes]:
    made = []
    for array in (np.zeros((3, 4), np.float32), np.zeros((4, 3), np.int16), np.float64(1)):
        stream = io.BytesIO()
        np.save(stream, array)
        made.append(stream.getvalue())
    return made


def gate(content: RecordDict) -> None:
    """Open a reply as a strategy does that asked client 0 for an update."""
    intake = Intake(PARAMETERS, np.zeros(PARAMETERS.size, np.float32), {0: Instruction()}, 1, {})
    request = Message(RecordDict(), dst_node_id=0, message_type="train", group_id="1")
    stamp(request, "request")
    intake.open(reply(content, to=request))


def _parsed(kind: Any, raw: bytes) -> Any:
    """Read a part that elsewhere comes inside a message, which `FrameError` would be raised about."""
    try:
        return kind.FromString(raw)
    except (DecodeError, ValueError) as error:
        raise FrameError(str(error)) from error


PARAMETERS = ParameterLayout.from_arrays({n: as_array(np.zeros(200, np.float32)) for n in ("w", "b")})
MODEL = BlockLayout.parse(
    pb.Layout(
        arrays=[
            pb.ArraySpec(name=name, dtype="float32", shape=[200], stype=NUMPY_STYPE, size=800)
            for name in ("w", "b")
        ]
    )
)


def find_layout(digest: bytes) -> BlockLayout | None:
    return MODEL if digest == MODEL.digest else None


class CheckpointFile:
    """Loads its input as a checkpoint file, half of the time with the checksum put right."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "fuzzed.safetensors"

    def __call__(self, raw: bytes) -> None:
        self._path.write_bytes(raw)
        tree = load_checkpoint(self._path)
        _touch(tree)

    def seeds(self) -> list[bytes]:
        trees: list[dict[str, Any]] = [
            {},
            {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": {"c": [1, "x", None, 2.5]}},
            {"w": np.zeros((0, 3)), "v": np.ones(5, np.int8), "t": True},
        ]
        made = []
        for tree in trees:
            save_checkpoint(self._path, tree)
            made.append(self._path.read_bytes())
        return made


def resealed(raw: bytes) -> bytes:
    """Return a mutated checkpoint with the header length and checksum that belong to it."""
    opening = b'{"__metadata__": {"sha256": "'
    end = raw.rfind(b"}") + 1
    while end > 8 and raw[end : end + 1] == b" ":
        end += 1
    length = min(max(0, end - 8), len(raw) - 8)
    head, body = raw[8 : 8 + length], raw[8 + length :]
    closing = head[len(opening) + 64 :]
    digest = hashlib.sha256(len(closing).to_bytes(8, "little") + closing + body).hexdigest()
    return struct.pack("<Q", length) + opening + digest.encode() + closing + body


def _touch(node: Any) -> None:
    if isinstance(node, dict):
        for value in node.values():
            _touch(value)
    elif isinstance(node, np.ndarray):
        node.sum()


# Mutation.


@dataclass(frozen=True)
class Target:
    """A parser, its seeds, the message type they are of, if any, and what it may raise."""

    name: str
    parse: Parser
    seeds: tuple[bytes, ...]
    kind: Any = None
    share: int = 1
    allowed: tuple[type[Exception], ...] = TYPED


class Mutator:
    """Yields mutated inputs of many targets; all randomness is from ``seed``."""

    def __init__(self, targets: list[Target], seed: int) -> None:
        self._rng = random.Random(seed)
        self._targets = [target for target in targets for _ in range(target.share)]

    def inputs(self, count: int) -> Iterator[tuple[Target, bytes]]:
        rng = self._rng
        for _ in range(count):
            target = rng.choice(self._targets)
            raw = rng.choice(target.seeds)
            if target.kind is not None and rng.random() < 0.5:
                raw = self._structured(target.kind, raw)
            if rng.random() < 0.6:
                raw = self._bytes(raw, rng.choice(target.seeds))
            if target.name == "checkpoint" and rng.random() < 0.7 and len(raw) > 8:
                raw = resealed(raw)
            yield target, raw[: MAX_FRAME_BYTES + 1]

    def _bytes(self, raw: bytes, other: bytes) -> bytes:
        """Flip, cut, repeat, insert, or cross with another input."""
        rng = self._rng
        data = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            how = rng.randrange(7)
            if how == 0 and at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            elif how == 1 and at < len(data):
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            elif how == 2:
                del data[at:]
            elif how == 3:
                data[at:at] = data[at : at + rng.randrange(1, 64)]
            elif how == 4:
                data[at:at] = _varint(rng.choice(_EXTREMES))
            elif how == 5:
                data[at:] = other[rng.randrange(len(other) + 1) :]
            else:
                del data[at : at + rng.randrange(1, 16)]
        return bytes(data)

    def _structured(self, kind: Any, raw: bytes) -> bytes:
        """Set fields of the message, however deep, to extreme values."""
        try:
            message = kind.FromString(raw)
            for _ in range(self._rng.randint(1, 3)):
                self._change(message)
            return bytes(message.SerializeToString())
        except (DecodeError, EncodeError, ValueError):
            return raw

    def _change(self, message: Any) -> None:
        rng = self._rng
        node, field = self._place(message)
        if field.is_repeated:
            values = getattr(node, field.name)
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                if field.message_type.fields_by_name["value"].cpp_type != field.CPPTYPE_STRING:
                    values[rng.choice(_TEXTS)] = rng.choice(_FLOATS)
            elif field.message_type is not None:
                if values and rng.random() < 0.7:
                    values.add().CopyFrom(rng.choice(values))
                elif values:
                    del values[rng.randrange(len(values))]
                else:
                    values.add()
            elif values and rng.random() < 0.6:
                values[rng.randrange(len(values))] = self._value(node, field)
            else:
                values.append(self._value(node, field))
        elif field.message_type is not None:
            node.ClearField(field.name) if rng.random() < 0.3 else getattr(node, field.name).SetInParent()
        elif field.enum_type is not None:
            setattr(node, field.name, rng.randrange(8))
        else:
            setattr(node, field.name, self._value(node, field))

    def _place(self, node: Any) -> tuple[Any, Any]:
        """Go down into the message at random; return a message and one of its fields, which may be unset."""
        rng = self._rng
        while rng.random() < 0.8:
            inner = [
                value[rng.randrange(len(value))] if field.is_repeated else value
                for field, value in node.ListFields()
                if field.message_type is not None and not field.message_type.GetOptions().map_entry
            ]
            if not inner:
                break
            node = rng.choice(inner)
        return node, rng.choice(node.DESCRIPTOR.fields)

    def _value(self, node: Any, field: Any) -> Any:
        rng = self._rng
        if field.type == field.TYPE_BYTES:
            nested = _NESTED.get((node.DESCRIPTOR.name, field.name))
            old = getattr(node, field.name)
            if nested is not None and isinstance(old, bytes) and old:
                return self._structured(nested, old)
            return rng.choice((b"", MODEL.digest, b"x" * rng.randrange(100), bytes(1600)))
        if field.type == field.TYPE_STRING:
            return rng.choice(_TEXTS)
        if field.type == field.TYPE_BOOL:
            return rng.random() < 0.5
        if field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
            return rng.choice(_FLOATS)
        bits = 32 if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_INT32) else 64
        value = rng.choice(_EXTREMES) % 2**bits
        signed = field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_INT32)
        return value - 2 ** (bits - 1) if signed else value


_NESTED: Final = {("Ready", "head"): pb.ReplyHead, ("TaskOffer", "work"): pb.Work}


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def keep(target: str, raw: bytes) -> Path:
    """Keep a failing input for good; its name is its content's, so that it is kept once."""
    CORPUS.mkdir(exist_ok=True)
    path = CORPUS / f"{target}-{hashlib.sha256(raw).hexdigest()[:12]}.bin"
    path.write_bytes(raw)
    return path
