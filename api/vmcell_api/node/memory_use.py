"""What memory of the host a sandbox has: its two processes, and guest RAM apart from them.

Source: proc_pid_smaps(5). Which processes they are stands in the shim's state.json. Guest RAM is
what the VMM maps without reserving (`nr`) and leaves out of core dumps (`dd`); nothing else is
both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from vmcell_protos.errors import HostError

MAX_STATE_BYTES = 1 << 20
# The file's words for the fields of MemorySum.
_WORDS = {
    "Rss": "rss",
    "Pss": "pss",
    "Shared_Clean": "shared_clean",
    "Shared_Dirty": "shared_dirty",
    "Private_Clean": "private_clean",
    "Private_Dirty": "private_dirty",
    "Swap": "swap",
}
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")
_RAM_FLAGS = {"nr", "dd"}


@dataclass(kw_only=True)
class MemorySum:
    """Bytes, added up over mappings."""

    rss: int = 0
    pss: int = 0
    shared_clean: int = 0
    shared_dirty: int = 0
    private_clean: int = 0
    private_dirty: int = 0
    swap: int = 0

    def add(self, other: MemorySum) -> None:
        """Adds the other's bytes."""
        for row in fields(self):
            setattr(self, row.name, getattr(self, row.name) + getattr(other, row.name))


@dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """`name` is "shim" or "vmm"; `own` is without `guest_ram`."""

    name: str
    pid: int
    own: MemorySum
    guest_ram: MemorySum


def read_memory(state_dir: str, namespace: str, container_id: str) -> list[ProcessMemory]:
    """The processes of a running sandbox; raises HostError when they cannot be looked at."""
    path = Path(state_dir, namespace, container_id, "state.json")
    try:
        with path.open("rb") as file:
            state = json.loads(file.read(MAX_STATE_BYTES))
        living = [(name, state[name]) for name in ("shim", "vmm") if state.get(name)]
        return [_process(name, int(pid), int(ticks)) for name, (pid, ticks) in living]
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise HostError(
            f"the memory of sandbox {container_id} cannot be read: {error}; does it still run?"
        ) from error


def _process(name: str, pid: int, ticks: int) -> ProcessMemory:
    """Raises OSError or ValueError when `pid` is another process by now, or none."""
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as smaps:
        # The file belongs to the process that has the pid now, and stays that one's.
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        if int(stat[stat.rindex(b")") + 2 :].split()[19]) != ticks:
            raise ValueError(f"{name} {pid} has ended")
        own, guest_ram = sum_mappings(smaps)
    return ProcessMemory(name=name, pid=pid, own=own, guest_ram=guest_ram)


def sum_mappings(lines: Iterable[str]) -> tuple[MemorySum, MemorySum]:
    """(all but guest RAM, guest RAM) of the lines of an smaps file."""
    own, guest_ram, one = MemorySum(), MemorySum(), MemorySum()
    for line in lines:
        if _MAPPING.match(line):
            one = MemorySum()
            continue
        word, _, rest = line.partition(":")
        if word in _WORDS:
            setattr(one, _WORDS[word], int(rest.split()[0]) * 1024)
        elif word == "VmFlags":  # the last line of each mapping
            (guest_ram if set(rest.split()) >= _RAM_FLAGS else own).add(one)
    return own, guest_ram
