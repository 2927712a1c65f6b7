"""Traffic tokens of sandboxes, and the idempotency keys of creates."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds the column and the table."""
    op.add_column(
        "sandboxes",
        sa.Column("traffic_token", sa.String(64), nullable=False, server_default=""),
    )
    op.create_table(
        "create_keys",
        sa.Column("team_id", sa.String(36), sa.ForeignKey("teams.id"), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("sandbox_id", sa.String(20), nullable=False),
        sa.Column("done", sa.Boolean, nullable=False),
        sa.Column("created_at_unix_ms", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_create_keys_created_at_unix_ms", "create_keys", ["created_at_unix_ms"])


def downgrade() -> None:
    """Removes both with what is in them."""
    op.drop_table("create_keys")
    with op.batch_alter_table("sandboxes") as table:
        table.drop_column("traffic_token")
