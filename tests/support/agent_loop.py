"""The agent's event loop, run by a test up to a condition."""

from __future__ import annotations

from collections.abc import Callable

from vmcell_agent.eventloop import Loop


def run_until(loop: Loop, condition: Callable[[], bool]) -> None:
    """Run the loop until `condition` holds; fails after five seconds."""
    deadline = loop.call_later(5, loop.stop)

    def check() -> None:
        if condition():
            loop.stop()
        else:
            loop.call_later(0.001, check)

    loop.call_later(0, check)
    loop.run()
    deadline.cancel()
    assert condition()
