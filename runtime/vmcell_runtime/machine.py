"""A microVM that exists: its vCPU threads, its event loop, and everything it owns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

from vmcell_protos.errors import HostError
from vmcell_runtime.bus import Bus
from vmcell_runtime.devices.serial import Serial
from vmcell_runtime.ending import End, Ending
from vmcell_runtime.hotplug import HotPlug
from vmcell_runtime.kvm import abi
from vmcell_runtime.loop import EventLoop
from vmcell_runtime.pausing import Pausing
from vmcell_runtime.saving import Saving
from vmcell_runtime.shedding import Shedding
from vmcell_runtime.vcpu import VcpuThread
from vmcell_runtime.virtio.balloon import Balloon
from vmcell_runtime.virtio.vsock.device import Vsock

STOP_TIMEOUT_S = 5.0

_EXIT_NAMES = {abi.KVM_EXIT_IO: "io", abi.KVM_EXIT_MMIO: "mmio", abi.KVM_EXIT_INTR: "intr"}


class Machine:
    """Made by `build`; `start_threads` and `run` once, in the process's main thread, then `close`
    (idempotent)."""

    def __init__(
        self,
        *,
        loop: EventLoop,
        ending: Ending,
        vcpus: Sequence[VcpuThread],
        ports: Bus,
        windows: Bus,
        serial: Serial,
        vsock: Vsock | None,
        balloon: Balloon | None,
        hotplug: HotPlug,
        pausing: Pausing,
        saving: Saving,
        resources: ExitStack,
    ) -> None:
        self.loop = loop
        self.ending = ending
        self.vsock = vsock
        self.balloon = balloon
        self.hotplug = hotplug
        self.pausing = pausing
        self.saving = saving
        self.shedding = Shedding(loop, pausing, saving)
        self._vcpus = vcpus
        self._ports = ports
        self._windows = windows
        self._serial = serial
        self._resources = resources

    def start_threads(self) -> None:
        """Once, before `run`: all threads there will ever be, none of them in the guest."""
        for vcpu in self._vcpus:
            vcpu.start(held=True)

    def run(self) -> End:
        """Lets the guest go (a restored one stands still until it is resumed) and serves it until
        its end; every vCPU stands still afterwards."""
        for vcpu in self._vcpus:
            vcpu.let_go()
        self.loop.run()
        self._stop_vcpus()
        self._serial.flush()
        return self.ending.result

    def statistics(self) -> dict[str, int]:
        """Exits of all vCPUs by reason, and accesses that no device claimed."""
        counts: dict[str, int] = {}
        for vcpu in self._vcpus:
            for reason, count in vcpu.exits.items():
                name = f"exit_{_EXIT_NAMES.get(reason, str(reason))}"
                counts[name] = counts.get(name, 0) + count
        for name, bus in (("port", self._ports), ("memory", self._windows)):
            counts[f"unclaimed_{name}_reads"] = bus.unclaimed_reads
            counts[f"unclaimed_{name}_writes"] = bus.unclaimed_writes
        return counts

    def close(self) -> None:
        """Ends what still runs and gives everything back, guest memory last."""
        self._stop_vcpus()
        self._resources.close()

    def _stop_vcpus(self) -> None:
        for vcpu in self._vcpus:
            vcpu.kick()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for number, vcpu in enumerate(self._vcpus):
            if not vcpu.join(max(0.0, deadline - time.monotonic())):
                raise HostError(f"vCPU {number} did not stop within {STOP_TIMEOUT_S} s")
