"""What may be asked of a VMM: frozen records, their limits, and their JSON.

A descriptor is named by its index in the list that travels with the configuration; the VMM opens
nothing by path. Everything wrong is a CallerError that names the field and the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from vmcell_protos.errors import CallerError

T = TypeVar("T")

MAX_VCPUS = 8
MIN_MEMORY_MIB = 64
MAX_MEMORY_MIB = 262_144
MAX_COMMAND_LINE_BYTES = 1536  # Linux takes 2047; each window costs 36, so many leave less
MAX_PMEM = 8
MAX_BLK = 4
MAX_NET = 4
MAX_FS = 1
MAX_TAG_BYTES = 36  # virtio 1.2 § 5.11.4
MAX_SPARE_WINDOWS = 24
MAX_DESCRIPTORS = 64
MIN_GUEST_CID = 3  # 0 to 2 are reserved, virtio 1.2 § 5.10.4
MAX_GUEST_CID = 0xFFFF_FFFE
MAX_LISTEN_PORTS = 16
MIN_MTU, MAX_MTU = 576, 65535  # from what IPv4 needs to what the device can say


@dataclass(frozen=True, kw_only=True)
class PmemConfig:
    """A read-only image on virtio-pmem; a regular file, which the guest sees padded to 2 MiB."""

    descriptor: int

    def __post_init__(self) -> None:
        _check_descriptor("pmem.descriptor", self.descriptor)


@dataclass(frozen=True, kw_only=True)
class BlkConfig:
    """A disk on virtio-blk; the descriptor of a read-only one is open read-only."""

    descriptor: int
    read_only: bool = False

    def __post_init__(self) -> None:
        _check_descriptor("blk.descriptor", self.descriptor)
        _check_type("blk.read_only", self.read_only, bool)


@dataclass(frozen=True, kw_only=True)
class NetConfig:
    """A TAP (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, non-blocking, attached) as virtio-net.

    `mac` is six pairs of lower-case hex digits. With `in_kernel` the host's kernel moves the frames
    where /dev/vhost-net opens: `VmmHandle` opens it and fills in `vhost_descriptor`.
    """

    tap_descriptor: int
    mac: str
    mtu: int = 1500
    in_kernel: bool = True
    vhost_descriptor: int | None = None

    @property
    def mac_bytes(self) -> bytes:
        return bytes.fromhex(self.mac.replace(":", ""))

    def __post_init__(self) -> None:
        _check_descriptor("net.tap_descriptor", self.tap_descriptor)
        _check_range("net.mtu", self.mtu, MIN_MTU, MAX_MTU)
        _check_type("net.in_kernel", self.in_kernel, bool)
        if self.vhost_descriptor is not None:
            _check_descriptor("net.vhost_descriptor", self.vhost_descriptor)
        _check_mac(self.mac)


@dataclass(frozen=True, kw_only=True)
class FsConfig:
    """A directory of the host on virtio-fs, which the guest mounts by its `tag`.

    The descriptor is a unix stream socket connected to a vhost-user-fs daemon. RAM is then shared
    memory, and the daemon has all of it.
    """

    descriptor: int
    tag: str

    def __post_init__(self) -> None:
        _check_descriptor("fs.descriptor", self.descriptor)
        _check_type("fs.tag", self.tag, str)
        if not self.tag.isascii() or not self.tag.isprintable():
            raise CallerError(f"fs.tag is {self.tag!r}; give printable ASCII only")
        _check_range("fs.tag length", len(self.tag), 1, MAX_TAG_BYTES)


@dataclass(frozen=True, kw_only=True)
class VsockConfig:
    """The guest's context id, and the host ports the guest finds open from its first instruction.

    Each listed port takes one connection of the guest; `VmmHandle.accept_vsock` has its other end.
    """

    guest_cid: int
    listen_ports: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_range("vsock.guest_cid", self.guest_cid, MIN_GUEST_CID, MAX_GUEST_CID)
        object.__setattr__(self, "listen_ports", tuple(self.listen_ports))
        _check_range("vsock.listen_ports count", len(self.listen_ports), 0, MAX_LISTEN_PORTS)
        for port in self.listen_ports:
            _check_range("vsock.listen_ports", port, 1, 0xFFFF_FFFE)
        if len(set(self.listen_ports)) != len(self.listen_ports):
            raise CallerError(f"vsock.listen_ports is {self.listen_ports}; name each port once")


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """One microVM. `pmem[0]` is the guest's /dev/pmem0, `blk[0]` its /dev/vda, and so on.

    `command_line` is the caller's part; the VMM puts its own machine's arguments before it.
    `console_descriptor` takes the serial console's bytes as they come, at most 1 MiB.
    `spare_windows` is how many devices may be plugged in later, each at one of
    `spare_window_numbers`; with `balloon` the guest can be asked to give memory back.
    """

    vcpu_count: int
    memory_mib: int
    kernel_descriptor: int
    command_line: str = ""
    pmem: tuple[PmemConfig, ...] = ()
    blk: tuple[BlkConfig, ...] = ()
    net: tuple[NetConfig, ...] = ()
    fs: tuple[FsConfig, ...] = ()
    vsock: VsockConfig | None = None
    console_descriptor: int | None = None
    spare_windows: int = 0
    balloon: bool = False

    def __post_init__(self) -> None:
        _check_range("vcpu_count", self.vcpu_count, 1, MAX_VCPUS)
        _check_range("memory_mib", self.memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB)
        _check_descriptor("kernel_descriptor", self.kernel_descriptor)
        if self.console_descriptor is not None:
            _check_descriptor("console_descriptor", self.console_descriptor)
        _check_command_line(self.command_line)
        for field, limit in (
            ("pmem", MAX_PMEM),
            ("blk", MAX_BLK),
            ("net", MAX_NET),
            ("fs", MAX_FS),
        ):
            object.__setattr__(self, field, tuple(getattr(self, field)))
            _check_range(f"{field} count", len(getattr(self, field)), 0, limit)
        _check_range("spare_windows", self.spare_windows, 0, MAX_SPARE_WINDOWS)
        _check_type("balloon", self.balloon, bool)

    @property
    def fixed_windows(self) -> int:
        """How many virtio devices the guest has at boot: one more than named here, for entropy."""
        listed = len(self.pmem) + len(self.blk) + len(self.net) + len(self.fs)
        return listed + (self.vsock is not None) + 1 + self.balloon

    @property
    def spare_window_numbers(self) -> range:
        """The windows without a device at boot; to Linux window n is `virtio-mmio.n`."""
        return range(self.fixed_windows, self.fixed_windows + self.spare_windows)

    def descriptor_indexes(self) -> tuple[int, ...]:
        """Every index this configuration names, in no special order."""
        found = [self.kernel_descriptor, self.console_descriptor]
        found += [pmem.descriptor for pmem in self.pmem]
        found += [blk.descriptor for blk in self.blk]
        found += [fs.descriptor for fs in self.fs]
        for net in self.net:
            found += [net.tap_descriptor, net.vhost_descriptor]
        return tuple(index for index in found if index is not None)

    def check_descriptors(self, count: int) -> None:
        """CallerError unless every index names one of `count` descriptors, and only once."""
        indexes = self.descriptor_indexes()
        for index in indexes:
            if index >= count:
                raise CallerError(f"descriptor {index} is named, but only {count} came along")
        if len(set(indexes)) != len(indexes):
            raise CallerError(f"descriptors {indexes} are named more than once")


_DEVICE_LISTS = (("pmem", PmemConfig), ("blk", BlkConfig), ("net", NetConfig), ("fs", FsConfig))


def from_json(tree: object) -> MachineConfig:
    """What dataclasses.asdict made of one; CallerError for anything that is not exactly that."""
    fields = _fields("config", tree)
    for name, kind in _DEVICE_LISTS:
        rows = _list(name, fields.get(name, []))
        fields[name] = tuple(_make(name, kind, _fields(name, row)) for row in rows)
    vsock = fields.get("vsock")
    if vsock is not None:
        values = _fields("vsock", vsock)
        values["listen_ports"] = tuple(_list("listen_ports", values.get("listen_ports", [])))
        fields["vsock"] = _make("vsock", VsockConfig, values)
    return _make("config", MachineConfig, fields)


def _make(name: str, kind: type[T], fields: dict[str, object]) -> T:
    try:
        return kind(**fields)
    except TypeError as error:
        raise CallerError(f"{name} does not have the right fields: {error}") from error


def _fields(name: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise CallerError(f"{name} is {value!r}; give an object")
    return dict(value)


def _list(name: str, value: object) -> list[object]:
    if not isinstance(value, list | tuple):
        raise CallerError(f"{name} is {value!r}; give a list")
    return list(value)


def _check_type(name: str, value: object, kind: type) -> None:
    # bool is an int to isinstance; True is no count of vCPUs.
    if type(value) is not kind:
        raise CallerError(f"{name} is {value!r}; give a value of type {kind.__name__}")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    _check_type(name, value, int)
    if not low <= value <= high:
        raise CallerError(f"{name} is {value}; give {low} to {high}")


def _check_descriptor(name: str, value: int) -> None:
    _check_range(name, value, 0, MAX_DESCRIPTORS - 1)


def _check_command_line(value: str) -> None:
    _check_type("command_line", value, str)
    if not value.isascii() or not (value.isprintable() or not value):
        raise CallerError(f"command_line is {value!r}; give printable ASCII only")
    _check_range("command_line length", len(value), 0, MAX_COMMAND_LINE_BYTES)


def _check_mac(value: str) -> None:
    _check_type("net.mac", value, str)
    octets = value.split(":")
    digits = set("0123456789abcdef")
    if len(octets) != 6 or any(len(octet) != 2 or set(octet) - digits for octet in octets):
        raise CallerError(f"net.mac is {value!r}; give six pairs of lower-case hex digits")
    if int(octets[0], 16) & 1:
        raise CallerError(f"net.mac is {value!r}; the first octet of a station's address is even")
