"""An OCI runtime spec (config.json) as one immutable description of a container.

The container gets pid, mount, uts, ipc and cgroup namespaces of its own, unless the request shares
some in its pod; its network is the guest's own. What the spec says about the host's kernel
(seccomp, AppArmor, SELinux, device cgroup, Intel RDT, block and network controllers) has no meaning
here and is ignored: the boundary is the virtual machine. What would change the meaning of the
container and cannot be done is refused by name. Unknown fields are ignored, as the OCI
specification asks (config.md, "Extensibility").
"""

from __future__ import annotations

import re
import stat

from vmcell_agent.jsonfields import parse_object
from vmcell_agent.mountoptions import PROPAGATION, Mount, parse_mount
from vmcell_agent.ociprocess import MAX_ID, ProcessSpec, parse_process
from vmcell_agent.record import Record
from vmcell_agent.resources import cgroup_files
from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_agent.jsonfields import Object

_OWN_NAMESPACES = ("pid", "mount", "uts", "ipc", "cgroup")
_REFUSED_LINUX = ("uidMappings", "gidMappings", "personality", "timeOffsets", "netDevices")
_GUEST_HOOKS = ("createContainer", "startContainer")
# Character devices whose numbers mean the same in every kernel (admin-guide/devices.txt); any
# other number would name another device of the guest than of the host.
_DEVICES = {
    (1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (1, 11), (5, 0), (5, 1), (5, 2), (10, 200), (10, 229),
}  # fmt: skip
_SYSCTLS = (
    r"kernel\.(msgmax|msgmnb|msgmni|sem|shmall|shmmax|shmmni|shm_rmid_forced|domainname)"
    r"|fs\.mqueue\.[a-z_]+|net(\.[A-Za-z0-9_/-]+)+"
)


class Device(Record):
    """A device node the spec asks for beside the default ones."""

    path: str
    mode: int
    major: int
    minor: int
    uid: int
    gid: int


class ContainerSpec(Record):
    """What a container is to be."""

    process: ProcessSpec
    hostname: str
    domainname: str
    root_read_only: bool
    root_propagation: int
    mounts: tuple[Mount, ...]
    devices: tuple[Device, ...]
    masked_paths: tuple[str, ...]
    read_only_paths: tuple[str, ...]
    sysctls: dict[str, str]  # file below /proc/sys → value
    cgroup_files: dict[str, str]  # file of the container's cgroup → value


def parse_spec(data: bytes, *, needs_args: bool = True) -> ContainerSpec:
    """The description in config.json; raises CallerError with the field's name."""
    spec = parse_object(data, "spec")
    linux = spec.object("linux")
    for key in _REFUSED_LINUX:
        if linux.has(key):
            raise CallerError(f"spec.linux.{key} is not supported")
    for key in _GUEST_HOOKS:
        if spec.object("hooks").has(key):
            raise CallerError(f"spec.hooks.{key} would have to run in the guest: not supported")
    _check_namespaces(linux)
    return ContainerSpec(
        process=parse_process(spec.object("process"), needs_args=needs_args),
        hostname=_hostname(spec, "hostname"),
        domainname=_hostname(spec, "domainname"),
        root_read_only=spec.object("root").flag("readonly"),
        root_propagation=_root_propagation(linux),
        mounts=tuple(
            parse_mount(
                row.text("destination"),
                row.text("type"),
                row.texts("options"),
                row.path,
                source=row.text("source"),
            )
            for row in spec.objects("mounts")
        ),
        devices=tuple(_device(row) for row in linux.objects("devices")),
        masked_paths=_absolute_paths(linux, "maskedPaths"),
        read_only_paths=_absolute_paths(linux, "readonlyPaths"),
        sysctls=sysctl_files(linux.text_map("sysctl")),
        cgroup_files=cgroup_files(linux.object("resources")),
    )


def _check_namespaces(linux: Object) -> None:
    for row in linux.objects("namespaces"):
        kind = row.text("type")
        if kind == "network":  # the guest's own, whichever of the host's was named
            continue
        if kind not in _OWN_NAMESPACES:
            raise CallerError(f"{row.path}: namespace {kind!r} is not supported")
        if row.text("path"):
            raise CallerError(
                f"{row.path}: {kind} namespace {row.text('path')!r} is the host's; "
                "a container in a microVM has its own"
            )


def _hostname(spec: Object, key: str) -> str:
    name = spec.text(key)
    if len(name.encode()) > 64:
        raise CallerError(f"spec.{key} has {len(name.encode())} bytes; Linux keeps 64")
    return name


def _root_propagation(linux: Object) -> int:
    name = linux.text("rootfsPropagation")
    if name and name not in PROPAGATION:
        raise CallerError(f"spec.linux.rootfsPropagation is {name!r}; no such propagation")
    return PROPAGATION[name] if name else 0


def _absolute_paths(linux: Object, key: str) -> tuple[str, ...]:
    paths = linux.texts(key)
    for path in paths:
        if not path.startswith("/"):
            raise CallerError(f"spec.linux.{key} holds {path!r}; it must be absolute")
    return tuple(paths)


def _device(row: Object) -> Device:
    path, kind = row.text("path"), row.text("type")
    major = row.number("major", 0, 0xFFF) or 0
    minor = row.number("minor", 0, 0xFFFFF) or 0
    if not path.startswith("/dev/") or ".." in path:
        raise CallerError(f"{row.path}.path is {path!r}; it must lie below /dev")
    if kind not in ("c", "u") or (major, minor) not in _DEVICES:
        raise CallerError(
            f"{row.path}: {path} ({kind} {major}:{minor}) is a device of the host; "
            "a microVM cannot have it"
        )
    mode = row.number("fileMode", 0, 0o177777)
    return Device(
        path,
        stat.S_IFCHR | (0o666 if mode is None else mode & 0o7777),
        major,
        minor,
        row.number("uid", 0, MAX_ID) or 0,
        row.number("gid", 0, MAX_ID) or 0,
    )


def sysctl_files(values: dict[str, str]) -> dict[str, str]:
    """File below /proc/sys → value; raises CallerError for one that no namespace has of its own.

    Dots separate, and a slash inside a name stands for a dot (sysctl.d(5)).
    """
    files: dict[str, str] = {}
    for name, value in values.items():
        if not re.fullmatch(_SYSCTLS, name, re.ASCII) or ".." in name:
            raise CallerError(f"sysctl {name!r} is not one a container has of its own")
        files[name.replace(".", "\0").replace("/", ".").replace("\0", "/")] = value
    return files
