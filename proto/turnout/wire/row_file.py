"""Rows of one size in a file, changed a few at a time, that checkpoints refer to instead of copying.

A row that a checkpoint refers to is never written over: its next version goes to another slot, and the old
slot is used again only once no checkpoint with it can be resumed from. So a checkpoint costs what changed
since the one before, and a process killed at any moment leaves every checkpoint's rows as they were. Each
slot begins with the row's key, the checkpoint it was first written for, and a CRC-32, so that a damaged or
foreign row is refused and not trained on.

Rows are written and read whole, with ``pwrite`` and ``pread``: unlike a memory map this never reads a page
in order to overwrite it, and the process stays as small as one row.
"""

from __future__ import annotations

import os
import struct
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from turnout.wire.arrays import NDArray
from turnout.wire.columns import Column, unpack
from turnout.wire.durable import sync_directory, unwritten
from turnout.wire.errors import CheckpointError

_HEADER: Final = struct.Struct("<qqI")
_ROW_AT: Final = 64  # Where a slot's row begins: a cache line after its header.
_PAGE: Final = 4096
# Slots of this size and above begin on a page, so that no write has to read what lies beside it.
_PAGED_FROM: Final = 16 * _PAGE
_NOWHERE: Final = -1
_sync_data: Final = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync.
_DTYPES: Final = ("float16", "float32", "float64", "uint8")


