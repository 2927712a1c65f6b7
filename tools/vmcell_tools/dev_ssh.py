"""ssh to a dev VM: keys made for each VM, one shared connection, commands as OpenSSH runs them.

The connection is opened once (ControlMaster): a key exchange takes a second of emulated CPU time,
a command over an open connection does not.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.dev_image import GuestKeys

CONTROL_SOCKET = "ssh.sock"
CONNECT_TIMEOUT_S = 60


def make_keys(directory: Path) -> GuestKeys:
    """New key pairs in `directory`; known_hosts holds the server's public half."""
    for name in ("client_key", "client_key.pub", "host_key", "known_hosts"):
        with suppress(FileNotFoundError):
            (directory / name).unlink()
    client_key, host_key = directory / "client_key", directory / "host_key"
    _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vmcell-dev", "-f", str(client_key)])
    shown = _run(["dropbearkey", "-t", "ed25519", "-f", str(host_key)])
    public = next(line for line in shown.splitlines() if line.startswith("ssh-ed25519 "))
    (directory / "known_hosts").write_text(f"* {public}\n")
    return GuestKeys(
        host_key=host_key.read_bytes(),
        authorized_key=client_key.with_suffix(".pub").read_bytes(),
    )


def ssh_command(directory: Path, port: int, *options: str) -> list[str]:
    """`ssh` with everything but the remote command; never reads the user's configuration."""
    settings = {
        "ControlPath": directory / CONTROL_SOCKET,
        "UserKnownHostsFile": directory / "known_hosts",
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "IdentitiesOnly": "yes",
        "BatchMode": "yes",
        "LogLevel": "ERROR",
        "ConnectTimeout": CONNECT_TIMEOUT_S,
        # A dev VM that answers nothing for two minutes is dead, however slow its emulation.
        "ServerAliveInterval": 20,
        "ServerAliveCountMax": 6,
    }
    command = ["ssh", "-F", "none", "-p", str(port), "-i", str(directory / "client_key"), *options]
    for key, value in settings.items():
        command += ["-o", f"{key}={value}"]
    return [*command, "root@127.0.0.1"]


def open_connection(directory: Path, port: int) -> None:
    """Start the shared connection unless it is open; raises HostError when ssh refuses."""
    if connection_is_open(directory):
        return
    with suppress(FileNotFoundError):
        (directory / CONTROL_SOCKET).unlink()
    with (directory / "out" / "ssh.log").open("ab") as log:
        done = subprocess.run(
            ssh_command(directory, port, "-M", "-N", "-f"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            timeout=CONNECT_TIMEOUT_S + 30,
            check=False,
        )
    if done.returncode:
        raise HostError(
            f"ssh to the dev VM on port {port} failed; see {directory}/out/ssh.log and"
            " dropbear.log beside it"
        )


def connection_is_open(directory: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(directory / CONTROL_SOCKET))
        except OSError:
            return False
    return True


def forward_port(directory: Path, guest_port: int) -> int:
    """A port of 127.0.0.1 here that leads to `guest_port` of 127.0.0.1 in the VM, for as long as
    the shared connection, which must be open, lasts. Raises HostError."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    control = ["ssh", "-F", "none", "-o", f"ControlPath={directory / CONTROL_SOCKET}"]
    route = f"127.0.0.1:{port}:127.0.0.1:{guest_port}"
    done = subprocess.run(
        [*control, "-O", "forward", "-L", route, "root@127.0.0.1"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode:
        raise HostError(f"ssh does not forward {route}: {done.stderr.strip()[-400:]}")
    return port


def close_connection(directory: Path) -> None:
    """End the shared connection's ssh process, if there is one."""
    if connection_is_open(directory):
        control = ["ssh", "-F", "none", "-o", f"ControlPath={directory / CONTROL_SOCKET}"]
        subprocess.run(
            [*control, "-O", "exit", "root@127.0.0.1"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
            check=False,
        )


def _run(command: list[str]) -> str:
    package = "openssh-client" if command[0].startswith("ssh") else "dropbear-bin"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError as error:
        raise HostError(f"{command[0]} is missing; apt-get install {package}") from error
    if done.returncode:
        raise HostError(f"{shlex.join(command)} failed: {done.stderr.strip()[-400:]}")
    return done.stdout
