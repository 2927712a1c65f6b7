"""What a VMM gives up before its guest runs.

So far the network: whoever reports the VMM's pid as a container's invites others to set up a
network in that process's namespace (`ctr run --cni` does), which must not be the host's. Its TAPs
and vhost devices came as descriptors and stay what they are. Source: unshare(2),
network_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os

from vmcell_protos.errors import HostError

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def leave_network() -> None:
    """From here on the process has a network namespace of its own, with nothing in it.

    Needs root; a VMM without it was started by a test and keeps the one it has. Raises HostError.
    """
    if os.geteuid() == 0 and _libc.unshare(_CLONE_NEWNET):
        reason = os.strerror(ctypes.get_errno())
        raise HostError(f"the VMM cannot leave the host's network: {reason}")
