"""Processes at the level of the protocol: several listeners, slow ones, ends, zombies."""

from __future__ import annotations

import base64
import fcntl
import http.client
import json
import os
import re
import signal
import socket
import struct
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from envd_client import STREAM, Stream, frame, request, shell, unary
from envd_harness import Envd, wait_until

pytestmark = pytest.mark.root

START, CONNECT = "process.Process/Start", "process.Process/Connect"


def start(envd: Envd, command: str, headers: dict[str, str] | None = None, **more: Any) -> Stream:
    return Stream(envd, START, shell(command, **more), headers)


def live(envd: Envd) -> list[int]:
    return [p["pid"] for p in unary(envd, "process.Process/List", {}).json()["processes"]]


def kill(envd: Envd, pid: int) -> int:
    message = {"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"}
    return unary(envd, "process.Process/SendSignal", message).status


def test_the_stream_is_exactly_connect(envd: Envd) -> None:
    with start(envd, "printf x; exit 4") as stream:
        assert (stream.status, stream.content_type) == (200, "application/connect+json")
        events = list(stream)
    assert [next(iter(event)) for event in events] == ["start", "data", "end"]
    assert events[1] == {"data": {"stdout": "eA=="}}
    assert events[2] == {
        "end": {"exitCode": 4, "exited": True, "status": "exit status 4", "error": "exit status 4"}
    }
    assert stream.end == {}
    with start(envd, ":") as stream:
        assert list(stream)[-1] == {
            "end": {"exitCode": 0, "exited": True, "status": "exit status 0"}
        }


def test_chunks_are_small_and_exact(envd: Envd) -> None:
    with start(envd, "head -c 1000000 /dev/zero") as stream:
        chunks = [base64.b64decode(e["data"]["stdout"]) for e in stream if "data" in e]
    assert sum(map(len, chunks)) == 1_000_000
    assert max(map(len, chunks)) <= 32 * 1024


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        ({}, "invalid_argument", "process.cmd"),
        ({"process": {"cmd": "/no/such"}}, "invalid_argument", "/no/such: no such file"),
        ({"process": {"cmd": "no-such"}}, "invalid_argument", "executable file not found in $PATH"),
        ({"process": {"cmd": "/etc/passwd"}}, "invalid_argument", "permission denied"),
        ({"process": {"cmd": "/tmp"}}, "invalid_argument", "permission denied"),
        ({"process": {"cmd": "ls", "cwd": "/none"}}, "invalid_argument", "cwd '/none' does not"),
        ({"process": {"cmd": "ls", "cwd": "/etc/passwd"}}, "invalid_argument", "not a directory"),
        ({"process": {"cmd": "ls", "cwd": "/root"}}, "invalid_argument", "permission denied"),
        ({"process": {"cmd": "ls", "envs": {"A=": "1"}}}, "invalid_argument", "'A='"),
        ({"process": {"cmd": "a\0b"}}, "invalid_argument", "NUL"),
        ({"process": {"cmd": "ls", "args": ["x" * 200_000]}}, "invalid_argument", "list too long"),
        (
            {"process": {"cmd": "ls"}, "pty": {"size": {"cols": -1}}},
            "invalid_argument",
            "size.cols",
        ),
    ],
)
def test_what_cannot_start(envd: Envd, message: object, code: str, text: str) -> None:
    before = envd.open_descriptors()
    with Stream(envd, START, message) as stream:
        assert stream.status == 200
        assert list(stream) == []
        assert stream.end["error"]["code"] == code
        assert text in stream.end["error"]["message"]
    assert live(envd) == []
    wait_until(lambda: not envd.children(), "no child left behind")
    wait_until(lambda: envd.open_descriptors() <= before, "no descriptor left behind")


