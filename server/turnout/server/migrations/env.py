"""Run by alembic: apply the migrations on the connection that the store hands over."""

from __future__ import annotations

from alembic import context

from turnout.server.schema import Base

if context.is_offline_mode():
    context.configure(
        url=context.config.get_main_option("sqlalchemy.url"),
        target_metadata=Base.metadata,
        literal_binds=True,
    )
    context.run_migrations()
else:
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=Base.metadata,
        render_as_batch=True,  # SQLite cannot alter columns in place.
    )
    context.run_migrations()
