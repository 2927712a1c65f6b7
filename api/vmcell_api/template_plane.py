"""What the API does about templates, without HTTP.

The node says how a build goes, the store keeps how it went: whoever looks at a build that the store
thinks is running asks the node, and writes the end down. Nothing needs to watch.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import uuid
from dataclasses import dataclass

from vmcell_api.build_client import BuildEntry, BuildVerbs, NewBuild, NodeBuild
from vmcell_api.identifiers import SANDBOX_ID, new_sandbox_id
from vmcell_api.store.records import Store, Team, Template, now_ms
from vmcell_api.store.templates import (
    BUILDING,
    ERROR,
    LIVE,
    READY,
    WAITING,
    Tag,
    TeamTemplate,
    TemplateBuild,
    TemplateStore,
)
from vmcell_api.template_bodies import LEVELS, BuildStart, LogQuery, TemplateRequest
from vmcell_api.template_names import DEFAULT_TAG, TemplateName, namespace_of, parse_name
from vmcell_api.upload_store import LINK_LIFE_MS, UploadStore
from vmcell_protos.errors import CallerError

MAX_SCANNED_ENTRIES = 1000
FILES_HASH = re.compile(r"[0-9a-f]{64}")
# Images of builds have this prefix on every node; clients name templates instead.
OWN_IMAGES = "vmcell.local/"


WithBuilds = tuple[TeamTemplate, list[TemplateBuild]]


@dataclass(frozen=True, kw_only=True)
class Owned:
    """A template a team may see: one of a team's, or the installation's."""

    team_template: TeamTemplate | None = None
    installed: Template | None = None


class TemplatePlane:
    """The verbs for one team at a time; thread-safe."""

    def __init__(self, store: Store, builds: BuildVerbs, uploads: UploadStore) -> None:
        self._installed = store
        self._store = TemplateStore(store)
        self._builds = builds
        self._uploads = uploads

    # Builds.

    def request(self, team: Team, asked: TemplateRequest) -> tuple[TeamTemplate, str]:
        """A build of the team's template of that name, which is made if it is missing."""
        name = asked.name
        if name.namespace and name.namespace != namespace_of(team.name):
            raise CallerError(
                f"template {str(name)!r} is in the namespace {name.namespace!r}; yours is "
                f"{namespace_of(team.name)!r}",
                code="permission_denied",
            )
        template = self._store.ensure(team.team_id, name.name, new_sandbox_id())
        build = TemplateBuild(
            build_id=str(uuid.uuid4()),
            template_id=template.template_id,
            status=WAITING,
            vcpus=asked.vcpus,
            memory_mib=asked.memory_mib,
        )
        self._store.add_build(build, asked.tags)
        return template, build.build_id

    def start(self, team: Team, template_text: str, build_id: str, start: BuildStart) -> None:
        """Has the node build it; CallerError failed_precondition when it was started before."""
        template = self._own(team, template_text)
        build = self._build(template, build_id)
        order = NewBuild(
            build_id=build.build_id,
            team_id=team.team_id,
            template_id=template.template_id,
            from_image=self._image(team, start),
            username=start.username,
            password=start.password,
            steps=start.steps,
            force=start.force,
            start_command=start.start_command,
            ready_command=start.ready_command,
            vcpus=build.vcpus,
            memory_mib=build.memory_mib,
        )
        if not self._store.claim_build(
            build_id, start_command=start.start_command, ready_command=start.ready_command
        ):
            raise CallerError(f"build {build_id} was started before; ask for a new one")
        try:
            self._builds.start(order)
        except Exception:
            self._store.release_build(build_id)
            raise

    def _image(self, team: Team, start: BuildStart) -> str:
        if start.from_image:
            if start.from_image.startswith(OWN_IMAGES):
                raise CallerError("fromImage belongs to a template; use fromTemplate")
            return start.from_image
        found = self.resolve(team, start.from_template)
        if found is None:
            raise CallerError(
                f"template {start.from_template[:80]!r} does not exist, or has no build that is "
                "ready",
                code="not_found",
            )
        return found.image

    def status(
        self, team: Team, template_text: str, build_id: str, query: LogQuery
    ) -> tuple[str, NodeBuild, list[BuildEntry]]:
        """(template id, the build as it stands, a page of its log)."""
        template = self._own(team, template_text)
        build = self._build(template, build_id)
        if build.status == WAITING:
            return template.template_id, NodeBuild(build_id=build_id, status=WAITING), []
        view = self._look(build, query)
        return template.template_id, view, view.entries

    def cancel(self, team: Team, template_text: str, build_id: str) -> None:
        """Ends a build early."""
        template = self._own(team, template_text)
        build = self._build(template, build_id)
        if build.status == BUILDING:
            self._builds.cancel(build_id)
        elif build.status == WAITING:
            self._store.end_build(build_id, status=ERROR, reason_message="the build was cancelled")

    def _look(self, build: TemplateBuild, query: LogQuery) -> NodeBuild:
        """What the node says, and where it has nothing to say what the store knows."""
        try:
            view = self._page(build.build_id, query)
        except CallerError as error:
            if error.code != "not_found":
                raise
            if build.status in LIVE:
                words = "the node does not know the build any more; build the template again"
                self._store.end_build(build.build_id, status=ERROR, reason_message=words)
                return NodeBuild(build_id=build.build_id, status=ERROR, reason_message=words)
            return NodeBuild(
                build_id=build.build_id,
                status=build.status,
                reason_message=build.reason_message,
                reason_step=build.reason_step,
            )
        if build.status in LIVE and view.status in (READY, ERROR):
            self._store.end_build(
                build.build_id,
                status=view.status,
                image=view.image,
                default_user=view.default_user,
                default_workdir=view.default_workdir,
                reason_message=view.reason_message,
                reason_step=view.reason_step,
            )
        return view

    def _page(self, build_id: str, query: LogQuery) -> NodeBuild:
        if query.level == LEVELS[0]:
            return self._builds.get(build_id, offset=query.offset, limit=query.limit)
        # The offset counts entries of that level, so the log is read from its beginning.
        wanted = LEVELS[LEVELS.index(query.level) :]
        found: list[BuildEntry] = []
        offset = 0
        while True:
            view = self._builds.get(build_id, offset=offset, limit=MAX_SCANNED_ENTRIES)
            found += [entry for entry in view.entries if entry.level in wanted]
            offset += len(view.entries)
            if not view.entries or len(found) >= query.offset + query.limit:
                page = found[query.offset : query.offset + query.limit]
                return NodeBuild(**{**vars(view), "entries": page})

    def _settled(self, template: TeamTemplate) -> list[TemplateBuild]:
        """The template's builds, the newest first; those that run are asked about."""
        builds = self._store.builds(template.template_id)
        running = [build for build in builds if build.status == BUILDING]
        for build in running:
            self._look(build, LogQuery(limit=0))
        return self._store.builds(template.template_id) if running else builds

    # Templates.

    def resolve(self, team: Team, text: str) -> Template | None:
        """What a sandbox of the template `text` (id, name, name:tag, team/name:tag) is made of."""
        found = self._find(team, text)
        if found is None:
            return None
        owned, tag = found
        if owned.installed is not None:
            return owned.installed if tag in ("", DEFAULT_TAG) else None
        template = owned.team_template
        assert template is not None
        self._settled(template)
        build = self._store.tagged(template.template_id, tag or DEFAULT_TAG)
        if build is None and not tag:
            ready = [b for b in self._store.builds(template.template_id) if b.status == READY]
            build = ready[0] if ready else None
        if build is None:
            return None
        return Template(
            name=template.template_id,
            image=build.image,
            vcpus=build.vcpus,
            memory_mib=build.memory_mib,
            default_user=build.default_user,
            default_workdir=build.default_workdir,
            start_command=build.start_command,
            ready_command=build.ready_command,
        )

    def id_of(self, team: Team, text: str) -> str:
        """The id of the template that `text` names, else `text`: sandboxes are listed by it."""
        found = self._find(team, text)
        template = found[0].team_template if found else None
        return template.template_id if template else text

    def is_known(self, team: Team, text: str) -> bool:
        """Whether `text` names a template that the team may use, built or not."""
        return self._find(team, text) is not None

    def count_spawn(self, template_id: str) -> None:
        """A sandbox was made of a team's template; others are not counted."""
        if SANDBOX_ID.fullmatch(template_id):
            self._store.count_spawn(template_id)

    def alias(self, team: Team, text: str) -> tuple[str, bool]:
        """(template id, public) of a name; not_found, or permission_denied: another team's."""
        found = self._find(team, text, foreign=True)
        if found is None:
            raise _unknown(text)
        owned, _ = found
        if owned.installed is not None:
            return owned.installed.name, True
        template = owned.team_template
        assert template is not None
        if template.team_id != team.team_id and not template.public:
            raise CallerError(
                f"template {text[:80]!r} belongs to another team", code="permission_denied"
            )
        return template.template_id, template.public

    def everything(self, team: Team) -> tuple[list[WithBuilds], list[Template]]:
        """The team's templates with their builds, newest first, and the installation's."""
        own = [(row, self._settled(row)) for row in self._store.of_team(team.team_id)]
        return own, self._installed.templates()

    def get(self, team: Team, text: str) -> tuple[Owned, list[TemplateBuild]]:
        """A template the team may use, with its builds."""
        found = self._find(team, text)
        if found is None:
            raise _unknown(text)
        owned, _ = found
        builds = self._settled(owned.team_template) if owned.team_template else []
        return owned, builds

    def set_public(self, team: Team, text: str, public: bool) -> TeamTemplate:
        """Opens the team's template to others, or closes it."""
        template = self._own(team, text)
        self._store.set_public(template.template_id, public)
        return template

    def delete(self, team: Team, text: str) -> None:
        """Deletes the team's template; sandboxes made of it go on."""
        template = self._own(team, text)
        for build in self._store.builds(template.template_id):
            self._builds.remove(build.build_id)
        self._store.delete(template.template_id)

    # Tags.

    def tags(self, team: Team, text: str) -> list[Tag]:
        """The tags of a template the team may use."""
        found = self._find(team, text)
        if found is None:
            raise _unknown(text)
        template = found[0].team_template
        if template is None:
            return []
        self._settled(template)
        return self._store.tags(template.template_id)

    def assign_tags(self, team: Team, target: TemplateName, tags: list[str]) -> str:
        """Lets `tags` stand for the build that `target` names; answers the build's id."""
        template = self._own(team, str(target))
        self._settled(template)
        build = self._store.tagged(template.template_id, target.tag or DEFAULT_TAG)
        if build is None:
            raise CallerError(
                f"template {str(target)!r} has no build that is ready under that tag",
                code="not_found",
            )
        self._store.assign_tags(template.template_id, build.build_id, tags)
        return build.build_id

    def remove_tags(self, team: Team, name: TemplateName, tags: list[str]) -> None:
        """Removes tags of a template; not_found when it has none of them."""
        template = self._own(team, str(name))
        if not self._store.remove_tags(template.template_id, tags):
            raise CallerError(
                f"template {name.name!r} has no tag {', '.join(tags)}", code="not_found"
            )

    # Uploads.

    def upload_token(self, team: Team, text: str, files_hash: str) -> tuple[bool, str]:
        """(whether the files are here already, a token for a link that takes them)."""
        self._own(team, text)
        if not FILES_HASH.fullmatch(files_hash):
            raise CallerError(f"{files_hash[:80]!r} is no SHA-256 in lower-case hex")
        present = self._uploads.present(team.team_id, files_hash)
        token = secrets.token_urlsafe(32)
        self._store.add_link(
            _hashed(token),
            team_id=team.team_id,
            files_hash=files_hash,
            expires_at_unix_ms=now_ms() + LINK_LIFE_MS,
        )
        return present, token

    def uploader(self, token: str) -> tuple[str, str]:
        """(team id, files hash) of a link; CallerError permission_denied for none."""
        found = self._store.link(_hashed(token))
        if found is None:
            raise CallerError(
                "the upload link is unknown or older than an hour; ask for a new one",
                code="permission_denied",
            )
        return found

    # Finding.

    def _own(self, team: Team, text: str) -> TeamTemplate:
        """A template of the team; not_found, or permission_denied for the installation's."""
        found = self._find(team, text)
        template = found[0].team_template if found else None
        if found and template is None:
            raise CallerError(
                f"template {text[:80]!r} belongs to the installation; build your own from it",
                code="permission_denied",
            )
        if template is None:
            raise _unknown(text)
        if template.team_id != team.team_id:
            raise CallerError(
                f"template {text[:80]!r} belongs to another team", code="permission_denied"
            )
        return template

    def _build(self, template: TeamTemplate, build_id: str) -> TemplateBuild:
        build = self._store.build(template.template_id, build_id)
        if build is None:
            raise CallerError(
                f"template {template.name!r} has no build {build_id[:60]!r}", code="not_found"
            )
        return build

    def _find(self, team: Team, text: str, *, foreign: bool = False) -> tuple[Owned, str] | None:
        """The template that `text` names and the tag in it; those of other teams if public.

        `foreign`: others' private ones too, so that the caller can say whose they are.
        """
        if len(text) > 400:
            return None
        head, _, tag = text.partition(":")
        if SANDBOX_ID.fullmatch(head):
            by_id = self._store.by_id(head)
            if by_id is not None:
                return self._seen(team, by_id, tag, foreign)
        try:
            name = parse_name(text)
        except CallerError:
            return None
        if name.namespace:
            return self._in_namespace(team, name, foreign)
        template = self._store.by_name(team.team_id, name.name)
        if template is not None:
            return Owned(team_template=template), name.tag
        installed = self._installed.template(name.name)
        return (Owned(installed=installed), name.tag) if installed else None

    def _in_namespace(
        self, team: Team, name: TemplateName, foreign: bool
    ) -> tuple[Owned, str] | None:
        for team_id, team_name in self._store.teams():
            if namespace_of(team_name) == name.namespace:
                template = self._store.by_name(team_id, name.name)
                seen = template and self._seen(team, template, name.tag, foreign)
                if seen:
                    return seen
        return None

    @staticmethod
    def _seen(
        team: Team, template: TeamTemplate, tag: str, foreign: bool
    ) -> tuple[Owned, str] | None:
        if template.team_id != team.team_id and not template.public and not foreign:
            return None
        return Owned(team_template=template), tag


def _unknown(text: str) -> CallerError:
    return CallerError(f"template {text[:80]!r} was not found", code="not_found")


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
