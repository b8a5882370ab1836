"""An index that has who took part when: the dashboard reads it instead of the whole client rounds.

It follows the order in which rounds are committed, so that a commit adds to its end.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_NAME = "ix_client_rounds_activity"
_COLUMNS = ["run_id", "round", "outcome", "role", "client", "weight"]


def upgrade() -> None:
    op.create_index(_NAME, "client_rounds", _COLUMNS)


def downgrade() -> None:
    op.drop_index(_NAME, "client_rounds")
