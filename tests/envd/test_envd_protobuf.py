"""Connect with the binary codec, as connect-go clients speak it.

The client is connectrpc with E2B's own descriptors, which the SDK brings: another implementation of
the protocol and of protobuf. It packs requests with gzip by default; both ways are tried. What the
two codecs answer must be one message.
"""

from __future__ import annotations

import datetime
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from connectrpc.codec import proto_binary_codec, proto_json_codec
from connectrpc.compression.gzip import GzipCompression
from connectrpc.errors import ConnectError
from e2b.envd.filesystem import filesystem_pb as fs
from e2b.envd.filesystem.filesystem_connect import FilesystemClientSync
from e2b.envd.process import process_pb as ps
from e2b.envd.process.process_connect import ProcessClientSync
from envd_client import request, unary
from envd_harness import Envd
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from protobuf import Oneof

from vmcell_agent.envd.wire.codec import PROTO
from vmcell_agent.envd.wire.gotext import rfc3339, unix_ns
from vmcell_protos import envd_filesystem, envd_process
from vmcell_protos.errors import CallerError
from vmcell_protos.wire import Message

PATIENCE_MS = 30_000
SHAPES = sorted(
    (
        shape
        for module in (envd_process, envd_filesystem)
        for shape in vars(module).values()
        if isinstance(shape, type) and issubclass(shape, Message) and shape is not Message
    ),
    key=lambda shape: shape.__name__,
)


@pytest.fixture(params=["packed", "plain"])
def connect(request: pytest.FixtureRequest, envd: Envd) -> Iterator[Callable[..., Any]]:
    """Makes clients of envd with the binary codec (or another); they are closed afterwards."""
    made = []

    def make(kind: type, codec: Any = None) -> Any:
        compression = GzipCompression() if request.param == "packed" else None
        client = kind(envd.url, codec=codec or proto_binary_codec(), send_compression=compression)
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


def by_pid(pid: int) -> ps.ProcessSelector:
    return ps.ProcessSelector(selector=Oneof("pid", pid))


def shell(command: str, **more: Any) -> ps.StartRequest:
    config = ps.ProcessConfig(cmd="/bin/sh", args=["-c", command], envs={"A": "b"}, cwd="/tmp")
    return ps.StartRequest(process=config, **more)


