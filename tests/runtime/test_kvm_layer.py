"""The KVM layer with payloads of a few instructions; runs on any /dev/kvm, kvm_pvm too."""

from __future__ import annotations

import os
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from payload import HLT_FOREVER, SPIN, TRIPLE_FAULT, in8, load32, out8, store32

from vmcell_protos.errors import HostError
from vmcell_runtime import layout
from vmcell_runtime.boot.entry import ENTRY_MSRS, entry_fpu, entry_regs, entry_sregs, write_tables
from vmcell_runtime.bus import Bus
from vmcell_runtime.irq import IrqLine
from vmcell_runtime.kvm import abi
from vmcell_runtime.kvm.cpuid import guest_cpuid
from vmcell_runtime.kvm.host_kind import host_kind, open_kvm
from vmcell_runtime.kvm.system import System
from vmcell_runtime.kvm.vcpu import Vcpu
from vmcell_runtime.kvm.vm import Vm
from vmcell_runtime.memory import HUGE_PAGE_BYTES, GuestMemory
from vmcell_runtime.vcpu import KICK_SIGNAL, VcpuThread, prepare_kicks

pytestmark = pytest.mark.kvm

CODE_GPA = 0x10_0000
HIGH_PD_GPA = 0x30_0000  # page directory for 3 to 4 GiB, where windows and APICs are
WINDOW = layout.VIRTIO_GPA


class Bench:
    """A VM with one vCPU at the 64-bit entry, everything below 4 GiB mapped one to one."""

    def __init__(self, resources: ExitStack, vcpu_count: int = 1) -> None:
        self.system = System(open_kvm())
        resources.callback(self.system.close)
        self.memory = GuestMemory(16 << 20)
        resources.callback(self.memory.close)
        self.vm = Vm(self.system.create_vm())
        resources.callback(self.vm.close)
        self.vm.set_tss(layout.TSS_GPA)
        self.vm.set_identity_map(layout.IDENTITY_MAP_GPA)
        self.vm.create_irqchip()
        write_tables(self.memory)
        self._map_high()
        self.vcpus = [self._vcpu(number, vcpu_count) for number in range(vcpu_count)]
        for vcpu in self.vcpus:
            resources.callback(vcpu.close)
        self.vcpu = self.vcpus[0]

    def start(self, code: bytes) -> None:
        """Gives the VM its memory with `code` in it, and vCPU 0 the entry."""
        self.memory.write(CODE_GPA, code)
        self.vm.set_memory(self.memory)
        self.vcpu.set_sregs(entry_sregs(self.vcpu.get_sregs()))
        self.vcpu.set_regs(entry_regs(CODE_GPA))
        self.vcpu.set_fpu(entry_fpu())

    def _map_high(self) -> None:
        self.memory.store64(layout.PDPT_GPA + 8 * 3, HIGH_PD_GPA | 3)
        entries = [(3 << 30) + (n << 21) | 0x83 for n in range(512)]
        self.memory.write(HIGH_PD_GPA, struct.pack("<512Q", *entries))

    def _vcpu(self, number: int, count: int) -> Vcpu:
        vcpu = Vcpu(self.vm.create_vcpu(number), self.system.run_page_bytes())
        supported = self.system.supported_cpuid()
        vcpu.set_cpuid(guest_cpuid(supported, number, count, tsc_deadline=True))
        vcpu.set_msrs(ENTRY_MSRS)
        return vcpu


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as resources:
        yield resources


@pytest.fixture
def bench(resources: ExitStack) -> Bench:
    return Bench(resources)


def run(vcpu: Vcpu) -> int:
    """KVM_RUN, with a deadline: a guest that does not exit is kicked out after 10 s."""
    prepare_kicks()
    thread = threading.get_ident()

    def kick() -> None:
        vcpu.set_immediate_exit(True)
        signal.pthread_kill(thread, KICK_SIGNAL)

    timer = threading.Timer(10, kick)
    timer.start()
    try:
        return vcpu.run()
    finally:
        timer.cancel()
        timer.join()


def test_port_output_and_input(bench: Bench) -> None:
    bench.start(out8(0x80, 0x5A) + in8(0x81) + out8(0x82, 0) + HLT_FOREVER)
    assert run(bench.vcpu) == abi.KVM_EXIT_IO
    io = bench.vcpu.io_exit()
    assert (io.direction, io.size, io.port, io.repeat) == (abi.KVM_EXIT_IO_OUT, 1, 0x80, 1)
    assert bench.vcpu.io_read(io.data_offset, 1) == b"\x5a"
    assert run(bench.vcpu) == abi.KVM_EXIT_IO
    io = bench.vcpu.io_exit()
    assert (io.direction, io.port) == (abi.KVM_EXIT_IO_IN, 0x81)
    bench.vcpu.io_write(io.data_offset, b"\x77")
    assert run(bench.vcpu) == abi.KVM_EXIT_IO
    assert bench.vcpu.get_regs().rdx == 0x82


