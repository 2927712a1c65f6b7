"""The PC's real-time clock: index port 0x70, data port 0x71; time only, never settable.

Answering it matters for time to boot: register A must say that no update is in progress, or Linux
polls it thousands of times. Source: Motorola MC146818A data sheet, drivers/rtc/rtc-mc146818-lib.c.
"""

from __future__ import annotations

import time

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09
STATUS_A, STATUS_B, STATUS_C, STATUS_D = 0x0A, 0x0B, 0x0C, 0x0D
CENTURY = 0x32
A_DIVIDER_32768_HZ = 0x26  # no update in progress
B_24_HOURS = 0x02  # and BCD, no interrupts
D_VALID = 0x80


class Cmos:
    """The clock shows the host's wall clock in UTC at each read."""

    def __init__(self) -> None:
        self.index = 0

    def read(self, offset: int, size: int) -> int:
        if offset != 1 or size != 1:
            return (1 << 8 * size) - 1
        fixed = _FIXED.get(self.index)
        if fixed is not None:
            return fixed
        return _clock(self.index, time.gmtime())

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 1:
            self.index = value & 0x7F  # the top bit masks NMIs


_FIXED = {STATUS_A: A_DIVIDER_32768_HZ, STATUS_B: B_24_HOURS, STATUS_C: 0, STATUS_D: D_VALID}


def _clock(index: int, now: time.struct_time) -> int:
    fields = {
        SECONDS: min(now.tm_sec, 59),  # a leap second would be no valid BCD time
        MINUTES: now.tm_min,
        HOURS: now.tm_hour,
        WEEKDAY: (now.tm_wday + 1) % 7 + 1,  # the chip counts from Sunday = 1
        DAY: now.tm_mday,
        MONTH: now.tm_mon,
        YEAR: now.tm_year % 100,
        CENTURY: now.tm_year // 100,
    }
    value = fields.get(index, 0)
    return value // 10 << 4 | value % 10
