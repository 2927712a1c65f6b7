"""A container that runs becomes a snapshot, and may go on afterwards.

    copy of the old memory file · containers frozen, disks written back · vCPUs stand still ·
    changed memory, state and disk written · (vCPUs and containers go on) · digests, manifest

What the guest has to wait for is what lies between standing still and going on: it depends on what
it has changed, not on how large it is, but for the copy of its disk where the file system cannot
share blocks.
"""

from __future__ import annotations

import json
import os
import time
from typing import NamedTuple

from vmcell_protos.errors import CallerError, HostError
from vmcell_protos.task import RuncCheckpointOptions
from vmcell_shim.digests import snapshot_digests
from vmcell_shim.snapshot_manifest import DISK, MEMORY, STATE, Manifest, check_id, file_names
from vmcell_shim.snapshot_store import SnapshotDraft
from vmcell_shim.sparse import copy_sparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.wellknown import Any
    from vmcell_shim.config import ShimConfig
    from vmcell_shim.guest import Guest
    from vmcell_shim.journal import Journal
    from vmcell_shim.rootfs import RootImages

OPTIONS_TYPE = "io.vmcell.v1.CheckpointOptions"
# What ctr sends to every runtime. Its other fields ask for what a snapshot of a whole VM does
# anyway: open connections, sockets, terminals and file locks are the guest's own.
RUNC_OPTIONS_TYPE = "containerd.runc.v1.CheckpointOptions"
_CRIU_ONLY = ("image_path", "work_path", "empty_namespaces", "cgroups_mode")
AS_BEFORE, RUN, PAUSE, EXIT = "as-before", "run", "pause", "exit"
_THEN = (RUN, PAUSE)


class CheckpointOptions(NamedTuple):
    """`snapshot_id` "": into the directory that containerd names, for its content store."""

    snapshot_id: str = ""
    then: str = AS_BEFORE
    drop_caches: bool = False


def parse_options(options: Any | None) -> CheckpointOptions:
    """What Checkpoint's options ask for; raises CallerError for what they cannot."""
    if options is None or not options.type_url:
        return CheckpointOptions()
    if options.type_url.endswith(OPTIONS_TYPE):
        return _own_options(options.value)
    if options.type_url.endswith(RUNC_OPTIONS_TYPE):
        return _runc_options(options.value)
    raise CallerError(
        f"Checkpoint brings options {options.type_url[:100]!r}; it takes {OPTIONS_TYPE} as JSON "
        f"or {RUNC_OPTIONS_TYPE}",
        code="invalid_argument",
    )


def _runc_options(value: bytes) -> CheckpointOptions:
    asked = RuncCheckpointOptions.decode(value)
    for name in _CRIU_ONLY:
        if found := getattr(asked, name):
            raise CallerError(
                f"Checkpoint asks for {name} {found!r}, which is CRIU's; a microVM's snapshot has "
                "no such option",
                code="unimplemented",
            )
    return CheckpointOptions(then=EXIT if asked.exit else AS_BEFORE)


def _own_options(value: bytes) -> CheckpointOptions:
    try:
        tree = json.loads(value)
        found = CheckpointOptions(**{"then": RUN, **tree})
    except (ValueError, TypeError, RecursionError) as error:
        raise CallerError(f"the options of Checkpoint are no {OPTIONS_TYPE}: {error}") from error
    if not isinstance(found.snapshot_id, str) or not isinstance(found.drop_caches, bool):
        raise CallerError(f"the options of Checkpoint are no {OPTIONS_TYPE}: {tree}")
    if found.snapshot_id:
        check_id(found.snapshot_id)
    if found.then not in _THEN:
        raise CallerError(f"then is {found.then!r} in Checkpoint; it takes {' or '.join(_THEN)}")
    return found


class Subject(NamedTuple):
    """The container that is saved: its guest and what of it the host has. `parent` is the snapshot
    it came from, "" for none."""

    container_id: str
    guest: Guest
    images: RootImages
    vcpus: int
    memory_mib: int
    macs: tuple[str, ...]
    terminal: bool
    parent: str


class Checkpoint:
    """One snapshot in the making: `save`, then the guest may go on, then `finish`. The draft stays
    its maker's, to be committed or discarded."""

    def __init__(
        self, subject: Subject, draft: SnapshotDraft, config: ShimConfig, journal: Journal
    ) -> None:
        self._subject = subject
        self._draft = draft
        self._config = config
        self._journal = journal
        self._digests = snapshot_digests(config)

    def save(self, *, drop_caches: bool) -> None:
        """The guest stands still when this returns, and is written. Raises VmcellError: then it
        may stand still or not."""
        guest = self._subject.guest
        opened: list[int] = []
        try:
            memory_fd = self._draft.create(MEMORY)
            opened.append(memory_fd)
            state_fd = self._draft.create(STATE)
            opened.append(state_fd)
            guest.copy_memory(memory_fd)
            guest.stand_still(drop_caches=drop_caches)
            began = time.monotonic()
            written = guest.save(memory_fd, state_fd)
            if self._subject.images.disk:
                self._copy_disk(self._subject.images.disk)
            self._journal.info(
                f"{self._subject.container_id} saved as {self._draft.id} in "
                f"{1000 * (time.monotonic() - began):.1f} ms: {written >> 10} KiB of memory"
            )
        except OSError as error:
            raise HostError(
                f"cannot write snapshot {self._draft.id}: {error.strerror}; is there room in "
                f"{self._config.snapshot_dir}?",
                code="resource_exhausted",
            ) from error
        finally:
            for fd in opened:
                os.close(fd)

    def _copy_disk(self, disk: str) -> None:
        reader = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
        try:
            writer = self._draft.create(DISK)
            try:
                copy_sparse(reader, writer)
            finally:
                os.close(writer)
        finally:
            os.close(reader)

    def finish(self) -> None:
        """The draft is a whole snapshot, for its commit(). Raises VmcellError."""
        subject = self._subject
        has_disk = bool(subject.images.disk)
        try:
            files = self._draft.saved_files(file_names(disk=has_disk), self._digests)
            self._draft.seal(
                Manifest(
                    created_unix_ns=time.time_ns(),
                    container_id=subject.container_id,
                    vcpus=subject.vcpus,
                    memory_mib=subject.memory_mib,
                    kernel=self._digests.of_path(self._config.kernel),
                    base_image=self._digests.of_path(self._config.base_image),
                    images=self._images(),
                    disk=has_disk,
                    macs=subject.macs,
                    terminal=subject.terminal,
                    parent=subject.parent,
                    files=files,
                )
            )
        except OSError as error:
            raise HostError(
                f"cannot finish snapshot {self._draft.id}: {error.strerror}",
                code="resource_exhausted",
            ) from error

    def _images(self) -> tuple[str, ...]:
        return tuple(self._digests.of_path(path) for path in self._subject.images.lowers)
