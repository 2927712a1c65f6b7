"""Calls of the PyPI package `cubesandbox`."""

from __future__ import annotations

import os
import time

import cubesandbox
from cubesandbox import Config, Sandbox
from report import PATIENCE_S, OneSandbox, expect, run_calls

TEMPLATE = os.environ.get("VMCELL_MATRIX_TEMPLATE", "base")
INTERPRETER = os.environ.get("VMCELL_MATRIX_INTERPRETER_TEMPLATE", "code-interpreter-v1")
CONFIG = Config(request_timeout=PATIENCE_S)


def create(template=TEMPLATE, **options):
    return Sandbox.create(template, timeout=1800, config=CONFIG, **options)


class Calls(OneSandbox):
    """The calls, on one sandbox that `create` makes and `kill` ends."""

    def _run(self, command, **options):
        return self.sandbox.commands.run(command, timeout=PATIENCE_S, **options)

    def health(self):
        expect(Sandbox.health(config=CONFIG)["status"], "ok")

    def create(self):
        self._made = create(metadata={"who": "matrix"}, envs={"COLOUR": "red"})

    def list(self):
        for found in (Sandbox.list(config=CONFIG), Sandbox.list_v2(config=CONFIG)):
            assert self.sandbox.sandbox_id in [item["sandboxID"] for item in found], found

    def get_info(self):
        expect(self.sandbox.get_info().sandbox_id, self.sandbox.sandbox_id)

    def connect(self):
        again = Sandbox.connect(self.sandbox.sandbox_id, config=CONFIG)
        expect(again.commands.run("echo again", timeout=PATIENCE_S).stdout, "again\n")

    def set_timeout(self):
        self.sandbox.set_timeout(1860)

    def command(self):
        expect(self._run("echo $COLOUR $A $(id -un)", envs={"A": "b"}).stdout, "red b root\n")

    def exit_code(self):
        done = self._run("echo oops >&2; exit 9")
        expect((done.exit_code, done.stderr), (9, "oops\n"))

    def pty(self):
        size = cubesandbox.PtySize(rows=20, cols=70)
        handle = self.sandbox.pty.create(size, timeout=PATIENCE_S)
        self.sandbox.pty.resize(handle.pid, cubesandbox.PtySize(rows=33, cols=111))
        self.sandbox.pty.send_stdin(handle.pid, b"stty size; exit\n")
        seen = b"".join(output.data if hasattr(output, "data") else output for output in handle)
        assert b"33 111" in seen, seen

    def write_and_read(self):
        self.sandbox.files.write("/tmp/notes/a.txt", "héllo")
        expect(self.sandbox.files.read("/tmp/notes/a.txt"), "héllo")

    def list_files(self):
        expect([entry["name"] for entry in self.sandbox.files.list("/tmp/notes")], ["a.txt"])

    def exists(self):
        paths = ("/tmp/notes/a.txt", "/tmp/none")
        expect([self.sandbox.files.exists(path) for path in paths], [True, False])

    def change_files(self):
        self.sandbox.files.make_dir("/tmp/fresh")
        self.sandbox.files.rename("/tmp/notes/a.txt", "/tmp/fresh/b.txt")
        self.sandbox.files.remove("/tmp/fresh")
        expect(self.sandbox.files.exists("/tmp/fresh/b.txt"), False)

    def watch(self):
        with self.sandbox.files.watch_dir("/tmp") as watcher:
            self.sandbox.files.write("/tmp/seen", "x")
            expect(next(iter(watcher)).name, "seen")

    def no_internet(self):
        create(allow_internet_access=False).kill()

    def network_rules(self):
        create(network={"deny_out": ["10.0.0.0/8"]}).kill()

    def update_network(self):
        self.sandbox.update_network({"deny_out": ["10.0.0.0/8"]})

    def pause_and_resume(self):
        sandbox = create()
        try:
            sandbox.pause(timeout=PATIENCE_S)
            sandbox.resume(timeout=1800)
            expect(sandbox.commands.run("echo back", timeout=PATIENCE_S).stdout, "back\n")
        finally:
            sandbox.kill()

    def snapshot_and_rollback(self):
        self.sandbox.files.write("/tmp/state", "before")
        snapshot = self.sandbox.create_snapshot()
        try:
            listed, _ = Sandbox.list_snapshots(config=CONFIG)
            assert snapshot.snapshot_id in [row.snapshot_id for row in listed], listed
            self.sandbox.files.write("/tmp/state", "after")
            self.sandbox.rollback(snapshot.snapshot_id)
            expect(self.sandbox.files.read("/tmp/state"), "before")
        finally:
            Sandbox.delete_snapshot(snapshot.snapshot_id, config=CONFIG)

    def clone(self):
        self.sandbox.files.write("/tmp/cloned", "x")
        (copy,) = self.sandbox.clone()
        try:
            expect(copy.files.read("/tmp/cloned"), "x")
        finally:
            copy.kill()

    def volume(self):
        volume = cubesandbox.Volume.create(f"matrix-{int(time.time())}", config=CONFIG)
        cubesandbox.Volume.destroy(volume.volume_id, config=CONFIG)

    def run_code(self):
        sandbox = create(INTERPRETER)
        try:
            expect(sandbox.run_code("1 + 1").text, "2")
        finally:
            sandbox.kill()

    def kill(self):
        self.sandbox.kill()


def main():
    c = Calls()
    run_calls(
        [
            ("Sandbox.health", c.health),
            ("Sandbox.create", c.create),
            ("Sandbox.list, list_v2", c.list),
            ("get_info", c.get_info),
            ("Sandbox.connect", c.connect),
            ("set_timeout", c.set_timeout),
            ("commands.run", c.command),
            ("commands.run: exit code", c.exit_code),
            ("pty: create, resize, input", c.pty),
            ("files.write, read", c.write_and_read),
            ("files.list", c.list_files),
            ("files.exists", c.exists),
            ("files.make_dir, rename, remove", c.change_files),
            ("files.watch_dir", c.watch),
            ("allow_internet_access=False", c.no_internet),
            ("network rules", c.network_rules),
            ("update_network", c.update_network),
            ("pause, resume", c.pause_and_resume),
            ("snapshots, rollback", c.snapshot_and_rollback),
            ("clone", c.clone),
            ("volumes", c.volume),
            ("run_code", c.run_code),
            ("kill", c.kill),
        ]
    )


if __name__ == "__main__":
    main()
