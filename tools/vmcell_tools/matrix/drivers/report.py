"""What a Python driver prints: one JSON line per call, in the order of the calls.

A driver runs in the client's own environment, so this imports the standard library only, and works
with every Python the clients work with. `outcome` is ok, refused (the server named what it does not
have), failed, or absent (this version of the client has no such call).
"""

from __future__ import annotations

import json
import os
import re
import sys
import time

# How this server says that it does not have something, whatever wraps the sentence.
_REFUSALS = re.compile(
    r"does not have|not supported|unsupported|no route|not allowed on|unimplemented"
    r"|does not exist: image|template '[^']*' (does not exist|was not found)",
    re.IGNORECASE,
)
# An emulated CPU takes twenty times as long as a real one.
PATIENCE_S = int(os.environ.get("VMCELL_MATRIX_PATIENCE_S", "60"))
DETAIL_CHARACTERS = 300


class Absent(Exception):
    """The client has no such call."""


class NoSandbox(Exception):
    """There is no sandbox to call: it has the outcome of the call that should have made one."""


class OneSandbox:
    """The sandbox that a driver's calls are made on, once one of them has set `_made`."""

    _made = None

    @property
    def sandbox(self):
        if self._made is None:
            raise NoSandbox
        return self._made


def attribute(thing, name):
    """`thing.name`; Absent when this version of the client has none."""
    found = getattr(thing, name, None)
    if found is None:
        raise Absent(name)
    return found


def expect(found, wanted):
    """An AssertionError that shows both, unless they are equal."""
    if found != wanted:
        raise AssertionError(f"got {found!r}, not {wanted!r}")


def wait_for(condition, what):
    """The first true value of `condition()`, which is asked every tenth of a second."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {PATIENCE_S} s for {what}")


def _say(name, outcome, detail, seconds):
    line = {
        "call": name,
        "outcome": outcome,
        "detail": detail[:DETAIL_CHARACTERS],
        "ms": round(seconds * 1000),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def run_calls(calls):
    """Make each of the (name, function) calls, whatever became of those before it."""
    first = ""
    for name, function in calls:
        began = time.monotonic()
        try:
            function()
        except Absent as error:
            _say(name, "absent", str(error), 0)
        except Exception as error:  # noqa: BLE001 - any error is the answer that is looked for
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, TypeError) and "unexpected keyword argument" in text:
                _say(name, "absent", text, 0)
                continue
            outcome = "refused" if _REFUSALS.search(text) else "failed"
            if isinstance(error, NoSandbox):
                outcome, text = first, "there is no sandbox to call"
            first = first or outcome
            _say(name, outcome, text, time.monotonic() - began)
        else:
            _say(name, "ok", "", time.monotonic() - began)
