"""Run by Alembic: applies the migrations on the connection that `store.database` hands over."""

from __future__ import annotations

from alembic import context

from vmcell_api.store.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
