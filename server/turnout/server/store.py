"""The run store: every run, round, metric and client outcome, in one SQLite or PostgreSQL database."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.orm import Session

from turnout.server.database import open_engine, relaxed_writer, sqlite_path, store_url, writer
from turnout.server.errors import StoreError
from turnout.server.round_writer import MetricKind, metric_rows, write_round
from turnout.server.schema import ClientRoundRow, ClientRow, EventRow, MetricRow, RoundRow, RunRow

_ROWS_AT_ONCE: Final = 10_000

Status: TypeAlias = Literal["running", "finished", "interrupted", "failed"]


class RunStore:
    """Runs in a database at ``location``: a database URL, an SQLite file, or a directory that holds one.

    Opening migrates an older schema (an SQLite file is copied aside first) and refuses a newer one.
    Raises `StoreError` when the store cannot be opened; with ``create=False`` also when there is none.
    """

    def __init__(self, location: str | Path, *, create: bool = True) -> None:
        self.url = store_url(location)
        self._engine = open_engine(self.url, create=create)
        self._writer = writer(self._engine)
        self._relaxed = relaxed_writer(self._engine)

    def close(self) -> None:
        """Release the connections."""
        self._engine.dispose()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Run directories: stored relative to the SQLite file, so that a folder of runs can be moved.

    def stored_directory(self, directory: Path) -> str:
        """Return how ``directory`` is written in a run's row."""
        base, directory = self._base(), directory.resolve()
        inside = base is not None and directory.is_relative_to(base)
        return str(directory.relative_to(base)) if base is not None and inside else str(directory)

    def directory_of(self, run: RunRow) -> Path:
        """Return the directory of ``run``."""
        base = self._base()
        return Path(run.directory) if base is None else base / run.directory

    def _base(self) -> Path | None:
        path = sqlite_path(self.url)
        return None if path is None else path.resolve().parent

    # Reading.

    def runs(self, *, study: str | None = None, limit: int | None = None) -> list[RunRow]:
        """Return the runs (of one study), newest first."""
        query = select(RunRow).order_by(RunRow.created_at.desc(), RunRow.id.desc()).limit(limit)
        if study is not None:
            query = query.where(RunRow.study == study)
        with Session(self._engine) as session:
            return list(session.scalars(query))

    def run(self, run_id: str) -> RunRow:
        """Return the run whose id is, or uniquely starts with, ``run_id``; ``"last"`` is the newest.

        Raises `StoreError` when there is none, or several.
        """
        if run_id == "last":
            newest = self.runs(limit=1)
            if not newest:
                raise StoreError(
                    "run 'last': the store has no run yet. Start one with `turnout simulate FILE`."
                )
            return newest[0]
        with Session(self._engine) as session:
            exact = session.get(RunRow, run_id)
            if exact is not None:
                return exact
            query = select(RunRow).where(RunRow.id.startswith(run_id, autoescape=True)).limit(3)
            found = list(session.scalars(query)) if run_id else []
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(run.id for run in found)
            raise StoreError(f"run {run_id!r} is ambiguous ({names}, ...); give more characters.")
        raise StoreError(f"run {run_id!r} is not in the store. `turnout runs list` shows the runs.")

    def rounds(self, run_id: str) -> list[RoundRow]:
        """Return the committed rounds of a run, in order."""
        query = select(RoundRow).where(RoundRow.run_id == run_id).order_by(RoundRow.round)
        with Session(self._engine) as session:
            return list(session.scalars(query))

    def rounds_done(self, run_ids: Iterable[str]) -> dict[str, int]:
        """Return the last committed round by run id; runs without one are left out."""
        query = select(RoundRow.run_id, func.max(RoundRow.round)).where(RoundRow.run_id.in_(list(run_ids)))
        with Session(self._engine) as session:
            return {row[0]: row[1] for row in session.execute(query.group_by(RoundRow.run_id))}

    def metrics(self, run_id: str, kind: MetricKind | None = None) -> list[MetricRow]:
        """Return all metrics of a run (of one kind), by kind, name and round."""
        query = select(MetricRow).where(MetricRow.run_id == run_id)
        if kind is not None:
            query = query.where(MetricRow.kind == kind)
        query = query.order_by(MetricRow.kind, MetricRow.name, MetricRow.round)
        with Session(self._engine) as session:
            return list(session.scalars(query))

    def series(self, run_id: str, kind: MetricKind, name: str) -> list[tuple[int, float]]:
        """Return one metric over the rounds; NaN where the value was not a number."""
        query = (
            select(MetricRow.round, MetricRow.value)
            .where(MetricRow.run_id == run_id, MetricRow.kind == kind, MetricRow.name == name)
            .order_by(MetricRow.round)
        )
        with Session(self._engine) as session:
            return [(number, math.nan if v is None else v) for number, v in session.execute(query)]

    def latest_metrics(self, run_id: str) -> dict[str, float]:
        """Return the held-out metrics of the last round in which the model was evaluated."""
        series = (MetricRow.run_id == run_id, MetricRow.kind == "evaluate")
        last = select(func.max(MetricRow.round)).where(*series).scalar_subquery()
        query = select(MetricRow.name, MetricRow.value).where(*series, MetricRow.round == last)
        with Session(self._engine) as session:
            return {name: math.nan if value is None else value for name, value in session.execute(query)}

    def client_rounds(self, run_id: str) -> list[ClientRoundRow]:
        """Return what each invited client did, by round and client."""
        query = select(ClientRoundRow).where(ClientRoundRow.run_id == run_id)
        with Session(self._engine) as session:
            return list(session.scalars(query.order_by(ClientRoundRow.round, ClientRoundRow.client)))

    def client_rows(self, run_id: str) -> Iterator[Row[Any]]:
        """Yield what `client_rounds` returns, as plain rows a few at a time: a run may have millions."""
        columns = [column for column in ClientRoundRow.__table__.columns if column.key != "metrics"]
        query = select(*columns).where(ClientRoundRow.run_id == run_id)
        ordered = query.order_by(ClientRoundRow.round, ClientRoundRow.client)
        with self._engine.connect() as connection:
            yield from connection.execution_options(yield_per=_ROWS_AT_ONCE).execute(ordered)

    def outcomes(self, run_id: str) -> list[tuple[int, int, str, float | None]]:
        """Return (round, client, outcome, weight) of every invitation: `client_rounds` in brief."""
        query = select(
            ClientRoundRow.round, ClientRoundRow.client, ClientRoundRow.outcome, ClientRoundRow.weight
        ).where(ClientRoundRow.run_id == run_id)
        with Session(self._engine) as session:
            return [(row[0], row[1], row[2], row[3]) for row in session.execute(query)]

    def clients(self, run_id: str) -> list[ClientRow]:
        """Return the clients of a run's fleet, by id; none for a simulation."""
        query = select(ClientRow).where(ClientRow.run_id == run_id)
        with Session(self._engine) as session:
            return sorted(session.scalars(query), key=lambda row: row.client)

    def events(self, run_id: str, *, after: int = 0) -> list[EventRow]:
        """Return the events of a run whose number is greater than ``after``."""
        query = select(EventRow).where(EventRow.run_id == run_id, EventRow.id > after)
        with Session(self._engine) as session:
            return list(session.scalars(query.order_by(EventRow.id)))

    # Writing. Each method is one transaction.

    def create_run(self, run: RunRow) -> None:
        """Add a run and its first event."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            session.add(run)
            session.flush()
            session.add(_event(run.id, "created", f"{run.strategy} on {run.task}, {run.num_rounds} rounds"))

    def commit_round(
        self,
        row: RoundRow,
        metrics: Mapping[MetricKind, Mapping[str, float]],
        clients: Iterable[Mapping[str, Any]],
        *,
        seconds: float,
        oldest_checkpoint: int | None = None,
        members: Iterable[Mapping[str, Any]] = (),
        durable: bool = True,
    ) -> None:
        """Add a round with its metrics and its clients' outcomes; ``seconds`` is the run's time so far.

        ``members`` are entries of `clients` that are new or have changed. Checkpoints of rounds before
        ``oldest_checkpoint`` are forgotten; their files may then go. Without ``durable``, SQLite does not
        wait for the disk: a power cut, but no crash, may take the round away again.
        """
        engine = self._writer if durable else self._relaxed
        with engine.begin() as connection:
            write_round(
                connection,
                row,
                metrics,
                clients,
                seconds=seconds,
                oldest_checkpoint=oldest_checkpoint,
                members=members,
            )

    def record_initial(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Set the evaluation of the initial model, as round 0."""
        with Session(self._writer) as session, session.begin():
            session.execute(delete(MetricRow).where(MetricRow.run_id == run_id, MetricRow.round == 0))
            rows = metric_rows(run_id, 0, {"evaluate": metrics})
            if rows:
                session.execute(insert(MetricRow), rows)

    def reopen(self, run_id: str, *, after_round: int, num_rounds: int, config: dict[str, Any]) -> None:
        """Set a run to running again and drop what lies after ``after_round``, which is computed anew."""
        with Session(self._writer) as session, session.begin():
            for table in (ClientRoundRow, MetricRow, RoundRow):
                session.execute(delete(table).where(table.run_id == run_id, table.round > after_round))
            values = {
                "status": "running",
                "error": None,
                "finished_at": None,
                "model_sha256": None,
                "num_rounds": num_rounds,
                "config": config,
                "heartbeat_at": _now(),
            }
            session.execute(update(RunRow).where(RunRow.id == run_id).values(values))
            session.add(_event(run_id, "resumed", f"continues after round {after_round}", after_round))

    def finish(
        self,
        run_id: str,
        status: Status,
        *,
        seconds: float,
        model_sha256: str | None = None,
        error: str | None = None,
    ) -> None:
        """Set how a run ended and add the event."""
        values = {
            "status": status,
            "seconds": seconds,
            "model_sha256": model_sha256,
            "error": error,
            "finished_at": _now() if status == "finished" else None,
            "heartbeat_at": _now(),
        }
        with Session(self._writer) as session, session.begin():
            session.execute(update(RunRow).where(RunRow.id == run_id).values(values))
            session.add(_event(run_id, status, error or f"{status} after {seconds:.1f} s"))


def _now() -> datetime:
    return datetime.now(UTC)


def _event(run_id: str, kind: str, message: str, round_number: int | None = None) -> EventRow:
    return EventRow(run_id=run_id, kind=kind, message=message, round=round_number, created_at=_now())
