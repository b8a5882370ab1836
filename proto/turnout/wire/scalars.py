"""Numbers, text and lists of config and metric records as they travel, in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from flwr.app import ConfigRecord, MetricRecord

from turnout.v1 import fleet_pb2 as pb
from turnout.wire.errors import LayoutError

_MAX_ENTRIES: Final = 4096
_MAX_INT: Final = 2**63


def encode_scalars(values: Mapping[str, Any]) -> pb.Scalars:
    """Return a config or metric record's entries. Raises `LayoutError` for a value that cannot travel."""
    if len(values) > _MAX_ENTRIES:
        raise LayoutError(f"{len(values)} entries in one record, at most {_MAX_ENTRIES} travel.")
    message = pb.Scalars()
    for name, value in values.items():
        entry = message.entries.add(name=name)
        if isinstance(value, list):
            entry.list.SetInParent()
            for item in value:
                _set(entry.list.items.add(), name, item)
        else:
            _set(entry, name, value)
    return message


def decode_scalars(message: pb.Scalars) -> dict[str, Any]:
    """Return the entries by name. Raises `LayoutError` for too many, for duplicates and for empty ones."""
    if len(message.entries) > _MAX_ENTRIES:
        raise LayoutError(f"{len(message.entries)} entries in one record, at most {_MAX_ENTRIES} are read.")
    values: dict[str, Any] = {}
    for entry in message.entries:
        if entry.name in values:
            raise LayoutError(f"entry {entry.name[:64]!r} comes twice.")
        if entry.WhichOneof("value") == "list":
            values[entry.name] = [_get(item) for item in entry.list.items]
        else:
            values[entry.name] = _get(entry)
    return values


def scalar_record(record: pb.Record) -> MetricRecord | ConfigRecord:
    """Return a record of scalars. Raises `LayoutError` also for what Flower does not take in it."""
    metrics = record.WhichOneof("kind") == "metrics"
    values = decode_scalars(record.metrics if metrics else record.config)
    try:
        return MetricRecord(values) if metrics else ConfigRecord(values)
    except (TypeError, ValueError) as error:
        raise LayoutError(f"record {record.name[:64]!r} cannot be read: {error}") from error


def _set(entry: pb.Scalar, name: str, value: Any) -> None:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        entry.flag = value
    elif isinstance(value, int) and -_MAX_INT <= value < _MAX_INT:
        entry.integer = value
    elif isinstance(value, float):
        entry.number = value
    elif isinstance(value, str):
        entry.text = value
    elif isinstance(value, bytes):
        entry.blob = value
    else:
        raise LayoutError(
            f"entry {name[:64]!r}: {value!r:.80} cannot travel; use 64-bit numbers, text or bytes."
        )


def _get(entry: pb.Scalar) -> Any:
    kind = entry.WhichOneof("value")
    if kind is None or kind == "list":
        raise LayoutError(f"entry {entry.name[:64]!r} has no value.")
    return getattr(entry, kind)
