"""What noded tells of snapshots, and the API passes on: the same on both sides of the door."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SnapshotFile:
    """One file of a snapshot as its manifest has it; `digest` is "blake2b:<hex>"."""

    name: str
    size: int
    allocated: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class FileChange:
    """`what` ("added", "removed", "modified") happened to the file at `path` between two snapshots;
    sizes are bytes, 0 where it is not."""

    path: str
    what: str
    size_before: int
    size_after: int
