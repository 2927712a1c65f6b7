"""Core calls of the PyPI package `e2b-desktop`."""

from __future__ import annotations

import os

from e2b_desktop import Sandbox
from report import PATIENCE_S, NoSandbox, expect, run_calls

TEMPLATE = os.environ.get("VMCELL_MATRIX_DESKTOP_TEMPLATE", "desktop")


class Calls:
    """The calls, on one sandbox of the desktop's template."""

    def __init__(self):
        self._made = None

    @property
    def sandbox(self):
        if self._made is None:
            raise NoSandbox
        return self._made

    def create(self):
        make = getattr(Sandbox, "create", None) or Sandbox
        self._made = make(template=TEMPLATE, timeout=1800, request_timeout=PATIENCE_S)

    def command(self):
        expect(self.sandbox.commands.run("echo hi", timeout=PATIENCE_S).stdout, "hi\n")

    def screenshot(self):
        assert bytes(self.sandbox.screenshot())[:4] == b"\x89PNG"

    def pointer(self):
        self.sandbox.move_mouse(10, 20)
        expect(tuple(self.sandbox.get_cursor_position()), (10, 20))

    def kill(self):
        expect(self.sandbox.kill(), True)


def main():
    c = Calls()
    run_calls(
        [
            ("Sandbox.create", c.create),
            ("commands.run", c.command),
            ("screenshot", c.screenshot),
            ("move_mouse, get_cursor_position", c.pointer),
            ("kill", c.kill),
        ]
    )


if __name__ == "__main__":
    main()
