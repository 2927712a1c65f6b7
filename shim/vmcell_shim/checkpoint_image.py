"""A snapshot as containerd's content store carries it: four plain files, packed without holes.

containerd makes one archive of the directory it names in Checkpoint, keeps it under its digest as
part of a checkpoint image, and lays it out again for a Task.Create that goes on from that image, on
this node or on another. Whoever wrote it can be anybody: only regular files of the four names are
read, and what comes of them is a snapshot whose every digest is checked before it is used.
"""

from __future__ import annotations

import os

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.snapshot_manifest import DISK, MANIFEST, MEMORY, STATE, parse, render
from vmcell_shim.snapshot_store import open_directory, open_file
from vmcell_shim.sparse import pack, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.digests import Digests
    from vmcell_shim.snapshot_store import OpenSnapshot, SnapshotDraft

_NAME = "in the checkpoint image"
_PACKED_SUFFIX = ".packed"
_MANIFEST_LIMIT_BYTES = 1 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def export_snapshot(snapshot: OpenSnapshot, directory: str) -> None:
    """Into an empty directory. Raises HostError; the directory is empty then as before."""
    files = {STATE: snapshot.state_fd, MEMORY: snapshot.memory_fd, DISK: snapshot.disk_fd}
    made: list[str] = []
    try:
        made.append(_write(os.path.join(directory, MANIFEST), render(snapshot.manifest)))
        for name, fd in files.items():
            if fd >= 0:
                path = os.path.join(directory, name + _PACKED_SUFFIX)
                writer = os.open(path, _NEW, 0o600)
                made.append(path)
                try:
                    pack(fd, writer)
                finally:
                    os.close(writer)
    except OSError as error:
        for path in made:
            os.unlink(path)
        raise HostError(
            f"cannot write the checkpoint to {directory}: {error.strerror}",
            code="resource_exhausted",
        ) from error


def import_snapshot(directory: str, draft: SnapshotDraft, digests: Digests) -> OpenSnapshot:
    """The snapshot that `export_snapshot` wrote to `directory`, verified, unpacked into the draft,
    which stays one: what is open outlives its discard(). The caller closes it.

    Raises CallerError (data_loss, failed_precondition), HostError.
    """
    try:
        fd = open_file(directory, _NAME, MANIFEST)
        with open(fd, "rb") as file:
            document = file.read(_MANIFEST_LIMIT_BYTES + 1)
        manifest = parse(document, _NAME)
        for name, saved in manifest.files.items():
            _unpack(directory, name, draft, saved.bytes)
        _write(os.path.join(draft.directory, MANIFEST), document)
        return open_directory(draft.directory, _NAME, digests)
    except OSError as error:
        raise HostError(
            f"cannot lay out the checkpoint image: {error.strerror}", code="resource_exhausted"
        ) from error
    except CallerError as error:
        if error.code == "not_found":
            raise CallerError(str(error), code="data_loss") from error
        raise


def _write(path: str, content: bytes) -> str:
    """The path, of a new file with that content; nothing of it is left by an OSError."""
    with open(os.open(path, _NEW, 0o600), "wb") as file:
        try:
            file.write(content)
            file.flush()
        except BaseException:
            os.unlink(path)
            raise
    return path


def _unpack(directory: str, name: str, draft: SnapshotDraft, length: int) -> None:
    reader = open_file(directory, _NAME, name + _PACKED_SUFFIX)
    try:
        writer = draft.create(name)
        try:
            unpack(reader, writer, length)
        except CallerError as error:
            raise CallerError(
                f"{name}{_PACKED_SUFFIX} of snapshot {_NAME}: {error}", code=error.code
            ) from error
        finally:
            os.close(writer)
    finally:
        os.close(reader)
