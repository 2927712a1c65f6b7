"""vhost-net: the host's kernel moves frames between the guest's queues and the TAP by itself.

It gets what user space would have worked with: the memory map, the rings, the notification
eventfds, and as "call" descriptor the eventfd of the interrupt line. Nothing of a frame passes this
process then, so neither do its checks (source address): nftables on the TAP has to do them.

Source: <linux/vhost.h>; drivers/vhost/{vhost,net}.c of Linux 6.1.
"""

from __future__ import annotations

import os

from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import abi, host_abi
from vmcell_runtime.virtio.device import Activation
from vmcell_runtime.virtio.host_ioctl import ioctl_bytes, ioctl_number
from vmcell_runtime.virtio.queue import Queue


class VhostNet:
    """One /dev/vhost-net. Owns `fd`; `call_fd` is the interrupt line's eventfd and stays its.

    Making one claims the descriptor for this process (VHOST_SET_OWNER). HostError as it fails.
    Guest memory is pinned until `close`.
    """

    def __init__(self, memory: GuestMemory, fd: int, call_fd: int) -> None:
        self._memory = memory
        self._fd = fd
        self._call_fd = call_fd
        ioctl_number(fd, host_abi.VHOST_SET_OWNER, 0, "claiming /dev/vhost-net")
        answer = ioctl_bytes(
            fd, host_abi.VHOST_GET_FEATURES, bytes(host_abi.U64.size), "asking vhost-net"
        )
        (self.features,) = host_abi.U64.unpack(answer)
        memory.pin()

    def start(self, activation: Activation, tap_fd: int) -> None:
        """Hands the queues of one activation and the TAP to the kernel."""
        features = activation.features & self.features
        self._set(host_abi.VHOST_SET_FEATURES, host_abi.U64.pack(features))
        self._set(host_abi.VHOST_SET_MEM_TABLE, self._memory_table())
        for index, queue in enumerate(activation.queues):
            self._set_up_ring(index, queue, activation.notify_fds[index])
        for index in range(len(activation.queues)):
            self._set_backend(index, tap_fd)

    def stop(self, queues: int) -> None:
        """Takes the TAP away; when it returns the kernel touches the rings no more."""
        for index in range(queues):
            self._set_backend(index, host_abi.VHOST_FILE_UNBIND)

    def positions(self, activation: Activation) -> tuple[tuple[int, int], ...]:
        """(next to take, next to give back) of each queue after `stop`.

        The kernel keeps the second in the used ring alone (drivers/vhost/vhost.c,
        vhost_vq_init_access).
        """
        state = host_abi.vhost_vring_state
        found = []
        for index, queue in enumerate(activation.queues):
            answer = ioctl_bytes(
                self._fd,
                host_abi.VHOST_GET_VRING_BASE,
                state.pack(index, 0),
                "asking vhost-net where it stands",
            )
            used_index = self._memory.load16(queue.layout.device_gpa + 2)
            found.append((state.unpack(answer)[1] & 0xFFFF, used_index))
        return tuple(found)

    def close(self) -> None:
        """Idempotent; closing the descriptor stops the kernel's work if it was still going on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._memory.unpin()

    def _memory_table(self) -> bytes:
        regions = [
            host_abi.vhost_memory_region.pack(slot.gpa, slot.length_bytes, slot.host_address, 0)
            for slot in self._memory.slots()
            if not slot.read_only
        ]
        return host_abi.vhost_memory.pack(len(regions), 0) + b"".join(regions)

    def _set_up_ring(self, index: int, queue: Queue, kick_fd: int) -> None:
        state, file = host_abi.vhost_vring_state, host_abi.vhost_vring_file
        layout = queue.layout
        descriptor, driver, device = [
            self._memory.host_address(gpa, length) for gpa, length, _ in layout.areas()
        ]
        address = host_abi.vhost_vring_addr.pack(index, 0, descriptor, device, driver, 0)
        self._set(host_abi.VHOST_SET_VRING_NUM, state.pack(index, layout.size))
        self._set(host_abi.VHOST_SET_VRING_BASE, state.pack(index, queue.position[0]))
        self._set(host_abi.VHOST_SET_VRING_ADDR, address)
        self._set(host_abi.VHOST_SET_VRING_KICK, file.pack(index, kick_fd))
        self._set(host_abi.VHOST_SET_VRING_CALL, file.pack(index, self._call_fd))

    def _set_backend(self, index: int, tap_fd: int) -> None:
        self._set(host_abi.VHOST_NET_SET_BACKEND, host_abi.vhost_vring_file.pack(index, tap_fd))

    def _set(self, request: int, argument: bytes) -> None:
        ioctl_bytes(self._fd, request, argument, f"vhost-net request {request & 0xFF:#x}")


RING_FEATURES = abi.F_VERSION_1 | abi.F_EVENT_IDX | abi.F_INDIRECT_DESC
"""What the transport and the queues offer whoever moves the frames; vhost-net must know it."""
