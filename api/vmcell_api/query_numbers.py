"""Whole numbers in query strings: decimal digits within bounds, and nothing else."""

from __future__ import annotations

from vmcell_protos.errors import CallerError

# As many as any bounds need; Python itself refuses to read more than 4,300.
_MAX_DIGITS = 19


def query_number(name: str, text: str, bounds: range) -> int:
    """The number that the parameter `name` holds; raises CallerError."""
    is_number = text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
    if not is_number or int(text) not in bounds:
        raise CallerError(
            f"{name} is {text[:20]!r}; it takes a whole number from {bounds[0]} to {bounds[-1]}"
        )
    return int(text)
