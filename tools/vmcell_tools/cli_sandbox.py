"""`vmcell sandbox`: the words and options of sandboxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vmcell_protos.errors import CallerError, VmcellError
from vmcell_tools.cli_exec import execute
from vmcell_tools.cli_output import TextGroup, json_option, name_values, print_json, print_table
from vmcell_tools.cli_past import fork, history, rollback, sandbox_client, undo

if TYPE_CHECKING:
    from vmcell_tools.api_client import Json

LEVELS = ("debug", "info", "warn", "error")


@click.group(cls=TextGroup)
def sandbox() -> None:
    """Sandboxes of a team, through a running API (E2B_API_URL, E2B_API_KEY)."""


for command in (execute, history, rollback, undo, fork):
    sandbox.add_command(command)


@sandbox.command("list")
@click.option("--state", type=click.Choice(("running", "paused")), help="Only those.")
@click.option("--template", default="", help="Only those of this template.")
@click.option(
    "--metadata",
    multiple=True,
    callback=name_values,
    metavar="NAME=VALUE",
    help="Only those that were created with it; may be repeated.",
)
@json_option
def list_command(state: str | None, template: str, metadata: dict[str, str], as_json: bool) -> None:
    """The team's sandboxes, newest first, running and paused."""
    import time

    from vmcell_tools.sandbox_tables import SANDBOX_TITLES, sandbox_row

    rows = sandbox_client().find(state=state or "", metadata=metadata, template=template)
    if as_json:
        print_json(rows)
    else:
        print_table(SANDBOX_TITLES, [sandbox_row(row, time.time()) for row in rows])


@sandbox.command()
@click.argument("sandbox_id", metavar="ID")
@json_option
def show(sandbox_id: str, as_json: bool) -> None:
    """All about sandbox ID, and what it uses; envd's token is printed with --json only."""
    import time

    from vmcell_tools.sandbox_tables import sandbox_facts

    client = sandbox_client()
    found = client.get(sandbox_id)
    sample = client.newest_metrics(found["sandboxID"]) if found["state"] == "running" else None
    if as_json:
        print_json({**found, "newestMetrics": sample})
    else:
        print_table(("sandbox", ""), sandbox_facts(found, sample, time.time()))


