"""Per-client vectors kept between rounds, behind one small interface with three backends.

FedStale, FedVARP, MIFA, FedAMD and the ADMM strategies keep one vector per client: N x d numbers. `RamMemory`
keeps them as they are, `HalfMemory` in half the space, `MappedMemory` in a file for what exceeds memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from turnout.strategies.array_api import array_namespace
from turnout.wire.errors import CheckpointError, ConfigError, unknown_name
from turnout.wire.registry import methods, register


class ClientMemory(Protocol):
    """One vector of fixed size per key (a small non-negative integer)."""

    def get(self, key: int) -> Any | None:
        """Return the stored vector (not to be changed), or None when there is none."""

    def put(self, key: int, vector: Any) -> Any:
        """Store a copy of ``vector`` and return it as `get` will, which may be rounded."""

    def keys(self) -> Iterator[int]:
        """Iterate over the keys present, ascending."""

    def __len__(self) -> int:
        """Return the number of vectors stored."""

    @property
    def nbytes(self) -> int:
        """Bytes that the stored vectors take."""

    def state_dict(self) -> dict[str, Any]:
        """Return the content as a tree for a checkpoint."""

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the content with that of `state_dict`."""


@register("ram", "memory")
class RamMemory:
    """Keeps each vector in memory, in its own precision, on its own device."""

    def __init__(self) -> None:
        self._rows: dict[int, Any] = {}

    def get(self, key: int) -> Any | None:
        """Return the stored vector, or None."""
        return self._rows.get(key)

    def put(self, key: int, vector: Any) -> Any:
        """Store a copy of ``vector``."""
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = array_namespace(vector).asarray(vector, copy=True)
        else:
            row[...] = vector
        return row

    def keys(self) -> Iterator[int]:
        """Iterate over the keys present, ascending."""
        return iter(sorted(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored vectors take."""
        return sum(int(row.nbytes) for row in self._rows.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the rows by key."""
        return {str(key): np.asarray(self._rows[key]) for key in self.keys()}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the rows."""
        self._rows = {int(key): np.array(row) for key, row in tree.items()}


@register("fp16", "memory")
class HalfMemory:
    """Keeps each vector as float16 with one scale per vector: half the memory of float32.

    The scale is the vector's largest absolute value, so the error of an element is at most ``2**-11`` of
    itself or ``2**-25`` of the largest one, whichever is larger.
    """

    def __init__(self) -> None:
        self._rows: dict[int, tuple[np.ndarray[Any, np.dtype[np.float16]], float, np.dtype[Any]]] = {}

    def get(self, key: int) -> Any | None:
        """Return the stored vector in the precision it came in, or None."""
        if key not in self._rows:
            return None
        row, scale, dtype = self._rows[key]
        return np.multiply(row, scale, dtype=dtype)

    def put(self, key: int, vector: Any) -> Any:
        """Store ``vector`` rounded to float16."""
        scale = float(np.max(np.abs(vector), initial=0.0)) or 1.0
        self._rows[key] = ((vector / vector.dtype.type(scale)).astype(np.float16), scale, vector.dtype)
        return self.get(key)

    def keys(self) -> Iterator[int]:
        """Iterate over the keys present, ascending."""
        return iter(sorted(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored vectors take."""
        return sum(row.nbytes for row, _, _ in self._rows.values())

    def state_dict(self) -> dict[str, Any]:
        """Return rows, scales and precisions by key."""
        return {
            str(key): {"row": row, "scale": scale, "dtype": dtype.name}
            for key, (row, scale, dtype) in sorted(self._rows.items())
        }

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the rows."""
        self._rows = {
            int(key): (np.array(entry["row"]), float(entry["scale"]), np.dtype(entry["dtype"]))
            for key, entry in tree.items()
        }


@register("mmap", "memory")
class MappedMemory:
    """Keeps the vectors in a memory-mapped file, for N x d beyond RAM; the file grows by doubling.

    ``path`` is a directory for the file (default: the system's temporary directory). The file is scratch: it
    is removed with the object, and a checkpoint holds its own copy.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        if path is not None and not Path(path).is_dir():
            raise ConfigError(f"memory path {str(path)!r} is not a directory; create it or leave it out.")
        # Open as long as this object lives, and gone with it.
        self._file = tempfile.TemporaryFile(dir=path, prefix="turnout-memory-")  # noqa: SIM115
        self._slots: dict[int, int] = {}
        self._map: np.memmap[Any, np.dtype[Any]] | None = None

    def get(self, key: int) -> Any | None:
        """Return a view of the stored vector, or None."""
        if self._map is None or key not in self._slots:
            return None
        return self._map[self._slots[key]].view(np.ndarray)

    def put(self, key: int, vector: Any) -> Any:
        """Store a copy of ``vector``."""
        slot = self._slots.setdefault(key, len(self._slots))
        if self._map is None or slot >= len(self._map):
            self._grow(max(8, 2 * slot), vector)
        assert self._map is not None
        self._map[slot] = vector
        return self._map[slot].view(np.ndarray)

    def keys(self) -> Iterator[int]:
        """Iterate over the keys present, ascending."""
        return iter(sorted(self._slots))

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored vectors take in the file."""
        return 0 if self._map is None else len(self._slots) * int(self._map[0].nbytes)

    def state_dict(self) -> dict[str, Any]:
        """Return the used part of the file and which key is where; nothing is copied into memory."""
        keys = sorted(self._slots, key=self._slots.__getitem__)
        rows = np.empty((0, 0), np.float32) if self._map is None else self._map[: len(keys)]
        return {"keys": np.array(keys, np.int64), "rows": rows}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the content, row by row."""
        keys, rows = tree["keys"], tree["rows"]
        if len(keys) != len(rows):
            raise CheckpointError(f"memory holds {len(rows)} rows for {len(keys)} clients.")
        self._slots, self._map = {}, None
        for key, row in zip(keys.tolist(), rows, strict=True):
            self.put(key, row)

    def _grow(self, capacity: int, vector: Any) -> None:
        self._file.truncate(capacity * vector.nbytes)
        self._map = np.memmap(self._file, dtype=vector.dtype, mode="r+", shape=(capacity, vector.size))


def open_memory(kind: str) -> ClientMemory:
    """Return a new memory: ``"ram"``, ``"fp16"``, ``"mmap"`` or ``"mmap:DIRECTORY"``.

    Raises `ConfigError` for anything else, naming the nearest kind.
    """
    name, _, argument = str(kind).partition(":")
    known = {entry.slug: entry.target for entry in methods("memory")}
    if name not in known:
        raise unknown_name("memory", str(kind), known)
    if argument and name != "mmap":
        raise ConfigError(f"memory {kind!r} takes no directory; only 'mmap:DIRECTORY' does.")
    memory: ClientMemory = known[name](argument) if argument else known[name]()
    return memory
