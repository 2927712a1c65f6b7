"""File system device (virtio 1.2 § 5.11): a host directory, served by a vhost-user daemon.

The daemon moves requests and replies between the guest's queues and the host's files by itself, as
vhost-net does for frames. It may die or misbehave at any time. Linux ignores DEVICE_NEEDS_RESET and
waits for every FUSE request without end, killed or not, so a device that merely stopped would leave
processes in the guest that nothing can end. This one takes the queues over instead: what was
unanswered, and whatever is asked later, is answered with ENOTCONN, as FUSE itself does when its
daemon dies.
"""

from __future__ import annotations

import errno
import os
import struct
from functools import partial

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.loop import HANGUP, EventLoop, Soon
from vmcell_runtime.memory import GuestMemory
from vmcell_runtime.virtio import abi, spans
from vmcell_runtime.virtio.device import Activation, PlainDevice
from vmcell_runtime.virtio.queue import Chain, Queue
from vmcell_runtime.virtio.reporter import Report, Reporter
from vmcell_runtime.virtio.unanswered import FUSE_IN_HEADER, FUSE_OUT_HEADER, left_over
from vmcell_runtime.virtio.vhost_net import RING_FEATURES
from vmcell_runtime.virtio.vhost_user import FrontEnd, Ring

TAG_BYTES = 36
REQUEST_QUEUES = 1
_CONFIG = struct.Struct(f"<{TAG_BYTES}sI")


class Fs(PlainDevice):
    """One shared directory. Owns `front_end`; `call_fd`, the interrupt line's, stays its owner's.

    Making one negotiates with the daemon: HostError if it cannot serve. `report` gets a line when
    the daemon is lost.
    """

    device_id = abi.DEVICE_ID_FS
    features = abi.F_INDIRECT_DESC
    queue_sizes = (128, 1024)  # high priority (FUSE_FORGET), requests
    max_chain_bytes = 16 << 20  # only of what we refuse; a daemon has its own limits
    in_kernel = True

    def __init__(
        self,
        memory: GuestMemory,
        loop: EventLoop,
        front_end: FrontEnd,
        call_fd: int,
        *,
        tag: str,
        report: Report,
    ) -> None:
        if not memory.shared:
            raise CallerError("a vhost-user device needs guest memory that can be shared")
        self._memory = memory
        self._loop = loop
        self._front_end = front_end
        self._call_fd = call_fd
        self._report = Reporter(report)
        self.config = _CONFIG.pack(tag.encode(), REQUEST_QUEUES)
        self._activation = None
        self._refusing: Activation | None = None  # whose notifications the loop watches
        self._mourned = False
        self._settle_soon = Soon(loop, self._settle)
        front_end.negotiate()
        if RING_FEATURES & ~front_end.features:
            raise HostError("the vhost-user daemon lacks ring features that are offered to guests")
        self._watching_daemon = True
        loop.add(front_end.fileno(), self._on_hangup, HANGUP)

    def activate(self, activation: Activation) -> None:
        # Before the daemon starts: should it die at once, `_on_hangup` finds whom to answer.
        self._activation = activation
        rings = [
            Ring(queue.layout, kick_fd, self._call_fd)
            for queue, kick_fd in zip(activation.queues, activation.notify_fds, strict=True)
        ]
        try:
            self._front_end.start(activation.features, self._memory.shared_regions(), rings)
        except HostError as error:
            self._mourn(error)
            self._settle_soon()

    def process(self, queue_index: int) -> bool:
        raise AssertionError(f"the daemon takes the notifications of queue {queue_index} itself")

    def reset(self) -> None:
        activation, self._activation = self._activation, None
        if activation is None:
            return
        if not self._front_end.lost:
            try:
                self._front_end.stop(len(activation.queues))
            except HostError as error:
                self._mourn(error)
        self._settle_soon()

    def close(self) -> None:
        self._activation = None
        self._unwatch_unless_active()
        self._unwatch_daemon()
        self._front_end.close()

    # The daemon's end

    def _on_hangup(self, _events: int) -> None:
        self._unwatch_daemon()
        if not self._front_end.lost:
            self._front_end.lose("the vhost-user daemon has ended")
            self._mourn(HostError(self._front_end.lost))
        activation = self._activation
        if activation is not None:
            self._take_over(activation)

    def _settle(self) -> None:
        """What the driver's last steps left to do on the loop's thread."""
        self._unwatch_unless_active()
        activation = self._activation
        if activation is not None and self._front_end.lost:
            self._take_over(activation)

    def _mourn(self, error: HostError) -> None:
        if not self._mourned:
            self._mourned = True
            self._report(f"virtio-fs: {error}; the guest gets ENOTCONN from now on")

    def _take_over(self, activation: Activation) -> None:
        """On the loop's thread; nothing happens if that activation is over or taken over."""
        if self._refusing is not activation:
            activation.link.run(partial(self._refuse_all, activation))

    def _refuse_all(self, activation: Activation) -> None:
        """Answers what the daemon left, then all that is asked later."""
        self._unwatch_unless_active()
        for queue in activation.queues:
            left = left_over(self._memory, queue)
            if left.missing:
                self._report(f"virtio-fs: {left.missing} requests in flight were not found")
            heads = [chain.head for chain in left.chains]
            queue.resume(left.next_avail, left.used_index, heads)
            for chain in left.chains:
                self._refuse(queue, chain)
            activation.link.signal(queue)
        # The daemon may have died between giving a reply back and saying so.
        os.eventfd_write(self._call_fd, 1)
        self._refusing = activation
        for index, fd in enumerate(activation.notify_fds):
            notified = partial(self._on_notification, activation, index)
            self._loop.add(fd, activation.link.guard(notified))
            os.eventfd_write(fd, 1)

    def _on_notification(self, activation: Activation, index: int, _events: int) -> None:
        queue, fd = activation.queues[index], activation.notify_fds[index]
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            return
        more = queue.drain(partial(self._refuse, queue))
        activation.link.signal(queue)
        if more:
            os.eventfd_write(fd, 1)

    def _refuse(self, queue: Queue, chain: Chain) -> None:
        if chain.writable_bytes < FUSE_OUT_HEADER.size:
            queue.complete(chain.head, 0)  # FUSE_FORGET wants no reply
            return
        header, _ = spans.split(chain.readable, FUSE_IN_HEADER.size)
        _, _, unique = FUSE_IN_HEADER.unpack(spans.read(self._memory, header))
        reply = FUSE_OUT_HEADER.pack(FUSE_OUT_HEADER.size, -errno.ENOTCONN, unique)
        spans.write(self._memory, chain.writable, reply)
        queue.complete(chain.head, len(reply))

    def _unwatch_unless_active(self) -> None:
        refusing = self._refusing
        if refusing is not None and refusing is not self._activation:
            for fd in refusing.notify_fds:
                self._loop.remove(fd)
            self._refusing = None

    def _unwatch_daemon(self) -> None:
        if self._watching_daemon:
            self._loop.remove(self._front_end.fileno())
            self._watching_daemon = False
