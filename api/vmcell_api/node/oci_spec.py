"""The OCI runtime spec of a sandbox's container.

Source: OCI runtime-spec 1.0, config.md and config-linux.md; the sets of capabilities, masked and
read-only paths are those containerd gives a container by default. The guest has a kernel of its
own, so these guard the guest's own agent, not the host.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

ANNOTATION_PREFIX = "io.vmcell."
# The agent's own program that is a sandbox's init.
ENVD = "envd"

CAPABILITIES = [
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW"),
    *("CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE"),
    *("CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE"),
]
MASKED_PATHS = [
    *("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"),
]
READONLY_PATHS = [
    *("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"),
]
DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OPEN_FILES = 16384


@dataclass(frozen=True, kw_only=True)
class SandboxMachine:
    """What the spec of one sandbox says about its machine; `address` and `gateway` are IPv4.

    `file_mounts` pairs paths in the guest with files of the host that are copied there,
    `volume_mounts` with directories of the host that the guest shares live.
    """

    sandbox_id: str
    namespace: str
    vcpus: int
    memory_mib: int
    tap: str
    mac: str
    address: str
    gateway: str
    environment: tuple[str, ...] = ()
    working_directory: str = "/"
    file_mounts: tuple[tuple[str, str], ...] = ()
    init: str = ENVD
    volume_mounts: tuple[tuple[str, str], ...] = ()
    snapshot_id: str = ""
    hostname: str = ""  # "": the sandbox's id


def machine_annotations(machine: SandboxMachine) -> dict[str, str]:
    """The annotations the shim reads (docs/architecture.md, "Annotations")."""
    values = {
        "vcpus": str(machine.vcpus),
        "memory-mib": str(machine.memory_mib),
        "init": machine.init,
        "net.tap": machine.tap,
        "net.mac": machine.mac,
        "net.address": f"{machine.address}/31",
        "net.gateway": machine.gateway,
    }
    if machine.snapshot_id:
        values["snapshot"] = machine.snapshot_id
    return {ANNOTATION_PREFIX + name: value for name, value in values.items()}


def build_spec(machine: SandboxMachine) -> bytes:
    """The spec as JSON bytes; its process is envd, which the guest's agent starts by itself."""
    has_path = any(row.startswith("PATH=") for row in machine.environment)
    environment = list(machine.environment) if has_path else [DEFAULT_PATH, *machine.environment]
    capability_sets = ("bounding", "effective", "permitted")
    spec = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [ENVD],
            "env": environment,
            "cwd": machine.working_directory,
            "capabilities": {name: CAPABILITIES for name in capability_sets},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": OPEN_FILES, "soft": OPEN_FILES}],
            "noNewPrivileges": False,
        },
        "root": {"path": "rootfs", "readonly": False},
        "hostname": machine.hostname or machine.sandbox_id,
        "mounts": [*_kernel_mounts(), *_file_mounts(machine), *_volume_mounts(machine)],
        "annotations": machine_annotations(machine),
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "cgroupsPath": f"/{machine.namespace}/{machine.sandbox_id}",
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")],
            "maskedPaths": MASKED_PATHS,
            "readonlyPaths": READONLY_PATHS,
        },
    }
    return json.dumps(spec).encode()


def _kernel_mounts() -> list[dict[str, object]]:
    rows = (
        ("/proc", "proc", "proc", "nosuid noexec nodev"),
        ("/dev", "tmpfs", "tmpfs", "nosuid strictatime mode=755 size=65536k"),
        ("/dev/pts", "devpts", "devpts", "nosuid noexec newinstance ptmxmode=0666 mode=0620 gid=5"),
        ("/dev/shm", "tmpfs", "shm", "nosuid noexec nodev mode=1777 size=65536k"),
        ("/dev/mqueue", "mqueue", "mqueue", "nosuid noexec nodev"),
        ("/sys", "sysfs", "sysfs", "nosuid noexec nodev ro"),
        ("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid noexec nodev relatime ro"),
        ("/run", "tmpfs", "tmpfs", "nosuid strictatime mode=755 size=65536k"),
    )
    return [
        {"destination": target, "type": kind, "source": source, "options": options.split()}
        for target, kind, source, options in rows
    ]


def _file_mounts(machine: SandboxMachine) -> list[dict[str, object]]:
    return [
        {"destination": target, "type": "bind", "source": source, "options": ["rbind", "rw"]}
        for target, source in machine.file_mounts
    ]


def _volume_mounts(machine: SandboxMachine) -> list[dict[str, object]]:
    options = ["rbind", "rw", "nosuid", "nodev"]
    return [
        {"destination": target, "type": "bind", "source": source, "options": options}
        for target, source in machine.volume_mounts
    ]
