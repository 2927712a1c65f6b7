"""What goes on after a saving that fails; the machine is made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vmcell_protos.errors import HostError
from vmcell_runtime.pausing import State
from vmcell_runtime.saving import Saving


class MadeUpTransport:
    def __init__(self, *, fails: str = "") -> None:
        self.fails = fails
        self.stands = False

    def save(self) -> object:
        if self.fails == "save":
            raise HostError("vhost does not stop")
        self.stands = True
        return object()

    def go_on(self) -> None:
        self.stands = False
        if self.fails == "go_on":
            raise HostError("vhost does not start")


def full(_: int) -> int:
    raise OSError(28, "No space left on device")


def saving(transports: list[MadeUpTransport]) -> Saving:
    parts: dict[str, Any] = dict.fromkeys(("vm", "vcpus", "processor", "cmos"))
    return Saving(
        **parts,
        memory=SimpleNamespace(save_pages=full),
        serial=SimpleNamespace(flush=lambda: None),
        transports=transports,
        hotplug=SimpleNamespace(plugged=False),
        pausing=SimpleNamespace(state=State.PAUSED),
    )


@pytest.mark.parametrize(
    ("fails", "words"),
    [("", "No space"), ("save", "does not stop"), ("go_on", "does not start")],
)
def test_every_device_that_was_stopped_goes_on(fails: str, words: str) -> None:
    transports = [MadeUpTransport(), MadeUpTransport(fails=fails), MadeUpTransport()]
    with pytest.raises(HostError, match=words):
        saving(transports).save(-1, -1)
    assert not any(transport.stands for transport in transports)
