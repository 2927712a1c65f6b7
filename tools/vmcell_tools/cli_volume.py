"""`vmcell volume`: the words and options of volumes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vmcell_tools.cli_output import TextGroup, cell, json_option, print_json, print_table

if TYPE_CHECKING:
    from vmcell_tools.api_client import Json
    from vmcell_tools.volume_client import VolumeClient


@click.group(cls=TextGroup)
def volume() -> None:
    """Volumes of a team, through a running API (E2B_API_URL, E2B_API_KEY)."""


@volume.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """All volumes of the team."""
    _print(_client().list(), as_json)


@volume.command()
@click.argument("name")
@json_option
def create(name: str, as_json: bool) -> None:
    """Make an empty volume; its token is printed with --json only."""
    made = _client().create(name)
    if as_json:
        print_json(made)
    else:
        _print([made], as_json)


@volume.command("rm")
@click.argument("names", nargs=-1, required=True)
@json_option
def remove(names: tuple[str, ...], as_json: bool) -> None:
    """Remove volumes, by name or id, with all their files."""
    from vmcell_tools.progress import Progress

    client = _client()
    removed = []
    with Progress("vmcell volume rm") as progress:
        for name in names:
            progress.step(f"removing {name}")
            removed.append({"name": name, "volumeID": client.remove(name)})
    _print(removed, as_json)


def _client() -> VolumeClient:
    from vmcell_tools.api_client import client_of_environment
    from vmcell_tools.volume_client import VolumeClient

    return VolumeClient(client_of_environment())


def _print(rows: list[Json], as_json: bool) -> None:
    if as_json:
        print_json(rows)
    else:
        print_table(("name", "id"), [(cell(row["name"]), cell(row["volumeID"])) for row in rows])
