"""`vmcell bench`: figures, with what they were measured beside."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

import click

from vmcell_tools.cli_output import json_option, print_json, print_table

if TYPE_CHECKING:
    from vmcell_tools.bench.containers import Target
    from vmcell_tools.bench.report import Report
    from vmcell_tools.progress import Progress


@click.group()
def bench() -> None:
    """Measure this host; runc is measured in the same run.

    Each figure comes with its definition, n, failures, the machine and the lane. Inside `vmcell dev
    up --icount` a nanosecond is an instruction, so that figures can be compared over time.
    """


def _count(default: int) -> Callable:
    return click.option(
        "-n", "--count", default=default, show_default=True, type=click.IntRange(1, 1000)
    )


def _memory_mib(default: int) -> Callable:
    return click.option(
        "--memory-mib",
        default=default,
        show_default=True,
        type=click.IntRange(64, 262144),
        help="RAM of a guest.",
    )


def _at_once(default: int) -> Callable:
    return click.option("--at-once", default=default, show_default=True, type=click.IntRange(1, 64))


image_option = click.option(
    "--image",
    default="docker.io/vmcell/small:latest",
    show_default=True,
    help="Has to have sleep, true and a shell.",
)
address_option = click.option(
    "--address", default="/run/containerd/containerd.sock", show_default=True, help="containerd's."
)
namespace_option = click.option(
    "--namespace", default="default", show_default=True, help="Where the image is."
)
template_option = click.option("--template", default="base", show_default=True)
url_option = click.option("--url", help="Where the API answers; default: VMCELL_API_URL.")
key_option = click.option("--key", help="Default: VMCELL_API_KEY, then E2B_API_KEY.")


def _on_target(command: Callable) -> Callable:
    """Options that say where sandboxes are made, for a command that takes a `target`."""

    @wraps(command)
    def with_target(image: str, address: str, namespace: str, **others: object) -> None:
        command(target=_target(image, address, namespace), **others)

    return image_option(address_option(namespace_option(with_target)))


@bench.command()
@image_option
@_count(20)
@json_option
def start(image: str, count: int, as_json: bool) -> None:
    """Time from a snapshot to be prepared to a started task: cold boot against runc.

    Needs a host where vmcell runs, and root.
    """
    from dataclasses import asdict

    from vmcell_tools.bench.report import Report
    from vmcell_tools.bench.start import bench_start, rows_of
    from vmcell_tools.progress import Progress

    target = _target(image, "/run/containerd/containerd.sock", "default")
    report = Report(name="start")
    with Progress("vmcell bench") as progress:
        results = bench_start(target, count, progress)
    report.finish()
    if as_json:
        print_json({**report.json(), "results": [asdict(result) for result in results]})
        return
    print_table(("p50 in ms", "vmcell", "runc", "ratio"), rows_of(results))
    for result in results:
        click.echo(f"{result.runtime}: n = {len(result.samples)}, failures = {result.failures}")
    for line in report.lines():
        click.echo(line)


@bench.command()
@_count(40)
@_memory_mib(512)
@json_option
def restore(count: int, memory_mib: int, as_json: bool) -> None:
    """Time from the zygote's fork to the first instruction of a saved machine.

    Runs on any /dev/kvm, with a hand-made guest for a Linux; as root with a network interface.
    """
    from vmcell_tools.bench.restore import bench_restore

    _show(lambda progress: bench_restore(count, memory_mib, progress), as_json)


@bench.command("exec")
@_on_target
@_count(40)
@json_option
def exec_(target: Target, count: int, as_json: bool) -> None:
    """Time that `true` takes in a running container, against runc."""
    from vmcell_tools.bench.execs import bench_exec

    _show(lambda progress: bench_exec(target, count, progress), as_json)


@bench.command()
@_on_target
@_count(10)
@_memory_mib(512)
@json_option
def snapshot(target: Target, count: int, memory_mib: int, as_json: bool) -> None:
    """Time a guest stands still for a snapshot, its whole time, its size: 0, 7, 100 MiB written."""
    from vmcell_tools.bench.snapshot import bench_snapshot

    _show(lambda progress: bench_snapshot(target, count, memory_mib, progress), as_json)


@bench.command()
@_on_target
@_count(10)
@click.option("--many", default=100, show_default=True, type=click.IntRange(1, 1000))
@_at_once(8)
@_memory_mib(128)
@json_option
def clone(
    target: Target,
    count: int,
    many: int,
    at_once: int,
    memory_mib: int,
    as_json: bool,
) -> None:
    """Time of one clone of a snapshot (n of them) against many at once."""
    from vmcell_tools.bench.clone import bench_clone

    _show(lambda progress: bench_clone(target, count, many, at_once, memory_mib, progress), as_json)


@bench.command()
@_on_target
@_count(20)
@_memory_mib(128)
@_at_once(1)
@json_option
def memory(
    target: Target,
    count: int,
    memory_mib: int,
    at_once: int,
    as_json: bool,
) -> None:
    """Memory of n idle sandboxes: each one's own, and what the host has less for each."""
    from vmcell_tools.bench.idle import Wanted, bench_memory

    wanted = Wanted(count=count, memory_mib=memory_mib, at_once=at_once)
    _show(lambda progress: bench_memory(target, wanted, progress), as_json)


@bench.command()
@_on_target
@_count(100)
@_memory_mib(128)
@_at_once(4)
@json_option
def density(
    target: Target,
    count: int,
    memory_mib: int,
    at_once: int,
    as_json: bool,
) -> None:
    """n idle sandboxes at once, every one of which has to answer."""
    from vmcell_tools.bench.idle import Wanted, bench_density

    wanted = Wanted(count=count, memory_mib=memory_mib, at_once=at_once)
    _show(lambda progress: bench_density(target, wanted, progress), as_json)


@bench.command()
@template_option
@url_option
@key_option
@_on_target
@_count(20)
@click.option(
    "--save-s",
    default=20.0,
    show_default=True,
    type=click.FloatRange(0, 3600),
    help="Seconds that the node has to save the template after its first sandbox.",
)
@json_option
def create(
    template: str,
    url: str | None,
    key: str | None,
    target: Target,
    count: int,
    save_s: float,
    as_json: bool,
) -> None:
    """Time of a create by the API, against runc where containerd is on this machine."""
    from vmcell_tools.bench.service import bench_create
    from vmcell_tools.bench.service_client import service_client

    client = service_client(url, key)
    _show(
        lambda progress: bench_create(
            client, template, target, count=count, save_s=save_s, progress=progress
        ),
        as_json,
    )


@bench.command()
@template_option
@url_option
@key_option
@_count(20)
@json_option
def rollback(template: str, url: str | None, key: str | None, count: int, as_json: bool) -> None:
    """Time of a rollback by the API, the old machine kept."""
    from vmcell_tools.bench.service import bench_rollback
    from vmcell_tools.bench.service_client import service_client

    client = service_client(url, key)
    _show(lambda progress: bench_rollback(client, template, count, progress), as_json)


def _target(image: str, address: str, namespace: str) -> Target:
    from vmcell_tools.bench.containers import Target

    return Target(address=address, namespace=namespace, image=image)


def _show(measure: Callable[[Progress], Report], as_json: bool) -> None:
    from vmcell_tools.bench.report import TITLES
    from vmcell_tools.progress import Progress

    with Progress("vmcell bench") as progress:
        report = measure(progress)
    if as_json:
        print_json(report.json())
        return
    print_table(TITLES, report.rows())
    for line in report.lines():
        click.echo(line)
