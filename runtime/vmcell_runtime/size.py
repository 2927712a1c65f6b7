"""How large a machine is: all that KVM has to be told of it before it has devices or a guest.

It travels as decimal words, and machines of the same words have the same memory slots, vCPUs and
interrupt lines, whatever their files are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from vmcell_protos.errors import CallerError
from vmcell_runtime.config import (
    MAX_MEMORY_MIB,
    MAX_PMEM,
    MAX_SPARE_WINDOWS,
    MAX_VCPUS,
    MIN_MEMORY_MIB,
    MachineConfig,
)
from vmcell_runtime.memory import HUGE_PAGE_BYTES, window_bytes

MAX_FIXED_WINDOWS = 64
MAX_PMEM_BYTES = 1 << 44
_FIXED_WORDS = 5


class Size(NamedTuple):
    """`shared_memory`: another process maps the RAM. `pmem_bytes`: the length of each image's
    window, a multiple of 2 MiB. Windows as in `MachineConfig`."""

    vcpu_count: int
    memory_mib: int
    shared_memory: bool
    fixed_windows: int
    spare_windows: int
    pmem_bytes: tuple[int, ...]


def size_of(config: MachineConfig, descriptors: Sequence[int]) -> Size:
    """The size of the machine that `config` describes, with its `descriptors`. CallerError for an
    image without content."""
    return Size(
        vcpu_count=config.vcpu_count,
        memory_mib=config.memory_mib,
        shared_memory=bool(config.fs),
        fixed_windows=config.fixed_windows,
        spare_windows=config.spare_windows,
        pmem_bytes=tuple(
            window_bytes(os.fstat(descriptors[pmem.descriptor]).st_size) for pmem in config.pmem
        ),
    )


def size_words(size: Size) -> list[bytes]:
    """`size` as it travels."""
    *numbers, pmem_bytes = size
    return [str(int(number)).encode() for number in (*numbers, *pmem_bytes)]


def size_from_words(words: Sequence[bytes]) -> Size:
    """CallerError for what is not the size of any machine."""
    count = len(words) - _FIXED_WORDS
    if not 0 <= count <= MAX_PMEM or not all(w.isdigit() and len(w) <= 20 for w in words):
        raise CallerError(f"{words[:16]!r} is not the size of a machine")
    vcpus, mib, shared, fixed, spare, *pmem_bytes = map(int, words)
    limits = (
        ("vcpu_count", vcpus, 1, MAX_VCPUS),
        ("memory_mib", mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB),
        ("shared_memory", shared, 0, 1),
        ("fixed_windows", fixed, 1, MAX_FIXED_WINDOWS),
        ("spare_windows", spare, 0, MAX_SPARE_WINDOWS),
        *(("pmem_bytes", length, HUGE_PAGE_BYTES, MAX_PMEM_BYTES) for length in pmem_bytes),
    )
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise CallerError(f"{name} of a machine's size is {value}; give {low} to {high}")
    if any(length % HUGE_PAGE_BYTES for length in pmem_bytes):
        raise CallerError(
            f"pmem_bytes of a machine's size is {pmem_bytes}; give multiples of 2 MiB"
        )
    return Size(vcpus, mib, bool(shared), fixed, spare, tuple(pmem_bytes))
