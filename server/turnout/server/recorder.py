"""The recorder: a callback that makes every round durable, so that a run can be stopped at any moment.

A round commits in this order: its checkpoint is synced to disk, then one transaction adds its row, metrics
and client outcomes. A crash in between leaves the previous round as the last committed one; the run continues
from there and ends with the same model.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result
from safetensors.numpy import save

from turnout.server.documents import json_document, write_atomically
from turnout.server.environment import describe_environment
from turnout.server.errors import StoreError
from turnout.server.export import write_clients_csv
from turnout.server.fleet_changes import FleetChanges
from turnout.server.history import metrics_lines, round_line
from turnout.server.round_writer import MetricKind
from turnout.server.run_directory import RunDirectory, directory_name, new_run_id
from turnout.server.schema import RoundRow, RunRow
from turnout.server.store import RunStore
from turnout.strategies import Callback, ClientReport, RoundReport, StreamingStrategy
from turnout.wire import CheckpointError, ParameterLayout, load_checkpoint, save_checkpoint, view
from turnout.wire.checkpoint import row_references
from turnout.wire.row_file import RowReference

KEPT_CHECKPOINTS: Final = 2
_REASON_CHARACTERS: Final = 8_000  # A traceback, not a log.
_MAX_METRICS: Final = 64
_METRIC_CHARACTERS: Final = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """What a run is; ``config`` is the resolved experiment, ``study`` ties the runs of one comparison."""

    name: str
    strategy: str
    task: str
    seed: int
    num_rounds: int
    num_clients: int
    config: dict[str, Any]
    study: str | None = None


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What writing one checkpoint took."""

    server_round: int
    seconds: float
    bytes: int


