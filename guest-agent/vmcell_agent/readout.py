"""One file of a container, read in a child (see errand) inside the container's mount namespace.

Only regular files, and none of the kernel's own (proc, sysfs), whose reading may block or act.
"""

from __future__ import annotations

import os
import stat
from struct import Struct

from vmcell_agent import abi, copyin, syscalls
from vmcell_agent.attempt import attempt
from vmcell_protos.errors import CallerError

MAX_FILE_BYTES = copyin.MAX_FILE_BYTES
_MODE = Struct("<I")
_PATH_BYTES = 4096
HEADER_BYTES = _MODE.size
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def check(path: str, limit_bytes: int) -> None:
    """Raise CallerError for what cannot be asked."""
    if not path.startswith("/") or "\0" in path:
        raise CallerError(f"path {path[:160]!r} must be absolute")
    if len(path.encode()) >= _PATH_BYTES:
        raise CallerError(f"path has {len(path.encode())} bytes; Linux takes {_PATH_BYTES - 1}")
    if limit_bytes > MAX_FILE_BYTES:
        raise CallerError(f"limit_bytes is {limit_bytes}; at most {MAX_FILE_BYTES}")


def read(namespace: int, path: str, limit_bytes: int) -> bytes:
    """Mode and content, as `unpack` takes them; raises CallerError and HostError."""
    what = f"read {path} of the container"
    with attempt(what, code="failed_precondition"):
        syscalls.setns(namespace, abi.CLONE_NEWNS)
        try:
            real = os.path.realpath(path, strict=True)
            fd = os.open(real, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CallerError(f"{what}: no such file", code="not_found") from error
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise CallerError(f"{what}: it is no regular file", code="failed_precondition")
        copyin.refuse_kernel_files(path, fd)
        file = os.open(real, _FLAGS)
        if not os.path.samestat(os.fstat(file), found):
            raise CallerError(f"{what}: it was replaced meanwhile", code="aborted")
        content = b""
        while len(content) <= limit_bytes:
            part = os.read(file, limit_bytes + 1 - len(content))
            if not part:
                return _MODE.pack(stat.S_IMODE(found.st_mode)) + content
            content += part
    raise CallerError(f"{what}: more than {limit_bytes} bytes", code="resource_exhausted")


def unpack(result: bytes) -> tuple[int, bytes]:
    """(mode, content) of what `read` returned."""
    return _MODE.unpack_from(result)[0], result[_MODE.size :]
