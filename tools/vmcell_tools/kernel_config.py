"""Kernel configurations as text: what was asked for, what Kconfig made of it, and the difference.

Kconfig drops an option whose dependency is missing without a word, so only a comparison tells.
The format is that of `.config`: `CONFIG_X=value`, or `# CONFIG_X is not set` for off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from vmcell_protos.errors import HostError

OFF = "n"
_SET = re.compile(r"(CONFIG_\w+)=(\S.*)")
_UNSET = re.compile(r"# (CONFIG_\w+) is not set")


class Difference(NamedTuple):
    """One option that did not come out as asked; `got` is "n" for an option that vanished."""

    option: str
    asked: str
    got: str


def parse_config(text: str, name: str) -> dict[str, str]:
    """Option → value ("n" for off). HostError names the line that is neither option nor comment."""
    options: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if match := _SET.fullmatch(line):
            option, value = match.groups()
        elif match := _UNSET.fullmatch(line):
            option, value = match[1], OFF
        elif not line or line.startswith("#"):
            continue
        else:
            raise HostError(f"{name} line {number} is no kernel option: {line!r}; correct it")
        if option in options:
            raise HostError(f"{name} line {number} names {option} again; keep one of the lines")
        options[option] = value
    return options


def differences(asked: Mapping[str, str], got: Mapping[str, str]) -> list[Difference]:
    """Every asked option that `got` has otherwise, in the order asked."""
    return [
        Difference(option, value, got.get(option, OFF))
        for option, value in asked.items()
        if got.get(option, OFF) != value
    ]


def canonical(options: Mapping[str, str]) -> str:
    """The options without comments and order: what a digest may depend on."""
    return "".join(f"{option}={value}\n" for option, value in sorted(options.items()))
