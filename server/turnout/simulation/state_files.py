"""Clients' states in files of rows: out of memory, and referred to by checkpoints instead of copied.

A state is a whole `RecordDict`, so states differ in size. Each becomes one row, and there is a file for each
size in use (a few: sizes are rounded up by at most a sixteenth). Row format: 4 bytes with the length of a
JSON description, the description, then the arrays, each on a boundary of 64 bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import RecordDict

from turnout.wire.arrays import NDArray
from turnout.wire.errors import CheckpointError
from turnout.wire.record_tree import decode_records, encode_records
from turnout.wire.row_file import RowFile, RowReference

_LENGTH_BYTES: Final = 4
_ALIGNMENT: Final = 64
_AT: Final = "@"


class StateFiles:
    """One state per client, in ``<directory>/clients-<row bytes>.rows``, or in files without a name."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._files: dict[int, RowFile] = {}
        self._sizes: dict[int, int] = {}

    @classmethod
    def reopen(cls, references: Mapping[str, Any]) -> StateFiles:
        """Return the states of a checkpoint: its own files if we own the run, else a copy of them.

        Raises `CheckpointError` for what is not a checkpoint's.
        """
        if not all(isinstance(rows, RowReference) for rows in references.values()):
            raise CheckpointError(
                "clients' states in the checkpoint are not readable: not references to rows."
            )
        owned = all(rows.owned for rows in references.values())
        directory = next((rows.path.parent for rows in references.values()), None) if owned else None
        files = cls(directory)
        for rows in references.values():
            if owned:
                file = RowFile.reopen(rows)
                if file.format is not None:
                    files._files[file.format.size] = file
                    files._sizes.update(dict.fromkeys(file.keys(), file.format.size))
            else:
                for node, row in rows:
                    files._put(node, row)
        return files

    def __contains__(self, node: int) -> bool:
        return node in self._sizes

    def nodes(self) -> Iterator[int]:
        """Iterate over the clients that have a state here."""
        return iter(self._sizes)

    def get(self, node: int) -> RecordDict:
        """Return the client's state, around one new piece of memory; an empty one if it has none."""
        return decode(self._row(node)) if node in self._sizes else RecordDict()

    def put(self, node: int, state: RecordDict) -> None:
        """Store the client's state. Raises OSError naming file and size when it cannot be written."""
        if state:
            self._put(node, encode(state))
        else:
            self.remove(node)

    def remove(self, node: int) -> None:
        """Let go of the client's state, if it has one."""
        if node in self._sizes:
            self._files[self._sizes.pop(node)].remove(node)

    def copy_from(self, other: StateFiles) -> None:
        """Store all states of ``other``."""
        for node in other.nodes():
            self._put(node, other._row(node))

    def references(self) -> dict[str, RowReference]:
        """Return what a checkpoint says of the states as they are now."""
        return {str(size): file.reference() for size, file in sorted(self._files.items())}

    def _row(self, node: int) -> NDArray:
        row = self._files[self._sizes[node]].get(node)
        assert row is not None
        return row

    def _put(self, node: int, row: NDArray) -> None:
        if self._sizes.get(node, row.size) != row.size:
            self.remove(node)
        if row.size not in self._files:
            self._files[row.size] = (
                RowFile.scratch()
                if self.directory is None
                else RowFile.create(self.directory / f"clients-{row.size}.rows")
            )
        self._files[row.size].put(node, row)
        self._sizes[node] = row.size


def encode(state: RecordDict) -> NDArray:
    """Return ``state`` as bytes whose number is one of few."""
    arrays: list[tuple[int, NDArray]] = []
    end = 0

    def placed(value: Any) -> Any:
        nonlocal end
        if isinstance(value, np.ndarray):
            arrays.append((end, value))
            end = _aligned(end + value.nbytes)
            return {_AT: arrays[-1][0], "dtype": value.dtype.str, "shape": list(value.shape)}
        if isinstance(value, list):
            return [placed(item) for item in value]
        if isinstance(value, dict):
            return {key: placed(item) for key, item in value.items()}
        return value

    text = json.dumps([placed(record) for record in encode_records(state)]).encode()
    begin = _aligned(_LENGTH_BYTES + len(text))
    row = np.empty(_size_class(begin + end), np.uint8)
    row[:_LENGTH_BYTES] = np.frombuffer(len(text).to_bytes(_LENGTH_BYTES, "little"), np.uint8)
    row[_LENGTH_BYTES : _LENGTH_BYTES + len(text)] = np.frombuffer(text, np.uint8)
    row[_LENGTH_BYTES + len(text) : begin] = 0
    last = begin
    for offset, array in arrays:
        at = begin + offset
        row[last:at] = 0
        last = at + array.nbytes
        np.ndarray(array.shape, array.dtype, row.data, at)[...] = array
    row[last:] = 0
    return row


def decode(row: NDArray) -> RecordDict:
    """Return the state of `encode`, its arrays in place. Raises `CheckpointError` for anything else."""
    try:
        length = int.from_bytes(row[:_LENGTH_BYTES].tobytes(), "little")
        tree = json.loads(row[_LENGTH_BYTES : _LENGTH_BYTES + length].tobytes())
        begin = _aligned(_LENGTH_BYTES + length)
        return decode_records(_found(tree, row, begin))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"a client's state in the checkpoint is not readable ({error!r}).") from error


def _found(value: Any, row: NDArray, begin: int) -> Any:
    if isinstance(value, list):
        return [_found(item, row, begin) for item in value]
    if not isinstance(value, dict):
        return value
    if _AT not in value:
        return {key: _found(item, row, begin) for key, item in value.items()}
    dtype, shape, at = np.dtype(value["dtype"]), tuple(value["shape"]), begin + value[_AT]
    if dtype.kind not in "fiub" or min(shape, default=0) < 0 or at < begin:
        raise ValueError(f"an array of {dtype} and shape {shape} at {at}")
    piece = row[at : at + math.prod(shape) * dtype.itemsize]
    return piece.view(dtype).reshape(shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _size_class(nbytes: int) -> int:
    """Round up to one of sixteen sizes between two powers of two."""
    step = max(_ALIGNMENT, 1 << max(0, (nbytes - 1).bit_length() - 5))
    return -(-nbytes // step) * step
