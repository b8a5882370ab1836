"""The ledger of a fleet's rounds: model digests, request numbers and checksums of replies; its clients."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_Columns = tuple[tuple[str, type[sa.types.TypeEngine[Any]]], ...]
_ROUNDS: _Columns = (
    ("model_before_sha256", sa.Text),
    ("model_sha256", sa.Text),
    ("checkpoint_seconds", sa.Double),
    ("sent_bytes", sa.BigInteger),
    ("received_bytes", sa.BigInteger),
)
_CLIENT_ROUNDS: _Columns = (
    ("task", sa.BigInteger),
    ("attempt", sa.BigInteger),
    ("reply_crc32", sa.BigInteger),
    ("metrics", sa.JSON),
)


def upgrade() -> None:
    # New columns are nullable, which SQLite adds in place.
    for name, kind in _ROUNDS:
        op.add_column("rounds", sa.Column(name, kind))
    for name, kind in _CLIENT_ROUNDS:
        op.add_column("client_rounds", sa.Column(name, kind))
    op.create_table(
        "clients",
        sa.Column("run_id", sa.Text, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("client", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("examples", sa.BigInteger, nullable=False),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("offences", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("clients")
    for name, _ in _CLIENT_ROUNDS:
        op.drop_column("client_rounds", name)
    for name, _ in _ROUNDS:
        op.drop_column("rounds", name)
