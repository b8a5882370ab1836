"""Pins Flower's private parts that `turnout.wire.flower` touches, and how its arrays behave in Flower."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from turnout.wire import as_array, as_bf16_array, view
from turnout.wire.flower import (
    CLIENT_APP_RAISED,
    LazyArray,
    NodeInfo,
    array_record,
    drop_encodings,
    error_reply,
    local_run,
    new_context,
    record_dict,
    records_of,
    reply,
    request,
    stamp,
)

ARRAYS = {
    "float32": np.arange(12, dtype=np.float32).reshape(3, 4),
    "float64": np.linspace(0, 1, 5),
    "float16": np.array([1.5, -2.0], np.float16),
    "int64": np.array(7),
    "bool": np.array([True, False]),
    "empty": np.empty((0, 3), np.float32),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(10, dtype=np.float32)[::3],
}


@pytest.fixture(params=sorted(ARRAYS))
def array(request: pytest.FixtureRequest) -> np.ndarray:
    return ARRAYS[request.param]


def content(encode: Callable[[np.ndarray], Array] = Array) -> RecordDict:
    record = ArrayRecord()
    for name, value in ARRAYS.items():
        record[name] = encode(value)
    return RecordDict(
        {
            "arrays": record,
            "config": ConfigRecord({"server-round": 3}),
            "metrics": MetricRecord({"loss": 0.5}),
        }
    )


def pickled(item: ArrayRecord) -> ArrayRecord:
    copied: ArrayRecord = pickle.loads(pickle.dumps(item))  # noqa: S301 - our own bytes
    return copied


class TestMessages:
    def test_identity_names_exist_and_are_set_when_unset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("_run_id", "_node_id", "_task_id"):
            assert hasattr(TaskIdentity, name)
            monkeypatch.setattr(TaskIdentity, name, None)
        message = request(RecordDict(), dst_node_id=5)
        assert (message.metadata.run_id, message.metadata.src_node_id) == (1, 1)
        assert (TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id) == (1, 1, 0)

    def test_identity_that_flower_has_set_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in (("_run_id", 42), ("_node_id", 43), ("_task_id", 44)):
            monkeypatch.setattr(TaskIdentity, name, value)
        metadata = request(RecordDict(), dst_node_id=5).metadata
        assert (metadata.run_id, metadata.src_node_id, metadata.src_task_id) == (42, 43, 44)

    def test_request_carries_what_it_was_given(self) -> None:
        sent = content()
        message = request(
            sent, dst_node_id=2**64 - 1, message_type="evaluate", group_id="7", message_id="abc"
        )
        metadata = message.metadata
        assert message.content is sent
        assert (metadata.dst_node_id, metadata.message_type, metadata.group_id) == (
            2**64 - 1,
            "evaluate",
            "7",
        )
        assert metadata.message_id == "abc"
        assert request(sent, dst_node_id=1).metadata.message_id == ""
        assert request(sent, dst_node_id=1).metadata.message_type == "train"

    def test_stamp_sets_the_id_that_replies_refer_to(self) -> None:
        message = request(RecordDict(), dst_node_id=5, group_id="2")
        stamp(message, "first")
        assert message.metadata.message_id == "first"
        answer = reply(content(), to=message).metadata
        assert answer.reply_to_message_id == "first"
        assert (answer.src_node_id, answer.dst_node_id, answer.group_id) == (5, 1, "2")

    def test_error_reply_comes_from_the_node_that_was_asked(self) -> None:
        answer = error_reply(request(RecordDict(), dst_node_id=5, group_id="2"), "it broke")
        assert answer.has_error()
        assert not answer.has_content()
        assert (answer.error.code, answer.error.reason) == (CLIENT_APP_RAISED, "it broke")
        assert (answer.metadata.src_node_id, answer.metadata.group_id) == (5, "2")

    def test_error_code_and_superlink_identity(self) -> None:
        assert CLIENT_APP_RAISED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert {"NODE_UNAVAILABLE", "MESSAGE_UNAVAILABLE"} <= set(dir(ErrorCode))

    def test_run_node_and_context(self) -> None:
        assert local_run().run_id == 1
        assert NodeInfo(node_id=9).node_id == 9
        state = RecordDict({"m": MetricRecord({"a": 1})})
        context = new_context(node_id=9, node_config={"partition-id": 3}, run_config={"lr": 0.1}, state=state)
        assert isinstance(context, Context)
        assert context.state is state
        assert (context.node_id, context.node_config["partition-id"], context.run_config["lr"]) == (9, 3, 0.1)
        assert len(new_context(node_id=1, node_config={}).state) == 0

    @pytest.mark.parametrize("kind", ["train", "evaluate", "query", "train.anchor"])
    def test_messages_made_directly_equal_those_made_by_flower(self, kind: str) -> None:
        sent = content()
        ours = request(sent, dst_node_id=2**64 - 1, message_type=kind, group_id="7")
        theirs = Message(sent, dst_node_id=2**64 - 1, message_type=kind, group_id="7")
        self.equal(ours, theirs)
        for message in (ours, theirs):
            stamp(message, "asked")
        self.equal(reply(sent, to=ours), Message(sent, reply_to=theirs))
        assert message_from_proto(message_to_proto(ours)).metadata.message_type == kind

    @staticmethod
    def equal(ours: Message, theirs: Message) -> None:
        assert set(ours.__dict__) == set(theirs.__dict__)
        assert ours.content is theirs.content
        assert not ours.has_error()
        mine, its = dict(ours.metadata.__dict__), dict(theirs.metadata.__dict__)
        for name in ("_created_at", "_ttl"):
            assert mine.pop(name) == pytest.approx(its.pop(name), abs=1.0)
        assert mine == its

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [({"message_type": "no such"}, "Invalid message type"), ({"content": {"a": 1}}, "Invalid arguments")],
    )
    def test_what_is_no_message_for_flower_is_none_here(self, wrong: dict[str, Any], said: str) -> None:
        with pytest.raises((ValueError, TypeError), match=said):
            request(**{"content": RecordDict(), "dst_node_id": 1, **wrong})

    def test_records_made_directly_equal_those_made_by_flower(self) -> None:
        arrays = {"w": as_array(np.arange(3.0)), "b": as_array(np.zeros(()))}
        ours, theirs = array_record(arrays), ArrayRecord()
        for name, array in arrays.items():
            theirs[name] = array
        assert ours == theirs
        assert list(ours) == list(theirs)
        assert ours.object_id == theirs.object_id
        ours["new"] = as_array(np.ones(2))
        assert "new" in ours
        with pytest.raises(TypeError):
            ours[3] = as_array(np.ones(2))  # type: ignore[index]
        records = {"arrays": theirs, "m": MetricRecord({"a": 1})}
        assert record_dict(records) == RecordDict(dict(records))
        assert record_dict(records).object_id == RecordDict(dict(records)).object_id
        copied = record_dict(records).copy()
        del copied["m"]
        assert set(records) == {"arrays", "m"}

    def test_records_of_one_kind(self) -> None:
        records = content()
        assert set(records_of(records, ArrayRecord)) == {"arrays"}
        assert set(records_of(records, ConfigRecord)) == {"config"}
        assert records_of(records, MetricRecord)["metrics"] is records["metrics"]


def test_encodings_are_dropped_and_made_again() -> None:
    sent = content(as_array)
    before = {name: array.data for name, array in sent["arrays"].items()}
    drop_encodings(sent)
    assert not any("_encoded" in array.__dict__ for array in sent["arrays"].values())
    assert {name: array.data for name, array in sent["arrays"].items()} == before
    drop_encodings(content())  # Flower's own arrays have nothing else.
    assert all(array.data for array in content()["arrays"].values())


class TestLazyArray:
    def test_is_an_array_with_flowers_fields(self, array: np.ndarray) -> None:
        lazy, stock = as_array(array), Array(array)
        assert isinstance(lazy, Array)
        assert (lazy.dtype, lazy.shape, lazy.stype) == (stock.dtype, stock.shape, stock.stype)
        assert lazy.data == stock.data
        assert lazy == stock
        assert stock == lazy
        assert lazy != Array(np.arange(99))

    def test_is_read_only_shares_memory_and_numpy_copies(self, array: np.ndarray) -> None:
        lazy = as_array(array)
        assert not lazy.ndarray.flags.writeable
        assert array.size == 0 or np.shares_memory(lazy.ndarray, array)
        copied = lazy.numpy()
        assert copied.flags.writeable
        assert not np.shares_memory(copied, array)
        np.testing.assert_array_equal(copied, array)

    def test_object_id_is_flowers(self, array: np.ndarray) -> None:
        assert as_array(array).object_id == Array(array).object_id

    def test_deflate_and_inflate(self) -> None:
        message = request(content(as_array), dst_node_id=3)
        objects = {key: item.deflate() for key, item in get_all_nested_objects(message).items()}
        arrays = inflate_object_from_contents(message.object_id, objects).content["arrays"]
        for name, expected in ARRAYS.items():
            np.testing.assert_array_equal(view(arrays[name]), expected)
            assert type(arrays[name]) is Array

    def test_flowers_protobuf_round_trip(self) -> None:
        raw = message_to_proto(request(content(as_array), dst_node_id=3)).SerializeToString()
        stock = message_to_proto(request(content(), dst_node_id=3))
        parsed = type(stock).FromString(raw)
        assert parsed.content == stock.content
        arrays = message_from_proto(parsed).content["arrays"]
        for name, expected in ARRAYS.items():
            np.testing.assert_array_equal(view(arrays[name]), expected)

    def test_to_torch_and_to_numpy(self) -> None:
        record = content(as_array)["arrays"]
        state = record.to_torch_state_dict()
        for (name, tensor), copied in zip(state.items(), record.to_numpy_ndarrays(), strict=True):
            assert isinstance(tensor, torch.Tensor)
            np.testing.assert_array_equal(tensor.numpy(), ARRAYS[name])
            np.testing.assert_array_equal(copied, ARRAYS[name])

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
    def test_copies_and_pickles(self, duplicate: Callable[[ArrayRecord], ArrayRecord]) -> None:
        # Ray pickles what clients reply; Flower's grids deep-copy.
        record = content(as_array)["arrays"]
        record["float32"].data  # noqa: B018 - encoded once, which must not matter
        twin = duplicate(record)
        assert twin == record
        for name, expected in ARRAYS.items():
            assert isinstance(twin[name], LazyArray)
            assert not twin[name].ndarray.flags.writeable
            np.testing.assert_array_equal(view(twin[name]), expected)

    def test_records_made_from_records(self) -> None:
        record = content(as_array)["arrays"]
        again = ArrayRecord(dict(record.items()))
        assert again == record

    def test_a_replaced_array_is_noticed(self) -> None:
        record = ArrayRecord({"x": as_array(np.zeros(2))})
        before = record.object_id
        record["x"] = as_array(np.ones(2))
        assert record.object_id != before

    def test_bf16_array_travels_as_an_ordinary_array(self) -> None:
        record = ArrayRecord({"x": as_bf16_array(np.array([1.5, -2.25], np.float32))})
        raw = message_to_proto(request(RecordDict({"arrays": record}), dst_node_id=3)).SerializeToString()
        proto = type(message_to_proto(request(RecordDict(), dst_node_id=3))).FromString(raw)
        received = message_from_proto(proto).content["arrays"]["x"]
        np.testing.assert_array_equal(view(received), np.array([1.5, -2.25], np.float32))
        with pytest.raises(TypeError):
            received.numpy()
