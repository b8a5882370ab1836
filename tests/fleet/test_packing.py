from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.v1 import fleet_pb2 as pb
from turnout.wire import LayoutError, ParameterLayout, as_array, as_bf16_array, view
from turnout.wire.framing import Chunk, decode_server
from turnout.wire.packing import BlockLayout, pack, unpack
from turnout.wire.record_tree import decode_records, encode_records
from turnout.wire.replies import encode_failure, encode_reply, parse_reply
from turnout.wire.work import EncodedWork, WorkEncoder, decode_work, payload_ids


def mixed() -> ArrayRecord:
    rng = np.random.default_rng(1)
    record = ArrayRecord({"f": as_array(rng.standard_normal((3, 5)).astype(np.float32))})
    record["b"] = as_array(np.array([True, False, True]))
    record["d"] = as_array(rng.standard_normal(4))
    record["scalar"] = as_array(np.array(7, np.int64))
    record["empty"] = as_array(np.empty((0, 3), np.float16))
    record["bf"] = as_bf16_array(rng.standard_normal((2, 2)).astype(np.float32))
    record["own"] = Array("uint8", (2, 9), "custom.codec", b"opaque bytes")
    record["fortran"] = as_array(np.asfortranarray(rng.standard_normal((3, 2))))
    return record


def assert_same(got: ArrayRecord, expected: ArrayRecord) -> None:
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert (got[name].dtype, tuple(got[name].shape), got[name].stype) == (
            array.dtype, tuple(array.shape), array.stype)  # fmt: skip
        if array.stype == "custom.codec":
            assert got[name].data == array.data
        else:
            np.testing.assert_array_equal(view(got[name]), view(array))


def test_every_kind_of_array_survives() -> None:
    layout, pieces = pack(mixed())
    block = np.frombuffer(b"".join(pieces), np.uint8)
    assert block.size == layout.size
    assert_same(unpack(BlockLayout.parse(layout.message), block.copy()), mixed())


def test_a_model_arrives_as_one_vector() -> None:
    vector = np.arange(30, dtype=np.float32)
    record = ArrayRecord()  # Its constructor would copy the arrays.
    record["a"], record["b"] = as_array(vector[:12].reshape(3, 4)), as_array(vector[12:])
    layout, pieces = pack(record)
    assert len(pieces) == 1
    received = unpack(layout, np.frombuffer(bytes(pieces[0]), np.uint8).copy())
    flat = ParameterLayout.from_arrays(record).flatten(received)
    assert flat.base is not None  # A view: nothing was gathered.
    np.testing.assert_array_equal(flat, vector)


def request_of(record: ArrayRecord) -> tuple[EncodedWork, dict[int, np.ndarray[Any, Any]]]:
    content = RecordDict(
        {"arrays": record, "config": ConfigRecord({"server-round": 3, "x": [1.5, 2.0], "t": "é"})}
    )
    content["more"] = MetricRecord({"n": 2, "values": [1, 2]})
    work = WorkEncoder(itertools.count(1), server_round=3).encode(content, "train", "3")
    blocks = {}
    for payload in work.payloads:
        block = blocks[payload.id] = np.empty(payload.size, np.uint8)
        for frame in payload.frames:
            chunk = decode_server(frame)
            assert isinstance(chunk, Chunk)
            block[chunk.offset : chunk.offset + len(chunk.data)] = np.frombuffer(chunk.data, np.uint8)
    return work, blocks


@pytest.mark.parametrize("size", [3, 700_000])
def test_requests_survive(size: int) -> None:
    record = ArrayRecord({"w": as_array(np.random.default_rng(0).standard_normal(size).astype(np.float32))})
    work, blocks = request_of(record)
    assert payload_ids(pb.Work.FromString(work.head)) == [payload.id for payload in work.payloads]
    assert bool(work.payloads) == (size > 1000)
    decoded = decode_work(pb.Work.FromString(work.head), blocks.__getitem__)
    assert (decoded.message_type, decoded.group, decoded.server_round) == ("train", "3", 3)
    assert_same(decoded.content["arrays"], record)
    assert dict(decoded.content["config"]) == {"server-round": 3, "x": [1.5, 2.0], "t": "é"}
    assert dict(decoded.content["more"]) == {"n": 2, "values": [1, 2]}


