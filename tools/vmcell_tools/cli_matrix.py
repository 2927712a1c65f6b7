"""`vmcell matrix`: client × version × call against a running service."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmcell_tools.cli_output import json_option, print_json, print_table

if TYPE_CHECKING:
    from vmcell_tools.matrix.running import Column

# An emulated CPU takes about twenty times as long.
DEV_VM_PATIENCE_S = 300
DEV_VM_CLIENT_WITHIN_S = 1500
COLOURS = {"ok": "green", "refused": "yellow", "FAILED": "red"}


@click.command()
@click.option(
    "--api-url",
    envvar="VMCELL_API_URL",
    help="Default: the service in the dev VM, which is started.",
)
@click.option("--sandbox-url", envvar="VMCELL_SANDBOX_URL", help="Its data plane; with --api-url.")
@click.option("--key", envvar="E2B_API_KEY", help="With --api-url.", show_envvar=True)
@click.option("--only", "words", multiple=True, help="Clients whose name holds this; repeatable.")
@click.option(
    "--write",
    "pages",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="A page with marks, for example docs/clients.md; repeatable.",
)
@click.option("--where", help="What a page says of the service that --api-url names.")
@json_option
def matrix(
    api_url: str | None,
    sandbox_url: str | None,
    key: str | None,
    words: tuple[str, ...],
    pages: tuple[Path, ...],
    where: str | None,
    as_json: bool,
) -> None:
    """Run every client's calls and print a table: rows are calls, columns are versions.

    A cell is ok, refused (the server named what it does not have), FAILED, or – (this version of
    the client has no such call). Exit status 1 when a call failed. --write puts the tables into a
    page, between its marks.
    """
    from vmcell_protos.errors import CallerError
    from vmcell_tools.build_cache import BuildCache
    from vmcell_tools.matrix import table
    from vmcell_tools.matrix.clients import chosen
    from vmcell_tools.matrix.running import Service, run_matrix
    from vmcell_tools.progress import Progress

    clients = chosen(words)
    with Progress("vmcell matrix") as progress:
        if api_url is None:
            from vmcell_tools.dev_service import service_in_dev_vm

            with service_in_dev_vm("matrix", progress) as found:
                service = Service(
                    api_url=found.api_url,
                    sandbox_url=found.sandbox_url,
                    key=found.key,
                    patience_s=DEV_VM_PATIENCE_S,
                    client_within_s=DEV_VM_CLIENT_WITHIN_S,
                )
                columns = run_matrix(clients, service, BuildCache.default(), progress)
            where = where or "the dev VM (emulated CPU)"
        elif sandbox_url and key:
            service = Service(api_url=api_url, sandbox_url=sandbox_url, key=key)
            columns = run_matrix(clients, service, BuildCache.default(), progress)
            where = where or "a service of its own"
        else:
            raise CallerError("--api-url goes with --sandbox-url and --key")
    for page in pages:
        table.write_page(page, columns, f"{datetime.date.today().isoformat()}, {where}")
    if as_json:
        print_json(table.as_json(columns))
    else:
        _print(columns)
    failed = table.totals(columns)["failed"]
    if failed:
        raise click.ClickException(f"{failed} calls failed; --json shows what was said")


def _print(columns: list[Column]) -> None:
    from vmcell_tools.matrix import table

    for group, members in table.groups_of(columns).items():
        titles = [group, *(table.short_name(column) for column in members)]
        rows = [
            [call, *(_coloured(table.cell(column, call)) for column in members)]
            for call in table.calls_of(members)
        ]
        print_table(titles, rows)
        click.echo()
    for column in columns:
        for result in column.results:
            if result.outcome in ("refused", "failed"):
                line = f"{column.client.column}: {result.call}: {result.outcome}: {result.detail}"
                click.echo(line)
    counted = table.totals(columns)
    click.echo(", ".join(f"{number} {outcome}" for outcome, number in counted.items()))


def _coloured(word: str) -> str:
    colour = COLOURS.get(word)
    return f"[{colour}]{word}[/{colour}]" if colour else word
