"""The fence around Flower's private parts: nothing else in Turnout imports below flwr's public packages.

Flower 1.41 makes only ``flwr.app``, ``flwr.serverapp``, ``flwr.clientapp`` and their documented submodules
public. An engine also needs to create messages outside a Flower process, to number them, and to name the
types in ``Grid``'s signatures; those touches live here, and `tests/flower/contract` pins them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache, lru_cache
from io import BytesIO
from typing import Any, Final, TypeVar

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.app.user_config import UserConfigValue
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "CLIENT_APP_RAISED",
    "IDENTITY",
    "LOST",
    "NODE_UNAVAILABLE",
    "NUMPY_STYPE",
    "REPLY_REFUSED",
    "LazyArray",
    "NodeInfo",
    "Run",
    "array_record",
    "drop_encodings",
    "dtype_name",
    "ensure_identity",
    "error_reply",
    "local_run",
    "new_context",
    "record_dict",
    "records_of",
    "reply",
    "request",
    "stamp",
]

CLIENT_APP_RAISED: Final[int] = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
NODE_UNAVAILABLE: Final[int] = ErrorCode.NODE_UNAVAILABLE
LOST: Final[frozenset[int]] = frozenset(
    {ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE}
)
"""Codes of errors that say nothing of the client's app: its node, or a message, was lost on the way."""
REPLY_REFUSED: Final[int] = 40_001
"""Ours: the engine refused a client's reply; the error's reason is ``slug: detail``."""
IDENTITY: Final = "query.identity"
"""The type of the message that asks a node on Flower's engines which client it is."""
R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)

NUMPY_STYPE: Final = "numpy.ndarray"
_LOCAL_RUN_ID: Final = 1
_SERVER_NODE_ID: Final = 1


def ensure_identity() -> None:
    """Give this process a Flower identity unless Flower itself has set one."""
    for name, value in (("run_id", _LOCAL_RUN_ID), ("node_id", _SERVER_NODE_ID), ("task_id", 0)):
        if getattr(TaskIdentity, f"_{name}") is None:
            setattr(TaskIdentity, name, value)


def request(
    content: RecordDict,
    *,
    dst_node_id: int,
    message_type: str = MessageType.TRAIN,
    group_id: str = "",
    message_id: str = "",
) -> Message:
    """Return an instruction message from the server to node ``dst_node_id``, on any engine.

    Raises Flower's errors for what cannot be a message.
    """
    ensure_identity()
    if type(content) is not RecordDict or type(dst_node_id) is not int:
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id)
    fields = _instruction(message_type, TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id)
    return _message(
        content,
        fields
        | {
            "_dst_node_id": dst_node_id,
            "_group_id": group_id,
            "_message_id": message_id,
            "_created_at": time.time(),
        },
    )


@lru_cache(maxsize=64)
def _instruction(message_type: str, *identity: int) -> dict[str, Any]:
    """Return the metadata that Flower gives such a message: it checks them for long, here once for all."""
    message = Message(RecordDict(), dst_node_id=0, message_type=message_type)
    return dict(message.metadata.__dict__)


def _message(content: RecordDict, fields: Mapping[str, Any]) -> Message:
    metadata, message = Metadata.__new__(Metadata), Message.__new__(Message)
    metadata.__dict__.update(fields)
    message.__dict__.update(_metadata=metadata, _content=content, _error=None)
    return message


def stamp(message: Message, message_id: str) -> None:
    """Set the message's id, which Flower leaves to its SuperLink."""
    message.metadata.__dict__["_message_id"] = message_id


def reply(content: RecordDict, *, to: Message) -> Message:
    """Return the reply of the node that received ``to``."""
    asked, now = to.metadata.__dict__, time.time()
    return _message(
        content,
        asked
        | {
            "_message_id": "",
            "_reply_to_message_id": asked["_message_id"],
            "_src_node_id": asked["_dst_node_id"],
            "_dst_node_id": asked["_src_node_id"],
            "_src_task_id": asked["_dst_task_id"],
            "_dst_task_id": asked["_src_task_id"],
            "_created_at": now,
            "_ttl": asked["_created_at"] + asked["_ttl"] - now,
            "_delivered_at": "",
        },
    )


