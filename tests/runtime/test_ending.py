"""End reasons: the table of `ending`, row by row."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from vmcell_runtime import ending
from vmcell_runtime.ending import End, Ending
from vmcell_runtime.loop import EventLoop

PANIC = "Kernel panic - not syncing: test"


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.mark.parametrize(
    ("said", "cause", "reason", "detail"),
    [
        ([], "guest_reset", "guest_reset", "cause"),
        ([], "triple_fault", "triple_fault", "cause"),
        ([], "vmm_error", "vmm_error", "cause"),
        ([PANIC], "guest_reset", "guest_panic", PANIC),
        ([PANIC], "triple_fault", "guest_panic", PANIC),
        ([], "guest_fault", "guest_fault", "cause"),
        ([PANIC], "guest_fault", "guest_panic", PANIC),
        ([PANIC], "vmm_error", "vmm_error", "cause"),
        (
            ["reboot: Restarting system"],
            "guest_reset",
            "guest_shutdown",
            "reboot: Restarting system",
        ),
        (["reboot: Restarting system"], "triple_fault", "triple_fault", "cause"),
        ([PANIC, "reboot: Restarting system"], "guest_reset", "guest_panic", PANIC),
    ],
)
def test_the_kernels_words_say_what_a_cause_means(
    loop: EventLoop, said: list[str], cause: str, reason: str, detail: str
) -> None:
    machine_end = Ending(loop)
    for line in said:
        machine_end.words.line(line)
    machine_end.end(cause, "cause")
    machine_end.end("vmm_error", "a consequence")
    loop.run()
    assert machine_end.result == End(reason, detail)


@pytest.mark.parametrize("line", ["reboot: Power down", "reboot: System halted"])
def test_a_machine_that_stands_still_has_ended(loop: EventLoop, line: str) -> None:
    machine_end = Ending(loop)
    machine_end.words.line(line)
    loop.run()
    assert machine_end.result == End("guest_shutdown", line)


def test_a_panic_without_a_reset_ends_after_its_grace(
    loop: EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "PANIC_GRACE_NS", 50_000_000)
    machine_end = Ending(loop)
    start_ns = time.monotonic_ns()
    machine_end.words.line(PANIC)
    loop.run()
    assert time.monotonic_ns() - start_ns >= 50_000_000
    assert machine_end.result == End("guest_panic", PANIC)


def test_a_machine_that_runs_has_no_end(loop: EventLoop) -> None:
    with pytest.raises(ValueError):
        _ = Ending(loop).result