@pytest.mark.root
class TestProcess:
    def test_every_kind_of_event(self, connect: Callable[..., Any]) -> None:
        client = connect(ProcessClientSync)
        command = "printf '%s\\0\\377' $A; echo err >&2; exit 3"
        events = [
            answer.event.event
            for answer in client.start(shell(command, stdin=False), timeout_ms=PATIENCE_MS)
        ]
        assert events[0].field == "start"
        assert events[0].value.pid > 0
        outputs = {"stdout": b"", "stderr": b""}
        for event in events[1:-1]:
            assert event.field == "data"
            outputs[event.value.output.field] += event.value.output.value
        assert outputs == {"stdout": b"b\0\xff", "stderr": b"err\n"}
        end = events[-1].value
        assert (events[-1].field, end.exit_code, end.exited) == ("end", 3, True)
        assert (end.status, end.error) == ("exit status 3", "exit status 3")

    def test_input_list_connect_and_signal(self, connect: Callable[..., Any]) -> None:
        client = connect(ProcessClientSync)
        stream = client.start(shell("cat", tag="the-cat"), timeout_ms=PATIENCE_MS)
        pid = next(stream).event.event.value.pid
        info = next(p for p in client.list(ps.ListRequest()).processes if p.pid == pid)
        assert (info.tag, info.config.cmd, info.config.cwd) == ("the-cat", "/bin/sh", "/tmp")
        assert (list(info.config.args), dict(info.config.envs)) == (["-c", "cat"], {"A": "b"})
        tag = ps.ProcessSelector(selector=Oneof("tag", "the-cat"))
        client.send_input(
            ps.SendInputRequest(process=tag, input=ps.ProcessInput(input=Oneof("stdin", b"\0\xfe")))
        )
        again = client.connect(ps.ConnectRequest(process=by_pid(pid)), timeout_ms=PATIENCE_MS)
        assert next(again).event.event.value.pid == pid
        assert next(stream).event.event.value.output.value == b"\0\xfe"

        def pieces() -> Iterator[ps.StreamInputRequest]:
            start = ps.StreamInputRequest.StartEvent(process=by_pid(pid))
            yield ps.StreamInputRequest(event=Oneof("start", start))
            for _ in range(3):
                data = ps.StreamInputRequest.DataEvent(
                    input=ps.ProcessInput(input=Oneof("stdin", b"x" * 1000))
                )
                yield ps.StreamInputRequest(event=Oneof("data", data))
            keepalive = ps.StreamInputRequest.KeepAlive()
            yield ps.StreamInputRequest(event=Oneof("keepalive", keepalive))

        client.stream_input(pieces(), timeout_ms=PATIENCE_MS)
        client.close_stdin(ps.CloseStdinRequest(process=by_pid(pid)))
        events = [answer.event.event for answer in stream]
        streamed = [e.value.output.value for e in events if e.field == "data"]
        assert b"".join(streamed) == b"x" * 3000
        assert [answer.event.event.field for answer in again][-1] == "end"

    def test_terminal_resize_and_kill(self, connect: Callable[..., Any]) -> None:
        client = connect(ProcessClientSync)
        size = ps.PTY.Size(cols=70, rows=20)
        config = ps.ProcessConfig(cmd="/bin/sh", args=["-c", "stty size; read x; stty size; cat"])
        stream = client.start(
            ps.StartRequest(process=config, pty=ps.PTY(size=size)), timeout_ms=PATIENCE_MS
        )
        pid = next(stream).event.event.value.pid
        assert next(stream).event.event.value.output == Oneof("pty", b"20 70\r\n")
        wider = ps.PTY(size=ps.PTY.Size(cols=111, rows=33))
        client.update(ps.UpdateRequest(process=by_pid(pid), pty=wider))
        typed = ps.ProcessInput(input=Oneof("pty", b"\n"))
        client.send_input(ps.SendInputRequest(process=by_pid(pid), input=typed))
        seen = b""
        while b"33 111" not in seen:
            seen += next(stream).event.event.value.output.value
        client.send_signal(ps.SendSignalRequest(process=by_pid(pid), signal=ps.Signal.SIGKILL))
        end = [answer.event.event for answer in stream][-1].value
        assert (end.exit_code, end.exited, end.status) == (-1, False, "signal: killed")

    def test_errors_are_told_in_json(self, connect: Callable[..., Any]) -> None:
        client = connect(ProcessClientSync)
        with pytest.raises(ConnectError, match="process with pid 4000000 not found") as raised:
            client.close_stdin(ps.CloseStdinRequest(process=by_pid(4_000_000)))
        assert raised.value.code.value == "not_found"
        with pytest.raises(ConnectError, match="deadline exceeded") as raised:
            # the header alone: with a timeout of its own the client gives up first
            list(client.start(shell("sleep 100"), headers={"Connect-Timeout-Ms": "300"}))
        assert raised.value.code.value == "deadline_exceeded"
        missing = ps.StartRequest(process=ps.ProcessConfig(cmd="sh", cwd="/none"))
        with pytest.raises(ConnectError, match="cwd '/none' does not exist") as raised:
            list(client.start(missing, timeout_ms=PATIENCE_MS))
        assert raised.value.code.value == "invalid_argument"


