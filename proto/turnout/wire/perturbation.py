"""The noise of EGGROLL (arXiv 2511.16652), which server and clients draw anew instead of sending it.

A pair j of round t perturbs every matrix W (m x n) by ``E = A B^T / sqrt(r)``, A (m x r), B (n x r), and
every vector by noise of its own shape. The draw is a function of (seed, t, j, parameter name) alone: the
counter-based generator Philox under the key ``[seed, hash64(t, j, name)]``; the first n rows are B.

Weighted sums of such noise are exact, so that any build on any machine gets the same bits: entries are
multiples of `GRID` (Rademacher noise is +-1, Gaussian noise is rounded to 1/64), weights are rounded to one
power of two (`on_grid`), and float64 then holds every partial sum without rounding.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np

from turnout.wire.arrays import NDArray
from turnout.wire.errors import ConfigError, unknown_name

Kind = Literal["lowrank", "full", "frozen"]
NoiseName = Literal["gaussian", "rademacher"]

KINDS: Final = ("lowrank", "full", "frozen")
NOISES: Final = ("gaussian", "rademacher")
GRID: Final = 2.0**-6
"""Gaussian noise is rounded to multiples of this: its variance grows by 2e-5, its mean stays 0."""
_LARGEST: Final = 8.0
# A product of two entries spans 12 bits below 1 and 6 above; float64 has 53 for the sum of them all.
_SUM_BITS: Final = 53 - 12 - 6
# Numbers of noise that one product takes at a time.
_CHUNK_NUMBERS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class PerturbedTensor:
    """One parameter: how it is perturbed, and its matrix form, the first dimension against all others."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def rows(self) -> int:
        """m: the length of the first dimension."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """n: the product of the other dimensions."""
        return math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Factors:
    """The noise of one matrix: A (m x r) and B (n x r), float32, without the factor 1 / sqrt(r)."""

    a: NDArray
    b: NDArray


Draw = Factors | NDArray | None
"""The noise of one parameter: factors, a vector of its size, or None for a frozen one."""


def default_kind(shape: Sequence[int], rank: int | None, *, freeze_1d: bool) -> Kind:
    """Return how a parameter of ``shape`` is perturbed: matrices by low rank unless ``rank`` is None."""
    if len(shape) < 2:
        return "frozen" if freeze_1d else "full"
    return "full" if rank is None else "lowrank"


@dataclass(frozen=True)
class NoiseSource:
    """Draws and adds up the perturbations of a model. Not for use by two threads at once.

    ``rank`` is r, for the tensors of kind ``lowrank``. Names must differ: parameters that are one tensor
    (tied weights) are one entry, hence get one draw.
    """

    tensors: tuple[PerturbedTensor, ...]
    seed: int
    rank: int = 1
    noise: NoiseName = "gaussian"

    def __post_init__(self) -> None:
        if self.noise not in NOISES:
            raise unknown_name("noise", str(self.noise), NOISES)
        for tensor in self.tensors:
            if tensor.kind not in KINDS:
                raise unknown_name("kind of perturbation", str(tensor.kind), KINDS)
        if len({tensor.name for tensor in self.tensors}) < len(self.tensors):
            raise ConfigError("two parameters have one name, so would get the same noise; name each once.")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed} is not possible; use a whole number from 0 to 2**64 - 1.")
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank} is not possible; use a whole number >= 1.")

    def draw(self, server_round: int, pair: int) -> list[Draw]:
        """Return the noise of one pair, per tensor."""
        return [self._draw(tensor, server_round, pair) for tensor in self.tensors]

    def combine(self, server_round: int, pairs: NDArray, weights: NDArray) -> list[NDArray | None]:
        """Return ``sum_j weights[j] E_j`` over ``pairs`` per tensor, float64 in its shape; None where frozen.

        ``weights`` must lie on one grid (`on_grid`): the sum is then exact and has no order.
        """
        used = np.flatnonzero(weights)
        terms = [(int(pairs[i]), float(weights[i])) for i in used]
        return [self._combined(tensor, server_round, terms) for tensor in self.tensors]

    @cached_property
    def _stream(self) -> _Stream:
        return _Stream(self.seed, self.noise)

    def _draw(self, tensor: PerturbedTensor, server_round: int, pair: int) -> Draw:
        if tensor.kind == "frozen":
            return None
        stream = self._stream
        stream.begin(server_round, pair, tensor.name)
        if tensor.kind == "full":
            return stream.take(tensor.size)
        numbers = stream.take((tensor.rows + tensor.columns) * self.rank).reshape(-1, self.rank)
        return Factors(numbers[tensor.columns :], numbers[: tensor.columns])

    def _combined(
        self, tensor: PerturbedTensor, server_round: int, terms: list[tuple[int, float]]
    ) -> NDArray | None:
        if tensor.kind == "frozen":
            return None
        low = tensor.kind == "lowrank"
        width = (tensor.rows + tensor.columns) * self.rank if low else tensor.size
        total = np.zeros((tensor.rows, tensor.columns) if low else tensor.size)
        for chunk in _chunks(terms, max(1, _CHUNK_NUMBERS // max(1, width))):
            draws = [self._draw(tensor, server_round, pair) for pair, _ in chunk]
            w = np.array([weight for _, weight in chunk])
            if low:
                a = np.concatenate([draw.a for draw in draws if isinstance(draw, Factors)], 1, dtype=float)
                b = np.concatenate([draw.b for draw in draws if isinstance(draw, Factors)], 1, dtype=float)
                total += (a * np.repeat(w, self.rank)) @ b.T
            else:
                total += w @ np.array(draws, np.float64)
        if low:
            total /= math.sqrt(self.rank)
        return total.reshape(tensor.shape)


def on_grid(weights: NDArray, rank: int) -> NDArray:
    """Return ``weights`` as float32 rounded to one power of two, fine enough to keep 2^-35 of their sum.

    Raises ValueError for a weight that is not finite.
    """
    total = float(np.abs(weights).sum(dtype=np.float64)) * rank
    if not math.isfinite(total):
        raise ValueError("a weight is not finite; refuse the reply that it comes from.")
    if total == 0.0:
        return np.zeros(len(weights), np.float32)
    largest = np.abs(weights).max()
    # As fine as the sum allows, and as float32 can hold the largest of them.
    exponent = max(math.frexp(total)[1] - _SUM_BITS, math.frexp(largest)[1] - 24, -149)
    unit = math.ldexp(1.0, exponent)
    return (np.rint(np.asarray(weights, np.float64) / unit) * unit).astype(np.float32)


def model_tensors(
    shapes: Mapping[str, Sequence[int]], rank: int | None, *, freeze_1d: bool
) -> tuple[PerturbedTensor, ...]:
    """Return how the parameters of a model are perturbed, in the order of ``shapes``."""
    return tuple(
        PerturbedTensor(name, tuple(shape), default_kind(shape, rank, freeze_1d=freeze_1d))
        for name, shape in shapes.items()
    )


class _Stream:
    """One Philox generator that starts anew for each (round, pair, name); making one takes twice as long."""

    def __init__(self, seed: int, noise: NoiseName) -> None:
        self._philox = np.random.Philox(key=np.array([seed, 0], np.uint64))
        self._normal = np.random.Generator(self._philox)
        self._state: Any = dict(self._philox.state)
        self._key = np.array([seed, 0], np.uint64)
        self._noise = noise

    def begin(self, server_round: int, pair: int, name: str) -> None:
        """Go to the start of the draw of one parameter."""
        text = struct.pack("<QQ", server_round, pair) + name.encode()
        self._key[1] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        self._state["state"] = {"counter": np.zeros(4, np.uint64), "key": self._key}
        self._philox.state = self._state

    def take(self, count: int) -> NDArray:
        """Return ``count`` numbers as float32."""
        if self._noise == "gaussian":
            numbers = self._normal.standard_normal(count, dtype=np.float32)
            np.clip(np.rint(numbers / np.float32(GRID)) * np.float32(GRID), -_LARGEST, _LARGEST, out=numbers)
            return numbers
        words = self._philox.random_raw(-(-count // 64)).astype("<u8")
        bits = np.unpackbits(words.view(np.uint8), count=count, bitorder="little")
        return np.float32(2.0) * bits.astype(np.float32) - np.float32(1.0)


def _chunks(terms: list[tuple[int, float]], size: int) -> Iterator[list[tuple[int, float]]]:
    for start in range(0, len(terms), size):
        yield terms[start : start + size]


def dense(draw: Draw, tensor: PerturbedTensor, rank: int) -> NDArray:
    """Return the perturbation E itself, float64 in the tensor's shape; zeros where frozen."""
    if draw is None:
        return np.zeros(tensor.shape)
    if isinstance(draw, Factors):
        product = draw.a.astype(np.float64) @ draw.b.T.astype(np.float64) / math.sqrt(rank)
        return product.reshape(tensor.shape)
    return draw.astype(np.float64).reshape(tensor.shape)


def flat_sum(parts: Iterable[NDArray | None], tensors: Iterable[PerturbedTensor]) -> NDArray:
    """Return the sums of `NoiseSource.combine` as one float64 vector, zeros where frozen."""
    pieces = [
        np.zeros(tensor.size) if part is None else part.reshape(-1)
        for part, tensor in zip(parts, tensors, strict=True)
    ]
    return np.concatenate(pieces)
