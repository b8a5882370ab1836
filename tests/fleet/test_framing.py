from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.v1 import fleet_pb2 as pb
from turnout.wire.framing import (
    CHUNK_BYTES,
    MAX_FRAME_BYTES,
    Chunk,
    FrameError,
    chunk_frames,
    decode_client,
    decode_server,
    encode_chunk,
    encode_offer,
)

EXAMPLES = 2000  # test_fuzz.py tries many more, less cleverly.
uint64 = st.integers(0, 2**64 - 1)
chunks = st.tuples(uint64, uint64, st.binary(max_size=400))


@given(chunks)
def test_our_chunks_are_protobufs_byte_for_byte(parts: tuple[int, int, bytes]) -> None:
    payload, offset, data = parts
    ours = encode_chunk(payload, offset, data)
    official = pb.ClientMessage(chunk=pb.Chunk(id=payload, offset=offset, data=data))
    assert ours == official.SerializeToString()
    assert pb.ServerMessage.FromString(ours).chunk == official.chunk
    assert decode_client(ours) == decode_server(ours) == Chunk(payload, offset, memoryview(data))


def test_a_received_payload_is_a_view_of_its_frame() -> None:
    frame = encode_chunk(7, CHUNK_BYTES, bytes(CHUNK_BYTES))
    chunk = decode_server(frame)
    assert isinstance(chunk, Chunk)
    assert chunk.data.obj is frame
    assert len(chunk.data) == CHUNK_BYTES


@given(chunks, st.binary(min_size=1, max_size=8), st.permutations([0, 1, 2, 3]))
def test_other_orders_and_unknown_fields_are_read_by_protobuf(
    parts: tuple[int, int, bytes], unknown: bytes, order: list[int]
) -> None:
    payload, offset, data = parts
    fields = [
        pb.Chunk(id=payload).SerializeToString(),
        pb.Chunk(offset=offset).SerializeToString(),
        pb.Chunk(data=data).SerializeToString(),
        bytes([(15 << 3) | 2, len(unknown)]) + unknown,
    ]
    body = b"".join(fields[i] for i in order)
    message = pb.ClientMessage(chunk=pb.Chunk.FromString(body)).SerializeToString()
    assert decode_client(message) == Chunk(payload, offset, memoryview(data))
    trailing = message + bytes([(14 << 3) | 2, len(unknown)]) + unknown
    assert decode_client(trailing) == Chunk(payload, offset, memoryview(data))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=64))
def test_random_bytes_give_a_message_or_a_frame_error(raw: bytes) -> None:
    for decode, kind in ((decode_client, pb.ClientMessage), (decode_server, pb.ServerMessage)):
        try:
            message = decode(raw)
        except FrameError:
            continue
        assert isinstance(message, (Chunk, kind))
        if isinstance(message, Chunk):  # Then official protobuf agrees with us.
            official = kind.FromString(raw).chunk
            assert (official.id, official.offset, official.data) == (message.id, message.offset, message.data)


@settings(max_examples=EXAMPLES, deadline=None)
@given(chunks, st.data())
def test_mutated_chunks_are_read_as_protobuf_reads_them(
    parts: tuple[int, int, bytes], data: st.DataObject
) -> None:
    frame = bytearray(encode_chunk(*parts))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.integers(0, len(frame)))])
    try:
        message = decode_client(cut)
    except FrameError:
        return
    official = pb.ClientMessage.FromString(cut)
    if isinstance(message, Chunk):
        assert (official.chunk.id, official.chunk.offset) == (message.id, message.offset)
        assert official.chunk.data == message.data
    else:
        assert message == official or message != message  # NaN metrics differ from themselves.


def test_frames_beyond_the_limit_are_refused_unread() -> None:
    with pytest.raises(FrameError, match="at most"):
        decode_client(bytes(MAX_FRAME_BYTES + 1))


@given(st.lists(st.integers(0, 2**20 + 5), max_size=6))
@settings(max_examples=20, deadline=None)
def test_pieces_are_cut_into_full_chunks(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    pieces = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    frames = [decode_client(f) for f in chunk_frames(9, [memoryview(piece) for piece in pieces])]
    assert all(isinstance(frame, Chunk) and frame.id == 9 for frame in frames)
    lengths = [len(frame.data) for frame in frames]  # type: ignore[union-attr]
    assert lengths[:-1] == [CHUNK_BYTES] * (len(lengths) - 1)
    assert [frame.offset for frame in frames] == [i * CHUNK_BYTES for i in range(len(frames))]  # type: ignore[union-attr]
    whole = np.concatenate([*pieces, np.empty(0, np.uint8)]).tobytes()
    assert b"".join(frame.data for frame in frames) == whole  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 20_000])
def test_an_offer_is_what_protobuf_writes(size: int) -> None:
    task = pb.TaskOffer(id=2**40, attempt=3, client=7, base_round=5, keep_round=4)
    work = bytes(range(256)) * (size // 256) + bytes(size % 256)
    frame = encode_offer(task, work)
    message = pb.ServerMessage.FromString(frame)
    task.work = work
    assert message == pb.ServerMessage(task=task)
    if size:  # Protobuf leaves an empty field out.
        assert frame == pb.ServerMessage(task=task).SerializeToString()
