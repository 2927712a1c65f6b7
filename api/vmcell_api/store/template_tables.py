"""The tables of teams' templates, of builds, tags and upload links."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, ForeignKey, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from vmcell_api.store.tables import Base


class TeamTemplateRow(Base):
    """A template of a team; `public`: other teams may make sandboxes of it."""

    __tablename__ = "team_templates"
    __table_args__ = (UniqueConstraint("team_id", "name", name="uq_team_templates_team_id_name"),)

    id: Mapped[str] = mapped_column(String(20), primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    name: Mapped[str] = mapped_column(String(128))
    public: Mapped[bool] = mapped_column(Boolean)
    created_at_unix_ms: Mapped[int] = mapped_column(BigInteger)
    updated_at_unix_ms: Mapped[int] = mapped_column(BigInteger)
    last_spawned_at_unix_ms: Mapped[int | None] = mapped_column(BigInteger)
    spawn_count: Mapped[int] = mapped_column(BigInteger)


class TemplateBuildRow(Base):
    """A build: what the node last said of it, and what sandboxes of it get."""

    __tablename__ = "template_builds"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    template_id: Mapped[str] = mapped_column(ForeignKey("team_templates.id"), index=True)
    status: Mapped[str] = mapped_column(String(16))
    vcpus: Mapped[int]
    memory_mib: Mapped[int]
    image: Mapped[str] = mapped_column(String(512))
    default_user: Mapped[str] = mapped_column(String(256))
    default_workdir: Mapped[str] = mapped_column(Text)
    start_command: Mapped[str] = mapped_column(Text)
    ready_command: Mapped[str] = mapped_column(Text)
    reason_message: Mapped[str] = mapped_column(Text)
    reason_step: Mapped[str] = mapped_column(String(16))
    created_at_unix_ms: Mapped[int] = mapped_column(BigInteger)
    finished_at_unix_ms: Mapped[int | None] = mapped_column(BigInteger)


class TemplateTagRow(Base):
    """A tag that a build was given; of several the newest whose build is ready counts."""

    __tablename__ = "template_tags"

    template_id: Mapped[str] = mapped_column(ForeignKey("team_templates.id"), primary_key=True)
    tag: Mapped[str] = mapped_column(String(128), primary_key=True)
    build_id: Mapped[str] = mapped_column(ForeignKey("template_builds.id"), primary_key=True)
    created_at_unix_ms: Mapped[int] = mapped_column(BigInteger)


class UploadLinkRow(Base):
    """A link that takes one upload; `token_hash` is SHA-256 of the token in it, in hex."""

    __tablename__ = "upload_links"

    token_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    files_hash: Mapped[str] = mapped_column(String(64))
    expires_at_unix_ms: Mapped[int] = mapped_column(BigInteger)
