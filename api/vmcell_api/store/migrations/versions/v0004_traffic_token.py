"""Sandboxes whose ports are closed to requests without a token."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Sandboxes that are there already stay open to everybody."""
    with op.batch_alter_table("sandboxes") as table:
        table.add_column(
            sa.Column("traffic_token", sa.String(64), nullable=False, server_default="")
        )


def downgrade() -> None:
    """Opens them all."""
    with op.batch_alter_table("sandboxes") as table:
        table.drop_column("traffic_token")
