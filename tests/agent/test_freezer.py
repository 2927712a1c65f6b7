"""Containers that stand still: what reaches them, what does not, and a freeze that never comes."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import (
    AgentUnderTest,
    Running,
    cgroup2_mount,
    container_spec,
    process_spec,
)

from vmcell_agent import freezer
from vmcell_agent.cgroup import Cgroup
from vmcell_agent.cgroupwatch import EventsFile
from vmcell_agent.eventloop import Loop
from vmcell_agent.freezer import Freezer
from vmcell_protos import agent as messages
from vmcell_protos.errors import VmcellError

C1 = messages.ContainerRef(container_id="c1")
TICKING = "echo up; while :; do echo tick; sleep 0.01; done"


def ticking(agent: AgentUnderTest) -> Running:
    init = agent.create(container_spec(process_spec("sh", "-c", TICKING))).start()
    init.read_until(b"tick\n")
    return init


def ticks(init: Running, seconds: float) -> bool:
    """Whether anything new is said within `seconds`, once all that was said before is read."""
    stream = init.sockets["stdout"]
    while select.select([stream], [], [], 0.05)[0]:
        stream.recv(1 << 16)
    return bool(select.select([stream], [], [], seconds)[0])


@pytest.mark.root
def test_a_frozen_container_stands_still_until_it_is_thawed(agent: AgentUnderTest) -> None:
    init = ticking(agent)
    for _ in range(2):
        agent.client.call("FreezeContainer", C1)  # the second one changes nothing
    assert "frozen 1" in Path(f"{agent.cgroup}/c1/cgroup.events").read_text()
    assert not ticks(init, 0.3)
    for _ in range(2):
        agent.client.call("ThawContainer", C1)
    init.read_until(b"tick\n")


@pytest.mark.root
@pytest.mark.parametrize("everyone", [False, True])
def test_sigkill_ends_what_is_frozen(agent: AgentUnderTest, everyone: bool) -> None:
    init = ticking(agent)
    agent.client.call("FreezeContainer", C1)
    init.signal(signal.SIGTERM)  # waits for the thaw
    waiting = agent.client.begin("WaitProcess", init.ref)
    assert not agent.client.answered(waiting, 0.2)
    init.signal(signal.SIGKILL, everyone=everyone)
    payload = agent.client.finish(waiting)
    assert messages.WaitProcessResponse.decode(payload).exit_status == 137
    init.delete()
    assert not Path(f"{agent.cgroup}/c1").exists()


@pytest.mark.root
def test_nothing_is_started_in_a_frozen_container(agent: AgentUnderTest) -> None:
    init = ticking(agent)
    added = agent.add(init, process_spec("true"), "before")
    agent.client.call("FreezeContainer", C1)
    for act in (lambda: agent.add(init, process_spec("true"), "late"), added.start):
        with pytest.raises(VmcellError, match="is frozen; thaw it first") as error:
            act()
        assert error.value.code == "failed_precondition"
    agent.client.call("ThawContainer", C1)
    again = agent.add(init, process_spec("echo", "hi"), "after").start()
    assert again.read() == b"hi\n"


@pytest.mark.root
def test_what_does_not_run_cannot_be_frozen(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("true")))
    for method in ("FreezeContainer", "ThawContainer"):
        with pytest.raises(VmcellError, match="is not running; its init is declared"):
            agent.client.call(method, C1)
        with pytest.raises(VmcellError, match="no container 'c9'") as error:
            agent.client.call(method, messages.ContainerRef(container_id="c9"))
        assert error.value.code == "not_found"
    init.start()
    assert init.wait() == 0
    with pytest.raises(VmcellError, match="its init is ended"):
        agent.client.call("FreezeContainer", C1)


@pytest.mark.root
def test_shutdown_asks_frozen_containers_too(agent: AgentUnderTest) -> None:
    script = "trap 'echo asked' TERM; echo up; while :; do sleep 0.01; done"
    init = agent.create(container_spec(process_spec("sh", "-c", script))).start()
    init.read_until(b"up\n")
    agent.client.call("FreezeContainer", C1)
    agent.client.call("Shutdown", messages.Empty())
    init.read_until(b"asked\n")
    assert agent.process.wait(timeout=10) == 0


@pytest.mark.root
def test_who_waits_for_the_oom_killer_is_told_when_the_container_goes(
    agent: AgentUnderTest,
) -> None:
    init = agent.create(container_spec(process_spec("sleep", "1000"))).start()
    request = messages.WaitOomRequest(container_id="c1", seen=0)
    calls = [agent.client.begin("WaitOom", request) for _ in range(64)]
    with pytest.raises(VmcellError, match="64 waiters") as error:
        agent.client.call("WaitOom", request)
    assert error.value.code == "resource_exhausted"
    init.signal(signal.SIGKILL)
    payload = agent.client.call("WaitProcess", init.ref)
    assert messages.WaitProcessResponse.decode(payload).oom_kills == 0
    assert not agent.client.answered(calls[0])
    init.delete()
    for call in calls:
        with pytest.raises(VmcellError, match="was removed") as error:
            agent.client.finish(call)
        assert error.value.code == "not_found"


@pytest.fixture
def own_cgroup() -> Iterator[Cgroup]:
    cgroup = Cgroup(f"{cgroup2_mount()}/vmcell-watch-{os.getpid()}")
    cgroup.create({})
    yield cgroup
    cgroup.remove()


@pytest.mark.root
def test_each_change_of_an_events_file_is_told_until_it_is_gone(own_cgroup: Cgroup) -> None:
    loop = Loop()
    seen: list[bool] = []

    def changed() -> None:
        seen.append(own_cgroup.stands_still)
        if len(seen) >= 2 and seen[-1] is not seen[-2]:
            loop.stop()

    file = EventsFile(loop, f"{own_cgroup.path}/cgroup.events", changed)
    deadline = loop.call_later(5, loop.stop)
    for frozen in (True, False, True):
        loop.call_later(0, lambda frozen=frozen: own_cgroup.freeze(frozen))  # type: ignore[misc]
        loop.run()
        assert seen[-1] is frozen
    own_cgroup.remove()
    loop.call_later(0.1, loop.stop)
    loop.run()
    before = len(seen)
    loop.call_later(0.1, loop.stop)
    loop.run()  # a removed file is not looked at again and again
    assert len(seen) == before
    deadline.cancel()
    file.close()
    file.close()
    loop.close()


class WedgedCgroup(Cgroup):
    """One of whose processes never comes to a place where it could stop."""

    def __init__(self) -> None:
        super().__init__("/nowhere")
        self.asked: list[bool] = []

    def freeze(self, frozen: bool) -> None:
        self.asked.append(frozen)

    @property
    def stands_still(self) -> bool:
        return False


def test_a_freeze_that_never_comes_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezer, "FREEZE_SECONDS", 0.05)
    loop, cgroup = Loop(), WedgedCgroup()
    answers: list[VmcellError | None] = []

    def answer(result: VmcellError | None) -> None:
        answers.append(result)
        loop.stop()

    freezer_ = Freezer(loop, cgroup, "container 'x'")
    freezer_.set(True, answer)
    loop.call_later(5, loop.stop)
    loop.run()
    assert str(answers[0]) == "container 'x' did not freeze within 0 s"
    assert answers[0] is not None
    assert answers[0].code == "deadline_exceeded"
    assert cgroup.asked == [True, False]
    assert not freezer_.frozen
    loop.close()


def test_a_thaw_ends_the_wait_of_a_freeze() -> None:
    loop, cgroup = Loop(), WedgedCgroup()
    answers: list[VmcellError | None] = []
    freezer_ = Freezer(loop, cgroup, "container 'x'")
    freezer_.set(True, answers.append)
    freezer_.set(False, answers.append)
    assert [str(answer) for answer in answers] == [
        "container 'x' was thawed meanwhile",
        "None",
    ]
    freezer_.set(True, answers.append)
    freezer_.close()
    assert "was removed" in str(answers[2])
    loop.close()
