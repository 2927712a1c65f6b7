"""A template's start and ready commands against a guest that answers as the test says."""

from __future__ import annotations

import threading
import time

import pytest
from fake_build import FakeGuest

from vmcell_api.node import start_command
from vmcell_api.node.guest_process import Command
from vmcell_protos.errors import HostError


def _soon(seconds: float = 30) -> float:
    return time.monotonic() + seconds


def test_ready_is_asked_until_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_command, "READY_PAUSE_S", 0.01)
    guest = FakeGuest()
    guest.answers["check"] = (1, "not yet")

    def become_ready() -> None:
        while len(guest.ran) < 3:
            time.sleep(0.01)
        guest.answers["check"] = (0, "")

    thread = threading.Thread(target=become_ready)
    thread.start()
    start_command.wait_ready(guest, Command(text="check"), deadline=_soon())  # type: ignore[arg-type]  # a stand-in
    thread.join(30)
    assert len(guest.ran) >= 3


def test_what_never_becomes_ready_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_command, "READY_PAUSE_S", 0.01)
    guest = FakeGuest()
    guest.answers["check"] = (4, "port is closed")
    with pytest.raises(HostError, match="status was 4: port is closed") as caught:
        start_command.wait_ready(guest, Command(text="check"), deadline=_soon(1))  # type: ignore[arg-type]  # a stand-in
    assert caught.value.code == "internal", "nothing that a client should try again"
    with pytest.raises(HostError, match="invalid username"):
        start_command.wait_ready(
            guest,  # type: ignore[arg-type]  # a stand-in
            Command(text="check", user="nobody-here"),
            deadline=_soon(),
        )
    with pytest.raises(HostError, match="could not be started"):
        start_command.start(guest, Command(text="serve", user="nobody-here"), deadline=_soon())  # type: ignore[arg-type]  # a stand-in


def test_a_start_command_that_has_ended_ends_the_wait() -> None:
    guest, failed = FakeGuest(), threading.Event()
    guest.answers["check"] = (1, "")
    failed.set()
    with pytest.raises(HostError, match="ended before"):
        start_command.wait_ready(guest, Command(text="check"), deadline=_soon(), failed=failed)  # type: ignore[arg-type]  # a stand-in
