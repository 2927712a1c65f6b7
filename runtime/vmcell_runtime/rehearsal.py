"""A machine of our own is booted, saved, restored and run to its end, and nothing of it stays.

A process forked from the zygote copies each page it touches for the first time, and that is most of
what a restore costs it. Done once before anybody waits, what follows finds them copied. The pages
would be this process's own in any case, so it costs time and no memory.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from contextlib import ExitStack

from vmcell_protos.errors import HostError
from vmcell_runtime import control, layout
from vmcell_runtime.build import Descriptors, boot, restore
from vmcell_runtime.config import BlkConfig, MachineConfig, PmemConfig, VsockConfig
from vmcell_runtime.frame import Frame
from vmcell_runtime.kvm.host_kind import open_kvm
from vmcell_runtime.loading import Saved
from vmcell_runtime.memory import HUGE_PAGE_BYTES
from vmcell_runtime.pausing import State
from vmcell_runtime.size import size_of
from vmcell_runtime.snapshot.state import decode
from vmcell_runtime.vmm import read_state

_MEMORY_MIB = 64
_ENDS_WITHIN_NS = 5_000_000_000
_CODE_GPA = layout.KERNEL_RAM_GPA
# mov $0x3f8, %dx; mov $'\n', %al; out %al, %dx; mov $0x64, %dx; mov $0xfe, %al; out %al, %dx; hlt
_CODE = b"\x66\xba\xf8\x03\xb0\n\xee\x66\xba\x64\x00\xb0\xfe\xee\xf4"
_CONFIG = MachineConfig(
    vcpu_count=1,
    memory_mib=_MEMORY_MIB,
    kernel_descriptor=0,
    console_descriptor=1,
    pmem=(PmemConfig(descriptor=2),),
    blk=(BlkConfig(descriptor=3),),
    vsock=VsockConfig(guest_cid=3, listen_ports=(1024,)),
    balloon=True,
)


def rehearse() -> None:
    """After `vmm.prepare_process`. HostError if it goes wrong: no machine would be any better."""
    with ExitStack() as opened:
        memory, state = (_file(opened) for _ in range(2))
        os.ftruncate(memory, _MEMORY_MIB << 20)
        _save(opened, memory, state)
        _restore(opened, memory, state)


def _save(opened: ExitStack, memory_fd: int, state_fd: int) -> None:
    machine = boot(_CONFIG, *_parts(opened), _no_report)
    machine.pausing.state = State.PAUSED  # no vCPU has a thread, so all stand still
    machine.saving.save(memory_fd, state_fd)
    machine.close()


def _restore(opened: ExitStack, memory_fd: int, state_fd: int) -> None:
    request = control.decode_request(control.encode(control.Restore(config=_CONFIG, uid=0)))
    saved = Saved(decode(read_state(state_fd)), memory_fd)
    if not isinstance(request, control.Restore):
        raise AssertionError("unreachable: it was encoded as one")
    machine = restore(request.config, *_parts(opened), _no_report, saved)
    control.encode(control.Running())
    resume = control.decode_request(control.encode(control.Resume(request_id=1)))
    machine.loop.call_soon(lambda: machine.pausing.resume(lambda: None))
    machine.loop.call_at(
        time.monotonic_ns() + _ENDS_WITHIN_NS,
        lambda: machine.ending.end("vmm_error", f"it took too long after {resume.kind}"),
    )
    machine.start_threads()
    end = machine.run()
    machine.close()
    if end.reason != "guest_reset":
        raise HostError(f"a rehearsed guest ended otherwise: {end.reason}: {end.detail}")


def _no_report(line: str) -> None:
    raise HostError(f"a rehearsed guest broke a rule: {line}")


def _parts(opened: ExitStack) -> tuple[Descriptors, Frame, list[socket.socket]]:
    """What `_CONFIG` is made of."""
    fds = _fds(opened)
    descriptors = Descriptors(list(map(os.dup, fds)))
    opened.callback(descriptors.close)
    return descriptors, Frame(size_of(_CONFIG, fds), open_kvm()), _listeners(opened)


def _fds(opened: ExitStack) -> list[int]:
    """As `_CONFIG` names them; all are `opened`'s."""
    sizes = (len(_KERNEL), 0, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    fds = [_file(opened, size) for size in sizes]
    os.pwrite(fds[0], _KERNEL, 0)
    return fds


def _listeners(opened: ExitStack) -> list[socket.socket]:
    ours, theirs = socket.socketpair()
    opened.enter_context(ours)
    return [theirs]


def _file(opened: ExitStack, size_bytes: int = 0) -> int:
    fd = os.memfd_create("rehearsal", os.MFD_CLOEXEC)
    opened.callback(os.close, fd)
    os.ftruncate(fd, size_bytes)
    return fd


def _elf(code: bytes) -> bytes:
    """An x86-64 executable of one segment: Elf64_Ehdr, Elf64_Phdr, code."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", 2, 62, 1, _CODE_GPA, 64, 0, 0, 64, 56, 1, 0, 0, 0),
    )
    segment = struct.pack(
        "<IIQQQQQQ", *(1, 5, 120, _CODE_GPA, _CODE_GPA, len(code), len(code), 4096)
    )
    return header + segment + code


_KERNEL = _elf(_CODE)
