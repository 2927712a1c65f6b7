"""Real containers of a real agent: what a process sees, how it ends, what is left."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from pathlib import Path

import pytest
from agent_harness import AGENT_OOM_SCORE, AgentUnderTest, container_spec, process_spec

from vmcell_protos import agent as messages
from vmcell_protos.errors import VmcellError

pytestmark = pytest.mark.root


def run_to_end(agent: AgentUnderTest, *args: str, **changes: object) -> tuple[int, bytes, bytes]:
    """Exit status, standard output and error of a container that runs `args`."""
    init = agent.create(container_spec(process_spec(*args, **changes))).start()
    out, err = init.read(), init.read("stderr")
    return init.wait(), out, err


def test_hello_tells_the_kernel(agent: AgentUnderTest) -> None:
    payload = agent.client.call("Hello", messages.HelloRequest(host_version="0"))
    hello = messages.HelloResponse.decode(payload)
    assert hello.kernel_release == os.uname().release
    assert hello.agent_version


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("kill -9 $$; sleep 9", 0), ("exit 255", 255)],
)
def test_exit_status(agent: AgentUnderTest, script: str, status: int) -> None:
    # A pid namespace's init cannot kill itself (pid_namespaces(7)): its shell goes on to sleep.
    if "kill" in script:
        script = "sh -c 'kill -9 $$'; test $? = 137"
    assert run_to_end(agent, "sh", "-c", script)[0] == status


def test_output_of_both_streams_and_what_the_process_is(agent: AgentUnderTest) -> None:
    script = "echo out; echo err >&2; id -u; hostname; echo $$; pwd; cat /proc/1/comm; true"
    status, out, err = run_to_end(agent, "sh", "-c", script)
    assert (status, err) == (0, b"err\n")
    assert out.decode().split() == ["out", "0", "box", "1", "/", "sh"]


def test_killed_init_is_137_and_its_processes_die(agent: AgentUnderTest) -> None:
    spec = container_spec(process_spec("sh", "-c", "sleep 1000 & echo up; wait"))
    init = agent.create(spec).start()
    init.read_until(b"up\n")
    waiting = agent.client.begin("WaitProcess", init.ref)
    assert not agent.client.answered(waiting)
    init.signal(signal.SIGKILL)
    payload = agent.client.finish(waiting)
    assert messages.WaitProcessResponse.decode(payload).exit_status == 137
    assert Path(f"{agent.cgroup}/c1/cgroup.procs").read_text() == ""
    init.delete()
    assert not Path(f"{agent.cgroup}/c1").exists()
    assert agent.state_left() == []


def test_20_mb_through_stdin_come_back_whole(agent: AgentUnderTest) -> None:
    data = os.urandom(1 << 20) * 20
    init = agent.create(container_spec(process_spec("cat")), stdin=True).start()

    def feed() -> None:
        init.sockets["stdin"].sendall(data)
        init.sockets["stdin"].shutdown(1)

    feeder = threading.Thread(target=feed)
    feeder.start()
    received = init.read()
    feeder.join(timeout=30)
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
    assert init.wait() == 0


def test_close_stdin_hands_over_what_has_arrived_first(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("wc", "-c")), stdin=True).start()
    init.sockets["stdin"].sendall(b"x" * 100_000)
    agent.client.call("CloseStdin", init.ref)
    assert init.read() == b"100000\n"
    assert init.wait() == 0


def test_stdin_closed_before_the_start_is_at_its_end(agent: AgentUnderTest) -> None:
    """`ctr run </dev/null` may say CloseIO before Start."""
    init = agent.create(container_spec(process_spec("wc", "-c")), stdin=True)
    agent.client.call("CloseStdin", init.ref)
    init.start()
    assert init.read() == b"0\n"
    assert init.wait() == 0


def test_output_of_a_terminal_is_whole_however_late_it_is_read(agent: AgentUnderTest) -> None:
    script = "sleep 0.2; seq 1 30000; exit 5"
    init = agent.create(container_spec(process_spec("sh", "-c", script)), terminal=True).start()
    waiting = agent.client.begin("WaitProcess", init.ref)
    assert not agent.client.answered(waiting, 1.0)
    expected = "".join(f"{number}\r\n" for number in range(1, 30001)).encode()
    assert init.read() == expected
    payload = agent.client.finish(waiting)
    assert messages.WaitProcessResponse.decode(payload).exit_status == 5


@pytest.mark.parametrize("left_behind", ["while :; do echo tick; sleep 0.05; done", "yes"])
def test_who_is_left_on_a_terminal_does_not_delay_the_exit(
    agent: AgentUnderTest, left_behind: str
) -> None:
    """A pseudo terminal does not hang up when its session ends; only its foreground group is told
    (disassociate_ctty in Linux's tty_jobctrl.c)."""
    init = agent.create(container_spec(process_spec("sleep", "1000"))).start()
    script = f"trap '' HUP; seq 1 1000; ({left_behind}) & exit 3"
    added = agent.add(init, process_spec("sh", "-c", script), "e", terminal=True).start()
    taken = bytearray()

    def take() -> None:
        while part := added.sockets["stdout"].recv(1 << 16):
            taken.extend(part)

    reader = threading.Thread(target=take)
    reader.start()
    try:
        assert added.wait() == 3
    finally:
        init.signal(signal.SIGKILL)
        assert init.wait() == 137
        added.delete()
        reader.join(timeout=10)
    expected = "".join(f"{number}\r\n" for number in range(1, 1001)).encode()
    assert taken.startswith(expected)


def test_a_program_is_not_looked_for_where_no_path_is_named(agent: AgentUnderTest) -> None:
    """Go's exec.LookPath, by which runc finds programs, takes an empty PATH for no directory."""
    init = agent.create(container_spec(process_spec("busybox", env=["A=b"], cwd="/bin")))
    with pytest.raises(VmcellError, match="executable file not found"):
        init.start()


def test_an_empty_home_is_filled_in_as_runc_does(agent: AgentUnderTest) -> None:
    user = {"uid": 1000, "gid": 1000}
    env = ["PATH=/bin", "HOME="]
    status, out, _ = run_to_end(agent, "sh", "-c", "echo $HOME", user=user, env=env)
    assert (status, out) == (0, b"/home/user\n")


def test_a_stuck_reader_stops_only_its_own_process(agent: AgentUnderTest) -> None:
    stuck = agent.create(container_spec(process_spec("sh", "-c", "sleep 1000"))).start()
    writer = agent.add(stuck, process_spec("sh", "-c", "yes | head -c 10000000"), "writer").start()
    other = agent.add(stuck, process_spec("echo", "hello"), "other").start()
    assert other.read() == b"hello\n"
    assert other.wait() == 0
    waiting = agent.client.begin("WaitProcess", writer.ref)
    assert not agent.client.answered(waiting, 0.2)
    assert len(writer.read()) == 10_000_000
    agent.client.finish(waiting)


def test_an_ended_process_with_a_stuck_reader_is_told_nevertheless(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("sh", "-c", "yes"))).start()
    init.signal(signal.SIGKILL)
    assert init.wait() == 137


def test_output_is_dropped_when_its_reader_leaves(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("sh", "-c", "yes | head -c 3000000"))).start()
    init.sockets["stdout"].close()
    assert init.wait() == 0


def test_background_holder_of_stdout_does_not_delay_the_exit(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("sleep", "1000"))).start()
    added = agent.add(init, process_spec("sh", "-c", "sleep 900 & echo done"), "e").start()
    assert added.read_until(b"done\n") == b"done\n"
    assert added.wait() == 0


def test_terminal_size_before_start_and_resize(agent: AgentUnderTest) -> None:
    script = "stty size; tty; read line; stty size; exit 3"
    init = agent.create(container_spec(process_spec("sh", "-c", script)), terminal=True)
    resize = messages.ResizePtyRequest(container_id="c1", columns=100, rows=40)
    agent.client.call("ResizePty", resize)
    init.start()
    assert init.read_until(b"/dev/pts/0\r\n") == b"40 100\r\n/dev/pts/0\r\n"
    resize.columns, resize.rows = 132, 50
    agent.client.call("ResizePty", resize)
    init.sockets["stdout"].sendall(b"\n")
    assert b"50 132\r\n" in init.read()
    assert init.wait() == 3


def test_terminal_carries_signals_and_the_console(agent: AgentUnderTest) -> None:
    init = agent.create(
        container_spec(process_spec("sh", "-c", "echo hi >/dev/console; sleep 1000")), terminal=True
    ).start()
    init.read_until(b"hi\r\n")
    added = agent.add(init, process_spec("cat"), "tty", terminal=True).start()
    added.sockets["stdout"].sendall(b"line\n")
    added.read_until(b"line\r\nline\r\n")
    added.sockets["stdout"].sendall(b"\x03")
    assert added.wait() == 130


def test_user_groups_umask_cwd_and_environment(agent: AgentUnderTest) -> None:
    status, out, _ = run_to_end(
        agent,
        "sh",
        "-c",
        "id -u; id -g; id -G; umask; pwd; echo $HOME; echo $MARK; echo x > /dev/stdout",
        user={"uid": 1000, "gid": 1000, "additionalGids": [5, 1000], "umask": 0o027},
        cwd="/made/by/the/agent",
        env=["PATH=/bin", "MARK=a=b", "MARK=c=d"],
    )
    assert status == 0
    assert out.decode().splitlines() == [
        "1000", "1000", "1000 5", "0027", "/made/by/the/agent", "/home/user", "c=d", "x",
    ]  # fmt: skip


def test_capabilities_limits_and_scores(agent: AgentUnderTest) -> None:
    script = (
        "grep -E '^(Cap|NoNewPrivs)' /proc/self/status; ulimit -n; cat /proc/self/oom_score_adj"
    )
    status, out, _ = run_to_end(
        agent,
        "sh",
        "-c",
        script,
        capabilities={
            "bounding": ["CAP_KILL", "CAP_CHOWN"],
            "effective": ["CAP_KILL"],
            "permitted": ["CAP_KILL", "CAP_CHOWN"],
            "inheritable": ["CAP_KILL"],
            "ambient": ["CAP_KILL"],
        },
        user={"uid": 1000, "gid": 1000},
        rlimits=[{"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456}],
        oomScoreAdj=77,
    )
    assert status == 0
    rows = dict(line.split(":\t") for line in out.decode().splitlines()[:6])
    assert rows == {
        "CapInh": "0000000000000020",
        "CapPrm": "0000000000000020",
        "CapEff": "0000000000000020",
        "CapBnd": "0000000000000021",
        "CapAmb": "0000000000000020",
        "NoNewPrivs": "1",
    }
    assert out.decode().splitlines()[6:] == ["123", "77"]


def test_devices_links_masked_and_read_only_paths(agent: AgentUnderTest) -> None:
    script = """
        head -c 3 /dev/zero | wc -c; echo x >/dev/null; head -c 1 /dev/urandom | wc -c
        echo x >/dev/full || echo full
        readlink /dev/fd; readlink /dev/ptmx; ls /dev
        wc -c </proc/keys
        echo 0 >/proc/sys/kernel/hostname || echo ro
        mkdir /sys/x || echo ro
        touch /dev/shm/a /run/b /c && echo rw
    """
    status, out, _ = run_to_end(agent, "sh", "-c", script)
    assert status == 0
    assert out.decode().split() == [
        "3", "1", "full", "/proc/self/fd", "pts/ptmx",
        "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin",
        "stdout", "tty", "urandom", "zero", "0", "ro", "ro", "rw",
    ]  # fmt: skip


@pytest.mark.parametrize(("upper", "readonly"), [("", False), ("vda", True)])
def test_read_only_root(agent: AgentUnderTest, upper: str, readonly: bool) -> None:
    spec = container_spec(process_spec("sh", "-c", "touch /x || touch /run/x && cat /etc/new"))
    spec["root"]["readonly"] = readonly
    file = messages.FileCopy(destination="/etc/new", mode=0o644, content=b"copied")
    init = agent.create(spec, upper=upper, files=[file]).start()
    assert init.read() == b"copied"
    assert init.wait() == 0
    init.delete()


def test_added_process_shares_everything_with_init(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("sleep", "1000"))).start()
    script = "ps -o pid,args; hostname; touch /run/seen; cat; exit 4"
    added = agent.add(init, process_spec("sh", "-c", script), "e1", stdin=True).start()
    added.sockets["stdin"].sendall(b"input")
    added.sockets["stdin"].shutdown(1)
    out = added.read()
    assert b"1 sleep 1000" in out
    assert out.endswith(b"box\ninput")
    assert added.wait() == 4
    listed = messages.ListProcessesResponse.decode(
        agent.client.call("ListProcesses", messages.ContainerRef(container_id="c1"))
    )
    assert [(row.exec_id, row.command) for row in listed.processes] == [("", "sleep 1000")]
    added.delete()
    with pytest.raises(VmcellError, match="no process 'e1'"):
        added.wait()
    init.signal(signal.SIGKILL)
    assert init.wait() == 137


def test_signal_to_all(agent: AgentUnderTest) -> None:
    script = "trap 'echo got' TERM; echo up; while :; do sleep 0.01; done"
    init = agent.create(container_spec(process_spec("sh", "-c", script))).start()
    init.read_until(b"up\n")
    added = [agent.add(init, process_spec("sleep", "500"), name).start() for name in ("e1", "e2")]
    init.signal(signal.SIGTERM, everyone=True)
    assert [process.wait() for process in added] == [143, 143]
    init.read_until(b"got\n")
    init.signal(signal.SIGKILL, everyone=True)
    assert init.wait() == 137


def test_an_orphan_goes_to_the_containers_init(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("sleep", "1000"))).start()
    added = agent.add(init, process_spec("sh", "-c", "sleep 500 & echo $!"), "e").start()
    pid = added.read_until(b"\n").decode().strip()
    assert added.wait() == 0
    look = agent.add(init, process_spec("grep", "PPid", f"/proc/{pid}/status"), "look").start()
    assert look.read().split() == [b"PPid:", b"1"]


def test_processes_of_a_dead_container_end_too(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("sleep", "1000"))).start()
    added = agent.add(init, process_spec("sleep", "1000"), "e").start()
    init.signal(signal.SIGKILL)
    assert init.wait() == 137
    assert added.wait() == 137
    with pytest.raises(VmcellError, match="not running"):
        agent.add(init, process_spec("true"), "late")
    init.delete()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["foo"], 'exec: "foo": executable file not found in $PATH'),
        (["/bin/nope"], 'exec: "/bin/nope": stat /bin/nope: no such file or directory'),
        (["/etc/passwd"], 'exec: "/etc/passwd": permission denied'),
        (["/etc"], 'exec: "/etc": is a directory'),
    ],
)
def test_a_program_that_cannot_run(agent: AgentUnderTest, args: list[str], sentence: str) -> None:
    init = agent.create(container_spec(process_spec(*args)))
    with pytest.raises(VmcellError) as error:
        init.start()
    assert str(error.value) == sentence
    init.delete()
    ok = agent.create(container_spec(process_spec("sleep", "1000"))).start()
    with pytest.raises(VmcellError) as error:
        agent.add(ok, process_spec(*args), "e").start()
    assert str(error.value) == sentence


def test_envd_as_init_answers_once_it_listens(agent: AgentUnderTest) -> None:
    spec = container_spec(process_spec(user={"uid": 1000, "gid": 1000}))
    spec["linux"]["resources"]["pids"] = {}
    init = agent.create(spec, init="envd").start()
    fetch = "wget -S -O - http://127.0.0.1:49983/health; cat /proc/1/comm; stat -c %u /proc/1"
    # A guest out of memory must lose the hog, not the data plane; what is added has its own score.
    fetch += "; cat /proc/1/oom_score_adj /proc/self/oom_score_adj"
    added = agent.add(init, process_spec("sh", "-c", fetch), "e").start()
    assert added.read().split() == [b"envd", b"0", b"%d" % AGENT_OOM_SCORE, b"0"]
    assert b"204" in added.read("stderr")
    init.signal(signal.SIGTERM)
    assert init.wait() == 143
    assert init.read("stderr") == b""
    init.delete()


def test_an_init_this_agent_has_not_is_refused(agent: AgentUnderTest) -> None:
    with pytest.raises(VmcellError, match="this agent has envd"):
        agent.create(container_spec(process_spec("true")), init="systemd")


def test_streams_that_are_not_dialled_in_time(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("true")))
    with pytest.raises(VmcellError, match=r"stdout, stderr of init .* not dialled") as error:
        agent.client.call("StartProcess", init.ref)
    assert error.value.code == "deadline_exceeded"
    init.delete()


@pytest.mark.parametrize("number", [signal.SIGWINCH, signal.SIGCONT, signal.SIGURG, signal.SIGCHLD])
def test_a_signal_that_ends_nobody_leaves_what_was_not_started(
    agent: AgentUnderTest, number: int
) -> None:
    init = agent.create(container_spec(process_spec("echo", "ran")))
    init.signal(number)
    init.start()
    assert init.read() == b"ran\n"
    assert init.wait() == 0


def test_killing_a_container_that_was_not_started(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("true")))
    init.signal(signal.SIGKILL)
    assert init.wait() == 137
    init.delete()


