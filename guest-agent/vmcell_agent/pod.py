"""What the containers of a guest have in common, beyond the network that they always share.

The guest's own uts and ipc namespaces are the pod's; a pid namespace and a tmpfs for /dev/shm are
made when the first container asks for them. The pid namespace ends with the last container that
joined it, the tmpfs with the machine. So do the mount of the host's live directories and the file
that every container sees as its boot id: the kernel's, until a restored guest gets another one.
"""

from __future__ import annotations

import os
from contextlib import suppress

from vmcell_agent import abi, containerfs, liveshare, machine, syscalls
from vmcell_agent.attempt import attempt
from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_agent.holder import PidHolder
    from vmcell_agent.reaper import Reaper
    from vmcell_agent.spawn import Spawner

_SHAREABLE = {"ipc": abi.CLONE_NEWIPC, "uts": abi.CLONE_NEWUTS, "pid": abi.CLONE_NEWPID}
# No container's id starts with a dot.
_SHM_DIRECTORY, _SHARE_DIRECTORY, BOOT_ID_FILE = ".shm", ".share", ".boot_id"
_SHM_FLAGS = abi.MS_NOSUID | abi.MS_NODEV


def shared_flags(names: list[str]) -> int:
    """CLONE_NEW* of the namespaces a container shares; raises CallerError for another name."""
    flags = 0
    for name in names:
        if name not in _SHAREABLE:
            raise CallerError(
                f"shared_namespaces has {name[:64]!r}; it can have {', '.join(_SHAREABLE)}"
            )
        flags |= _SHAREABLE[name]
    return flags


class Pod:
    """One for the agent; `close` ends and unmounts, and is idempotent."""

    def __init__(self, spawner: Spawner, reaper: Reaper, state_directory: str) -> None:
        self._spawner = spawner
        self._reaper = reaper
        self._state_directory = state_directory
        self._shm = self._share = self._boot_id = ""
        self._named = False
        self._holder: PidHolder | None = None
        self._pid_users: set[str] = set()

    def rename(self, hostname: str) -> None:
        """The host names the guest; what a container's spec says counts no more."""
        machine.set_hostname(hostname)
        self._named = True

    def name_once(self, hostname: str, domainname: str) -> None:
        """A container that shares the uts namespace names the guest, if nobody has before."""
        if self._named or not (hostname or domainname):
            return
        if hostname:
            machine.set_hostname(hostname)
        if domainname:
            with attempt(f"set domainname {domainname!r}"):
                syscalls.setdomainname(domainname)
        self._named = True

    def shared_memory(self, options: str) -> str:
        """Directory of the tmpfs that is every container's /dev/shm; the first call's mount options
        are the ones it has. Raises HostError."""
        if not self._shm:
            path = f"{self._state_directory}/{_SHM_DIRECTORY}"
            with attempt(f"mount the pod's shared memory ({options or 'no options'})"):
                os.makedirs(path, 0o755, exist_ok=True)
                data = ",".join(filter(None, ("mode=1777", options)))
                syscalls.mount("shm", path, "tmpfs", _SHM_FLAGS, data)
            self._shm = path
        return self._shm

    def live_share(self) -> str:
        """Directory where the host's live directories are mounted, until the machine's end: to
        unmount them would be to wait for the host. Raises HostError."""
        if not self._share:
            path = f"{self._state_directory}/{_SHARE_DIRECTORY}"
            with attempt("mount the host's live directories"):
                os.makedirs(path, 0o700, exist_ok=True)
                liveshare.mount(path)
            self._share = path
        return self._share

    def boot_id(self) -> str:
        """Path of the file whose content is the boot id of every container. Raises HostError."""
        if not self._boot_id:
            with attempt(f"read {containerfs.BOOT_ID}"):
                fd = os.open(containerfs.BOOT_ID, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    self._write_boot_id(os.read(fd, 64))
                finally:
                    os.close(fd)
        return self._boot_id

    def renew_boot_id(self) -> None:
        """Another one, in every container at once; raises HostError."""
        raw = bytearray(os.urandom(16))
        raw[6], raw[8] = raw[6] & 0x0F | 0x40, raw[8] & 0x3F | 0x80  # RFC 9562: random
        parts = (raw[0:4], raw[4:6], raw[6:8], raw[8:10], raw[10:16])
        self._write_boot_id(("-".join(part.hex() for part in parts) + "\n").encode())

    def _write_boot_id(self, text: bytes) -> None:
        """In place, because containers have a mount of it; of one length, so in one write."""
        path = f"{self._state_directory}/{BOOT_ID_FILE}"
        with attempt(f"write {path}"):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o444)
            try:
                os.write(fd, text)
            finally:
                os.close(fd)
        self._boot_id = path

    def join_pid_namespace(self, container_id: str) -> None:
        """From here on the pod's pid namespace lives for this container too."""
        if self._holder is not None and not self._holder.alive:
            self._holder.close()
            self._holder = None
        if self._holder is None:
            from vmcell_agent.holder import PidHolder  # boot does not need it

            self._holder = PidHolder(self._spawner, self._reaper, self._state_directory)
        self._pid_users.add(container_id)

    def pid_namespace(self) -> int:
        """The holder's pidfd, for setns(2); raises HostError."""
        if self._holder is None:
            raise CallerError("the pod's pid namespace has ended", code="failed_precondition")
        self._holder.wait_until_ready()
        return self._holder.pidfd

    def leave_pid_namespace(self, container_id: str) -> None:
        """The last one to leave ends it. Idempotent."""
        self._pid_users.discard(container_id)
        if not self._pid_users and self._holder is not None:
            self._holder.close()
            self._holder = None

    def close(self) -> None:
        if self._holder is not None:
            self._holder.close()
            self._holder = None
        if self._shm:
            with suppress(OSError):  # the machine ends, and its memory with it
                syscalls.umount(self._shm, abi.MNT_DETACH)
                os.rmdir(self._shm)
            self._shm = ""
