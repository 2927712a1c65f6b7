"""`vmcell audit`: who did what, when, with which result."""

from __future__ import annotations

import click

from vmcell_tools.cli_output import json_option, print_json, print_table


@click.command()
@click.option("--team", "team_name", help="Only this team's.")
@click.option("--actor", default="", help="`key <id>` or `operator <user>`.")
@click.option("--action", default="", help="A part of it, like `DELETE` or `key create`.")
@click.option("--target", default="", help="An id.")
@click.option("--failed", is_flag=True, help="Only what was refused or failed.")
@click.option("--since", default="", help="Not older than: 15m, 12h, 30d.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def audit(
    team_name: str | None,
    actor: str,
    action: str,
    target: str,
    failed: bool,
    since: str,
    limit: int,
    as_json: bool,
) -> None:
    """What keys and operators changed, and what they were refused; newest first.

    Reading is not kept. Entries go when they are older than audit_days or more than audit_rows.
    """
    from vmcell_api.operator_resources import audit_json
    from vmcell_api.store.audit import AuditQuery
    from vmcell_api.store.records import now_ms
    from vmcell_api.store.teams import Teams
    from vmcell_api.tenancy import parse_duration_s
    from vmcell_tools.operator_desk import open_desk

    since_ms = now_ms() - parse_duration_s(since) * 1000 if since else 0
    with open_desk() as desk:
        names = {row.team.team_id: row.team.name for row in Teams(desk.store.engine).list()}
        query = AuditQuery(
            team_id=Teams(desk.store.engine).find(team_name).team_id if team_name else "",
            actor=actor,
            action=action,
            target=target,
            failures_only=failed,
            since_unix_ms=since_ms,
            limit=limit,
        )
        found = desk.audit.find(query)
    if as_json:
        print_json([audit_json(entry) for entry in found])
        return
    import time

    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at_unix_ms / 1000)),
            names.get(entry.team_id, entry.team_id),
            entry.actor,
            entry.action.replace("[", r"\["),
            entry.target.replace("[", r"\["),
            "ok" if entry.result == "ok" else f"[red]{entry.result}[/red]",
            entry.request_id,
        )
        for entry in found
    ]
    print_table(("when", "team", "who", "what", "to", "result", "request"), rows)