def test_mistakes_get_one_sentence_and_leave_nothing(agent: AgentUnderTest) -> None:
    bad = container_spec(process_spec("true"))
    bad["mounts"].append({"destination": "/data", "type": "bind", "source": "/srv"})
    with pytest.raises(VmcellError, match="binds a host path to /data"):
        agent.create(bad)
    with pytest.raises(VmcellError, match=r"lower_devices has '\.\./sda'"):
        agent.client.call(
            "CreateContainer",
            messages.CreateContainerRequest(
                container_id="x",
                spec_json=b'{"process":{"args":["true"]}}',
                rootfs=messages.Rootfs(lower_devices=["../sda"]),
            ),
        )
    with pytest.raises(VmcellError, match=r"mount .*pmem7 as erofs"):
        agent.client.call(
            "CreateContainer",
            messages.CreateContainerRequest(
                container_id="x",
                spec_json=b'{"process":{"args":["true"]}}',
                rootfs=messages.Rootfs(lower_devices=["pmem7"]),
            ),
        )
    with pytest.raises(VmcellError, match="no container 'x'"):
        agent.client.call("WaitProcess", messages.ProcessRef(container_id="x"))
    assert agent.state_left() == []
    assert [path for path in Path(agent.cgroup).iterdir() if path.is_dir()] == []
    init = agent.create(container_spec(process_spec("sleep", "1000"))).start()
    with pytest.raises(VmcellError, match="kill it first"):
        init.delete()


def test_the_end_of_the_control_connection_ends_everything(agent: AgentUnderTest) -> None:
    agent.create(container_spec(process_spec("sleep", "1000"))).start()
    agent.client.close()
    assert agent.process.wait(timeout=10) == 0
    assert [path for path in Path(agent.cgroup).iterdir() if path.is_dir()] == []


def test_a_removal_that_failed_half_way_can_be_asked_for_again(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("sleep", "1000"))).start()
    init.signal(signal.SIGKILL)
    assert init.wait() == 137
    # A directory that is not empty below the mounts cannot be removed.
    mounts = Path(f"{agent.directory}/state/c1")
    (mounts / "in-the-way").mkdir()
    with pytest.raises(VmcellError, match="not empty"):
        init.delete()
    (mounts / "in-the-way").rmdir()
    init.delete()
    assert agent.state_left() == []


def test_shutdown_asks_first_and_then_kills(agent: AgentUnderTest) -> None:
    script = "trap 'echo asked' TERM; echo up; while :; do sleep 0.01; done"
    init = agent.create(container_spec(process_spec("sh", "-c", script))).start()
    init.read_until(b"up\n")
    agent.client.call("Shutdown", messages.Empty())
    init.read_until(b"asked\n")
    assert agent.process.wait(timeout=10) == 0
    assert [path for path in Path(agent.cgroup).iterdir() if path.is_dir()] == []


def test_nothing_is_kept_of_processes_that_were_deleted(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("sleep", "1000"))).start()

    def one(number: int, **how: bool) -> None:
        added = agent.add(init, process_spec("echo", "x"), f"e{number}", **how).start()
        added.read()
        added.wait()
        added.delete()
        added.close()
        with pytest.raises(VmcellError, match="executable file not found"):
            agent.add(init, process_spec("nope"), f"n{number}", **how).start()
        agent.client.call(
            "DeleteProcess", messages.ProcessRef(container_id="c1", exec_id=f"n{number}")
        )

    one(0)
    before = agent.open_files()
    for number in range(1, 7):
        one(number, terminal=number % 3 == 0, stdin=number % 3 == 1)
    assert agent.open_files() == before


def test_processes_are_bounded(agent: AgentUnderTest) -> None:
    init = agent.create(container_spec(process_spec("sleep", "1000"))).start()
    for number in range(64):
        agent.add(init, process_spec("true"), f"e{number}")
    with pytest.raises(VmcellError, match="delete one first") as error:
        agent.add(init, process_spec("true"), "e64")
    assert error.value.code == "resource_exhausted"


def test_threaded_cgroups_of_the_container_hide_no_process_and_stop_no_shutdown(
    agent: AgentUnderTest,
) -> None:
    """Their cgroup.procs cannot be read (cgroup-v2.rst, "Threads")."""
    script = "mkdir /sys/fs/cgroup/t && echo threaded >/sys/fs/cgroup/t/cgroup.type"
    script += " && echo $$ >/sys/fs/cgroup/t/cgroup.threads && echo up && exec sleep 1000"
    spec = container_spec(process_spec("sh", "-c", script))
    spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"})
    spec["linux"].pop("readonlyPaths", None)
    init = agent.create(spec).start()
    init.read_until(b"up\n")
    init.become("sleep 1000")
    agent.client.call("Shutdown", messages.Empty())
    assert agent.process.wait(timeout=10) == 0
