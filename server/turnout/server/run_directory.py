"""The directory of one run: resolved experiment, environment, metrics, checkpoints, plots, model."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import tomli_w

from turnout.server.documents import json_document, json_line, write_atomically
from turnout.server.errors import RunDirectoryError
from turnout.wire.durable import sync_directory, unwritten

try:
    import fcntl
except ImportError:  # Windows: no advisory locks; two processes on one run are then the user's care.
    fcntl = None  # type: ignore[assignment]

_LOCK_ATTEMPTS: Final = 5
_CHECKPOINT: Final = re.compile(r"round-(\d+)\.safetensors")


def new_run_id() -> str:
    """Return eight random hexadecimal digits."""
    return secrets.token_hex(4)


def directory_name(name: str, run_id: str, created: datetime) -> str:
    """Return ``<UTC time>-<name>-<id>``, which sorts by time; the colon of ``flwr:NAME`` is left out."""
    return f"{created.astimezone(UTC):%Y%m%d-%H%M%S}-{name.replace(':', '-')}-{run_id}"


class RunDirectory:
    """One run's files. `create` makes a directory whole or not at all; the constructor opens one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.experiment_file.is_file():
            raise RunDirectoryError(f"{self.path} is no run directory: experiment.toml is missing.")
        self._lock: int | None = None

    @classmethod
    def create(
        cls, path: str | Path, *, experiment: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> RunDirectory:
        """Make the directory ``path`` (its parents too) with the resolved experiment and the environment.

        It is built under another name and renamed, so that no one ever sees half of it. Raises
        `RunDirectoryError` when ``path`` exists.
        """
        path = Path(path)
        if path.exists():
            raise RunDirectoryError(f"run directory {path} exists already; choose another run.name.")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.mkdir()
            for folder in ("checkpoints", "plots", "model"):
                (partial / folder).mkdir()
            write_atomically(partial / "experiment.toml", tomli_w.dumps(experiment))
            write_atomically(partial / "environment.json", json_document(environment))
            write_atomically(partial / "metrics.jsonl", "")
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_directory(path.parent)
        return cls(path)

    @property
    def experiment_file(self) -> Path:
        """The experiment as it was resolved: file, overrides and defaults together."""
        return self.path / "experiment.toml"

    @property
    def metrics_file(self) -> Path:
        """One JSON line per committed round."""
        return self.path / "metrics.jsonl"

    @property
    def plots(self) -> Path:
        """Folder of PNG and SVG plots."""
        return self.path / "plots"

    @property
    def model_file(self) -> Path:
        """The final global model, buffers included, as safetensors."""
        return self.path / "model" / "model.safetensors"

    def write_experiment(self, experiment: Mapping[str, Any]) -> None:
        """Replace the resolved experiment (a resumed run may have more rounds)."""
        write_atomically(self.experiment_file, tomli_w.dumps(experiment))

    # Metrics.

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one round's line; the store is the truth, so the line is not synced."""
        line = json_line(row) + "\n"
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise unwritten(error, self.metrics_file, len(line)) from error

    def write_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace all lines."""
        write_atomically(self.metrics_file, "".join(json_line(row) + "\n" for row in rows))

    # Checkpoints.

    def checkpoint(self, round_number: int) -> Path:
        """Return the checkpoint file of a round."""
        return self.path / "checkpoints" / f"round-{round_number:06d}.safetensors"

    def keep_checkpoints(self, rounds: Iterable[int]) -> None:
        """Delete every checkpoint that is not of ``rounds``, and what an interrupted write left behind."""
        kept = set(rounds)
        for file in (self.path / "checkpoints").iterdir():
            match = _CHECKPOINT.fullmatch(file.name)
            if file.name.endswith(".partial") or (match and int(match[1]) not in kept):
                file.unlink(missing_ok=True)

    # Lock.

    def acquire(self) -> None:
        """Claim the directory for this process; raises `RunDirectoryError` when another one has it."""
        if fcntl is None or self._lock is not None:
            return
        handle = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if attempt + 1 < _LOCK_ATTEMPTS:  # A listing may be probing the lock (`in_use`) right now.
                    time.sleep(0.05)
            else:
                self._lock = handle
                self._tidy()
                return
        os.close(handle)
        raise RunDirectoryError(
            f"run directory {self.path} is in use by another process; wait for it or stop it first."
        )

    def _tidy(self) -> None:
        """Remove what interrupted writes left behind; only who holds the lock writes here."""
        for folder in (self.path, self.path / "checkpoints", self.path / "model"):
            for file in folder.glob(".*.partial"):
                file.unlink(missing_ok=True)

    def release(self) -> None:
        """Give the directory back; the operating system does it when the process dies."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def in_use(self) -> bool:
        """Return whether a process works on this run right now."""
        file = self.path / "run.lock"
        if self._lock is not None or fcntl is None or not file.exists():
            return self._lock is not None
        handle = os.open(file, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        return False
