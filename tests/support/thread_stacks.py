"""Stacks of a process's threads, as far as its mappings tell them."""

from __future__ import annotations

import resource
from pathlib import Path

_DEFAULT_KIB = 2048  # glibc's, where the limit is none


def stacks_of_default_size(pid: int) -> int:
    """How many mappings are as long as the stack that a thread gets when nobody asks."""
    limit, _ = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = _DEFAULT_KIB << 10 if limit == resource.RLIM_INFINITY else limit
    rows = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    # An anonymous one has no name behind its inode.
    ranges = [row[0].split("-") for row in rows if row[1] == "rw-p" and len(row) == 5]
    return sum(int(end, 16) - int(begin, 16) == wanted for begin, end in ranges)
