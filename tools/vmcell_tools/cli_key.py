"""`vmcell key`: API keys. A key is printed once, alone on standard output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vmcell_tools.cli_output import json_option, print_json, print_table

if TYPE_CHECKING:
    from vmcell_api.store.api_keys import ApiKey

STATE_MARKS = {
    "active": "[green]active[/green]",
    "expired": "[yellow]expired[/yellow]",
    "revoked": "[red]revoked[/red]",
}


@click.group()
def key() -> None:
    """API keys: who may call the service, for which team, with which scopes.

    A scope is RESOURCE:read, RESOURCE:write or RESOURCE:* (sandboxes, templates, volumes, secrets,
    team), `*` for all of these, or `admin` for the operators' routes too.
    """


@key.command()
@click.option("--team", "team_name", required=True, help="Made if there is none of that name.")
@click.option("--scope", "scopes", multiple=True, default=("*",), help="May be repeated; default *")
@click.option("--name", default="", help="What the key is for, to know it by.")
@click.option("--expires", help="Valid for so long: 45s, 15m, 12h, 30d.  [default: for ever]")
@json_option
def create(
    team_name: str, scopes: tuple[str, ...], name: str, expires: str | None, as_json: bool
) -> None:
    """Make a key and print it: this once, because the store keeps only its hash."""
    from vmcell_api.scopes import parse_scopes
    from vmcell_api.store.teams import check_team_name
    from vmcell_api.tenancy import create_key, parse_duration_s
    from vmcell_tools.operator_desk import open_desk

    check_team_name(team_name)
    parse_scopes(scopes)
    life_s = None if expires is None else parse_duration_s(expires)
    with open_desk() as desk, desk.audited("key create") as trail:
        team = desk.store.ensure_team(team_name)
        trail.team_id = team.team_id
        secret, record = create_key(desk.store, team, scopes=scopes, name=name, life_s=life_s)
        trail.target = record.key_id
    _show_new(secret, record, as_json)


@key.command("list")
@click.option("--team", "team_name", help="Only this team's.")
@json_option
def list_command(team_name: str | None, as_json: bool) -> None:
    """The keys, by team, without the keys: the beginning of each is shown."""
    from vmcell_api.operator_resources import key_json
    from vmcell_api.store.api_keys import ApiKeys
    from vmcell_api.store.records import now_ms
    from vmcell_api.store.teams import Teams
    from vmcell_tools.operator_desk import open_desk

    with open_desk() as desk:
        engine = desk.store.engine
        team_id = Teams(engine).find(team_name).team_id if team_name else None
        found = ApiKeys(engine).list(team_id)
    if as_json:
        print_json([{**key_json(row), "team": row.team.name} for row in found])
        return
    moment = now_ms()
    titles = ("key", "team", "name", "begins", "scopes", "state", "made", "last used", "ends")
    rows = [
        (
            row.key_id,
            row.team.name,
            _escaped(row.name),
            row.prefix or "not known",
            " ".join(row.scopes),
            STATE_MARKS[row.state(moment)],
            local_time(row.created_at_unix_ms),
            local_time(row.last_used_at_unix_ms),
            local_time(row.expires_at_unix_ms),
        )
        for row in found
    ]
    print_table(titles, rows)


@key.command()
@click.argument("key_id")
@click.option("--grace", default="24h", show_default=True, help="How long the old one stays valid.")
@json_option
def rotate(key_id: str, grace: str, as_json: bool) -> None:
    """Make a key in place of KEY_ID, with the same team, scopes and end; print it."""
    from vmcell_api.tenancy import parse_duration_s, rotate_key
    from vmcell_tools.operator_desk import open_desk

    grace_s = parse_duration_s(grace)
    with open_desk() as desk, desk.audited("key rotate", target=key_id) as trail:
        secret, record = rotate_key(desk.store, key_id, grace_s=grace_s)
        trail.target, trail.team_id = f"{key_id} {record.key_id}", record.team.team_id
    if not as_json:
        click.echo(f"key {key_id} stays valid for {grace}", err=True)
    _show_new(secret, record, as_json)


@key.command()
@click.argument("key_id")
def revoke(key_id: str) -> None:
    """End KEY_ID: no request that comes after this is let in by it."""
    from vmcell_api.store.api_keys import ApiKeys
    from vmcell_tools.operator_desk import open_desk

    with open_desk() as desk, desk.audited("key revoke", target=key_id) as trail:
        trail.team_id = ApiKeys(desk.store.engine).revoke(key_id).team.team_id
    click.echo(f"key {key_id} is revoked")


def _show_new(secret: str, record: ApiKey, as_json: bool) -> None:
    from vmcell_api.operator_resources import key_json

    if as_json:
        print_json({**key_json(record), "key": secret})
        return
    scopes = " ".join(record.scopes)
    click.echo(f"key {record.key_id} of team {record.team.name} ({scopes}), shown once:", err=True)
    click.echo(secret)


def local_time(unix_ms: int | None) -> str:
    """The minute, in this host's time; "never" for None."""
    import time

    if unix_ms is None:
        return "never"
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_ms / 1000))


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