def test_io_data_outside_the_run_page_is_refused(bench: Bench) -> None:
    size = bench.system.run_page_bytes()
    for offset, length in ((size - 1, 2), (0, 1), (-1, 1), (1 << 40, 1)):
        with pytest.raises(ValueError, match="outside the run page"):
            bench.vcpu.io_read(offset, length)


def test_memory_mapped_io_both_ways(bench: Bench) -> None:
    bench.start(store32(WINDOW + 4, 0xCAFEF00D) + load32(WINDOW + 8) + out8(0x80, 0))
    assert run(bench.vcpu) == abi.KVM_EXIT_MMIO
    gpa, data, length, is_write = bench.vcpu.mmio_exit()
    assert (gpa, data[:length], is_write) == (WINDOW + 4, b"\x0d\xf0\xfe\xca", 1)
    assert run(bench.vcpu) == abi.KVM_EXIT_MMIO
    gpa, _, length, is_write = bench.vcpu.mmio_exit()
    assert (gpa, length, is_write) == (WINDOW + 8, 4, 0)
    bench.vcpu.mmio_answer(b"\x78\x56\x34\x12")
    assert run(bench.vcpu) == abi.KVM_EXIT_IO
    # the port's value replaced al only
    assert bench.vcpu.get_regs().rax == 0x12345600


def test_an_ioeventfd_takes_its_value_without_an_exit(bench: Bench) -> None:
    lines = [IrqLine(0), IrqLine(0)]
    for queue, line in enumerate(lines):
        bench.vm.add_ioeventfd(line.fd, WINDOW + 0x50, 4, value=queue)
    notify = [store32(WINDOW + 0x50, queue) for queue in (1, 0, 1, 2)]
    bench.start(b"".join(notify) + out8(0x80, 0))
    assert run(bench.vcpu) == abi.KVM_EXIT_MMIO, "nobody waits for queue 2"
    assert bench.vcpu.mmio_exit().data[:4] == b"\x02\0\0\0"
    assert run(bench.vcpu) == abi.KVM_EXIT_IO
    assert [os.eventfd_read(line.fd) for line in lines] == [1, 2]
    for line in lines:
        line.close()


def test_an_ioeventfd_for_any_value_takes_them_all(bench: Bench) -> None:
    line = IrqLine(0)
    bench.vm.add_ioeventfd(line.fd, WINDOW + 0x50, 4, value=None)
    notify = [store32(WINDOW + 0x50, value) for value in (0, 2, 0xFFFF_FFFF)]
    bench.start(b"".join(notify) + out8(0x80, 0))
    assert run(bench.vcpu) == abi.KVM_EXIT_IO
    assert os.eventfd_read(line.fd) == 3
    bench.vm.remove_ioeventfd(line.fd, WINDOW + 0x50, 4, value=None)
    line.close()


def test_the_same_ioeventfd_twice_is_the_hosts_error(bench: Bench) -> None:
    line = IrqLine(0)
    bench.vm.add_ioeventfd(line.fd, WINDOW + 0x50, 4, value=0)
    with pytest.raises(HostError, match="KVM_IOEVENTFD failed: File exists"):
        bench.vm.add_ioeventfd(line.fd, WINDOW + 0x50, 4, value=0)
    line.close()


LAPIC_ON = store32(layout.LAPIC_GPA + 0xF0, 0x1FF)


def route(pin: int, vector: int) -> bytes:
    """IOAPIC redirection of `pin`: edge, active high, to APIC 0 (82093AA data sheet)."""
    select, window = layout.IOAPIC_GPA, layout.IOAPIC_GPA + 0x10
    entry = 0x10 + 2 * pin
    steps = [(select, entry + 1), (window, 0), (select, entry), (window, vector)]
    return b"".join(store32(gpa, value) for gpa, value in steps)


# mov rbx, IRR of vectors 0x40 to 0x5f; 1: mov eax, [rbx]; test eax, eax; jz 1b
WAIT_PENDING = (
    b"\x48\xbb" + struct.pack("<Q", layout.LAPIC_GPA + 0x220) + b"\x8b\x03\x85\xc0\x74\xfa"
)