@pytest.mark.parametrize("shell_program", ["dash", "busybox"])
def test_a_bash_that_is_not_there_is_sh(fresh_envd: Envd, shell_program: str) -> None:
    # /bin is a link; a bin directory without bash stands in for a small image.
    usr_bin = fresh_envd.path("/bin")
    usr_bin.unlink()
    usr_bin.mkdir()
    (usr_bin / "sh").symlink_to(f"/usr/bin/{shell_program}")
    message = {"process": {"cmd": "/bin/bash", "args": ["-l", "-c", "echo $0; exit 2"]}}
    with Stream(fresh_envd, START, message) as stream:
        assert stream.output() == b"/bin/sh\n"
        assert stream.last["exitCode"] == 2


def test_child_state_is_clean(envd: Envd) -> None:
    with start(envd, "cat /proc/self/status; ls /proc/self/fd; ulimit -n; umask") as stream:
        text = stream.output().decode()
    assert "SigBlk:\t0000000000000000" in text
    (ignored,) = re.findall(r"^SigIgn:\t([0-9a-f]+)$", text, re.MULTILINE)
    # GNU make starts its children with glibc's own two, 32 and 33, ignored; only glibc sets these.
    assert int(ignored, 16) & ~(0b11 << 31) == 0
    assert text.split("\n")[-7:-3] == ["0", "1", "2", "3"]
    assert text.split("\n")[-2] == "0022"
    with start(envd, "ps -o pid=,pgid=,sid= -p $$") as stream:
        assert len(set(stream.output().split())) == 1


def test_tags(envd: Envd) -> None:
    with start(envd, "sleep 30", tag="mine") as stream:
        pid = stream.started()
        info = unary(envd, "process.Process/List", {}).json()["processes"][0]
        assert (info["tag"], info["pid"]) == ("mine", pid)
        assert info["config"]["args"] == ["-c", "sleep 30"]
        message = {"process": {"tag": "mine"}, "signal": 15}
        assert unary(envd, "process.Process/SendSignal", message).status == 200
        assert list(stream)[-1]["end"]["status"] == "signal: terminated"
    message = {"process": {"tag": "mine"}, "signal": 15}
    missing = unary(envd, "process.Process/SendSignal", message)
    assert missing.json() == {"code": "not_found", "message": "process with tag mine not found"}


def test_signals_that_are_not_offered(envd: Envd) -> None:
    with start(envd, "sleep 30") as stream:
        pid = stream.started()
        for number in (0, 1, "SIGNAL_UNSPECIFIED"):
            message = {"process": {"pid": pid}, "signal": number}
            answer = unary(envd, "process.Process/SendSignal", message)
            assert (answer.status, answer.json()["code"]) == (501, "unimplemented")
        assert kill(envd, pid) == 200
        list(stream)


def test_a_kill_reaches_the_whole_group(envd: Envd) -> None:
    with start(envd, "sleep 4321 & sleep 4321 & echo up; wait") as stream:
        pid = stream.started()
        assert stream.next_event() == {"data": {"stdout": "dXAK"}}
        assert kill(envd, pid) == 200
        assert list(stream)[-1]["end"]["status"] == "signal: killed"
    wait_until(lambda: not envd.children(), "the group's end")


def test_after_a_kill_leftovers_are_not_waited_for(envd: Envd) -> None:
    # The survivor has a session of its own and holds the pipe, writing for ever.
    with start(envd, "setsid sh -c 'trap \"\" PIPE; while :; do echo x; done' & echo; wait") as s:
        pid = s.started()
        s.next_event()
        began = time.monotonic()
        assert kill(envd, pid) == 200
        assert list(s)[-1]["end"]["status"] == "signal: killed"
        assert time.monotonic() - began < 10
    for child in envd.children():
        os.kill(child, signal.SIGKILL)
    wait_until(lambda: not envd.children(), "the survivor's end")


def test_output_of_background_jobs_is_waited_for(envd: Envd) -> None:
    with start(envd, "(sleep 0.3; echo late) & echo early") as stream:
        assert stream.output() == b"early\nlate\n"


