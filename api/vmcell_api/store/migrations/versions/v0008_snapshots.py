"""Snapshots of sandboxes: whose they are, and their names."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Adds the table."""
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("team_id", sa.String(36), sa.ForeignKey("teams.id"), nullable=False),
        sa.Column("sandbox_id", sa.String(20), nullable=False),
        sa.Column("template_id", sa.String(512), nullable=False),
        sa.Column("name", sa.String(260), nullable=False),
        sa.Column("vcpus", sa.Integer, nullable=False),
        sa.Column("memory_mib", sa.Integer, nullable=False),
        sa.Column("secured", sa.Boolean, nullable=False),
        sa.Column("made", sa.Boolean, nullable=False),
        sa.Column("created_at_unix_ms", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_snapshots_team_id", "snapshots", ["team_id"])


def downgrade() -> None:
    """Removes it; the snapshots stay on the node, and nobody owns them."""
    op.drop_table("snapshots")
