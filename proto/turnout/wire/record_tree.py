"""Records as a plain tree that a checkpoint can hold, and back, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from turnout.wire.arrays import as_array, view
from turnout.wire.errors import CheckpointError
from turnout.wire.flower import NUMPY_STYPE, array_record, record_dict


def isolated(content: RecordDict) -> RecordDict:
    """Return a copy whose records can be replaced, added to or emptied without the original noticing.

    Arrays are shared, since they are never changed in place.
    """
    return record_dict({key: record.copy() for key, record in content.items()})


def encode_records(content: RecordDict) -> list[list[Any]]:
    """Return ``content`` as nested lists of text, numbers and ndarrays; lists because order matters.

    Arrays are not copied.
    """
    return [_encode_record(key, record) for key, record in content.items()]


def decode_records(tree: list[list[Any]]) -> RecordDict:
    """Return the content that `encode_records` described. Raises `CheckpointError` for anything else."""
    try:
        return RecordDict({key: _decode_record(kind, items) for key, kind, items in tree})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"records in the checkpoint are not readable ({error}).") from error


def _encode_record(key: str, record: ArrayRecord | MetricRecord | ConfigRecord) -> list[Any]:
    if isinstance(record, ArrayRecord):
        return [key, "arrays", [[name, _encode_array(array)] for name, array in record.items()]]
    kind = "metrics" if isinstance(record, MetricRecord) else "config"
    return [key, kind, [[name, _encode_value(value)] for name, value in record.items()]]


def _decode_record(kind: str, items: list[list[Any]]) -> ArrayRecord | MetricRecord | ConfigRecord:
    if kind == "arrays":
        return array_record({name: _decode_array(value) for name, value in items})
    values = {name: _decode_value(value) for name, value in items}
    if kind == "metrics":
        return MetricRecord(values)
    if kind == "config":
        return ConfigRecord(values)
    raise ValueError(f"unknown kind of record {kind!r}")


def _encode_array(array: Array) -> Any:
    if array.stype == NUMPY_STYPE:
        return view(array)
    data = np.frombuffer(array.data, dtype=np.uint8)
    return {"dtype": array.dtype, "shape": list(array.shape), "stype": array.stype, "data": data}


def _decode_array(value: Any) -> Array:
    if isinstance(value, np.ndarray):
        return as_array(value)
    return Array(value["dtype"], tuple(value["shape"]), value["stype"], value["data"].tobytes())


def _encode_value(value: Any) -> Any:
    """Bytes, which JSON lacks, become uint8 arrays; nothing else in these records is an array."""
    if isinstance(value, bytes):
        return np.frombuffer(value, dtype=np.uint8)
    return [_encode_value(item) for item in value] if isinstance(value, list) else value


def _decode_value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return [_decode_value(item) for item in value] if isinstance(value, list) else value
