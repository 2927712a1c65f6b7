"""Calls of the PyPI package `e2b`, from 1.0 to the newest, against a running service."""

from __future__ import annotations

import inspect
import os
import time
import urllib.request

import e2b
from e2b import Sandbox
from report import PATIENCE_S, Absent, OneSandbox, attribute, expect, run_calls, wait_for

TEMPLATE = os.environ.get("VMCELL_MATRIX_TEMPLATE", "base")
LIFETIME_S = 1800
OPTIONS = {"timeout": LIFETIME_S, "request_timeout": PATIENCE_S}


def create(**options):
    """A sandbox, the way this version makes one; `template` first, as it is in all of them."""
    options = {**OPTIONS, **options}
    template = options.pop("template", TEMPLATE)
    make = getattr(Sandbox, "create", None) or Sandbox
    return make(template, **options)


def throwaway(**options):
    """Create with options that the server may refuse; what came up is killed again."""
    create(**options).kill()


class Calls(OneSandbox):
    """The calls, on one sandbox that `create` makes and `kill` ends."""

    def run(self, command, **options):
        return self.sandbox.commands.run(command, timeout=PATIENCE_S, **options)

    # Sandboxes.

    def create(self):
        self._made = create(metadata={"matrix": "a b&c"}, envs={"COLOUR": "red"})

    def list(self):
        found = Sandbox.list()
        items = found if isinstance(found, list) else found.next_items()
        assert self._id() in [item.sandbox_id.partition("-")[0] for item in items], items

    def list_by_metadata(self):
        if not hasattr(e2b, "SandboxQuery"):
            raise Absent("SandboxQuery")
        query = e2b.SandboxQuery(metadata={"matrix": "a b&c"})
        found = Sandbox.list(query=query)
        items = found if isinstance(found, list) else found.next_items()
        expect([item.sandbox_id.partition("-")[0] for item in items], [self._id()])

    def _id(self):
        return self.sandbox.sandbox_id.partition("-")[0]

    def get_info(self):
        info = attribute(self.sandbox, "get_info")()
        expect(info.metadata, {"matrix": "a b&c"})
        expect(info.sandbox_id.partition("-")[0], self._id())

    def connect(self):
        again = Sandbox.connect(self.sandbox.sandbox_id)
        expect(again.commands.run("echo again", timeout=PATIENCE_S).stdout, "again\n")

    def set_timeout(self):
        self.sandbox.set_timeout(LIFETIME_S + 60)

    def is_running(self):
        expect(self.sandbox.is_running(), True)

    def get_metrics(self):
        get = attribute(self.sandbox, "get_metrics")
        found = wait_for(get, "metrics of the sandbox")
        assert found[0].cpu_count >= 1, found

    def kill(self):
        # 1.x says nothing.
        expect(self.sandbox.kill() in (True, None), True)

    def kill_again(self):
        expect(self.sandbox.kill() in (False, None), True)

    def command_after_kill(self):
        try:
            self.run("true")
        except Exception as error:  # noqa: BLE001 - its name differs by version
            failure = error
        else:
            raise AssertionError("a killed sandbox ran a command")
        if isinstance(failure, RuntimeError) and "streaming response" in str(failure):
            raise Absent("this version cannot read the error of a stream")
        wanted = {"TimeoutException", "SandboxNotRunningException", "NotFoundException"}
        if not wanted & {kind.__name__ for kind in type(failure).__mro__}:
            raise AssertionError(f"it raised {failure!r}")

    # Commands.

    def commands_run(self):
        expect(self.run("echo out; echo err >&2").stdout, "out\n")

    def commands_exit_code(self):
        try:
            self.run("echo oops >&2; exit 9")
        except e2b.CommandExitException as error:
            failure = error
        else:
            raise AssertionError("no CommandExitException for exit 9")
        expect((failure.exit_code, failure.stderr), (9, "oops\n"))

    def commands_options(self):
        done = self.run("echo $COLOUR $A $(id -un) $PWD", envs={"A": "b"}, user="root", cwd="/tmp")
        expect(done.stdout, "red b root /tmp\n")

    def commands_callbacks(self):
        pieces = []
        self.run("echo one; echo two", on_stdout=pieces.append)
        expect("".join(str(piece) for piece in pieces), "one\ntwo\n")

    def commands_timeout(self):
        try:
            self.sandbox.commands.run("sleep 120", timeout=2)
        except e2b.TimeoutException:
            return
        raise AssertionError("no TimeoutException")

    def commands_background(self):
        handle = self.run("sleep 1; echo late", background=True)
        assert handle.pid in [process.pid for process in self.sandbox.commands.list()]
        expect(handle.wait().stdout, "late\n")

    def commands_kill(self):
        handle = self.run("sleep 300", background=True)
        expect(self.sandbox.commands.kill(handle.pid), True)
        expect(self.sandbox.commands.kill(4_000_000), False)

    def commands_connect(self):
        handle = self.run("sleep 3; echo reached", background=True)
        handle.disconnect()
        again = self.sandbox.commands.connect(handle.pid, timeout=PATIENCE_S)
        expect(again.wait().stdout, "reached\n")

    def _cat(self):
        try:
            return self.run("head -n 1", background=True, stdin=True)
        except TypeError:
            return self.run("head -n 1", background=True)

    def send_stdin(self):
        handle = self._cat()
        self.sandbox.commands.send_stdin(handle.pid, "typed\n")
        expect(handle.wait().stdout, "typed\n")

    def close_stdin(self):
        close = attribute(self.sandbox.commands, "close_stdin")
        handle = self.run("cat", background=True, stdin=True)
        self.sandbox.commands.send_stdin(handle.pid, "all")
        close(handle.pid)
        expect(handle.wait().stdout, "all")

    def stream_input(self):
        stream = attribute(self.sandbox.commands, "stream_input")
        handle = self.run("head -n 2", background=True, stdin=True)
        stream(handle.pid, iter(["a\n", "b\n"]))
        expect(handle.wait().stdout, "a\nb\n")

    def pty(self):
        pty = attribute(self.sandbox, "pty")
        size = e2b.PtySize(rows=20, cols=70)
        handle = pty.create(size, timeout=PATIENCE_S)
        pty.resize(handle.pid, e2b.PtySize(rows=33, cols=111))
        pty.send_stdin(handle.pid, b"stty size; exit\n")
        seen = b""
        for _, _, output in handle:
            seen += output or b""
        assert b"33 111" in seen, seen

    # Files.

    def write_and_read(self):
        self.sandbox.files.write("notes/a.txt", "héllo")
        expect(self.sandbox.files.read("/home/user/notes/a.txt"), "héllo")

    def read_bytes(self):
        content = bytes(range(256)) * 4096
        self.sandbox.files.write("blob", content)
        expect(bytes(self.sandbox.files.read("blob", format="bytes")), content)
        streamed = b"".join(self.sandbox.files.read("blob", format="stream"))
        expect(streamed, content)

    def write_files(self):
        write = getattr(self.sandbox.files, "write_files", self.sandbox.files.write)
        pairs = [{"path": f"many/{n}", "data": str(n)} for n in range(3)]
        try:
            write(pairs)
        except TypeError as error:
            raise Absent("several files in one write") from error
        expect(self.sandbox.files.read("many/2"), "2")

    def list_files(self):
        self.sandbox.files.make_dir("tree/below")
        self.sandbox.files.write("tree/leaf", "x")
        expect(sorted(e.name for e in self.sandbox.files.list("tree")), ["below", "leaf"])

    def exists(self):
        found = [self.sandbox.files.exists(name) for name in ("tree/leaf", "tree/none")]
        expect(found, [True, False])

    def file_info(self):
        info = attribute(self.sandbox.files, "get_info")("tree/leaf")
        expect((info.size, info.owner, info.permissions), (1, "user", "-rw-r--r--"))

    def make_dir(self):
        made = [self.sandbox.files.make_dir("fresh/dir") for _ in range(2)]
        expect(made, [True, False])

    def rename(self):
        self.sandbox.files.write("old-name", "x")
        expect(self.sandbox.files.rename("old-name", "moved/new-name").name, "new-name")

    def remove(self):
        self.sandbox.files.remove("moved")
        expect(self.sandbox.files.exists("moved"), False)

    def missing_file(self):
        try:
            self.sandbox.files.read("no-such-file")
        except e2b.NotFoundException:
            return
        raise AssertionError("no NotFoundException")

    def _watched(self, **options):
        files = self.sandbox.files
        files.make_dir("watched/deep")
        handle = files.watch_dir("watched", **options)
        try:
            files.write("watched/deep/x" if options.get("recursive") else "watched/x", "y")
            return wait_for(handle.get_new_events, "events")
        finally:
            handle.stop()

    def watch_dir(self):
        expect({event.name for event in self._watched()}, {"x"})

    def watch_recursive(self):
        assert "deep/x" in {event.name for event in self._watched(recursive=True)}

    def watch_entries(self):
        events = self._watched(include_entry=True)
        assert any(event.entry is not None for event in events), events

    def metadata(self):
        self.sandbox.files.write("labelled", "x", metadata={"kind": "note"})
        expect(self.sandbox.files.get_info("labelled").metadata, {"kind": "note"})

    def gzip(self):
        text = "squeeze " * 1000
        self.sandbox.files.write("packed", text, gzip=True)
        expect(self.sandbox.files.read("packed", gzip=True), text)

    def octet_stream(self):
        self.sandbox.files.write("raw", b"\x00\xff", use_octet_stream=True)
        expect(bytes(self.sandbox.files.read("raw", format="bytes")), b"\x00\xff")

    def signed_urls(self):
        url = self.sandbox.download_url("notes/a.txt", user="user")
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            expect(answer.read().decode(), "héllo")

    # What a sandbox can be besides running.

    def pause_and_connect(self):
        if not hasattr(Sandbox, "pause"):
            attribute(Sandbox, "beta_pause")
        sandbox = create()
        try:
            pause = getattr(sandbox, "pause", None) or sandbox.beta_pause
            process = sandbox.commands.run("sleep 3600", background=True, timeout=0)
            sandbox.files.write("kept", "x")
            pause(request_timeout=PATIENCE_S)
            resume = getattr(Sandbox, "resume", Sandbox.connect)
            again = resume(sandbox.sandbox_id, **OPTIONS)
            expect(again.files.read("kept"), "x")
            assert process.pid in [row.pid for row in again.commands.list()]
        finally:
            sandbox.kill()

    def pause_files_alone(self):
        known = inspect.signature(attribute(Sandbox, "pause")).parameters
        ways = ({"mode": "filesystem"}, {"keep_memory": False})
        way = next((way for way in ways if way.keys() <= known.keys()), None)
        if way is None:
            raise Absent("mode")
        sandbox = create()
        try:
            sandbox.pause(**way, request_timeout=PATIENCE_S)
        finally:
            sandbox.kill()

    def auto_pause(self):
        sandbox = create(lifecycle={"on_timeout": "pause"})
        try:
            self._let_it_pause(sandbox)
            again = Sandbox.connect(sandbox.sandbox_id, **OPTIONS)
            expect(again.commands.run("echo back", timeout=PATIENCE_S).stdout, "back\n")
        finally:
            sandbox.kill()

    def auto_resume(self):
        sandbox = create(lifecycle={"on_timeout": "pause", "auto_resume": True})
        try:
            self._let_it_pause(sandbox)
            expect(sandbox.commands.run("echo woken", timeout=PATIENCE_S).stdout, "woken\n")
        finally:
            sandbox.kill()

    def _let_it_pause(self, sandbox):
        sandbox.set_timeout(1)
        wait_for(lambda: sandbox.get_info().state == e2b.SandboxState.PAUSED, "its pause")

    def snapshot(self):
        make = attribute(self.sandbox, "create_snapshot")
        self.sandbox.files.write("saved", "x")
        snapshot = make(request_timeout=PATIENCE_S)
        try:
            listed = Sandbox.list_snapshots().next_items()
            assert snapshot.snapshot_id in [row.snapshot_id for row in listed], listed
            made = create(template=snapshot.snapshot_id)
            try:
                expect(made.files.read("saved"), "x")
            finally:
                made.kill()
        finally:
            Sandbox.delete_snapshot(snapshot.snapshot_id)

    def fork(self):
        fork = attribute(self.sandbox, "fork")
        self.sandbox.files.write("forked", "x")
        (copy,) = fork(request_timeout=PATIENCE_S)
        if isinstance(copy, Exception):
            raise copy
        try:
            expect(copy.files.read("forked"), "x")
        finally:
            copy.kill()

    def no_internet(self):
        throwaway(allow_internet_access=False)

    def network_rules(self):
        throwaway(network={"deny_out": ["0.0.0.0/0"], "allow_out": ["1.1.1.1"]})

    def network_names(self):
        throwaway(network={"deny_out": ["0.0.0.0/0"], "allow_out": ["example.com"]})

    def update_network(self):
        attribute(self.sandbox, "update_network")({"deny_out": ["10.0.0.0/8"]})

    def mcp(self):
        throwaway(mcp={"everything": {}})

    def volume(self):
        volume = attribute(e2b, "Volume").create(f"matrix-{int(time.time())}")
        try:
            volume.write_file("/a", "x")
            expect(volume.read_file("/a"), "x")
        finally:
            e2b.Volume.destroy(volume.volume_id)

    def template_exists(self):
        template = attribute(e2b, "Template")
        ask = getattr(template, "exists", None) or attribute(template, "alias_exists")
        expect(ask("surely-no-such-template"), False)

    def template_build(self):
        template = attribute(e2b, "Template")
        recipe = template().from_template(TEMPLATE).run_cmd("echo built > /tmp/built")
        name = f"matrix-{int(time.time())}"
        try:
            template.build(recipe, name, cpu_count=1, memory_mb=512)
        except TypeError:
            template.build(recipe, alias=name, cpu_count=1, memory_mb=512)

    def secret(self):
        attribute(e2b, "Secret").create("matrix", "value")


