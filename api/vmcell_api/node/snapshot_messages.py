"""Snapshots and memory as messages of noded's door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from vmcell_api.node.memory_use import MemorySum, ProcessMemory
from vmcell_api.node.snapshot_records import Manifest, SnapshotRecord
from vmcell_protos.pb import node_pb2


def snapshot_message(record: SnapshotRecord, manifest: Manifest) -> node_pb2.Snapshot:
    """A whole snapshot."""
    files = [
        node_pb2.SnapshotFile(
            name=row.name, bytes=row.size, allocated_bytes=row.allocated, digest=row.digest
        )
        for row in manifest.files
    ]
    return node_pb2.Snapshot(
        snapshot_id=record.snapshot_id,
        sandbox_id=record.sandbox_id,
        template_id=record.template_id,
        vcpus=record.vcpus,
        memory_mib=record.memory_mib,
        created_at_unix_ms=record.created_at_unix_ms,
        expires_at_unix_ms=record.expires_at_unix_ms,
        parent=manifest.parent,
        secured=bool(record.access_token),
        bytes=sum(row.size for row in manifest.files),
        allocated_bytes=sum(row.allocated for row in manifest.files),
        files=files,
    )


def memory_message(processes: Sequence[ProcessMemory], memory_mib: int) -> node_pb2.MemoryUse:
    """What a sandbox has of the host's memory."""
    rows = [
        node_pb2.ProcessMemory(
            name=row.name, pid=row.pid, own=_sum(row.own), guest_ram=_sum(row.guest_ram)
        )
        for row in processes
    ]
    return node_pb2.MemoryUse(processes=rows, guest_memory_bytes=memory_mib << 20)


def _sum(row: MemorySum) -> node_pb2.MemorySum:
    return node_pb2.MemorySum(**{f"{name}_bytes": value for name, value in asdict(row).items()})
