"""Data files inside installed packages, found without importing the package and checked by hash."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from turnout.wire.errors import DataError


def package_file(package: str, relative: str, *, sha256: str, install: str) -> Path:
    """Return the path of ``relative`` inside ``package`` after checking its SHA-256.

    The package is located, not imported: importing a data package may take seconds or need other packages.
    Raises `DataError` naming the command ``install`` when the package or file is absent or another version.
    """
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise DataError(f"the Python package {package!r} is not installed; run: {install}")
    path = Path(folders[0]) / relative
    if not path.is_file():
        raise DataError(f"{package!r} has no file {relative!r} (another version?); run: {install}")
    check_sha256(path, sha256, fix=f"run: {install}")
    return path


def require_package(package: str, install: str) -> None:
    """Raise `DataError` naming the command ``install`` unless the Python code ``package`` is installed."""
    if find_spec(package) is None:
        raise DataError(f"the Python package {package!r} is not installed; run: {install}")


def check_sha256(path: Path, expected: str, *, fix: str) -> None:
    """Raise `DataError` unless the file at ``path`` has the SHA-256 ``expected`` (hexadecimal)."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise DataError(f"{path} has sha256 {found}, expected {expected}: damaged or another version; {fix}")
