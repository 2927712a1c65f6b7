"""`vmcell doctor`: what this host has of what vmcell needs, and what to do about the rest.

Each check is a function from a `Host` to one `Row`; none changes anything beyond a file of its own
that it removes. Paths are looked up below `Host.root`, so that a test can offer another tree.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vmcell_api import config as api_config
from vmcell_protos.errors import HostError
from vmcell_protos.zygote import (
    HELLO,
    MAX_DATAGRAM_BYTES,
    SOCKET_PATH,
    MalformedMessage,
    Request,
    decode_answer,
    encode_request,
)
from vmcell_runtime.kvm.host_kind import host_kind
from vmcell_runtime.vmm_uid import UidRange
from vmcell_shim import virtiofsd
from vmcell_shim.cache_collector import list_images
from vmcell_shim.cgroup import find_hierarchies
from vmcell_shim.config import DEFAULT_PATH, ShimConfig, parse_config
from vmcell_tools.containerd_config import HANDLER, parse_version, runtimes_of
from vmcell_tools.containerd_setup import CONFIG, SYSTEM_PATH, read_config
from vmcell_tools.setup_host import (
    CHECKOUT,
    SHIM_DIRECTORY,
    SHIM_NAME,
    SHIM_SOURCE_ROOTS,
    shim_executable,
)

Status = Literal["ok", "warn", "fail"]
# _IOW(0x94, 9, int), linux/fs.h
FICLONE = 0x40049409
CONTAINERD_SOCKET = "run/containerd/containerd.sock"
OLDEST_CONTAINERD = (1, 6)
OLDEST_LINUX = (5, 12)  # mount_setattr(2), for shares
CGROUP_CONTROLLERS = ("cpu", "memory", "pids")
JAIL_NAMESPACES = ("ipc", "mnt", "net", "uts")
FREE_GIB_FAIL, FREE_GIB_WARN = 1, 10
COMMAND_DEADLINE_S = 20
ZYGOTE_ADVICE = (
    "systemctl enable --now vmcell-zygote, or vmcell serve; without it start, delete and the"
    " monitor's start take 20 to 50 ms longer, and each shim and each monitor 4 to 6 MiB more"
)
KVM_ADVICE = {
    "missing": "load kvm-amd or kvm-intel and enable virtualisation in the firmware or the cloud's"
    " machine type; for development use: vmcell dev up",
    "forbidden": "run as root, or join the group that owns /dev/kvm",
    "pvm": "nothing on this machine changes that; use the dev VM: vmcell dev up",
    "no-hardware": "enable virtualisation in the firmware or nested virtualisation in the cloud;"
    " for development use: vmcell dev up",
}


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where to look: the root of the tree, and the PATH of programs in the real one. `machine` and
    `release` are uname's."""

    root: Path = Path("/")
    path: str = SYSTEM_PATH
    machine: str = field(default_factory=lambda: os.uname().machine)
    release: str = field(default_factory=lambda: os.uname().release)

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def program(self, name: str) -> str | None:
        return shutil.which(name, path=self.path)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `advice` is empty when the status is ok."""

    what: str
    found: str
    status: Status
    advice: str = ""


def linux(host: Host) -> Row:
    what, found = "Linux", f"{host.release} on {host.machine}"
    if host.machine != "x86_64":
        advice = "use a machine with x86-64 processors; there is no monitor for others"
        return Row(what=what, found=found, status="fail", advice=advice)
    numbers = re.match(r"(\d+)\.(\d+)", host.release)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST_LINUX:
        oldest = ".".join(map(str, OLDEST_LINUX))
        advice = f"run Linux {oldest} or later; without it no pod and no live directory works"
        return Row(what=what, found=found, status="warn", advice=advice)
    return Row(what=what, found=found, status="ok")


def kvm(host: Host) -> Row:
    kind = host_kind(str(host.root))
    if kind.runs_linux:
        return Row(what="KVM", found=kind.reason, status="ok")
    return Row(what="KVM", found=kind.reason, status="fail", advice=KVM_ADVICE[kind.kind])


def containerd(host: Host) -> Row:
    output = _output(host, "containerd", "--version")
    if output is None:
        return Row(
            what="containerd",
            found="not installed",
            status="fail",
            advice="apt-get install containerd runc",
        )
    version = parse_version(output)
    if version is None:
        return Row(
            what="containerd", found=output[:60], status="warn", advice="expected 1.6 or later"
        )
    found = ".".join(map(str, version))
    if version < OLDEST_CONTAINERD:
        return Row(what="containerd", found=found, status="fail", advice="install 1.6 or later")
    return Row(what="containerd", found=found, status="ok")


def kubernetes(host: Host) -> Row:
    """The runtime's table in containerd's configuration; ctr and nerdctl do without."""
    what = "CRI runtime"
    try:
        config = read_config(host.root)
        present = config is not None and HANDLER in runtimes_of(config)
    except HostError as error:
        return Row(what=what, found=str(error), status="warn", advice=f"repair {CONFIG}")
    if not present:
        advice = "vmcell setup --containerd; only Kubernetes and crictl need it"
        return Row(what=what, found=f"{CONFIG} names no {HANDLER}", status="warn", advice=advice)
    return Row(what=what, found=f"{HANDLER} in {CONFIG}", status="ok")


def containerd_socket(host: Host) -> Row:
    path = host.at(CONTAINERD_SOCKET)
    what = "containerd socket"
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(str(path))
        except OSError as error:
            return Row(
                what=what,
                found=f"{path}: {error.strerror or error}",
                status="fail",
                advice="start containerd (systemctl start containerd), or use: vmcell dev up",
            )
    return Row(what=what, found=str(path), status="ok")


def shim(host: Host) -> Row:
    path = host.at(f"{SHIM_DIRECTORY}/{SHIM_NAME}")
    advice = "vmcell setup"
    try:
        text = path.read_text()
    except OSError:
        return Row(what="shim", found=f"no {path}", status="fail", advice=advice)
    if text != shim_executable():
        found = f"{path} is of another checkout or version"
        return Row(what="shim", found=found, status="warn", advice=advice)
    return Row(what="shim", found=str(path), status="ok")


def zygote(host: Host) -> Row:
    """Absent or of no use it costs time and memory, and nothing else."""
    path = host.at(SOCKET_PATH)
    what, advice = "zygote", ZYGOTE_ADVICE
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(5)
        try:
            sock.connect(str(path))
            sock.send(encode_request(Request(HELLO, b"")))
            answer = decode_answer(sock.recv(MAX_DATAGRAM_BYTES))
        except (FileNotFoundError, ConnectionRefusedError):
            return Row(what=what, found="not running", status="warn", advice=advice)
        except (OSError, MalformedMessage) as error:
            found = f"{path} does not answer: {error}"
            return Row(what=what, found=found, status="warn", advice=f"restart it; {advice}")
    roots = [str(CHECKOUT / folder) for folder in SHIM_SOURCE_ROOTS]
    if not set(roots) <= set(answer.output.decode(errors="replace").splitlines()):
        found = f"process {answer.number} is of another checkout"
        return Row(what=what, found=found, status="warn", advice=f"restart it; {advice}")
    return Row(what=what, found=f"process {answer.number}", status="ok")


def configuration(host: Host) -> Row:
    try:
        _config(host)
    except HostError as error:
        return Row(what="config.toml", found=str(error), status="fail", advice="vmcell setup")
    return Row(what="config.toml", found=str(host.at(DEFAULT_PATH)), status="ok")


def kernel(host: Host) -> Row:
    return _artifact(host, "kernel", "vmcell kernel build && vmcell setup")


def base_image(host: Host) -> Row:
    return _artifact(host, "base_image", "vmcell image base && vmcell setup")


def cgroup(host: Host) -> Row:
    """v2, v1 or both; what bounds a pod on this host."""
    try:
        rows = find_hierarchies(str(host.at("proc/self/mountinfo")))
    except HostError as error:
        return Row(
            what="cgroups",
            found=str(error),
            status="fail",
            advice="mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        )
    found = {name for row in rows for name in row.controllers}
    missing = [name for name in CGROUP_CONTROLLERS if name not in found]
    if missing:
        return Row(
            what="cgroups",
            found=f"without {', '.join(missing)}",
            status="fail",
            advice="enable the controllers: remove cgroup_disable from the kernel command line",
        )
    versions = " and ".join(f"v{version}" for version in sorted({row.version for row in rows}))
    return Row(what="cgroups", found=f"{versions}: {', '.join(CGROUP_CONTROLLERS)}", status="ok")


def jail(host: Host) -> Row:
    """What a VMM's jail is made of: the filter, namespaces, and uids that are nobody else's."""
    what = "jail"
    try:
        uids = _config(host).vmm_uids
    except HostError:
        uids = UidRange()
    mine = f"uids {uids.first} to {uids.first + uids.size - 1}"
    actions = _text(host, "proc/sys/kernel/seccomp/actions_avail").split()
    if not {"trap", "errno", "kill_process"} <= set(actions):
        advice = "run a kernel with CONFIG_SECCOMP_FILTER; without it no VMM starts"
        return Row(what=what, found="no system call filters", status="fail", advice=advice)
    missing = [name for name in JAIL_NAMESPACES if not host.at(f"proc/self/ns/{name}").exists()]
    if missing:
        advice = "run a kernel that has them; without them no VMM starts"
        found = f"no {', '.join(missing)} namespaces"
        return Row(what=what, found=found, status="fail", advice=advice)
    if not _maps_all(_text(host, "proc/self/uid_map"), uids):
        return Row(
            what=what,
            found=f"{mine} do not all exist in this user namespace",
            status="fail",
            advice="give vmm_uid_first and vmm_uid_count of config.toml some that do",
        )
    for name, first in (("passwd", 2), ("group", 2), ("subuid", 1), ("subgid", 1)):
        other = _first_in(_text(host, f"etc/{name}"), first, uids)
        if other:
            return Row(
                what=what,
                found=f"{mine} meet {other} of /etc/{name}",
                status="fail",
                advice="give vmm_uid_first of config.toml a range that is nobody else's",
            )
    return Row(what=what, found=f"{mine}, system call filters", status="ok")


def _maps_all(uid_map: str, uids: UidRange) -> bool:
    rows = [list(map(int, line.split())) for line in uid_map.splitlines()]
    end = uids.first + uids.size
    return any(inside <= uids.first and end <= inside + count for inside, _, count in rows)


def _first_in(text: str, field: int, uids: UidRange) -> str:
    """The first name of a colon-separated file whose ids from `field` on are among `uids`."""
    for line in text.splitlines():
        words = line.split(":")
        if len(words) > field and words[field].isdigit():
            first = int(words[field])
            # Of subuid and subgid the next field is how many; the others have one each.
            count = int(words[2]) if field == 1 and words[2:] and words[2].isdigit() else 1
            if first < uids.first + uids.size and uids.first < first + count:
                return words[0]
    return ""


def nftables(host: Host) -> Row:
    if _output(host, "nft", "--version") is None:
        advice = "apt-get install nftables"
        return Row(what="nftables", found="nft is missing", status="fail", advice=advice)
    if _output(host, "nft", "list", "tables") is None:
        advice = "run as root; modprobe nf_tables"
        return Row(what="nftables", found="nft list fails", status="fail", advice=advice)
    return Row(what="nftables", found="works", status="ok")


def tun(host: Host) -> Row:
    return _device(host, "TAP", "dev/net/tun", "fail", "modprobe tun; guests get no network")


def vhost_net(host: Host) -> Row:
    advice = "modprobe vhost_net; without it guests' packets go through the monitor"
    return _device(host, "vhost-net", "dev/vhost-net", "warn", advice)


def image_tools(host: Host) -> Row:
    needed = {"mkfs.erofs": "erofs-utils", "mkfs.ext4": "e2fsprogs"}
    missing = {name: package for name, package in needed.items() if not host.program(name)}
    if missing:
        return Row(
            what="image tools",
            found=f"no {', '.join(missing)}",
            status="fail",
            advice=f"apt-get install {' '.join(missing.values())}",
        )
    return Row(what="image tools", found=", ".join(needed), status="ok")


def live_directories(host: Host) -> Row:
    for path in virtiofsd.PROGRAMS:
        if host.at(path).exists():
            return Row(what="virtiofsd", found=path, status="ok")
    return Row(
        what="virtiofsd",
        found="not installed",
        status="warn",
        advice="apt-get install virtiofsd (Debian 12: qemu-system-common); without it no pod starts"
        " and no bind mount of a writable or large directory works",
    )


def nginx(host: Host) -> Row:
    if host.program("nginx") is None:
        advice = "apt-get install nginx-light; only the E2B server needs it"
        return Row(what="nginx", found="not installed", status="warn", advice=advice)
    return Row(what="nginx", found="installed", status="ok")


def certificate(host: Host) -> Row:
    """nginx's, when api.toml names one: there, for the wildcard, and good for another month."""
    what = "certificate"
    try:
        path = host.at(api_config.DEFAULT_PATH)
        config = api_config.parse_config(path.read_text() if path.exists() else "", str(path))
    except (HostError, OSError) as error:
        return Row(what=what, found=str(error), status="warn", advice="repair api.toml")
    if not config.tls_certificate:
        return Row(what=what, found="none configured, no TLS", status="ok")
    file = host.at(config.tls_certificate)
    wildcard = f"*.{config.domain.partition(':')[0]}"
    words = ("x509", "-in", str(file), "-noout", "-ext", "subjectAltName", "-enddate")
    shown = _output(host, "openssl", *words)
    renew = f"renew it (vmcell setup --tls-domain {config.domain}, if that made it), reload nginx"
    if shown is None or not host.at(config.tls_key).exists():
        found = f"{file} or its key cannot be read"
        return Row(what=what, found=found, status="fail", advice=renew)
    if f"DNS:{wildcard}" not in shown.replace(",", " ").split():
        return Row(what=what, found=f"{file} is not for {wildcard}", status="fail", advice=renew)
    end = shown.splitlines()[-1].removeprefix("notAfter=")
    if _output(host, "openssl", *words[:4], "-checkend", str(30 * 24 * 3600)) is None:
        return Row(what=what, found=f"{wildcard}, ends {end}", status="warn", advice=renew)
    return Row(what=what, found=f"{wildcard}, until {end}", status="ok")


