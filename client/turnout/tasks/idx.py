"""IDX files (the format of MNIST and Fashion-MNIST), plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np

from turnout.wire.errors import DataError

_UNSIGNED_BYTE: Final = 0x08


def find_idx(folder: Path, name: str) -> Path:
    """Return ``folder/name.gz`` or ``folder/name``, whichever exists; `DataError` when neither does."""
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise DataError(f"{folder} has neither {name}.gz nor {name}; put the IDX file there.")


def read_idx(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the unsigned bytes of the IDX file at ``path`` in the shape its header gives.

    Raises `DataError` when the file is not an IDX file of unsigned bytes or is cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; fetch the file again.") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise DataError(f"{path} is not an IDX file of unsigned bytes; check that it is the right file.")
    dimensions = content[3]
    offset = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    count = int(np.prod(shape, dtype=np.int64))
    if len(content) != offset + count:
        raise DataError(
            f"{path} declares shape {shape} but holds {len(content) - offset} bytes; fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=offset).reshape(shape)