def test_an_irqfd_reaches_the_lapic_through_the_ioapic(bench: Bench) -> None:
    """The guest sees the vector pending; kvm_pvm cannot deliver it into this payload's IDT."""
    line = IrqLine(5)
    bench.vm.add_irqfd(line.fd, line.gsi)
    bench.start(LAPIC_ON + route(5, 0x43) + out8(0x80, 0) + WAIT_PENDING + b"\xe7\x90")
    assert run(bench.vcpu) == abi.KVM_EXIT_IO
    assert bench.vcpu.io_exit().port == 0x80
    timer = threading.Timer(0.05, line.fire)
    timer.start()
    assert run(bench.vcpu) == abi.KVM_EXIT_IO
    timer.join()
    io = bench.vcpu.io_exit()
    assert bench.vcpu.io_read(io.data_offset, io.size) == (1 << 3).to_bytes(4, "little")
    line.close()


def test_a_line_nobody_wired_reaches_nobody(bench: Bench) -> None:
    wired, loose = IrqLine(5), IrqLine(6)
    bench.vm.add_irqfd(wired.fd, wired.gsi)
    bench.start(LAPIC_ON + route(5, 0x43) + route(6, 0x44) + WAIT_PENDING + out8(0x90, 0))
    loose.fire()
    prepare_kicks()
    timer = threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), KICK_SIGNAL))
    timer.start()
    with pytest.raises(InterruptedError):
        bench.vcpu.run()
    timer.join()
    wired.fire()
    assert run(bench.vcpu) == abi.KVM_EXIT_IO
    for line in (wired, loose):
        line.close()


def test_other_vcpus_wait_for_their_sipi(resources: ExitStack) -> None:
    bench = Bench(resources, vcpu_count=2)
    assert [vcpu.mp_state() for vcpu in bench.vcpus] == [
        abi.KVM_MP_STATE_RUNNABLE,
        abi.KVM_MP_STATE_UNINITIALIZED,
    ]
    # 16-bit code of the second vCPU at 0x8000: mov al, 7; out 0x90, al; hlt
    bench.memory.write(0x8000, b"\xb0\x07\xe6\x90\xf4")
    icr_low, icr_high = layout.LAPIC_GPA + 0x300, layout.LAPIC_GPA + 0x310
    init = store32(icr_high, 1 << 24) + store32(icr_low, 0x4500)
    sipi = store32(icr_high, 1 << 24) + store32(icr_low, 0x4608)
    bench.start(LAPIC_ON + init + sipi + out8(0x80, 0) + HLT_FOREVER)
    second: list[int] = []

    def run_second() -> None:
        deadline = time.monotonic() + 10
        while not second and time.monotonic() < deadline:
            try:
                second.append(bench.vcpus[1].run())
            except (BlockingIOError, InterruptedError):
                continue

    thread = threading.Thread(target=run_second)
    thread.start()
    assert run(bench.vcpu) == abi.KVM_EXIT_IO
    thread.join(10)
    assert second == [abi.KVM_EXIT_IO]
    io = bench.vcpus[1].io_exit()
    assert (io.port, bench.vcpus[1].io_read(io.data_offset, 1)) == (0x90, b"\x07")


def test_a_triple_fault_is_a_shutdown_exit(bench: Bench) -> None:
    bench.start(TRIPLE_FAULT)
    assert run(bench.vcpu) == abi.KVM_EXIT_SHUTDOWN


def test_immediate_exit_comes_back_before_the_guest_runs(bench: Bench) -> None:
    bench.start(out8(0x80, 0))
    bench.vcpu.set_immediate_exit(True)
    for _ in range(3):
        with pytest.raises(InterruptedError):
            bench.vcpu.run()
    assert bench.vcpu.get_regs().rip == CODE_GPA
    bench.vcpu.set_immediate_exit(False)
    assert run(bench.vcpu) == abi.KVM_EXIT_IO


def test_a_signal_interrupts_a_spinning_guest(bench: Bench) -> None:
    bench.start(SPIN)
    prepare_kicks()
    timer = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), KICK_SIGNAL))
    timer.start()
    start = time.monotonic()
    with pytest.raises(InterruptedError):
        bench.vcpu.run()
    assert time.monotonic() - start < 5
    timer.join()