def command_calls(c):
    """A sandbox and what runs in it."""
    return [
        ("Sandbox.create", c.create),
        ("Sandbox.list", c.list),
        ("Sandbox.list by metadata", c.list_by_metadata),
        ("get_info", c.get_info),
        ("Sandbox.connect", c.connect),
        ("set_timeout", c.set_timeout),
        ("is_running", c.is_running),
        ("get_metrics", c.get_metrics),
        ("commands.run", c.commands_run),
        ("commands.run: exit code", c.commands_exit_code),
        ("commands.run: user, envs, cwd", c.commands_options),
        ("commands.run: callbacks", c.commands_callbacks),
        ("commands.run: timeout", c.commands_timeout),
        ("commands.run: background, list", c.commands_background),
        ("commands.kill", c.commands_kill),
        ("commands.connect", c.commands_connect),
        ("commands.send_stdin", c.send_stdin),
        ("commands.close_stdin", c.close_stdin),
        ("commands.stream_input", c.stream_input),
        ("pty: create, resize, input", c.pty),
    ]


def file_calls(c):
    """Its files."""
    return [
        ("files.write, read", c.write_and_read),
        ("files.read: bytes, stream", c.read_bytes),
        ("files.write: several", c.write_files),
        ("files.list", c.list_files),
        ("files.exists", c.exists),
        ("files.get_info", c.file_info),
        ("files.make_dir", c.make_dir),
        ("files.rename", c.rename),
        ("files.remove", c.remove),
        ("files: missing", c.missing_file),
        ("files.watch_dir", c.watch_dir),
        ("files.watch_dir: recursive", c.watch_recursive),
        ("files.watch_dir: entries", c.watch_entries),
        ("files.write: metadata", c.metadata),
        ("files: gzip", c.gzip),
        ("files.write: octet-stream", c.octet_stream),
        ("download_url, signed", c.signed_urls),
    ]


def other_calls(c):
    """What else a sandbox can have, and its end."""
    return [
        ("allow_internet_access=False", c.no_internet),
        ("network rules", c.network_rules),
        ("network rules: domain names", c.network_names),
        ("update_network", c.update_network),
        ("pause, connect", c.pause_and_connect),
        ("pause: files alone", c.pause_files_alone),
        ("lifecycle: auto-pause", c.auto_pause),
        ("lifecycle: auto-resume", c.auto_resume),
        ("snapshots", c.snapshot),
        ("fork", c.fork),
        ("volumes", c.volume),
        ("Template.exists", c.template_exists),
        ("Template.build", c.template_build),
        ("secrets", c.secret),
        ("mcp", c.mcp),
        ("kill", c.kill),
        ("kill again", c.kill_again),
        ("commands.run after kill", c.command_after_kill),
    ]


def main():
    c = Calls()
    run_calls([*command_calls(c), *file_calls(c), *other_calls(c)])


if __name__ == "__main__":
    main()
