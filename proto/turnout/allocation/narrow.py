"""What is left to send of a tensor a part of which is fixed for good, by a mask that both sides have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord

from turnout.wire.arrays import NDArray, as_array, view

Sides = Mapping[str, tuple[str, int]]
"""Own names of tensors: the mask beside each, and the axis of the tensor that it is about."""


@dataclass(frozen=True, slots=True)
class KeptPart:
    """The places ``kept`` (maybe none) and ``dropped`` along ``axis``; both are ascending."""

    axis: int
    kept: NDArray
    dropped: NDArray

    def taken(self, whole: NDArray) -> NDArray:
        """Return the kept part of ``whole``."""
        return np.take(whole, self.kept, self.axis)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the kept part of a tensor of shape ``whole``."""
        return (*whole[: self.axis], len(self.kept), *whole[self.axis + 1 :])

    def filled(self, part: NDArray, whole: NDArray) -> NDArray:
        """Return a copy of ``whole`` whose kept part is ``part``."""
        made = np.array(whole)
        np.moveaxis(made, self.axis, 0)[self.kept] = np.moveaxis(part, self.axis, 0)
        return made


def kept_parts(masks: Mapping[str, NDArray], sides: Sides) -> Iterator[tuple[str, KeptPart]]:
    """Yield the tensors' names with what is left of them, by the masks' full names and values.

    A mask that leaves all makes no part: the tensor travels whole.
    """
    for path, mask in masks.items():
        prefix, _, own = path.rpartition(".")
        kept = np.flatnonzero(mask)
        if len(kept) < len(mask):
            for name, (about, axis) in sides.items():
                if about == own:
                    full = f"{prefix}.{name}" if prefix else name
                    yield full, KeptPart(axis, kept, np.flatnonzero(mask == 0))


def narrowed(record: ArrayRecord, kept: Mapping[str, KeptPart]) -> ArrayRecord:
    """Return ``record`` with what is left of its tensors; those of which nothing is left are not in it.

    What is narrow already stays so; where nothing is dropped it is ``record`` itself.
    """
    if not kept:
        return record
    made = ArrayRecord()
    for name, array in record.items():
        part = kept.get(name)
        if part is None or array.shape[part.axis] == len(part.kept) > 0:
            made[name] = array
        elif len(part.kept):
            made[name] = as_array(part.taken(view(array)))
    return made


def widened(
    record: Mapping[str, Array], kept: Mapping[str, KeptPart], whole: Callable[[str], NDArray]
) -> dict[str, Array]:
    """Return ``record`` with its `narrowed` tensors as they are in ``whole`` where they were dropped.

    Tensors that are whole stay so, and those of another shape or dtype are as they came.
    """
    made = dict(record.items())
    for name, part in kept.items():
        if name not in made and not len(part.kept):
            made[name] = as_array(whole(name))
        elif name in made:
            base, given = whole(name), view(made[name])
            if given.shape == part.shape(base.shape) and given.dtype == base.dtype:
                made[name] = as_array(part.filled(given, base))
    return made
