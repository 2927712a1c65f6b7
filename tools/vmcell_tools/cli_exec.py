"""`vmcell sandbox exec`: a command in a sandbox, with its output, input and exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import click

from vmcell_protos.errors import VmcellError
from vmcell_tools.cli_output import name_values

# What docker uses for its own failures, so that a command's 1 is a command's.
OWN_FAILURE = 125
BROKEN_PIPE = 128 + 13


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-i", "--stdin", "with_stdin", is_flag=True, help="Pass standard input on.")
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
    type=click.FloatRange(0, min_open=True),
    help="Seconds after which the command is killed, with status 124.",
)
@click.argument("sandbox_id", metavar="ID")
@click.argument("words", metavar="-- COMMAND...", nargs=-1, type=click.UNPROCESSED)
def execute(
    with_stdin: bool,
    user: str,
    workdir: str,
    environment: dict[str, str],
    timeout: float | None,
    sandbox_id: str,
    words: tuple[str, ...],
) -> None:
    """Run COMMAND in sandbox ID; options stand before ID.

    Its output comes as it is written, its exit status is this command's, 128 and more for a
    signal. Ctrl-C ends the command (SIGTERM, then SIGKILL), and only then this one. 124: --timeout
    has passed; 125: vmcell itself failed; 126, 127: COMMAND could not be started, or found.
    """
    words = words[1:] if words[:1] == ("--",) else words
    if not words:
        raise click.UsageError("no COMMAND; for example: vmcell sandbox exec ID -- uname -a")
    if words[0].startswith("-"):
        raise click.UsageError(f"{words[0]} stands behind ID; options stand before it")
    try:
        status = _run(sandbox_id, words, with_stdin, user, workdir, environment, timeout)
    except BrokenPipeError:
        # Whoever read this has gone; nothing is left that could be written to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except VmcellError as error:
        click.echo(f"Error: {error}", err=True)
        status = getattr(error, "exit_status", OWN_FAILURE)
    sys.exit(status)


def _run(
    sandbox_id: str,
    words: tuple[str, ...],
    with_stdin: bool,
    user: str,
    workdir: str,
    environment: dict[str, str],
    timeout: float | None,
) -> int:
    from vmcell_tools.api_client import client_of_environment
    from vmcell_tools.envd_door import door_of
    from vmcell_tools.guest_command import PIECE_BYTES, Command, RunningCommand
    from vmcell_tools.sandbox_client import SandboxClient

    command = Command(
        words=words,
        environment=environment,
        directory=workdir,
        user=user,
        timeout_s=timeout,
        with_stdin=with_stdin,
    )
    door = door_of(SandboxClient(client_of_environment()).get(sandbox_id))
    running = RunningCommand(door, command)
    with _signals(running.terminate, lambda: running.pid != 0):
        return running.run(
            # Not sys.stdin: a thread that waits in its buffer would hold up the exit.
            stdin=(lambda: os.read(0, PIECE_BYTES)) if with_stdin else None,
            stdout=sys.stdout.buffer,
            stderr=sys.stderr.buffer,
        )


@contextlib.contextmanager
def _signals(terminate: Callable[[], None], has_begun: Callable[[], bool]) -> Iterator[None]:
    """SIGINT and SIGTERM end the command, whose end is then ours."""
    import signal

    def handle(number: int, frame: object) -> None:
        if not has_begun():
            sys.exit(128 + number)
        terminate()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
