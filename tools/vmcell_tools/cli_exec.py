"""`vmcell sandbox exec`: a command in a sandbox, with its output, input and exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from vmcell_protos.errors import VmcellError
from vmcell_tools.cli_output import name_values

if TYPE_CHECKING:
    from vmcell_tools.guest_command import Command

# What docker uses for its own failures, so that a command's 1 is a command's.
OWN_FAILURE = 125
BROKEN_PIPE = 128 + 13
STDIN = 0
# As many as a deadline of Connect can have milliseconds: ten digits.
MOST_SECONDS = 9_999_999


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-i", "--stdin", "with_stdin", is_flag=True, help="Pass standard input on.")
@click.option(
    "-t", "--tty", "with_terminal", is_flag=True, help="A terminal for it, with this one's keys."
)
@click.option("-u", "--user", default="", help="As whom; default: the template's user.")
@click.option("-w", "--workdir", default="", help="Where; default: the template's, or its home.")
@click.option(
    "-e",
    "--env",
    "environment",
    multiple=True,
    callback=name_values,
    metavar="NAME=VALUE",
    help="May be repeated.",
)
@click.option(
    "--timeout",
    type=click.IntRange(1, MOST_SECONDS),
    help="Seconds after which the command is killed, with status 124.",
)
@click.argument("sandbox_id", metavar="ID")
@click.argument("words", metavar="-- COMMAND...", nargs=-1, type=click.UNPROCESSED)
def execute(
    with_stdin: bool,
    with_terminal: bool,
    user: str,
    workdir: str,
    environment: dict[str, str],
    timeout: int | None,
    sandbox_id: str,
    words: tuple[str, ...],
) -> None:
    """Run COMMAND in sandbox ID; options stand before ID.

    Its output comes as it is written, its exit status is this command's, 128 and more for a
    signal. Ctrl-C ends the command (SIGTERM, then SIGKILL), and only then this one. 124: --timeout
    has passed; 125: vmcell itself failed; 126, 127: COMMAND could not be started, or found.
    """
    from vmcell_tools.guest_command import Command, OutputError

    words = words[1:] if words[:1] == ("--",) else words
    if not words:
        raise click.UsageError("no COMMAND; for example: vmcell sandbox exec ID -- uname -a")
    if words[0].startswith("-"):
        raise click.UsageError(f"{words[0]} stands behind ID; options stand before it")
    if with_terminal and not os.isatty(STDIN):
        raise click.UsageError("-t needs a terminal as standard input; leave it out, or give -i")
    if ":" in user:
        raise click.UsageError(f"{user!r} is no user name")
    command = Command(
        words=words,
        environment=environment,
        directory=workdir,
        user=user,
        timeout_s=timeout,
        with_stdin=with_stdin or with_terminal,
    )
    try:
        status = _run(sandbox_id, command, with_terminal=with_terminal)
    except BrokenPipeError:
        _drop_output()
        status = BROKEN_PIPE
    except OutputError as error:
        _drop_output()
        click.echo(f"Error: {error}", err=True)
        status = OWN_FAILURE
    except VmcellError as error:
        click.echo(f"Error: {error}", err=True)
        status = getattr(error, "exit_status", OWN_FAILURE)
    sys.exit(status)


def _drop_output() -> None:
    """What is still buffered for an output that takes no more would fail once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(sandbox_id: str, command: Command, *, with_terminal: bool) -> int:
    from vmcell_tools.api_client import client_of_environment
    from vmcell_tools.envd_door import door_of
    from vmcell_tools.guest_command import PIECE_BYTES, RunningCommand
    from vmcell_tools.local_terminal import raw_terminal, size_of
    from vmcell_tools.sandbox_client import SandboxClient

    door = door_of(SandboxClient(client_of_environment()).get(sandbox_id))
    if with_terminal:
        variables = {"TERM": os.environ.get("TERM", "xterm"), **command.environment}
        command = replace(command, environment=variables, terminal=size_of(STDIN))
    running = RunningCommand(door, command)
    with (
        _signals(running.terminate, lambda: running.pid != 0),
        raw_terminal(STDIN, running.resize) if with_terminal else contextlib.nullcontext(),
    ):
        return running.run(
            # Not sys.stdin: a thread that waits in its buffer would hold up the exit.
            stdin=(lambda: os.read(STDIN, PIECE_BYTES)) if command.with_stdin else None,
            stdout=sys.stdout.buffer,
            stderr=sys.stderr.buffer,
        )


@contextlib.contextmanager
def _signals(terminate: Callable[[], None], has_begun: Callable[[], bool]) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end the command, whose end is then ours; not under nohup."""
    import signal

    def handle(number: int, frame: object) -> None:
        if not has_begun():
            sys.exit(128 + number)
        terminate()

    before = {
        number: signal.signal(number, handle)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
