"""What is made once and kept on disk: converted models, token ids, frozen features, source archives."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Final, TypeVar

import numpy as np

from turnout.wire.errors import DataError

Arrays = Mapping[str, np.ndarray[Any, Any]]
T = TypeVar("T")

_SECONDS_BETWEEN_REPORTS: Final = 10.0


def cache_folder(part: str) -> Path:
    """Return the folder ``part`` of the cache, made if need be.

    The cache is ``$TURNOUT_CACHE``, else ``$XDG_CACHE_HOME/turnout``, else ``~/.cache/turnout``. Raises
    `DataError` when it cannot be written.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get("TURNOUT_CACHE") or f"{home}/turnout"
    folder = Path(root).expanduser() / part
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the cache {folder} cannot be made ({error}); set TURNOUT_CACHE to a writable folder."
        ) from error
    return folder


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a file to write beside ``path``; it becomes ``path`` at the end, or vanishes on an error."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cached_arrays(name: str, about: Sequence[object], make: Callable[[], Arrays]) -> Arrays:
    """Return what ``make`` returns, from the cache when it was made before.

    ``about`` is everything that the arrays depend on, hashes of files and the format's version included; each
    other value is another file. A damaged file is made anew.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    key = hashlib.sha256(repr(tuple(about)).encode()).hexdigest()[:16]
    path = cache_folder("arrays") / f"{name}-{key}.safetensors"
    if path.is_file():
        try:
            kept: Arrays = load_file(path)
            return kept
        except (OSError, SafetensorError):
            path.unlink(missing_ok=True)
    made = {key: np.ascontiguousarray(value) for key, value in make().items()}
    with written_whole(path) as partial:
        save_file(made, partial)
    return made


def announce(text: str) -> None:
    """Say on stderr that something takes its time, once in a machine's life."""
    print(f"turnout: {text}", file=sys.stderr, flush=True)


def reported(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield ``items``, saying every few seconds how far the work ``what`` is."""
    last = monotonic()
    for done, item in enumerate(items):
        if monotonic() - last > _SECONDS_BETWEEN_REPORTS:
            last = monotonic()
            announce(f"{what}: {100 * done // len(items)} %")
        yield item