def error_reply(to: Message, reason: str, code: int = CLIENT_APP_RAISED) -> Message:
    """Return an error reply whose source is the node that was asked, so that the drop-out is attributable."""
    return Message(Error(code=code, reason=reason), reply_to=to)


def new_context(
    *,
    node_id: int,
    node_config: Mapping[str, UserConfigValue],
    run_config: Mapping[str, UserConfigValue] | None = None,
    state: RecordDict | None = None,
) -> Context:
    """Return a client's context; ``state`` is its persistent store (a fresh one when None)."""
    return Context(
        run_id=_LOCAL_RUN_ID,
        node_id=node_id,
        node_config=dict(node_config),
        state=RecordDict() if state is None else state,
        run_config=dict(run_config or {}),
    )


def array_record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """Return a record of these arrays as they are; Flower's own way costs microseconds per array."""
    record = ArrayRecord()
    record.__dict__["_data"] = dict(arrays)
    record.__dict__["_is_dirty"] = True
    return record


def record_dict(records: Mapping[str, ArrayRecord | ConfigRecord | MetricRecord]) -> RecordDict:
    """Return a content of these records as they are."""
    content = RecordDict()
    content.__dict__["_data"] = dict(records)
    return content


def records_of(content: RecordDict, kind: type[R]) -> dict[str, R]:
    """Return the records of one kind, such as ``ArrayRecord``, by name.

    Flower's own ``content.array_records`` makes a reference cycle, so that each reply it was used on would
    stay in memory until the garbage collector runs: twenty models and more.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def drop_encodings(content: RecordDict) -> None:
    """Let go of the ``.npy`` bytes that a transport asked for; they are made again if it asks again."""
    for record in records_of(content, ArrayRecord).values():
        for array in record.values():
            array.__dict__.pop("_encoded", None)


def local_run() -> Run:
    """Return the description of a run that no SuperLink manages."""
    return Run.create_empty(_LOCAL_RUN_ID)


@cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return ``dtype.name``, which NumPy puts together anew at every access."""
    return dtype.name


class LazyArray(Array):
    """A Flower ``Array`` over an existing ndarray; the ``.npy`` bytes are made only if a transport asks.

    Everything that handles an ``Array`` handles this one: ``.data`` encodes on first use, ``.numpy()`` copies
    as Flower's does, `ndarray` is the zero-copy read-only view that Turnout's own code reads.
    """

    # Flower writes the class name into a serialised object's header and looks it up when reading.
    __qualname__ = "Array"

    def __init__(self, ndarray: np.ndarray[Any, np.dtype[Any]]) -> None:
        view = ndarray.view()
        view.flags.writeable = False
        # Straight into __dict__: Flower's __setattr__ does change tracking that a new object does not need.
        self.__dict__.update(
            _ndarray=view, dtype=dtype_name(view.dtype), shape=view.shape, stype=NUMPY_STYPE, _is_dirty=True
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The class cannot be found under its borrowed name; Ray pickles what clients reply.
        return _lazy_array, (self.ndarray,)

    @property
    def ndarray(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The array itself, read-only and not copied."""
        return self.__dict__["_ndarray"]  # type: ignore[no-any-return]

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The ``.npy`` encoding, made once."""
        encoded: bytes | None = self.__dict__.get("_encoded")
        if encoded is None:
            buffer = BytesIO()
            np.save(buffer, self.ndarray, allow_pickle=False)
            encoded = self.__dict__["_encoded"] = buffer.getvalue()
        return encoded

    def numpy(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Return a writable copy, as Flower's ``Array.numpy`` does."""
        return self.ndarray.copy()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        mine = (self.dtype, tuple(self.shape), self.stype)
        return mine == (other.dtype, tuple(other.shape), other.stype) and self.data == other.data

    __hash__ = None  # type: ignore[assignment]


def _lazy_array(ndarray: np.ndarray[Any, np.dtype[Any]]) -> LazyArray:
    return LazyArray(ndarray)
