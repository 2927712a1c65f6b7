"""The directory device between a driver that asks and a daemon that may die at any step."""

from __future__ import annotations

import errno
import os
import struct

from device_machine import DeviceMachine
from fake_back_end import FakeBackEnd, negotiation, started, stopped
from guest_driver import Buffer
from step_machine import Choices, machine_test, step

from vmcell_runtime.virtio.device import VirtioDevice
from vmcell_runtime.virtio.fs import Fs
from vmcell_runtime.virtio.vhost_user import FrontEnd

HIPRIO, REQUESTS = 0, 1
IN_HEADER, OUT_HEADER = "<IIQ24x", "<IiQ"


class FsMachine(DeviceMachine):
    """While the daemon lives the queues are its; once it is dead, every request that it had not
    answered, and every later one, is answered once, with ENOTCONN. A driver may begin again."""

    shared = True
    queue_sizes = (8, 16)

    def make(self, choices: Choices) -> VirtioDevice:
        self.back_end = FakeBackEnd()
        self.back_end.say(negotiation())
        self.front_end = FrontEnd(self.back_end.front)
        self.fds.append(call_fd := os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        self.call_fd = call_fd
        self.lines: list[str] = []
        report = self.lines.append
        fs = Fs(self.memory, self.loop, self.front_end, call_fd, tag="a", report=report)
        self.back_end.heard()
        self.dead = self.active = False
        self.unique = 0
        return fs

    def forget(self) -> None:
        self.asked: list[dict[int, int]] = [{}, {}]  # of each queue: head → unique of a request

    def start(self, choices: Choices) -> None:
        if not self.dead:
            # What it answers to the reset that a restart begins with, and to its beginning.
            self.back_end.say((stopped() if self.active else b"") + started())
        self.active = True
        super().start(choices)
        if not self.dead:
            self.back_end.heard()

    @step()
    def reset_only(self, choices: Choices) -> None:
        if not self.dead:
            self.back_end.say(stopped())
        self.active = False
        self.driver.set(0x70, 0)
        self.settle()
        self.start(choices)

    @step(6)
    def ask(self, choices: Choices) -> None:
        index = choices.below(2)
        queue = self.driver.queues[index]
        if len(queue.free) < 3:
            return
        self.unique += 2
        queue.next_buffer_gpa = queue.buffers_gpa + 0x1000 * queue.free[0]
        request = struct.pack(IN_HEADER, 40, 1 + choices.below(40), self.unique) + b"name\0"
        # Linux clears the room for a reply's header before it asks.
        room = [(queue.place(bytes(16))[0], 16)] if index == REQUESTS else []
        pieces = [queue.place(request[:40]), queue.place(request[40:])]
        buffer = queue.offer_spans(pieces, room, indirect=self.indirect and choices.flag())
        self.asked[index][buffer.head] = self.unique
        self.kick(index)

    @step(3)
    def collect_all(self, choices: Choices) -> None:
        self.settle()
        for index in (HIPRIO, REQUESTS):
            queue = self.driver.queues[index]
            done = queue.collect()
            assert self.dead or not done, "the device answered beside its daemon"
            for buffer, written in done:
                self._check(index, buffer, written)
            assert not self.dead or not self.asked[index], "a request has no answer"

    def _check(self, index: int, buffer: Buffer, written: int) -> None:
        unique = self.asked[index].pop(buffer.head)
        if not buffer.writable:
            assert written == 0
            return
        reply = struct.unpack(OUT_HEADER, self.driver.queues[index].contents(buffer))
        assert (written, reply) == (16, (16, -errno.ENOTCONN, unique))

    @step()
    def die(self, choices: Choices) -> None:
        if not self.dead and choices.flag():
            self.dead = True
            self.back_end.heard()
            self.back_end.end.close()
            self.memory.watching = False
            self.loop.settle()
            self.collect_all(choices)
            assert os.eventfd_read(self.call_fd)

    @step()
    def ask_without_header(self, choices: Choices) -> None:
        if self.dead and len(self.driver.queues[REQUESTS].free) > 2:
            self.collect_all(choices)
            self.driver.queues[REQUESTS].offer([bytes(choices.below(39) + 1)], [16])
            self.breaks(REQUESTS, "shorter than the 40", choices)

    @step()
    def jump(self, choices: Choices) -> None:
        if self.dead:
            queue = self.driver.queues[REQUESTS]
            jumped = (queue.avail_index + queue.size + 1 + choices.below(60_000)) & 0xFFFF
            self.memory.store16(queue.avail_gpa + 2, jumped)
            self.breaks(REQUESTS, "jumped", choices)

    def check(self) -> None:
        super().check()
        assert len([line for line in self.lines if "ENOTCONN" in line]) <= 1

    def tear_down(self) -> None:
        if not self.dead and hasattr(self, "driver"):
            self.back_end.say(stopped())
        super().tear_down()
        self.front_end.close()
        self.back_end.close()


test_fs = machine_test(FsMachine, "fs")
