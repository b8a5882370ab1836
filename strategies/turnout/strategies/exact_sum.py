"""A weighted sum of vectors whose result does not depend on the order of the terms, to the bit.

Floating-point addition is not associative, so replies that arrive in another order would give another
model. Here every weighted term is first rounded to a binary grid that depends on that term's own magnitude
only (``(t + M) - M``, the pre-rounding of Demmel and Nguyen, "Fast reproducible floating-point summation",
2013); terms on one grid add up in float64 without any rounding error, hence in any order. Terms of very
different magnitude go to separate accumulators, and the few highest are kept. For float64 vectors what the
rounding took off is summed too, on a finer grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from turnout.strategies.array_api import array_namespace
from turnout.strategies.blockwise import BLOCK, blockwise
from turnout.wire.arrays import NDArray

# One accumulator holds terms whose peaks lie within a factor 2**_WIDTH ...
_WIDTH: Final = 8
# ... and may add up 2**(_HEADROOM + 1) of them before a float64 could round.
_HEADROOM: Final = 20
# Beyond this the grid's constant would overflow.
_TOO_LARGE: Final = 2.0**1000
# A term's grid is that many levels below the term: 2**-(_WIDTH * _LEVELS) = 2**-32 of it.
_LEVELS: Final = 4
# Fewest elements of a row that are folded at a time, when many rows are.
_FEWEST_COLUMNS: Final = 512


def peak(vector: Any) -> float:
    """Return the largest absolute value in ``vector``, of any shape; NaN if there is a NaN, 0.0 if empty."""
    if isinstance(vector, np.ndarray):
        if vector.size == 0:
            return 0.0
        return max(float(vector.max()), -float(vector.min()))
    xp = array_namespace(vector)
    return float(xp.max(xp.abs(vector))) if math.prod(vector.shape) else 0.0


class ExactSum:
    """Sums ``weight * vector`` over many vectors of one shape, in any order with the same result.

    Per term, the result's error is below ``2**-24`` of the largest term's peak; for float64 vectors it is
    below ``2**-56``. Memory: 8 bytes per element for each magnitude class in use (usually one or two, at most
    four; twice that for float64), however many terms are added.
    """

    def __init__(self, like: Any) -> None:
        """Sum vectors shaped and placed (NumPy, or torch on any device) as ``like``."""
        self._like = like
        double = like.dtype == array_namespace(like).float64
        # Levels kept: what lies lower does not count, and is no larger than the rounding of the highest.
        self._depth = 2 * _LEVELS if double else _LEVELS
        self._sums: dict[int, Any] = {}
        self._spare: list[Any] = []
        self._counts: dict[int, int] = {}
        self._rows: NDArray | None = None
        self._lent: NDArray | None = None
        self._index = 0
        self._pending: list[tuple[int, float, float]] = []

    def reset(self) -> None:
        """Start again from zero, keeping the memory."""
        self._pending.clear()
        self._spare.extend(self._sums.values())
        self._sums.clear()
        self._counts.clear()

    def add(self, vector: Any, weight: float = 1.0, *, largest: float | None = None) -> None:
        """Add ``weight * vector``. ``largest`` is the vector's `peak` when the caller has it already.

        Raises ValueError when the term is not finite and OverflowError after 2**21 terms of one magnitude.
        """
        bound = (peak(vector) if largest is None else largest) * abs(weight)
        if not bound < _TOO_LARGE:
            raise ValueError(
                f"term is not finite or too large ({bound}, weight {weight}); reject it before the sum."
            )
        if bound == 0.0:
            return
        if vector is self._lent:
            self._pending.append((self._index, weight, bound))
            return
        folds = self._folds(_level(bound), 1)
        if not folds:
            return
        if isinstance(folds[0][0], np.ndarray):
            _fold(folds, vector, weight)
        else:
            xp = array_namespace(vector)
            term = xp.astype(vector, xp.float64) * weight
            for accumulator, magic in folds:
                rounded = (term + magic) - magic
                accumulator += rounded
                term = term - rounded

    def lend(self, rows: NDArray) -> None:
        """Announce vectors that are lent together, ``rows`` of shape (k, P), until `settle`."""
        self.settle()
        self._rows = rows

    def row(self, index: int) -> NDArray:
        """Return row ``index`` of those lent, as the object that `add` knows again until the next call.

        Adding it only notes index and weight: `settle` adds all noted rows in one pass over the accumulators.
        """
        assert self._rows is not None
        self._index = index
        self._lent = self._rows[index]
        return self._lent

    def settle(self) -> None:
        """Add the noted rows, which may be overwritten afterwards."""
        self._flush()
        self._rows = self._lent = None

    def _flush(self) -> None:
        rows, pending, self._pending = self._rows, self._pending, []
        by_level: dict[int, list[tuple[int, float]]] = {}
        for index, weight, bound in pending:
            by_level.setdefault(_level(bound), []).append((index, weight))
        for level, terms in by_level.items():
            folds = self._folds(level, len(terms))
            if folds:
                assert rows is not None
                _fold_rows(folds, rows, terms)

    def value(self, divisor: float = 1.0) -> Any:
        """Return the sum, divided by ``divisor``, as a new float64 vector."""
        if self._pending:
            self._flush()
        if not self._sums:
            return _zeros(self._like)
        lowest = self._sums[min(self._sums)]
        return self._total(array_namespace(lowest).asarray(lowest, copy=True), divisor)

    def drain(self, divisor: float = 1.0) -> Any:
        """Return the same as `value`, but in memory that the next `add` takes back; the sum is empty then.

        Fresh memory for a large model costs more time than adding it up.
        """
        if self._pending:
            self._flush()
        if not self._sums:
            return _zeros(self._like)
        total = self._total(self._sums[min(self._sums)], divisor)
        self.reset()
        return total

    def _total(self, total: Any, divisor: float) -> Any:
        """Add the other accumulators to ``total``, which holds the lowest."""
        for level in sorted(self._sums)[1:]:
            total += self._sums[level]
        if divisor != 1.0:
            total /= divisor
        return total

    def _folds(self, level: int, terms: int) -> list[tuple[Any, float]]:
        """Return the accumulators, with their grids' constants, that ``terms`` terms of ``level`` go to."""
        lowest = max([level, *self._sums]) - self._depth
        # The rounding's remainder is below half a grid step: a term of _LEVELS further down.
        levels = [low for low in range(level, level - self._depth, -_LEVELS) if low > lowest]
        return [(self._accumulator(low, terms), math.ldexp(1.5, low * _WIDTH + _HEADROOM)) for low in levels]

    def _accumulator(self, level: int, terms: int) -> Any:
        count = self._counts[level] = self._counts.get(level, 0) + terms
        if count >= 2 << _HEADROOM:
            raise OverflowError(f"more than {2 << _HEADROOM} terms in one sum; split the round.")
        if level not in self._sums:
            if self._spare:
                fresh = self._spare.pop()
                fresh[...] = 0.0
            else:
                fresh = _zeros(self._like)
            self._sums[level] = fresh
            for low in [known for known in self._sums if known <= max(self._sums) - self._depth]:
                self._spare.append(self._sums.pop(low))
        return self._sums[level]


