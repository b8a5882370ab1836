"""What `FlowerGrid` relies on in Flower's two grids, and the client side in its nodes."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.superlink.grid import HttpGrid, InMemoryGrid

from turnout.wire import as_array
from turnout.wire.flower import IDENTITY, LOST, record_dict, request


@pytest.mark.parametrize("grid", [HttpGrid, InMemoryGrid])
def test_the_grids_are_grids(grid: type[Any]) -> None:
    from flwr.serverapp import Grid

    assert issubclass(grid, Grid)
    assert not inspect.isabstract(grid)
    for method, wanted in {"push_messages": "messages", "pull_messages": "message_ids"}.items():
        assert wanted in inspect.signature(getattr(grid, method)).parameters


def test_the_question_is_a_message_type() -> None:
    from flwr.app.metadata import validate_message_type

    assert validate_message_type(IDENTITY)


def test_codes_of_lost_nodes_are_not_those_of_apps() -> None:
    from flwr.common.constant import ErrorCode

    apps = {
        ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
        ErrorCode.LOAD_CLIENT_APP_EXCEPTION,
        ErrorCode.MOD_FAILED_PRECONDITION,
    }
    assert len(LOST) == 3
    assert not LOST & apps


@pytest.fixture
def objects() -> list[Message]:
    model = ArrayRecord({"w": as_array(np.arange(1000.0))})
    contents = [
        record_dict({"arrays": model, "config": ConfigRecord({"base-round": client})}) for client in range(3)
    ]
    return [request(content, dst_node_id=node) for node, content in enumerate(contents, 1)]


def test_requests_that_share_arrays_share_objects(objects: list[Message]) -> None:
    """SuperLink stores an object once: the model travels once, though each client is told its own round."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    nested = [get_all_nested_objects(message) for message in objects]
    shared = set(nested[0]) & set(nested[1]) & set(nested[2])
    model = objects[0].content["arrays"]
    assert {model.object_id, model["w"].object_id} <= shared
    assert len({message.object_id for message in objects}) == 3


def test_an_empty_content_travels() -> None:
    from flwr.common.serde import message_from_proto, message_to_proto

    asked = request(record_dict({}), dst_node_id=7, message_type=IDENTITY, group_id="identity")
    received = message_from_proto(message_to_proto(asked))
    assert received.metadata.message_type == IDENTITY
    assert received.content == RecordDict()
