"""Teams, keys, templates and sandboxes, with the two templates every installation has."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "teams",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False, unique=True),
        sa.Column("sandbox_limit", sa.Integer, nullable=False),
        sa.Column("created_at_unix_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("hash", sa.String(64), primary_key=True),
        sa.Column("team_id", sa.String(36), sa.ForeignKey("teams.id"), nullable=False),
        sa.Column("created_at_unix_ms", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_api_keys_team_id", "api_keys", ["team_id"])
    templates = op.create_table(
        "templates",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("image", sa.String(512), nullable=False),
        sa.Column("vcpus", sa.Integer, nullable=False),
        sa.Column("memory_mib", sa.Integer, nullable=False),
    )
    op.create_table(
        "sandboxes",
        sa.Column("id", sa.String(20), primary_key=True),
        sa.Column("team_id", sa.String(36), sa.ForeignKey("teams.id"), nullable=False),
        sa.Column("template_id", sa.String(512), nullable=False),
        sa.Column("access_token", sa.String(64), nullable=False),
        sa.Column("user_metadata", sa.JSON, nullable=False),
        sa.Column("built", sa.Boolean, nullable=False),
        sa.Column("created_at_unix_ms", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_sandboxes_team_id", "sandboxes", ["team_id"])
    rows = [
        {"name": name, "image": f"docker.io/vmcell/{name}:latest", "vcpus": 1, "memory_mib": size}
        for name, size in (("base", 512), ("small", 256))
    ]
    op.bulk_insert(templates, rows)


def downgrade() -> None:
    """Removes the tables with all that is in them."""
    for table in ("sandboxes", "templates", "api_keys", "teams"):
        op.drop_table(table)
