"""Participation replayed from a recording: a CSV file or an array of zeros and ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from turnout.simulation.participation import Mask, ParticipationModel
from turnout.wire.errors import ConfigError
from turnout.wire.registry import register

_NAME: Final = re.compile(r"(?:client-)?(\d{1,9})", re.ASCII)
_ZERO, _ONE, _COMMA, _NEWLINE = b"01,\n"


@register("trace", kind="participation")
class Trace(ParticipationModel):
    """Who took part in each round of a recorded federation, replayed.

    The file has one line per round, one column per client, each cell ``1`` (took part) or ``0``. The first
    line may be a header that names the columns, in any order, ``client-0`` to ``client-<N-1>`` or plainly
    ``0`` to ``<N-1>`` (a first line of only ``0`` and ``1`` is read as a round). `probabilities` are the
    observed frequencies.

    Raises `ConfigError` naming file, line, column, value and fix for anything else.

    source
        The path of a CSV file, or in Python an array of shape (rounds, num_clients) of zeros and ones.
    cycle
        A run longer than the trace starts again from its first round; if false, it ends with an error.
    """

    def __init__(self, source: str | Path | npt.ArrayLike, cycle: bool = True) -> None:
        rounds = _read(Path(source)) if isinstance(source, (str, Path)) else _check_array(source)
        rounds.flags.writeable = False
        self._rounds = rounds
        self.cycle = cycle
        self._name = f"trace {source}" if isinstance(source, (str, Path)) else "trace"
        super().__init__(rounds.mean(axis=0, dtype=np.float64))

    @property
    def num_rounds(self) -> int:
        """Number of recorded rounds."""
        return int(self._rounds.shape[0])

    def save(self, path: str | Path) -> None:
        """Write the trace as a CSV file with a header, which ``Trace(path)`` reads back."""
        line = np.full(2 * self.num_clients, _COMMA, dtype=np.uint8)
        line[-1] = _NEWLINE
        with Path(path).open("wb") as file:
            file.write(",".join(f"client-{client}" for client in range(self.num_clients)).encode() + b"\n")
            for mask in self._rounds:
                line[::2] = mask + np.uint8(_ZERO)
                file.write(line.tobytes())

    def _mask(self, server_round: int) -> Mask:
        row = server_round - 1
        if row >= self.num_rounds:
            if not self.cycle:
                raise ConfigError(
                    f"{self._name} has {self.num_rounds} rounds and round {server_round} was asked for; pass "
                    f"cycle=True to start again from its first, or run at most {self.num_rounds} rounds."
                )
            row %= self.num_rounds
        mask: Mask = self._rounds[row]
        return mask


def _check_array(source: npt.ArrayLike) -> Mask:
    array = np.asarray(source)
    if array.ndim != 2 or array.size == 0:
        raise ConfigError(f"trace must have shape (rounds, num_clients), got {array.shape}.")
    bad = (array != 0) & (array != 1)
    if bad.any():
        row, client = (int(index) for index in np.argwhere(bad)[0])
        raise ConfigError(
            f"trace: round {row + 1}, client {client} is {array[row, client]}, neither 0 nor 1; "
            "write 1 for took part and 0 for not."
        )
    return array.astype(np.bool_)  # Always a copy: the caller's array may change.


def _read(path: Path) -> Mask:
    """Read a trace file into an array of shape (rounds, clients)."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise ConfigError(
            f"trace {path}: cannot be read ({error.strerror}); give the path of a CSV file."
        ) from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ConfigError(f"trace {path}: the file is empty; write one line of 0s and 1s per round.")
    order = _header(path, lines[0])
    first = 0 if order is None else 1
    width = lines[0].count(b",") + 1
    if len(lines) == first:
        raise ConfigError(
            f"trace {path}: there is a header but no round; add one line of 0s and 1s per round."
        )
    rounds = np.empty((len(lines) - first, width), dtype=np.bool_)
    for number in range(first, len(lines)):
        cells = _cells(lines[number])
        if cells is None or cells.size != width:
            raise _bad_line(path, number + 1, lines[number], width)
        rounds[number - first] = cells
    return rounds if order is None else rounds[:, np.argsort(order)]


def _cells(line: bytes) -> Mask | None:
    """Return a line of 0s and 1s as booleans, or None if it is anything else."""
    raw = np.frombuffer(line.translate(None, b" \t\r"), dtype=np.uint8)
    if raw.size % 2 == 0 or (raw[1::2] != _COMMA).any() or ((raw[::2] != _ZERO) & (raw[::2] != _ONE)).any():
        return None
    ones: Mask = raw[::2] == _ONE
    return ones


def _header(path: Path, line: bytes) -> npt.NDArray[np.int64] | None:
    """Return the client of each column if the first line is a header, None if it is a round."""
    if _cells(line) is not None:
        return None
    cells = [cell.strip() for cell in line.decode("utf-8", "replace").split(",")]
    ids = [int(match[1]) if (match := _NAME.fullmatch(cell)) else -1 for cell in cells]
    seen: set[int] = set()
    for column, (cell, client) in enumerate(zip(cells, ids, strict=True), start=1):
        if not 0 <= client < len(cells) or client in seen:
            raise ConfigError(
                f"trace {path}, line 1, column {column}: {cell!r} is neither 0 or 1 nor, in a header, one of "
                f"client-0 to client-{len(cells) - 1} for the first time; write 1 for took part and 0 for "
                "not, or correct the header."
            )
        seen.add(client)
    return np.array(ids, dtype=np.int64)


def _bad_line(path: Path, number: int, line: bytes, width: int) -> ConfigError:
    cells = [cell.strip() for cell in line.decode("utf-8", "replace").split(",")]
    for column, cell in enumerate(cells, start=1):
        if cell not in ("0", "1"):
            return ConfigError(
                f"trace {path}, line {number}, column {column}: {cell!r} is neither 0 nor 1; "
                "write 1 for took part and 0 for not."
            )
    return ConfigError(
        f"trace {path}, line {number}: {len(cells)} values, but line 1 has {width}; "
        "write one 0 or 1 for every client on every line."
    )