@sandbox.command()
@click.argument("template", default="base")
@click.option("--timeout", type=click.IntRange(1), help="Seconds until its end; default 300.")
@click.option(
    "--metadata",
    multiple=True,
    callback=name_values,
    metavar="NAME=VALUE",
    help="To find it by; may be repeated.",
)
@click.option(
    "-e",
    "--env",
    "environment",
    multiple=True,
    callback=name_values,
    metavar="NAME=VALUE",
    help="Of every command in it; may be repeated.",
)
@click.option("--on-timeout", type=click.Choice(("kill", "pause")), help="At its end.")
@click.option("--auto-resume", is_flag=True, help="Requests wake it when it is paused.")
@click.option("--no-internet", is_flag=True, help="It reaches nothing outside.")
@click.option("--volume", "volumes", multiple=True, metavar="NAME:PATH", help="May be repeated.")
@json_option
def create(
    template: str,
    timeout: int | None,
    metadata: dict[str, str],
    environment: dict[str, str],
    on_timeout: str | None,
    auto_resume: bool,
    no_internet: bool,
    volumes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a sandbox of TEMPLATE, a snapshot or an image, and print its id when it can be used."""
    from vmcell_tools.progress import Progress

    body: Json = {"templateID": template, "metadata": metadata, "envVars": environment}
    if timeout is not None:
        body["timeout"] = timeout
    if on_timeout or auto_resume:
        body["lifecycle"] = {"onTimeout": on_timeout or "kill", "autoResume": auto_resume}
    if no_internet:
        body["allowInternetAccess"] = False
    if volumes:
        body["volumeMounts"] = [_mount(text) for text in volumes]
    client = sandbox_client()
    with Progress("vmcell sandbox") as progress:
        progress.step(f"creating one of {template}")
        made = client.create(body)
    if as_json:
        print_json(made)
    else:
        click.echo(made["sandboxID"])


def _mount(text: str) -> dict[str, str]:
    name, _, path = text.partition(":")
    if not name or not path:
        raise CallerError(f"--volume is {text!r}; it takes the NAME of a volume, a colon, a PATH")
    return {"name": name, "path": path}


@sandbox.command()
@click.argument("sandbox_ids", metavar="ID...", nargs=-1, required=True)
@json_option
def kill(sandbox_ids: tuple[str, ...], as_json: bool) -> None:
    """End sandboxes, running or paused. Each is tried, also when one before it failed."""
    from vmcell_tools.progress import Progress

    client = sandbox_client()
    killed, failed = [], []
    with Progress("vmcell sandbox") as progress:
        for sandbox_id in sandbox_ids:
            progress.step(f"killing {sandbox_id}")
            try:
                client.kill(sandbox_id)
                killed.append(sandbox_id)
            except VmcellError as error:
                if len(sandbox_ids) == 1:
                    raise
                failed.append(str(error))
    if as_json:
        print_json({"killed": killed})
    elif killed:
        click.echo(f"killed {', '.join(killed)}")
    if failed:
        raise CallerError(f"{len(failed)} of {len(sandbox_ids)} failed: {'; '.join(failed)}")


@sandbox.command()
@click.argument("sandbox_id", metavar="ID")
@json_option
def pause(sandbox_id: str, as_json: bool) -> None:
    """Save sandbox ID to disk and free its memory and its place."""
    from vmcell_tools.progress import Progress

    client = sandbox_client()
    with Progress("vmcell sandbox") as progress:
        progress.step(f"pausing {sandbox_id}")
        client.pause(sandbox_id)
    if as_json:
        print_json({"sandboxID": sandbox_id, "state": "paused"})
    else:
        click.echo(f"paused {sandbox_id}; it goes on with: vmcell sandbox resume {sandbox_id}")


@sandbox.command()
@click.argument("sandbox_id", metavar="ID")
@click.option("--timeout", type=click.IntRange(1), help="Seconds until its end; default 300.")
@json_option
def resume(sandbox_id: str, timeout: int | None, as_json: bool) -> None:
    """Let sandbox ID go on where it was paused; one that runs gets the time."""
    from vmcell_tools.progress import Progress

    client = sandbox_client()
    with Progress("vmcell sandbox") as progress:
        progress.step(f"resuming {sandbox_id}")
        was_paused = client.resume(sandbox_id, timeout)
    if as_json:
        print_json({"sandboxID": sandbox_id, "state": "running", "wasPaused": was_paused})
    else:
        click.echo(f"{sandbox_id} {'goes on' if was_paused else 'was running already'}")


@sandbox.command()
@click.argument("sandbox_id", metavar="ID")
@click.argument("seconds", type=click.IntRange(0))
@json_option
def timeout(sandbox_id: str, seconds: int, as_json: bool) -> None:
    """Let sandbox ID end SECONDS from now; 0 ends it (or pauses it, as it was made) at once."""
    sandbox_client().set_timeout(sandbox_id, seconds)
    if as_json:
        print_json({"sandboxID": sandbox_id, "timeout": seconds})
    elif seconds:
        click.echo(f"{sandbox_id} ends in {seconds} s")
    else:
        click.echo(f"{sandbox_id} has been ended, or paused where it was made so")


@sandbox.command()
@click.argument("sandbox_id", metavar="ID")
@click.option("--level", type=click.Choice(LEVELS), default="debug", help="From which on.")
@click.option("--search", default="", help="Only entries whose message holds this.")
@click.option("--limit", type=click.IntRange(1, 1000), default=1000, show_default=True)
@json_option
def logs(sandbox_id: str, level: str, search: str, limit: int, as_json: bool) -> None:
    """What envd in sandbox ID logged: commands, their output and their ends; the newest last."""
    from vmcell_tools.sandbox_tables import log_line

    rows = sandbox_client().logs(sandbox_id, level=level, search=search, limit=limit)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(log_line(row))


@sandbox.command()
@click.argument("sandbox_id", metavar="ID")
@json_option
def memory(sandbox_id: str, as_json: bool) -> None:
    """What sandbox ID has of the host's memory: shared, private, dirty, and what it costs to have
    a microVM (the overhead: its two processes without guest RAM)."""
    from vmcell_tools.sandbox_tables import MEMORY_TITLES, memory_rows, memory_sums

    found = sandbox_client().memory(sandbox_id)
    if as_json:
        print_json({**found, **memory_sums(found)})
    else:
        print_table(MEMORY_TITLES, memory_rows(found))