def test_a_read_only_window_is_read_and_never_written(bench: Bench) -> None:
    gpa = 0xC000_0000
    with tempfile.TemporaryFile() as file:
        file.write(b"IMAGE".ljust(HUGE_PAGE_BYTES, b"\0"))
        file.flush()
        bench.memory.map_file(file.fileno(), gpa)
        # the value read goes out by a port, so that it is the guest that saw it
        bench.start(load32(gpa) + b"\xe7\x80" + store32(gpa, 0) + out8(0x81, 0))
        assert run(bench.vcpu) == abi.KVM_EXIT_IO
        io = bench.vcpu.io_exit()
        assert bench.vcpu.io_read(io.data_offset, io.size) == b"IMAG"
        assert run(bench.vcpu) == abi.KVM_EXIT_MMIO, "a write to it is an access to no device"
        assert bench.vcpu.mmio_exit().is_write
        assert run(bench.vcpu) == abi.KVM_EXIT_IO
        assert os.pread(file.fileno(), 5, 0) == b"IMAGE"


def test_a_guest_reads_zeros_behind_an_image_of_one_page(bench: Bench) -> None:
    gpa = 0xC000_0000
    with tempfile.TemporaryFile() as file:
        file.write(b"\xaa" * 4096)
        file.flush()
        bench.memory.map_file(file.fileno(), gpa)
        read = load32(gpa + 4094) + b"\xe7\x80"
        read += load32(gpa + HUGE_PAGE_BYTES - 4) + b"\xe7\x80"
        bench.start(read + out8(0x81, 0))
        for expected in (b"\xaa\xaa\0\0", bytes(4)):
            assert run(bench.vcpu) == abi.KVM_EXIT_IO
            io = bench.vcpu.io_exit()
            assert bench.vcpu.io_read(io.data_offset, io.size) == expected


def test_a_window_comes_and_goes_between_instructions(bench: Bench) -> None:
    gpa = 0xC000_0000
    look = load32(gpa) + b"\xe7\x80"  # out %eax, $0x80
    bench.start(look * 4)
    seen = []
    for letters in (b"ONE.", b"TWO."):
        with tempfile.TemporaryFile() as file:
            file.write(letters.ljust(HUGE_PAGE_BYTES, b"\0"))
            file.flush()
            slot = bench.memory.map_file(file.fileno(), gpa)
        bench.vm.add_slot(slot)
        with pytest.raises(BufferError):
            bench.memory.unmap_file(slot.number)
        assert run(bench.vcpu) == abi.KVM_EXIT_IO
        io = bench.vcpu.io_exit()
        seen.append(bench.vcpu.io_read(io.data_offset, 4))
        bench.vm.remove_slot(slot)
        bench.memory.unmap_file(slot.number)
        assert run(bench.vcpu) == abi.KVM_EXIT_MMIO, "nothing is left at that address"
        bench.vcpu.mmio_answer(b"none")
        assert run(bench.vcpu) == abi.KVM_EXIT_IO
        io = bench.vcpu.io_exit()
        seen.append(bench.vcpu.io_read(io.data_offset, 4))
    assert seen == [b"ONE.", b"none", b"TWO.", b"none"]


def test_a_slot_kvm_refuses_is_not_pinned(bench: Bench) -> None:
    bench.start(HLT_FOREVER)
    with tempfile.TemporaryFile() as file:
        file.truncate(HUGE_PAGE_BYTES)
        slot = bench.memory.map_file(file.fileno(), 0xC000_0000)
    with pytest.raises(HostError, match="KVM_SET_USER_MEMORY_REGION failed"):
        bench.vm.add_slot(slot._replace(gpa=4096))  # inside RAM
    bench.memory.unmap_file(slot.number)


def test_a_removed_ioeventfd_is_an_exit_again(bench: Bench) -> None:
    line = IrqLine(0)
    bench.vm.add_ioeventfd(line.fd, WINDOW + 0x50, 4, value=0)
    bench.start(store32(WINDOW + 0x50, 0) * 2 + out8(0x80, 0))
    bench.vm.remove_ioeventfd(line.fd, WINDOW + 0x50, 4, value=0)
    for _ in range(2):
        assert run(bench.vcpu) == abi.KVM_EXIT_MMIO
    with pytest.raises(HostError, match="KVM_IOEVENTFD failed: No such file"):
        bench.vm.remove_ioeventfd(line.fd, WINDOW + 0x50, 4, value=0)
    line.close()


def test_kvmclock_is_set_and_goes_on(bench: Bench) -> None:
    bench.start(HLT_FOREVER)
    bench.vm.set_kvmclock_ns(10**15)
    first, second = bench.vm.kvmclock_ns(), bench.vm.kvmclock_ns()
    assert 10**15 <= first < second < 10**15 + 10**10
    assert not bench.vcpu.tell_paused(), "this guest has no kvmclock"


