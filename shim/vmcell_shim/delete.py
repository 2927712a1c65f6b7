"""`delete`: whatever is left of a sandbox goes, from files and pids alone.

containerd runs it after every task, also after clean ends, when a create failed, and at its start
for shims that do not answer; it gives it 5 s. So it is quick, may run twice, and does nothing where
nothing is left. Everything is found through the bundle's link to the state directory.
"""

from __future__ import annotations

import os
import time

from vmcell_protos.errors import HostError
from vmcell_protos.task import DeleteResponse
from vmcell_protos.wellknown import Timestamp
from vmcell_shim.bundle import remove_dead_socket
from vmcell_shim.living import start_ticks
from vmcell_shim.sandbox_files import BUNDLE_LINK, kill_survivors, load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmcell_shim.sandbox_files import SandboxFiles

KILLED_STATUS = 137
_KILL_TIMEOUT_S = 0.5
_CGROUP_S = 0.2


def delete(bundle: str) -> bytes:
    """Kills VMM and shim where they live, removes the sandbox's files; the answer's bytes.

    A member of a pod whose shim lives takes nothing but its own along. Raises HostError when
    something stays behind.
    """
    pid = 0
    link = os.path.join(bundle, BUNDLE_LINK)
    if os.path.islink(link):
        files = load(os.readlink(link))
        alone = not files.sandbox
        pid = kill_survivors(files, _KILL_TIMEOUT_S) if alone else _leave_pod(files)
        _raise_all([*_undo_host(files), *_remove_members(files)], files.remove)
        os.unlink(link)
    remove_dead_socket(bundle)
    now = time.time_ns()
    exited_at = Timestamp(seconds=now // 10**9, nanos=now % 10**9)
    return DeleteResponse(pid=pid, exit_status=KILLED_STATUS, exited_at=exited_at).encode()


def _remove_members(files: SandboxFiles) -> list[str]:
    """A pod's members, which containerd 2.x runs no `delete` for; a sentence for what stays."""
    failures = []
    for directory in files.members():
        try:
            load(directory).remove()
        except HostError as error:
            failures.append(str(error))
    return failures


def _leave_pod(member: SandboxFiles) -> int:
    """The VMM's pid of the member's pod; a pod without a shim goes with its first member."""
    pod = load(member.sandbox)
    if pod.shim is not None and start_ticks(pod.shim.pid) == pod.shim.start_ticks:
        return pod.vmm.pid if pod.vmm else 0
    pid = kill_survivors(pod, _KILL_TIMEOUT_S)
    _raise_all(_undo_host(pod), pod.remove)
    return pid


def _undo_host(files: SandboxFiles) -> list[str]:
    """Network and cgroup of a sandbox whose processes have ended; a sentence for what stays."""
    failures = _undo_network(files)
    if files.cgroup:
        from vmcell_shim.cgroup import remove_cgroup

        try:
            remove_cgroup(files.cgroup, timeout_s=_CGROUP_S)
        except HostError as error:
            failures.append(str(error))
    return failures


def _undo_network(files: SandboxFiles) -> list[str]:
    if not (files.network or files.poststop or os.path.exists(files.namespace)):
        return []
    # Most sandboxes have none, and every delete waits for what is imported here.
    from vmcell_shim.sandbox_network import undo

    return undo(files)


def _raise_all(failures: list[str], last_step: Callable[[], None]) -> None:
    """Runs the last step whatever failed before; HostError for all of it."""
    try:
        last_step()
    except HostError as error:
        failures.append(str(error))
    if failures:
        raise HostError("; ".join(failures))
