"""Templates, builds and tags as E2B's JSON objects."""

from __future__ import annotations

from vmcell_api.build_client import BuildEntry, NodeBuild
from vmcell_api.sandbox_answers import ENVD_VERSION, rfc3339
from vmcell_api.store.records import Template
from vmcell_api.store.templates import Tag, TeamTemplate, TemplateBuild
from vmcell_api.template_names import namespace_of

Json = dict[str, object]
# The release that made the tables; installed templates have no moment of their own.
INSTALLED_AT_UNIX_MS = 0
NO_BUILD = "00000000-0000-0000-0000-000000000000"


def names(template: TeamTemplate) -> list[str]:
    """What the template may be called by every team: with its namespace."""
    return [f"{namespace_of(template.team_name)}/{template.name}"]


def requested(template: TeamTemplate, build_id: str, tags: list[str]) -> Json:
    """The answer to `POST /v3/templates`."""
    return {
        "templateID": template.template_id,
        "buildID": build_id,
        "public": template.public,
        "names": names(template),
        "tags": tags,
        "aliases": [template.name],
    }


def listed(template: TeamTemplate, builds: list[TemplateBuild], disk_mib: int) -> Json:
    """One entry of a list; `builds` are the template's, the newest first."""
    newest = builds[0] if builds else None
    shown = next((build for build in builds if build.status == "ready"), newest)
    spawned = template.last_spawned_at_unix_ms
    return {
        "templateID": template.template_id,
        "buildID": shown.build_id if shown else NO_BUILD,
        "cpuCount": shown.vcpus if shown else 0,
        "memoryMB": shown.memory_mib if shown else 0,
        "diskSizeMB": disk_mib,
        "public": template.public,
        "aliases": [template.name],
        "names": names(template),
        "createdAt": rfc3339(template.created_at_unix_ms),
        "updatedAt": rfc3339(template.updated_at_unix_ms),
        "createdBy": None,
        "lastSpawnedAt": None if spawned is None else rfc3339(spawned),
        "spawnCount": template.spawn_count,
        "buildCount": len(builds),
        "envdVersion": ENVD_VERSION,
        "buildStatus": newest.status if newest else "waiting",
    }


def installed(template: Template, disk_mib: int) -> Json:
    """One of the installation's templates in a list."""
    return {
        "templateID": template.name,
        "buildID": NO_BUILD,
        "cpuCount": template.vcpus,
        "memoryMB": template.memory_mib,
        "diskSizeMB": disk_mib,
        "public": True,
        "aliases": [template.name],
        "names": [template.name],
        "createdAt": rfc3339(INSTALLED_AT_UNIX_MS),
        "updatedAt": rfc3339(INSTALLED_AT_UNIX_MS),
        "createdBy": None,
        "lastSpawnedAt": None,
        "spawnCount": 0,
        "buildCount": 1,
        "envdVersion": ENVD_VERSION,
        "buildStatus": "ready",
    }


def build_row(build: TemplateBuild) -> Json:
    """One build in a template's details."""
    finished = build.finished_at_unix_ms
    row: Json = {
        "buildID": build.build_id,
        "status": build.status,
        "createdAt": rfc3339(build.created_at_unix_ms),
        "updatedAt": rfc3339(finished or build.created_at_unix_ms),
        "cpuCount": build.vcpus,
        "memoryMB": build.memory_mib,
        "envdVersion": ENVD_VERSION,
    }
    if finished is not None:
        row["finishedAt"] = rfc3339(finished)
    return row


def status(template_id: str, build: NodeBuild, entries: list[BuildEntry]) -> Json:
    """The answer to a poll of a build."""
    answer: Json = {
        "templateID": template_id,
        "buildID": build.build_id,
        "status": build.status,
        "logs": [],
        "logEntries": [entry(row) for row in entries],
    }
    if build.status == "error":
        reason: Json = {
            "message": build.reason_message or "the build failed",
            "logEntries": [entry(row) for row in build.reason_entries],
        }
        if build.reason_step:
            reason["step"] = build.reason_step
        answer["reason"] = reason
    return answer


def entry(row: BuildEntry) -> Json:
    """One line of a build's log."""
    found: Json = {
        "timestamp": rfc3339(row.at_unix_ms),
        "message": row.message,
        "level": row.level,
    }
    if row.step:
        found["step"] = row.step
    return found


def tag(row: Tag) -> Json:
    """One tag of a template."""
    return {
        "tag": row.tag,
        "buildID": row.build_id,
        "createdAt": rfc3339(row.created_at_unix_ms),
    }