class RunRecorder(Callback):
    """Records one run in a store and a directory; made by `create` or `resume`, used as a context manager.

    Leaving the context sets how the run ended: finished, interrupted (KeyboardInterrupt) or failed.
    """

    def __init__(
        self, store: RunStore, run: RunRow, directory: RunDirectory, *, checkpoint_every: int = 1
    ) -> None:
        self.store, self.run, self.directory = store, run, directory
        self.checkpoint_every = checkpoint_every
        self.executor = ""  # In words, for a simulation.
        self.last_metrics: dict[str, float] = {}
        self.model_sha256: str | None = None
        self.last_round = 0
        self.last_checkpoint: WrittenCheckpoint | None = None
        self._fleet = FleetChanges()
        self._checkpoints: list[int] = []
        self._rows: dict[int, list[RowReference]] = {}
        self._started = time.monotonic()
        self._seconds_before = run.seconds

    @classmethod
    def create(
        cls, store: RunStore, parent: str | Path, description: RunDescription, *, checkpoint_every: int = 1
    ) -> RunRecorder:
        """Make a run: its directory under ``parent``, then its row. On an error neither is left behind."""
        run_id, now = new_run_id(), datetime.now(UTC)
        path = Path(parent) / directory_name(f"{description.name}-{description.strategy}", run_id, now)
        directory = RunDirectory.create(
            path, experiment=description.config, environment=describe_environment()
        )
        run = RunRow(
            id=run_id,
            name=description.name,
            strategy=description.strategy,
            task=description.task,
            status="running",
            study=description.study,
            seed=description.seed,
            num_rounds=description.num_rounds,
            num_clients=description.num_clients,
            directory=store.stored_directory(path),
            config=description.config,
            created_at=now,
            heartbeat_at=now,
            seconds=0.0,
        )
        try:
            directory.acquire()
            store.create_run(run)
        except BaseException:
            directory.release()
            shutil.rmtree(path, ignore_errors=True)
            raise
        return cls(store, run, directory, checkpoint_every=checkpoint_every)

    @classmethod
    def resume(
        cls,
        store: RunStore,
        run: RunRow,
        *,
        num_rounds: int,
        config: dict[str, Any],
        checkpoint_every: int = 1,
    ) -> tuple[RunRecorder, dict[str, Any] | None]:
        """Open ``run`` again and return its recorder and the checkpoint to go on from (None: from the start).

        Rounds after that checkpoint are dropped from the store and from metrics.jsonl; they are computed
        again. Raises `RunDirectoryError` when another process works on the run, `CheckpointError` when
        no checkpoint is readable.
        """
        directory = RunDirectory(store.directory_of(run))
        directory.acquire()
        try:
            round_number, tree = _newest_checkpoint(store, run, directory)
            store.reopen(run.id, after_round=round_number, num_rounds=num_rounds, config=config)
            directory.write_experiment(config)
            directory.write_metrics(metrics_lines(store, run.id))
        except BaseException:
            directory.release()
            raise
        recorder = cls(store, store.run(run.id), directory, checkpoint_every=checkpoint_every)
        recorder.last_round = round_number
        recorder._checkpoints = [
            row.round for row in store.rounds(run.id) if row.checkpoint and row.round <= round_number
        ]
        recorder._rows = {round_number: list(row_references(tree))}
        recorder._tell_older_rows()
        recorder.last_metrics = store.latest_metrics(run.id)
        return recorder, tree

    def _tell_older_rows(self) -> None:
        """Say which rows the checkpoints before the one resumed from need: the others may be used again."""
        newest = self._rows[self.last_round]
        older = [number for number in self._checkpoints[-KEPT_CHECKPOINTS:] if number < self.last_round]
        if not newest:
            return
        try:
            trees = [_checkpoint_of(self.run, number, self.directory.checkpoint(number)) for number in older]
        except CheckpointError as error:  # Then their rows are kept as long as they could matter.
            _log.debug("%s", error)
            return
        references = [rows for tree in trees for rows in row_references(tree)]
        for rows in newest:
            rows.older = [other for other in references if other.path == rows.path]

    @property
    def seconds(self) -> float:
        """Seconds spent on the run so far, over all its parts."""
        return self._seconds_before + time.monotonic() - self._started

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        try:
            self._finish(error)
        except Exception as another:
            if error is None:
                raise
            # A full disk, say, is told as what it first was.
            _log.error("run %s: how it ended could not be written: %s", self.run.id, another)
        finally:
            self.directory.release()

    def _finish(self, error: BaseException | None) -> None:
        finish, run = self.store.finish, self.run.id
        if error is None:
            finish(run, "finished", seconds=self.seconds, model_sha256=self.model_sha256)
        elif isinstance(error, KeyboardInterrupt):
            finish(run, "interrupted", seconds=self.seconds)
        else:
            reason = f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]
            finish(run, "failed", seconds=self.seconds, error=reason)

    def record_initial(self, metrics: Mapping[str, float]) -> None:
        """Record the evaluation of the initial model as round 0."""
        self.last_metrics = dict(metrics)
        self.store.record_initial(self.run.id, metrics)
        self.directory.write_metrics(metrics_lines(self.store, self.run.id))

    def on_start(self, strategy: StreamingStrategy, *, num_rounds: int, first_round: int) -> None:
        """Note which model the first round starts from."""
        self.model_sha256 = model_sha256(strategy.arrays())

    def on_round_end(self, report: RoundReport) -> None:
        """Make one round durable. Raises `StoreError` when a client was folded twice."""
        clients = _one_per_client(report.clients)
        row = _round_row(self.run.id, report, clients)
        after = model_sha256(report.arrays)
        row.model_before_sha256, row.model_sha256 = self.model_sha256, after
        row.sent_bytes, row.received_bytes = self._fleet.traffic(report.grid)
        due = report.server_round % self.checkpoint_every == 0
        if due or report.server_round >= self.run.num_rounds:
            path = self.directory.checkpoint(report.server_round)
            began = time.perf_counter()
            for part in (report.strategy, report.grid):
                if hasattr(part, "keep_rows"):  # What each keeps of clients.
                    part.keep_rows(path.parent, self.run.id)
            tree = {**report.checkpoint(), "run": self.run.id}
            save_checkpoint(path, tree)
            self._rows[report.server_round] = list(row_references(tree))
            seconds = time.perf_counter() - began
            self.last_checkpoint = WrittenCheckpoint(report.server_round, seconds, path.stat().st_size)
            row.checkpoint, row.checkpoint_seconds = path.name, seconds
            self._checkpoints = [*self._checkpoints, report.server_round][-KEPT_CHECKPOINTS:]
        metrics: dict[MetricKind, Mapping[str, float]] = {
            "train": report.train_metrics,
            "evaluate": report.evaluate_metrics,
            "diagnostics": report.diagnostics,
        }
        line = round_line(row, metrics)
        oldest = self._checkpoints[0] if row.checkpoint else None
        columns = [_client_columns(client) for client in clients]
        members = self._fleet.members(report.grid)
        self.store.commit_round(
            row,
            metrics,
            columns,
            seconds=self.seconds,
            oldest_checkpoint=oldest,
            members=members,
            # A run goes on from a checkpoint: rounds behind the newest are computed again anyway.
            durable=row.checkpoint is not None,
        )
        self.last_round, self.model_sha256 = report.server_round, after
        self.last_metrics.update(report.evaluate_metrics)
        self.directory.append_metrics(line)
        if oldest is not None:
            self._forget_checkpoints(oldest)

    def _forget_checkpoints(self, oldest: int) -> None:
        """Delete the checkpoints before ``oldest``; the rows that only they refer to may be written over."""
        self.directory.keep_checkpoints(self._checkpoints)
        self._rows = {kept: rows for kept, rows in self._rows.items() if kept >= oldest}
        for rows in self._rows.get(oldest, ()):
            rows.forget_older()

    def on_finish(self, strategy: StreamingStrategy, result: Result) -> None:
        """Write the final model and the clients' table."""
        self.model_sha256 = model_sha256(result.arrays)
        tensors = {name: view(array) for name, array in result.arrays.items()}
        write_atomically(self.directory.model_file, save(tensors, {"format": "pt"}))
        config = {
            "run-id": self.run.id,
            "task": self.run.task,
            "strategy": self.run.strategy,
            "rounds": self.last_round,
            "metrics": self.last_metrics,
            "model-sha256": self.model_sha256,
        }
        write_atomically(self.directory.model_file.with_name("config.json"), json_document(config))
        write_clients_csv(self.directory.path / "clients.csv", self.store.client_rows(self.run.id))