@dataclass(frozen=True)
class RowFormat:
    """What a row is: ``size`` numbers of ``dtype``."""

    dtype: str
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return np.dtype(self.dtype).itemsize * self.size

    @property
    def stride(self) -> int:
        """Bytes of a slot."""
        unit = _PAGE if self.nbytes >= _PAGED_FROM else _ROW_AT
        return -(-(_ROW_AT + self.nbytes) // unit) * unit


class RowFile:
    """One row per key (a small non-negative integer), all of the first one's dtype and size.

    The file grows by a slot when a row needs one. `scratch` makes one without a name, which is gone with this
    object; `create` one that a checkpoint may refer to.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self.format: RowFormat | None = None
        self._handle = handle
        weakref.finalize(self, os.close, handle)
        self._slots = Column(np.int64, _NOWHERE)
        self._count = 0
        self._end = 0  # Slots the file has.
        self._free: list[int] = []
        # Rows since the last checkpoint may be written over; what they replaced waits for its release.
        self._epoch = 0
        self._fresh: set[int] = set()
        self._superseded: list[int] = []
        self._retired: list[tuple[int, list[int]]] = []
        self._slot = bytearray()

    @classmethod
    def scratch(cls, directory: str | Path | None = None) -> RowFile:
        """Return an empty file without a name in ``directory`` (default: the system's for scratch files)."""
        with tempfile.TemporaryFile(dir=directory, prefix="turnout-memory-") as file:
            return cls(Path(directory or tempfile.gettempdir()) / "scratch", os.dup(file.fileno()))

    @classmethod
    def create(cls, path: Path) -> RowFile:
        """Return an empty file at ``path``; one that was there is emptied."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        sync_directory(path.parent)
        return cls(path, handle)

    @classmethod
    def reopen(cls, rows: RowReference) -> RowFile:
        """Go on with the file of a checkpoint, as it was then; only one process may, the run's owner.

        What the checkpoint does not refer to may be an earlier one's, and is kept until that is released;
        ``rows.older`` says which of it is, and the rest is used again at once.
        """
        file = rows.file = cls(rows.path, os.open(rows.path, os.O_RDWR | os.O_CLOEXEC))
        file.format, file._epoch = rows.format, rows.epoch
        file._slots.load_state_dict(rows.slots)
        used = file._slots.values[file._slots.values != _NOWHERE]
        file._count = len(used)
        if file.format is not None:
            file._end = -(-os.fstat(file._handle).st_size // file.format.stride)
            others = np.ones(file._end, np.bool_)
            others[used] = False
            if rows.older is not None:
                held = np.zeros(file._end, np.bool_)
                for older in rows.older:
                    held[older.used()] = True
                file._free = np.flatnonzero(others & ~held).tolist()
                others &= held
            file._retired.append((rows.epoch - 1, np.flatnonzero(others).tolist()))
        return file

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return self._count * self.format.nbytes if self.format is not None else 0

    @property
    def slots(self) -> int:
        """How many slots the file has, rows that no one needs any more included."""
        return self._end

    def keys(self) -> Iterator[int]:
        """Iterate over the keys present, ascending."""
        return iter(np.flatnonzero(self._slots.values != _NOWHERE).tolist())

    def get(self, key: int) -> NDArray | None:
        """Return a copy of the row, or None when there is none. Raises OSError when it cannot be read."""
        if key >= len(self._slots) or self._slots[key] == _NOWHERE or self.format is None:
            return None
        row = np.empty(self.format.size, self.format.dtype)
        at = self._slots[key] * self.format.stride + _ROW_AT
        _read_into(self._handle, row, at, self.path)
        return row

    def put(self, key: int, row: NDArray) -> None:
        """Store a copy of ``row``.

        Raises ValueError for another dtype or size than the first row's, OSError naming file and size.
        """
        if self.format is None:
            self.format = RowFormat(row.dtype.name, row.size)
        if (row.dtype.name, row.size) != (self.format.dtype, self.format.size):
            raise ValueError(f"row {key} is {row.size} x {row.dtype}, the file's are {self.format}.")
        self._slots.reach(key + 1)
        old = self._slots[key]
        in_place = old != _NOWHERE and key in self._fresh
        slot = old if in_place else self._free[-1] if self._free else self._end
        self._write(slot, key, row)
        if in_place:
            return
        if self._free:
            self._free.pop()
        else:
            self._end += 1
        if old == _NOWHERE:
            self._count += 1
        else:
            self._superseded.append(old)
        self._slots[key] = slot
        self._fresh.add(key)

    def remove(self, key: int) -> None:
        """Let go of the row, if there is one; checkpoints that refer to it keep it."""
        if key >= len(self._slots) or (old := self._slots[key]) == _NOWHERE:
            return
        self._slots[key] = _NOWHERE
        self._count -= 1
        if key in self._fresh:
            self._fresh.remove(key)
            self._free.append(old)
        else:
            self._superseded.append(old)

    def matrix(self) -> tuple[NDArray, NDArray]:
        """Return the keys and their rows, shape (rows, size), as a read-only map of the file."""
        held = np.flatnonzero(self._slots.values != _NOWHERE)
        slots = self._slots.values[held]
        keys = held[np.argsort(slots)]
        if self.format is None:
            return keys, np.empty((0, 0), np.float32)
        if len(keys) < self._end:
            raise ValueError("slots between the rows are not in use; a file with references has no matrix.")
        with os.fdopen(os.dup(self._handle), "rb") as file:
            whole = np.memmap(file, np.uint8, "r", shape=(self._end, self.format.stride))
        rows = whole[:, _ROW_AT : _ROW_AT + self.format.nbytes]
        return keys, rows.view(np.ndarray).view(self.format.dtype)

    def expect(self, keys: Iterable[int]) -> None:
        """Have the rows of ``keys`` read ahead, so that they are at hand when asked for."""
        if self.format is None or not hasattr(os, "posix_fadvise"):
            return
        for key in keys:
            if key < len(self._slots) and (slot := self._slots[key]) != _NOWHERE:
                stride = self.format.stride
                os.posix_fadvise(self._handle, slot * stride, stride, os.POSIX_FADV_WILLNEED)

    def reference(self) -> RowReference:
        """Return what a checkpoint says of the rows as they are now; from here on none is written over."""
        self._epoch += 1
        self._retired.append((self._epoch - 1, self._superseded))
        self._superseded, self._fresh = [], set()
        return RowReference(self.path, self._epoch, self.format, self._slots.state_dict(), file=self)

    def release(self, epoch: int) -> None:
        """Use again what only checkpoints before ``epoch`` refer to: none of them will be resumed from."""
        while self._retired and self._retired[0][0] < epoch:
            self._free.extend(self._retired.pop(0)[1])

    def sync(self) -> None:
        """Make everything written so far durable."""
        try:
            _sync_data(self._handle)
        except OSError as error:
            raise unwritten(error, self.path, self._end * self._stride()) from error

    def _stride(self) -> int:
        return self.format.stride if self.format is not None else 0

    def _write(self, slot: int, key: int, row: NDArray) -> None:
        assert self.format is not None
        stride = self.format.stride
        if len(self._slot) != stride:
            self._slot = bytearray(stride)
        raw = np.ascontiguousarray(row).view(np.uint8).data
        _HEADER.pack_into(self._slot, 0, key, self._epoch + 1, zlib.crc32(raw))
        self._slot[_ROW_AT : _ROW_AT + len(raw)] = raw
        at, rest = slot * stride, memoryview(self._slot)
        try:
            while rest:
                written = os.pwrite(self._handle, rest, at)
                at, rest = at + written, rest[written:]
        except OSError as error:
            raise unwritten(error, self.path, stride) from error
        if stride >= _PAGED_FROM and hasattr(os, "posix_fadvise"):
            # Begins to write it out now: rows left for later would stall the round that syncs them.
            os.posix_fadvise(self._handle, slot * stride, stride, os.POSIX_FADV_DONTNEED)


@dataclass(eq=False)
class RowReference:
    """The rows of a `RowFile` as a checkpoint knows them: which slot each key's row is in.

    ``owned`` says that who loaded the checkpoint owns the run, and may go on writing to its file. ``file`` is
    the open one, None for a reference that was loaded and not reopened. ``older`` are those of all earlier
    checkpoints that may still be resumed from, None when they are not known.
    """

    path: Path
    epoch: int
    format: RowFormat | None
    slots: Mapping[str, Any]
    owned: bool = False
    file: RowFile | None = field(default=None, repr=False)
    older: Sequence[RowReference] | None = field(default=None, repr=False)

    def used(self) -> NDArray:
        """Return the slots that it refers to. Raises `CheckpointError` when they are not readable."""
        slots = unpack(self.slots, np.int64)
        used: NDArray = slots[slots != _NOWHERE]
        return used

    def sync(self) -> None:
        """Make the rows durable, before the checkpoint that refers to them is."""
        if self.file is not None:
            self.file.sync()

    def forget_older(self) -> None:
        """Say that no checkpoint before this one will be resumed from; its rows may be written over."""
        if self.file is not None:
            self.file.release(self.epoch)

    def document(self, parent: Path) -> dict[str, Any]:
        """Return what describes the reference in a checkpoint in ``parent``; `read` turns it back."""
        beside = self.path.parent.resolve() == parent.resolve()
        return {
            "file": self.path.name if beside else str(self.path.resolve()),
            "epoch": self.epoch,
            "dtype": None if self.format is None else self.format.dtype,
            "size": None if self.format is None else self.format.size,
            "slots": self.slots,
        }

    @classmethod
    def read(cls, document: Mapping[str, Any], parent: Path, *, owned: bool) -> RowReference:
        """Return the reference of ``document``. Raises `CheckpointError` when it is not one."""
        try:
            kind, size = document["dtype"], document["size"]
            if kind is not None and (kind not in _DTYPES or size < 0):
                raise ValueError(f"{size} x {kind}")
            layout = None if kind is None else RowFormat(kind, int(size))
            path, slots = parent / document["file"], document["slots"]
            return cls(path, int(document["epoch"]), layout, slots, owned)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"rows of the checkpoint are not readable ({error!r}).") from error

    def __iter__(self) -> Iterator[tuple[int, NDArray]]:
        """Yield key and row, in the order of the file; each is checked.

        Raises `CheckpointError` for a row that is missing, damaged, or of another client or time.
        """
        slots = unpack(self.slots, np.int64)
        present = np.flatnonzero(slots != _NOWHERE)
        keys = present[np.argsort(slots[present], kind="stable")]
        if self.format is None or not len(keys):
            return
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"rows {self.path}: {error.strerror}.") from error
        try:
            if (
                os.fstat(handle).st_size < (int(slots[keys[-1]]) + 1) * self.format.stride
                or slots[keys[0]] < 0
            ):
                raise CheckpointError(f"rows {self.path}: the file is shorter than its checkpoint says.")
            for key in keys.tolist():
                yield key, self._checked(handle, key, int(slots[key]))
        finally:
            os.close(handle)

    def verify(self) -> None:
        """Read every row. Raises `CheckpointError` as iterating does."""
        for _ in self:
            pass

    def _checked(self, handle: int, key: int, slot: int) -> NDArray:
        assert self.format is not None
        raw = np.empty(_ROW_AT + self.format.nbytes, np.uint8)
        try:
            _read_into(handle, raw, slot * self.format.stride, self.path)
        except OSError as error:
            raise CheckpointError(f"rows {self.path}: {error.strerror}.") from error
        owner, epoch, checksum = _HEADER.unpack_from(raw.data)
        row = raw[_ROW_AT:]
        if owner != key or not 0 < epoch <= self.epoch or zlib.crc32(row.data) != checksum:
            raise CheckpointError(f"rows {self.path}: the row of client {key} is damaged, or not its own.")
        return row.view(self.format.dtype)


def _read_into(handle: int, target: NDArray, at: int, path: Path) -> None:
    rest = memoryview(target.view(np.uint8).data)
    while rest:
        count = os.preadv(handle, [rest], at)
        if not count:
            raise OSError(5, f"the file ends {len(rest)} bytes too early", str(path))
        at, rest = at + count, rest[count:]
