"""Entropy device (virtio 1.2 § 5.4): fills what the guest offers from the host's random pool."""

from __future__ import annotations

import os

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import abi, spans
from vmcell_runtime.virtio.device import PlainDevice
from vmcell_runtime.virtio.queue import Chain

MAX_REQUEST_BYTES = 64 << 10


class Rng(PlainDevice):
    """Owns nothing on the host."""

    device_id = abi.DEVICE_ID_ENTROPY
    features = 0
    queue_sizes = (16,)
    max_chain_bytes = MAX_REQUEST_BYTES
    config = b""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._activation = None

    def process(self, queue_index: int) -> bool:
        activation = self._activation
        if activation is None:
            return False
        queue = activation.queues[queue_index]

        def answer(chain: Chain) -> None:
            # A signal can make it fewer than asked for; what was not written is not said to be.
            data = os.getrandom(chain.writable_bytes)
            spans.write(self._memory, chain.writable, data)
            queue.complete(chain.head, len(data))

        more = queue.drain(answer)
        activation.link.signal(queue)
        return more
