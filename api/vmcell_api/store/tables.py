"""The tables. Times are unix milliseconds, as everywhere in the service.

Which sandboxes run, and until when, is noded's to say: a row in `sandboxes` only adds what the
node does not keep.
"""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Boolean, ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# The newest revision in `migrations`; a test compares.
SCHEMA_VERSION = "0006"


class Base(DeclarativeBase):
    """Root of the tables."""

    type_annotation_map = {dict[str, str]: JSON}  # noqa: RUF012  # SQLAlchemy's own interface


class TeamRow(Base):
    """A tenant: sees its own sandboxes only, and has at most `sandbox_limit` of them."""

    __tablename__ = "teams"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    sandbox_limit: Mapped[int]
    created_at_unix_ms: Mapped[int] = mapped_column(BigInteger)


class ApiKeyRow(Base):
    """A key of a team; `hash` is SHA-256 of the key in hex."""

    __tablename__ = "api_keys"

    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"), index=True)
    created_at_unix_ms: Mapped[int] = mapped_column(BigInteger)


class TemplateRow(Base):
    """A name that creates may use, and what it stands for."""

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
    user_metadata: Mapped[dict[str, str]]
    built: Mapped[bool] = mapped_column(Boolean)
    created_at_unix_ms: Mapped[int] = mapped_column(BigInteger)