def image_cache(host: Host) -> Row:
    what = "image cache"
    try:
        config = _config(host)
        rows = list_images(str(host.at(config.cache_dir)))
    except HostError as error:
        return Row(what=what, found=str(error), status="warn", advice="vmcell setup, as root")
    size_mib = sum(row.size_bytes for row in rows) >> 20
    found = f"{len(rows)} images, {size_mib} of {config.cache_limit_mib} MiB"
    if any(row.state in ("stale", "damaged") for row in rows) or size_mib > config.cache_limit_mib:
        return Row(what=what, found=found, status="warn", advice="vmcell cache prune")
    return Row(what=what, found=found, status="ok")


def reflink(host: Host) -> Row:
    directory = _cache_directory(host)
    try:
        with (
            tempfile.TemporaryFile(dir=directory) as source,
            tempfile.TemporaryFile(dir=directory) as copy,
        ):
            source.write(bytes(4096))
            source.flush()
            fcntl.ioctl(copy.fileno(), FICLONE, source.fileno())
    except OSError as error:
        return Row(
            what="reflink",
            found=f"{directory}: {error.strerror}",
            status="warn",
            advice="put cache_dir on XFS or btrfs; copies of disks cost time and space here",
        )
    return Row(what="reflink", found=f"works in {directory}", status="ok")


