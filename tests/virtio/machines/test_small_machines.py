"""Entropy, image and balloon against what each promises."""

from __future__ import annotations

import struct

from device_machine import SENTINEL, DeviceMachine
from guest_driver import BUFFERS_GPA, RAM_BYTES, Buffer
from step_machine import Choices, machine_test, step

from vmcell_runtime.memory import PAGE_BYTES
from vmcell_runtime.virtio.balloon import Balloon
from vmcell_runtime.virtio.device import VirtioDevice
from vmcell_runtime.virtio.pmem import Pmem
from vmcell_runtime.virtio.rng import Rng

SPACING = 0x400


class RngMachine(DeviceMachine):
    """Every buffer comes back once, in order, filled to its end."""

    def make(self, choices: Choices) -> VirtioDevice:
        return Rng(self.memory)

    def forget(self) -> None:
        self.offered: list[Buffer] = []

    @step(6)
    def offer(self, choices: Choices) -> None:
        queue = self.driver.queues[0]
        count = 1 if self.indirect else min(3, len(queue.free))
        if not queue.free:
            return
        place = BUFFERS_GPA + 0x1000 * queue.free[0] + 1
        spans = [
            self.room(queue, 1 + choices.below(300), place + SPACING * number)
            for number in range(1 + choices.below(count))
        ]
        queue.next_buffer_gpa = BUFFERS_GPA + 0x20_0000 + 0x100 * queue.free[0]
        indirect = self.indirect and choices.flag()
        self.offered.append(queue.offer_spans(writable=spans, indirect=indirect))

    @step(4)
    def work(self, choices: Choices) -> None:
        self.kick(0)
        done = self.driver.queues[0].collect()
        assert [buffer for buffer, _ in done] == self.offered
        for buffer, written in done:
            assert written == sum(length for _, length in buffer.writable)
            whole = b"".join(map(self.check_room, buffer.writable))
            assert len(whole) < 16 or whole.strip(bytes([SENTINEL])), "nothing was written"
        self.offered = []

    @step()
    def ask_too_much(self, choices: Choices) -> None:
        if not self.offered:
            length = (64 << 10) + 1 + choices.below(1 << 20)
            self.driver.queues[0].offer_spans(writable=[(BUFFERS_GPA, length)])
            self.breaks(0, "longer than 65536 bytes", choices)

    @step()
    def ask_outside_ram(self, choices: Choices) -> None:
        if not self.offered:
            gpa = choices.of([RAM_BYTES - 4, RAM_BYTES, 1 << 40, 2**64 - 8])
            self.driver.queues[0].offer_spans(writable=[(gpa, 8)])
            self.breaks(0, "not inside one RAM slot", choices)


class PmemMachine(DeviceMachine):
    """A flush has always succeeded; anything else is an error to the driver."""

    queue_sizes = (0, 8)

    def make(self, choices: Choices) -> VirtioDevice:
        return Pmem(self.memory, 4 << 30, 2 << 20)

    def forget(self) -> None:
        self.offered: list[tuple[Buffer, int]] = []

    @step(6)
    def ask(self, choices: Choices) -> None:
        queue = self.driver.queues[0]
        if len(queue.free) < 6:
            return
        kind = choices.of([0, 0, 1, 2, 0xFFFF_FFFF])
        place = BUFFERS_GPA + 0x1000 * queue.free[0]
        queue.next_buffer_gpa = place
        pieces = self.cut(struct.pack("<I", kind) + bytes(choices.below(8)), choices)
        readable = [queue.place(piece) for piece in pieces]
        room = self.room(queue, 4 + choices.below(8), place + 0x801)
        indirect = self.indirect and choices.flag()
        self.offered.append((queue.offer_spans(readable, [room], indirect=indirect), kind))

    @step(4)
    def work(self, choices: Choices) -> None:
        self.kick(0)
        done = self.driver.queues[0].collect()
        assert [buffer for buffer, _ in done] == [buffer for buffer, _ in self.offered]
        for (buffer, written), (_, kind) in zip(done, self.offered, strict=True):
            answer = self.check_room(buffer.writable[0])
            assert written == 4
            assert struct.unpack("<I", answer[:4]) == (int(kind != 0),)
            assert not answer[4:].strip(bytes([SENTINEL])), "more than the answer was written"
        self.offered = []

    @step()
    def ask_without_room(self, choices: Choices) -> None:
        if not self.offered:
            short = choices.below(4)
            queue = self.driver.queues[0]
            queue.offer([bytes(4)] if short else [bytes(3)], [short] if short else [4])
            self.breaks(0, "lacks room", choices)

    @step()
    def ask_with_a_page_more(self, choices: Choices) -> None:
        if not self.offered:
            self.driver.queues[0].offer([bytes(4)], [4093 + choices.below(100)])
            self.breaks(0, "longer than 4096 bytes", choices)


