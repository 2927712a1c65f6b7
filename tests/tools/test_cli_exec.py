"""`vmcell sandbox exec` as a program: streams, exit status, signals; before an envd that runs its
commands on this host, and (root lane) before the real one."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_service import ApiService, api_service, listening
from click.testing import CliRunner
from data_plane import data_plane, free_port
from envd_node import envd_service
from fake_envd import FakeEnvd, fake_envd
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError, HostError, VmcellError
from vmcell_tools.cli import main
from vmcell_tools.envd_door import ENVD_PORT, Door, door_of
from vmcell_tools.guest_command import Command, CommandError, RunningCommand
from vmcell_tools.local_ca import ensure_certificate

PATIENCE_S = 60
DOMAIN = "sbx.localhost"
# Of this process alone, as envd's port is always the same.
GUEST_ADDRESS = f"127.78.{os.getpid() >> 8 & 0xFF}.{os.getpid() & 0xFF or 1}"
VMCELL = (sys.executable, "-m", "vmcell_tools", "sandbox", "exec")


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiService]:
    with api_service(tmp_path) as running, listening(running.app) as address:
        monkeypatch.setenv("E2B_API_URL", f"http://{address}")
        monkeypatch.setenv("E2B_API_KEY", running.key)
        yield running


@pytest.fixture
def envd(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEnvd]:
    with fake_envd() as running:
        monkeypatch.setenv("E2B_SANDBOX_URL", running.url)
        yield running


@pytest.fixture
def sandbox_id(service: ApiService, envd: FakeEnvd) -> str:
    return _create(service, envd)


def _create(service: ApiService, envd: FakeEnvd, *words: str) -> str:
    result = CliRunner().invoke(main, ["sandbox", "create", *words])
    assert result.exit_code == 0, result.output
    envd.token = service.node.orders[-1].access_token
    assert envd.token
    return result.stdout.strip()


def _exec(*words: str, data: bytes | None = None) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        [*VMCELL, *words],
        input=data,
        stdin=subprocess.DEVNULL if data is None else None,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_output_and_status(sandbox_id: str, envd: FakeEnvd) -> None:
    script = r"printf 'a\0\377b'; echo wrong >&2; exit 7"
    assert _exec(sandbox_id, "--", "sh", "-c", script) == (7, b"a\0\xffb", b"wrong\n")
    assert _exec(sandbox_id, "echo", "-n", "--", "-e") == (0, b"-- -e", b"")
    assert [message["process"]["args"] for _, message in envd.calls] == [
        *(["-c", script], ["-n", "--", "-e"]),
    ]
    assert all(message["stdin"] is False for _, message in envd.calls)
    assert "authorization" not in envd.headers[0]


def test_what_envd_is_told(sandbox_id: str, envd: FakeEnvd, tmp_path: Path) -> None:
    code, out, _ = _exec(
        *("-e", "COLOUR=r=d", "-e", "EMPTY=", "-w", str(tmp_path), "-u", "nobody", sandbox_id),
        *("sh", "-c", 'pwd; echo "$COLOUR$EMPTY"'),
    )
    assert (code, out.decode().splitlines()) == (0, [str(tmp_path), "r=d"])
    assert envd.headers[0]["authorization"] == "Basic bm9ib2R5Og=="
    assert envd.headers[0]["e2b-sandbox-id"] == sandbox_id


def test_output_comes_as_it_is_written(sandbox_id: str) -> None:
    """The command's second line waits for an input that is sent when the first has been seen."""
    with subprocess.Popen(
        [*VMCELL, "-i", sandbox_id, "sh", "-c", "echo first; read x; echo second $x"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"first\n"
        child.stdin.write(b"word\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"second word\n"
        assert child.wait(PATIENCE_S) == 0, "though the input is still open"


def test_input_reaches_its_end(sandbox_id: str, envd: FakeEnvd) -> None:
    data = os.urandom(300_000)
    assert _exec("-i", sandbox_id, "cat", data=data) == (0, data, b"")
    assert envd.names()[-1] == "CloseStdin"
    assert _exec("-i", sandbox_id, "cat", data=b"") == (0, b"", b"")
    assert _exec(sandbox_id, "cat", data=b"not asked for") == (0, b"", b"")


def test_a_command_that_does_not_read_its_input(sandbox_id: str) -> None:
    """Whichever comes first, the command's end or the refused input, it is no error."""
    assert _exec("-i", sandbox_id, "sh", "-c", "exec <&-; exit 3", data=bytes(1 << 20))[0] == 3
    assert _exec("-i", sandbox_id, "true", data=bytes(1 << 20)) == (0, b"", b"")


def test_an_input_that_breaks_off_ends_the_command(sandbox_id: str, envd: FakeEnvd) -> None:
    envd.input_refusal = (503, {"code": "unavailable", "message": "the guest is gone"})
    code, _, err = _exec("-i", sandbox_id, "cat", data=b"x")
    assert (code, envd.running) == (125, {})
    assert b"Error: the input broke off, so the command was ended: the guest is gone" in err


@pytest.mark.parametrize(
    ("script", "status"),
    [("kill -TERM $$", 143), ("kill -KILL $$", 137), ("exit 255", 255)],
)
def test_status_of_signals(sandbox_id: str, script: str, status: int) -> None:
    assert _exec(sandbox_id, "sh", "-c", script)[0] == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_first(
    sandbox_id: str, envd: FakeEnvd, number: signal.Signals
) -> None:
    script = "trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.05; done"
    with subprocess.Popen([*VMCELL, sandbox_id, "sh", "-c", script], stdout=subprocess.PIPE) as it:
        assert it.stdout is not None
        assert it.stdout.readline() == b"up\n"
        it.send_signal(number)
        assert it.stdout.read() == b"bye\n"
        assert it.wait(PATIENCE_S) == 9
    assert envd.running == {}


def test_a_second_signal_kills(sandbox_id: str, envd: FakeEnvd) -> None:
    script = "trap 'echo no' TERM; echo up; while :; do sleep 0.05; done"
    with subprocess.Popen([*VMCELL, sandbox_id, "sh", "-c", script], stdout=subprocess.PIPE) as it:
        assert it.stdout is not None
        assert it.stdout.readline() == b"up\n"
        it.send_signal(signal.SIGINT)
        assert it.stdout.readline() == b"no\n"
        it.send_signal(signal.SIGINT)
        assert it.wait(PATIENCE_S) == 137
    signals = [message["signal"] for name, message in envd.calls if name == "SendSignal"]
    assert signals == ["SIGNAL_SIGTERM", "SIGNAL_SIGKILL"]


def test_a_reader_that_leaves_ends_the_command(sandbox_id: str, envd: FakeEnvd) -> None:
    with subprocess.Popen(
        [*VMCELL, sandbox_id, "yes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as it:
        assert it.stdout is not None
        assert it.stderr is not None
        assert it.stdout.readline() == b"y\n"
        it.stdout.close()
        assert it.wait(PATIENCE_S) == 141
        assert it.stderr.read() == b""
    assert "SendSignal" in envd.names()


def test_an_output_that_takes_no_more(sandbox_id: str, envd: FakeEnvd) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*VMCELL, sandbox_id, "yes"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=PATIENCE_S,
            check=False,
        )
    assert done.returncode == 125
    assert done.stderr.startswith(b"Error: the output cannot be written, so the command was ended")
    assert done.stderr.count(b"\n") == 1
    assert "SendSignal" in envd.names()


def test_timeout(sandbox_id: str, envd: FakeEnvd) -> None:
    code, out, err = _exec("--timeout", "1", sandbox_id, "sh", "-c", "echo up; sleep 600")
    assert (code, out, err) == (124, b"up\n", b"Error: the command was ended after 1 s\n")
    assert envd.headers[0]["connect-timeout-ms"] == "1000"
    assert _exec("--timeout", "60", sandbox_id, "true")[0] == 0


def test_a_command_that_does_not_start(sandbox_id: str, tmp_path: Path) -> None:
    code, _, err = _exec(sandbox_id, "nosuchprogram")
    assert code == 127
    assert err.startswith(b"Error: error starting process 'nosuchprogram'")
    assert _exec(sandbox_id, str(tmp_path))[0] == 126


def test_usage(sandbox_id: str) -> None:
    for words, sentence in (
        ((sandbox_id,), b"no COMMAND; for example"),
        ((sandbox_id, "--"), b"no COMMAND; for example"),
        ((sandbox_id, "-i", "cat"), b"-i stands behind ID; options stand before it"),
        ((), b"Missing argument 'ID'"),
        (("-e", "x", sandbox_id, "true"), b"'x' is no NAME=VALUE"),
        (("--timeout", "0", sandbox_id, "true"), b"0 is not in the range"),
        (("--timeout", "nan", sandbox_id, "true"), b"'nan' is not a valid integer"),
        (("-u", "a:b", sandbox_id, "true"), b"'a:b' is no user name"),
        ((sandbox_id, "echo", "\udcff"), b"'\\udcff' is not UTF-8"),
    ):
        code, _, err = _exec(*words)
        assert code == 2
        assert sentence in err


def test_paused_and_unknown_sandboxes(service: ApiService, envd: FakeEnvd) -> None:
    sandbox_id = _create(service, envd)
    assert CliRunner().invoke(main, ["sandbox", "pause", sandbox_id]).exit_code == 0
    code, _, err = _exec(sandbox_id, "true")
    assert code == 125
    assert f"is paused; resume it with: vmcell sandbox resume {sandbox_id}".encode() in err
    waking = _create(service, envd, "--on-timeout", "pause", "--auto-resume")
    assert CliRunner().invoke(main, ["sandbox", "pause", waking]).exit_code == 0
    assert _exec(waking, "true")[0] == 0, "the data plane wakes it"
    code, _, err = _exec("i" + "0" * 19, "true")
    assert (code, b"see: vmcell sandbox list" in err) == (125, True)


def test_no_door(sandbox_id: str, monkeypatch: pytest.MonkeyPatch, envd: FakeEnvd) -> None:
    envd.token = "another"
    code, _, err = _exec(sandbox_id, "true")
    assert (code, err) == (125, b"Error: unauthorized access\n")
    monkeypatch.setenv("E2B_SANDBOX_URL", "http://127.0.0.1:9")
    code, _, err = _exec(sandbox_id, "true")
    assert code == 125
    assert b"is not reached at http://127.0.0.1:9" in err
    assert b"start the service with `vmcell serve`, or set E2B_SANDBOX_URL" in err
    monkeypatch.setenv("E2B_SANDBOX_URL", "127.0.0.1:3080")
    assert b"E2B_SANDBOX_URL is '127.0.0.1:3080'" in _exec(sandbox_id, "true")[2]


def test_which_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("E2B_SANDBOX_URL", raising=False)
    sandbox = {"sandboxID": "iabc", "state": "running", "domain": None}
    assert door_of(sandbox).url == "http://127.0.0.1:3080"
    assert "X-Access-Token" not in door_of(sandbox).headers
    sandbox["domain"] = "sbx.example.com:8443"
    assert door_of(sandbox).url == "https://49983-iabc.sbx.example.com:8443"
    monkeypatch.setenv("E2B_SANDBOX_URL", "http://here:1/")
    found = door_of({**sandbox, "envdAccessToken": "t"})
    assert found.url == "http://here:1"
    assert found.headers == {
        "E2b-Sandbox-Id": "iabc",
        "E2b-Sandbox-Port": "49983",
        "X-Access-Token": "t",
    }


class _Nowhere:
    def write(self, data: bytes) -> None:
        """Drops it."""

    def flush(self) -> None:
        """Nothing to do."""


def _run_raw(envd: FakeEnvd, stream: bytes) -> int:
    envd.instead = stream
    door = Door(url=envd.url, headers={"E2b-Sandbox-Id": "i", "E2b-Sandbox-Port": "49983"})
    sink = _Nowhere()
    return RunningCommand(door, Command(words=("x",))).run(stdin=None, stdout=sink, stderr=sink)


def _frame(message: object, flags: int = 0) -> bytes:
    payload = json.dumps(message).encode()
    return struct.pack(">BI", flags, len(payload)) + payload


START, END = _frame({"event": {"start": {"pid": 5}}}), _frame({}, 2)


@pytest.mark.parametrize(
    ("stream", "sentence"),
    [
        (b"", "the stream of the command broke off"),
        (START, "the stream of command 5 broke off; it may run on"),
        (START + END[:-1], "broke off"),
        (START + END, "without the command's end"),
        (b"\0\0\0\0\1x", "holds what no envd says"),
        (_frame([]), "holds what no envd says"),
        (_frame({"event": {"start": {}}}), "holds what no envd says"),
        (_frame({"event": {"data": {"stdout": "*"}}}), "holds what no envd says"),
        (_frame({"event": {"end": {"exitCode": "x"}}}), "holds what no envd says"),
        (_frame({"error": {"code": "internal", "message": "oops"}}, 2), "^oops$"),
        (_frame([1], 2), "holds what no envd says"),
        (b"\0\xff\xff\xff\xff", "larger than the limit"),
        (struct.pack(">BI", 0, 200_000) + b"[" * 200_000, "holds what no envd says"),
    ],
)
def test_what_no_envd_says(envd: FakeEnvd, stream: bytes, sentence: str) -> None:
    with pytest.raises((HostError, CallerError), match=sentence):
        _run_raw(envd, stream)


def test_statuses_from_the_wire(envd: FakeEnvd) -> None:
    for end, status in (
        ({"exited": True, "status": "exit status 0"}, 0),
        ({"exitCode": 3}, 3),
        ({"exitCode": -1, "exited": False, "status": "signal: killed"}, 137),
        ({"exitCode": -1, "status": "signal: segmentation fault (core dumped)"}, 139),
        ({"exitCode": -1, "exited": False, "status": "signal: signal 34"}, 162),
        ({"exitCode": -1, "exited": False, "status": "something"}, 255),
    ):
        assert _run_raw(envd, START + _frame({"event": {"end": end}}) + END) == status
    late = _frame({"error": {"code": "deadline_exceeded", "message": "late"}}, 2)
    with pytest.raises(CommandError, match="was ended by the server") as caught:
        _run_raw(envd, START + late)
    assert caught.value.exit_status == 124


@pytest.fixture(scope="module")
def lasting_envd() -> Iterator[FakeEnvd]:
    with fake_envd() as running:
        yield running


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["event", "start", "pid", "data", "stdout", "end", "exitCode", "status"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(st.lists(st.tuples(_json, st.sampled_from([0, 0, 0, 2])), max_size=4), st.binary(max_size=8))
def test_any_stream_ends_in_a_status_or_a_sentence(
    lasting_envd: FakeEnvd, messages: list[tuple[object, int]], rest: bytes
) -> None:
    stream = b"".join(_frame(message, flags) for message, flags in messages) + rest
    try:
        status = _run_raw(lasting_envd, stream)
    except VmcellError:
        return
    assert 0 <= status <= 255


def test_by_a_domain_with_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E2B_DOMAIN and a CA alone; both through the real nginx and the router."""
    port, resolve = free_port(), socket.getaddrinfo

    def loopback(host: str, *rest: Any, **more: Any) -> list[Any]:
        return resolve("127.0.0.1" if host.endswith(f".{DOMAIN}") else host, *rest, **more)

    files, _ = ensure_certificate(tmp_path / "tls", DOMAIN)
    monkeypatch.setattr(socket, "getaddrinfo", loopback)
    for name in ("E2B_API_URL", "E2B_SANDBOX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("E2B_DOMAIN", f"{DOMAIN}:{port}")
    with (
        api_service(tmp_path / "api", domain=f"{DOMAIN}:{port}") as service,
        data_plane(service, ENVD_PORT, tmp_path / "nginx", tls=files, tls_port=port),
        fake_envd(GUEST_ADDRESS, ENVD_PORT) as envd,
    ):
        monkeypatch.setenv("E2B_API_KEY", service.key)
        service.node.address = GUEST_ADDRESS
        words = ["sandbox", "exec", "i" + "0" * 19, "true"]
        strange = CliRunner().invoke(main, words)
        assert strange.exit_code == 125
        assert "CERTIFICATE_VERIFY_FAILED" in strange.stderr
        monkeypatch.setenv("SSL_CERT_FILE", str(files.authority))
        sandbox_id = _create(service, envd)
        done = CliRunner().invoke(
            main, ["sandbox", "exec", sandbox_id, "sh", "-c", "echo a; exit 3"]
        )
        assert (done.exit_code, done.stdout) == (3, "a\n"), done.output
        assert envd.headers[0]["host"] == f"{ENVD_PORT}-{sandbox_id}.{DOMAIN}:{port}"


@pytest.mark.root
@pytest.mark.timeout(300)
def test_on_a_real_envd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through nginx and the router, as a user's shell has it."""
    with envd_service(tmp_path) as running:
        monkeypatch.setenv("E2B_API_URL", running.api_url)
        monkeypatch.setenv("E2B_SANDBOX_URL", running.sandbox_url)
        monkeypatch.setenv("E2B_API_KEY", running.key)
        result = CliRunner().invoke(main, ["sandbox", "create", "-e", "COLOUR=red"])
        sandbox_id = result.stdout.strip()
        script = r"printf 'a\0\377'; echo $COLOUR $0 >&2; id -un; exit 7"
        assert _exec(sandbox_id, "--", "sh", "-c", script) == (7, b"a\0\xffuser\n", b"red sh\n")
        assert _exec("-u", "root", "-w", "/low", sandbox_id, "pwd") == (0, b"/low\n", b"")
        data = os.urandom(3_000_000)
        assert _exec("-i", sandbox_id, "cat", data=data) == (0, data, b"")
        assert _exec("-i", sandbox_id, "true", data=data)[0] == 0
        assert _exec(sandbox_id, "nosuchprogram")[0] == 127
        assert _exec(sandbox_id, "/etc")[0] == 126
        assert _exec("--timeout", "1", sandbox_id, "sleep", "600")[0] == 124
        assert _exec(sandbox_id, "sh", "-c", "kill -9 $$")[0] == 137
        command = [*VMCELL, sandbox_id, "sh", "-c", "echo up; exec sleep 600"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as it:
            assert it.stdout is not None
            assert it.stdout.readline() == b"up\n"
            it.send_signal(signal.SIGINT)
            assert it.wait(PATIENCE_S) == 143
        left = CliRunner().invoke(main, ["sandbox", "kill", sandbox_id])
        assert left.exit_code == 0, left.output
