"""`vmcell dev run`: one command in the dev VM, as if it were run here.

Standard streams, the terminal, the working directory and the exit status pass through. The command
is the leader of a session of its own in the VM, so that a deadline or an interrupt ends all of it.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools import dev_ssh, dev_sync
from vmcell_tools.dev_config import vm_configuration
from vmcell_tools.dev_state import DevVm
from vmcell_tools.dev_vm import running_vm
from vmcell_tools.progress import Progress

TIMEOUT_STATUS = 124
SSH_FAILED_STATUS = 255
VM_END_WAIT_S = 3.0
PID_DIRECTORY = "/run/vmcell-dev"
PATH_IN_VM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KEPT_VARIABLES = ("XDG_CACHE_HOME", "VMCELL_CONFIG", "TERM")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to run; `terminal` None means: when standard input and output here are terminals."""

    words: Sequence[str]
    terminal: bool | None = None
    timeout_s: float | None = None
    directory: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def run(name: str, command: Command) -> int:
    """The command's exit status; 124 when its deadline passed, after ending it.

    Raises CallerError for no command, HostError when the VM is not up or ends meanwhile.
    """
    if not command.words:
        raise CallerError("vmcell dev run needs a command: vmcell dev run -- uname -a")
    vm = running_vm(name)
    dev_ssh.open_connection(vm.directory, vm.ssh_port)
    dev_sync.push_changes(vm, vm_configuration(Progress("vmcell dev", quiet=True)))
    terminal = command.terminal
    if terminal is None:
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
    token = secrets.token_hex(8)
    remote = remote_line(command, token=token, terminal=terminal)
    ssh = dev_ssh.ssh_command(vm.directory, vm.ssh_port, "-tt" if terminal else "-T")
    process = subprocess.Popen([*ssh, remote])
    try:
        status = process.wait(command.timeout_s)
    except subprocess.TimeoutExpired:
        _end_remote(vm, token)
        _end_local(process)
        sys.stderr.write(f"vmcell dev run: ended after {command.timeout_s:g} s\n")
        return TIMEOUT_STATUS
    except KeyboardInterrupt:
        _end_remote(vm, token)
        _end_local(process)
        return 128 + signal.SIGINT
    if status == SSH_FAILED_STATUS and not dev_ssh.connection_is_open(vm.directory):
        _name_what_broke(vm)
    return status


def _name_what_broke(vm: DevVm) -> NoReturn:
    """The VM's end when it ends within moments of its connection, else the connection's."""
    deadline = time.monotonic() + VM_END_WAIT_S
    while vm.qemu.alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    running_vm(vm.name)
    raise HostError(f"the ssh connection to dev VM {vm.name!r} broke; run the command again")


def remote_line(command: Command, *, token: str, terminal: bool) -> str:
    """The line for the VM's shell; its pid, which the command keeps, is in a file named by token.

    On a terminal ssh has made the session; without one, setsid makes it.
    """
    directory = command.directory or os.getcwd()
    variables = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    variables |= {
        "PATH": PATH_IN_VM,
        "HOME": os.path.expanduser("~root"),
        "LANG": "C.UTF-8",
        **command.environment,
    }
    exports = shlex.join(f"{name}={value}" for name, value in variables.items())
    pid_file = f"{PID_DIRECTORY}/run-{token}"
    start = (
        f"echo $$ >{pid_file}; trap 'rm -f {pid_file}' EXIT; export {exports};"
        f" cd {shlex.quote(directory)} 2>/dev/null || cd /; {shlex.join(command.words)}"
    )
    return start if terminal else f"exec setsid -w sh -c {shlex.quote(start)}"


def _end_remote(vm: DevVm, token: str) -> None:
    """SIGTERM to the command's process group, SIGKILL two seconds later."""
    script = (
        f"read -r pid <{PID_DIRECTORY}/run-{token} || exit 0;"
        " kill -s TERM -- -$pid; n=0;"
        " while kill -s 0 -- -$pid && [ $n -lt 20 ]; do sleep 0.1; n=$((n + 1)); done;"
        " kill -s KILL -- -$pid"
    )
    subprocess.run(
        [*dev_ssh.ssh_command(vm.directory, vm.ssh_port, "-T"), f"{{ {script}; }} 2>/dev/null"],
        stdin=subprocess.DEVNULL,
        timeout=30,
        check=False,
    )


def _end_local(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(3)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(10)
