"""Volumes: names of directories on the node, and whose they are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Makes the table."""
    op.create_table(
        "volumes",
        sa.Column("id", sa.String(20), primary_key=True),
        sa.Column("team_id", sa.String(36), sa.ForeignKey("teams.id"), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("made", sa.Boolean, nullable=False),
        sa.Column("created_at_unix_ms", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("team_id", "name", name="uq_volumes_team_id_name"),
    )


def downgrade() -> None:
    """Removes the table; the directories stay."""
    op.drop_table("volumes")
