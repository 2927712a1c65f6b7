"""`delete`: whatever is left of a sandbox goes, from files and pids alone.

containerd runs it after every task, also after clean ends, when a create failed, and at its start
for shims that do not answer; it gives it 5 s. So it is quick, may run twice, and does nothing where
nothing is left. Everything is found through the bundle's link to the state directory.
"""

from __future__ import annotations

import os
import time

from vmcell_protos.task import DeleteResponse
from vmcell_protos.wellknown import Timestamp
from vmcell_shim.bundle import remove_dead_socket
from vmcell_shim.sandbox_files import BUNDLE_LINK, kill_survivors, load

KILLED_STATUS = 137
_KILL_TIMEOUT_S = 0.5


def delete(bundle: str) -> bytes:
    """Kills VMM and shim where they live, removes the sandbox's files; the answer's bytes.

    Raises HostError when something stays behind.
    """
    pid = 0
    link = os.path.join(bundle, BUNDLE_LINK)
    if os.path.islink(link):
        files = load(os.readlink(link))
        pid = kill_survivors(files, _KILL_TIMEOUT_S)
        files.remove()
        os.unlink(link)
    remove_dead_socket(bundle)
    now = time.time_ns()
    exited_at = Timestamp(seconds=now // 10**9, nanos=now % 10**9)
    return DeleteResponse(pid=pid, exit_status=KILLED_STATUS, exited_at=exited_at).encode()
