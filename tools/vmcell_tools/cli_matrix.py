"""`vmcell matrix`: client × version × call against a running service."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmcell_tools.cli_output import json_option, print_json, print_table

if TYPE_CHECKING:
    from vmcell_tools.matrix.clients import Client
    from vmcell_tools.matrix.keeping import KeptResults
    from vmcell_tools.matrix.running import Column
    from vmcell_tools.matrix.services import Services
    from vmcell_tools.progress import Progress

COLOURS = {"ok": "green", "refused": "yellow", "FAILED": "red"}


@click.command()
@click.option(
    "--api-url",
    envvar="VMCELL_API_URL",
    help="Default: the service in the dev VM, which is started.",
)
@click.option("--sandbox-url", envvar="VMCELL_SANDBOX_URL", help="Its data plane; with --api-url.")
@click.option("--volume-url", envvar="E2B_VOLUME_API_URL", help="Its volumes; with --api-url.")
@click.option("--key", envvar="E2B_API_KEY", help="With --api-url.", show_envvar=True)
@click.option("--only", "words", multiple=True, help="Clients whose name holds this; repeatable.")
@click.option(
    "--write",
    "pages",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="A page with marks, for example docs/clients.md; repeatable.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep each client's results there as they come; clients that it has are not run again.",
)
@click.option("--where", help="What a page says of the service that --api-url names.")
@json_option
def matrix(
    api_url: str | None,
    sandbox_url: str | None,
    volume_url: str | None,
    key: str | None,
    words: tuple[str, ...],
    pages: tuple[Path, ...],
    results: Path | None,
    where: str | None,
    as_json: bool,
) -> None:
    """Run every client's calls and print a table: rows are calls, columns are versions.

    A cell is ok, refused (the server named what it does not have), FAILED, or – (this version of
    the client has no such call). Exit status 1 when a call failed. --write puts the tables into a
    page, between its marks. A client whose calls failed while the software CPU lost a machine is
    run once more.
    """
    from vmcell_protos.errors import CallerError
    from vmcell_tools.matrix import table
    from vmcell_tools.matrix.clients import chosen
    from vmcell_tools.matrix.keeping import KeptResults
    from vmcell_tools.matrix.services import DevVmServices, OneService, Service
    from vmcell_tools.progress import Progress

    clients = chosen(words)
    kept = KeptResults(results)
    with Progress("vmcell matrix") as progress:
        if api_url is None:
            where = where or "the dev VM (emulated CPU), a microVM for each sandbox"
            with closing(DevVmServices(images_for(clients), progress)) as services:
                columns = _columns(clients, services, kept, progress)
        elif sandbox_url and key:
            where = where or "a service of its own"
            service = Service(
                api_url=api_url, sandbox_url=sandbox_url, volume_url=volume_url or "", key=key
            )
            columns = _columns(clients, OneService(service=service), kept, progress)
        else:
            raise CallerError("--api-url goes with --sandbox-url and --key")
    for page in pages:
        table.write_page(page, columns, f"{table.days(columns)}, {where}")
    if as_json:
        print_json(table.as_json(columns))
    else:
        _print(columns)
    failed = table.totals(columns)["failed"]
    if failed:
        raise click.ClickException(f"{failed} calls failed; --json shows what was said")


def images_for(clients: Sequence[Client]) -> tuple[str, ...]:
    """The images that their calls start from; two of them are half a gigabyte and more."""
    groups = {client.group for client in clients}
    more = {
        "code-interpreter-v1": groups & {"code interpreter", "cubesandbox"},
        "desktop": groups & {"desktop"},
    }
    return ("base", *(image for image, wanted_by in more.items() if wanted_by))


def _columns(
    clients: Sequence[Client], services: Services, kept: KeptResults, progress: Progress
) -> list[Column]:
    from vmcell_tools.build_cache import BuildCache
    from vmcell_tools.matrix.running import run_client

    columns = []
    for client in clients:
        column = kept.find(client)
        if column is None:
            column = run_client(client, services, BuildCache.default(), progress)
            if not column.skipped:
                kept.add(column)
        else:
            progress.note(f"{client.column} has been run on {column.day}")
        columns.append(column)
    return columns


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
