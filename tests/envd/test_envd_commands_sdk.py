"""Commands and terminals through the unmodified Python SDK."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2b import CommandExitException, NotFoundException, PtySize, Sandbox, TimeoutException
from e2b.exceptions import AuthenticationException, InvalidArgumentException, SandboxException
from envd_harness import Envd, wait_until

pytestmark = pytest.mark.root


def test_output_streams_while_the_command_runs(sandbox: Sandbox) -> None:
    seen: list[tuple[str, float]] = []
    gate = "/tmp/stream-gate"

    def on_stdout(line: str) -> None:
        seen.append((line, time.monotonic()))
        if line == "first\n":
            # The command goes on only because its first line arrived before its end.
            sandbox.files.write(gate, "")

    result = sandbox.commands.run(
        f"echo first; until [ -e {gate} ]; do sleep 0.02; done; echo second; echo wrong >&2",
        on_stdout=on_stdout,
        on_stderr=lambda line: seen.append((line, time.monotonic())),
    )
    assert [line for line, _ in seen][:2] == ["first\n", "second\n"]
    assert (result.stdout, result.stderr, result.exit_code) == ("first\nsecond\n", "wrong\n", 0)


@pytest.mark.parametrize("code", [1, 7, 255])
def test_a_non_zero_exit_is_the_sdk_exception(sandbox: Sandbox, code: int) -> None:
    with pytest.raises(CommandExitException) as caught:
        sandbox.commands.run(f"echo out; echo err >&2; exit {code}")
    assert caught.value.exit_code == code
    assert (caught.value.stdout, caught.value.stderr) == ("out\n", "err\n")
    assert caught.value.error == f"exit status {code}"


def test_a_signalled_command(sandbox: Sandbox) -> None:
    with pytest.raises(CommandExitException) as caught:
        sandbox.commands.run("kill -SEGV $$")
    assert caught.value.exit_code == -1
    assert str(caught.value.error).startswith("signal: segmentation fault")


def test_bytes_arrive_whole(sandbox: Sandbox) -> None:
    result = sandbox.commands.run("head -c 3000000 /dev/zero | tr '\\0' x; printf '\\303\\251'")
    assert result.stdout == "x" * 3_000_000 + "\u00e9"


def test_timeout_kills_the_command(sandbox: Sandbox, envd: Envd) -> None:
    with pytest.raises(TimeoutException):
        sandbox.commands.run("exec sleep 1234.5", timeout=0.5)
    wait_until(lambda: not sandbox.commands.list(), "the command's end")
    wait_until(lambda: not envd.children(), "the child's end")


def test_background_connect_and_kill(sandbox: Sandbox) -> None:
    handle = sandbox.commands.run(
        "for i in $(seq 1000); do echo tick; sleep 0.05; done", background=True, timeout=0
    )
    listed = sandbox.commands.list()
    assert [info.pid for info in listed] == [handle.pid]
    assert listed[0].cmd == "/bin/bash"
    assert listed[0].args[:2] == ["-l", "-c"]

    again = sandbox.commands.connect(handle.pid, timeout=0)
    lines: list[str] = []

    def on_stdout(text: str) -> None:
        lines.append(text)
        if len(lines) == 3:
            assert handle.kill()

    with pytest.raises(CommandExitException) as caught:
        again.wait(on_stdout=on_stdout)
    assert caught.value.error == "signal: killed"
    assert len(lines) >= 3
    assert sandbox.commands.list() == []
    assert sandbox.commands.kill(handle.pid) is False


def test_a_command_outlives_its_client(sandbox: Sandbox) -> None:
    flag = "/tmp/outlives"
    handle = sandbox.commands.run(
        f"echo x; sleep 0.3; yes | head -c 500000; touch {flag}", background=True
    )
    handle.disconnect()
    wait_until(lambda: sandbox.files.exists(flag), "the command's work without a client")


def test_the_end_is_remembered_for_late_clients(sandbox: Sandbox) -> None:
    handle = sandbox.commands.run("exit 3", background=True)
    wait_until(lambda: not sandbox.commands.list(), "the command's end")
    with pytest.raises(CommandExitException) as caught:
        sandbox.commands.connect(handle.pid).wait()
    assert caught.value.exit_code == 3
    with pytest.raises(NotFoundException, match="process with pid 999999 not found"):
        sandbox.commands.connect(999_999).wait()


def test_stdin_and_its_end(sandbox: Sandbox) -> None:
    handle = sandbox.commands.run("cat", background=True, stdin=True)
    handle.send_stdin("one\n")
    handle.send_stdin(b"\xc3\xa9" * 200_000)
    sandbox.commands.close_stdin(handle.pid)
    result = handle.wait()
    assert result.stdout == "one\n" + "\u00e9" * 200_000


def test_no_stdin_by_default(sandbox: Sandbox) -> None:
    assert sandbox.commands.run("cat; echo done").stdout == "done\n"
    handle = sandbox.commands.run("sleep 30", background=True)
    with pytest.raises(SandboxException, match="error writing to stdin"):
        sandbox.commands.send_stdin(handle.pid, "x")
    assert handle.kill()


def test_input_streams(sandbox: Sandbox) -> None:
    handle = sandbox.commands.run("sha256sum", background=True, stdin=True)
    chunks = [bytes([n % 256]) * 70_000 for n in range(40)]
    sandbox.commands.stream_input(handle.pid, chunks)
    sandbox.commands.close_stdin(handle.pid)
    assert handle.wait().stdout.split()[0] == hashlib.sha256(b"".join(chunks)).hexdigest()
    with pytest.raises(NotFoundException):
        sandbox.commands.stream_input(999_999, ["x"])


def test_terminal(sandbox: Sandbox) -> None:
    output = bytearray()
    handle = sandbox.pty.create(PtySize(rows=30, cols=90), timeout=20, envs={"PS1": "ready>"})
    reader = threading.Thread(
        target=lambda: handle.wait(on_pty=output.extend), name="pty", daemon=True
    )
    reader.start()
    sandbox.pty.send_stdin(handle.pid, b"stty size; tty; id -un\n")
    wait_until(lambda: b"30 90" in output, "the terminal's size")
    wait_until(lambda: b"/dev/pts/" in output and b"user" in output, "the terminal's name")
    sandbox.pty.resize(handle.pid, PtySize(rows=41, cols=121))
    sandbox.pty.send_stdin(handle.pid, b"stty size\n")
    wait_until(lambda: b"41 121" in output, "the terminal's new size")
    with pytest.raises(SandboxException, match="pty input only"):
        sandbox.commands.send_stdin(handle.pid, "x")
    sandbox.pty.stream_input(handle.pid, [b"ex", b"it 0\n"])
    reader.join(20)
    assert not reader.is_alive()


def test_a_killed_terminal_ends_its_stream(sandbox: Sandbox) -> None:
    handle = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=20)
    assert sandbox.pty.kill(handle.pid)
    with pytest.raises(CommandExitException):
        handle.wait()
    assert sandbox.pty.kill(handle.pid) is False


def test_users(sandbox: Sandbox) -> None:
    default = sandbox.commands.run("id; echo $HOME $USER $LOGNAME; pwd").stdout
    assert default.splitlines() == [
        "uid=1000(user) gid=1000(user) groups=1000(user),50(staff)",
        "/home/user user user",
        "/home/user",
    ]
    root = sandbox.commands.run("id -u; echo $HOME; pwd", user="root").stdout
    assert root.split() == ["0", "/root", "/root"]
    with pytest.raises(AuthenticationException, match="invalid username: 'root123'"):
        sandbox.commands.run("true", user="root123")
    # Its home does not exist, and other people's files are not its own.
    nobody = sandbox.commands.run("id -un; id -G; pwd", user="nobody")
    assert nobody.stdout.split() == ["nobody", "65534", "/"]
    with pytest.raises(CommandExitException, match="Permission denied"):
        sandbox.commands.run("touch /home/user/x", user="nobody")


def test_environment_order_and_directory(sandbox: Sandbox) -> None:
    result = sandbox.commands.run(
        "echo $IMAGE_VARIABLE $E2B_SANDBOX $MINE; pwd",
        envs={"MINE": "own", "E2B_SANDBOX": "over"},
        cwd="/usr/share",
    )
    assert result.stdout.splitlines() == ["from the image over own", "/usr/share"]
    assert sandbox.commands.run("echo -$MINE-").stdout == "--\n"
    assert sandbox.commands.run("mkdir -p rel; cd rel; pwd").stdout == "/home/user/rel\n"
    assert sandbox.commands.run("pwd", cwd="rel").stdout == "/home/user/rel\n"
    with pytest.raises(InvalidArgumentException, match="cwd '/no/where' does not exist"):
        sandbox.commands.run("true", cwd="/no/where")


def test_twenty_at_once(sandbox: Sandbox) -> None:
    def run(number: int) -> str:
        return str(sandbox.commands.run(f"sleep 0.2; seq {number} {number + 2000}").stdout)

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(run, range(20)))
    for number, text in enumerate(results):
        assert text == "".join(f"{n}\n" for n in range(number, number + 2001))


def test_a_terminal_ends_with_its_shell_whoever_is_left_on_it(sandbox: Sandbox) -> None:
    """Closing it hangs up on the others, as leaving an ssh session does."""
    out: list[bytes] = []
    handle = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=15)
    sandbox.pty.send_stdin(
        handle.pid, b"stty -echo; (trap '' HUP; sleep 1000) & printf 'l%s\\n' ast; exit 3\n"
    )
    with pytest.raises(CommandExitException) as caught:
        handle.wait(on_pty=out.append)
    assert caught.value.exit_code == 3
    assert b"last\r\n" in b"".join(out)
