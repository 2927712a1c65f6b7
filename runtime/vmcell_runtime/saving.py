"""A machine that stands still becomes a file of its state and one of its memory, and may go on.

What is written is what the guest has changed since its memory last was a file. Afterwards that file
is its memory again: pages it only reads are shared with every other guest of the same file, and the
next saving costs what changes until then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.devices.cmos import Cmos
from vmcell_runtime.devices.serial import Serial
from vmcell_runtime.frame import Processor
from vmcell_runtime.hotplug import HotPlug
from vmcell_runtime.kvm.vcpu import Vcpu
from vmcell_runtime.kvm.vcpu_state import save_vcpu
from vmcell_runtime.kvm.vm import Vm
from vmcell_runtime.memory import GuestMemory, Span
from vmcell_runtime.pausing import Pausing, State
from vmcell_runtime.snapshot.state import MachineState, encode
from vmcell_runtime.virtio.mmio import MmioTransport
from vmcell_runtime.virtio.saved import TransportState


class Saving:
    """On the loop's thread. Owns nothing."""

    def __init__(
        self,
        *,
        vm: Vm,
        memory: GuestMemory,
        vcpus: Sequence[Vcpu],
        processor: Processor,
        serial: Serial,
        cmos: Cmos,
        transports: Sequence[MmioTransport],
        hotplug: HotPlug,
        pausing: Pausing,
    ) -> None:
        self._vm = vm
        self._memory = memory
        self._vcpus = vcpus
        self._processor = processor
        self._serial = serial
        self._cmos = cmos
        self._transports = transports
        self._hotplug = hotplug
        self._pausing = pausing

    def save(self, memory_fd: int, state_fd: int) -> int:
        """Writes memory and state; how many bytes of memory that took.

        The memory's file has the length of the RAM: a copy of the one the RAM came from, or a hole.
        It must never be written to again. CallerError unless the machine is paused, or if it has
        devices that cannot be saved; HostError as writing fails. After an error the machine can go
        on as before, and the file that its memory stands on is the one it was.
        """
        if self._pausing.state is not State.PAUSED:
            raise CallerError(
                "only a machine that stands still is saved; pause it first",
                code="failed_precondition",
            )
        if self._hotplug.plugged:
            raise CallerError(
                "a machine with devices plugged in while it ran, as a pod's, cannot be saved",
                code="failed_precondition",
            )
        self._serial.flush()  # the log is not of the guest's memory: what was said is said once
        with self._devices_held() as rows:
            written = self._write(memory_fd, state_fd, rows)
            # Only now: whoever hears of an error takes the old file for the base of the next save.
            self._memory.lay_image(memory_fd)
        return written

    def own_for_nothing(self) -> list[Span]:
        """Pages of the guest's own that are now as in the file its memory stands on; none where
        devices are plugged in that cannot be held."""
        return [] if self._hotplug.plugged else self._memory.as_in_image()

    def give_back(self, spans: Sequence[Span]) -> None:
        """Those of these pages that still are so are the file's again. No vCPU may be running."""
        with self._devices_held():
            for gpa, length in self._memory.as_in_image(spans):
                self._memory.discard(gpa, length)

    @contextmanager
    def _devices_held(self) -> Iterator[list[TransportState]]:
        """The transports' states; no device touches guest memory inside. CallerError."""
        with ExitStack() as held:
            rows = []
            for transport in self._transports:
                rows.append(transport.save())
                held.callback(transport.go_on)
            yield rows

    def _write(self, memory_fd: int, state_fd: int, rows: list[TransportState]) -> int:
        try:
            written = self._memory.save_pages(memory_fd)
        except OSError as error:
            raise HostError(
                f"writing the guest's memory failed: {error.strerror}", code="resource_exhausted"
            ) from error
        document = encode(self._state(rows))
        try:
            while document:
                document = document[os.write(state_fd, document) :]
        except OSError as error:
            raise HostError(
                f"writing the machine's state failed: {error.strerror}", code="resource_exhausted"
            ) from error
        return written

    def _state(self, rows: list[TransportState]) -> MachineState:
        processor = self._processor
        time = self._pausing.stopped_at
        return MachineState(
            ram_bytes=self._memory.ram_bytes,
            cpuid=processor.cpuid,
            tsc_deadline=processor.tsc_deadline,
            tsc_khz=self._vcpus[0].tsc_khz(),
            tsc=time.tsc,
            kvmclock_ns=time.kvmclock_ns,
            irqchips=self._vm.irqchips(),
            vcpus=tuple(
                save_vcpu(vcpu, processor.msrs, processor.xsave_bytes) for vcpu in self._vcpus
            ),
            serial=self._serial.save(),
            cmos_index=self._cmos.index,
            transports=tuple(rows),
        )
