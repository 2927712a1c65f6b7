"""Bind mounts of host files that travel into the guest as copies.

Small files (resolv.conf, hosts, hostname, secrets) and small read-only trees are copied once,
before the container starts. A directory that is to stay live, or is larger, needs a shared file
system and is refused by name. Symbolic links inside a tree are followed only while they stay in
it (that is how secrets are laid out); device nodes, sockets and FIFOs are refused.
"""

from __future__ import annotations

import os
import stat

from vmcell_protos.agent import FileCopy
from vmcell_protos.errors import CallerError
from vmcell_shim.oci_json import take, take_strings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.oci_json import Json

FILE_LIMIT_BYTES = 1 << 20
TREE_LIMIT_BYTES = 1 << 20
TREE_LIMIT_ENTRIES = 256


def copies_of_bind(mount: Json) -> list[FileCopy]:
    """The copies that stand for one bind mount, parents first; raises CallerError."""
    source = take(mount, "source", str, "")
    destination = take(mount, "destination", str, "")
    options = take_strings(mount, "options")
    read_only = "ro" in options or "rro" in options
    try:
        status = os.stat(source)
        if stat.S_ISREG(status.st_mode):
            return [_file_copy(source, destination, status, read_only=read_only)]
        if not stat.S_ISDIR(status.st_mode):
            raise CallerError(
                f"mount {destination}: {source} is neither a file nor a directory; "
                "a microVM cannot be given a device, socket or FIFO of the host"
            )
        if not read_only:
            raise CallerError(
                f"mount {destination}: directory {source} is to be writable, which would need a "
                "live share; bind it with 'ro' to have a copy of at most 1 MiB, or copy files in"
            )
        return _tree_copies(source, destination)
    except OSError as error:
        raise CallerError(f"mount {destination}: cannot read {source}: {error}") from error


def _file_copy(
    source: str, destination: str, status: os.stat_result, *, read_only: bool
) -> FileCopy:
    if status.st_size > FILE_LIMIT_BYTES:
        raise CallerError(
            f"mount {destination}: {source} has {status.st_size} bytes; "
            f"files up to {FILE_LIMIT_BYTES} bytes are copied into the guest"
        )
    with open(source, "rb") as file:
        content = file.read(FILE_LIMIT_BYTES + 1)
    if len(content) > FILE_LIMIT_BYTES:
        raise CallerError(f"mount {destination}: {source} grew beyond {FILE_LIMIT_BYTES} bytes")
    return FileCopy(
        destination=destination,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        content=content,
        read_only=read_only,
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
    top = _directory_copy(destination, os.stat(root))
    copies = [top]
    total_bytes = 0
    pending = [(root, destination)]
    while pending:
        directory, inside = pending.pop()
        for name in sorted(os.listdir(directory)):
            path = os.path.realpath(os.path.join(directory, name))
            if os.path.commonpath((root, path)) != root:
                raise CallerError(f"mount {destination}: {directory}/{name} leads out of {source}")
            status = os.stat(path)
            target = f"{inside.rstrip('/')}/{name}"
            if stat.S_ISDIR(status.st_mode):
                copies.append(_directory_copy(target, status))
                pending.append((path, target))
            elif stat.S_ISREG(status.st_mode):
                copies.append(_file_copy(path, target, status, read_only=False))
                total_bytes += len(copies[-1].content)
            else:
                raise CallerError(f"mount {destination}: {path} is neither file nor directory")
            if total_bytes > TREE_LIMIT_BYTES or len(copies) > TREE_LIMIT_ENTRIES:
                raise CallerError(
                    f"mount {destination}: directory {source} is larger than 1 MiB or "
                    f"{TREE_LIMIT_ENTRIES} entries; only small trees are copied into the guest"
                )
    # The agent makes the destination read-only after everything below it is there.
    copies.append(_directory_copy(destination, os.stat(root)))
    copies[-1].read_only = True
    return copies
