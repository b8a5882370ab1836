"""Tables of the run store, written once for SQLite and PostgreSQL.

The migrations under ``migrations/versions`` create them; a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    Text,
    TypeDecorator,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA_REVISION: Final = "0003"

_UNSIGNED: Final = 1 << 64
_SIGNED_MAX: Final = (1 << 63) - 1


class ClientId(TypeDecorator[int]):
    """An unsigned 64-bit client id in a signed 64-bit column (node ids of Flower use the whole range)."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        """Wrap ids of 2^63 and above."""
        return value - _UNSIGNED if value is not None and value > _SIGNED_MAX else value

    def process_result_value(self, value: int | None, dialect: Dialect) -> int | None:
        """Unwrap ids of 2^63 and above."""
        return value + _UNSIGNED if value is not None and value < 0 else value


class UtcTime(TypeDecorator[datetime]):
    """A moment in UTC; SQLite keeps no time zone, so it is added when reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Mark as UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Declarative base of the run store."""

    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it from the class
        str: Text,
        int: BigInteger,
        float: Double,
        datetime: UtcTime,
        dict[str, Any]: JSON,
    }


class RunRow(Base):
    """One run: what was asked for, where it stands, how it ended."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    strategy: Mapped[str]
    task: Mapped[str]
    status: Mapped[str]
    study: Mapped[str | None]
    seed: Mapped[int]
    num_rounds: Mapped[int]
    num_clients: Mapped[int]
    directory: Mapped[str]
    config: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    heartbeat_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    seconds: Mapped[float] = mapped_column(default=0.0)
    model_sha256: Mapped[str | None]
    error: Mapped[str | None]

    __table_args__ = (Index("ix_runs_created_at", "created_at"), Index("ix_runs_study", "study"))


class RoundRow(Base):
    """One committed round: phase durations in seconds, how many clients took part, its checkpoint.

    The digests are of the model before and after it (see `model_sha256`). ``sent_bytes`` and
    ``received_bytes`` are model bytes to and from the clients; NULL where the engine counts none.
    """

    __tablename__ = "rounds"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    invited: Mapped[int]
    participants: Mapped[int]
    failed: Mapped[int]
    rejected: Mapped[int]
    missing: Mapped[int]
    select_seconds: Mapped[float]
    train_seconds: Mapped[float]
    fold_seconds: Mapped[float]
    finish_seconds: Mapped[float]
    evaluate_seconds: Mapped[float]
    checkpoint: Mapped[str | None]
    committed_at: Mapped[datetime]
    model_before_sha256: Mapped[str | None]
    model_sha256: Mapped[str | None]
    checkpoint_seconds: Mapped[float | None]
    sent_bytes: Mapped[int | None]
    received_bytes: Mapped[int | None]

    __table_args__ = ({"sqlite_with_rowid": False},)


class MetricRow(Base):
    """One number of one round; ``kind`` is train, evaluate or diagnostics; NULL stands for not-a-number.

    The primary key is the order in which a series is read: run, kind, name, round.
    """

    __tablename__ = "metrics"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[float | None]

    __table_args__ = ({"sqlite_with_rowid": False},)


class ClientRoundRow(Base):
    """What one invited client did in one round. A client without a row was not available or not selected.

    The accepted rows are the ledger of what was folded: ``task`` and ``attempt`` number the request,
    ``reply_crc32`` is the CRC-32 of the reply's arrays as they travelled (all NULL in a simulation).
    ``metrics`` are the scalars that came with the reply.
    """

    __tablename__ = "client_rounds"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    client: Mapped[int] = mapped_column(ClientId, primary_key=True, autoincrement=False)
    outcome: Mapped[str]
    role: Mapped[str]
    reason: Mapped[str | None]
    num_examples: Mapped[int]
    weight: Mapped[float | None]
    staleness: Mapped[int]
    train_loss: Mapped[float | None]
    train_seconds: Mapped[float | None]
    update_norm: Mapped[float | None]
    task: Mapped[int | None]
    attempt: Mapped[int | None]
    reply_crc32: Mapped[int | None]
    metrics: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))

    __table_args__ = (
        Index("ix_client_rounds_activity", "run_id", "round", "outcome", "role", "client", "weight"),
        {"sqlite_with_rowid": False},
    )


class ClientRow(Base):
    """One client of a run's fleet, as it last described itself; ``offences`` are its refused replies."""

    __tablename__ = "clients"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    client: Mapped[int] = mapped_column(ClientId, primary_key=True, autoincrement=False)
    name: Mapped[str]
    device: Mapped[str]
    examples: Mapped[int]
    tags: Mapped[dict[str, Any]]
    offences: Mapped[int]
    updated_at: Mapped[datetime]

    __table_args__ = ({"sqlite_with_rowid": False},)


class EventRow(Base):
    """One thing that happened, numbered so that a reader can continue after the last one it saw."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    round: Mapped[int | None]
    kind: Mapped[str]
    message: Mapped[str]
    created_at: Mapped[datetime]

    __table_args__ = (Index("ix_events_run_id", "run_id", "id"),)
