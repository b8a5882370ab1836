"""Arrays of a record as one packed block of raw bytes, and back without copying.

Arrays lie one behind the other in the record's order, each aligned to its element, little-endian and
C-contiguous. So a float32 model arrives as the flat vector that strategies and clients calculate with.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord

from turnout.v1 import fleet_pb2 as pb
from turnout.wire.arrays import BF16_STYPE, NDArray, as_array, view
from turnout.wire.errors import LayoutError
from turnout.wire.flower import NUMPY_STYPE, array_record, dtype_name

_ITEM_BYTES: Final = {
    "float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4,
    "float16": 2, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
_MAX_ARRAYS: Final = 65_536
_MAX_DIMENSIONS: Final = 32
_MAX_NAME: Final = 512
_MAX_SHOWN: Final = 64
_KEPT_BYTES: Final = 256 << 10

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError(
        "the fleet protocol sends raw little-endian numbers; big-endian hosts are not supported."
    )


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One array of a packed block. ``size`` is in bytes; ``stype`` is Flower's encoding of the array."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stype: str
    size: int

    @property
    def alignment(self) -> int:
        """Bytes that the array's offset is a multiple of."""
        if self.stype == NUMPY_STYPE:
            return _ITEM_BYTES[self.dtype]
        return 2 if self.stype == BF16_STYPE else 1


