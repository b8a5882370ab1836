"""What travels in an EGGROLL federation: fitness differences up, the log of rounds down.

Both are records of two arrays: ``head``, five 32-bit words each, and 32-bit floats: 20 bytes and 4 a pair.
Differences of which only the sign counts take one bit each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord

from turnout.wire.arrays import NDArray, as_array, view
from turnout.wire.errors import LayoutError

HEAD_BYTES: Final = 20
_HEAD: Final = "head"
_DIFFERENCES: Final = "differences"
_SIGNS: Final = "signs"
_WEIGHTS: Final = "weights"
_WORD: Final = 1 << 32
_RESYNC: Final = 1
_SIGNED: Final = 2
_CHECKED: Final = 1


@dataclass(frozen=True, slots=True)
class Fitness:
    """One client's round: ``differences`` are ``d_j = F_j+ - F_j-`` of its pairs from ``first_pair`` on.

    ``client`` is the lower 32 bits of its id. ``search`` is the digest of the settings it evaluated under
    (24 bits). ``resync``: it has no model that the log fits, and asks for one; then it has no pairs.
    ``signs``: differences are 1 or -1.
    """

    server_round: int
    client: int
    first_pair: int
    differences: NDArray
    search: int
    resync: bool = False
    signs: bool = False

    @property
    def about(self) -> tuple[int, int, int, int, int, bool]:
        """Return what it answers: round, client, first pair, number of pairs, settings, whether signs."""
        count = len(self.differences)
        return self.server_round, self.client, self.first_pair, count, self.search, self.signs

    def record(self) -> ArrayRecord:
        """Return the record to send: 20 + 4 P_k bytes, or for signs 20 + P_k / 8."""
        flags = self.search << 8 | (_RESYNC if self.resync else 0) | (_SIGNED if self.signs else 0)
        words = [self.server_round, self.client % _WORD, self.first_pair, len(self.differences), flags]
        record = ArrayRecord()
        record[_HEAD] = as_array(np.array(words, np.uint32))
        if self.signs:
            record[_SIGNS] = as_array(np.packbits(self.differences > 0.0, bitorder="little"))
        else:
            record[_DIFFERENCES] = as_array(np.asarray(self.differences, np.float32))
        return record

    @classmethod
    def read(cls, record: Mapping[str, Array]) -> Fitness:
        """Return what `record` wrote. Raises `LayoutError` for anything else, NaN excepted."""
        signs = _SIGNS in record
        dtype = np.uint8 if signs else np.float32
        head, numbers = _arrays(record, _HEAD, _SIGNS if signs else _DIFFERENCES, dtype)
        if head.shape != (5,) or numbers.shape != (-(-int(head[3]) // 8) if signs else int(head[3]),):
            raise LayoutError(
                f"a fitness reply needs a head of 5 words and as many differences as it says, got "
                f"{list(head.shape)} and {list(numbers.shape)}."
            )
        server_round, client, first, count, flags = head.tolist()
        if flags & 0xFF & ~_RESYNC != (_SIGNED if signs else 0):
            raise LayoutError(f"a fitness reply has flags {flags & 0xFF:#x}, which do not fit its arrays.")
        if signs:
            bits = np.unpackbits(numbers, bitorder="little")
            if bits[count:].any():
                raise LayoutError(f"a fitness reply has signs beyond its {count} pairs.")
            numbers = np.where(bits[:count], np.float32(1.0), np.float32(-1.0))
        return cls(server_round, client, first, numbers, flags >> 8, bool(flags & _RESYNC), signs)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One round as every replica repeats it: the weights of its pairs, none when nobody came.

    ``steps`` is the number of rounds so far that moved the model. ``checksum`` is that of the replica after
    the round, in rounds in which it is checked.
    """

    server_round: int
    weights: NDArray
    steps: int
    checksum: int | None = None

    @property
    def num_bytes(self) -> int:
        """What it takes on the wire."""
        return HEAD_BYTES + 4 * len(self.weights)


def log_record(entries: Sequence[LogEntry]) -> ArrayRecord:
    """Return ``entries``, which follow one another, as a record."""
    head = np.array([_words(entry) for entry in entries], np.uint32).reshape(len(entries), 5)
    record = ArrayRecord()
    record[_HEAD] = as_array(head)
    weights = [np.asarray(entry.weights, np.float32) for entry in entries]
    record[_WEIGHTS] = as_array(np.concatenate([*weights, np.empty(0, np.float32)]))
    return record


def read_log(record: Mapping[str, Array]) -> list[LogEntry]:
    """Return what `log_record` wrote. Raises `LayoutError` for anything else."""
    head, weights = _arrays(record, _HEAD, _WEIGHTS)
    if head.ndim != 2 or head.shape[1] != 5 or weights.shape != (int(head[:, 1].sum(dtype=np.int64)),):
        raise LayoutError(
            f"a seed log needs heads of 5 words and as many weights as they say, got {list(head.shape)} and "
            f"{list(weights.shape)}."
        )
    ends = np.cumsum(head[:, 1], dtype=np.int64).tolist()
    entries = []
    for (server_round, count, flags, checksum, steps), end in zip(head.tolist(), ends, strict=True):
        checked = checksum if flags & _CHECKED else None
        entries.append(LogEntry(server_round, weights[end - count : end], steps, checked))
    return entries


def _words(entry: LogEntry) -> tuple[int, int, int, int, int]:
    checked = entry.checksum is not None
    return (
        entry.server_round,
        len(entry.weights),
        _CHECKED if checked else 0,
        entry.checksum or 0,
        entry.steps,
    )


def _arrays(
    record: Mapping[str, Array], head: str, numbers: str, dtype: type[np.generic] = np.float32
) -> tuple[NDArray, NDArray]:
    if set(record) != {head, numbers}:
        raise LayoutError(
            f"the record must have the arrays {head!r} and {numbers!r}, got {sorted(record)[:4]}."
        )
    words, values = view(record[head]), view(record[numbers])
    if words.dtype != np.uint32 or values.dtype != dtype or values.ndim != 1:
        raise LayoutError(
            f"{head!r} must be uint32 and {numbers!r} a {np.dtype(dtype)} vector, got {words.dtype} and "
            f"{values.dtype}."
        )
    return words, values
