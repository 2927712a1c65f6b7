"""A VMM process that has made itself ready before anybody has a machine for it.

What it has then: namespaces of its own, but for mounts; a frame of the size it was made for; the
pages that a restore would have to copy from the zygote.
"""

from __future__ import annotations

import ctypes
import gc

from vmcell_runtime.frame import Frame
from vmcell_runtime.jail import leave_host
from vmcell_runtime.kvm.host_kind import open_kvm
from vmcell_runtime.page_map import open_page_map
from vmcell_runtime.rehearsal import rehearse
from vmcell_runtime.size import Size
from vmcell_runtime.vmm import prepare_process

_libc = ctypes.CDLL(None)
_libc.malloc_trim.argtypes = (ctypes.c_size_t,)


def make_ready(size: Size) -> Frame:
    """For `vmm.serve`. CallerError or HostError where no machine of that size could be."""
    prepare_process()
    leave_host()
    rehearse()
    gc.collect()
    _libc.malloc_trim(0)  # what only the rehearsal needed
    return Frame(size, open_kvm(), open_page_map())