def model_sha256(arrays: ArrayRecord) -> str:
    """Return the SHA-256 of the model's flat float vector, little-endian, so that engines can be compared."""
    vector = ParameterLayout.from_arrays(arrays).flatten(arrays)
    little = vector.astype(vector.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(np.ascontiguousarray(little).data).hexdigest()


def _newest_checkpoint(
    store: RunStore, run: RunRow, directory: RunDirectory
) -> tuple[int, dict[str, Any] | None]:
    """Return the newest readable checkpoint; a damaged one costs the rounds since the one before it."""
    rows = [row for row in store.rounds(run.id) if row.checkpoint]
    if not rows:
        return 0, None
    for row in reversed(rows):
        try:
            return row.round, _checkpoint_of(run, row.round, directory.checkpoint(row.round))
        except CheckpointError as error:
            _log.warning("%s Trying the one before.", error)
    raise CheckpointError(
        f"run {run.id}: no checkpoint in {directory.path / 'checkpoints'} can be read; start a new run."
    )


def _checkpoint_of(run: RunRow, round_number: int, path: Path) -> dict[str, Any]:
    """Load a checkpoint. Raises `CheckpointError` for a damaged one, and for another run's or round's."""
    tree = load_checkpoint(path, owned=True)
    if (tree.get("run"), tree.get("round")) != (run.id, round_number):
        raise CheckpointError(
            f"checkpoint {path}: it is of run {tree.get('run')!r} after round {tree.get('round')!r}, "
            f"not of run {run.id!r} after round {round_number}."
        )
    return tree


def _one_per_client(reports: Iterable[ClientReport]) -> list[ClientReport]:
    """Return one report per client, by id; what was refused of a client that took part is left out."""
    chosen: dict[int, ClientReport] = {}
    for report in reports:
        if report.outcome == "ok" and report.client in chosen and chosen[report.client].outcome == "ok":
            raise StoreError(
                f"client {report.client} was folded twice in one round; the round is not committed. "
                "Resume the run from the round before."
            )
        if report.client not in chosen or report.outcome == "ok":
            chosen[report.client] = report
    return [chosen[client] for client in sorted(chosen)]


def _round_row(run_id: str, report: RoundReport, clients: list[ClientReport]) -> RoundRow:
    outcomes = [client.outcome for client in clients]
    seconds = report.seconds
    return RoundRow(
        run_id=run_id,
        round=report.server_round,
        invited=len(outcomes),
        participants=outcomes.count("ok"),
        failed=outcomes.count("failed"),
        rejected=outcomes.count("rejected"),
        missing=outcomes.count("missing"),
        select_seconds=seconds.get("select", 0.0),
        train_seconds=seconds.get("train", 0.0),
        fold_seconds=seconds.get("fold", 0.0),
        finish_seconds=seconds.get("finish", 0.0),
        evaluate_seconds=seconds.get("evaluate", 0.0),
        committed_at=datetime.now(UTC),
    )


def _client_columns(client: ClientReport) -> dict[str, Any]:
    return {
        "client": client.client,
        "outcome": client.outcome,
        "role": client.role,
        "reason": client.reason[-_REASON_CHARACTERS:] if client.reason else None,
        "num_examples": client.num_examples,
        "weight": _number(client.weight),
        "staleness": client.staleness,
        "train_loss": _number(client.train_loss),
        "train_seconds": _number(client.train_seconds),
        "update_norm": _number(client.update_norm),
        "task": client.task or None,
        "attempt": client.attempt or None,
        "reply_crc32": client.reply_crc32,
        "metrics": bounded_metrics(client.metrics) or None,
    }


def bounded_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return at most 64 metrics with names of at most 64 characters; values that are not finite are left out.

    They come from the network, and JSON has no NaN.
    """
    finite = ((name, float(value)) for name, value in metrics.items() if abs(value) < math.inf)
    return {name[:_METRIC_CHARACTERS]: value for name, value in islice(finite, _MAX_METRICS)}


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