PLAYGROUND = RAM_BYTES // 2
PLAY_PAGES = 16
INFLATE, DEFLATE, REPORTING = 0, 1, 2
REPORTING_FEATURE = 1 << 5


class BalloonMachine(DeviceMachine):
    """What the guest names leaves the host at once and reads as zero; nothing else changes."""

    queue_sizes = (0, 8)

    def make(self, choices: Choices) -> VirtioDevice:
        self.balloon = Balloon(self.memory)
        self.wanted = self.actual = self.generation = 0
        for page in range(PLAY_PAGES):
            self._fill(page)
        return self.balloon

    def _fill(self, page: int) -> None:
        self.memory.write(PLAYGROUND + page * PAGE_BYTES, bytes([page + 1]) * PAGE_BYTES)

    def forget(self) -> None:
        self.gone: set[int] = set()
        self.actual = 0

    def adjust(self, features: int, choices: Choices) -> int:
        if choices.flag(4):
            self.features &= ~REPORTING_FEATURE
        return self.features

    def start(self, choices: Choices) -> None:
        for page in getattr(self, "gone", ()):
            self._fill(page)
        super().start(choices)

    @step(4)
    def give_up(self, choices: Choices) -> None:
        pages = [choices.below(PLAY_PAGES) for _ in range(1 + choices.below(5))]
        numbers = struct.pack(f"<{len(pages)}I", *(PLAYGROUND // PAGE_BYTES + n for n in pages))
        self._offer(INFLATE, self.cut(numbers, choices), ())
        self.gone.update(pages)

    @step(2)
    def report(self, choices: Choices) -> None:
        if self.features & REPORTING_FEATURE:
            first = choices.below(PLAY_PAGES)
            count = 1 + choices.below(PLAY_PAGES - first)
            span = (PLAYGROUND + first * PAGE_BYTES, count * PAGE_BYTES)
            self._offer(REPORTING, (), [span])
            self.gone.update(range(first, first + count))

    def _offer(self, index: int, pieces: object, spans: object) -> None:
        queue = self.driver.queues[index]
        queue.next_buffer_gpa = queue.buffers_gpa
        assert isinstance(pieces, list | tuple)
        assert isinstance(spans, list | tuple)
        buffer = queue.offer_spans([queue.place(piece) for piece in pieces], spans)
        self.kick(index)
        assert queue.collect() == [(buffer, 0)]

    @step(2)
    def take_back(self, choices: Choices) -> None:
        page = choices.below(PLAY_PAGES)
        self._offer(DEFLATE, [struct.pack("<I", PLAYGROUND // PAGE_BYTES + page)], ())
        if page in self.gone:
            self.gone.remove(page)
            self._fill(page)

    @step()
    def name_no_ram(self, choices: Choices) -> None:
        page = choices.of([RAM_BYTES // PAGE_BYTES, 0xD_0000, 2**32 - 1])
        self.driver.queues[INFLATE].offer([struct.pack("<I", page)])
        self.breaks(INFLATE, "not inside one RAM slot", choices)

    @step()
    def name_in_pieces_of_numbers(self, choices: Choices) -> None:
        self.driver.queues[INFLATE].offer([bytes(choices.of([1, 2, 3, 5, 4097, 4100]))])
        self.breaks(INFLATE, "bytes of page numbers", choices)

    @step()
    def say_what_it_gave(self, choices: Choices) -> None:
        value = choices.below(1 << 32)
        self.driver.set(0x104, value)
        self.driver.set(0x100, choices.below(1 << 32))  # not its to write
        self.driver.transport.write(0x104, choices.of([1, 2]), 7)
        self.actual = value

    @step(2)
    def want(self, choices: Choices) -> None:
        """The host's wish; RAM_BYTES is less than the smallest guest may have."""
        self.balloon.set_wanted(0)
        self.generation += 1
        assert self.driver.get(0x60) & 2
        self.driver.set(0x64, 2)

    def check(self) -> None:
        super().check()
        assert self.driver.get(0x104) == self.actual
        assert self.driver.get(0x100) == self.wanted
        assert self.driver.get(0xFC) == self.generation
        assert self.balloon.actual_mib <= RAM_BYTES >> 20
        for page in range(PLAY_PAGES):
            byte = self.memory.read(PLAYGROUND + page * PAGE_BYTES + page, 1)[0]
            assert byte == (0 if page in self.gone else page + 1)


test_rng = machine_test(RngMachine, "rng")
test_pmem = machine_test(PmemMachine, "pmem")
test_balloon = machine_test(BalloonMachine, "balloon")
