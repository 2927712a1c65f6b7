"""The PC devices: UART as Linux's driver probes it, console log and its caps, reset, clock."""

from __future__ import annotations

import os
import tempfile
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_irq import RecordedIrq

from vmcell_protos.errors import CallerError
from vmcell_runtime.devices import serial as uart
from vmcell_runtime.devices.cmos import Cmos
from vmcell_runtime.devices.console import LOG_LIMIT_BYTES, ConsoleLog, LastWords, printable
from vmcell_runtime.devices.i8042 import I8042
from vmcell_runtime.devices.serial import Serial
from vmcell_runtime.irq import IrqLine


class Sink:
    """What the UART sent."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.flushes = 0

    def put(self, byte: int) -> None:
        self.sent.append(byte)

    def flush(self) -> None:
        self.flushes += 1


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def irq() -> RecordedIrq:
    return RecordedIrq()


@pytest.fixture
def serial(irq: RecordedIrq, sink: Sink) -> Serial:
    return Serial(irq, sink)


def test_a_polling_console_finds_the_transmitter_empty(serial: Serial, sink: Sink) -> None:
    for byte in b"early":
        assert serial.read(uart.LSR, 1) & 0x60 == 0x60
        serial.write(uart.DATA, 1, byte)
    assert sink.sent == b"early"


def test_linux_identifies_a_16550a(serial: Serial, sink: Sink) -> None:
    # The order of autoconfig(), drivers/tty/serial/8250/8250_port.c
    serial.write(uart.IER, 1, 0)
    assert serial.read(uart.IER, 1) & 0x0F == 0
    serial.write(uart.IER, 1, 0x0F)
    assert serial.read(uart.IER, 1) & 0x0F == 0x0F
    serial.write(uart.IER, 1, 0)
    serial.write(uart.MCR, 1, 0x10 | 0x0A)
    assert serial.read(uart.MSR, 1) & 0xF0 == 0x90, "loop-back of RTS and OUT2"
    serial.write(uart.MCR, 1, 0)
    serial.write(uart.IIR_FCR, 1, 1)
    assert serial.read(uart.IIR_FCR, 1) >> 6 == 3, "a working FIFO"
    assert sink.sent == b""


def test_the_divisor_hides_data_and_interrupt_registers(serial: Serial, sink: Sink) -> None:
    serial.write(uart.LCR, 1, 0x83)
    serial.write(uart.DATA, 1, 0x01)
    serial.write(uart.IER, 1, 0x02)
    assert (serial.read(uart.DATA, 1), serial.read(uart.IER, 1)) == (1, 2)
    serial.write(uart.LCR, 1, 0x03)
    assert serial.read(uart.IER, 1) == 0
    assert sink.sent == b""


def test_transmit_interrupts_come_and_are_taken_back(serial: Serial, irq: RecordedIrq) -> None:
    assert serial.read(uart.IIR_FCR, 1) & 0x0F == 1, "none pending"
    serial.write(uart.IER, 1, 0x02)
    assert irq.count == 1, "an empty transmitter interrupts as soon as it may"
    assert serial.read(uart.IIR_FCR, 1) & 0x0F == 2
    assert serial.read(uart.IIR_FCR, 1) & 0x0F == 1
    serial.write(uart.IER, 1, 0x02)
    assert irq.count == 1, "it was enabled already"
    serial.write(uart.DATA, 1, 0x41)
    assert irq.count == 2
    serial.write(uart.IER, 1, 0)
    serial.write(uart.DATA, 1, 0x42)
    assert irq.count == 2


def test_loop_back_keeps_bytes_inside(serial: Serial, sink: Sink, irq: RecordedIrq) -> None:
    serial.write(uart.IER, 1, 0x01)
    serial.write(uart.MCR, 1, 0x10)
    serial.write(uart.DATA, 1, 0x5A)
    assert (irq.count, sink.sent) == (1, b"")
    assert serial.read(uart.IIR_FCR, 1) & 0x0F == 4
    assert serial.read(uart.LSR, 1) & 1
    assert serial.read(uart.DATA, 1) == 0x5A
    assert not serial.read(uart.LSR, 1) & 1


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 7), st.sampled_from([1, 2, 4]), st.integers(0))
    )
)
def test_no_access_breaks_the_uart(accesses: list[tuple[bool, int, int, int]]) -> None:
    sink = Sink()
    serial = Serial(RecordedIrq(), sink)
    for is_write, offset, size, value in accesses:
        if is_write:
            serial.write(offset, size, value % (1 << 8 * size))
        else:
            assert 0 <= serial.read(offset, size) < 1 << 8 * size
    assert len(sink.sent) <= len(accesses)


def log_of(data: bytes) -> tuple[bytes, list[str], ConsoleLog]:
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        log = ConsoleLog(file.fileno(), lines.append)
        for byte in data:
            log.put(byte)
        log.flush()
        file.seek(0)
        return file.read(), lines, log


def test_the_log_has_the_bytes_and_the_watcher_printable_lines() -> None:
    data = b"one\r\n\x1b[31mtwo\x00\n\xff\xfe\nno end"
    content, lines, log = log_of(data)
    assert content == data
    assert lines == ["one", "\ufffd[31mtwo\ufffd", "\ufffd\ufffd"]
    assert log.dropped_bytes == 0


def test_the_log_stops_at_its_cap_and_says_so() -> None:
    content, lines, log = log_of((b"x" * 1023 + b"\n") * 1030)
    assert len(content) < LOG_LIMIT_BYTES + 100
    assert content.endswith(b"[vmcell: console log is full, the rest is dropped]\n")
    assert content.count(b"is full") == 1
    assert log.dropped_bytes == 1030 * 1024 - LOG_LIMIT_BYTES
    assert len(lines) == 1030, "the kernel's last words are read all the same"


def test_an_endless_line_costs_no_memory() -> None:
    content, lines, _ = log_of(b"y" * 100_000 + b"\n")
    assert len(content) == 100_001
    assert [len(line) for line in lines] == [1024]


def test_a_full_disk_drops_and_counts() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        log = ConsoleLog(fd, lambda _line: None)
        for byte in b"lost\n":
            log.put(byte)
    finally:
        os.close(fd)
    assert log.dropped_bytes == 5


def test_without_a_file_the_watcher_still_sees() -> None:
    lines: list[str] = []
    log = ConsoleLog(None, lines.append)
    for byte in b"heard\n":
        log.put(byte)
    assert lines == ["heard"]


def test_the_panic_line_is_kept_from_its_first_word() -> None:
    ends: list[int] = []
    words = LastWords(lambda: ends.append(1))
    words.line("[    1.0] BUG: something")
    words.line("[    1.1] Kernel panic - not syncing: VFS: no root")
    words.line("[    1.2] Kernel panic - not syncing: another")
    words.line("reboot: Restarting system")
    assert words.panic == "Kernel panic - not syncing: VFS: no root"
    assert words.orderly is None
    assert ends == [1]


@pytest.mark.parametrize(
    ("line", "ends"), [("Restarting system", 0), ("Power down", 1), ("System halted", 1)]
)
def test_orderly_ends_are_told_apart(line: str, ends: int) -> None:
    called: list[int] = []
    words = LastWords(lambda: called.append(1))
    words.line(f"[    9.9] reboot: {line}")
    assert words.orderly == f"reboot: {line}"
    assert len(called) == ends


def test_printable_text_has_nothing_that_steers_a_terminal() -> None:
    assert printable(b"a\x07\x1b]0;t\x07b\r") == "a\ufffd\ufffd]0;t\ufffdb"
    assert printable("grün".encode()) == "grün"


def test_only_the_reset_command_resets() -> None:
    resets: list[int] = []
    keyboard = I8042(lambda: resets.append(1))
    assert keyboard.read(4, 1) & 3 == 0, "nothing to wait for, nothing to read"
    for offset, size, value in (
        (0, 1, 0xFE),
        (4, 1, 0xFF),
        (4, 1, 0x20),
        (4, 2, 0xFE),
        (1, 1, 0xFE),
    ):
        keyboard.write(offset, size, value)
    assert resets == []
    keyboard.write(4, 1, 0xFE)
    assert resets == [1]


def clock_reads(cmos: Cmos, *indexes: int) -> list[int]:
    values = []
    for index in indexes:
        cmos.write(0, 1, index)
        values.append(cmos.read(1, 1))
    return values


def test_the_clock_shows_utc_in_bcd(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = time.gmtime(1_798_761_599)  # 2026-12-31 23:59:59, a Thursday
    monkeypatch.setattr(time, "gmtime", lambda: moment)
    shown = clock_reads(Cmos(), 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32)
    assert shown == [0x59, 0x59, 0x23, 0x05, 0x31, 0x12, 0x26, 0x20]


def test_linux_need_not_wait_for_the_clock() -> None:
    a, b, c, d = clock_reads(Cmos(), 0x0A, 0x8B, 0x0C, 0x0D)
    assert not a & 0x80, "no update in progress"
    assert b & 0x06 == 0x02, "24 hours, BCD"
    assert c == 0
    assert d & 0x80, "the time is valid"


@given(st.integers(0, 255), st.sampled_from([1, 2, 4]))
def test_every_cmos_cell_answers_a_byte(index: int, size: int) -> None:
    cmos = Cmos()
    cmos.write(0, 1, index)
    assert 0 <= cmos.read(1, size) < 1 << 8 * size
    assert cmos.read(0, 1) == 0xFF, "the index port cannot be read"


def test_an_interrupt_line_is_an_eventfd() -> None:
    line = IrqLine(5)
    line.fire()
    line.fire()
    assert os.eventfd_read(line.fd) == 2
    line.close()
    line.close()


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 255)), max_size=30))
def test_a_loaded_port_is_the_saved_one(writes: list[tuple[int, int]]) -> None:
    serial, loaded = Serial(RecordedIrq(), Sink()), Serial(RecordedIrq(), Sink())
    for offset, value in writes:
        serial.write(offset, 1, value)
    loaded.load(serial.save())
    assert loaded.save() == serial.save()
    for offset in (2, 5, 0, 1, 3, 4, 6, 7, 2, 5):
        assert loaded.read(offset, 1) == serial.read(offset, 1)


@pytest.mark.parametrize("looped", [False, True])
def test_an_interrupt_that_waits_is_raised_by_the_loaded_port(
    serial: Serial, irq: RecordedIrq, looped: bool
) -> None:
    serial.write(uart.IER, 1, uart.IER_RECEIVED if looped else uart.IER_TRANSMIT_EMPTY)
    if looped:
        serial.write(uart.MCR, 1, uart.MCR_LOOP)
        serial.write(uart.DATA, 1, ord("x"))
    assert irq.count == 1
    line = RecordedIrq()
    loaded = Serial(line, Sink())
    loaded.load(serial.save())
    assert line.count == 1
    assert loaded.read(uart.IIR_FCR, 1) & 0x0F == (
        uart.IIR_RECEIVED if looped else uart.IIR_TRANSMIT_EMPTY
    )
    loaded.read(uart.DATA, 1)
    quiet = RecordedIrq()
    Serial(quiet, Sink()).load(loaded.save())
    assert quiet.count == 0


def test_registers_that_cannot_be_are_refused(serial: Serial) -> None:
    saved = serial.save()
    for name in saved:
        for value in (256, -2, *(() if name == "looped" else (-1,))):
            with pytest.raises(CallerError, match=f"register {name} "):
                serial.load({**saved, name: value})
        with pytest.raises(CallerError, match=f"register {name} "):
            serial.load({other: number for other, number in saved.items() if other != name})
    assert serial.save() == saved
