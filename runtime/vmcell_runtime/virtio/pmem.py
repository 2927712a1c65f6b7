"""Persistent memory (virtio 1.2 § 5.19): tells the guest where an image is mapped.

The image itself is a read-only KVM memory slot, so reading it never comes here. All there is to
answer is the flush request, and for memory nobody can write it has always succeeded.
"""

from __future__ import annotations

import struct

from vmcell_protos.errors import GuestError
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import abi, spans
from vmcell_runtime.virtio.device import PlainDevice
from vmcell_runtime.virtio.queue import Chain

REQUEST_FLUSH = 0
RESPONSE_OK = 0
RESPONSE_BAD = 1  # anything but 0 is an error to the driver
_WORD = struct.Struct("<I")


class Pmem(PlainDevice):
    """One read-only image at `gpa`, `length_bytes` long. Owns nothing on the host."""

    device_id = abi.DEVICE_ID_PMEM
    features = 0
    queue_sizes = (64,)
    max_chain_bytes = 4096

    def __init__(self, memory: GuestMemory, gpa: int, length_bytes: int) -> None:
        self._memory = memory
        self.config = struct.pack("<QQ", gpa, length_bytes)
        self._activation = None

    def process(self, queue_index: int) -> bool:
        activation = self._activation
        if activation is None:
            return False
        queue = activation.queues[queue_index]

        def answer(chain: Chain) -> None:
            queue.complete(chain.head, self._answer(chain))

        more = queue.drain(answer)
        activation.link.signal(queue)
        return more

    def _answer(self, chain: Chain) -> int:
        if chain.readable_bytes < _WORD.size or chain.writable_bytes < _WORD.size:
            raise GuestError("a pmem request lacks room for its type or its answer")
        header, _ = spans.split(chain.readable, _WORD.size)
        (kind,) = _WORD.unpack(spans.read(self._memory, header))
        result = RESPONSE_OK if kind == REQUEST_FLUSH else RESPONSE_BAD
        spans.write(self._memory, chain.writable, _WORD.pack(result))
        return _WORD.size
