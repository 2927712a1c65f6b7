"""What the service asks of its store about teams' templates; each method is one transaction.

A template belongs to a team, a build to a template, and a tag names a build. What a tag stands for
is its newest build that is ready, so a build that fails changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from vmcell_api.store.records import Store, Transaction, now_ms
from vmcell_api.store.tables import TeamRow
from vmcell_api.store.template_tables import (
    TeamTemplateRow,
    TemplateBuildRow,
    TemplateTagRow,
    UploadLinkRow,
)

WAITING, BUILDING, READY, ERROR = "waiting", "building", "ready", "error"
LIVE = (WAITING, BUILDING)


@dataclass(frozen=True, kw_only=True)
class TeamTemplate:
    """A template; `team_name` is that of its owner."""

    template_id: str
    team_id: str
    team_name: str
    name: str
    public: bool
    created_at_unix_ms: int
    updated_at_unix_ms: int
    last_spawned_at_unix_ms: int | None
    spawn_count: int


@dataclass(frozen=True, kw_only=True)
class TemplateBuild:
    """A build; `image` and what follows are "" until it is ready, `reason_*` unless it failed."""

    build_id: str
    template_id: str
    status: str
    vcpus: int
    memory_mib: int
    image: str = ""
    default_user: str = ""
    default_workdir: str = ""
    start_command: str = ""
    ready_command: str = ""
    reason_message: str = ""
    reason_step: str = ""
    created_at_unix_ms: int = 0
    finished_at_unix_ms: int | None = None


@dataclass(frozen=True, kw_only=True)
class Tag:
    """A tag and the build it stands for."""

    tag: str
    build_id: str
    created_at_unix_ms: int


class TemplateStore:
    """The templates' part of a store, which stays the caller's. Thread-safe; raises HostError."""

    def __init__(self, store: Store) -> None:
        self._store = store

    # Templates.

    def ensure(self, team_id: str, name: str, new_id: str) -> TeamTemplate:
        """The team's template of that name, made with `new_id` if it is missing."""
        with Transaction(self._store.engine) as session:
            # Locks the team's row (SQLite: the store), so that two requests make one template.
            session.execute(sa.update(TeamRow).where(TeamRow.id == team_id).values(id=TeamRow.id))
            row = session.scalar(_named(team_id, name))
            if row is None:
                now = now_ms()
                row = TeamTemplateRow(
                    id=new_id,
                    team_id=team_id,
                    name=name,
                    public=False,
                    created_at_unix_ms=now,
                    updated_at_unix_ms=now,
                    last_spawned_at_unix_ms=None,
                    spawn_count=0,
                )
                session.add(row)
                session.flush()
            return _template(row, _team_name(session, team_id))

    def by_id(self, template_id: str) -> TeamTemplate | None:
        """The template of that id, whoever's it is."""
        with Transaction(self._store.engine) as session:
            row = session.get(TeamTemplateRow, template_id)
            return _template(row, _team_name(session, row.team_id)) if row else None

    def by_name(self, team_id: str, name: str) -> TeamTemplate | None:
        """The team's template of that name."""
        with Transaction(self._store.engine) as session:
            row = session.scalar(_named(team_id, name))
            return _template(row, _team_name(session, team_id)) if row else None

    def teams(self) -> list[tuple[str, str]]:
        """(id, name) of all teams: their names are the namespaces of templates."""
        with Transaction(self._store.engine) as session:
            return [(row.id, row.name) for row in session.scalars(sa.select(TeamRow))]

    def of_team(self, team_id: str) -> list[TeamTemplate]:
        """The team's templates, the newest first."""
        query = (
            sa.select(TeamTemplateRow)
            .where(TeamTemplateRow.team_id == team_id)
            .order_by(TeamTemplateRow.created_at_unix_ms.desc(), TeamTemplateRow.id.desc())
        )
        with Transaction(self._store.engine) as session:
            name = _team_name(session, team_id)
            return [_template(row, name) for row in session.scalars(query)]

    def set_public(self, template_id: str, public: bool) -> None:
        """Opens a template to other teams, or closes it."""
        self._update(template_id, public=public, updated_at_unix_ms=now_ms())

    def count_spawn(self, template_id: str) -> None:
        """Says that a sandbox was made of the template."""
        self._update(
            template_id,
            spawn_count=TeamTemplateRow.spawn_count + 1,
            last_spawned_at_unix_ms=now_ms(),
        )

    def delete(self, template_id: str) -> None:
        """Deletes a template with its builds and tags; a missing one is fine."""
        with Transaction(self._store.engine) as session:
            for table in (TemplateTagRow, TemplateBuildRow):
                session.execute(sa.delete(table).where(table.template_id == template_id))
            session.execute(sa.delete(TeamTemplateRow).where(TeamTemplateRow.id == template_id))

    def _update(self, template_id: str, **values: object) -> None:
        with Transaction(self._store.engine) as session:
            session.execute(
                sa.update(TeamTemplateRow).where(TeamTemplateRow.id == template_id).values(**values)
            )

    # Builds.

    def add_build(self, build: TemplateBuild, tags: Collection[str]) -> None:
        """Writes a build that waits to be started, and the tags it is to have."""
        now = now_ms()
        with Transaction(self._store.engine) as session:
            session.add(
                TemplateBuildRow(
                    id=build.build_id,
                    template_id=build.template_id,
                    status=build.status,
                    vcpus=build.vcpus,
                    memory_mib=build.memory_mib,
                    image="",
                    default_user="",
                    default_workdir="",
                    start_command="",
                    ready_command="",
                    reason_message="",
                    reason_step="",
                    created_at_unix_ms=now,
                    finished_at_unix_ms=None,
                )
            )
            session.flush()
            _add_tags(session, build.template_id, build.build_id, tags, now)
            session.execute(
                sa.update(TeamTemplateRow)
                .where(TeamTemplateRow.id == build.template_id)
                .values(updated_at_unix_ms=now)
            )

    def build(self, template_id: str, build_id: str) -> TemplateBuild | None:
        """A build of that template."""
        with Transaction(self._store.engine) as session:
            row = session.get(TemplateBuildRow, build_id)
            return _build(row) if row and row.template_id == template_id else None

    def builds(self, template_id: str) -> list[TemplateBuild]:
        """The template's builds, the newest first."""
        query = (
            sa.select(TemplateBuildRow)
            .where(TemplateBuildRow.template_id == template_id)
            .order_by(TemplateBuildRow.created_at_unix_ms.desc(), TemplateBuildRow.id.desc())
        )
        with Transaction(self._store.engine) as session:
            return [_build(row) for row in session.scalars(query)]

    def claim_build(self, build_id: str, *, start_command: str, ready_command: str) -> bool:
        """Marks a waiting build as started; False when somebody was first."""
        with Transaction(self._store.engine) as session:
            done = session.execute(
                sa.update(TemplateBuildRow)
                .where(TemplateBuildRow.id == build_id, TemplateBuildRow.status == WAITING)
                .values(status=BUILDING, start_command=start_command, ready_command=ready_command)
            )
            return done.rowcount == 1  # type: ignore[attr-defined]  # CursorResult of an UPDATE

    def release_build(self, build_id: str) -> None:
        """Undoes `claim_build`, for a node that did not take the build."""
        self._set_build(build_id, status=WAITING)

    def end_build(
        self,
        build_id: str,
        *,
        status: str,
        image: str = "",
        default_user: str = "",
        default_workdir: str = "",
        reason_message: str = "",
        reason_step: str = "",
    ) -> None:
        """Writes how a build ended."""
        self._set_build(
            build_id,
            status=status,
            image=image,
            default_user=default_user,
            default_workdir=default_workdir,
            reason_message=reason_message,
            reason_step=reason_step,
            finished_at_unix_ms=now_ms(),
        )

    def _set_build(self, build_id: str, **values: object) -> None:
        with Transaction(self._store.engine) as session:
            session.execute(
                sa.update(TemplateBuildRow).where(TemplateBuildRow.id == build_id).values(**values)
            )

    # Tags.

    def tags(self, template_id: str) -> list[Tag]:
        """The tags that stand for a build that is ready, each once, by name."""
        return sorted(self._ready_tags(template_id).values(), key=lambda tag: tag.tag)

    def tagged(self, template_id: str, tag: str) -> TemplateBuild | None:
        """The build that a tag stands for."""
        found = self._ready_tags(template_id).get(tag)
        return self.build(template_id, found.build_id) if found else None

    def assign_tags(self, template_id: str, build_id: str, tags: Collection[str]) -> None:
        """Lets tags stand for a build from now on."""
        with Transaction(self._store.engine) as session:
            session.execute(
                sa.delete(TemplateTagRow).where(
                    TemplateTagRow.template_id == template_id,
                    TemplateTagRow.build_id == build_id,
                    TemplateTagRow.tag.in_(tags),
                )
            )
            newest = session.scalar(
                sa.select(sa.func.max(TemplateTagRow.created_at_unix_ms)).where(
                    TemplateTagRow.template_id == template_id
                )
            )
            # Later than every other, or the tag might go on standing for what it stood for.
            _add_tags(session, template_id, build_id, tags, max(now_ms(), (newest or 0) + 1))

    def remove_tags(self, template_id: str, tags: Collection[str]) -> int:
        """Removes tags; answers how many assignments went."""
        with Transaction(self._store.engine) as session:
            done = session.execute(
                sa.delete(TemplateTagRow).where(
                    TemplateTagRow.template_id == template_id, TemplateTagRow.tag.in_(tags)
                )
            )
            return int(done.rowcount)  # type: ignore[attr-defined]  # CursorResult of a DELETE

    def _ready_tags(self, template_id: str) -> dict[str, Tag]:
        query = (
            sa.select(TemplateTagRow)
            .join(TemplateBuildRow, TemplateBuildRow.id == TemplateTagRow.build_id)
            .where(TemplateTagRow.template_id == template_id, TemplateBuildRow.status == READY)
            .order_by(TemplateTagRow.created_at_unix_ms)
        )
        with Transaction(self._store.engine) as session:
            return {
                row.tag: Tag(
                    tag=row.tag, build_id=row.build_id, created_at_unix_ms=row.created_at_unix_ms
                )
                for row in session.scalars(query)
            }

    # Upload links.

    def add_link(
        self, token_hash: str, *, team_id: str, files_hash: str, expires_at_unix_ms: int
    ) -> None:
        """Writes a link for one upload, and drops those that have expired."""
        with Transaction(self._store.engine) as session:
            session.execute(
                sa.delete(UploadLinkRow).where(UploadLinkRow.expires_at_unix_ms < now_ms())
            )
            session.add(
                UploadLinkRow(
                    token_hash=token_hash,
                    team_id=team_id,
                    files_hash=files_hash,
                    expires_at_unix_ms=expires_at_unix_ms,
                )
            )

    def link(self, token_hash: str) -> tuple[str, str] | None:
        """(team id, files hash) of a link that has not expired."""
        with Transaction(self._store.engine) as session:
            row = session.get(UploadLinkRow, token_hash)
            if row is None or row.expires_at_unix_ms < now_ms():
                return None
            return row.team_id, row.files_hash


