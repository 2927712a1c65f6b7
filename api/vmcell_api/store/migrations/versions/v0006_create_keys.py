"""The idempotency keys of creates."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Adds the table."""
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
    """Removes it with what is in it: a repeat of a create makes a second sandbox."""
    op.drop_table("create_keys")
