"""Balloon (virtio 1.2 § 5.5): memory the guest gives back to the host, and takes again.

The host asks for an amount (`num_pages`), the driver tells page numbers as it gives pages up, and
free page reporting names pages that happen to be free without being asked for. All of them leave
the host's memory at once and read as something old when they are used again (zero, or what a
snapshot had there), so the driver may take them back without asking.

Queues are numbered without gaps, as Linux does it (drivers/virtio/virtio_mmio.c): the queues of
features that are not offered, statistics and free page hints, have no number.
"""

from __future__ import annotations

import struct

from vmcell_protos.errors import CallerError, GuestError
from vmcell_runtime.config import MIN_MEMORY_MIB
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.page_map import PAGE_BYTES
from vmcell_runtime.virtio import abi, spans
from vmcell_runtime.virtio.device import PlainDevice
from vmcell_runtime.virtio.queue import Chain

# Feature bits, § 5.5.3
F_DEFLATE_ON_OOM = 1 << 2
F_REPORTING = 1 << 5

INFLATE, DEFLATE, REPORTING = range(3)

MAX_NUMBERS_BYTES = 1024  # of page numbers in one buffer: what Linux sends. Each is an madvise()
MAX_REPORT_BYTES = 128 << 20  # one report of Linux: 32 blocks of at most 4 MiB
BUDGETS = {INFLATE: 4, DEFLATE: 4, REPORTING: 1}  # chains at one wake: some milliseconds of work
PAGES_PER_MIB = (1 << 20) // PAGE_BYTES  # the device's pages have 4 KiB whatever the guest's have

_ACTUAL_OFFSET = 4


class Balloon(PlainDevice):
    """Owns nothing on the host. `set_wanted` and the sizes are for the loop's thread.

    What the guest says it has given back is its word only; what left the host is what it named.
    """

    device_id = abi.DEVICE_ID_BALLOON
    features = F_DEFLATE_ON_OOM | F_REPORTING
    queue_sizes = (64, 64, 64)
    max_chain_bytes = MAX_REPORT_BYTES

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._wanted_pages = 0
        self._actual_pages = 0
        self._activation = None

    @property
    def config(self) -> bytes:
        return struct.pack("<II", self._wanted_pages, self._actual_pages)

    @property
    def wanted_mib(self) -> int:
        """What the guest was asked to give back."""
        return self._wanted_pages // PAGES_PER_MIB

    @property
    def actual_mib(self) -> int:
        """What the guest says it has given back, never more than it has."""
        pages = min(self._actual_pages, self._memory.ram_bytes // PAGE_BYTES)
        return pages // PAGES_PER_MIB

    def set_wanted(self, mib: int) -> None:
        """Asks for so much; a driver that comes later finds it in the configuration.

        CallerError if less than the smallest guest would be left.
        """
        memory_mib = self._memory.ram_bytes >> 20
        most_mib = max(0, memory_mib - MIN_MEMORY_MIB)
        if mib > most_mib:
            raise CallerError(
                f"the balloon is to take {mib} of {memory_mib} MiB; take at most {most_mib}"
            )
        self._wanted_pages = mib * PAGES_PER_MIB
        activation = self._activation
        if activation is not None:
            activation.link.config_changed()

    def queue_count(self, features: int) -> int:
        return 3 if features & F_REPORTING else 2

    def write_config(self, offset: int, data: bytes) -> bool:
        if offset != _ACTUAL_OFFSET or len(data) != 4:
            return False
        self._actual_pages = int.from_bytes(data, "little")
        return True

    def process(self, queue_index: int) -> bool:
        activation = self._activation
        if activation is None or queue_index >= len(activation.queues):
            return False
        queue = activation.queues[queue_index]
        take = {INFLATE: self._inflate, DEFLATE: self._deflate, REPORTING: self._report}

        def answer(chain: Chain) -> None:
            take[queue_index](chain)
            queue.complete(chain.head, 0)

        more = queue.drain(answer, BUDGETS[queue_index])
        activation.link.signal(queue)
        return more

    def remembered(self) -> dict[str, int]:
        return {"wanted_pages": self._wanted_pages, "actual_pages": self._actual_pages}

    def remember(self, own: dict[str, int]) -> None:
        wanted, actual = own.get("wanted_pages", -1), own.get("actual_pages", -1)
        if not 0 <= wanted <= self._memory.ram_bytes // PAGE_BYTES or not 0 <= actual < 1 << 32:
            raise CallerError(f"a balloon of {wanted} wanted and {actual} actual pages cannot be")
        self._wanted_pages, self._actual_pages = wanted, actual

    def reset(self) -> None:
        self._activation = None
        self._actual_pages = 0

    def _inflate(self, chain: Chain) -> None:
        for first, count in _runs(self._page_numbers(chain)):
            self._memory.discard(first * PAGE_BYTES, count * PAGE_BYTES)

    def _deflate(self, chain: Chain) -> None:
        """Nothing to do: a page is there as soon as it is touched."""

    def _report(self, chain: Chain) -> None:
        for gpa, length in chain.writable:
            self._memory.discard(gpa, length)

    def _page_numbers(self, chain: Chain) -> list[int]:
        length = chain.readable_bytes
        if length > MAX_NUMBERS_BYTES or length % 4:
            raise GuestError(f"a balloon buffer has {length} bytes of page numbers")
        return [n for (n,) in struct.iter_unpack("<I", spans.read(self._memory, chain.readable))]


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """(first, count) of each run of neighbours: Linux allocates upwards and downwards."""
    runs: list[tuple[int, int]] = []
    for page in sorted(set(pages)):
        if runs and page == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs
