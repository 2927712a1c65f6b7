"""A restored guest: another host, another name, other streams, another identity."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from agent_harness import (
    AgentUnderTest,
    Running,
    container_spec,
    create_container,
    make_busybox_tree,
    make_erofs,
    process_spec,
    running_agent,
)

from vmcell_protos import agent as messages
from vmcell_protos.errors import VmcellError

TICKING = "echo up; while :; do echo tick; sleep 0.01; done"
ECHOING = "echo up; while read line; do echo got $line; done; echo end; exec sleep 1000"
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def started(agent: AgentUnderTest, script: str, **how: object) -> Running:
    init = agent.create(container_spec(process_spec("sh", "-c", script)), **how).start()
    init.read_until(b"up")
    return init


def save(agent: AgentUnderTest, *running: Running) -> None:
    """Save the guest, and let everything break as it is for the machine that is restored."""
    agent.client.call("PrepareSnapshot", messages.PrepareSnapshotRequest())
    agent.restored()
    for row in running:
        row.close()


def adopt(
    agent: AgentUnderTest, init: Running, new_id: str, streams: messages.Streams | None = None
) -> tuple[Running, messages.AdoptContainerResponse]:
    """The container under its new name; its streams are not dialled yet."""
    streams = streams or messages.Streams()
    request = messages.AdoptContainerRequest(
        container_id=init.ref.container_id, new_container_id=new_id, streams=streams
    )
    payload = agent.client.call("AdoptContainer", request)
    adopted = agent.keep(Running(agent.client, new_id, "", streams))
    adopted.pid = init.pid
    return adopted, messages.AdoptContainerResponse.decode(payload)


def dial(agent: AgentUnderTest, running: Running) -> None:
    for name in ("stdin", "stdout", "stderr"):
        if stream_id := getattr(running.streams, name):
            running.sockets[name] = agent.client.dial(stream_id)


def new_streams(agent: AgentUnderTest, **how: bool) -> messages.Streams:
    """stdin, stdout and stderr, or one for a terminal."""
    new = agent.client.new_stream
    if how.get("terminal"):
        return messages.Streams(stdout=new(), terminal=True)
    return messages.Streams(stdin=new(), stdout=new(), stderr=new())


def resume(agent: AgentUnderTest, **what: object) -> None:
    agent.client.call("ResumeGuest", messages.ResumeGuestRequest(**what))  # type: ignore[arg-type]


def told(agent: AgentUnderTest, init: Running, script: str, exec_id: str = "look") -> str:
    added = agent.add(init, process_spec("sh", "-c", script), exec_id).start()
    out = added.read() + added.read("stderr")
    added.wait()
    added.delete()
    return out.decode()


@pytest.mark.root
def test_a_restored_container_lives_under_its_new_name(agent: AgentUnderTest) -> None:
    init = started(agent, ECHOING, stdin=True)
    save(agent, init)
    adopted, answer = adopt(agent, init, "clone-7", new_streams(agent))
    assert (answer.guest_pid, answer.running, answer.user_frozen) == (init.pid, True, False)
    resuming = agent.client.begin("ResumeGuest", messages.ResumeGuestRequest())
    assert not agent.client.answered(resuming, 0.2)  # it waits for the streams
    dial(agent, adopted)
    agent.client.finish(resuming)
    adopted.sockets["stdin"].sendall(b"this\n")
    adopted.read_until(b"got this\n")
    assert told(agent, adopted, "echo hi") == "hi\n"
    for method in ("ContainerStats", "ListProcesses", "FreezeContainer", "ThawContainer"):
        agent.client.call(method, messages.ContainerRef(container_id="clone-7"))
        with pytest.raises(VmcellError, match="no container 'c1'"):
            agent.client.call(method, messages.ContainerRef(container_id="c1"))
    adopted.sockets["stdin"].shutdown(1)
    adopted.read_until(b"end\n")
    adopted.signal(signal.SIGKILL)
    assert adopted.wait() == 137
    with pytest.raises(VmcellError, match="container 'clone-7' is not running"):
        agent.add(adopted, process_spec("true"), "late")
    adopted.delete()
    assert agent.state_left() == []
    assert not Path(f"{agent.cgroup}/c1").exists()


@pytest.mark.root
def test_the_old_name_is_free_for_another(agent: AgentUnderTest) -> None:
    agent.attach_upper("vdb")
    init = started(agent, TICKING)
    save(agent, init)
    adopted, _ = adopt(agent, init, "clone")
    with pytest.raises(VmcellError, match="no container 'c1'"):
        adopt(agent, init, "again")
    resume(agent)
    spec = container_spec(process_spec("sh", "-c", TICKING))
    second = agent.keep(create_container(agent.client, "c1", spec, upper="vdb")).start()
    for row, name in ((adopted, "clone"), (second, "c1")):
        assert told(agent, row, "echo hi") == "hi\n"
        row.signal(signal.SIGKILL)
        payload = agent.client.call("WaitProcess", row.ref)
        assert messages.WaitProcessResponse.decode(payload).exit_status == 137, name
        row.delete()
    assert agent.state_left() == []


@pytest.mark.root
def test_what_was_pending_goes_to_the_new_reader(agent: AgentUnderTest) -> None:
    """The pipe, the pump and the connection are full when the guest is saved. What has left the
    guest is gone; from there on each byte comes once and in order."""
    count = "n=0; while [ $n -lt 90000 ]; do n=$((n+1)); echo $n; done; exec sleep 1000"
    init = agent.create(container_spec(process_spec("sh", "-c", count))).start()
    agent.until_it_waits_for_a_reader("c1")
    agent.client.call("PrepareSnapshot", messages.PrepareSnapshotRequest())
    stream, read = init.sockets["stdout"], b""
    while select.select([stream], [], [], 0)[0]:
        read += stream.recv(1 << 16)
    agent.restored()
    init.close()
    adopted, _ = adopt(agent, init, "clone", new_streams(agent))
    dial(agent, adopted)
    resume(agent)
    whole = b"".join(b"%d\n" % number for number in range(1, 90001))
    rest = adopted.read_until(b"90000\n")
    assert read
    assert read + rest == whole


@pytest.mark.root
def test_input_that_had_arrived_is_not_lost(agent: AgentUnderTest) -> None:
    script = "echo up; read first; echo got $first; head -c 300000 | wc -c; exec sleep 1000"
    init = started(agent, script, stdin=True)
    init.sockets["stdin"].sendall(b"one\n")
    init.read_until(b"got one\n")
    save(agent, init)
    adopted, _ = adopt(agent, init, "clone", new_streams(agent))
    dial(agent, adopted)
    adopted.sockets["stdin"].sendall(b"x" * 50_000)
    resume(agent)
    adopted.sockets["stdin"].sendall(b"x" * 250_000)
    adopted.read_until(b"300000\n")


@pytest.mark.root
def test_a_terminal_gets_another_stream(agent: AgentUnderTest) -> None:
    init = started(agent, "stty -echo; echo up; cat", terminal=True)
    for number in range(2):
        save(agent, init)
        with pytest.raises(VmcellError, match="has a terminal") as error:
            adopt(agent, init, "clone", new_streams(agent))
        assert error.value.code == "invalid_argument"
        streams = new_streams(agent, terminal=True)
        init, _ = adopt(agent, init, f"clone-{number}", streams)
        dial(agent, init)
        resume(agent)
        init.sockets["stdout"].sendall(b"hello\n")
        init.read_until(b"hello\r\n")
        size = messages.ResizePtyRequest(container_id=init.ref.container_id, rows=7, columns=77)
        agent.client.call("ResizePty", size)
    # Its half was closed by the host before; another host's is open again.
    init.sockets["stdout"].shutdown(1)
    assert not select.select([init.sockets["stdout"]], [], [], 0.1)[0]
    save(agent, init)
    init, _ = adopt(agent, init, "last", new_streams(agent, terminal=True))
    dial(agent, init)
    resume(agent)
    init.sockets["stdout"].sendall(b"again\n")
    init.read_until(b"again\r\n")


@pytest.mark.root
def test_without_streams_output_is_dropped_and_input_ended(agent: AgentUnderTest) -> None:
    script = "echo up; cat; echo end; head -c 300000 /dev/zero; exec sleep 1000"
    init = started(agent, script, stdin=True)
    save(agent, init)
    adopted, _ = adopt(agent, init, "clone")
    resume(agent)
    adopted.become("sleep 1000")


@pytest.mark.root
@pytest.mark.parametrize("terminal", [False, True])
def test_what_nobody_adopts_has_lost_its_reader(agent: AgentUnderTest, terminal: bool) -> None:
    script = "echo up; head -c 300000 /dev/zero; exec sleep 1000"
    init = agent.create(container_spec(process_spec("sh", "-c", script)), terminal=terminal).start()
    init.read_until(b"up")
    save(agent, init)
    resume(agent)
    init.become("sleep 1000")


@pytest.mark.root
def test_a_stream_it_never_had_ends_at_once(agent: AgentUnderTest) -> None:
    spec = container_spec(process_spec("sh", "-c", "echo up; exec sleep 1000"))
    init = agent.create(spec).start()  # without stdin
    init.read_until(b"up")
    save(agent, init)
    adopted, _ = adopt(agent, init, "clone", new_streams(agent))
    dial(agent, adopted)
    resume(agent)
    assert adopted.read("stdin") == b""
    assert not select.select([adopted.sockets["stdout"]], [], [], 0.1)[0]


@pytest.mark.root
def test_added_processes_live_on_without_a_name(agent: AgentUnderTest) -> None:
    init = started(agent, TICKING)
    script = "echo up; while [ ! -e /run/go ]; do sleep 0.01; done; echo x; touch /run/went"
    running = agent.add(init, process_spec("sh", "-c", script), "one").start()
    running.read_until(b"up\n")
    ended = agent.add(init, process_spec("true"), "two").start()
    assert ended.wait() == 0
    declared = agent.add(init, process_spec("true"), "three")
    waiting = agent.client.begin("WaitProcess", running.ref)
    assert not agent.client.answered(waiting)
    save(agent, init, running, ended)
    adopted, _ = adopt(agent, init, "clone")
    resume(agent)
    rows = messages.ListProcessesResponse.decode(
        agent.client.call("ListProcesses", messages.ContainerRef(container_id="clone"))
    ).processes
    assert (running.pid, "") in [(row.guest_pid, row.exec_id) for row in rows]
    for name in ("one", "two", "three"):  # their names are free
        assert told(agent, adopted, "echo hi", name) == "hi\n"
    before = len(agent.open_files())
    told(agent, adopted, "touch /run/go; while [ ! -e /run/went ]; do sleep 0.01; done")
    deadline = time.monotonic() + 10
    while len(agent.open_files()) >= before:  # its pipes are given back
        assert time.monotonic() < deadline
    assert declared.pid == 0
    adopted.signal(signal.SIGKILL)
    assert adopted.wait() == 137
    adopted.delete()
    assert agent.state_left() == []


@pytest.mark.root
def test_a_container_of_the_users_stays_frozen(agent: AgentUnderTest) -> None:
    init = started(agent, TICKING)
    agent.client.call("FreezeContainer", messages.ContainerRef(container_id="c1"))
    save(agent, init)
    adopted, answer = adopt(agent, init, "clone", new_streams(agent))
    assert (answer.running, answer.user_frozen) == (True, True)
    dial(agent, adopted)
    resume(agent)
    while select.select([adopted.sockets["stdout"]], [], [], 0.2)[0]:
        assert adopted.sockets["stdout"].recv(1 << 16)
    with pytest.raises(VmcellError, match="container 'clone' is frozen; thaw it first"):
        agent.add(adopted, process_spec("true"), "late")
    agent.client.call("ThawContainer", messages.ContainerRef(container_id="clone"))
    adopted.read_until(b"tick\n")


@pytest.mark.root
def test_a_container_that_was_not_started_is_started_by_its_new_owner(
    agent: AgentUnderTest,
) -> None:
    agent.attach_upper("vdb")
    other = started(agent, TICKING)
    init = agent.create(container_spec(process_spec("echo", "hi")), upper="vdb")
    with agent.client.dial(init.streams.stdout):  # the other one is yet to be dialled
        save(agent, other)
    adopted, answer = adopt(agent, init, "clone", init.streams)  # its host counts like the other
    assert (answer.guest_pid, answer.running, answer.user_frozen) == (0, False, False)
    resume(agent)
    assert adopted.start().read() == b"hi\n"
    assert adopted.wait() == 0


@pytest.mark.root
def test_an_init_that_has_ended_tells_its_end_to_the_new_owner(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("sh", "-c", "exit 7"))).start()
    assert init.wait() == 7
    save(agent, init)
    adopted, answer = adopt(agent, init, "clone", new_streams(agent))
    assert (answer.guest_pid, answer.running) == (0, False)
    dial(agent, adopted)
    resume(agent)
    assert adopted.read() == b""
    assert adopted.wait() == 7
    adopted.delete()


@pytest.mark.root
def test_an_adoption_that_cannot_be(agent: AgentUnderTest) -> None:
    agent.attach_upper("vdb")
    init = started(agent, TICKING)
    started(agent, TICKING, upper="vdb")
    save(agent, init)
    for old, new, streams, words, code in (
        ("c1", "c2", messages.Streams(), "container 'c2' exists already", "already_exists"),
        ("c9", "c3", messages.Streams(), "no container 'c9'", "not_found"),
        ("c1", "../c", messages.Streams(), "new container id '../c' must be", "invalid_argument"),
        ("c1", "", messages.Streams(), "new container id '' must be", "invalid_argument"),
        ("c1", "c3", messages.Streams(stdin=5, stdout=5), "different ids", "invalid_argument"),
        ("c1", "c3", messages.Streams(terminal=True), "has one stream", "invalid_argument"),
        (
            "c1",
            "c3",
            messages.Streams(terminal=True, stdout=5),
            "has no terminal",
            "invalid_argument",
        ),
    ):
        request = messages.AdoptContainerRequest(
            container_id=old, new_container_id=new, streams=streams
        )
        with pytest.raises(VmcellError, match=words) as error:
            agent.client.call("AdoptContainer", request)
        assert error.value.code == code
    renamed, _ = adopt(agent, init, "c3", messages.Streams(stdout=1000))
    adopt(agent, renamed, "c1", messages.Streams(stdout=1000))  # instead of the ones before
    second = Running(agent.client, "c2", "", messages.Streams())
    with pytest.raises(VmcellError, match="stream id 1000 is in use") as error:
        adopt(agent, second, "c4", messages.Streams(stdout=1000))
    assert error.value.code == "already_exists"
    adopt(agent, second, "c4")


@pytest.mark.root
def test_streams_that_nobody_dials_leave_the_guest_as_it_is(agent: AgentUnderTest) -> None:
    init = started(agent, TICKING)
    save(agent, init)
    adopted, _ = adopt(agent, init, "clone", new_streams(agent))
    adopted.sockets["stdout"] = agent.client.dial(adopted.streams.stdout)
    with pytest.raises(
        VmcellError, match=r"stdin of init of container 'clone'.* not dialled within 2 s"
    ) as error:
        resume(agent)
    assert error.value.code == "deadline_exceeded"
    adopted.close()
    again, _ = adopt(agent, adopted, "clone", new_streams(agent))
    dial(agent, again)
    resume(agent)
    again.read_until(b"tick\n")


@pytest.mark.root
def test_another_reset_while_the_guest_waits_to_go_on(agent: AgentUnderTest) -> None:
    """A machine that is restored, and saved again before it was told to go on."""
    init = started(agent, TICKING)
    save(agent, init)
    adopted, _ = adopt(agent, init, "clone", new_streams(agent))
    agent.client.begin("ResumeGuest", messages.ResumeGuestRequest())
    agent.client.call("Hello", messages.HelloRequest())
    agent.restored()
    agent.client.call("PrepareSnapshot", messages.PrepareSnapshotRequest())  # it is saved still
    last, answer = adopt(agent, adopted, "last", adopted.streams)  # the same numbers again
    assert answer.running
    dial(agent, last)
    resume(agent)
    last.read_until(b"tick\n")


@pytest.mark.root
def test_a_guest_is_saved_and_restored_many_times(agent: AgentUnderTest) -> None:
    """More often than anything that is left of a host may pile up to."""
    init = started(agent, TICKING)
    ref = messages.WaitOomRequest(container_id="c1")
    for number in range(70):
        agent.client.begin("WaitProcess", init.ref)
        agent.client.begin("WaitOom", ref)
        save(agent, init)
        init, _ = adopt(agent, init, f"clone-{number}", new_streams(agent))
        ref = messages.WaitOomRequest(container_id=f"clone-{number}")
        dial(agent, init)
        resume(agent)
        if number == 5:
            before = agent.open_files()
    init.read_until(b"tick\n")
    assert agent.open_files() == before


@pytest.mark.root
def test_a_guest_that_no_host_answers_ends(agent: AgentUnderTest) -> None:
    init = started(agent, TICKING)
    agent.client.call("PrepareSnapshot", messages.PrepareSnapshotRequest())
    ours, nobody = socket.socketpair()
    agent.client.be_reset(lambda: ours)
    nobody.close()
    assert agent.process.wait(timeout=10) == 0
    assert agent.logged()[-1].startswith("no host answers within 3 s: ")
    assert not Path(f"{agent.cgroup}/c1").exists()
    assert init.pid


def forward_that_echoes(agent: AgentUnderTest, port: int) -> socket.socket:
    """A port forward to a program that may not listen yet."""
    deadline = time.monotonic() + 10
    while True:
        forward = agent.forward(port)
        with suppress(OSError):  # closed, because nobody listens
            forward.sendall(b"ping")
            if forward.recv(4) == b"ping":
                return forward
        forward.close()
        assert time.monotonic() < deadline


@pytest.mark.root
def test_connections_that_the_host_before_had_are_dropped(agent: AgentUnderTest) -> None:
    """One that has not said which stream it is, and a port forward."""
    init = started(agent, "echo up; exec nc -l -p 4000 -e cat")
    unnamed = agent.client.dial_unnamed()
    forward = forward_that_echoes(agent, 4000)
    save(agent, init)
    for connection in (unnamed, forward):
        with connection, suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    resume(agent)


@pytest.fixture
def known_agent(tmp_path: Path) -> Iterator[AgentUnderTest]:
    """An agent whose image has a machine id."""
    make_busybox_tree(tmp_path / "tree")
    (tmp_path / "tree/etc/machine-id").write_text("0" * 32 + "\n")
    with running_agent() as running:
        running.attach_lower(make_erofs(tmp_path / "tree", tmp_path / "image.erofs"))
        running.attach_upper()
        running.attach_upper("vdb")
        yield running


BOOT_ID = "/proc/sys/kernel/random/boot_id"


def identity_of(agent: AgentUnderTest, init: Running) -> list[str]:
    """Machine id, boot id and host name as a process of the container sees them."""
    return told(agent, init, f"cat /etc/machine-id {BOOT_ID}; hostname").splitlines()


@pytest.mark.root
def test_a_restored_guest_is_another_machine(known_agent: AgentUnderTest) -> None:
    agent = known_agent
    first = started(agent, TICKING)
    second = started(agent, TICKING, upper="vdb")
    kernels = Path(BOOT_ID).read_text().strip()
    assert identity_of(agent, first) == identity_of(agent, second) == ["0" * 32, kernels, "box"]
    save(agent, first, second)
    clone, _ = adopt(agent, first, "clone")
    other, _ = adopt(agent, second, "other")
    machine_id = os.urandom(16)
    guest = messages.ConfigureGuestRequest(hostname="clone-1", entropy=os.urandom(32))
    resume(agent, machine_id=machine_id, guest=guest)
    found = identity_of(agent, clone)
    assert found == identity_of(agent, other)
    assert found[0] == machine_id.hex()
    assert UUID.fullmatch(found[1])
    assert found[1] != kernels
    assert found[2] == "clone-1"
    look = f"stat -c %s /etc/machine-id; echo x >{BOOT_ID} || echo ro; umount {BOOT_ID}"
    assert told(agent, clone, look).startswith("33\n")
    assert "ro\n" in told(agent, clone, look)
    assert identity_of(agent, clone) == found
    # A container that comes later sees the guest's as well.
    for row in (clone, other):
        row.signal(signal.SIGKILL)
        row.wait()
        row.delete()
    third = started(agent, TICKING)
    assert identity_of(agent, third)[1] == found[1]


@pytest.mark.root
def test_without_a_machine_id_a_guest_stays_who_it_was(known_agent: AgentUnderTest) -> None:
    agent = known_agent
    init = started(agent, TICKING)
    before = identity_of(agent, init)
    save(agent, init)
    adopted, _ = adopt(agent, init, "clone")
    resume(agent, guest=messages.ConfigureGuestRequest(hostname="other"))
    assert identity_of(agent, adopted) == before


@pytest.mark.root
def test_a_root_that_cannot_be_written_is_left_alone(known_agent: AgentUnderTest) -> None:
    agent = known_agent
    spec = container_spec(process_spec("sh", "-c", TICKING))
    spec["root"]["readonly"] = True
    init = agent.create(spec).start()
    init.read_until(b"tick\n")
    other = started(agent, "ln -sf /etc/passwd /etc/machine-id; " + TICKING, upper="vdb")
    before = told(agent, other, "cat /etc/passwd")
    save(agent, init, other)
    resume(agent, machine_id=os.urandom(16))
    assert identity_of(agent, init)[0] == "0" * 32
    assert identity_of(agent, init)[1] == identity_of(agent, other)[2]
    assert told(agent, other, "cat /etc/passwd") == before
    for name, reason in (
        ("c1", "Read-only file system"),
        ("c2", "Too many levels of symbolic links"),
    ):
        assert f"container {name!r}: write /etc/machine-id: {reason}" in agent.logged()


@pytest.mark.root
def test_a_machine_id_is_made_where_there_is_none(agent: AgentUnderTest) -> None:
    init = started(agent, TICKING)
    save(agent, init)
    machine_id = os.urandom(16)
    resume(agent, machine_id=machine_id)
    assert told(agent, init, "cat /etc/machine-id; stat -c %a /etc/machine-id") == (
        f"{machine_id.hex()}\n444\n"
    )


@pytest.mark.root
def test_the_boot_id_is_covered_whatever_proc_is(agent: AgentUnderTest) -> None:
    agent.attach_upper("vdb")
    spec = container_spec(process_spec("sh", "-c", TICKING))
    spec["mounts"] = [row for row in spec["mounts"] if row["destination"] != "/proc"]
    init = agent.create(spec).start()
    init.read_until(b"tick\n")
    assert "No such file" in told(agent, init, f"cat {BOOT_ID}")
    spec = container_spec(process_spec("sh", "-c", TICKING))
    spec["linux"]["readonlyPaths"] = []
    spec["linux"]["sysctl"] = {"kernel.msgmax": "4242"}
    init = agent.create(spec, upper="vdb").start()
    init.read_until(b"tick\n")
    look = f"cat /proc/sys/kernel/msgmax; cat {BOOT_ID}; echo x >{BOOT_ID}; mount | grep boot_id"
    shown = told(agent, init, look).splitlines()
    assert shown[:2] == ["4242", Path(BOOT_ID).read_text().strip()]
    assert any("(ro," in line for line in shown[2:])
    assert any("Read-only file system" in line for line in shown)
