"""Records between relatives: the structure as JSON, the arrays as references into shared heaps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from flwr.app import RecordDict

from turnout.simulation.workers.heap import Ref, SharedHeap
from turnout.wire.arrays import NDArray
from turnout.wire.flower import LazyArray
from turnout.wire.record_tree import decode_records, encode_records

_AT: Final = "@"

Entry = dict[str, Any]
"""A reference with dtype and shape, as it stands in JSON."""


class Parcels:
    """Wraps what this process sends, into its own heap, and unwraps what its relatives sent."""

    def __init__(self, own: SharedHeap, heaps: Sequence[SharedHeap]) -> None:
        self.own = own
        self._heaps = heaps

    def put(self, array: NDArray) -> Entry:
        """Copy ``array`` into the own heap and return its entry."""
        return _entry(self.own.put(array), array.dtype, array.shape)

    def empty(self, dtype: Any, shape: Sequence[int]) -> tuple[Entry, NDArray]:
        """Return the entry of a new block in the own heap, and the block as an array to be filled."""
        dtype = np.dtype(dtype)
        ref = self.own.allocate(math.prod(shape) * dtype.itemsize)
        return _entry(ref, dtype, shape), self.own.array(ref, dtype, shape)

    def get(self, entry: Entry) -> NDArray:
        """Return the array of an entry, in place."""
        ref = Ref(*entry[_AT])
        return self._heaps[ref.heap].array(ref, entry["dtype"], entry["shape"])

    def release(self, entry: Entry) -> None:
        """Take back a block of the own heap."""
        self.own.release(Ref(*entry[_AT]), _nbytes(entry))

    def wrap(self, content: RecordDict, known: Mapping[int, Entry] | None = None) -> list[Any]:
        """Return ``content`` as a JSON-able tree.

        Arrays are copied to the own heap, except those in ``known`` (by ``id``), which are there already.
        """
        known = known or {}

        def wrapped(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return known.get(id(value)) or self.put(value)
            if isinstance(value, list):
                return [wrapped(item) for item in value]
            if isinstance(value, dict):
                return {key: wrapped(item) for key, item in value.items()}
            return value

        return [wrapped(record) for record in encode_records(content)]

    def copied(self, tree: list[Any]) -> RecordDict:
        """Return the content of a wrapped tree around arrays of its own."""
        return decode_records(_map(tree, lambda entry: np.array(self.get(entry))))

    def unwrap(self, tree: list[Any]) -> tuple[RecordDict, dict[int, Entry]]:
        """Return the content of a wrapped tree around arrays in place, and their entries by ``id``.

        The entries are valid as long as the content lives.
        """
        content = decode_records(_map(tree, self.get))
        known: dict[int, Entry] = {}
        for key, kind, items in tree:
            for name, value in items if kind == "arrays" else ():
                array = content[key][name]
                if isinstance(array, LazyArray):  # The record keeps its ndarray, so its id stays its own.
                    known[id(array.ndarray)] = value
        return content, known


def entries(tree: Any) -> Iterator[Entry]:
    """Yield the entries in a wrapped tree, in order."""
    if isinstance(tree, dict):
        if _AT in tree:
            yield tree
        else:
            for item in tree.values():
                yield from entries(item)
    elif isinstance(tree, list):
        for item in tree:
            yield from entries(item)


def owner(entry: Entry) -> int:
    """Return the number of the heap that an entry's block belongs to."""
    return int(entry[_AT][0])


def place(entry: Entry) -> tuple[int, ...]:
    """Return what identifies an entry's block."""
    return tuple(entry[_AT])


def _map(value: Any, get: Callable[[Entry], NDArray]) -> Any:
    if isinstance(value, list):
        return [_map(item, get) for item in value]
    if isinstance(value, dict):
        return get(value) if _AT in value else {key: _map(item, get) for key, item in value.items()}
    return value


def _entry(ref: Ref, dtype: np.dtype[Any], shape: Sequence[int]) -> Entry:
    return {_AT: list(ref), "dtype": dtype.str, "shape": list(shape)}


def _nbytes(entry: Entry) -> int:
    count = math.prod(entry["shape"])
    return count * np.dtype(entry["dtype"]).itemsize
