"""The socket device between host programs and a guest that keeps the rules, or does not."""

from __future__ import annotations

import socket
from contextlib import suppress

from device_machine import DeviceMachine
from guest_vsock import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    GUEST_CID,
    NO_RECEIVE,
    NO_SEND,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    GuestVsock,
    Packet,
)
from step_machine import Choices, machine_test, step

from vmcell_runtime.virtio.device import VirtioDevice
from vmcell_runtime.virtio.vsock.device import Vsock

PORT = 1024
NEVER_NS = 1 << 60
DEVICE_BUFFER = 256 << 10
RX, TX = 0, 1


class Stream:
    """Both ends of one stream, what each wrote, and what each has got."""

    def __init__(self, host: socket.socket) -> None:
        host.setblocking(False)
        self.host = host
        self.to_guest, self.at_guest = bytearray(), bytearray()
        self.to_host, self.at_host = bytearray(), bytearray()
        self.room = DEVICE_BUFFER  # what the guest may still send, as the device said last
        self.open = False  # the guest knows it and it is not over
        self.plain = True  # nobody has ended anything
        self.ended = False  # the host has

    def host_reads(self, length: int) -> None:
        with suppress(BlockingIOError, ConnectionResetError):
            self.at_host += self.host.recv(length)

    def check(self) -> None:
        assert self.to_guest.startswith(self.at_guest), "bytes to the guest are not as written"
        assert self.to_host.startswith(self.at_host), "bytes to the host are not as written"


