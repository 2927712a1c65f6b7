"""The commands of `vmcell sandbox` that lead to other moments of one: history, rollback, fork."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vmcell_protos.errors import HostError
from vmcell_tools.cli_output import json_option, print_json, print_table

if TYPE_CHECKING:
    from vmcell_tools.api_client import Json
    from vmcell_tools.sandbox_client import SandboxClient

MOST_FORKS = 20


@click.command()
@click.argument("sandbox_id", metavar="ID")
@json_option
def history(sandbox_id: str, as_json: bool) -> None:
    """The snapshots of sandbox ID and what rollbacks can be undone with, oldest first."""
    import time

    from vmcell_tools.sandbox_tables import HISTORY_TITLES, history_row

    rows = sandbox_client().history(sandbox_id)
    if as_json:
        print_json(rows)
    else:
        print_table(HISTORY_TITLES, [history_row(row, time.time()) for row in rows])


@click.command()
@click.argument("sandbox_id", metavar="ID")
@click.argument("snapshot")
@json_option
def rollback(sandbox_id: str, snapshot: str, as_json: bool) -> None:
    """Take sandbox ID back to SNAPSHOT, one of its own, by id or name; connections to it end."""
    from vmcell_tools.progress import Progress

    client = sandbox_client()
    with Progress("vmcell sandbox") as progress:
        progress.step(f"taking {sandbox_id} back to {snapshot}")
        answer = client.rollback(sandbox_id, snapshot)
    _show(answer, f"is back at {snapshot}", as_json)


@click.command()
@click.argument("sandbox_id", metavar="ID")
@json_option
def undo(sandbox_id: str, as_json: bool) -> None:
    """Take back the last rollback of sandbox ID, or the last undo."""
    from vmcell_tools.progress import Progress

    client = sandbox_client()
    with Progress("vmcell sandbox") as progress:
        progress.step(f"undoing the last rollback of {sandbox_id}")
        answer = client.undo(sandbox_id)
    _show(answer, "is as it was before", as_json)


@click.command()
@click.argument("sandbox_id", metavar="ID")
@click.option("--count", type=click.IntRange(1, MOST_FORKS), default=1, show_default=True)
@click.option(
    "--timeout",
    type=click.IntRange(1),
    default=300,
    show_default=True,
    help="Seconds until each copy's end.",
)
@json_option
def fork(sandbox_id: str, count: int, timeout: int, as_json: bool) -> None:
    """Copy sandbox ID, which goes on, and print the ids of the copies."""
    from vmcell_tools.progress import Progress

    client = sandbox_client()
    with Progress("vmcell sandbox") as progress:
        progress.step(f"copying {sandbox_id}, {count} times")
        rows = client.fork(sandbox_id, count=count, timeout_s=timeout)
    if as_json:
        print_json(rows)
    failed = []
    for row in rows:
        if "sandbox" in row:
            if not as_json:
                click.echo(row["sandbox"]["sandboxID"])
        else:
            failed.append(str((row.get("error") or {}).get("message", "no reason was given")))
    if failed:
        reasons = "; ".join(dict.fromkeys(failed))
        raise HostError(f"{len(failed)} of {count} copies were not made: {reasons}")


def _show(answer: Json, words: str, as_json: bool) -> None:
    from vmcell_tools.sandbox_tables import moment

    if as_json:
        print_json(answer)
        return
    sandbox_id, until = answer["sandboxID"], answer["undo"].get("expiresAt")
    click.echo(
        f"{sandbox_id} {words}; until {moment(until)} this is undone by: "
        f"vmcell sandbox undo {sandbox_id}"
    )


def sandbox_client() -> SandboxClient:
    """The client of all commands of the group."""
    from vmcell_tools.api_client import client_of_environment
    from vmcell_tools.sandbox_client import SandboxClient

    return SandboxClient(client_of_environment())