@dataclass(frozen=True)
class BlockLayout:
    """The arrays of one packed block, in order."""

    specs: tuple[BlockSpec, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each array begins."""
        offsets, end = [], 0
        for spec in self.specs:
            begin = _aligned(end, spec.alignment)
            offsets.append(begin)
            end = begin + spec.size
        return tuple(offsets)

    @cached_property
    def size(self) -> int:
        """Bytes of the whole block."""
        return self.offsets[-1] + self.specs[-1].size if self.specs else 0

    @cached_property
    def message(self) -> pb.Layout:
        """The layout as it travels."""
        return pb.Layout(
            arrays=[
                pb.ArraySpec(name=s.name, dtype=s.dtype, shape=s.shape, stype=s.stype, size=s.size)
                for s in self.specs
            ]
        )

    @cached_property
    def digest(self) -> bytes:
        """Sixteen bytes that equal layouts share."""
        return hashlib.sha256(self.message.SerializeToString(deterministic=True)).digest()[:16]

    @cached_property
    def runs(self) -> tuple[tuple[str, int, int], ...]:
        """Stretches ``(kind, begin, end)`` of numbers that can be NaN, neighbours of one kind as one."""
        runs: list[tuple[str, int, int]] = []
        for spec, begin in zip(self.specs, self.offsets, strict=True):
            kind = "bfloat16" if spec.stype == BF16_STYPE else spec.dtype
            if spec.stype not in (NUMPY_STYPE, BF16_STYPE) or not kind.startswith(("float", "bfloat")):
                continue
            if runs and runs[-1][0] == kind and runs[-1][2] == begin:
                runs[-1] = (kind, runs[-1][1], begin + spec.size)
            else:
                runs.append((kind, begin, begin + spec.size))
        return tuple(runs)

    @classmethod
    def parse(cls, message: pb.Layout) -> BlockLayout:
        """Return the layout that a peer declared. Raises `LayoutError` for one that cannot be."""
        raw = message.SerializeToString()
        return _parsed(raw) if len(raw) <= _KEPT_BYTES else cls._parse(message)

    @classmethod
    def _parse(cls, message: pb.Layout) -> BlockLayout:
        if len(message.arrays) > _MAX_ARRAYS:
            raise LayoutError(f"layout has {len(message.arrays)} arrays, at most {_MAX_ARRAYS} are allowed.")
        specs = tuple(BlockSpec(a.name, a.dtype, tuple(a.shape), a.stype, a.size) for a in message.arrays)
        seen: set[str] = set()
        for spec in specs:
            _check(spec, seen)
        return cls(specs)


@lru_cache(maxsize=32)
def _parsed(raw: bytes) -> BlockLayout:
    """Peers name the same few layouts again and again."""
    return BlockLayout._parse(pb.Layout.FromString(raw))


@lru_cache(maxsize=32)
def _layout(specs: tuple[BlockSpec, ...]) -> BlockLayout:
    """Return one object for equal layouts, which then work out their digest once."""
    return BlockLayout(specs)


def pack(record: Mapping[str, Array]) -> tuple[BlockLayout, list[memoryview]]:
    """Return the layout of ``record`` and its bytes as pieces, which are views and include the padding.

    Raises `LayoutError` for an array that cannot travel.
    """
    specs, contents, seen = [], [], set[str]()
    for name, array in record.items():
        spec, content = _content(name, array)
        _check(spec, seen)
        specs.append(spec)
        contents.append(content)
    layout, pieces, end = _layout(tuple(specs)), list[memoryview](), 0
    for spec, begin, content in zip(layout.specs, layout.offsets, contents, strict=True):
        if begin > end:
            pieces.append(memoryview(bytes(begin - end)))
        if spec.size:
            pieces.append(content)
        end = begin + spec.size
    return layout, _merged(pieces)


def unpack(layout: BlockLayout, block: NDArray) -> ArrayRecord:
    """Return the arrays that lie in ``block`` (uint8, shape (layout.size,)), as read-only views of it."""
    arrays: dict[str, Array] = {}
    for spec, begin in zip(layout.specs, layout.offsets, strict=True):
        raw = block[begin : begin + spec.size]
        if spec.stype == NUMPY_STYPE:
            arrays[spec.name] = as_array(raw.view(spec.dtype).reshape(spec.shape))
        else:
            arrays[spec.name] = Array(spec.dtype, spec.shape, spec.stype, raw.tobytes())
    return array_record(arrays)


def differing(expected: BlockLayout, got: BlockLayout, *, partial: bool = False) -> str | None:
    """Say how ``got`` differs from ``expected``, None when they agree.

    ``partial`` allows fewer arrays, and such as are shorter along one axis: which entries they have is for
    the reader to know. Arrays in an encoding of their own (compressed) are for their decoder to judge.
    """
    wanted = expected.specs
    if partial:
        left = {spec.name for spec in got.specs}
        wanted = tuple(spec for spec in wanted if spec.name in left)
    names = [spec.name for spec in wanted]
    if [spec.name for spec in got.specs] != names:
        known, given = set(names), {spec.name for spec in got.specs}
        return (
            f"arrays missing {sorted(known - given)[:3]}, unknown {sorted(given - known)[:3]}, or reordered"
        )
    for want, have in zip(wanted, got.specs, strict=True):
        if have.stype == NUMPY_STYPE and not _agrees(have, want, partial):
            return (
                f"array {have.name[:_MAX_SHOWN]!r} is {have.dtype}{list(have.shape)}, "
                f"expected {want.dtype}{list(want.shape)}"
            )
    return None


def _agrees(have: BlockSpec, want: BlockSpec, partial: bool) -> bool:
    if have.dtype != want.dtype or len(have.shape) != len(want.shape):
        return False
    odd = [(own, whole) for own, whole in zip(have.shape, want.shape, strict=True) if own != whole]
    return not odd or (partial and len(odd) == 1 and 0 < odd[0][0] < odd[0][1])


def _content(name: str, array: Array) -> tuple[BlockSpec, memoryview]:
    if array.stype != NUMPY_STYPE:
        data = memoryview(array.data)
        return BlockSpec(name, array.dtype, tuple(array.shape), array.stype, len(data)), data
    content: np.ndarray[Any, Any] = np.ascontiguousarray(view(array))
    if content.dtype.byteorder == ">":
        content = content.astype(content.dtype.newbyteorder("<"))
    spec = BlockSpec(name, dtype_name(content.dtype), tuple(array.shape), NUMPY_STYPE, content.nbytes)
    return spec, content.reshape(-1).view(np.uint8).data


def _merged(pieces: list[memoryview]) -> list[memoryview]:
    """Join neighbouring views of one block, which a model's tensors mostly are, into one."""
    if len(pieces) < 2:
        return pieces
    groups: list[
        tuple[memoryview, object, int, int]
    ] = []  # First piece, its owner, where it begins and ends.
    for piece in pieces:
        address, owner = np.frombuffer(piece, np.uint8).__array_interface__["data"][0], _owner(piece)
        if groups and address == groups[-1][3] and isinstance(owner, np.ndarray) and owner is groups[-1][1]:
            first, _, begin, end = groups.pop()
            groups.append((first, owner, begin, end + len(piece)))
        else:
            groups.append((piece, owner, address, address + len(piece)))
    return [
        first
        if end - begin == len(first)
        else np.lib.stride_tricks.as_strided(
            np.frombuffer(first, np.uint8), (end - begin,), (1,), writeable=False
        ).data
        for first, _, begin, end in groups
    ]


def _owner(piece: memoryview) -> object:
    node: Any = piece.obj
    while isinstance(node, (np.ndarray, memoryview)):
        under: Any = node.base if isinstance(node, np.ndarray) else node.obj
        if under is None:
            break
        node = under
    return node


def _check(spec: BlockSpec, seen: set[str]) -> None:
    shown = spec.name[:_MAX_SHOWN]
    if len(spec.name) > _MAX_NAME or spec.name in seen:
        raise LayoutError(f"array name {shown!r} is used twice or is longer than {_MAX_NAME} characters.")
    seen.add(spec.name)
    # NumPy refuses also empty arrays whose other lengths multiply to more than it can address.
    extent = math.prod(length for length in spec.shape if length) * _ITEM_BYTES.get(spec.dtype, 1)
    if len(spec.shape) > _MAX_DIMENSIONS or min(spec.shape, default=0) < 0 or extent >= 1 << 62:
        raise LayoutError(f"array {shown!r} has an impossible shape.")
    item = _ITEM_BYTES.get(spec.dtype) if spec.stype == NUMPY_STYPE else None
    if spec.stype == BF16_STYPE:
        item = 2
    elif spec.stype == NUMPY_STYPE and item is None:
        raise LayoutError(
            f"array {shown!r} has dtype {spec.dtype[:32]!r}; use one of {', '.join(_ITEM_BYTES)}."
        )
    if item is not None and math.prod(spec.shape) * item != spec.size:
        raise LayoutError(
            f"array {shown!r} of {spec.dtype[:32]}{list(spec.shape)} declares {spec.size} bytes, "
            f"needs {math.prod(spec.shape) * item}."
        )


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