@pytest.mark.root
class TestFilesystem:
    def test_both_codecs_tell_the_same(self, envd: Envd, connect: Callable[..., Any]) -> None:
        binary = connect(FilesystemClientSync)
        text = connect(FilesystemClientSync, proto_json_codec())
        folder = f"/tmp/both-{os.urandom(4).hex()}"
        entry = binary.make_dir(fs.MakeDirRequest(path=f"{folder}/b/c")).entry
        assert (entry.name, entry.type) == ("c", fs.FileType.DIRECTORY)
        headers = {"Content-Type": "application/octet-stream", "X-Metadata-Kind": "note"}
        request(envd, "POST", f"/files?path={folder}/file", b"12345", headers)
        os.symlink(f"{folder}/file", envd.path(f"{folder}/link"))
        raw = os.fsencode(envd.path(folder)) + b"/\xff"
        os.close(os.open(raw, os.O_CREAT | os.O_WRONLY))
        moved = fs.MoveRequest(source=f"{folder}/b", destination=f"{folder}/d")
        assert binary.move(moved).entry.path == f"{folder}/d"
        for path in (f"{folder}/file", f"{folder}/link", folder):
            told = binary.stat(fs.StatRequest(path=path)).entry
            assert told == text.stat(fs.StatRequest(path=path)).entry
        told = binary.stat(fs.StatRequest(path=f"{folder}/link")).entry
        assert (told.size, told.is_symlink) == (len(f"{folder}/file"), True)
        assert told.symlink_target == f"{folder}/file"
        listing = fs.ListDirRequest(path=folder, depth=3)
        entries = binary.list_dir(listing).entries
        assert [e.name for e in entries] == ["d", "c", "file", "link", "\ufffd"]
        assert entries == text.list_dir(listing).entries
        file = next(e for e in entries if e.name == "file")
        assert (file.size, dict(file.metadata), file.owner) == (5, {"kind": "note"}, "user")
        age = datetime.datetime.now(datetime.UTC) - file.modified_time.to_datetime()
        assert abs(age.total_seconds()) < 60
        binary.remove(fs.RemoveRequest(path=folder))
        with pytest.raises(ConnectError, match="does not exist"):
            binary.stat(fs.StatRequest(path=folder))

    def test_watchers(self, envd: Envd, connect: Callable[..., Any]) -> None:
        client = connect(FilesystemClientSync)
        folder = f"/tmp/watch-{os.urandom(4).hex()}"
        client.make_dir(fs.MakeDirRequest(path=folder))
        wanted = fs.CreateWatcherRequest(path=folder, include_entry=True)
        watcher = client.create_watcher(wanted).watcher_id
        stream = client.watch_dir(fs.WatchDirRequest(path=folder), timeout_ms=PATIENCE_MS)
        assert next(stream).event.field == "start"
        envd.path(f"{folder}/x").write_text("1")
        seen = next(stream).event
        assert (seen.field, seen.value.name) == ("filesystem", "x")
        assert seen.value.type == fs.EventType.CREATE
        asked = fs.GetWatcherEventsRequest(watcher_id=watcher)
        events = client.get_watcher_events(asked).events
        assert events[0].name == "x"
        assert events[0].entry.path == f"{folder}/x"
        client.remove_watcher(fs.RemoveWatcherRequest(watcher_id=watcher))
        with pytest.raises(ConnectError, match="not found"):
            client.get_watcher_events(asked)

    def test_bytes_that_are_no_message(self, envd: Envd) -> None:
        headers = {"Content-Type": "application/proto", "Connect-Protocol-Version": "1"}
        for body in (b"\xff", b"\x0a\x05abc", b"\x0a\x02\xff\xfe", b"\x08\x01"):
            answer = request(envd, "POST", "/filesystem.Filesystem/Stat", body, headers)
            assert answer.status == 400, body
            assert answer.headers["content-type"] == "application/json"
            assert answer.json()["code"] == "invalid_argument"


@pytest.mark.root
def test_clients_of_both_codecs_listen_to_one_process(
    envd: Envd, connect: Callable[..., Any]
) -> None:
    binary = connect(ProcessClientSync)
    text = connect(ProcessClientSync, proto_json_codec())
    stream = binary.start(shell("read x; echo $x; exit 4"), timeout_ms=PATIENCE_MS)
    pid = next(stream).event.event.value.pid
    other = text.connect(ps.ConnectRequest(process=by_pid(pid)), timeout_ms=PATIENCE_MS)
    assert next(other).event.event.value.pid == pid
    heard: list[Any] = []
    reader = threading.Thread(target=lambda: heard.extend(other))
    reader.start()
    selector = {"process": {"pid": pid}, "input": {"stdin": "aGkK"}}
    assert unary(envd, "process.Process/SendInput", selector).status == 200
    told = list(stream)
    reader.join(30)
    assert [answer.event for answer in heard] == [answer.event for answer in told]
    assert told[-1].event.event.value.exit_code == 4


def test_times_go_both_ways() -> None:
    for moment in (0, -1, 1, 1_700_000_000_123_456_789, -62_135_596_800 * 10**9, 10**30, -(10**30)):
        text = rfc3339(moment)
        assert rfc3339(unix_ns(text)) == text
        if abs(moment) < 10**20 and moment > -62_135_596_800 * 10**9:
            assert unix_ns(text) == moment


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SHAPES), st.binary(max_size=80))
@example(envd_process.StartRequest, b"\x0a\x00")
def test_any_bytes_become_fields_or_are_refused(shape: type[Message], data: bytes) -> None:
    codes = []
    try:
        fields = PROTO.parse(shape, data)
    except CallerError as error:
        codes.append(error.code)
    else:
        for name in ("process", "pty", "start", "data", "input", "event"):
            try:
                fields.optional_message(name)
            except CallerError as error:
                codes.append(error.code)
    assert set(codes) <= {"invalid_argument"}
