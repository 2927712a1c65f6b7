"""The network device against two lists of frames: what went out, and what came in."""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from contextlib import suppress

import pytest
from device_machine import DeviceMachine
from guest_driver import Buffer
from step_machine import Choices, machine_test, step

from vmcell_runtime.virtio import net
from vmcell_runtime.virtio.device import VirtioDevice
from vmcell_runtime.virtio.net import Net

MAC = bytes.fromhex("02c0ffee0001")
PEER = bytes.fromhex("02c0ffee0002")
CSUM, GUEST_TSO, HOST_TSO4, MRG_RXBUF = 1, 1 << 7 | 1 << 8, 1 << 11, 1 << 15
RX, TX = 0, 1
MTU = 1500
HEADER_BYTES = 12


class NetMachine(DeviceMachine):
    """Frames with the right source go out once, in order, as they were; others and nonsense do not.

    Frames from outside arrive whole and in order whatever the buffers' sizes; while the guest has
    no room they wait outside.
    """

    queue_sizes = (8, 16)

    def make(self, choices: Choices) -> VirtioDevice:
        tap, self.world = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (tap, self.world):
            end.setblocking(False)
        self.coming: deque[bytes] = deque()
        self.number = 0
        self.dropped = 0
        self.net = Net(self.memory, self.loop, tap.detach(), mac=MAC, mtu=MTU)
        return self.net

    def adjust(self, features: int, choices: Choices) -> int:
        for feature in (CSUM, MRG_RXBUF, HOST_TSO4):
            if choices.flag(4):
                features &= ~feature
        # Without it one buffer need not hold 64 KiB, which is what these here are.
        self.features = features & ~GUEST_TSO
        return self.features

    def forget(self) -> None:
        self.outgoing: list[tuple[Buffer, bytes]] = []

    def start(self, choices: Choices) -> None:
        if self.driver.queues:
            self.take_frames()
            self.take_sent()
        super().start(choices)

    # Guest to host

    @step(5)
    def send(self, choices: Choices) -> None:
        queue = self.driver.queues[TX]
        if len(queue.free) < 5:
            return
        self.number += 1
        source = MAC if not choices.flag(6) else bytes(6)
        payload = struct.pack("<I", self.number) * (1 + choices.below(30))
        frame = bytes(HEADER_BYTES) + PEER + source + b"\x08\x00" + payload
        queue.next_buffer_gpa = queue.buffers_gpa + 0x1000 * queue.free[0]
        pieces = [queue.place(piece) for piece in self.cut(frame, choices)]
        buffer = queue.offer_spans(pieces, indirect=self.indirect and choices.flag())
        self.outgoing.append((buffer, frame if source == MAC else b""))

    @step(4)
    def work(self, choices: Choices) -> None:
        self.kick(TX)
        self.take_sent()
        assert not self.outgoing

    def take_sent(self) -> None:
        """Buffers that came back are those of the frames outside."""
        for buffer, written in self.driver.queues[TX].collect():
            expected, frame = self.outgoing.pop(0)
            assert (buffer, written) == (expected, 0)
            if frame:
                assert self.world.recv(1 << 17) == frame
            else:
                self.dropped += 1
        assert self.net.dropped_frames == self.dropped

    @step()
    def send_nonsense(self, choices: Choices) -> None:
        if self.outgoing:
            return
        flags, gso, header, size, start, offset = choices.of(
            [
                (1, 0, 0, 0, 0xFFFF, 0xFFFF),
                (1, 1, 54, 0, 14, 4),
                (1, 1, 5000, 1000, 14, 4),
                (0, 1, 54, 1000, 14, 4),
                (1, 3, 54, 1000, 14, 4),
                (1, 0x81, 54, 1000, 14, 4),
                (0, 0, 0, 0, 0, 0),
            ]
        )
        head = struct.pack("<BBHHHHH", flags, gso, header, size, start, offset, 0)
        body = PEER + MAC + b"\x08\x00" + bytes(60) if flags or gso else bytes(choices.below(14))
        self.driver.queues[TX].offer([(head + body)[choices.of([0, 0, 1]) * 80 :]])
        self.breaks_sending(choices)

    def breaks_sending(self, choices: Choices) -> None:
        self.kick(TX)
        assert self.driver.needs_reset
        with pytest.raises(BlockingIOError):
            self.world.recv(1)
        self.start(choices)

    # Host to guest

    @step(4)
    def arrive(self, choices: Choices) -> None:
        self.number += 1
        payload = struct.pack("<I", self.number) * (1 + choices.below(350))
        frame = bytes(HEADER_BYTES) + MAC + PEER + b"\x08\x00" + payload
        with suppress(BlockingIOError):
            self.world.send(frame)
            self.coming.append(frame)

    @step(5)
    def give_room(self, choices: Choices) -> None:
        queue = self.driver.queues[RX]
        for _ in range(1 + choices.below(6)):
            if len(queue.free) < 2:
                return
            length = 2048 if not self.features & MRG_RXBUF else choices.of([16, 100, 600, 2048])
            place = queue.buffers_gpa + 0x1000 * queue.free[0] + 1
            span = self.room(queue, length, place)
            first = choices.below(length)
            pieces = [(span[0], first), (span[0] + first, length - first)] if first else [span]
            queue.next_buffer_gpa = queue.buffers_gpa + 0x20_0000 + 0x100 * queue.free[0]
            queue.offer_spans(writable=pieces, indirect=self.indirect and choices.flag())
        self.kick(RX)

    @step(4)
    def take_frames(self, choices: Choices | None = None) -> None:
        self.settle()
        done = self.driver.queues[RX].collect()
        while done:
            first, written = done[0]
            whole = self._content(first)[:written]
            [count] = struct.unpack_from("<H", whole, 10)
            frame = whole + b"".join(self._content(b)[:n] for b, n in done[1:count])
            del done[:count]
            expected = self.coming.popleft()
            assert frame == expected[:10] + struct.pack("<H", count) + expected[12:]
            assert count == 1 or self.features & MRG_RXBUF

    def _content(self, buffer: Buffer) -> bytes:
        gpa = buffer.writable[0][0]
        return self.check_room((gpa, sum(length for _, length in buffer.writable)))

    @step()
    def give_crumbs(self, choices: Choices) -> None:
        """Less room than a header: what arrived is lost with the device, as with any reset."""
        self.take_frames()
        if self.driver.queues[RX].free:
            self.driver.queues[RX].offer(writable=[1 + choices.below(11)])
            self.kick(RX)
            if self.driver.needs_reset:
                self._lose_what_came(choices)
            else:
                self.start(choices)

    def _lose_what_came(self, choices: Choices) -> None:
        with suppress(BlockingIOError):
            while True:
                os.read(self.net._tap_fd, 1 << 17)
        self.coming.clear()
        self.driver.queues[RX].collect()
        self.start(choices)

    def tear_down(self) -> None:
        super().tear_down()
        self.world.close()


run_frames = machine_test(NetMachine, "net")


@pytest.mark.timeout(900)
def test_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """A datagram socket is the TAP; it knows no ioctl."""
    monkeypatch.setattr(net, "ioctl_bytes", lambda *_: b"")
    monkeypatch.setattr(net, "ioctl_number", lambda *_: None)
    run_frames()
