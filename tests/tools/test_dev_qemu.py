"""The command lines of QEMU and virtiofsd say what was asked and nothing unsafe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vmcell_tools.dev_qemu import (
    ACCELERATORS,
    Forward,
    Machine,
    Share,
    qemu_command,
    virtiofsd_command,
)

SHARE = Share(tag="rootfs", source=Path("/"), socket=Path("/s/root.sock"), cache="always")
MACHINE = Machine(
    name="x",
    accelerator="tcg",
    cpu_count=2,
    memory_mib=2048,
    kernel=Path("/k"),
    initramfs=Path("/i"),
    console_log=Path("/c"),
    shares=(SHARE,),
    forwards=(
        Forward(host_port=4022, guest_port=22),
        Forward(host_port=3000, guest_port=3000),
    ),
    store=None,
)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_ports_are_forwarded_from_loopback_only() -> None:
    forwards = option(qemu_command(MACHINE), "-netdev").split(",")[2:]
    assert forwards == [
        "hostfwd=tcp:127.0.0.1:4022-:22",
        "hostfwd=tcp:127.0.0.1:3000-:3000",
    ]


@pytest.mark.parametrize(("accelerator", "cpus"), [("kvm", "2"), ("tcg", "2"), ("icount", "1")])
def test_counting_instructions_takes_one_cpu(accelerator: str, cpus: str) -> None:
    command = qemu_command(replace(MACHINE, accelerator=accelerator))
    assert option(command, "-smp") == cpus
    assert option(command, "-accel").split(",")[0] == ("kvm" if accelerator == "kvm" else "tcg")
    assert ("-icount" in command) == (accelerator == "icount")


def test_memory_is_shared_with_virtiofsd_and_counted_once() -> None:
    command = qemu_command(MACHINE)
    assert option(command, "-m") == "2048M"
    assert option(command, "-object") == "memory-backend-memfd,id=mem,size=2048M,share=on"
    assert "vhost-user-fs-pci,chardev=share0,tag=rootfs" in command


def test_only_a_store_makes_a_disk() -> None:
    assert not [word for word in qemu_command(MACHINE) if "virtio-blk" in word]
    command = qemu_command(replace(MACHINE, store=Path("/d.ext4")))
    assert option(command, "-drive").startswith("file=/d.ext4,if=none,")


def test_virtiofsd_stays_in_a_chroot() -> None:
    command = virtiofsd_command("/v", SHARE)
    assert command[0] == "/v"
    assert "sandbox=chroot" in command
    assert "source=/" in command
    assert set(ACCELERATORS) == {"kvm", "tcg", "icount"}
