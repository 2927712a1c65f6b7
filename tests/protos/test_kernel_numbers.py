"""The kernel's numbers in shim, agent and API against its headers (MS4).

Whatever these modules name like the kernel does is compared; what is theirs stands in OWN.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import ModuleType

import pytest
from c_probe import MISSING, declared_in, layout, values

from vmcell_agent import abi
from vmcell_agent import syscalls as agent_syscalls
from vmcell_agent.envd import inotify
from vmcell_api import child_processes
from vmcell_api.volumes import syscalls as volume_syscalls
from vmcell_shim import mount_calls, netns, refresh, sparse
from vmcell_tools import doctor

# sys/mount.h and linux/mount.h cannot be had together.
MOUNTS = ["linux/mount.h", "fcntl.h", "linux/openat2.h"]
REST = [
    "fcntl.h",
    "sched.h",
    "sys/inotify.h",
    "sys/ioctl.h",
    "sys/mount.h",
    "sys/prctl.h",
    "sys/reboot.h",
    "sys/statfs.h",
    "sys/syscall.h",
    "linux/capability.h",
    "linux/fs.h",
    "linux/magic.h",
    "linux/nsfs.h",
    "linux/random.h",
    "linux/virtio_ids.h",
    "linux/vm_sockets.h",
]
FROM_LINUX_MOUNT = ("MS_", "MOUNT_ATTR", "OPEN_TREE", "MOVE_MOUNT", "RESOLVE_")
# Headers of Linux 6.1 have no such macro yet.
NEWER = ["MOVE_MOUNT_BENEATH"]
# Ours → the kernel's, where the name is another; of a leading underscore it is without.
OTHER_NAMES = {
    "LINUX_CAPABILITY_VERSION_3": "_LINUX_CAPABILITY_VERSION_3",
    "_CAPABILITY_VERSION_3": "_LINUX_CAPABILITY_VERSION_3",
    "_NO_XDEV": "RESOLVE_NO_XDEV",
    "_NO_MAGICLINKS": "RESOLVE_NO_MAGICLINKS",
    "_NO_SYMLINKS": "RESOLVE_NO_SYMLINKS",
    "_BENEATH": "RESOLVE_BENEATH",
    "_STATFS_BYTES": "sizeof(struct statfs)",
}
CAPABILITY_DATA = "effective permitted inheritable"
STRUCTS = {
    "MOUNT_ATTR": (MOUNTS, "struct mount_attr", "attr_set attr_clr propagation userns_fd"),
    "_MOUNT_ATTR": (MOUNTS, "struct mount_attr", "attr_set attr_clr propagation userns_fd"),
    "_OPEN_HOW": (MOUNTS, "struct open_how", "flags mode resolve"),
    "CAP_HEADER": (REST, "struct __user_cap_header_struct", "version pid"),
    "_CAP_HEADER": (REST, "struct __user_cap_header_struct", "version pid"),
    "RAND_POOL_INFO": (REST, "struct rand_pool_info", "entropy_count buf_size"),
    "_HEADER": (REST, "struct inotify_event", "wd mask cookie len"),
}
TWICE = ("CAP_DATA", "_CAP_DATA")  # a pair of struct __user_cap_data_struct
OWN: dict[ModuleType, set[str]] = {
    abi: set(),
    agent_syscalls: set(),
    inotify: {"WATCHED", "_READ_BYTES"},
    mount_calls: set(),
    netns: {"_LOOPBACK_INDEX"},
    sparse: {"PIECE_BYTES", "_COPY_BYTES", "_RECORD"},
    refresh: {"_CHANGES", "_EVENTS_BYTES"},
    volume_syscalls: {"_RESOLVE", "_TRIES", "LAST_CAPABILITY"},
    child_processes: {"OPEN_FILES"},
    doctor: {"COMMAND_DEADLINE_S", "FREE_GIB_FAIL", "FREE_GIB_WARN"},
}


def kernels_name(ours: str) -> str:
    name = OTHER_NAMES.get(ours, ours.lstrip("_"))
    return name[:4] + name[4:].lower() if name.startswith("SYS_") else name


@pytest.mark.parametrize("module", OWN, ids=lambda module: module.__name__)
def test_every_number_is_the_headers(module: ModuleType, tmp_path: Path) -> None:
    wanted: dict[tuple[str, ...], dict[str, int]] = {tuple(MOUNTS): {}, tuple(REST): {}}
    for ours in sorted(declared_in(module) - OWN[module]):
        value = getattr(module, ours)
        if not isinstance(value, struct.Struct):
            name = kernels_name(ours)
            headers = MOUNTS if name.startswith(FROM_LINUX_MOUNT) else REST
            wanted[tuple(headers)][name] = value
        elif ours in TWICE:
            kind = "struct __user_cap_data_struct"
            wanted[tuple(REST)] |= layout("=III", kind, CAPABILITY_DATA.split())
            wanted[tuple(REST)][f"2 * sizeof({kind})"] = value.size
        else:
            headers, kind, fields = STRUCTS[ours]
            wanted[tuple(headers)] |= layout(value, kind, fields.split())
            wanted[tuple(headers)][f"sizeof({kind})"] = value.size
    assert any(wanted.values())
    for headers, expected in wanted.items():
        found = values(headers, list(expected), tmp_path, newer=NEWER)
        unknown = {name for name, value in found.items() if value == MISSING}
        assert unknown <= set(NEWER)
        assert found == expected | dict.fromkeys(unknown, MISSING)