class VsockMachine(DeviceMachine):
    """Bytes arrive as they were written, none is lost on a stream that nobody ends, and a reset
    leaves no stream behind."""

    queue_sizes = (16, 32)

    def make(self, choices: Choices) -> VirtioDevice:
        self.vsock = Vsock(self.memory, self.loop, GUEST_CID)
        self.streams: dict[tuple[int, int], Stream] = {}
        self.dialled: dict[int, Stream] = {}  # by the host, guest port → stream without a host port
        self.over: list[Stream] = []
        self.ports = 10_000
        self.clock = 0
        return self.vsock

    def forget(self) -> None:
        self.over += [*self.streams.values(), *self.dialled.values()]
        for stream in self.over:
            stream.open = False
        self.streams.clear()
        self.dialled.clear()

    def start(self, choices: Choices) -> None:
        super().start(choices)
        self.driver.kick = self.kick  # type: ignore[method-assign]  # it is watched
        buffers = choices.of([0, 1, 4, 16])
        self.guest = GuestVsock(
            self.driver, buffers=buffers, buffer_bytes=choices.of([100, 600, 3776])
        )
        for stream in self.over:
            stream.check()
            if not stream.ended:
                self._expect_end(stream)
            stream.host.close()
        self.over.clear()

    def _expect_end(self, stream: Stream) -> None:
        for _ in range(1000):
            with suppress(ConnectionResetError):
                data = stream.host.recv(1 << 20)
                stream.at_host += data
                if data:
                    continue
            return
        raise AssertionError("the host's end is still open after a reset")

    def _pattern(self, length: int) -> bytes:
        self.clock = (self.clock + 1) % 251
        return bytes([self.clock]) * length

    # Who begins

    @step(3)
    def guest_dials(self, choices: Choices) -> None:
        ours, theirs = socket.socketpair()
        self.ports += 1
        self.vsock.listen(PORT, theirs)
        stream = self.streams[PORT, self.ports] = Stream(ours)
        self.guest.send(REQUEST, PORT, self.ports)
        stream.open = True

    @step()
    def guest_dials_nobody(self, choices: Choices) -> None:
        self.guest.send(REQUEST, PORT + 1, 5)

    @step(2)
    def host_dials(self, choices: Choices) -> None:
        ours, theirs = socket.socketpair()
        self.ports += 1
        self.dialled[self.ports] = Stream(ours)
        self.vsock.connect(self.ports, theirs, lambda _error: None, timeout_ns=NEVER_NS)
        self.settle()

    # Bytes

    def _some(self, choices: Choices) -> tuple[tuple[int, int], Stream] | None:
        known = [(key, stream) for key, stream in self.streams.items() if stream.open]
        return choices.of(known) if known else None

    @step(5)
    def guest_writes(self, choices: Choices) -> None:
        found = self._some(choices)
        if found is None:
            return
        key, stream = found
        data = self._pattern(choices.of([1, 10, 1000, 4000]))
        if len(data) <= stream.room and stream.plain:
            stream.room -= len(data)
            stream.to_host += data
            self.guest.send(RW, *key, data)

    @step(5)
    def host_writes(self, choices: Choices) -> None:
        everybody = [s for s in (*self.streams.values(), *self.dialled.values()) if not s.ended]
        if everybody:
            stream = choices.of(everybody)
            with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                data = self._pattern(choices.of([1, 40, 1000, 4000]))
                stream.to_guest += data[: stream.host.send(data)]
            self.settle()

    @step(5)
    def guest_takes(self, choices: Choices | None = None) -> None:
        for packet in self.guest.receive(refill=choices is None or not choices.flag(8)):
            self._packet(packet, choices)

    @step(3)
    def host_takes(self, choices: Choices) -> None:
        for stream in self.streams.values():
            if not stream.ended:
                stream.host_reads(choices.of([1, 100, 1 << 16]))
        self.settle()

    @step()
    def guest_gives_buffers(self, choices: Choices) -> None:
        count = min(len(self.guest.rx.free), 1 + choices.below(4))
        self.guest.fill(count)

    def _packet(self, packet: Packet, choices: Choices | None) -> None:
        key = packet.host_port, packet.guest_port
        if packet.op == REQUEST:
            stream = self.dialled.pop(packet.guest_port)
            self.streams[key] = stream
            accept = choices is None or not choices.flag(4)
            stream.open, stream.plain = accept, accept
            self.guest.send(RESPONSE if accept else RST, *key)
            return
        found = self.streams.get(key)
        if found is None:
            assert packet.op == RST
            return
        stream = found
        stream.room = DEVICE_BUFFER - ((len(stream.to_host) - packet.fwd_cnt) & 0xFFFF_FFFF)
        if packet.op == RW:
            stream.at_guest += packet.data
        elif packet.op == CREDIT_REQUEST and stream.open:
            self.guest.send(CREDIT_UPDATE, *key)
        elif packet.op == RST:
            stream.open = stream.plain = False
        elif packet.op == SHUTDOWN:
            stream.plain = False
            if packet.flags == NO_RECEIVE | NO_SEND and stream.open:
                stream.open = False
                self.guest.send(RST, *key)

    # Ends

    @step(2)
    def guest_shuts(self, choices: Choices) -> None:
        found = self._some(choices)
        if found is not None:
            flags = choices.of([NO_RECEIVE, NO_SEND, NO_RECEIVE | NO_SEND, 0])
            found[1].plain = False
            self.guest.send(SHUTDOWN, *found[0], flags=flags)

    @step()
    def guest_resets(self, choices: Choices) -> None:
        found = self._some(choices)
        if found is not None:
            found[1].plain = found[1].open = False
            self.guest.send(RST, *found[0])

    @step(2)
    def host_ends(self, choices: Choices) -> None:
        open_ones = [stream for stream in self.streams.values() if not stream.ended]
        if open_ones:
            stream = choices.of(open_ones)
            stream.plain = False
            if choices.flag():
                stream.ended = True
                stream.host.close()
            else:
                with suppress(OSError):
                    stream.host.shutdown(choices.of([socket.SHUT_WR, socket.SHUT_RD]))
            self.settle()

    # What no guest sends

    @step()
    def guest_sends_nonsense(self, choices: Choices) -> None:
        """Of a stream or of none: at most that stream ends."""
        known = list(self.streams)
        key = choices.of(known) if known and choices.flag() else (choices.below(3), 7)
        if key in self.streams:
            self.streams[key].plain = False
        fields = choices.of(
            [{"kind": 2}, {"source_cid": 4}, {"destination_cid": 1}, {"buf_alloc": 0}, {}]
        )
        operation = choices.of([0, RESPONSE, 8, 9, 0xFFFF, CREDIT_REQUEST])
        self.guest.send(operation, *key, b"x" * choices.below(50), **fields)

    @step()
    def guest_overruns(self, choices: Choices) -> None:
        """More than it has credit for: the stream is reset, not kept in memory."""
        found = self._some(choices)
        if found is None or not found[1].plain:
            return
        key, stream = found
        stream.plain = stream.open = False
        for _ in range(2 * DEVICE_BUFFER // 60_000 + 1):
            stream.to_host += (data := self._pattern(60_000))
            self.guest.send(RW, *key, data)

    @step()
    def guest_lies_about_length(self, choices: Choices) -> None:
        length = choices.of([1, 65537, 2**32 - 1])
        self.guest.offer(RW, PORT, 1, length=length)
        self.breaks(TX, "declares", choices)

    @step()
    def guest_sends_half_a_header(self, choices: Choices) -> None:
        self.driver.queues[TX].offer([bytes(1 + choices.below(43))])
        self.breaks(TX, "shorter than the 44", choices)

    def check(self) -> None:
        super().check()
        for stream in self.streams.values():
            stream.check()
        mux = self.vsock._mux
        assert mux is not None
        assert len(mux._streams) <= len(self.streams) + len(self.dialled)
        for stream in mux._streams.values():
            assert len(stream._pending) <= DEVICE_BUFFER

    def finish(self) -> None:
        """Everybody reads all there is: what nobody ended has lost nothing."""
        self.guest.buffer_bytes = 3776
        self.guest.fill(min(len(self.guest.rx.free), 4))
        before: object = None
        quiet = 0
        while quiet < 2:
            quiet = quiet + 1 if self._progress() == before else 0
            before = self._progress()
            self.guest_takes()
            for key, stream in list(self.streams.items()):
                if stream.open and stream.plain:
                    self.guest.send(CREDIT_UPDATE, *key)
                if not stream.ended:
                    stream.host_reads(1 << 20)
            self.settle()
        for stream in self.streams.values():
            if stream.plain and stream.open:
                assert stream.at_guest == stream.to_guest
                assert stream.at_host == stream.to_host

    def _progress(self) -> tuple[int, ...]:
        reached = [len(s.at_guest) + len(s.at_host) for s in self.streams.values()]
        return (self.guest.rx.used_index, *reached)

    def tear_down(self) -> None:
        # First: while somebody could take them, a device that is closed waits for its last bytes.
        for stream in (*self.streams.values(), *self.dialled.values(), *self.over):
            stream.host.close()
        super().tear_down()


test_vsock = machine_test(VsockMachine, "vsock")
