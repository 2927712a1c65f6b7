"""Environment variables as code for bash: set for good, or for one run. No I/O."""

from __future__ import annotations

from collections.abc import Mapping

from .requests import SHELL_NAME


def quoted(text: str) -> str:
    """A word of bash that stands for `text`, without a line end: the kernel sends lines one by one.

    Source: bash's manual, "ANSI-C Quoting".
    """
    escaped = "".join(
        char
        if char.isascii() and char.isalnum()
        else "".join(f"\\x{byte:02x}" for byte in char.encode())
        for char in text
    )
    return f"$'{escaped}'"


def adopt(environment: Mapping[str, str]) -> str:
    """Sets variables for good."""
    # names that bash cannot have came with the process's environment
    rows = [
        f"export {name}={quoted(text)}"
        for name, text in environment.items()
        if SHELL_NAME.fullmatch(name)
    ]
    return "\n".join(rows)


def enter(environment: Mapping[str, str]) -> str:
    """Sets variables; what was there is kept in variables of ours, which no other process sees."""
    rows = [
        f'if [ -n "${{{name}+x}}" ]; then __vmcell_{name}="${name}"; fi' for name in environment
    ]
    return "\n".join([*rows, adopt(environment)])


def leave(environment: Mapping[str, str]) -> str:
    """Puts back what `enter` has kept."""
    rows = [
        f'if [ -n "${{__vmcell_{name}+x}}" ]; then export {name}="$__vmcell_{name}"; '
        f"unset __vmcell_{name}; else unset {name}; fi"
        for name in environment
    ]
    return "\n".join(rows)
