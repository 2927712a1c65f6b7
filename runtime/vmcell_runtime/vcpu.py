"""One thread per vCPU: into the guest, out with an exit, on to the bus, and in again.

    running --exit for port or memory--> answered by a bus --> running
    running --kick-->                    stopped
    running --pause--> standing --resume--> running
    running --any other exit-->          the machine ends, with a reason --> stopped

A vCPU thread ends only because it was told to stop or because it ended the machine itself. An
exception it does not expect leaves the thread and ends the process (vmm.py).
"""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable

from vmcell_runtime.bus import Bus
from vmcell_runtime.kvm import abi
from vmcell_runtime.kvm.vcpu import Vcpu

KICK_SIGNAL = signal.SIGRTMIN
# KVM_INTERNAL_ERROR_*: what a guest brings about that runs where it has no memory, for example
_SUBERROR_EMULATION, _SUBERROR_SIMULTANEOUS, _SUBERROR_DELIVERY = 1, 2, 3
_GUESTS_FAULTS = (_SUBERROR_EMULATION, _SUBERROR_SIMULTANEOUS, _SUBERROR_DELIVERY)

EndMachine = Callable[[str, str], None]
"""Takes (end reason, detail), from any thread."""


def prepare_kicks() -> None:
    """Once per process, in its main thread: makes the kick signal interrupt KVM_RUN, not us."""
    signal.signal(KICK_SIGNAL, lambda _number, _frame: None)


class VcpuThread:
    """Runs one vCPU; does not own it. `exits` counts by KVM_EXIT_*."""

    def __init__(
        self, number: int, vcpu: Vcpu, *, ports: Bus, windows: Bus, end_machine: EndMachine
    ) -> None:
        self.vcpu = vcpu
        self._ports = ports
        self._windows = windows
        self._end_machine = end_machine
        self._stopping = False
        self._held = False
        self._gate = threading.Condition()
        self._stands: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name=f"vcpu{number}", daemon=True)
        self.exits: dict[int, int] = {}

    def start(self, *, held: bool = False) -> None:
        """Starts the thread; one that is `held` stays outside the guest until `let_go`."""
        self._held = held
        self._thread.start()

    def let_go(self) -> None:
        with self._gate:
            self._held = False
            self._gate.notify()

    def kick(self) -> None:
        """Asks the thread to stop, wherever it is; returns at once."""
        with self._gate:
            self._stopping = True
            self._gate.notify()
        self._leave_guest()

    def pause(self, stands: Callable[[], None]) -> None:
        """Asks the thread to stand still until `resume`; returns at once.

        `stands` is called on the vCPU's thread when it does: outside KVM_RUN, with no instruction
        half done. Registers and clock of the vCPU are then anybody's.
        """
        with self._gate:
            self._stands = stands
        self._leave_guest()

    def resume(self) -> None:
        """Lets the thread go on."""
        with self._gate:
            self._stands = None
            if not self._stopping:
                self.vcpu.set_immediate_exit(False)
            self._gate.notify()

    def join(self, timeout_s: float) -> bool:
        """True once the thread has ended (or never started)."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        run = self.vcpu.run
        exits = self.exits
        with self._gate:
            self._gate.wait_for(lambda: self._stopping or not self._held)
        while not self._stopping:
            try:
                reason = run()
            except InterruptedError:
                # Only here: KVM has completed the last exit's instruction before it said so.
                self._stand()
                continue
            except BlockingIOError:
                continue
            except OSError as error:
                self._end_machine("vmm_error", _run_failure(error))
                return
            exits[reason] = exits.get(reason, 0) + 1
            if reason == abi.KVM_EXIT_MMIO:
                self._mmio()
            elif reason == abi.KVM_EXIT_IO:
                self._io()
            elif reason != abi.KVM_EXIT_INTR:
                self._end_machine(*self._end_of(reason))
                return

    def _stand(self) -> None:
        with self._gate:
            told = None
            while self._stands is not None and not self._stopping:
                if told is not self._stands:
                    told = self._stands
                    told()
                self._gate.wait()

    def _leave_guest(self) -> None:
        self.vcpu.set_immediate_exit(True)
        if self._thread.ident is not None and self._thread.is_alive():
            signal.pthread_kill(self._thread.ident, KICK_SIGNAL)

    def _mmio(self) -> None:
        gpa, data, length, is_write = self.vcpu.mmio_exit()
        if is_write:
            self._windows.write(gpa, length, int.from_bytes(data[:length], "little"))
        else:
            value = self._windows.read(gpa, length)
            self.vcpu.mmio_answer(value.to_bytes(length, "little"))

    def _io(self) -> None:
        direction, size, port, repeat, offset = self.vcpu.io_exit()
        for place in range(offset, offset + size * repeat, size):
            if direction == abi.KVM_EXIT_IO_OUT:
                data = self.vcpu.io_read(place, size)
                self._ports.write(port, size, int.from_bytes(data, "little"))
            else:
                value = self._ports.read(port, size)
                self.vcpu.io_write(place, value.to_bytes(size, "little"))

    def _end_of(self, reason: int) -> tuple[str, str]:
        """(end reason, detail) of an exit after which the guest cannot go on."""
        if reason == abi.KVM_EXIT_SHUTDOWN:
            return "triple_fault", "a fault while handling a double fault"
        if reason == abi.KVM_EXIT_SYSTEM_EVENT:
            return self._system_event()
        if reason == abi.KVM_EXIT_INTERNAL_ERROR:
            suberror, data = self.vcpu.internal_error()
            words = " ".join(f"{word:#x}" for word in data)
            what = "emulate an instruction" if suberror == _SUBERROR_EMULATION else "go on"
            rip = self.vcpu.get_regs().rip
            whose = "guest_fault" if suberror in _GUESTS_FAULTS else "vmm_error"
            return whose, f"KVM could not {what} at {rip:#x} (suberror {suberror}: {words})"
        if reason == abi.KVM_EXIT_FAIL_ENTRY:
            code = self.vcpu.fail_entry_reason()
            return "vmm_error", f"the processor refused to enter the guest (code {code:#x})"
        return "vmm_error", f"KVM_RUN ended with exit {reason}, which nothing here can answer"

    def _system_event(self) -> tuple[str, str]:
        event = self.vcpu.system_event_type()
        if event == abi.KVM_SYSTEM_EVENT_SHUTDOWN:
            return "guest_shutdown", "the guest asked KVM to shut down"
        if event == abi.KVM_SYSTEM_EVENT_RESET:
            return "guest_reset", "the guest asked KVM for a reset"
        if event == abi.KVM_SYSTEM_EVENT_CRASH:
            return "guest_panic", "the guest told KVM that it crashed"
        return "vmm_error", f"KVM reported system event {event}, which nothing here can answer"


def _run_failure(error: OSError) -> str:
    if error.errno == errno.EFAULT:
        return "a page of the guest cannot be reached: was an image of it cut short?"
    return f"KVM_RUN failed: {error.strerror}"
