"""Snapshots, forks and rollbacks as JSON objects: E2B's, and those of the extensions."""

from __future__ import annotations

from vmcell_api import sandbox_answers
from vmcell_api.http_errors import error_body, status_of
from vmcell_api.node_client import NodeSnapshot
from vmcell_api.sandbox_answers import Json, rfc3339
from vmcell_api.snapshot_plane import Difference, Fork
from vmcell_api.store.snapshot_rows import TeamSnapshot


def listed(row: TeamSnapshot) -> Json:
    """E2B's SnapshotInfo."""
    return {"snapshotID": row.snapshot_id, "names": [row.name] if row.name else []}


def forked(fork: Fork, domain: str) -> Json:
    """One entry of the answer to a fork: the sandbox, or the error it would have been alone."""
    if fork.made is not None:
        return {"sandbox": sandbox_answers.sandbox(fork.made[0], domain)}
    assert fork.error is not None
    return {"error": error_body(status_of(fork.error), str(fork.error))}


def history_row(row: NodeSnapshot, name: str) -> Json:
    """A snapshot with what only the node knows of it."""
    return {
        "snapshotID": row.snapshot_id,
        "names": [name] if name else [],
        "parent": row.parent or None,
        "isUndoPoint": row.is_undo_point,
        "createdAt": rfc3339(row.created_at_unix_ms),
        "expiresAt": rfc3339(row.expires_at_unix_ms) if row.expires_at_unix_ms else None,
        "cpuCount": row.vcpus,
        "memoryMB": row.memory_mib,
        "bytes": row.size,
        "allocatedBytes": row.allocated,
    }


def difference(found: Difference) -> Json:
    """What differs between two snapshots."""
    files = {row.name: row for row in found.newer.files} | {
        row.name: row for row in found.older.files
    }
    answer: Json = {
        "older": found.older.snapshot_id,
        "newer": found.newer.snapshot_id,
        "changed": list(found.changed),
        "unchanged": sorted(files.keys() - set(found.changed)),
        "allocatedBytesOlder": found.older.allocated,
        "allocatedBytesNewer": found.newer.allocated,
    }
    if found.files is not None:
        answer["files"] = [
            {
                "path": row.path,
                "change": row.what,
                "sizeBefore": row.size_before,
                "sizeAfter": row.size_after,
            }
            for row in found.files
        ]
    return answer
