"""Live directories of the host: one virtio-fs share, of which each container takes its parts.

The share is mounted once and stays, because a virtiofsd that was told of an unmount serves the next
mount wrongly (QEMU's gives the root's node number away). A container's child takes its directories
before it enters its root and attaches them after. It alone looks into the share: a host that does
not answer stops that child and never PID 1, and what the kernel mounts by itself below the share
(FUSE's submounts, one for each disk of the host) ends with the container that looked.
"""

from __future__ import annotations

from vmcell_agent import abi, syscalls
from vmcell_protos.errors import CallerError

FSTYPE = "virtiofs"
TAG = "vmcell"
_MAX_DIGITS = 9


def check_source(source: str, path: str) -> None:
    """CallerError unless `source` is a plain number, as the host gives them to live directories;
    `path` names the mount in the error."""
    digits = source.isascii() and source.isdigit() and len(source) <= _MAX_DIGITS
    if not digits or source != str(int(source)):
        raise CallerError(f"{path}.source is {source[:64]!r}; {FSTYPE} takes a number of the share")


def mount(directory: str) -> None:
    """Mount the share; asks the host nothing, so PID 1 may. Raises OSError."""
    syscalls.mount(TAG, directory, FSTYPE, abi.MS_NOSUID | abi.MS_NODEV)


def clone(directory: str, sources: list[str]) -> list[int]:
    """A copy of each directory or file of the share, attached nowhere, as descriptors that the
    caller closes. In a mount namespace of the container's own only; raises OSError."""
    syscalls.mount("", "/", "", abi.MS_REC | abi.MS_SLAVE)
    return [syscalls.clone_tree(f"{directory}/{source}") for source in sources]
