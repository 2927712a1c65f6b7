"""Templates of teams, their builds and tags, and links for uploads.

`templates` stays what it was: those that an installation has for everybody.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "team_templates",
        sa.Column("id", sa.String(20), primary_key=True),
        sa.Column("team_id", sa.String(36), sa.ForeignKey("teams.id"), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("public", sa.Boolean, nullable=False),
        sa.Column("created_at_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("updated_at_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("last_spawned_at_unix_ms", sa.BigInteger, nullable=True),
        sa.Column("spawn_count", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("team_id", "name", name="uq_team_templates_team_id_name"),
    )
    op.create_table(
        "template_builds",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("template_id", sa.String(20), sa.ForeignKey("team_templates.id"), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("vcpus", sa.Integer, nullable=False),
        sa.Column("memory_mib", sa.Integer, nullable=False),
        sa.Column("image", sa.String(512), nullable=False),
        sa.Column("default_user", sa.String(256), nullable=False),
        sa.Column("default_workdir", sa.Text, nullable=False),
        sa.Column("start_command", sa.Text, nullable=False),
        sa.Column("ready_command", sa.Text, nullable=False),
        sa.Column("reason_message", sa.Text, nullable=False),
        sa.Column("reason_step", sa.String(16), nullable=False),
        sa.Column("created_at_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("finished_at_unix_ms", sa.BigInteger, nullable=True),
    )
    op.create_index("ix_template_builds_template_id", "template_builds", ["template_id"])
    op.create_table(
        "template_tags",
        sa.Column("template_id", sa.String(20), sa.ForeignKey("team_templates.id"), nullable=False),
        sa.Column("tag", sa.String(128), nullable=False),
        sa.Column("build_id", sa.String(36), sa.ForeignKey("template_builds.id"), nullable=False),
        sa.Column("created_at_unix_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("template_id", "tag", "build_id"),
    )
    op.create_table(
        "upload_links",
        sa.Column("token_hash", sa.String(64), primary_key=True),
        sa.Column("team_id", sa.String(36), sa.ForeignKey("teams.id"), nullable=False),
        sa.Column("files_hash", sa.String(64), nullable=False),
        sa.Column("expires_at_unix_ms", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Removes the tables with all that is in them."""
    for table in ("upload_links", "template_tags", "template_builds", "team_templates"):
        op.drop_table(table)
