"""The digest by which server and clients agree on what they share beside the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from turnout.wire.arrays import NDArray


def shared_digest(arrays: Mapping[str, NDArray]) -> str:
    """Return 64 bits, as hexadecimal text, of the names, dtypes, shapes and contents of ``arrays``."""
    whole = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        whole.update(f"{name}\0{little.dtype.str}\0{little.shape}\0".encode())
        whole.update(little.tobytes())
    return whole.hexdigest()[:16]
