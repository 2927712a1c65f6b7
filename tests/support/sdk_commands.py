"""Twenty commands of the SDK in one sandbox, in steps: one line on stdin lets it do the next.

Each step answers one JSON line. A program of its own, for the reason in sdk_domain_mode; the vm
lane, which has the SDK's settings for all its tests, takes `Commands` alone.
"""

from __future__ import annotations

import json
import sys
import threading
import time

from e2b import Sandbox
from e2b.exceptions import SandboxException, TimeoutException

COMMANDS = 20
PATIENCE_S = 60


class Commands:
    """Commands that say "up" and wait until a FIFO is opened; each has a thread that follows it."""

    def __init__(self, sandbox: Sandbox, patience_s: float = PATIENCE_S) -> None:
        self._sandbox = sandbox
        self._patience_s = patience_s
        self.outputs: list[list[str]] = [[] for _ in range(COMMANDS)]
        self.ends: list[object] = [None] * COMMANDS
        self._threads = [
            threading.Thread(target=self._follow, args=(number,)) for number in range(COMMANDS)
        ]
        # One after the other: a dev VM's forwarded port resets some of many connections at once.
        for thread, output in zip(self._threads, self.outputs, strict=True):
            thread.start()
            deadline = time.monotonic() + patience_s
            while not output:
                assert time.monotonic() < deadline, "a command did not start"
                assert thread.is_alive(), f"a command ended before it began: {self.ends}"
                time.sleep(0.02)

    def _follow(self, number: int) -> None:
        try:
            done = self._sandbox.commands.run(
                f"echo up; cat < /tmp/go; echo after {number}",
                on_stdout=self.outputs[number].append,
                timeout=0,
            )
            self.ends[number] = done.exit_code
        except TimeoutException:
            self.ends[number] = "timed out"
        except SandboxException as error:
            self.ends[number] = str(error)
        except Exception as error:  # noqa: BLE001 - the SDK lets its HTTP client's through
            self.ends[number] = repr(error)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(self._patience_s)
            assert not thread.is_alive(), "a command did not end"


def _tell(told: object) -> None:
    print(json.dumps(told), flush=True)  # noqa: T201  # what this program is for
    sys.stdin.readline()


def main(template: str) -> None:
    sandbox = Sandbox.create(template=template, timeout=600)
    _tell(sandbox.sandbox_id)
    sandbox.commands.run("mkfifo /tmp/go")
    commands = Commands(sandbox)
    _tell(commands.ends)
    _tell(commands.ends)
    sandbox.commands.run(": > /tmp/go")
    commands.join()
    _tell([commands.ends, ["".join(parts) for parts in commands.outputs]])
    commands = Commands(sandbox)
    sandbox.set_timeout(1)
    commands.join()
    _tell([commands.ends, sandbox.is_running()])


if __name__ == "__main__":
    main(sys.argv[1])
