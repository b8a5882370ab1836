"""Per-client vectors kept between rounds, behind one small interface with three backends.

FedStale, FedVARP, MIFA, FedAMD and the ADMM strategies keep one vector per client: N x d numbers. `RamMemory`
keeps them as they are, `HalfMemory` in half the space, `MappedMemory` in a file for what exceeds memory.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from turnout.strategies.array_api import array_namespace
from turnout.wire.arrays import NDArray
from turnout.wire.errors import CheckpointError, ConfigError, unknown_name
from turnout.wire.registry import methods, register
from turnout.wire.row_file import RowFile, RowReference

_HALF_HEADER: Final = struct.Struct("<dq")  # Scale, and bytes per number before rounding.


class ClientMemory(Protocol):
    """One vector of fixed size per key (a small non-negative integer).

    A checkpoint holds all vectors, unless `keep_in` has named a place for them that outlives the process:
    then it refers to them there, and costs what has changed since the one before.
    """

    def get(self, key: int) -> Any | None:
        """Return the stored vector (not to be changed), or None when there is none."""

    def put(self, key: int, vector: Any) -> Any:
        """Store a copy of ``vector`` and return it as `get` will, which may be rounded."""

    def expect(self, keys: Iterable[int]) -> None:
        """Prepare for `get` of these keys soon."""

    def keys(self) -> Iterator[int]:
        """Iterate over the keys present, ascending."""

    def __len__(self) -> int:
        """Return the number of vectors stored."""

    @property
    def nbytes(self) -> int:
        """Bytes that the stored vectors take."""

    def keep_in(self, directory: Path, name: str, run: str) -> None:
        """Let checkpoints refer to a file ``name`` in ``directory``, which belongs to ``run``."""

    def state_dict(self) -> dict[str, Any]:
        """Return the content as a tree for a checkpoint."""

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the content with that of `state_dict`."""


