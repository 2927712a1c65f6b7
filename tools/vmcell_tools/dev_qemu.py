"""Command lines of the dev VM's processes on the host: QEMU and one virtiofsd per share.

The guest's memory is a shared memfd because virtiofsd maps it (vhost-user). `-no-reboot` with
`panic=-1` turns a panic of the dev VM's kernel into the end of QEMU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

QEMU = "qemu-system-x86_64"
KERNEL_COMMAND_LINE = (
    "console=ttyS0 reboot=t panic=-1 quiet loglevel=4 mitigations=off audit=0 nowatchdog"
    " cgroup_no_v1=all net.ifnames=0 random.trust_cpu=on"
)
# QEMU's software CPU runs `rep movsb` a byte at a time, and `rep movsq` slower than a plain loop.
# A kernel that believes in neither clears memory 9 times and copies it 2 to 3 times as fast there.
TCG_COMMAND_LINE = " clearcpuid=rep_good"
# So that a benchmark inside knows what its clock counts.
ACCELERATOR_WORD = "vmcell.accelerator="
ACCELERATORS: dict[str, tuple[str, ...]] = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    "tcg": ("-accel", "tcg,thread=multi", "-cpu", "max,-erms"),
    # One instruction is one nanosecond of guest time: CPU times inside are instruction counts.
    "icount": ("-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-cpu", "max"),
}


@dataclass(frozen=True, kw_only=True)
class Forward:
    """A TCP port of the host's loopback and the guest port behind it."""

    host_port: int
    guest_port: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """A host directory that the guest mounts by `tag`; `socket` is virtiofsd's."""

    tag: str
    source: Path
    socket: Path
    cache: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """All that QEMU's command line says about one dev VM."""

    name: str
    accelerator: str
    cpu_count: int
    memory_mib: int
    kernel: Path
    initramfs: Path
    console_log: Path
    shares: tuple[Share, ...]
    forwards: tuple[Forward, ...]
    store: Path | None


def virtiofsd_command(program: str, share: Share) -> list[str]:
    """virtiofsd for one share; `sandbox=chroot` because nobody can pivot from / to /."""
    return [
        program,
        f"--socket-path={share.socket}",
        *("-o", f"source={share.source}"),
        *("-o", "sandbox=chroot"),
        *("-o", f"cache={share.cache}"),
        "--thread-pool-size=2",
    ]


def qemu_command(machine: Machine) -> list[str]:
    """QEMU's command line; an instruction-counting machine has one CPU whatever was asked."""
    cpu_count = 1 if machine.accelerator == "icount" else machine.cpu_count
    memory = f"memory-backend-memfd,id=mem,size={machine.memory_mib}M,share=on"
    append = KERNEL_COMMAND_LINE + (TCG_COMMAND_LINE if machine.accelerator == "tcg" else "")
    append += f" {ACCELERATOR_WORD}{machine.accelerator}"
    command = [
        QEMU,
        *("-name", f"vmcell-dev-{machine.name}"),
        *("-M", "q35", *ACCELERATORS[machine.accelerator], "-smp", str(cpu_count)),
        *("-m", f"{machine.memory_mib}M", "-object", memory, "-numa", "node,memdev=mem"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{machine.console_log}"),
        *("-kernel", str(machine.kernel), "-initrd", str(machine.initramfs)),
        *("-append", append),
    ]
    for number, share in enumerate(machine.shares):
        command += ["-chardev", f"socket,id=share{number},path={share.socket}"]
        command += ["-device", f"vhost-user-fs-pci,chardev=share{number},tag={share.tag}"]
    forwards = "".join(
        f",hostfwd=tcp:127.0.0.1:{forward.host_port}-:{forward.guest_port}"
        for forward in machine.forwards
    )
    command += ["-netdev", f"user,id=net{forwards}"]
    command += ["-device", "virtio-net-pci,netdev=net,romfile="]
    if machine.store is not None:
        # dev_store explains why no flush is needed.
        drive = f"file={machine.store},if=none,id=store,format=raw,discard=unmap,cache=unsafe"
        command += ["-drive", drive]
        command += ["-device", "virtio-blk-pci,drive=store"]
    return command
