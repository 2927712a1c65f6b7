"""Live directories of the host: taken from the virtio-fs share before the container's root is
entered, attached inside it later.

The share is mounted in the container's own mount namespace and goes with it. So a host that does
not answer stops the child that asks, never PID 1, and what the kernel mounts by itself below the
share (the host's mounts, FUSE's submounts) ends with the container that looked.
"""

from __future__ import annotations

import os
import re

from vmcell_agent import abi, syscalls
from vmcell_protos.errors import CallerError

FSTYPE = "virtiofs"
TAG = "vmcell"
DIRECTORY = "/run/vmcell/share"
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)


def check_source(source: str, path: str) -> None:
    """CallerError unless `source` is a plain number, as the host gives them to live directories;
    `path` names the mount in the error."""
    if not _NUMBER.fullmatch(source):
        raise CallerError(f"{path}.source is {source[:64]!r}; {FSTYPE} takes a number of the share")


def clone(sources: list[str]) -> list[int]:
    """A copy of each directory or file of the share, attached nowhere, as descriptors that the
    caller closes. In a mount namespace of the container's own only; raises OSError."""
    syscalls.mount("", "/", "", abi.MS_REC | abi.MS_SLAVE)
    os.makedirs(DIRECTORY, mode=0o700, exist_ok=True)
    syscalls.mount(TAG, DIRECTORY, FSTYPE, abi.MS_NOSUID | abi.MS_NODEV)
    return [syscalls.clone_tree(f"{DIRECTORY}/{source}") for source in sources]