class _Held(ABC):
    """What the memories in RAM share: rows by key, and the file of changed ones that checkpoints refer to."""

    def __init__(self) -> None:
        self._rows: dict[int, Any] = {}
        self._bytes = 0
        self._file: RowFile | None = None
        self._changed: set[int] = set()

    def expect(self, keys: Iterable[int]) -> None:
        """Do nothing: all rows are at hand."""

    def keys(self) -> Iterator[int]:
        """Iterate over the keys present, ascending."""
        return iter(sorted(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored vectors take."""
        return self._bytes

    def keep_in(self, directory: Path, name: str, run: str) -> None:
        """Let checkpoints refer to a file in ``directory``, to which changed rows are written for each."""
        if self._file is None:
            self._file = RowFile.create(directory / f"{name}.rows")
            self._changed = set(self._rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows by key, or a reference to the file they are kept in."""
        if self._file is None:
            return {str(key): self._entry(self._rows[key]) for key in self.keys()}
        for key in sorted(self._changed):
            self._file.put(key, self._record(self._rows[key]))
        self._changed.clear()
        return {"rows": self._file.reference()}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the rows."""
        rows = tree.get("rows")
        if isinstance(rows, RowReference):
            self._rows = {key: self._of_record(record) for key, record in rows}
            self._file = RowFile.reopen(rows) if rows.owned else None
        else:
            self._rows = {int(key): self._of_entry(entry) for key, entry in tree.items()}
            self._file = None
        self._bytes = sum(self._size(row) for row in self._rows.values())
        self._changed.clear()

    def _note(self, key: int, added: Any | None) -> None:
        """Note that the row of ``key`` has changed, or was ``added``."""
        if added is not None:
            self._bytes += self._size(added)
        if self._file is not None:
            self._changed.add(key)

    @abstractmethod
    def _size(self, row: Any) -> int:
        """Return the bytes of a row."""

    @abstractmethod
    def _entry(self, row: Any) -> Any:
        """Return a row as a part of a tree."""

    @abstractmethod
    def _of_entry(self, entry: Any) -> Any:
        """Return the row of `_entry`."""

    @abstractmethod
    def _record(self, row: Any) -> NDArray:
        """Return a row as one array of fixed size."""

    @abstractmethod
    def _of_record(self, record: NDArray) -> Any:
        """Return the row of `_record`."""


@register("ram", "memory")
class RamMemory(_Held):
    """Keeps each vector in memory, in its own precision, on its own device."""

    def get(self, key: int) -> Any | None:
        """Return the stored vector, or None."""
        return self._rows.get(key)

    def put(self, key: int, vector: Any) -> Any:
        """Store a copy of ``vector``."""
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = array_namespace(vector).asarray(vector, copy=True)
            self._note(key, row)
        else:
            row[...] = vector
            self._note(key, None)
        return row

    def _size(self, row: Any) -> int:
        return int(row.nbytes)

    def _entry(self, row: Any) -> Any:
        return np.asarray(row)

    def _of_entry(self, entry: Any) -> Any:
        return np.array(entry)

    _record = _entry

    def _of_record(self, record: NDArray) -> Any:
        return record.copy()  # Without the header that it was read with, and aligned.


_HalfRow = tuple[np.ndarray[Any, np.dtype[np.float16]], float, np.dtype[Any]]


@register("fp16", "memory")
class HalfMemory(_Held):
    """Keeps each vector as float16 with one scale per vector: half the memory of float32.

    The scale is the vector's largest absolute value, so the error of an element is at most ``2**-11`` of
    itself or ``2**-25`` of the largest one, whichever is larger.
    """

    def get(self, key: int) -> Any | None:
        """Return the stored vector in the precision it came in, or None."""
        if key not in self._rows:
            return None
        row, scale, dtype = self._rows[key]
        return np.multiply(row, scale, dtype=dtype)

    def put(self, key: int, vector: Any) -> Any:
        """Store ``vector`` rounded to float16."""
        scale = float(np.max(np.abs(vector), initial=0.0)) or 1.0
        row = ((vector / vector.dtype.type(scale)).astype(np.float16), scale, vector.dtype)
        self._note(key, None if key in self._rows else row)
        self._rows[key] = row
        return self.get(key)

    def _size(self, row: _HalfRow) -> int:
        return row[0].nbytes

    def _entry(self, row: _HalfRow) -> Any:
        numbers, scale, dtype = row
        return {"row": numbers, "scale": scale, "dtype": dtype.name}

    def _of_entry(self, entry: Any) -> _HalfRow:
        return np.array(entry["row"]), float(entry["scale"]), np.dtype(entry["dtype"])

    def _record(self, row: _HalfRow) -> NDArray:
        numbers, scale, dtype = row
        header = np.frombuffer(_HALF_HEADER.pack(scale, dtype.itemsize), np.uint8)
        return np.concatenate([header, numbers.view(np.uint8)])

    def _of_record(self, record: NDArray) -> _HalfRow:
        scale, itemsize = _HALF_HEADER.unpack_from(record.data)
        return record[_HALF_HEADER.size :].copy().view(np.float16), scale, np.dtype(f"f{itemsize}")


@register("mmap", "memory")
class MappedMemory:
    """Keeps the vectors in a file, for N x d beyond RAM; it grows by one row as a client first appears.

    ``path`` is a directory for the file (default: the system's temporary directory, or, in a recorded run,
    the run's). Only the rows of clients that take part are read and written, each as a whole, and the
    operating system keeps in memory of them what fits. Without `keep_in` the file has no name and is gone
    with the object; a checkpoint then holds its own copy.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        if path is not None and not Path(path).is_dir():
            raise ConfigError(f"memory path {str(path)!r} is not a directory; create it or leave it out.")
        self._directory = None if path is None else Path(path)
        self._kept = False
        self._file: RowFile | None = None

    def get(self, key: int) -> Any | None:
        """Return a copy of the stored vector, or None."""
        return None if self._file is None else self._file.get(key)

    def put(self, key: int, vector: Any) -> Any:
        """Store ``vector`` and return it."""
        self._open().put(key, np.asarray(vector))
        return vector

    def expect(self, keys: Iterable[int]) -> None:
        """Have these rows read ahead."""
        if self._file is not None:
            self._file.expect(keys)

    def keys(self) -> Iterator[int]:
        """Iterate over the keys present, ascending."""
        return iter(()) if self._file is None else self._file.keys()

    def __len__(self) -> int:
        return 0 if self._file is None else len(self._file)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored vectors take in the file."""
        return 0 if self._file is None else self._file.nbytes

    def keep_in(self, directory: Path, name: str, run: str) -> None:
        """Keep the rows in a named file, which checkpoints then refer to.

        It lies in ``directory``, or, as ``<run>-<name>.rows``, in the directory that was asked for.
        """
        if self._kept:
            return
        path = directory / f"{name}.rows"
        if self._directory is not None:
            path = self._directory.resolve() / f"{run}-{name}.rows"
        before, self._file, self._kept = self._file, RowFile.create(path), True
        if before is not None:
            for key in before.keys():  # noqa: SIM118 - not a dict
                self.put(key, before.get(key))

    def state_dict(self) -> dict[str, Any]:
        """Return a reference to the rows; of a file without a name all of them, mapped and not copied."""
        if self._kept:
            return {"rows": self._open().reference()}
        keys, rows = self._open().matrix()
        return {"keys": keys, "rows": rows}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Replace the content: go on with the file of a checkpoint that is our own, else copy row by row."""
        rows = tree["rows"]
        if isinstance(rows, RowReference) and rows.owned:
            self._file, self._kept = RowFile.reopen(rows), True
            return
        pairs: Iterable[tuple[int, Any]] = rows
        if not isinstance(rows, RowReference):
            keys = tree["keys"]
            if len(keys) != len(rows):
                raise CheckpointError(f"memory holds {len(rows)} rows for {len(keys)} clients.")
            pairs = zip(keys.tolist(), rows, strict=True)
        self._file, self._kept = RowFile.scratch(self._directory), False
        for key, row in pairs:
            self._file.put(key, row)

    def _open(self) -> RowFile:
        if self._file is None:
            self._file = RowFile.scratch(self._directory)
        return self._file


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
