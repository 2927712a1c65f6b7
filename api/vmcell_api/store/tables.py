"""The tables. Times are unix milliseconds, as everywhere in the service.

Which sandboxes run, and until when, is noded's to say: a row in `sandboxes` only adds what the
node does not keep.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    ForeignKey,
    Integer,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# The newest revision in `migrations`; a test compares.
SCHEMA_VERSION = "0009"


class Base(DeclarativeBase):
    """Root of the tables."""

    type_annotation_map = {dict[str, str]: JSON}  # noqa: RUF012  # SQLAlchemy's own interface


class TeamRow(Base):
    """A tenant: sees its own sandboxes only, and has at most `sandbox_limit` of them.

    The other limits are the service's where they are NULL.
    """

    __tablename__ = "teams"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    sandbox_limit: Mapped[int]
    created_at_unix_ms: Mapped[int] = mapped_column(BigInteger)
    max_timeout_s: Mapped[int | None]
    requests_per_s: Mapped[int | None]


class ApiKeyRow(Base):
    """A key of a team; `hash` is SHA-256 of the key in hex, `prefix` its beginning, to know it by.

    `scopes` are words with a space between them. Keys from before version 0002 have no prefix.
    """

    __tablename__ = "api_keys"

    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"), index=True)
    created_at_unix_ms: Mapped[int] = mapped_column(BigInteger)
    id: Mapped[str] = mapped_column(String(16), index=True, unique=True)
    name: Mapped[str] = mapped_column(String(64))
    prefix: Mapped[str] = mapped_column(String(16))
    scopes: Mapped[str] = mapped_column(String(512))
    expires_at_unix_ms: Mapped[int | None] = mapped_column(BigInteger)
    revoked_at_unix_ms: Mapped[int | None] = mapped_column(BigInteger)
    last_used_at_unix_ms: Mapped[int | None] = mapped_column(BigInteger)


class AuditRow(Base):
    """Who did what, when, with which result; ids only, so that it outlives what it tells of."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    at_unix_ms: Mapped[int] = mapped_column(BigInteger, index=True)
    request_id: Mapped[str] = mapped_column(String(32))
    team_id: Mapped[str] = mapped_column(String(36), index=True)
    actor: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(128))
    target: Mapped[str] = mapped_column(String(128))
    status: Mapped[int]
    result: Mapped[str] = mapped_column(String(32))


class TemplateRow(Base):
    """A name that every team may use, and what it stands for: part of the installation."""

    __tablename__ = "templates"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    image: Mapped[str] = mapped_column(String(512))
    vcpus: Mapped[int]
    memory_mib: Mapped[int]


class SandboxRow(Base):
    """A sandbox's owner, token and metadata; written before the node is asked to make it."""

    __tablename__ = "sandboxes"

    id: Mapped[str] = mapped_column(String(20), primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"), index=True)
    template_id: Mapped[str] = mapped_column(String(512))
    access_token: Mapped[str] = mapped_column(String(64))
    traffic_token: Mapped[str] = mapped_column(String(64), default="", server_default="")
    user_metadata: Mapped[dict[str, str]]
    built: Mapped[bool] = mapped_column(Boolean)
    created_at_unix_ms: Mapped[int] = mapped_column(BigInteger)


class CreateKeyRow(Base):
    """An Idempotency-Key of a team, what it was sent with and the sandbox it stands for."""

    __tablename__ = "create_keys"

    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    sandbox_id: Mapped[str] = mapped_column(String(20))
    done: Mapped[bool] = mapped_column(Boolean)
    created_at_unix_ms: Mapped[int] = mapped_column(BigInteger, index=True)


class VolumeRow(Base):
    """A team's name for a directory of the node; `made`: the node has it."""

    __tablename__ = "volumes"
    __table_args__ = (UniqueConstraint("team_id", "name", name="uq_volumes_team_id_name"),)

    id: Mapped[str] = mapped_column(String(20), primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    name: Mapped[str] = mapped_column(String(128))
    made: Mapped[bool] = mapped_column(Boolean)
    created_at_unix_ms: Mapped[int] = mapped_column(BigInteger)


class SnapshotRow(Base):
    """A team's snapshot on the node; `made`: the node has it. `name` "" is none."""

    __tablename__ = "snapshots"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"), index=True)
    sandbox_id: Mapped[str] = mapped_column(String(20))
    template_id: Mapped[str] = mapped_column(String(512))
    name: Mapped[str] = mapped_column(String(260))
    vcpus: Mapped[int]
    memory_mib: Mapped[int]
    secured: Mapped[bool] = mapped_column(Boolean)
    made: Mapped[bool] = mapped_column(Boolean)
    created_at_unix_ms: Mapped[int] = mapped_column(BigInteger)
