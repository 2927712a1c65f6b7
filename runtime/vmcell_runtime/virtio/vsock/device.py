"""The socket device: the virtio side, and the ports the host offers and dials."""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from functools import partial

from vmcell_protos.errors import HostError
from vmcell_runtime.loop import EventLoop, Soon
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import abi
from vmcell_runtime.virtio.device import Activation, PlainDevice
from vmcell_runtime.virtio.queue import BUDGET_CHAINS
from vmcell_runtime.virtio.vsock import packet
from vmcell_runtime.virtio.vsock.mux import TX, Listeners, Mux
from vmcell_runtime.virtio.vsock.stream import OnResult, Stream

CONNECT_TIMEOUT_NS = 10_000_000_000
LAST_FLUSH_NS = 2_000_000_000


class Vsock(PlainDevice):
    """A guest's only socket to the host. Owns every host socket it was given.

    `connect` and `listen` are for the event loop's thread.
    """

    device_id = abi.DEVICE_ID_SOCKET
    features = 0  # streams only, which needs no feature bit
    queue_sizes = (256, 256, 16)  # receive, transmit, events
    max_chain_bytes = packet.MAX_PAYLOAD_BYTES + packet.HEADER_BYTES

    def __init__(self, memory: GuestMemory, loop: EventLoop, guest_cid: int) -> None:
        self._memory = memory
        self._loop = loop
        self._guest_cid = guest_cid
        self.config = struct.pack("<Q", guest_cid)
        self._listeners: Listeners = {}
        self._activation = None
        self._mux: Mux | None = None
        self._graveyard: list[Stream] = []
        self._bury_soon = Soon(loop, self._bury)

    def connect(
        self,
        guest_port: int,
        sock: socket.socket,
        on_result: OnResult,
        timeout_ns: int = CONNECT_TIMEOUT_NS,
    ) -> None:
        """Joins `sock`, a connected stream socket, to a new stream to `guest_port`.

        `on_result(None)` once the guest accepted, else with the error; then `sock` is closed.
        """
        activation, mux = self._activation, self._mux
        if activation is not None and mux is not None:
            dial = partial(mux.dial, guest_port, sock, on_result, timeout_ns)
            if activation.link.run(dial):
                return
        sock.close()
        error = HostError(f"vsock port {guest_port} cannot be reached: the guest has no driver yet")
        self._loop.call_soon(partial(on_result, error))

    def listen(self, host_port: int, sock: socket.socket) -> None:
        """Joins `sock` to the next connection the guest makes to `host_port`."""
        self._listeners.setdefault(host_port, deque()).append(sock)

    def activate(self, activation: Activation) -> None:
        self._mux = Mux(self._memory, self._loop, activation, self._guest_cid, self._listeners)
        self._activation = activation

    def process(self, queue_index: int) -> bool:
        return self._mux.process(queue_index) if self._mux is not None else False

    def reset(self) -> None:
        mux, self._mux, self._activation = self._mux, None, None
        if mux is not None:
            self._graveyard += mux.give_up()
            self._bury_soon()

    def tell_restored(self) -> None:
        if self._mux is not None:
            self._mux.reset_transport()

    def close(self) -> None:
        """What the guest sent before its end still reaches the host, if the host takes it soon."""
        activation, mux = self._activation, self._mux
        if activation is not None and mux is not None:
            activation.link.run(partial(_take_last_packets, mux))
        self.reset()
        deadline_ns = time.monotonic_ns() + LAST_FLUSH_NS
        for stream in self._graveyard:
            if not stream.closed:
                stream.flush_until(deadline_ns)
        self._bury()
        for waiting in self._listeners.values():
            for sock in waiting:
                sock.close()
        self._listeners.clear()

    def _bury(self) -> None:
        while self._graveyard:
            stream = self._graveyard.pop()
            stream.flush()
            stream.close()


def _take_last_packets(mux: Mux) -> None:
    # A guest that resets itself may be faster than its last notification. It stands still now, so
    # one queue full is all there can be.
    for _ in range(Vsock.queue_sizes[TX] // BUDGET_CHAINS + 1):
        if not mux.process(TX):
            break
