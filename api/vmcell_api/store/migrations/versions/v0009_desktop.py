"""The template `desktop`, which E2B's desktop clients name by default."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

NAME = "desktop"
# An X server, Xfce, and what runs in them.
VCPUS, MEMORY_MIB = 2, 2048

_templates = sa.table(
    "templates",
    sa.column("name", sa.String),
    sa.column("image", sa.String),
    sa.column("vcpus", sa.Integer),
    sa.column("memory_mib", sa.Integer),
)


def upgrade() -> None:
    """Adds the row, unless an operator has made one of that name."""
    present = op.get_bind().scalar(
        sa.select(sa.func.count()).select_from(_templates).where(_templates.c.name == NAME)
    )
    if not present:
        image = f"docker.io/vmcell/{NAME}:latest"
        row = {"name": NAME, "image": image, "vcpus": VCPUS, "memory_mib": MEMORY_MIB}
        op.bulk_insert(_templates, [row])


def downgrade() -> None:
    """Takes the row out."""
    op.execute(_templates.delete().where(_templates.c.name == NAME))
