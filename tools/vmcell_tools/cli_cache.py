"""`vmcell cache`: the words and options of the image cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vmcell_tools.cli_output import json_option, print_json, print_table

if TYPE_CHECKING:
    from vmcell_shim.cache_collector import ImageRow

STATE_MARKS = {
    "in use": "[green]in use[/green]",
    "idle": "idle",
    "stale": "[yellow]stale[/yellow]",
    "damaged": "[red]damaged[/red]",
}
# The store keeps a KEY of 64 hex digits; so many tell images apart for a reader.
KEY_DIGITS = 12


@click.group()
def cache() -> None:
    """EROFS images made from the layers of containers' images."""


@cache.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """What is in the cache, and who needs it."""
    from vmcell_shim.cache_collector import list_images
    from vmcell_shim.config import load_config

    config = load_config()
    _print(list_images(config.cache_dir), as_json)


@cache.command()
@click.option(
    "--limit-mib",
    type=click.IntRange(0),
    help="What all images together may take; cache_limit_mib of config.toml by default.",
)
@json_option
def prune(limit_mib: int | None, as_json: bool) -> None:
    """Remove images whose layers have gone, damaged ones, and the oldest over the limit.

    An image in use is never removed; --limit-mib 0 removes all others.
    """
    from vmcell_shim.cache_collector import collect
    from vmcell_shim.config import load_config

    config = load_config()
    limit = config.cache_limit_mib if limit_mib is None else limit_mib
    removed = collect(config.cache_dir, limit_mib=limit)
    _print(removed, as_json)
    if not as_json:
        freed_mib = sum(row.size_bytes for row in removed) >> 20
        click.echo(f"removed {len(removed)} images, {freed_mib} MiB")


def _print(rows: list[ImageRow], as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        print_json([asdict(row) for row in rows])
        return
    import time

    table = []
    for row in rows:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.used_at_s))
        top = row.layers[0] if row.layers else ""
        layers = f"{len(row.layers)}, topmost {top}" if top else "not known"
        size = f"{row.size_bytes / (1 << 20):.1f}"
        table.append((row.key[:KEY_DIGITS], size, used, STATE_MARKS[row.state], layers))
    print_table(("image", "MiB", "last used", "state", "layers"), table)