def test_several_listeners_get_the_same(envd: Envd) -> None:
    with start(envd, "read go; seq 20000", stdin=True) as first:
        pid = first.started()
        others = [Stream(envd, CONNECT, {"process": {"pid": pid}}) for _ in range(3)]
        assert [other.started() for other in others] == [pid] * 3
        message = {"process": {"pid": pid}, "input": {"stdin": base64.b64encode(b"\n").decode()}}
        assert unary(envd, "process.Process/SendInput", message).status == 200
        expected = "".join(f"{n}\n" for n in range(1, 20001)).encode()
        for stream in (first, *others):
            assert stream.output() == expected
            assert stream.end == {}
            stream.close()


def is_stuck_writing(envd: Envd) -> bool:
    """Whether a process below envd sleeps in write(2) to the pipe that is its standard output."""
    pending = envd.children()
    while pending:
        pid = pending.pop()
        task = Path(f"/proc/{pid}/task/{pid}")
        number, first = [*(task / "syscall").read_text().split(), ""][:2]
        if (number, first) == ("1", "0x1"):
            return True
        pending += [int(child) for child in (task / "children").read_text().split()]
    return False


def test_a_slow_listener_stops_the_child_but_not_the_server(envd: Envd) -> None:
    marker = envd.path("/tmp/slow-done")
    with start(envd, "head -c 60000000 /dev/zero; echo >/tmp/slow-done") as stream:
        pid = stream.started()
        # Nobody reads: the child has to stand still, and envd's memory with it.
        wait_until(lambda: is_stuck_writing(envd), "the child to stand still")
        for _ in range(20):
            assert request(envd, "GET", "/health").status == 204
        assert not marker.exists()
        rss_kib = int(envd.path("/proc/1/status").read_text().split("VmRSS:")[1].split()[0])
        assert rss_kib < 100_000
        # A second, quick listener sets it free; the slow one is cut off, not the child.
        with Stream(envd, CONNECT, {"process": {"pid": pid}}) as quick:
            assert quick.started() == pid
            assert len(quick.output()) > 30_000_000
        assert marker.exists()
        list(stream)
        assert stream.end["error"]["code"] == "resource_exhausted"


def test_a_paused_listener_gets_everything_later(envd: Envd) -> None:
    with start(envd, "exec seq 1000000") as stream:
        stream.started()
        wait_until(lambda: is_stuck_writing(envd), "the child to stand still")
        assert stream.output() == "".join(f"{n}\n" for n in range(1, 1_000_001)).encode()
        assert stream.end == {}


def test_keepalives_fill_silence(envd: Envd) -> None:
    with start(envd, "sleep 2.5", {"Keepalive-Ping-Interval": "1"}) as stream:
        kinds = [next(iter(event)) for event in stream]
    assert kinds == ["start", "keepalive", "keepalive", "end"]


def test_the_deadline_holds_after_the_client_has_left(envd: Envd) -> None:
    with start(envd, "sleep 4321", {"Connect-Timeout-Ms": "700"}) as stream:
        pid = stream.started()
    assert live(envd) == [pid]
    with Stream(envd, CONNECT, {"process": {"pid": pid}}) as stream:
        assert stream.started() == pid
        assert list(stream)[-1]["end"]["status"] == "signal: killed"


def test_deadline_of_start_and_of_connect(envd: Envd) -> None:
    with start(envd, "sleep 4321", {"Connect-Timeout-Ms": "300"}) as stream:
        stream.started()
        assert list(stream) == []
        assert stream.end["error"]["code"] == "deadline_exceeded"
    wait_until(lambda: not live(envd), "the kill at the deadline")
    with start(envd, "sleep 4321") as stream:
        pid = stream.started()
        headers = {"Connect-Timeout-Ms": "200"}
        with Stream(envd, CONNECT, {"process": {"pid": pid}}, headers) as other:
            other.started()
            assert list(other) == []
            assert other.end["error"]["code"] == "deadline_exceeded"
        assert live(envd) == [pid]
        kill(envd, pid)