def free_disk(host: Host) -> Row:
    directory = _cache_directory(host)
    status = os.statvfs(directory)
    free_gib = status.f_bavail * status.f_frsize / 2**30
    found = f"{free_gib:.1f} GiB in {directory}"
    advice = f"free some; images and disks want {FREE_GIB_WARN} GiB"
    if free_gib < FREE_GIB_FAIL:
        return Row(what="free disk", found=found, status="fail", advice=advice)
    if free_gib < FREE_GIB_WARN:
        return Row(what="free disk", found=found, status="warn", advice=advice)
    return Row(what="free disk", found=found, status="ok")


CHECKS: tuple[Callable[[Host], Row], ...] = (
    *(linux, kvm, containerd, containerd_socket, shim, zygote, configuration, kernel, base_image),
    *(kubernetes, cgroup, jail, nftables, tun, vhost_net, image_tools, live_directories, nginx),
    certificate,
    *(image_cache, reflink, free_disk),
)


def examine(host: Host) -> list[Row]:
    """All rows, in the order of the table."""
    return [check(host) for check in CHECKS]


def _config(host: Host) -> ShimConfig:
    path = host.at(DEFAULT_PATH)
    try:
        return parse_config(path.read_text(), str(path))
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error


def _text(host: Host, path: str) -> str:
    """A small file of the host; "" where there is none."""
    try:
        return host.at(path).read_text()
    except OSError:
        return ""


def _artifact(host: Host, key: Literal["kernel", "base_image"], advice: str) -> Row:
    what = key.replace("_", " ")
    try:
        path = getattr(_config(host), key)
    except HostError:
        return Row(what=what, found="not configured", status="fail", advice=advice)
    if not host.at(path).is_file():
        return Row(what=what, found=f"{path} is missing", status="fail", advice=advice)
    return Row(what=what, found=path, status="ok")


def _device(host: Host, what: str, path: str, status: Status, advice: str) -> Row:
    device = host.at(path)
    if not device.exists():
        return Row(what=what, found=f"no {device}", status=status, advice=advice)
    if not os.access(device, os.R_OK | os.W_OK):
        return Row(what=what, found=f"{device} is closed", status=status, advice="run as root")
    return Row(what=what, found=str(device), status="ok")


def _cache_directory(host: Host) -> Path:
    """cache_dir of the configuration, or its nearest parent that exists."""
    try:
        configured = _config(host).cache_dir
    except HostError:
        configured = "/var/lib/vmcell"
    path = host.at(configured)
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _output(host: Host, name: str, *arguments: str) -> str | None:
    """Standard output of a program; None when it is missing, fails or hangs."""
    program = host.program(name)
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            timeout=COMMAND_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
