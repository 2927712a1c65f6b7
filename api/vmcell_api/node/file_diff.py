"""Which files differ between two snapshots, in the guest's own terms.

Both are restored, one after the other and without a network, and each one's envd is asked for the
tree of files: the host never reads a guest's disk. What the guests' processes change in this moment
shows as well. An answer is a stranger's words: bounded in bytes and time, and told on as they are.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping

from vmcell_api.guest_http import ENVD_PORT, ask
from vmcell_api.snapshot_facts import FileChange
from vmcell_protos.errors import GuestError

# What a guest has of the host, of its kernel, or anew with each start.
SKIPPED_DIRECTORIES = frozenset({"/proc", "/sys", "/dev", "/run"})
SKIPPED_FILES = frozenset({"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/machine-id"})
DEPTH = 64
TREE_BYTES = 64 << 20
TREE_TIMEOUT_S = 60.0
MOST_CHANGES = 10_000
MAX_PATH = 4096
# The fields of envd's EntryInfo that say whether a file is the same.
_COMPARED = ("type", "size", "mode", "owner", "group", "modifiedTime", "symlinkTarget")
_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")
ADDED, REMOVED, MODIFIED = "added", "removed", "modified"

Tree = Mapping[str, tuple[object, ...]]


def read_tree(address: str, access_token: str, *, port: int = ENVD_PORT) -> dict[str, tuple]:
    """The files of a guest by path; raises HostError, GuestError for an answer that is none."""
    deadline = time.monotonic() + TREE_TIMEOUT_S
    left_bytes = TREE_BYTES
    tree: dict[str, tuple] = {}
    tops = ["/"]
    while tops:
        top = tops.pop()
        depth = 1 if top == "/" else DEPTH
        body = json.dumps({"path": top, "depth": depth}).encode()
        answer = ask(
            address,
            "/filesystem.Filesystem/ListDir",
            body,
            headers={
                "Content-Type": "application/json",
                "Authorization": "Basic " + base64.b64encode(b"root:").decode(),
                **({"X-Access-Token": access_token} if access_token else {}),
            },
            limit_bytes=left_bytes,
            timeout_s=max(1.0, deadline - time.monotonic()),
            port=port,
        )
        left_bytes -= len(answer)
        for path, entry in entries_of(answer):
            if path not in SKIPPED_FILES and path not in SKIPPED_DIRECTORIES:
                tree[path] = row_of(entry)
                is_directory = entry.get("type") == "FILE_TYPE_DIRECTORY"
                if top == "/" and is_directory and not entry.get("symlinkTarget"):
                    tops.append(path)
    return tree


def row_of(entry: dict[str, object]) -> tuple[object, ...]:
    """What of an entry is compared; raises GuestError for what is neither text nor number."""
    row = tuple(entry.get(name) for name in _COMPARED)
    if any(isinstance(value, dict | list) for value in row):
        raise GuestError(f"envd lists a file {str(entry.get('path'))[:80]!r} whose data is none")
    return row


def entries_of(answer: bytes) -> list[tuple[str, dict[str, object]]]:
    """(path, entry) of the answer to ListDir; raises GuestError."""
    try:
        rows = json.loads(answer).get("entries", [])
        found = [(row["path"], row) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise GuestError(f"envd gave no list of files: {error}") from error
    for path, _ in found:
        if not isinstance(path, str) or not path.startswith("/") or len(path) > MAX_PATH:
            raise GuestError(f"envd lists a file {str(path)[:80]!r}")
        if not path.isascii() and _HALF_CHARACTERS.search(path):
            # envd names raw bytes U+FFFD; half a character fits into no message of ours.
            raise GuestError(f"envd lists a file {path[:80]!a}, which is no text")
    return found


def compare(before: Tree, after: Tree) -> list[FileChange]:
    """What differs, by path; at most MOST_CHANGES, the first."""
    changes = []
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path), after.get(path)
        if old == new or (old and new and _is_same_directory(old, new)):
            continue
        what = MODIFIED if old and new else REMOVED if old else ADDED
        changes.append(
            FileChange(path=path, what=what, size_before=_size(old), size_after=_size(new))
        )
        if len(changes) == MOST_CHANGES:
            break
    return changes


def _is_same_directory(old: tuple[object, ...], new: tuple[object, ...]) -> bool:
    """Of the same mode and owner: its time and size follow from what is in it."""
    return old[0] == new[0] == "FILE_TYPE_DIRECTORY" and old[2:5] == new[2:5]


def _size(row: tuple[object, ...] | None) -> int:
    text = str(row[1]) if row else "0"
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0
