"""What the shim makes of an agent's answers: bounds, blame, and words that can be shown."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from shim_harness import Shim

from vmcell_protos.agent import ContainerStatsResponse, HelloRequest, ReadFileResponse
from vmcell_protos.errors import CallerError, GuestError, HostError, VmcellError
from vmcell_protos.metrics import Metrics
from vmcell_protos.wire import WireError
from vmcell_shim import oom_watch, signals
from vmcell_shim.binds import FILE_LIMIT_BYTES
from vmcell_shim.client import ConnectionLost
from vmcell_shim.footprint import Footprint
from vmcell_shim.guest import Guest
from vmcell_shim.journal import Journal
from vmcell_shim.lifecycle import RUNNING
from vmcell_shim.metrics import metrics_of, sum_of
from vmcell_shim.oom_watch import OomWatch

MOST = (1 << 64) - 1


class Agent:
    """Answers every call with the same, or raises it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def call(self, *_: object) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def guest_with(answer: Any) -> Guest:
    guest = Guest(Journal("", "test"), lambda: None)
    guest._agent = Agent(answer)  # type: ignore[assignment]  # a fake of the same face
    return guest


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (VmcellError("no such file", code="not_found"), CallerError),
        (VmcellError("it is full", code="resource_exhausted"), CallerError),
        (VmcellError("it broke", code="internal"), GuestError),
        (VmcellError("it broke", code="unknown"), GuestError),
        (WireError("message ends inside a varint"), GuestError),
        (HostError("no answer", code="deadline_exceeded"), HostError),
        (ConnectionLost("it ended"), ConnectionLost),
    ],
)
def test_blame(said: VmcellError, kind: type[VmcellError]) -> None:
    with pytest.raises(kind) as caught:
        guest_with(said).call("Hello", HelloRequest(), ContainerStatsResponse, 1.0)
    assert str(said) in str(caught.value)
    if not isinstance(said, WireError):
        assert caught.value.code == said.code


def test_an_agents_words_are_shown_and_do_not_act() -> None:
    said = VmcellError("\x1b[2Jgone\r\n" + "x" * 100_000, code="internal")
    with pytest.raises(GuestError) as caught:
        guest_with(said).call("Hello", HelloRequest(), ContainerStatsResponse, 1.0)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 3000


def test_numbers_that_are_too_large_together() -> None:
    row = ContainerStatsResponse(
        cpu={"usage_usec": MOST},
        memory={"anon": MOST},
        memory_events={"oom": MOST},
        memory_usage_bytes=MOST,
        pids_current=MOST,
    )
    metrics = Metrics.decode(metrics_of(sum_of([row, row])).value)
    assert metrics.cpu is not None
    assert metrics.cpu.usage_usec == MOST
    assert metrics.memory is not None
    assert (metrics.memory.usage, metrics.memory.anon) == (MOST, MOST)


def test_oom_kills_without_end_are_asked_for_at_a_bounded_rate() -> None:
    """A guest that answers at once with ever more was asked again at once, for ever."""
    pauses: list[float] = []

    class Ended:
        def wait(self, timeout_s: float) -> None:
            pauses.append(timeout_s)

    class Inventive:
        ended = Ended()
        asked = 0

        def call(self, *_: object) -> Any:
            self.asked += 1
            if self.asked > 5:
                raise HostError("enough")
            return type("Answer", (), {"oom_kills": 1 << self.asked})

    class Events:
        published = 0

        def publish(self, _: object) -> None:
            self.published += 1

    events = Events()
    watch = OomWatch("c1", Inventive(), events, Journal("", "test"))  # type: ignore[arg-type]  # fakes
    watch._watch()
    assert events.published == 5
    assert pauses == [oom_watch.PACE_S] * 5


@pytest.mark.parametrize(
    ("length", "fits"), [(FILE_LIMIT_BYTES, True), (FILE_LIMIT_BYTES + 1, False)]
)
def test_a_file_that_is_longer_than_was_asked_for(length: int, fits: bool) -> None:
    """It would be written to a file of the host."""
    footprint = Footprint.__new__(Footprint)
    footprint._id = "c1"
    footprint._guest = guest_with(ReadFileResponse(content=bytes(length)))
    if fits:
        assert footprint._read("/etc/hosts") == bytes(length)
        return
    with pytest.raises(GuestError, match=f"/etc/hosts came back with {length} bytes"):
        footprint._read("/etc/hosts")


def test_a_file_that_is_not_there_is_none() -> None:
    footprint = Footprint.__new__(Footprint)
    footprint._id = "c1"
    footprint._guest = guest_with(VmcellError("no such file", code="not_found"))
    assert footprint._read("/etc/hosts") is None


SILENT = '{"silent": ["SignalProcess"]}'


def test_sigkill_is_answered_where_the_guest_is_silent(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked waited for the guest: 5 s."""
    monkeypatch.setattr(signals, "ANSWER_S", 3600.0)
    monkeypatch.setenv("FAKE_BEHAVIOUR", SILENT)
    shim.create("/bin/sleep", "600")
    shim.start()
    shim.kill(9)
    assert shim.registry.container("c1").init.state == RUNNING, "nobody has died of it yet"
    shim.registry.container("c1").guest.kill()
    assert shim.wait() == 137


def test_a_guest_that_does_not_kill_is_killed(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ANSWER_S", 0.2)
    monkeypatch.setenv("FAKE_BEHAVIOUR", SILENT)
    shim.create("/bin/sleep", "600")
    shim.start()
    with suppress(VmcellError):  # it may be gone before the answer
        shim.kill(9)
    assert shim.wait() == 137
    shim.delete()
