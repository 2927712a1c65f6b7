"""`vmcell bench`: figures, with what they were measured beside."""

from __future__ import annotations

import click

from vmcell_tools.cli_output import json_option, print_json, print_table


@click.group()
def bench() -> None:
    """Measure this host; runc is measured in the same run."""


@bench.command()
@click.option("--image", default="docker.io/vmcell/small:latest", show_default=True)
@click.option("-n", "--count", default=20, show_default=True, type=click.IntRange(1, 1000))
@json_option
def start(image: str, count: int, as_json: bool) -> None:
    """Time from a snapshot to be prepared to a started task: cold boot against runc.

    Needs a host where vmcell runs, and root. Inside `vmcell dev up --icount` a nanosecond is an
    instruction, so that figures can be compared over time.
    """
    from dataclasses import asdict

    from vmcell_tools.bench.start import bench_start, rows_of
    from vmcell_tools.progress import Progress

    with Progress("vmcell bench") as progress:
        results = bench_start(image, count, progress)
    if as_json:
        print_json([asdict(result) for result in results])
        return
    print_table(("p50 in ms", "vmcell", "runc", "ratio"), rows_of(results))
    for result in results:
        click.echo(f"{result.runtime}: n = {len(result.samples)}, failures = {result.failures}")
