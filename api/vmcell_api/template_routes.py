"""The routes of templates, builds, tags and uploads: HTTP in, one verb, E2B's JSON out."""

from __future__ import annotations

from collections.abc import Callable

import falcon

from vmcell_api import template_answers, template_bodies
from vmcell_api.config import ApiConfig
from vmcell_api.encoded_paths import segment
from vmcell_api.json_body import request_json, request_stream
from vmcell_api.page_cursor import encode_cursor
from vmcell_api.sandbox_bodies import parse_list_query
from vmcell_api.store.records import Team
from vmcell_api.template_plane import TemplatePlane
from vmcell_api.upload_store import PREFIX, UploadStore
from vmcell_protos.errors import CallerError

# Whether the team had a snapshot of that id or name, which is gone then.
DeleteSnapshot = Callable[[Team, str], bool]


class Templates:
    """Making templates and listing them."""

    def __init__(self, plane: TemplatePlane, config: ApiConfig) -> None:
        self._plane = plane
        self._config = config

    def on_post_v3(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Asks for a build; `POST …/builds/{id}` starts it."""
        asked = template_bodies.parse_template_request(request_json(req))
        template, build_id = self._plane.request(req.context.team, asked)
        resp.status = 202
        resp.media = template_answers.requested(template, build_id, asked.tags)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """All of the team's, then the installation's."""
        resp.media = self._rows(req)

    def on_get_v2(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The same in pages."""
        query = parse_list_query(req.query_string)
        own, installed = self._plane.everything(req.context.team)
        disk_mib = self._config.disk_mib
        rows = [
            (row.created_at_unix_ms, row.template_id, template_answers.listed(row, b, disk_mib))
            for row, b in own
        ]
        # The cursor's form is that of sandboxes; these sort last and need no dashes in it.
        rows += [
            (0, f"{number:020d}", template_answers.installed(row, disk_mib))
            for number, row in enumerate(reversed(installed))
        ]
        rows.sort(key=lambda row: row[:2], reverse=True)
        if query.after is not None:
            after = query.after
            rows = [row for row in rows if row[:2] < after]
        page = rows[: query.limit]
        resp.media = [row for _, _, row in page]
        if len(rows) > len(page):
            resp.set_header("X-Next-Token", encode_cursor(*page[-1][:2]))

    def _rows(self, req: falcon.Request) -> list[template_answers.Json]:
        disk_mib = self._config.disk_mib
        own, installed = self._plane.everything(req.context.team)
        return [
            *(template_answers.listed(row, builds, disk_mib) for row, builds in own),
            *(template_answers.installed(row, disk_mib) for row in installed),
        ]


class Template:
    """`/templates/{template_id}` and what hangs below it; ids may be names, encoded."""

    def __init__(
        self, plane: TemplatePlane, config: ApiConfig, delete_snapshot: DeleteSnapshot
    ) -> None:
        self._plane = plane
        self._config = config
        self._delete_snapshot = delete_snapshot

    def on_get(self, req: falcon.Request, resp: falcon.Response, template_id: str) -> None:
        """Details with builds."""
        owned, builds = self._plane.get(req.context.team, segment(template_id))
        disk_mib = self._config.disk_mib
        if owned.team_template is not None:
            answer = template_answers.listed(owned.team_template, builds, disk_mib)
        else:
            assert owned.installed is not None
            answer = template_answers.installed(owned.installed, disk_mib)
        answer["builds"] = [template_answers.build_row(build) for build in builds]
        resp.media = answer

    def on_delete(self, req: falcon.Request, resp: falcon.Response, template_id: str) -> None:
        """Deletes it; builds that run are cancelled. SDKs delete snapshots by this route too."""
        if not self._delete_snapshot(req.context.team, segment(template_id)):
            self._plane.delete(req.context.team, segment(template_id))
        resp.status = 204

    def on_patch(self, req: falcon.Request, resp: falcon.Response, template_id: str) -> None:
        """Opens it to other teams, or closes it."""
        self._set_public(req, template_id)
        resp.media = {}

    def on_patch_v2(self, req: falcon.Request, resp: falcon.Response, template_id: str) -> None:
        """The same, answered with its names."""
        resp.media = {"names": self._set_public(req, template_id)}

    def _set_public(self, req: falcon.Request, template_id: str) -> list[str]:
        public = template_bodies.parse_public(request_json(req))
        template = self._plane.set_public(req.context.team, segment(template_id), public)
        return template_answers.names(template)

    def on_get_tags(self, req: falcon.Request, resp: falcon.Response, template_id: str) -> None:
        """Its tags."""
        tags = self._plane.tags(req.context.team, segment(template_id))
        resp.media = [template_answers.tag(row) for row in tags]

    def on_get_files(
        self, req: falcon.Request, resp: falcon.Response, template_id: str, files_hash: str
    ) -> None:
        """Whether files for COPY are here, and a link that takes them."""
        present, token = self._plane.upload_token(
            req.context.team, segment(template_id), files_hash
        )
        base = self._config.api_url.rstrip("/") or f"{req.scheme}://{req.netloc}"
        resp.status = 201
        resp.media = {"present": present, "url": f"{base}{PREFIX}{token}"}


class Builds:
    """The builds of a template."""

    def __init__(self, plane: TemplatePlane) -> None:
        self._plane = plane

    def on_post(
        self, req: falcon.Request, resp: falcon.Response, template_id: str, build_id: str
    ) -> None:
        """Starts a build that was asked for."""
        start = template_bodies.parse_build_start(request_json(req))
        self._plane.start(req.context.team, segment(template_id), build_id, start)
        resp.status = 202

    def on_get_status(
        self, req: falcon.Request, resp: falcon.Response, template_id: str, build_id: str
    ) -> None:
        """How it goes, with a page of its log."""
        query = template_bodies.parse_log_query(req.query_string)
        found, build, entries = self._plane.status(
            req.context.team, segment(template_id), build_id, query
        )
        resp.media = template_answers.status(found, build, entries)

    def on_get_logs(
        self, req: falcon.Request, resp: falcon.Response, template_id: str, build_id: str
    ) -> None:
        """Its log alone; `cursor` is the number of the first line wanted."""
        query = template_bodies.parse_log_query(req.query_string, offset_name="cursor")
        if req.get_param("direction") == "backward":
            raise CallerError("this server has direction=forward; leave it out")
        _, _, entries = self._plane.status(req.context.team, segment(template_id), build_id, query)
        resp.media = {"logs": [template_answers.entry(row) for row in entries]}

    def on_delete(
        self, req: falcon.Request, resp: falcon.Response, template_id: str, build_id: str
    ) -> None:
        """Cancels it; one that has ended stays as it is. An extension: E2B has no such route."""
        self._plane.cancel(req.context.team, segment(template_id), build_id)
        resp.status = 204


class Tags:
    """`/templates/tags`: by name, whatever the template's id."""

    def __init__(self, plane: TemplatePlane) -> None:
        self._plane = plane

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Lets tags stand for the build that another tag names."""
        target, tags = template_bodies.parse_tag_target(request_json(req))
        build_id = self._plane.assign_tags(req.context.team, target, tags)
        resp.status = 201
        resp.media = {"tags": tags, "buildID": build_id}

    def on_delete(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Removes tags; the body is on the DELETE."""
        name, tags = template_bodies.parse_tag_removal(request_json(req))
        self._plane.remove_tags(req.context.team, name, tags)
        resp.status = 204


class Aliases:
    """`/templates/aliases/{alias}`."""

    def __init__(self, plane: TemplatePlane) -> None:
        self._plane = plane

    def on_get(self, req: falcon.Request, resp: falcon.Response, alias: str) -> None:
        """404: no such name; 403: another team's."""
        template_id, public = self._plane.alias(req.context.team, segment(alias))
        resp.media = {"templateID": template_id, "public": public}


class Uploads:
    """Where the links for COPY's files lead; the link is the permission."""

    def __init__(self, plane: TemplatePlane, uploads: UploadStore) -> None:
        self._plane = plane
        self._uploads = uploads

    def on_put(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        """Takes a tar."""
        team_id, files_hash = self._plane.uploader(token)
        stream = request_stream(req)
        if stream is None:
            raise CallerError("the upload has no body; send the tar with its Content-Length")
        self._uploads.receive(team_id, files_hash, stream, req.content_length)
        resp.status = 200


def add_routes(
    app: falcon.App,
    plane: TemplatePlane,
    uploads: UploadStore,
    config: ApiConfig,
    delete_snapshot: DeleteSnapshot,
) -> None:
    """All of them; literal segments come before parameters in Falcon's router anyway."""
    templates, builds = Templates(plane, config), Builds(plane)
    template = Template(plane, config, delete_snapshot)
    app.add_route("/v3/templates", templates, suffix="v3")
    app.add_route("/templates", templates)
    app.add_route("/v2/templates", templates, suffix="v2")
    app.add_route("/templates/tags", Tags(plane))
    app.add_route("/templates/aliases/{alias}", Aliases(plane))
    app.add_route("/templates/{template_id}", template)
    app.add_route("/v2/templates/{template_id}", template, suffix="v2")
    app.add_route("/templates/{template_id}/tags", template, suffix="tags")
    app.add_route("/templates/{template_id}/files/{files_hash}", template, suffix="files")
    build = "/templates/{template_id}/builds/{build_id}"
    app.add_route(f"/v2{build}", builds)
    app.add_route(f"{build}/status", builds, suffix="status")
    app.add_route(f"{build}/logs", builds, suffix="logs")
    app.add_route(PREFIX + "{token}", Uploads(plane, uploads))
