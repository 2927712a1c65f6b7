"""Runs inside the dev VM: boots a Linux on the VMM and says as JSON how it went.

usage: linux_boot.py KERNEL VCPUS MEMORY_MIB COMMAND_LINE [IMAGE]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

from vmcell_runtime.config import MachineConfig, PmemConfig
from vmcell_runtime.handle import spawn

DEADLINE_S = 120


def main(kernel: str, vcpus: str, memory_mib: str, command_line: str, *images: str) -> None:
    """Boots, waits for the end, prints."""
    with tempfile.TemporaryFile() as console, tempfile.TemporaryFile() as log:
        files = [open(path, "rb") for path in (kernel, *images)]  # noqa: SIM115, one process
        config = MachineConfig(
            vcpu_count=int(vcpus),
            memory_mib=int(memory_mib),
            kernel_descriptor=0,
            command_line=command_line,
            console_descriptor=1,
            pmem=tuple(PmemConfig(descriptor=2 + n) for n in range(len(images))),
        )
        descriptors = [files[0].fileno(), console.fileno(), *(f.fileno() for f in files[1:])]
        start = time.monotonic()
        vmm = spawn(config, descriptors, log_fd=log.fileno())
        ended = vmm.wait_exit(DEADLINE_S)
        seconds = time.monotonic() - start
        vmm.close()
        found = {
            "reason": ended.reason,
            "detail": ended.detail,
            "seconds": round(seconds, 2),
            "counts": counts(os.pread(log.fileno(), 1 << 16, 0).decode()),
            "console": os.pread(console.fileno(), 1 << 20, 0).decode(errors="replace"),
        }
        json.dump(found, sys.stdout)


def counts(log: str) -> dict[str, int]:
    """The name=number words of the VMM's last line."""
    words = log.rsplit("(", 1)[-1].rstrip(")\n").split()
    return {name: int(value) for name, _, value in (word.partition("=") for word in words)}


if __name__ == "__main__":
    main(*sys.argv[1:])
