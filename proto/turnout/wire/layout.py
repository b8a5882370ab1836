"""The layout of a model: its float parameters as one flat vector, its buffers beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord

from turnout.wire.arrays import (
    LEADING_STYPE,
    NDArray,
    as_array,
    as_bf16_array,
    as_leading_array,
    leading_view,
    view,
)
from turnout.wire.errors import LayoutError
from turnout.wire.flower import dtype_name

_FLOATS: Final = frozenset({"float16", "bfloat16", "float32", "float64"})
# Batch norm calls its averages so, and adapters the scores that they collect.
_STATISTICS: Final = "running_"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: ``offset`` and ``size`` count elements of the flat vector (0 for a buffer's offset)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int


@dataclass(frozen=True)
class ParameterLayout:
    """Names, shapes, dtypes and offsets of a model's tensors, in ``state_dict`` order.

    Float parameters form one contiguous vector of ``size`` numbers: float32, or float64 when any of them is
    float64. Integer tensors and running statistics (batch norm's, adapters') are ``buffers``; they travel
    beside the vector.
    """

    tensors: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...] = ()

    @classmethod
    def from_arrays(
        cls, record: Mapping[str, Array], buffer_names: Collection[str] | None = None
    ) -> ParameterLayout:
        """Read the layout off ``record``.

        ``buffer_names`` says which tensors are buffers; by default those that are not floats and those
        whose own name begins with ``running_``. Raises `LayoutError` when there is no float parameter.
        """
        tensors: list[TensorSpec] = []
        buffers: list[TensorSpec] = []
        offset = 0
        for name, array in record.items():
            shape = tuple(int(n) for n in array.shape)
            size = int(np.prod(shape, dtype=np.int64))
            own = name.rpartition(".")[2]
            named = own.startswith(_STATISTICS) if buffer_names is None else name in buffer_names
            if named or array.dtype not in _FLOATS:
                buffers.append(TensorSpec(name, shape, array.dtype, 0, size))
            else:
                tensors.append(TensorSpec(name, shape, array.dtype, offset, size))
                offset += size
        if not tensors:
            raise LayoutError("the model has no float parameter; send at least one float array.")
        return cls(tuple(tensors), tuple(buffers))

    @cached_property
    def size(self) -> int:
        """Number of float parameters P."""
        return self.tensors[-1].offset + self.tensors[-1].size

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """dtype of the flat vector: float32, or float64 when any tensor is float64."""
        return np.dtype(np.float64 if any(t.dtype == "float64" for t in self.tensors) else np.float32)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the names, shapes and dtypes; equal layouts have equal digests."""
        rows = [[t.name, t.shape, t.dtype] for t in (*self.tensors, *self.buffers)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def flatten(
        self, record: Mapping[str, Array], *, with_buffers: bool = True, out: NDArray | None = None
    ) -> NDArray:
        """Return the float parameters of ``record`` as one vector of shape (P,).

        No copy is made when the record's arrays lie one behind the other in one block, as those of
        `record` do; the result is then read-only. Otherwise they are gathered into ``out`` (a new vector when
        None). ``with_buffers=False`` is for records that carry the parameters only (a gradient, a control
        variate). Raises `LayoutError` on missing or unknown names, wrong shapes or wrong dtypes.
        """
        self._check_names(record, with_buffers)
        views = [self._checked_view(spec, record[spec.name]) for spec in self.tensors]
        if out is None:
            joined = self._joined(views)
            if joined is not None:
                return joined
            out = np.empty(self.size, self.dtype)
        for spec, block in zip(self.tensors, views, strict=True):
            out[spec.offset : spec.offset + spec.size] = block.reshape(-1)
        return out

    def record(
        self, vector: NDArray, buffers: Mapping[str, NDArray] | None = None, *, trimmed: bool = False
    ) -> ArrayRecord:
        """Return an ``ArrayRecord`` of views into ``vector`` (shape (P,)), with ``buffers`` when given.

        Tensors whose dtype is the vector's are not copied: do not change ``vector`` while the record is used.
        ``trimmed`` leaves out the zeros at each tensor's end, which do not travel then.
        """
        if vector.shape != (self.size,):
            raise LayoutError(f"vector has shape {vector.shape}, the layout needs ({self.size},).")
        record = ArrayRecord()
        for spec in self.tensors:
            block = vector[spec.offset : spec.offset + spec.size].reshape(spec.shape)
            if trimmed and spec.dtype != "bfloat16":
                record[spec.name] = as_leading_array(block.astype(spec.dtype, copy=False))
            else:
                record[spec.name] = _encoded(block, spec.dtype)
        if buffers is not None:
            for spec in self.buffers:
                record[spec.name] = _encoded(np.asarray(buffers[spec.name]), spec.dtype)
        return record

    def buffers_of(self, record: Mapping[str, Array]) -> dict[str, NDArray]:
        """Return the buffers of ``record`` by name, as read-only views."""
        return {spec.name: self._checked_view(spec, record[spec.name]) for spec in self.buffers}

    def split(self, vector: NDArray) -> dict[str, NDArray]:
        """Return views of ``vector`` by tensor name, in their shapes."""
        return {t.name: vector[t.offset : t.offset + t.size].reshape(t.shape) for t in self.tensors}

    def _check_names(self, record: Mapping[str, Array], with_buffers: bool) -> None:
        expected = [t.name for t in self.tensors] + ([t.name for t in self.buffers] if with_buffers else [])
        if len(record) == len(expected) and all(name in record for name in expected):
            return
        missing = [name for name in expected if name not in record]
        known = set(expected)
        unknown = [name for name in record if name not in known]
        raise LayoutError(
            f"arrays do not match the model: missing {missing[:3]}, unknown {unknown[:3]} "
            f"({len(record)} arrays, expected {len(expected)})."
        )

    def _checked_view(self, spec: TensorSpec, array: Array) -> NDArray:
        if tuple(array.shape) != spec.shape:
            raise LayoutError(
                f"array {spec.name!r} has shape {tuple(array.shape)}, the model needs {spec.shape}."
            )
        if array.dtype != spec.dtype:
            raise LayoutError(f"array {spec.name!r} has dtype {array.dtype}, the model needs {spec.dtype}.")
        content = leading_view(array) if array.stype == LEADING_STYPE else view(array)
        # What an array declares and what its bytes hold are two claims of the sender.
        if dtype_name(content.dtype) != (spec.dtype if spec.dtype != "bfloat16" else "float32"):
            raise LayoutError(f"array {spec.name!r} declares {spec.dtype} but its data is {content.dtype}.")
        return content

    def _joined(self, views: list[NDArray]) -> NDArray | None:
        """Return one view over all of ``views`` when they are consecutive pieces of one block, else None."""
        # Empty tensors lie nowhere in particular.
        pieces = [(spec, block) for spec, block in zip(self.tensors, views, strict=True) if block.size]
        if not pieces:
            return None
        first = pieces[0][1]
        if len(pieces) == 1:
            whole = first.dtype == self.dtype and first.flags.c_contiguous
            return first.reshape(-1) if whole else None
        owner, address = first.base, first.__array_interface__["data"][0]
        for spec, block in pieces:
            if (
                owner is None
                or block.base is not owner
                or block.dtype != self.dtype
                or not block.flags.c_contiguous
                or block.__array_interface__["data"][0] != address + spec.offset * self.dtype.itemsize
            ):
                return None
        return np.lib.stride_tricks.as_strided(
            first.reshape(-1), (self.size,), (self.dtype.itemsize,), writeable=False
        )


def _encoded(block: NDArray, dtype: str) -> Array:
    """Return ``block`` as an ``Array`` of ``dtype``, without a copy when it has that dtype already."""
    return as_bf16_array(block) if dtype == "bfloat16" else as_array(block.astype(dtype, copy=False))
