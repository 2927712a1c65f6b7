"""Buffers as a guest gives them: sequences of (gpa, length) pieces, cut and copied by length.

A driver may cut a request anywhere (virtio 1.2 § 2.7.4.2), so nothing here assumes that a header
is one piece. Ranges are checked by GuestMemory at every access; nothing is ever shortened.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmcell_protos.errors import GuestError
from vmcell_runtime.memory import GuestMemory, Span

Spans = tuple[Span, ...]


def split(spans: Spans, length: int) -> tuple[Spans, Spans]:
    """The first `length` bytes and the rest; GuestError if there are fewer."""
    left = length
    for index, (gpa, span_bytes) in enumerate(spans):
        if left <= span_bytes:
            head = (*spans[:index], (gpa, left)) if left else spans[:index]
            if left == span_bytes:
                return head, spans[index + 1 :]
            return head, ((gpa + left, span_bytes - left), *spans[index + 1 :])
        left -= span_bytes
    if left:
        raise GuestError(f"a guest buffer is {left} bytes shorter than the {length} it must hold")
    return (), ()


def read(memory: GuestMemory, spans: Sequence[Span]) -> bytes:
    """One copy of all of it."""
    if len(spans) == 1:
        return memory.read(*spans[0])
    return b"".join([memory.read(gpa, length) for gpa, length in spans])


def write(memory: GuestMemory, spans: Sequence[Span], data: bytes) -> None:
    """Fills the spans from their start; `data` must fit (GuestError)."""
    if len(spans) == 1 and len(data) <= spans[0][1]:
        memory.write(spans[0][0], data)
        return
    done = 0
    for gpa, length in spans:
        if done == len(data):
            return
        piece = data[done : done + length]
        memory.write(gpa, piece)
        done += len(piece)
    if done < len(data):
        raise GuestError(f"a guest buffer has room for {done} bytes of {len(data)}")
