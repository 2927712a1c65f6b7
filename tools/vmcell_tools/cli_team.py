"""`vmcell team` and `vmcell migrate`: tenants, their limits, and the store's version."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from vmcell_tools.cli_output import json_option, print_json, print_table

if TYPE_CHECKING:
    from vmcell_api.store.records import Team

SERVICE_DEFAULT = "default"


class LimitType(click.ParamType):
    """A whole number, or `default` for the service's own limit."""

    name = "N|default"

    def convert(self, value: object, param: object, ctx: object) -> object:
        """A number, or the word itself."""
        if value == SERVICE_DEFAULT or isinstance(value, int):
            return value
        if not str(value).isascii() or not str(value).isdigit() or len(str(value)) > 9:
            self.fail(f"{value!r} is neither a whole number nor `default`")
        return int(str(value))


def limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """The three limits, on a command."""
    for option in (
        click.option("--requests", type=LimitType(), help="Requests a second."),
        click.option("--timeout", type=LimitType(), help="Longest life of a sandbox, seconds."),
        click.option("--sandboxes", type=click.IntRange(0), help="Sandboxes at once."),
    ):
        command = option(command)
    return command


def _limits(sandboxes: int | None, timeout: object, requests: object) -> dict[str, int | None]:
    limits: dict[str, int | None] = {}
    if sandboxes is not None:
        limits["sandbox_limit"] = sandboxes
    for name, value in (("max_timeout_s", timeout), ("requests_per_s", requests)):
        if value is not None:
            limits[name] = value if isinstance(value, int) else None
    return limits


@click.group()
def team() -> None:
    """Tenants: each sees its own sandboxes, templates and volumes only."""


@team.command()
@click.argument("name")
@limit_options
@json_option
def create(
    name: str, sandboxes: int | None, timeout: object, requests: object, as_json: bool
) -> None:
    """Make a team called NAME; the service's limits hold where none is given."""
    from vmcell_api.store.teams import Teams
    from vmcell_tools.operator_desk import open_desk

    with open_desk() as desk, desk.audited("team create", target=name) as trail:
        made = Teams(desk.store.engine).create(name, _limits(sandboxes, timeout, requests))
        trail.team_id = made.team_id
    _show(made, as_json)


@team.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """All teams, their limits, and what they have."""
    from vmcell_api.operator_resources import team_json
    from vmcell_api.store.teams import Teams
    from vmcell_tools.operator_desk import open_desk

    with open_desk() as desk:
        found = Teams(desk.store.engine).list()
    if as_json:
        print_json(
            [
                {**team_json(row.team), "keys": row.key_count, "sandboxes": row.sandbox_count}
                for row in found
            ]
        )
        return
    titles = ("team", "sandboxes", "at most", "timeout s", "requests/s", "keys", "id")
    rows = [
        (
            row.team.name,
            str(row.sandbox_count),
            str(row.team.sandbox_limit),
            _word(row.team.max_timeout_s),
            _word(row.team.requests_per_s),
            str(row.key_count),
            row.team.team_id,
        )
        for row in found
    ]
    print_table(titles, rows)


@team.command()
@click.argument("name")
@limit_options
@json_option
def limits(
    name: str, sandboxes: int | None, timeout: object, requests: object, as_json: bool
) -> None:
    """Show the limits of team NAME, after changing those given; they hold at once."""
    from vmcell_api.store.teams import Teams
    from vmcell_tools.operator_desk import open_desk

    wanted = _limits(sandboxes, timeout, requests)
    with open_desk() as desk:
        teams = Teams(desk.store.engine)
        found = teams.find(name)
        if wanted:
            with desk.audited("team limits", target=found.name, team_id=found.team_id):
                found = teams.change_limits(found.team_id, wanted)
    _show(found, as_json)


@team.command()
@click.argument("name")
@click.option("--kill", is_flag=True, help="Kill its running sandboxes first.")
def rm(name: str, kill: bool) -> None:
    """Delete team NAME with its keys. A team with running sandboxes is kept without --kill."""
    from vmcell_api.node_client import NodeClient
    from vmcell_api.store.teams import Teams
    from vmcell_api.tenancy import remove_team
    from vmcell_tools.operator_desk import open_desk

    with open_desk() as desk:
        found = Teams(desk.store.engine).find(name)
        node = NodeClient(desk.config.node_socket, create_timeout_s=30.0)
        try:
            with desk.audited("team rm", target=found.name, team_id=found.team_id):
                remove_team(desk.store, node, found, kill=kill)
        finally:
            node.close()
    click.echo(f"team {found.name} is gone, with its keys")


@click.command()
def migrate() -> None:
    """Bring the store of teams, keys and sandboxes to this version; the service does it too."""
    from vmcell_api.store.tables import SCHEMA_VERSION
    from vmcell_tools.operator_desk import open_desk

    with open_desk():
        click.echo(f"the store has version {SCHEMA_VERSION}")


def _show(found: Team, as_json: bool) -> None:
    from vmcell_api.operator_resources import team_json

    if as_json:
        print_json(team_json(found))
        return
    row = (
        found.name,
        str(found.sandbox_limit),
        _word(found.max_timeout_s),
        _word(found.requests_per_s),
        found.team_id,
    )
    print_table(("team", "sandboxes at most", "timeout s", "requests/s", "id"), [row])


def _word(limit: int | None) -> str:
    return SERVICE_DEFAULT if limit is None else str(limit)
