"""`vmcell volume`: the words and options of volumes."""

from __future__ import annotations

import click

from vmcell_tools.cli_output import json_option, print_json, print_table


@click.group()
def volume() -> None:
    """Volumes of a team, through a running API (E2B_API_URL, E2B_API_KEY)."""


@volume.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """All volumes of the team."""
    from vmcell_tools.volume_client import VolumeClient

    _print(VolumeClient().list(), as_json)


@volume.command()
@click.argument("name")
@json_option
def create(name: str, as_json: bool) -> None:
    """Make an empty volume; its token is printed with --json only."""
    from vmcell_tools.volume_client import VolumeClient

    made = VolumeClient().create(name)
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
    from vmcell_tools.volume_client import VolumeClient

    client = VolumeClient()
    removed = []
    with Progress("vmcell volume rm") as progress:
        for name in names:
            progress.step(f"removing {name}")
            removed.append({"name": name, "volumeID": client.remove(name)})
    _print(removed, as_json)


def _print(rows: list[dict[str, str]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
    else:
        print_table(("name", "id"), [(row["name"], row["volumeID"]) for row in rows])
