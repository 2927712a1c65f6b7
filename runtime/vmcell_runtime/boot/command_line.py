"""The kernel's command line: what follows from the machine the VMM gives, then the caller's part.

Linux takes the last of two equal arguments, so the caller may override all but the devices.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmcell_protos.errors import CallerError
from vmcell_runtime.layout import COMMAND_LINE_BYTES, VIRTIO_WINDOW_BYTES

MACHINE_ARGUMENTS = (
    "console=ttyS0",  # the only console
    "reboot=k",  # the only reset line is the keyboard controller's
    "panic=-1",  # a panic resets at once; the VMM has read why
    "8250.nr_uarts=1",  # do not look for three ports more
)


def command_line(caller: str, windows: Sequence[tuple[int, int]]) -> bytes:
    """The line with its NUL. `windows` is (gpa, GSI) of each virtio device, in order.

    Format of the devices: Documentation/admin-guide/kernel-parameters.txt, virtio_mmio.device.
    """
    size_kib = VIRTIO_WINDOW_BYTES // 1024
    devices = [f"virtio_mmio.device={size_kib}K@{gpa:#x}:{gsi}" for gpa, gsi in windows]
    line = " ".join([*MACHINE_ARGUMENTS, *devices, *caller.split()])
    if len(line) >= COMMAND_LINE_BYTES:
        raise CallerError(
            f"the kernel command line would have {len(line)} bytes; Linux takes "
            f"{COMMAND_LINE_BYTES - 1}"
        )
    return line.encode("ascii") + b"\0"