def _named(team_id: str, name: str) -> sa.Select[TeamTemplateRow]:
    return sa.select(TeamTemplateRow).where(
        TeamTemplateRow.team_id == team_id, TeamTemplateRow.name == name
    )


def _team_name(session: Session, team_id: str) -> str:
    row = session.get(TeamRow, team_id)
    return row.name if row else ""


def _add_tags(
    session: Session, template_id: str, build_id: str, tags: Collection[str], at_unix_ms: int
) -> None:
    session.add_all(
        TemplateTagRow(
            template_id=template_id, tag=tag, build_id=build_id, created_at_unix_ms=at_unix_ms
        )
        for tag in tags
    )


def _template(row: TeamTemplateRow, team_name: str) -> TeamTemplate:
    return TeamTemplate(
        template_id=row.id,
        team_id=row.team_id,
        team_name=team_name,
        name=row.name,
        public=row.public,
        created_at_unix_ms=row.created_at_unix_ms,
        updated_at_unix_ms=row.updated_at_unix_ms,
        last_spawned_at_unix_ms=row.last_spawned_at_unix_ms,
        spawn_count=row.spawn_count,
    )


def _build(row: TemplateBuildRow) -> TemplateBuild:
    names = TemplateBuild.__dataclass_fields__.keys() - {"build_id"}
    return TemplateBuild(build_id=row.id, **{name: getattr(row, name) for name in names})
