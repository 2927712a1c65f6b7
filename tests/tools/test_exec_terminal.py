"""`vmcell sandbox exec -t` in a terminal of its own, before an envd that runs commands here."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_service import api_service, listening
from click.testing import CliRunner
from envd_harness import wait_until
from envd_node import envd_service
from fake_envd import FakeEnvd, fake_envd

from vmcell_tools.cli import main
from vmcell_tools.local_terminal import Size, size_of

PATIENCE_S = 60
ROWS, COLUMNS = 33, 77
LOCAL_FLAGS = 3  # of what tcgetattr answers


@pytest.fixture
def envd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEnvd]:
    with (
        api_service(tmp_path) as service,
        listening(service.app) as address,
        fake_envd() as running,
    ):
        monkeypatch.setenv("E2B_API_URL", f"http://{address}")
        monkeypatch.setenv("E2B_API_KEY", service.key)
        monkeypatch.setenv("E2B_SANDBOX_URL", running.url)
        monkeypatch.setenv("TERM", "vt100")
        service.node.on_create = lambda order: setattr(running, "token", order.access_token)
        yield running


@pytest.fixture
def sandbox_id(envd: FakeEnvd) -> str:
    return CliRunner().invoke(main, ["sandbox", "create"]).stdout.strip()


class _Session:
    """`vmcell sandbox exec …` with a terminal, of which `ours` is the other end."""

    def __init__(self, *words: str) -> None:
        self.ours, self.its = os.openpty()
        self._open = [self.ours, self.its]
        termios.tcsetwinsize(self.ours, (ROWS, COLUMNS))
        self.before = termios.tcgetattr(self.its)
        program = [sys.executable, "-m", "vmcell_tools", "sandbox", "exec", *words]
        self.child = subprocess.Popen(
            ["setsid", "-c", *program], stdin=self.its, stdout=self.its, stderr=self.its
        )
        self.seen = b""

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.child.kill()
        self.child.wait()
        self.hang_up()

    def hang_up(self) -> None:
        """Closes both ends that are the test's."""
        while self._open:
            os.close(self._open.pop())

    def read_to(self, words: bytes) -> None:
        while words not in self.seen:
            readable, _, _ = select.select([self.ours], [], [], PATIENCE_S)
            assert readable, self.seen
            self.seen += os.read(self.ours, 65536)

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)


def test_keys_output_size_and_status(sandbox_id: str, envd: FakeEnvd) -> None:
    script = 'stty size; echo $TERM; test -t 2; echo tty $?; read x; echo "got <$x>"; exit 4'
    with _Session("-t", sandbox_id, "sh", "-c", script) as session:
        session.read_to(b"33 77\r\nvt100\r\ntty 0\r\n")
        assert not termios.tcgetattr(session.its)[LOCAL_FLAGS] & termios.ECHO, "raw"
        session.type(b"ab\x7fc\r")
        session.read_to(b"got <ac>\r\n")
        assert session.child.wait(PATIENCE_S) == 4
        assert termios.tcgetattr(session.its) == session.before
    assert envd.running == {}


def test_ctrl_c_is_the_commands(sandbox_id: str, envd: FakeEnvd) -> None:
    script = "trap 'echo caught; exit 5' INT; echo up; while :; do sleep 0.05; done"
    with _Session("-it", sandbox_id, "sh", "-c", script) as session:
        session.read_to(b"up\r\n")
        session.type(b"\x03")
        session.read_to(b"caught\r\n")
        assert session.child.wait(PATIENCE_S) == 5
    assert "SendSignal" not in envd.names()


def test_a_new_size_is_passed_on(sandbox_id: str) -> None:
    script = "trap 'stty size; exit 6' WINCH; echo up; while :; do sleep 0.05; done"
    with _Session("-t", sandbox_id, "sh", "-c", script) as session:
        session.read_to(b"up\r\n")
        termios.tcsetwinsize(session.ours, (50, 132))
        session.read_to(b"50 132\r\n")
        assert session.child.wait(PATIENCE_S) == 6


def test_a_terminal_is_left_as_it_was_after_an_error(sandbox_id: str, envd: FakeEnvd) -> None:
    envd.instead = b"\0\0\0\0\1x"
    with _Session("-t", sandbox_id, "sh") as session:
        session.read_to(b"holds what no envd says")
        assert session.child.wait(PATIENCE_S) == 125
        assert termios.tcgetattr(session.its) == session.before


def test_a_terminal_that_goes_takes_the_command_along(sandbox_id: str, envd: FakeEnvd) -> None:
    with _Session("-t", sandbox_id, "sh", "-c", "echo up; exec sleep 600") as session:
        session.read_to(b"up\r\n")
        session.hang_up()
        session.child.wait(PATIENCE_S)
    wait_until(lambda: not envd.running, "the command's end")
    assert "SendSignal" in envd.names()


def test_without_a_terminal(sandbox_id: str, envd: FakeEnvd) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmcell_tools", "sandbox", "exec", "-t", sandbox_id, "true"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2
    assert b"-t needs a terminal as standard input" in done.stderr
    assert envd.calls == []


def test_a_size_that_nobody_set() -> None:
    ours, its = os.openpty()
    try:
        assert size_of(its) == Size(columns=80, rows=24)
    finally:
        os.close(ours)
        os.close(its)


@pytest.mark.root
@pytest.mark.timeout(300)
def test_on_a_real_envd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with envd_service(tmp_path) as running:
        monkeypatch.setenv("E2B_API_URL", running.api_url)
        monkeypatch.setenv("E2B_SANDBOX_URL", running.sandbox_url)
        monkeypatch.setenv("E2B_API_KEY", running.key)
        sandbox_id = CliRunner().invoke(main, ["sandbox", "create"]).stdout.strip()
        script = (
            "trap 'stty size; exit 6' WINCH; stty size; read x; "
            'echo "got <$x>"; while :; do sleep 0.05; done'
        )
        with _Session("-t", sandbox_id, "bash", "-c", script) as session:
            session.read_to(b"33 77\r\n")
            session.type(b"ab\x7fc\r")
            session.read_to(b"got <ac>\r\n")
            termios.tcsetwinsize(session.ours, (50, 132))
            session.read_to(b"50 132\r\n")
            assert session.child.wait(PATIENCE_S) == 6
            assert termios.tcgetattr(session.its) == session.before