def _zeros(like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return np.zeros(like.shape, np.float64)
    xp = array_namespace(like)
    return xp.zeros(like.shape, dtype=xp.float64, device=like.device)


def _level(bound: float) -> int:
    return math.ceil(math.frexp(bound)[1] / _WIDTH)


def _fold_rows(
    folds: Sequence[tuple[NDArray, float]], rows: NDArray, terms: Sequence[tuple[int, float]]
) -> None:
    """Add ``weight * rows[index]`` of all ``terms`` in one pass over the accumulators, by blocks."""
    *upper, (lowest, finest) = folds
    indices = [index for index, _ in terms]
    weights = np.array([weight for _, weight in terms])[:, np.newaxis]
    whole = len(indices) == len(rows) and indices == list(range(len(rows)))
    alike = bool((weights == weights[0]).all())
    # NumPy multiplies by one number faster than by a column of equal ones.
    scale: Any = weights.item(0) if alike else weights
    plain = alike and scale == 1.0
    step = max(_FEWEST_COLUMNS, BLOCK // 2 // len(indices))

    def piece(begin: int, end: int) -> list[None]:
        for start in range(begin, end, step):
            stop = min(start + step, end)
            block = rows[:, start:stop] if whole else rows[indices, start:stop]
            term = block.astype(np.float64)
            if not plain:
                term *= scale
            for accumulator, magic in upper:
                rounded = term + magic
                rounded -= magic
                accumulator[start:stop] += rounded.sum(axis=0)
                term -= rounded
            term += finest
            term -= finest
            lowest[start:stop] += term.sum(axis=0)
        return []

    blockwise(rows.shape[1], piece)


def _fold(folds: Sequence[tuple[NDArray, float]], vector: NDArray, weight: float) -> None:
    """Add ``weight * vector``, rounded to one grid after the other, in one pass over memory, by blocks."""
    *upper, (lowest, finest) = folds

    def piece(begin: int, end: int) -> list[None]:
        scratch = np.empty(min(end - begin, BLOCK))
        kept = np.empty_like(scratch) if upper else scratch
        for start in range(begin, end, BLOCK):
            stop = min(start + BLOCK, end)
            term = scratch[: stop - start]
            np.copyto(term, vector[start:stop])
            if weight != 1.0:
                term *= weight
            for accumulator, magic in upper:
                rounded = np.add(term, magic, out=kept[: stop - start])
                rounded -= magic
                accumulator[start:stop] += rounded
                term -= rounded
            term += finest
            term -= finest
            lowest[start:stop] += term
        return []

    blockwise(vector.size, piece)
