"""What the kernel does with a seccomp filter: an interpreter of classic BPF, for tests only.

It refuses what the kernel's checker would refuse (net/core/filter.c bpf_check_classic,
kernel/seccomp.c seccomp_check_filter): other instructions, jumps behind the end, loads outside of
struct seccomp_data, no return at the end.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

DATA_BYTES = 64
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06


class Verdict(NamedTuple):
    """The action, and how many instructions it took."""

    action: int
    steps: int


def check(program: bytes) -> list[tuple[int, int, int, int]]:
    """The instructions of a program the kernel would take."""
    code = list(struct.iter_unpack("<HBBI", program))
    assert 0 < len(code) <= 4096
    for place, (operation, if_true, if_false, value) in enumerate(code):
        assert operation in (_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN), hex(operation)
        if operation == _LOAD:
            assert value % 4 == 0
            assert value < DATA_BYTES
        if operation in (_EQUAL, _AT_LEAST):
            assert place + 1 + max(if_true, if_false) < len(code)
    assert code[-1][0] == _RETURN
    return code


def run(program: bytes, data: bytes) -> Verdict:
    """What becomes of the call that `data`, a struct seccomp_data, describes."""
    code = check(program)
    assert len(data) == DATA_BYTES
    place = accumulator = steps = 0
    while True:
        operation, if_true, if_false, value = code[place]
        place += 1
        steps += 1
        if operation == _LOAD:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif operation == _AND:
            accumulator &= value
        elif operation == _EQUAL:
            place += if_true if accumulator == value else if_false
        elif operation == _AT_LEAST:
            place += if_true if accumulator >= value else if_false
        else:
            return Verdict(value, steps)


def call(number: int, *arguments: int, arch: int = 0xC000003E) -> bytes:
    """struct seccomp_data of one system call."""
    words = [argument & 0xFFFFFFFFFFFFFFFF for argument in (*arguments, *(0,) * 6)[:6]]
    return struct.pack("<IIQ6Q", number & 0xFFFFFFFF, arch, 0x7F0000001000, *words)
