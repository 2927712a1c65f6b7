"""Watching directories: both SDK ways, the order of events, trees that change, lost events."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest
from e2b import AsyncSandbox, ConnectionConfig, Sandbox
from e2b.exceptions import (
    FileNotFoundException,
    InvalidArgumentException,
    SandboxException,
)
from e2b.sandbox.filesystem.watch_handle import FilesystemEventType as Kind
from envd_client import Stream, shell, unary
from envd_harness import Envd, wait_until
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from vmcell_agent.envd.inotify import IN_CREATE, IN_ISDIR, Inotify, InotifyEvent, parse_events

WATCH = "filesystem.Filesystem/WatchDir"
CREATE, WRITE, REMOVE, RENAME, CHMOD = (
    f"EVENT_TYPE_{kind}" for kind in ("CREATE", "WRITE", "REMOVE", "RENAME", "CHMOD")
)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2**32 - 1), st.text("abé", max_size=9)))
)
def test_events_are_parsed(events: list[tuple[int, int, str]]) -> None:
    data = b""
    for watch, mask, name in events:
        octets = name.encode()
        padded = octets + b"\0" * (-len(octets) % 16) if octets else b""
        data += struct.pack("=iIII", watch, mask, 0, len(padded)) + padded
    assert parse_events(data) == [InotifyEvent(*event) for event in events]


def test_a_real_event_is_parsed(tmp_path: Any) -> None:
    inotify = Inotify()
    try:
        watch = inotify.add(str(tmp_path))
        (tmp_path / "directory").mkdir()
        assert inotify.read() == [InotifyEvent(watch, IN_CREATE | IN_ISDIR, "directory")]
        assert inotify.read() == []
    finally:
        inotify.close()
        inotify.close()


def run(envd: Envd, command: str) -> None:
    with Stream(envd, "process.Process/Start", shell(command)) as stream:
        stream.output()
        assert stream.last["exitCode"] == 0


def watch(envd: Envd, path: str, **more: Any) -> Stream:
    stream = Stream(envd, WATCH, {"path": path, **more})
    assert stream.next_event() == {"start": {}}
    return stream


def events_until(stream: Stream, name: str) -> list[tuple[str, str]]:
    """(type, name) of the events before the one that creates `name`."""
    found = []
    for event in stream:
        told = event["filesystem"]
        if (told["type"], told["name"]) == (CREATE, name):
            return found
        found.append((told["type"], told["name"]))
    raise AssertionError(f"the stream ended: {stream.end}")


@pytest.mark.root
class TestSdk:
    def test_polled(self, sandbox: Sandbox) -> None:
        sandbox.files.make_dir("/tmp/polled")
        handle = sandbox.files.watch_dir("/tmp/polled")
        sandbox.files.write("/tmp/polled/file", "text")
        events = [(event.type, event.name) for event in handle.get_new_events()]
        assert events == [(Kind.CREATE, "file"), (Kind.CHMOD, "file"), (Kind.WRITE, "file")]
        assert handle.get_new_events() == []
        sandbox.files.rename("/tmp/polled/file", "/tmp/polled/other")
        sandbox.files.remove("/tmp/polled/other")
        events = [(event.type, event.name) for event in handle.get_new_events()]
        assert events == [(Kind.RENAME, "file"), (Kind.CREATE, "other"), (Kind.REMOVE, "other")]
        handle.stop()
        with pytest.raises(SandboxException):
            handle.get_new_events()

    def test_streamed(self, envd: Envd) -> None:
        async def scenario() -> list[tuple[Kind, str]]:
            sandbox = AsyncSandbox(
                sandbox_id="i0",
                sandbox_domain=None,
                envd_version=Version("0.6.13"),
                envd_access_token=None,
                traffic_access_token=None,
                connection_config=ConnectionConfig(sandbox_url=envd.url),
            )
            await sandbox.files.make_dir("/tmp/streamed")
            seen: list[tuple[Kind, str]] = []
            done = asyncio.Event()

            def on_event(event: Any) -> None:
                seen.append((event.type, event.name))
                if event.name == "last":
                    done.set()

            handle = await sandbox.files.watch_dir("/tmp/streamed", on_event)
            await sandbox.files.write("/tmp/streamed/first", "x")
            await sandbox.files.make_dir("/tmp/streamed/last")
            await asyncio.wait_for(done.wait(), 20)
            await handle.stop()
            return seen

        seen = asyncio.run(scenario())
        assert seen[0] == (Kind.CREATE, "first")
        assert (Kind.CREATE, "last") in seen

    def test_what_cannot_be_watched(self, sandbox: Sandbox) -> None:
        with pytest.raises(FileNotFoundException):
            sandbox.files.watch_dir("/tmp/none")
        sandbox.files.write("/tmp/plain", "x")
        with pytest.raises(InvalidArgumentException):
            sandbox.files.watch_dir("/tmp/plain")

    def test_a_directory_of_root_can_be_watched(self, sandbox: Sandbox) -> None:
        sandbox.files.make_dir("/var/of-root", user="root")
        watch = sandbox.files.watch_dir("/var/of-root")
        sandbox.files.write("/var/of-root/watched", "x")
        assert {event.name for event in watch.get_new_events()} == {"watched"}
        watch.stop()


@pytest.mark.root
def test_a_thousand_events_in_order(envd: Envd) -> None:
    run(envd, "mkdir /tmp/thousand")
    with watch(envd, "/tmp/thousand") as stream:
        run(envd, "cd /tmp/thousand; for i in $(seq 1000); do mkdir d$i; done; mkdir end")
        assert events_until(stream, "end") == [(CREATE, f"d{n}") for n in range(1, 1001)]


@pytest.mark.root
def test_a_tree_that_grows(envd: Envd) -> None:
    run(envd, "mkdir -p /tmp/tree/a/b")
    with watch(envd, "/tmp/tree", recursive=True) as stream:
        run(envd, "cd /tmp/tree; mkdir a/b/c; mkdir end1")
        assert events_until(stream, "end1") == [(CREATE, "a/b/c")]
        run(envd, "cd /tmp/tree; mkdir -p a/b/c/d/e/f; : >a/b/c/d/e/f/g; mkdir end2")
        seen = events_until(stream, "end2")
        created = [name for kind, name in seen if kind == CREATE]
        assert created == ["a/b/c/d", "a/b/c/d/e", "a/b/c/d/e/f", "a/b/c/d/e/f/g"]
        run(envd, "cd /tmp/tree; mv a z; mkdir end3")
        assert events_until(stream, "end3") == [(RENAME, "a"), (CREATE, "z")]
        run(envd, "cd /tmp/tree; echo x >z/b/c/new; chmod 600 z/b/c/new; mkdir end4")
        expected = [(CREATE, "z/b/c/new"), (WRITE, "z/b/c/new"), (CHMOD, "z/b/c/new")]
        assert events_until(stream, "end4") == expected
        run(envd, "cd /tmp/tree; mv z /tmp/moved-away; echo x >/tmp/moved-away/b/x; mkdir end5")
        assert events_until(stream, "end5") == [(RENAME, "z")]
        run(envd, "cd /tmp/tree; rmdir end1; mkdir end1; mkdir end6")
        assert events_until(stream, "end6") == [(REMOVE, "end1"), (CREATE, "end1")]


@pytest.mark.root
def test_a_plain_watch_stays_on_its_level(envd: Envd) -> None:
    run(envd, "mkdir -p /tmp/level/below")
    with watch(envd, "/tmp/level") as stream:
        run(envd, "cd /tmp/level; touch below/x; rmdir below 2>/dev/null; mkdir end")
        assert events_until(stream, "end") == []


@pytest.mark.root
def test_entries_when_asked_for(envd: Envd) -> None:
    run(envd, "mkdir /tmp/entries")
    with watch(envd, "/tmp/entries", includeEntry=True) as stream:
        run(envd, "mkdir /tmp/entries/sub")
        event = stream.next_event()["filesystem"]
        assert event["entry"]["path"] == "/tmp/entries/sub"
        assert event["entry"]["type"] == "FILE_TYPE_DIRECTORY"
        run(envd, "rmdir /tmp/entries/sub")
        assert stream.next_event()["filesystem"] == {"name": "sub", "type": REMOVE}


@pytest.mark.root
def test_a_stream_ends_at_its_deadline_and_leaves_nothing(envd: Envd) -> None:
    before = envd.open_descriptors()
    message = {"path": "/tmp"}
    headers = {"Connect-Timeout-Ms": "1500", "Keepalive-Ping-Interval": "1"}
    with Stream(envd, WATCH, message, headers) as stream:
        kinds = [next(iter(event)) for event in stream]
        assert kinds == ["start", "keepalive"]
        assert stream.end["error"]["code"] == "deadline_exceeded"
    watch(envd, "/tmp").close()
    wait_until(lambda: envd.open_descriptors() <= before, "closed watches")


@pytest.mark.root
def test_unknown_watchers(envd: Envd) -> None:
    for method in ("GetWatcherEvents", "RemoveWatcher"):
        answer = unary(envd, f"filesystem.Filesystem/{method}", {"watcherId": "none"})
        assert (answer.status, answer.json()["code"]) == (404, "not_found")


@pytest.mark.root
def test_lost_events_are_told(envd: Envd) -> None:
    run(envd, "mkdir /tmp/lost")
    created = unary(envd, "filesystem.Filesystem/CreateWatcher", {"path": "/tmp/lost"})
    poll = {"watcherId": created.json()["watcherId"]}
    run(envd, "cd /tmp/lost; seq 70000 | xargs mkdir; rmdir *")
    answer = unary(envd, "filesystem.Filesystem/GetWatcherEvents", poll)
    assert answer.json()["code"] == "data_loss"
    assert len(unary(envd, "filesystem.Filesystem/GetWatcherEvents", poll).json()["events"]) > 1000
    assert unary(envd, "filesystem.Filesystem/RemoveWatcher", poll).status == 200
