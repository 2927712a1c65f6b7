"""`vmcell template`: the words and options of templates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmcell_protos.errors import CallerError
from vmcell_tools.cli_output import json_option, print_json, print_table

if TYPE_CHECKING:
    from vmcell_tools.template_client import BuildEnd, TemplateClient

_MARKS = {"ready": "green", "error": "red", "building": "yellow", "waiting": "yellow"}


@click.group()
def template() -> None:
    """Templates of the API that E2B_API_URL and E2B_API_KEY name."""


@template.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """The team's templates and those of the installation."""
    rows = _client().templates()
    if as_json:
        print_json(rows)
        return
    table = []
    for row in rows:
        status = str(row["buildStatus"])
        names = row["names"] if isinstance(row["names"], list) else []
        table.append(
            (
                ", ".join(map(str, names)),
                str(row["templateID"]),
                str(row["cpuCount"]),
                str(row["memoryMB"]),
                "public" if row["public"] else "team",
                f"[{_MARKS.get(status, 'white')}]{status}[/]",
                str(row["spawnCount"]),
            )
        )
    print_table(("name", "id", "CPUs", "MiB", "for", "last build", "sandboxes"), table)


@template.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path())
@click.option("--name", default="", help="NAME or NAME:TAG; template_name of e2b.toml by default.")
@click.option("--tag", "tags", multiple=True, help="One more tag; may be repeated.")
@click.option("--start", default="", help="Runs in each sandbox of the template.")
@click.option("--ready", default="", help="Ends with 0 once the start command can be used.")
@click.option("--cpus", type=click.IntRange(0, 8), default=0, help="CPUs of a sandbox.")
@click.option("--memory-mib", type=click.IntRange(0), default=0, help="Memory of a sandbox.")
@click.option("--no-cache", is_flag=True, help="Do every step anew.")
@json_option
def build(
    path: Path,
    name: str,
    tags: tuple[str, ...],
    start: str,
    ready: str,
    cpus: int,
    memory_mib: int,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Build a template from PATH: a Dockerfile, or a folder with one, or with a template.py.

    The steps run in a microVM of the server's. Ending this command does not end the build;
    `vmcell template watch` finds it again, `vmcell template rm` ends it.
    """
    from vmcell_tools import template_source
    from vmcell_tools.api_client import client_of_environment
    from vmcell_tools.progress import Progress

    api = client_of_environment()
    wanted = template_source.Wanted(
        name=name,
        tags=tags,
        start_command=start,
        ready_command=ready,
        cpu_count=cpus,
        memory_mib=memory_mib,
        use_cache=not no_cache,
    )
    with Progress("template") as progress:
        progress.step(f"reading {path}")
        source = template_source.load(path, wanted)
        progress.step("building")
        built = template_source.build(
            source,
            wanted,
            url=api.url,
            key=api.key,
            on_line=lambda level, text: progress.note(text),
        )
    if as_json:
        print_json(
            {
                "templateID": built.template_id,
                "buildID": built.build_id,
                "name": built.name,
                "tags": list(built.tags),
            }
        )
    else:
        click.echo(f"{built.name} is ready: {built.template_id}, build {built.build_id}")


@template.command()
@click.argument("name")
@click.argument("build_id", default="")
@json_option
def watch(name: str, build_id: str, as_json: bool) -> None:
    """Follow a build of NAME to its end: the one given, or the newest."""
    client = _client()
    template_id, builds = client.builds(name)
    if not build_id:
        if not builds:
            raise CallerError(f"template {name} has no builds; it is part of the installation")
        build_id = str(builds[0]["buildID"])
    end = _follow(client, template_id, build_id)
    if as_json:
        print_json(
            {
                "templateID": template_id,
                "buildID": build_id,
                "status": end.status,
                "reason": end.reason,
                "step": end.step,
            }
        )
    if end.status == "error":
        raise CallerError(f"build {build_id} failed: {end.reason}")
    if not as_json:
        click.echo(f"build {build_id} is ready")


def _client() -> TemplateClient:
    from vmcell_tools.api_client import client_of_environment
    from vmcell_tools.template_client import TemplateClient

    return TemplateClient(client_of_environment())


def _follow(client: TemplateClient, template_id: str, build_id: str) -> BuildEnd:
    from vmcell_tools.progress import Progress
    from vmcell_tools.template_client import BuildEnd

    with Progress("template") as progress:
        progress.step(f"build {build_id}")
        for row in client.follow(template_id, build_id):
            if isinstance(row, BuildEnd):
                return row
            progress.note(row.message)
    raise CallerError(f"build {build_id} was not followed to its end")


@template.command()
@click.argument("name")
@json_option
def rm(name: str, as_json: bool) -> None:
    """Delete template NAME with its builds; sandboxes made of it go on."""
    _client().remove(name)
    if as_json:
        print_json({"removed": name})
    else:
        click.echo(f"removed {name}")
