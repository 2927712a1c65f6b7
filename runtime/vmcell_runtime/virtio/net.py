"""Network device (virtio 1.2 § 5.1) over a TAP: one queue pair, checksums and TSO left to the host.

The TAP speaks the same 12-byte header as the guest (IFF_VNET_HDR), so frames pass with it. A frame
of the guest is copied once, checked (safety rule V9) and the copy is sent: the guest can change its
own page afterwards, but not what goes out. Frames to the guest go straight into guest pages.

Frames nobody can take are dropped as any network drops them; the TAP is read only while the guest
has room, so a flood waits, and is dropped, in the kernel.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from functools import partial

from vmcell_protos.errors import CallerError, GuestError, HostError
from vmcell_runtime.loop import EventLoop, Soon
from vmcell_runtime.memory import MAX_SPANS, GuestMemory, Span
from vmcell_runtime.virtio import abi, host_abi, spans
from vmcell_runtime.virtio.device import Activation, PlainDevice
from vmcell_runtime.virtio.host_ioctl import ioctl_bytes, ioctl_number
from vmcell_runtime.virtio.queue import BUDGET_CHAINS, Chain, Queue
from vmcell_runtime.virtio.vhost_net import RING_FEATURES, VhostNet

# Feature bits, § 5.1.3
F_CSUM = 1 << 0
F_GUEST_CSUM = 1 << 1
F_MTU = 1 << 3
F_MAC = 1 << 5
F_GUEST_TSO4 = 1 << 7
F_GUEST_TSO6 = 1 << 8
F_HOST_TSO4 = 1 << 11
F_HOST_TSO6 = 1 << 12
F_MRG_RXBUF = 1 << 15

# struct virtio_net_hdr, § 5.1.6
HEADER = struct.Struct("<BBHHHHH")
HEADER_FLAG_NEEDS_CSUM = 1
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
NUM_BUFFERS_OFFSET = 10
_NUM_BUFFERS = struct.Struct("<H")

ETHERNET_BYTES = 14
VLAN_BYTES = 4
MAX_FRAME_BYTES = HEADER.size + ETHERNET_BYTES + VLAN_BYTES + (64 << 10)
MIN_MTU, MAX_MTU = 68, 65535

RX, TX = 0, 1
_GSO_FEATURES = {GSO_TCPV4: F_HOST_TSO4, GSO_TCPV6: F_HOST_TSO6}
_TUN_OFFLOADS = {
    F_GUEST_CSUM: host_abi.TUN_F_CSUM,
    F_GUEST_TSO4: host_abi.TUN_F_TSO4,
    F_GUEST_TSO6: host_abi.TUN_F_TSO6,
}


class Net(PlainDevice):
    """One interface. Owns `tap_fd` (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, non-blocking) and `vhost`.

    `mac` is 6 bytes and the only source address the guest may use.
    """

    device_id = abi.DEVICE_ID_NET
    queue_sizes = (256, 256)
    # A receive buffer of a driver without F_MRG_RXBUF is 18 pages long.
    max_chain_bytes = 80 << 10

    def __init__(
        self,
        memory: GuestMemory,
        loop: EventLoop,
        tap_fd: int,
        *,
        mac: bytes,
        mtu: int,
        vhost: VhostNet | None = None,
    ) -> None:
        if len(mac) != 6 or mac[0] & 1:
            raise CallerError(f"{mac.hex(':')} is not the MAC address of one interface")
        if not MIN_MTU <= mtu <= MAX_MTU:
            raise CallerError(f"an MTU of {mtu} is not between {MIN_MTU} and {MAX_MTU}")
        self._memory = memory
        self._loop = loop
        self._tap_fd = tap_fd
        self._mac = mac
        self._mtu = mtu
        self._vhost = vhost
        self.in_kernel = vhost is not None
        self.features = (
            F_CSUM | F_GUEST_CSUM | F_MTU | F_MAC | F_MRG_RXBUF | abi.F_INDIRECT_DESC
        ) | (F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6)
        needed = RING_FEATURES | F_MRG_RXBUF
        if vhost is not None and needed & ~vhost.features:
            raise HostError("/dev/vhost-net of this host lacks ring features; run without it")
        self.config = struct.pack("<6sHHH", mac, 0, 0, mtu)
        self.dropped_frames = 0
        self._activation = None
        self._watching = False
        self._unwatch_soon = Soon(loop, self._unwatch_unless_active)
        self._spare: deque[Chain] = deque()
        ioctl_bytes(
            tap_fd,
            host_abi.TUNSETVNETHDRSZ,
            host_abi.INT.pack(HEADER.size),
            "setting the TAP's header size",
        )

    def activate(self, activation: Activation) -> None:
        self._activation = activation
        ioctl_number(
            self._tap_fd,
            host_abi.TUNSETOFFLOAD,
            _tun_offloads(activation.features),
            "setting the TAP's offloads",
        )
        if self._vhost is not None:
            self._vhost.start(activation, self._tap_fd)

    def process(self, queue_index: int) -> bool:
        activation = self._activation
        if activation is None:
            return False
        if queue_index == RX:
            self._receive(activation)
            return False
        transmit = activation.queues[TX]
        more = transmit.drain(partial(self._transmit, activation))
        activation.link.signal(transmit)
        return more

    def reset(self) -> None:
        activation, self._activation = self._activation, None
        self._spare.clear()
        if activation is not None and self._vhost is not None:
            self._vhost.stop(len(activation.queues))
        self._unwatch_soon()

    def suspend(self) -> tuple[tuple[int, int], ...]:
        activation = self._activation
        if activation is None:
            return ()
        if self._vhost is None:
            return tuple(queue.position for queue in activation.queues)
        self._vhost.stop(len(activation.queues))
        positions = self._vhost.positions(activation)
        for queue, (next_avail, used_index) in zip(activation.queues, positions, strict=True):
            queue.resume(next_avail, used_index, ())
        return positions

    def proceed(self) -> None:
        if self._activation is not None and self._vhost is not None:
            self._vhost.start(self._activation, self._tap_fd)

    def close(self) -> None:
        self._activation = None
        if self._tap_fd < 0:
            return
        self._watch(None)
        if self._vhost is not None:
            self._vhost.close()
        os.close(self._tap_fd)
        self._tap_fd = -1

    # Guest to host

    def _transmit(self, activation: Activation, chain: Chain) -> None:
        frame = spans.read(self._memory, chain.readable)
        activation.queues[TX].complete(chain.head, 0)
        self._check_frame(frame, activation.features)
        if frame[HEADER.size + 6 : HEADER.size + 12] != self._mac:
            self.dropped_frames += 1
            return
        try:
            os.write(self._tap_fd, frame)
        except OSError:
            # The interface is down or full, or the kernel finds the frame senseless: it is lost.
            self.dropped_frames += 1

    def _check_frame(self, frame: bytes, features: int) -> None:
        length = len(frame) - HEADER.size
        if length < ETHERNET_BYTES or len(frame) > MAX_FRAME_BYTES:
            raise GuestError(f"a network frame has {length} bytes")
        flags, gso_type, header_bytes, gso_size, start, offset, _ = HEADER.unpack_from(frame)
        if flags & HEADER_FLAG_NEEDS_CSUM and (
            not features & F_CSUM or start + offset + 2 > length
        ):
            raise GuestError(f"a checksum at {start} + {offset} is outside a frame of {length}")
        if gso_type == GSO_NONE:
            return
        if not features & _GSO_FEATURES.get(gso_type, 0):
            raise GuestError(f"segmentation type {gso_type} was not negotiated")
        if not gso_size or header_bytes > length or not flags & HEADER_FLAG_NEEDS_CSUM:
            raise GuestError(f"a frame to be cut in pieces of {gso_size} has no sane header")

    # Host to guest

    def _receive(self, activation: Activation) -> None:
        """Frames from the TAP while there are any and the guest has room, up to a budget."""
        queue = activation.queues[RX]
        for _ in range(BUDGET_CHAINS):
            chains = self._take_room(queue, activation.features)
            if chains is None:
                self._watch(None)
                break
            try:
                count = self._memory.readv(self._tap_fd, _pieces(chains))
            except BlockingIOError:
                self._spare.extendleft(reversed(chains))
                self._watch(activation)
                break
            except OSError:
                count = 0
            if not count:
                # The TAP was deleted under us, as when a pod's network is torn down first. To the
                # guest the cable is out; a sandbox about to end does not end with an error.
                self._spare.extendleft(reversed(chains))
                self._watch(None)
                break
            used = self._fill(queue, chains, count)
            self._spare.extendleft(reversed(chains[used:]))
        else:
            self._watch(activation)
        activation.link.signal(queue)

    def _take_room(self, queue: Queue, features: int) -> list[Chain] | None:
        """Buffers that hold any frame the TAP may have, or None: then the queue is armed."""
        needed = MAX_FRAME_BYTES
        if not features & (F_GUEST_TSO4 | F_GUEST_TSO6):
            needed = HEADER.size + ETHERNET_BYTES + VLAN_BYTES + self._mtu
        chains: list[Chain] = []
        room = pieces = 0
        while room < needed:
            chain = self._take(queue)
            if chain is None:
                self._spare.extendleft(reversed(chains))
                return None
            chains.append(chain)
            room += chain.writable_bytes
            pieces += len(chain.writable)
            if pieces > MAX_SPANS:
                raise GuestError(f"the room for one network frame has {pieces} pieces")
            if not features & F_MRG_RXBUF and room < needed:
                raise GuestError(f"a network receive buffer has {room} bytes of {needed}")
        return chains

    def _take(self, queue: Queue) -> Chain | None:
        if self._spare:
            return self._spare.popleft()
        chain = queue.pop()
        while chain is None:
            if not queue.arm():
                return None
            chain = queue.pop()
        if chain.writable_bytes < HEADER.size:
            raise GuestError(f"a network receive buffer has {chain.writable_bytes} bytes")
        return chain

    def _fill(self, queue: Queue, chains: list[Chain], count: int) -> int:
        """Completes the buffers that `count` bytes went into; how many they are."""
        used = 0
        left = count
        while left:
            chain = chains[used]
            length = min(left, chain.writable_bytes)
            queue.complete(chain.head, length)
            left -= length
            used += 1
        # The TAP leaves this field of the header alone.
        _, tail = spans.split(chains[0].writable, NUM_BUFFERS_OFFSET)
        spans.write(self._memory, tail, _NUM_BUFFERS.pack(used))
        return used

    def _watch(self, activation: Activation | None) -> None:
        """Has the loop call for frames, or not; on the loop's thread."""
        if activation is None and self._watching:
            self._loop.remove(self._tap_fd)
        elif activation is not None and not self._watching:
            self._loop.add(
                self._tap_fd, activation.link.guard(partial(self._on_frames, activation))
            )
        self._watching = activation is not None

    def _on_frames(self, activation: Activation, _events: int) -> None:
        self._receive(activation)

    def _unwatch_unless_active(self) -> None:
        if self._tap_fd >= 0:
            self._watch(None)
            activation = self._activation
            if activation is not None and self._vhost is None:
                activation.link.run(partial(self._receive, activation))


def _pieces(chains: list[Chain]) -> list[Span]:
    return [span for chain in chains for span in chain.writable]


def _tun_offloads(features: int) -> int:
    """What the guest lets the TAP leave undone; segments make no sense without checksums."""
    if not features & F_GUEST_CSUM:
        return 0
    return sum(flag for bit, flag in _TUN_OFFLOADS.items() if features & bit)
