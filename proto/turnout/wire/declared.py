"""What an array declares of itself, for whoever reads its bytes."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from flwr.app import Array

from turnout.wire.errors import LayoutError

FLOATS: Final[dict[str, np.dtype[Any]]] = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8")}
"""The dtypes of weights that travel in codes, as their numbers lie in the bytes."""


def elements(array: Array) -> int:
    """Return how many numbers the declared shape has; `LayoutError` for a negative length."""
    if any(length < 0 for length in array.shape):
        raise LayoutError(f"array declares shape {tuple(array.shape)}; lengths cannot be negative.")
    return math.prod(array.shape)  # Python's integers: a declared shape may be absurdly large.
