"""A 16550A UART at COM1 that transmits at once and never receives.

Enough for Linux's early console, which polls LSR, and for its 8250 driver, which detects the chip
by its registers and then works by interrupts. Source: National PC16550D data sheet; the detection
is `autoconfig` of drivers/tty/serial/8250/8250_port.c.
"""

from __future__ import annotations

import threading
from typing import Protocol

from vmcell_protos.errors import CallerError
from vmcell_runtime.irq import Interrupt

DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_MASK = 0x0F
IER_RECEIVED = 0x01
IER_TRANSMIT_EMPTY = 0x02
IIR_NONE = 0x01
IIR_TRANSMIT_EMPTY = 0x02
IIR_RECEIVED = 0x04
IIR_FIFO = 0xC0
FCR_ENABLE = 0x01
LCR_DIVISOR = 0x80
MCR_MASK = 0x1F
MCR_LOOP = 0x10
LSR_RECEIVED = 0x01
LSR_EMPTY = 0x60  # holding and shift register empty: a byte leaves the moment it is written
MSR_CONNECTED = 0xB0  # DCD, DSR, CTS


class ByteSink(Protocol):
    """Where transmitted bytes go."""

    def put(self, byte: int) -> None: ...

    def flush(self) -> None: ...


class Serial:
    """The chip. Any vCPU may use it; one lock guards registers and sink."""

    def __init__(self, irq: Interrupt, sink: ByteSink) -> None:
        self._irq = irq
        self._sink = sink
        self._lock = threading.Lock()
        self._interrupts_enabled = 0
        self._fifo = False
        self._line_control = 0x03
        self._modem_control = 0x08
        self._scratch = 0
        self._divisor = [1, 0]
        self._looped: int | None = None
        self._transmit_pending = False

    def read(self, offset: int, size: int) -> int:
        if size != 1:
            return (1 << 8 * size) - 1
        with self._lock:
            return self._read(offset)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            return
        with self._lock:
            self._write(offset, value)

    def save(self) -> dict[str, int]:
        """The registers as numbers by name; -1 where there is nothing."""
        with self._lock:
            return {
                "interrupts_enabled": self._interrupts_enabled,
                "fifo": int(self._fifo),
                "line_control": self._line_control,
                "modem_control": self._modem_control,
                "scratch": self._scratch,
                "divisor_low": self._divisor[0],
                "divisor_high": self._divisor[1],
                "looped": -1 if self._looped is None else self._looped,
                "transmit_pending": int(self._transmit_pending),
            }

    def load(self, registers: dict[str, int]) -> None:
        """Takes over what `save` gave, all of it bytes (CallerError)."""
        found = {name: registers.get(name) for name in self.save()}
        for name, value in found.items():
            if value is None or not -1 <= value <= 0xFF or (value < 0 and name != "looped"):
                raise CallerError(f"register {name} of the serial port was saved as {value}")
        values = {name: value for name, value in found.items() if value is not None}
        with self._lock:
            self._interrupts_enabled = values["interrupts_enabled"]
            self._fifo = bool(values["fifo"])
            self._line_control = values["line_control"]
            self._modem_control = values["modem_control"]
            self._scratch = values["scratch"]
            self._divisor = [values["divisor_low"], values["divisor_high"]]
            self._looped = None if values["looped"] < 0 else values["looped"]
            self._transmit_pending = bool(values["transmit_pending"])
            waits = self._looped is not None and self._interrupts_enabled & IER_RECEIVED
            # The line may have been raised for it and not have reached the guest.
            if waits or self._transmit_pending:
                self._irq.fire()

    def flush(self) -> None:
        """Pushes a line without its end to the sink's file; for the machine's own end."""
        with self._lock:
            self._sink.flush()

    def _read(self, offset: int) -> int:
        match offset:
            case 0 | 1 if self._line_control & LCR_DIVISOR:
                return self._divisor[offset]
            case 0:
                byte, self._looped = self._looped or 0, None
                return byte
            case 1:
                return self._interrupts_enabled
            case 2:
                return self._identify()
            case 3:
                return self._line_control
            case 4:
                return self._modem_control
            case 5:
                return LSR_EMPTY | (LSR_RECEIVED if self._looped is not None else 0)
            case 6:
                return self._modem_status()
        return self._scratch

    def _write(self, offset: int, value: int) -> None:
        match offset:
            case 0 | 1 if self._line_control & LCR_DIVISOR:
                self._divisor[offset] = value
            case 0:
                self._transmit(value)
            case 1:
                newly = value & ~self._interrupts_enabled
                self._interrupts_enabled = value & IER_MASK
                if newly & IER_TRANSMIT_EMPTY:
                    self._raise_transmit_empty()
            case 2:
                self._fifo = bool(value & FCR_ENABLE)
            case 3:
                self._line_control = value
            case 4:
                self._modem_control = value & MCR_MASK
            case 7:
                self._scratch = value

    def _transmit(self, byte: int) -> None:
        if self._modem_control & MCR_LOOP:
            self._looped = byte
            if self._interrupts_enabled & IER_RECEIVED:
                self._irq.fire()
        else:
            self._sink.put(byte)
        if self._interrupts_enabled & IER_TRANSMIT_EMPTY:
            self._raise_transmit_empty()

    def _raise_transmit_empty(self) -> None:
        self._transmit_pending = True
        self._irq.fire()

    def _identify(self) -> int:
        """IIR: the highest pending cause; reading it takes "transmitter empty" back."""
        fifo = IIR_FIFO if self._fifo else 0
        if self._looped is not None and self._interrupts_enabled & IER_RECEIVED:
            return IIR_RECEIVED | fifo
        if self._transmit_pending:
            self._transmit_pending = False
            return IIR_TRANSMIT_EMPTY | fifo
        return IIR_NONE | fifo

    def _modem_status(self) -> int:
        if not self._modem_control & MCR_LOOP:
            return MSR_CONNECTED
        # In loop-back the outputs RTS, DTR, OUT1, OUT2 come back as CTS, DSR, RI, DCD.
        control = self._modem_control
        return (control & 2) << 3 | (control & 1) << 5 | (control & 4) << 4 | (control & 8) << 4