def test_a_damaged_request_is_noticed() -> None:
    work, blocks = request_of(ArrayRecord({"w": as_array(np.zeros(100_000, np.float32))}))
    blocks[work.payloads[0].id][77] ^= 1
    with pytest.raises(LayoutError, match="damaged"):
        decode_work(pb.Work.FromString(work.head), blocks.__getitem__)


def test_shared_records_are_encoded_once() -> None:
    model = ArrayRecord({"w": as_array(np.zeros(100_000, np.float32))})
    encoder = WorkEncoder(itertools.count(1), server_round=1)
    first = encoder.encode(RecordDict({"arrays": model}), "train", "1")
    other = RecordDict({"arrays": model, "config": ConfigRecord({"a": 1})})
    second = encoder.encode(other, "train", "1")
    assert encoder.encode(other, "train", "1") is second
    assert first.payloads == second.payloads
    assert first.head != second.head


def test_replies_survive_and_name_known_layouts_by_digest() -> None:
    record = mixed()
    layout, _ = pack(record)
    content = RecordDict({"arrays": record, "control": mixed(), "metrics": MetricRecord({"num-examples": 4})})
    reply = encode_reply(content, {layout.digest: layout})
    assert len(reply.head) < 200
    body = np.frombuffer(b"".join(reply.pieces), np.uint8).copy()
    plan = parse_reply(reply.head, {layout.digest: layout}.get, max_bytes=10**6, size=reply.size)
    got = plan.content(body)
    assert_same(got["arrays"], record)
    assert_same(got["control"], record)
    assert got["metrics"]["num-examples"] == 4
    with pytest.raises(LayoutError, match="did not have"):
        parse_reply(reply.head, {}.get, max_bytes=10**6, size=reply.size)


def test_replies_beyond_the_limit_or_of_another_size_are_refused() -> None:
    reply = encode_reply(RecordDict({"arrays": mixed()}), {})
    for size, limit in ((reply.size, reply.size - 1), (reply.size + 1, 10**6)):
        with pytest.raises(LayoutError, match="announces"):
            parse_reply(reply.head, {}.get, max_bytes=limit, size=size)
    assert parse_reply(encode_failure("why").head, {}.get, max_bytes=0, size=0).error == "why"


@pytest.mark.parametrize(
    "spec",
    [
        pb.ArraySpec(name="w", dtype="float32", shape=[2**40, 2**40], stype="numpy.ndarray", size=4),
        pb.ArraySpec(name="w", dtype="float32", shape=[3], stype="numpy.ndarray", size=11),
        pb.ArraySpec(name="w", dtype="object", shape=[1], stype="numpy.ndarray", size=8),
        pb.ArraySpec(name="w", dtype="O", shape=[1] * 40, stype="numpy.ndarray", size=8),
        pb.ArraySpec(name="w" * 600, dtype="float32", shape=[1], stype="numpy.ndarray", size=4),
        pb.ArraySpec(name="w", dtype="x", shape=[2**63], stype="custom", size=2**63),
    ],
)
def test_impossible_layouts_are_refused_before_anything_is_allocated(spec: pb.ArraySpec) -> None:
    block = pb.ArrayBlock(layout=pb.Layout(arrays=[spec]), size=spec.size)
    head = pb.ReplyHead(records=[pb.Record(name="arrays", arrays=block)]).SerializeToString()
    with pytest.raises(LayoutError):
        parse_reply(head, {}.get, max_bytes=10**9, size=spec.size)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_mutated_heads_give_a_plan_or_a_layout_error(data: st.DataObject) -> None:
    head = bytearray(
        encode_reply(RecordDict({"arrays": mixed(), "metrics": MetricRecord({"n": 1})}), {}).head
    )
    for _ in range(data.draw(st.integers(1, 5))):
        head[data.draw(st.integers(0, len(head) - 1))] = data.draw(st.integers(0, 255))
    try:
        plan = parse_reply(
            bytes(head), {}.get, max_bytes=10**6, size=data.draw(st.sampled_from([400, 0, 2**63]))
        )
    except LayoutError:
        return
    assert plan.size <= 10**6


def test_records_survive_a_checkpoint_tree() -> None:
    content = RecordDict(
        {"a": mixed(), "c": ConfigRecord({"b": b"xy", "l": [b"z"], "n": 1}), "m": MetricRecord({"x": [1.0]})}
    )
    again = decode_records(encode_records(content))
    assert_same(again["a"], mixed())
    assert dict(again["c"]) == dict(content["c"])
    assert dict(again["m"]) == dict(content["m"])
