"""A guest that stands still to be saved, and goes on in the same machine."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from agent_harness import AgentUnderTest, Running, container_spec, process_spec, run

from vmcell_protos import agent as messages
from vmcell_protos.errors import VmcellError

C1 = messages.ContainerRef(container_id="c1")
TICKING = "echo up; while :; do echo tick; sleep 0.01; done"
COUNTING = "n=0; while [ $n -lt 20000 ]; do n=$((n+1)); echo $n; done"


def prepare(agent: AgentUnderTest, *, drop_caches: bool = False) -> None:
    request = messages.PrepareSnapshotRequest(drop_caches=drop_caches)
    agent.client.call("PrepareSnapshot", request)


def resume(agent: AgentUnderTest, **what: object) -> None:
    agent.client.call("ResumeGuest", messages.ResumeGuestRequest(**what))  # type: ignore[arg-type]


def started(agent: AgentUnderTest, script: str, **how: bool) -> Running:
    return agent.create(container_spec(process_spec("sh", "-c", script)), **how).start()


def is_frozen(agent: AgentUnderTest, container_id: str = "c1") -> bool:
    return "frozen 1" in Path(f"{agent.cgroup}/{container_id}/cgroup.events").read_text()


def drain(running: Running, wait_s: float = 0.05) -> bytes:
    """What can be read now, or comes within `wait_s` of the last of it; 0 for one that goes on."""
    data = b""
    stream = running.sockets["stdout"]
    while select.select([stream], [], [], wait_s)[0]:
        data += stream.recv(1 << 16)
    return data


@pytest.mark.root
def test_what_runs_stands_still_and_goes_on(agent: AgentUnderTest) -> None:
    init = started(agent, TICKING)
    init.read_until(b"tick\n")
    for _ in range(2):
        prepare(agent)  # the second one changes nothing
        assert is_frozen(agent)
    drain(init)
    assert not select.select([init.sockets["stdout"]], [], [], 0.3)[0]
    resume(agent)
    init.read_until(b"tick\n")
    assert not is_frozen(agent)
    prepare(agent)
    resume(agent)
    init.read_until(b"tick\n")


@pytest.mark.root
def test_no_byte_is_lost_or_told_twice(agent: AgentUnderTest) -> None:
    """Output while the guest stands still again and again, its reader slow: pipes and sockets are
    full at most of the times."""
    init = started(agent, COUNTING)
    taken: list[bytes] = []
    end = threading.Event()

    def read_slowly() -> None:
        while part := init.sockets["stdout"].recv(700):
            taken.append(part)
            end.wait(0.0005)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    rounds = 0
    while not rounds or (reader.is_alive() and rounds < 25):
        prepare(agent)
        resume(agent)
        rounds += 1
    end.set()
    reader.join(timeout=30)
    assert init.wait() == 0
    assert b"".join(taken) == b"".join(b"%d\n" % number for number in range(1, 20001))


@pytest.mark.root
def test_input_and_both_outputs_go_on(agent: AgentUnderTest) -> None:
    script = "echo up; while read line; do echo out $line; echo err $line >&2; done; echo end"
    init = started(agent, script, stdin=True)
    init.read_until(b"up\n")
    prepare(agent)
    init.sockets["stdin"].sendall(b"one\n")
    assert not select.select([init.sockets["stdout"]], [], [], 0.2)[0]
    resume(agent)
    init.read_until(b"out one\n")
    init.read_until(b"err one\n", "stderr")
    prepare(agent)
    init.sockets["stdin"].sendall(b"two\n")
    init.sockets["stdin"].shutdown(1)
    resume(agent)
    assert init.read() == b"out two\nend\n"
    assert init.wait() == 0


@pytest.mark.root
def test_a_terminal_goes_on(agent: AgentUnderTest) -> None:
    init = started(agent, "stty -echo; echo up; cat", terminal=True)
    init.read_until(b"up\r\n")
    prepare(agent)
    init.sockets["stdout"].sendall(b"hello\n")
    assert not select.select([init.sockets["stdout"]], [], [], 0.2)[0]
    resume(agent)
    init.read_until(b"hello\r\n")


@pytest.mark.root
def test_what_the_user_had_frozen_stays_so(agent: AgentUnderTest) -> None:
    agent.attach_upper("vdb")
    first = started(agent, TICKING)
    second = agent.create(container_spec(process_spec("sh", "-c", TICKING)), upper="vdb").start()
    for init in (first, second):
        init.read_until(b"tick\n")
    agent.client.call("FreezeContainer", C1)
    prepare(agent)
    assert (is_frozen(agent, "c1"), is_frozen(agent, "c2")) == (True, True)
    for method in ("FreezeContainer", "ThawContainer"):
        with pytest.raises(VmcellError, match="the guest is being saved") as error:
            agent.client.call(method, C1)
        assert error.value.code == "failed_precondition"
    resume(agent)
    assert (is_frozen(agent, "c1"), is_frozen(agent, "c2")) == (True, False)
    second.read_until(b"tick\n")
    drain(first)
    agent.client.call("ThawContainer", C1)
    first.read_until(b"tick\n")


@pytest.mark.root
def test_nothing_is_made_or_started_meanwhile(agent: AgentUnderTest) -> None:
    agent.attach_upper("vdb")
    init = started(agent, TICKING)
    declared = agent.add(init, process_spec("echo", "hi"), "before")
    waiting = agent.create(container_spec(process_spec("echo", "hi")), upper="vdb")
    prepare(agent)
    with agent.client.dial(declared.streams.stdout), agent.client.dial(declared.streams.stderr):
        for act in (
            lambda: agent.add(init, process_spec("true"), "late"),
            lambda: agent.client.call("StartProcess", declared.ref),
            lambda: agent.client.call("StartProcess", waiting.ref),
            lambda: agent.create(container_spec(process_spec("true"))),
        ):
            with pytest.raises(VmcellError, match="the guest is being saved") as error:
                act()
            assert error.value.code == "failed_precondition"
        resume(agent)
        agent.client.call("StartProcess", declared.ref)
    assert waiting.start().read() == b"hi\n"


@pytest.mark.root
def test_a_start_that_is_under_way_is_waited_for(agent: AgentUnderTest) -> None:
    init = started(agent, TICKING)
    added = agent.add(init, process_spec("sh", "-c", "echo hi; exec sleep 1000"), "slow")
    starting = agent.client.begin("StartProcess", added.ref)  # its streams are yet to be dialled
    preparing = agent.client.begin("PrepareSnapshot", messages.PrepareSnapshotRequest())
    assert not agent.client.answered(preparing, 0.2)
    assert not is_frozen(agent)
    for method in ("PrepareSnapshot", "ResumeGuest"):
        with pytest.raises(VmcellError, match="being saved") as error:
            agent.client.call(method, messages.Empty())
        assert error.value.code == "failed_precondition"
    for name in ("stdout", "stderr"):
        added.sockets[name] = agent.client.dial(getattr(added.streams, name))
    agent.client.finish(starting)
    agent.client.finish(preparing)
    assert is_frozen(agent)
    resume(agent)
    added.read_until(b"hi\n")


@pytest.mark.root
def test_what_is_killed_while_it_stands_still_tells_all_it_said(agent: AgentUnderTest) -> None:
    agent.attach_upper("vdb")
    init = started(agent, "exec yes said")
    other = agent.create(container_spec(process_spec("sh", "-c", TICKING)), upper="vdb").start()
    agent.until_it_waits_for_a_reader("c1")
    prepare(agent)
    waiting = agent.client.begin("WaitProcess", init.ref)
    init.signal(signal.SIGKILL)
    assert not agent.client.answered(waiting, 2.5)  # longer than an idle reader is waited for
    resume(agent)
    said = init.read()
    assert said == (b"said\n" * (len(said) // 5 + 1))[: len(said)]
    assert len(said) > 64 << 10  # the pipe was full, and it is empty now
    payload = agent.client.finish(waiting)
    assert messages.WaitProcessResponse.decode(payload).exit_status == 137
    init.delete()
    other.read_until(b"tick\n")
    prepare(agent)
    resume(agent)
    other.read_until(b"tick\n")


@pytest.mark.root
def test_what_was_written_is_on_the_disk(agent: AgentUnderTest) -> None:
    init = started(agent, "echo kept >/kept; echo up; exec sleep 1000")
    init.read_until(b"up\n")
    prepare(agent)
    image = agent.directory / "copy.ext4"
    shutil.copy(agent.directory / "vda.ext4", image)
    # As a restored guest mounts it: what the journal has is played back.
    done = subprocess.run(["e2fsck", "-E", "journal_only", "-y", str(image)], capture_output=True)
    assert done.returncode in (0, 1), done.stdout
    assert run("debugfs", "-R", "cat /upper/kept", str(image)) == "kept"
    resume(agent)


@pytest.mark.root
def test_caches_are_dropped_where_that_is_asked_for(agent: AgentUnderTest) -> None:
    started(agent, TICKING)
    vm = agent.directory / "vm"
    prepare(agent)
    with pytest.raises(VmcellError, match=r"write 3 to .*drop_caches: No such file") as error:
        prepare(agent, drop_caches=True)
    assert error.value.code == "internal"
    assert is_frozen(agent)  # as it was before
    vm.mkdir()
    for name in ("drop_caches", "compact_memory"):
        (vm / name).write_text("")
    prepare(agent, drop_caches=True)
    assert (vm / "drop_caches").read_text() == "3"
    assert (vm / "compact_memory").read_text() == "1"
    resume(agent)
    assert not is_frozen(agent)


@pytest.mark.root
def test_a_guest_that_cannot_be_saved_goes_on(agent: AgentUnderTest) -> None:
    init = started(agent, TICKING)
    with pytest.raises(VmcellError, match="drop_caches"):
        prepare(agent, drop_caches=True)  # of a directory that there is not
    assert not is_frozen(agent)
    drain(init, wait_s=0)
    init.read_until(b"tick\n")
    added = agent.add(init, process_spec("echo", "hi"), "after").start()
    assert added.read() == b"hi\n"


@pytest.mark.root
def test_the_guest_is_set_before_it_goes_on(agent: AgentUnderTest) -> None:
    script = "echo up; while :; do cat /proc/sys/net/core/somaxconn; sleep 0.01; done"
    init = started(agent, script)
    init.read_until(b"up\n")
    prepare(agent)
    drain(init)
    asked = time.time_ns()
    guest = messages.ConfigureGuestRequest(
        unix_time_ns=asked,
        entropy=os.urandom(64),
        hostname="another",
        sysctls={"net.core.somaxconn": "777"},
    )
    resume(agent, guest=guest)
    late_ns = int((agent.directory / "clock").read_text()) - asked
    assert 0 <= late_ns < 5e9
    init.read_until(b"777\n")


@pytest.mark.root
@pytest.mark.parametrize(
    ("request_", "words", "code"),
    [
        (messages.ResumeGuestRequest(machine_id=b"x" * 15), "has 15 bytes", "invalid_argument"),
        (
            messages.ResumeGuestRequest(guest=messages.ConfigureGuestRequest(unix_time_ns=5)),
            "before the year 2020",
            "invalid_argument",
        ),
        (
            messages.ResumeGuestRequest(
                guest=messages.ConfigureGuestRequest(
                    interfaces=[messages.Interface(mac="02:00:00:00:99:99")]
                )
            ),
            "no interface has MAC",
            "not_found",
        ),
        (
            messages.ResumeGuestRequest(
                guest=messages.ConfigureGuestRequest(
                    interfaces=[messages.Interface(mac="02:00:00:00:99:99", gateway="x")]
                )
            ),
            "no IP address",
            "invalid_argument",
        ),
    ],
)
def test_a_resume_that_cannot_be_leaves_the_guest_as_it_is(
    agent: AgentUnderTest, request_: messages.ResumeGuestRequest, words: str, code: str
) -> None:
    init = started(agent, TICKING)
    init.read_until(b"tick\n")
    prepare(agent)
    drain(init)
    with pytest.raises(VmcellError, match=words) as error:
        agent.client.call("ResumeGuest", request_)
    assert error.value.code == code
    assert is_frozen(agent)
    assert not select.select([init.sockets["stdout"]], [], [], 0.2)[0]
    resume(agent)
    init.read_until(b"tick\n")


@pytest.mark.root
def test_what_was_not_saved_is_neither_adopted_nor_resumed(agent: AgentUnderTest) -> None:
    started(agent, TICKING)
    adoption = messages.AdoptContainerRequest(container_id="c1", new_container_id="c9")

    def refused() -> None:
        for method, request in (
            ("ResumeGuest", messages.ResumeGuestRequest()),
            ("AdoptContainer", adoption),
        ):
            with pytest.raises(VmcellError, match="saved by PrepareSnapshot") as error:
                agent.client.call(method, request)
            assert error.value.code == "failed_precondition"

    refused()
    prepare(agent)
    resume(agent)
    refused()


@pytest.mark.root
def test_a_guest_without_containers_is_saved_too(agent: AgentUnderTest) -> None:
    prepare(agent)
    resume(agent, machine_id=bytes(range(16)))
    init = started(agent, TICKING)
    init.read_until(b"tick\n")


@pytest.mark.root
def test_shutdown_of_a_saved_guest_lets_it_say_good_bye(agent: AgentUnderTest) -> None:
    init = started(agent, "trap 'echo asked' TERM; echo up; while :; do sleep 0.01; done")
    init.read_until(b"up\n")
    prepare(agent)
    agent.client.call("Shutdown", messages.Empty())
    init.read_until(b"asked\n")
    assert agent.process.wait(timeout=10) == 0


@pytest.mark.root
def test_standing_still_leaves_no_descriptor(agent: AgentUnderTest) -> None:
    init = started(agent, TICKING, stdin=True)
    init.read_until(b"tick\n")
    prepare(agent)
    resume(agent, machine_id=os.urandom(16))
    before = agent.open_files()
    for _ in range(5):
        prepare(agent)
        resume(agent, machine_id=os.urandom(16))
    assert agent.open_files() == before
