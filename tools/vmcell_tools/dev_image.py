"""What goes into a dev VM's initramfs: guest scripts, settings, drivers, keys, configuration files.

Files under `files/` of the archive replace those of the host's root in the VM's overlay; the host
keeps its own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools import dev_containerd, dev_initramfs
from vmcell_tools.dev_initramfs import Entry
from vmcell_tools.dev_kernel import DevKernel, module_order

GUEST_SCRIPTS = Path(__file__).parent / "dev_guest"
GUEST_API_PORT = 3000
GUEST_DATA_PORT = 3080

APPLETS = (
    *("awk", "cat", "chmod", "cp", "echo", "find", "hostname", "insmod", "ip", "ln", "mkdir"),
    *("mount", "poweroff", "rm", "sh", "switch_root"),
)
DRIVERS = (
    # What init needs to reach the root.
    *("virtio_pci", "virtiofs", "overlay", "virtio_net", "virtio_blk"),
    # What vmcell needs; the rest of the kernel's modules is loaded on demand by modprobe.
    *("vhost_net", "vhost_vsock", "tun", "bridge", "veth", "loop", "erofs"),
    *("nf_tables", "nft_chain_nat", "nft_nat", "nft_masq", "nft_ct", "nft_redir"),
    *("nft_reject_inet", "nft_limit", "nft_fib_inet", "nft_log", "act_mirred", "sch_ingress"),
    *("cls_u32", "cls_matchall"),
)
KVM_DRIVERS = {"AuthenticAMD": "kvm-amd", "GenuineIntel": "kvm-intel"}

INITTAB = """\
::once:/run/vmcell-dev/services.sh
::ctrlaltdel:/bin/busybox poweroff -f
"""


@dataclass(frozen=True, kw_only=True)
class GuestKeys:
    """ssh keys of one VM: the server's private key (dropbear's format), the client's public one."""

    host_key: bytes
    authorized_key: bytes


def initramfs(
    *,
    name: str,
    kernel: DevKernel,
    keys: GuestKeys,
    kvm_driver: str,
    memory_mib: int,
    lifetime_s: int,
    copy_logs: bool,
    files: dict[str, bytes],
) -> bytes:
    """The archive for one VM; `files` maps absolute guest paths to contents (executable ones
    begin with `#!`). `copy_logs` costs instructions that a counting machine should not show."""
    modules = module_order(kernel, (*DRIVERS, kvm_driver))
    hostname = f"vmcell-dev-{name}"
    settings = {
        "hostname": hostname,
        "home": os.path.expanduser("~root"),
        "kernel_release": kernel.release,
        "kernel_modules": str(kernel.modules),
        "rw_mib": str(memory_mib // 2),
        "store_mib": str(memory_mib // 2),
        "lifetime_s": str(lifetime_s),
        "copy_logs": str(int(copy_logs)),
        "api_port": str(GUEST_API_PORT),
        "data_port": str(GUEST_DATA_PORT),
    }
    settings_text = "".join(f"{key}={shlex.quote(value)}\n" for key, value in settings.items())
    entries = [
        *(dev_initramfs.directory(path) for path in ("proc", "sys", "dev", "bin", "files")),
        dev_initramfs.file("bin/busybox", _busybox(), mode=0o755),
        *(dev_initramfs.symlink(f"bin/{applet}", "busybox") for applet in APPLETS),
        _script("init", "init.sh"),
        _script("services.sh", "services.sh"),
        dev_initramfs.file("settings.sh", settings_text.encode()),
        dev_initramfs.file("host_key", keys.host_key, mode=0o600),
        dev_initramfs.file("authorized_keys", keys.authorized_key, mode=0o600),
        *_driver_entries(modules),
        *_file_entries(_guest_files(hostname) | files),
    ]
    return dev_initramfs.archive(entries)


def host_kvm_driver() -> str:
    """The KVM module for `-cpu host`: that of the host's processor."""
    match = re.search(r"vendor_id\s*: (\w+)", Path("/proc/cpuinfo").read_text())
    vendor = match[1] if match else "none"
    if vendor not in KVM_DRIVERS:
        raise HostError(f"no KVM driver is known for processors of {vendor}; use --accel tcg")
    return KVM_DRIVERS[vendor]


def _guest_files(hostname: str) -> dict[str, bytes]:
    passwd = Path("/etc/passwd").read_text()
    # bash reads the host user's .bashrc when ssh starts it, and takes four times as long.
    passwd = re.sub(r"(?m)^(root:.*:)[^:\n]*$", r"\1/bin/sh", passwd)
    return {
        **dev_containerd.files(),
        "/etc/hostname": f"{hostname}\n".encode(),
        "/etc/hosts": f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {hostname}\n".encode(),
        "/etc/inittab": INITTAB.encode(),
        "/etc/passwd": passwd.encode(),
        "/etc/resolv.conf": b"nameserver 10.0.2.3\n",
    }


def _file_entries(files: dict[str, bytes]) -> list[Entry]:
    return [
        dev_initramfs.file(
            f"files{path}", content, mode=0o755 if content.startswith(b"#!") else 0o644
        )
        for path, content in sorted(files.items())
    ]


def _driver_entries(modules: list[Path]) -> list[Entry]:
    entries = [
        dev_initramfs.file(f"modules/{module.name}", module.read_bytes()) for module in modules
    ]
    order = "".join(f"/modules/{module.name}\n" for module in modules)
    return [*entries, dev_initramfs.file("modules/order", order.encode())]


def _script(path: str, name: str) -> Entry:
    return dev_initramfs.file(path, (GUEST_SCRIPTS / name).read_bytes(), mode=0o755)


def _busybox() -> bytes:
    path = shutil.which("busybox", path="/bin:/usr/bin")
    content = Path(path).read_bytes() if path else b""
    if b"/lib64/ld-linux" in content[:4096] or not content:
        raise HostError("a statically linked busybox is missing; apt-get install busybox-static")
    return content