def bytes_waiting(envd: Envd) -> int:
    """In the standard input of envd's only child."""
    with open(f"/proc/{envd.children()[0]}/fd/0", "rb", buffering=0) as pipe:
        count = fcntl.ioctl(pipe, termios.FIONREAD, b"\0\0\0\0")
    return int(struct.unpack("i", count)[0])


class TestInput:
    def send(self, envd: Envd, pid: int, **kind: bytes) -> Any:
        data = {name: base64.b64encode(value).decode() for name, value in kind.items()}
        return unary(envd, "process.Process/SendInput", {"process": {"pid": pid}, "input": data})

    def test_wrong_kinds(self, envd: Envd) -> None:
        with start(envd, "cat", stdin=True) as stream:
            pid = stream.started()
            assert self.send(envd, pid, pty=b"x").json()["code"] == "internal"
            assert self.send(envd, pid).json()["code"] == "unimplemented"
            assert self.send(envd, 999_999, stdin=b"x").json()["code"] == "not_found"
            message = {"process": {"pid": pid}, "pty": {"size": {"cols": 1, "rows": 1}}}
            resized = unary(envd, "process.Process/Update", message)
            assert resized.json()["code"] == "internal"
            close = {"process": {"pid": pid}}
            assert unary(envd, "process.Process/CloseStdin", close).status == 200
            assert stream.output() == b""

    def test_after_stdin_is_closed(self, envd: Envd) -> None:
        with start(envd, "exec <&-; echo closed; sleep 30", stdin=True) as stream:
            pid = stream.started()
            assert "data" in stream.next_event()
            answer = self.send(envd, pid, stdin=b"x")
            assert answer.json()["code"] == "internal"
            assert answer.json()["message"].startswith("error writing to stdin: ")
            kill(envd, pid)

    def test_a_full_pipe_waits_and_ends_with_the_process(self, envd: Envd) -> None:
        with start(envd, "sleep 4321", stdin=True) as stream:
            pid = stream.started()
            body = {"process": {"pid": pid}, "input": {"stdin": "eHh4" * 100_000}}
            late = unary(envd, "process.Process/SendInput", body, {"Connect-Timeout-Ms": "200"})
            assert (late.status, late.json()["code"]) == (504, "deadline_exceeded")
            kill(envd, pid)
            list(stream)
        assert live(envd) == []

    def test_close_waits_for_what_was_sent(self, envd: Envd) -> None:
        data = bytes(range(256)) * 8000
        with start(envd, "sleep 0.2; cat", stdin=True) as stream:
            pid = stream.started()
            body = {"process": {"pid": pid}, "input": {"stdin": base64.b64encode(data).decode()}}
            with envd.connect() as sock:
                text = json.dumps(body).encode()
                head = "POST /process.Process/SendInput HTTP/1.1\r\nHost: x\r\n"
                head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
                sock.sendall(head.encode() + text)
                wait_until(lambda: bytes_waiting(envd), "the beginning of the input")
                close = {"process": {"pid": pid}}
                assert unary(envd, "process.Process/CloseStdin", close).status == 200
                assert stream.output() == data
                assert sock.recv(100).startswith(b"HTTP/1.1 200")

    def test_an_input_stream_that_misbehaves(self, envd: Envd) -> None:
        with start(envd, "cat", stdin=True) as stream:
            pid = stream.started()
            begin = frame({"start": {"process": {"pid": pid}}})
            for body, code in (
                (frame({"data": {"input": {"stdin": "eA=="}}}), "invalid_argument"),
                (begin + begin, "invalid_argument"),
                (begin + frame({}), "invalid_argument"),
                (begin + frame({"data": {"input": {"stdin": "!"}}}), "invalid_argument"),
                (begin + b"\0\0\0\0\7{", "invalid_argument"),
                (begin + frame({"data": {}}), "unimplemented"),
                (frame({"start": {"process": {"pid": 1}}}), "not_found"),
                (struct.pack(">BI", 0, 1 << 31), "resource_exhausted"),
                (frame({}, flags=1), "invalid_argument"),
            ):
                answer = request(envd, "POST", "/process.Process/StreamInput", body, STREAM)
                assert answer.status == 200
                assert json.loads(answer.body[5:])["error"]["code"] == code, (body, answer)
            kill(envd, pid)

    def test_an_input_stream_faster_than_its_reader(self, envd: Envd) -> None:
        piece = frame({"data": {"input": {"stdin": base64.b64encode(b"y" * 60_000).decode()}}})
        with start(envd, "sleep 0.5; wc -c", stdin=True) as stream:
            pid = stream.started()
            body = frame({"start": {"process": {"pid": pid}}}) + piece * 400
            answer = request(envd, "POST", "/process.Process/StreamInput", body, STREAM)
            assert answer.body == frame({}) + b"\2\0\0\0\2{}"
            close = {"process": {"pid": pid}}
            assert unary(envd, "process.Process/CloseStdin", close).status == 200
            assert stream.output().strip() == b"24000000"


