"""Machines that QEMU's software CPU lost, by the logs in a dev VM's share.

Under it a Linux in a microVM ends now and then with a triple fault that nobody asked for, and, more
rarely, the dev VM's own kernel panics (docs/dev-vm.md, "What the software CPU gets wrong").
"""

from __future__ import annotations

import re
from pathlib import Path

_FAULT = re.compile(r'time="([^"]+)" [^\n]*VMM (\d+) ended: triple_fault')
_PANIC = re.compile(r"(\[ *\d+\.\d+\]) (Kernel panic) - not syncing")
CONSOLE = "console.log"


def faults(out: Path) -> set[tuple[str, str]]:
    """(time, VMM's pid) of each guest that ended so, by the logs in the dev VM's share."""
    found: set[tuple[str, str]] = set()
    for log in out.rglob("*.log"):
        found |= set(_FAULT.findall(log.read_text(errors="replace")))
    return found


def panics(out: Path) -> set[tuple[str, str]]:
    """(time, "Kernel panic") of the dev VM's own kernel, which has one at most."""
    try:
        return set(_PANIC.findall((out / CONSOLE).read_text(errors="replace")))
    except FileNotFoundError:
        return set()
