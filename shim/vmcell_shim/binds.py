"""Bind mounts of host files: which travel into the guest as copies, which are shared live.

Small files (resolv.conf, hosts, secrets) and small read-only trees (config maps) are copied, and
copied again when the source changes (vmcell_shim.refresh); a copy leaves the sandbox free to be
snapshotted. What is written or large is shared by virtio-fs. Symbolic links inside a tree are
followed only while they stay in it (that is how config maps are laid out).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from vmcell_protos.agent import FileCopy
from vmcell_protos.errors import CallerError
from vmcell_shim.oci_json import take, take_strings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.oci_json import Json

FILE_LIMIT_BYTES = 1 << 20
TREE_LIMIT_BYTES = 1 << 20
TREE_LIMIT_ENTRIES = 256


@dataclass(frozen=True)
class BindCopy:
    """A small file or tree; `files` are its copies as they were read, parents first."""

    source: str
    destination: str
    read_only: bool
    files: tuple[FileCopy, ...]

    @property
    def size_bytes(self) -> int:
        return sum(len(copy.content) for copy in self.files)


@dataclass(frozen=True)
class BindShare:
    """What the guest sees live: a directory, or a file too large to be copied."""

    source: str
    destination: str
    read_only: bool
    options: tuple[str, ...]

    @property
    def follows_host(self) -> bool:
        """Whether mounts that come below it on the host are to be seen (runtime-spec, rslave)."""
        return bool({"rslave", "rshared", "slave", "shared"} & set(self.options))


class NotCopied(Exception):
    """A file or tree that is to be shared instead of copied; the text says why."""


def plan_bind(mount: Json) -> BindCopy | BindShare:
    """How one bind mount reaches the guest; raises CallerError for what cannot."""
    source = take(mount, "source", str, "")
    destination = take(mount, "destination", str, "")
    options = take_strings(mount, "options")
    read_only = "ro" in options or "rro" in options
    share = BindShare(source, destination, read_only, tuple(options))
    try:
        status = os.stat(source)
        if stat.S_ISREG(status.st_mode):
            if status.st_size > FILE_LIMIT_BYTES:
                return share
            return BindCopy(source, destination, read_only, read_copies(source, destination))
        if not stat.S_ISDIR(status.st_mode):
            raise CallerError(
                f"mount {destination}: {source} is neither a file nor a directory; "
                "a microVM cannot be given a device, socket or FIFO of the host"
            )
        if not read_only:
            return share
        return BindCopy(source, destination, True, read_copies(source, destination))
    except NotCopied:
        return share
    except OSError as error:
        raise CallerError(f"mount {destination}: cannot read {source}: {error}") from error


def read_copies(source: str, destination: str) -> tuple[FileCopy, ...]:
    """The copies that stand for a small file or tree as it is now, parents first.

    OSError as it comes; NotCopied for what a copy cannot stand for.
    """
    status = os.stat(source)
    if stat.S_ISREG(status.st_mode):
        return (_file_copy(source, destination, status),)
    return tuple(_tree_copies(source, destination))


def try_read_copies(source: str, destination: str) -> tuple[FileCopy, ...] | None:
    """read_copies(), or None while the source is missing, being replaced or too large."""
    try:
        return read_copies(source, destination)
    except (OSError, NotCopied):
        return None


def _file_copy(source: str, destination: str, status: os.stat_result) -> FileCopy:
    with open(source, "rb") as file:
        content = file.read(FILE_LIMIT_BYTES + 1)
    if len(content) > FILE_LIMIT_BYTES:
        raise NotCopied(f"{source} is larger than {FILE_LIMIT_BYTES} bytes")
    return FileCopy(
        destination=destination,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        content=content,
    )


def _directory_copy(destination: str, status: os.stat_result) -> FileCopy:
    return FileCopy(
        destination=destination,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        directory=True,
    )


def _tree_copies(source: str, destination: str) -> list[FileCopy]:
    root = os.path.realpath(source)
    copies = [_directory_copy(destination, os.stat(root))]
    total_bytes = 0
    pending = [(root, destination)]
    while pending:
        directory, inside = pending.pop()
        for name in sorted(os.listdir(directory)):
            path = os.path.realpath(os.path.join(directory, name))
            if os.path.commonpath((root, path)) != root:
                raise NotCopied(f"{directory}/{name} leads out of {source}")
            try:
                status = os.stat(path)
            except FileNotFoundError:
                # A link to nothing, or one that is just being replaced.
                continue
            target = f"{inside.rstrip('/')}/{name}"
            if stat.S_ISDIR(status.st_mode):
                copies.append(_directory_copy(target, status))
                pending.append((path, target))
            elif stat.S_ISREG(status.st_mode):
                copies.append(_file_copy(path, target, status))
                total_bytes += len(copies[-1].content)
            else:
                raise NotCopied(f"{path} is neither file nor directory")
            if total_bytes > TREE_LIMIT_BYTES or len(copies) > TREE_LIMIT_ENTRIES:
                raise NotCopied(f"{source} has more than {TREE_LIMIT_ENTRIES} entries or 1 MiB")
    return copies