def test_the_time_stamp_counter_is_moved(resources: ExitStack) -> None:
    bench = Bench(resources, vcpu_count=2)
    assert bench.vcpu.has_tsc_offset(), "Linux 5.16 has it"
    before = [vcpu.tsc() for vcpu in bench.vcpus]
    for vcpu in bench.vcpus:
        vcpu.move_tsc(10**13)
    moved = [vcpu.tsc() - was for vcpu, was in zip(bench.vcpus, before, strict=True)]
    # kvm_pvm takes an offset and ignores it.
    wanted = 0 if host_kind().kind == "pvm" else 10**13
    assert all(wanted <= ticks < wanted + 10**11 for ticks in moved)


class Endings:
    """What a vCPU thread said about the machine's end."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.said: list[tuple[str, str]] = []
        self.thread = VcpuThread(0, vcpu, ports=Bus(), windows=Bus(), end_machine=self._note)

    def _note(self, reason: str, detail: str) -> None:
        self.said.append((reason, detail))


@pytest.mark.parametrize("code", [SPIN, HLT_FOREVER], ids=["spinning", "halted"])
def test_a_kick_stops_a_vcpu_thread_wherever_it_is(bench: Bench, code: bytes) -> None:
    prepare_kicks()
    bench.start(out8(0x80, 0) + code)
    endings = Endings(bench.vcpu)
    endings.thread.kick()
    assert endings.thread.join(0), "one that never started has nothing to stop"
    bench.vcpu.set_immediate_exit(False)
    endings = Endings(bench.vcpu)
    endings.thread.start()
    deadline = time.monotonic() + 10
    while not endings.thread.exits and time.monotonic() < deadline:
        time.sleep(0.001)
    start = time.monotonic()
    endings.thread.kick()
    assert endings.thread.join(10)
    assert time.monotonic() - start < 1
    assert endings.thread.exits == {abi.KVM_EXIT_IO: 1}
    assert endings.said == []


def test_guest_memory_is_what_devices_see(bench: Bench) -> None:
    bench.memory.store32(0x50_0000, 0x11223344)
    bench.start(load32(0x50_0000) + store32(0x50_0004, 0x55667788) + out8(0x80, 0))
    assert run(bench.vcpu) == abi.KVM_EXIT_IO
    assert bench.memory.load32(0x50_0004) == 0x55667788
    assert bench.vcpu.get_regs().rax & 0xFFFFFF00 == 0x11223300


def test_memory_outlives_every_slot_the_kernel_has(bench: Bench) -> None:
    bench.start(HLT_FOREVER)
    with pytest.raises(BufferError):
        bench.memory.close()
    with pytest.raises(ValueError, match="already"):
        bench.vm.set_memory(bench.memory)
    bench.vcpu.close()
    bench.vm.close()
    bench.memory.close()


def test_unknown_msrs_are_named(bench: Bench) -> None:
    with pytest.raises(HostError, match="MSR 0xdeadbeef to 0x1"):
        bench.vcpu.set_msrs({**ENTRY_MSRS, 0xDEADBEEF: 1})


def test_msrs_a_vcpu_does_not_have_are_left_out(bench: Bench) -> None:
    """As VMX's of a guest without VMX, in the middle of the list that KVM gives (Linux < 6.12)."""
    unknown = [0xDEADBEEF, 0xDEADBEF0]
    indices = [unknown[0], *ENTRY_MSRS, *unknown, abi.MSR_IA32_TSC, unknown[1]]
    found = bench.vcpu.get_msrs(indices)
    assert found.keys() == {*ENTRY_MSRS, abi.MSR_IA32_TSC}
    bench.vcpu.set_msrs({unknown[0]: 0, **found, unknown[1]: 0})
    assert bench.vcpu.get_msrs(list(ENTRY_MSRS)) == {i: found[i] for i in ENTRY_MSRS}
    assert bench.vcpu.get_msrs([]) == {}
    with pytest.raises(HostError, match="MSR 0xdeadbef0 to 0x2"):
        bench.vcpu.set_msrs({unknown[0]: 0, unknown[1]: 2})


def test_closing_is_idempotent(bench: Bench) -> None:
    for owner in (bench.vcpu, bench.vm, bench.system, bench.memory):
        owner.close()
        owner.close()


def test_what_is_no_kvm_is_refused() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(HostError, match="KVM_GET_API_VERSION failed"):
        System(fd)
    os.close(fd)
