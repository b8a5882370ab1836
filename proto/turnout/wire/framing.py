"""The frames of the fleet protocol on the wire: valid protobuf, but chunks are read and written by hand.

A chunk is nearly all payload. Protobuf would copy that payload into the message and out again; here the few
header bytes are written directly and the payload of a received frame is a view of it. Everything that is not
a chunk in its usual form goes through protobuf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError

from turnout.v1 import fleet_pb2 as pb
from turnout.wire.errors import TurnoutError

CHUNK_BYTES: Final = 1 << 20
"""Payload of every chunk but a payload's last."""
MAX_FRAME_BYTES: Final = 2 << 20
"""No frame is longer; a transport refuses longer ones before it stores them."""
PROTOCOL_VERSION: Final = 1

_TAG_CHUNK: Final = 0x0A  # Field 1, length-delimited, in both directions.
_TAG_ID: Final = 0x08
_TAG_OFFSET: Final = 0x10
_TAG_DATA: Final = 0x1A
_TAG_TASK: Final = 0x22  # ServerMessage.task
_TAG_WORK: Final = 0x32  # TaskOffer.work, its last field.
_MAX_UINT64: Final = (1 << 64) - 1
M = TypeVar("M", pb.ClientMessage, pb.ServerMessage)


class FrameError(TurnoutError):
    """Bytes from the network that are no frame of the protocol."""


class Chunk(NamedTuple):
    """A piece of a payload; ``data`` is a view of the frame it came in."""

    id: int
    offset: int
    data: memoryview


def encode_chunk(payload_id: int, offset: int, data: bytes | memoryview) -> bytes:
    """Return the frame of one chunk, byte for byte what protobuf would write."""
    head = bytearray()
    for tag, value in ((_TAG_ID, payload_id), (_TAG_OFFSET, offset)):
        if value:
            head.append(tag)
            _write_varint(head, value)
    size = len(data)
    if size:
        head.append(_TAG_DATA)
        _write_varint(head, size)
    frame = bytearray((_TAG_CHUNK,))
    _write_varint(frame, len(head) + size)
    return b"".join((frame, head, data))


def encode_offer(task: pb.TaskOffer, work: bytes) -> bytes:
    """Return the frame that offers ``task`` with ``work``, which tasks share and protobuf would copy twice.

    Byte for byte what protobuf writes for the task with its field ``work`` set.
    """
    head = task.SerializeToString()
    field = bytearray((_TAG_WORK,))
    _write_varint(field, len(work))
    frame = bytearray((_TAG_TASK,))
    _write_varint(frame, len(head) + len(field) + len(work))
    return b"".join((frame, head, field, work))


def join_frames(frames: list[bytes]) -> bytes:
    """Return one frame that holds several short ones of the same direction."""
    joined: bytes = pb.ServerMessage(batch=pb.Batch(messages=frames)).SerializeToString()
    return joined


def split_frames(batch: pb.Batch, kind: type[M]) -> Iterator[M]:
    """Return the messages of a batch. Raises `FrameError`; a batch holds no chunks and no batches."""
    for raw in batch.messages:
        message = _decode(raw, kind)
        if isinstance(message, Chunk) or message.WhichOneof("body") == "batch":
            raise FrameError("a batch that holds chunks or batches.")
        yield message


def chunk_frames(payload_id: int, pieces: Iterable[memoryview]) -> Iterator[bytes]:
    """Cut the concatenation of ``pieces`` into frames of `CHUNK_BYTES`, copying each byte once."""
    offset = 0
    for chunk in cut_chunks(pieces):
        yield encode_chunk(payload_id, offset, chunk)
        offset += len(chunk)


def cut_chunks(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """Cut the concatenation of ``pieces`` (bytes) into chunks; views, where one lies within a piece."""
    held, waiting = 0, list[memoryview]()
    for piece in pieces:
        while len(piece):
            part = piece[: CHUNK_BYTES - held]
            piece = piece[len(part) :]
            waiting.append(part)
            held += len(part)
            if held == CHUNK_BYTES:
                yield _joined(waiting)
                held, waiting = 0, []
    if held:
        yield _joined(waiting)


def _joined(parts: list[memoryview]) -> memoryview:
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def decode_client(raw: bytes) -> Chunk | pb.ClientMessage:
    """Return what a client sent. Raises `FrameError`; an unknown kind of message has no body."""
    return _decode(raw, pb.ClientMessage)


def decode_server(raw: bytes) -> Chunk | pb.ServerMessage:
    """Return what the server sent. Raises `FrameError`; an unknown kind of message has no body."""
    return _decode(raw, pb.ServerMessage)


def _decode(raw: bytes, kind: type[M]) -> Chunk | M:
    if len(raw) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(raw)} bytes, at most {MAX_FRAME_BYTES} are allowed.")
    if raw[:1] == b"\x0a" and (chunk := _fast_chunk(raw)) is not None:
        return chunk
    try:
        message: M = kind.FromString(raw)
    except (DecodeError, RecursionError, ValueError) as error:
        raise FrameError(f"a frame of {len(raw)} bytes is no {kind.__name__}: {error}") from error
    if message.WhichOneof("body") == "chunk":
        chunk_ = message.chunk
        return Chunk(chunk_.id, chunk_.offset, memoryview(chunk_.data))
    return message


def _fast_chunk(raw: bytes) -> Chunk | None:
    """Return the chunk when the frame has the usual form, None to let protobuf judge."""
    try:
        length, at = _read_varint(raw, 1)
        if at + length != len(raw):
            return None
        payload_id = offset = 0
        if raw[at] == _TAG_ID:
            payload_id, at = _read_varint(raw, at + 1)
        if raw[at] == _TAG_OFFSET:
            offset, at = _read_varint(raw, at + 1)
        if raw[at] != _TAG_DATA:
            return None
        size, at = _read_varint(raw, at + 1)
    except (IndexError, ValueError):
        return None
    if at + size != len(raw):
        return None
    return Chunk(payload_id, offset, memoryview(raw)[at:])


def _write_varint(out: bytearray, value: int) -> None:
    if not 0 <= value <= _MAX_UINT64:
        raise ValueError(f"{value} is no unsigned 64-bit number.")
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value > _MAX_UINT64:
                raise ValueError("varint beyond 64 bits")
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint longer than ten bytes")