def test_orphans_are_reaped(envd: Envd) -> None:
    command = "for i in 1 2 3 4 5; do (setsid sh -c 'sleep 0.2; exit 3' >/dev/null 2>&1 &); done"
    with start(envd, command) as stream:
        assert stream.output() == b""
    wait_until(lambda: len(envd.children()) >= 1, "orphans to arrive")
    wait_until(lambda: not envd.children(), "orphans to be reaped")


def test_ends_are_not_mixed_up(envd: Envd) -> None:
    streams = [start(envd, f"exit {n}") for n in range(40)]
    codes = []
    for stream in streams:
        stream.output()
        codes.append(stream.last["exitCode"])
        stream.close()
    assert codes == list(range(40))
    wait_until(lambda: not envd.children(), "no zombies")


def test_clients_that_vanish_leave_nothing(envd: Envd) -> None:
    before = envd.open_descriptors()
    for _ in range(10):
        start(envd, "yes | head -c 5000000 >/dev/stderr").close()
    wait_until(lambda: not live(envd), "the commands' ends")
    wait_until(lambda: envd.open_descriptors() <= before, "closed descriptors")


def test_sigterm_ends_the_server_in_order(fresh_envd: Envd) -> None:
    with start(fresh_envd, "sleep 4321") as stream:
        stream.started()
        os.kill(fresh_envd.pid, signal.SIGTERM)
        assert fresh_envd.process.wait(20) == 143, fresh_envd.output()
        with pytest.raises((EOFError, OSError, http.client.HTTPException)):
            list(stream)


def _has_taken_all(port: int) -> bool:
    """Whether the server's socket to the client's `port` was half-closed and read to its end."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, _, remote, state, queues, *_ = line.split()
        if int(remote.partition(":")[2], 16) == port:
            return state == "08" and queues.partition(":")[2] == "00000000"  # CLOSE_WAIT
    return False


def test_a_client_that_half_closes_and_then_resets_is_let_go(envd: Envd) -> None:
    """epoll reports such a socket for ever, and nothing is to be sent yet that would notice."""
    with start(envd, "sleep 1000", stdin=True) as stream:
        pid = stream.started()
        before = envd.open_descriptors()
        octets = base64.b64encode(b"x" * 300_000).decode()
        body = json.dumps({"process": {"pid": pid}, "input": {"stdin": octets}}).encode()
        head = (
            "POST /process.Process/SendInput HTTP/1.1\r\nHost: x\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with envd.connect() as sock:
            sock.sendall(head.encode() + body)
            sock.shutdown(socket.SHUT_WR)
            wait_until(lambda: _has_taken_all(sock.getsockname()[1]), "the request taken")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(lambda: envd.open_descriptors() <= before, "the connection closed", 5)
        kill(envd, pid)
