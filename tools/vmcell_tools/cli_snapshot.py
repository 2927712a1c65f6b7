"""`vmcell snapshot`: the words and options of snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vmcell_tools.cli_output import TextGroup, cell, json_option, print_json, print_table

if TYPE_CHECKING:
    from vmcell_tools.api_client import Json
    from vmcell_tools.snapshot_client import SnapshotClient


@click.group(cls=TextGroup)
def snapshot() -> None:
    """Snapshots of sandboxes, through a running API (E2B_API_URL, E2B_API_KEY).

    `vmcell sandbox create` makes sandboxes of them; `vmcell sandbox history ID` has their sizes.
    """


@snapshot.command("list")
@click.option("--sandbox", "sandbox_id", default="", metavar="ID", help="Only this sandbox's.")
@click.option("--name", default="", help="Only those of this name.")
@json_option
def list_command(sandbox_id: str, name: str, as_json: bool) -> None:
    """The team's snapshots, newest first."""
    _print(_client().find(sandbox_id=sandbox_id, name=name), as_json)


@snapshot.command()
@click.argument("sandbox_id", metavar="SANDBOX")
@click.option("--name", default="", help="NAME or NAME:TAG, to use it by instead of its id.")
@json_option
def create(sandbox_id: str, name: str, as_json: bool) -> None:
    """Save SANDBOX, memory and files, while it goes on; print the snapshot's id."""
    from vmcell_tools.progress import Progress

    client = _client()
    with Progress("vmcell snapshot") as progress:
        progress.step(f"saving {sandbox_id}")
        made = client.create(sandbox_id, name)
    if as_json:
        print_json(made)
    else:
        click.echo(made["snapshotID"])


@snapshot.command()
@click.argument("snapshots", metavar="SNAPSHOT...", nargs=-1, required=True)
@json_option
def delete(snapshots: tuple[str, ...], as_json: bool) -> None:
    """Delete snapshots, by id or name; sandboxes made of them go on."""
    from vmcell_tools.progress import Progress

    client = _client()
    deleted = []
    with Progress("vmcell snapshot") as progress:
        for text in snapshots:
            progress.step(f"deleting {text}")
            deleted.append(client.delete(text))
    if as_json:
        print_json({"deleted": deleted})
    else:
        click.echo(f"deleted {', '.join(deleted)}")


@snapshot.command()
@click.argument("older")
@click.argument("newer")
@click.option(
    "--sandbox", "sandbox_id", default="", metavar="ID", help="Whose; looked for if not given."
)
@click.option(
    "--files", "by_file", is_flag=True, help="Which files: both are restored for a moment."
)
@json_option
def diff(older: str, newer: str, sandbox_id: str, by_file: bool, as_json: bool) -> None:
    """What differs between two snapshots of one sandbox, OLDER and NEWER, by id or name."""
    from vmcell_tools.progress import Progress

    client = _client()
    with Progress("vmcell snapshot") as progress:
        progress.step(f"comparing {older} and {newer}")
        found = client.difference(older, newer, sandbox_id=sandbox_id, by_file=by_file)
    if as_json:
        print_json(found)
    else:
        _print_difference(found)


def _print_difference(found: Json) -> None:
    from vmcell_tools.sandbox_tables import file_change_rows, mib

    rows = [(cell(name), "[yellow]changed[/]") for name in found["changed"]]
    rows += [(cell(name), "the same") for name in found["unchanged"]]
    print_table(("part", ""), rows)
    older, newer = mib(found["allocatedBytesOlder"]), mib(found["allocatedBytesNewer"])
    click.echo(f"on disk: {older}, then {newer}")
    if "files" not in found:
        click.echo("which files differ: --files")
    elif found["files"]:
        print_table(("change", "bytes", "then", "file"), file_change_rows(found["files"]))
    else:
        click.echo("no file differs")


def _print(rows: list[Json], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    table = [(cell(row["snapshotID"]), cell(", ".join(map(str, row["names"])))) for row in rows]
    print_table(("id", "name"), table)


def _client() -> SnapshotClient:
    from vmcell_tools.api_client import client_of_environment
    from vmcell_tools.snapshot_client import SnapshotClient

    return SnapshotClient(client_of_environment())
