"""What is left to send of a tensor a part of which is fixed for good, by a mask that both sides have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from turnout.wire.arrays import NDArray

Sides = Mapping[str, tuple[str, int]]
"""Own names of tensors: the mask beside each, and the axis of the tensor that it is about."""


@dataclass(frozen=True, slots=True)
class KeptPart:
    """The places ``kept`` and ``dropped`` along ``axis``; both are ascending and not empty."""

    axis: int
    kept: NDArray
    dropped: NDArray

    def taken(self, whole: NDArray) -> NDArray:
        """Return the kept part of ``whole``."""
        return np.take(whole, self.kept, self.axis)

    def rest(self, whole: NDArray) -> NDArray:
        """Return the dropped part of ``whole``."""
        return np.take(whole, self.dropped, self.axis)

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

    A mask that leaves all, or nothing, makes no part: the tensor travels whole, or did not change.
    """
    for path, mask in masks.items():
        prefix, _, own = path.rpartition(".")
        kept = np.flatnonzero(mask)
        if 0 < len(kept) < len(mask):
            for name, (about, axis) in sides.items():
                if about == own:
                    full = f"{prefix}.{name}" if prefix else name
                    yield full, KeptPart(axis, kept, np.flatnonzero(mask == 0))
