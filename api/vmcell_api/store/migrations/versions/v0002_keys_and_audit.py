"""Keys get an id, scopes and an end; teams get limits; what was done is kept.

Columns are added in place: a batch copy would drop tables that others refer to.
"""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# Name, length, what keys have that are there: they could do everything of their team.
KEY_TEXTS = (("id", 16, ""), ("name", 64, ""), ("prefix", 16, ""), ("scopes", 512, "*"))
KEY_TIMES = ("expires_at_unix_ms", "revoked_at_unix_ms", "last_used_at_unix_ms")


def upgrade() -> None:
    """Adds the columns and the table; every key that is there gets an id."""
    op.add_column("teams", sa.Column("max_timeout_s", sa.Integer))
    op.add_column("teams", sa.Column("requests_per_s", sa.Integer))
    for name, length, default in KEY_TEXTS:
        text = sa.Column(name, sa.String(length), nullable=False, server_default=default)
        op.add_column("api_keys", text)
    for name in KEY_TIMES:
        op.add_column("api_keys", sa.Column(name, sa.BigInteger))
    keys = sa.table("api_keys", sa.column("hash", sa.String), sa.column("id", sa.String))
    connection = op.get_bind()
    for (key_hash,) in connection.execute(sa.select(keys.c.hash)).all():
        connection.execute(
            sa.update(keys).where(keys.c.hash == key_hash).values(id=f"k{secrets.token_hex(6)}")
        )
    op.create_index("ix_api_keys_id", "api_keys", ["id"], unique=True)
    op.create_table(
        "audit",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            primary_key=True,
            autoincrement=True,
        ),
        sa.Column("at_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("request_id", sa.String(32), nullable=False),
        sa.Column("team_id", sa.String(36), nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("action", sa.String(128), nullable=False),
        sa.Column("target", sa.String(128), nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("result", sa.String(32), nullable=False),
    )
    op.create_index("ix_audit_at_unix_ms", "audit", ["at_unix_ms"])
    op.create_index("ix_audit_team_id", "audit", ["team_id"])


def downgrade() -> None:
    """Removes them with all that is in them."""
    op.drop_table("audit")
    op.drop_index("ix_api_keys_id", "api_keys")
    for name in (*KEY_TIMES, *(row[0] for row in KEY_TEXTS)):
        op.drop_column("api_keys", name)
    op.drop_column("teams", "requests_per_s")
    op.drop_column("teams", "max_timeout_s")
