"""Runs, rounds, metrics, client rounds, events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _run_id(*, primary_key: bool = True) -> sa.Column[str]:
    return sa.Column(
        "run_id",
        sa.Text,
        sa.ForeignKey("runs.id", ondelete="CASCADE"),
        primary_key=primary_key,
        nullable=False,
    )


def _round_key() -> sa.Column[int]:
    return sa.Column("round", sa.BigInteger, primary_key=True, autoincrement=False)


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("strategy", sa.Text, nullable=False),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("study", sa.Text),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("num_rounds", sa.BigInteger, nullable=False),
        sa.Column("num_clients", sa.BigInteger, nullable=False),
        sa.Column("directory", sa.Text, nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("model_sha256", sa.Text),
        sa.Column("error", sa.Text),
    )
    op.create_index("ix_runs_created_at", "runs", ["created_at"])
    op.create_index("ix_runs_study", "runs", ["study"])
    op.create_table(
        "rounds",
        _run_id(),
        _round_key(),
        *(
            sa.Column(name, sa.BigInteger, nullable=False)
            for name in ("invited", "participants", "failed", "rejected", "missing")
        ),
        *(
            sa.Column(f"{phase}_seconds", sa.Double, nullable=False)
            for phase in ("select", "train", "fold", "finish", "evaluate")
        ),
        sa.Column("checkpoint", sa.Text),
        sa.Column("committed_at", sa.DateTime(timezone=True), nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "metrics",
        _run_id(),
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        _round_key(),
        sa.Column("value", sa.Double),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "client_rounds",
        _run_id(),
        _round_key(),
        sa.Column("client", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("num_examples", sa.BigInteger, nullable=False),
        sa.Column("weight", sa.Double),
        sa.Column("staleness", sa.BigInteger, nullable=False),
        sa.Column("train_loss", sa.Double),
        sa.Column("train_seconds", sa.Double),
        sa.Column("update_norm", sa.Double),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        _run_id(primary_key=False),
        sa.Column("round", sa.BigInteger),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_events_run_id", "events", ["run_id", "id"])


def downgrade() -> None:
    for table in ("events", "client_rounds", "metrics", "rounds", "runs"):
        op.drop_table(table)
