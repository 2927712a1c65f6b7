"""`vmcell dev`: the words and options of the dev VM."""

from __future__ import annotations

import sys

import click

from vmcell_tools.cli_output import json_option, print_json, print_table

name_option = click.option(
    "--name",
    default="default",
    envvar="VMCELL_DEV_NAME",
    show_default=True,
    show_envvar=True,
    help="Which dev VM; several can be up.",
)


@click.group()
def dev() -> None:
    """The dev VM: real KVM on any machine."""


@dev.command("up")
@name_option
@click.option("--accel", default="auto", help="auto, kvm, tcg or icount.", show_default=True)
@click.option("--icount", is_flag=True, help="Count instructions as nanoseconds (--accel icount).")
@click.option("--cpus", default=2, show_default=True, type=click.IntRange(1, 64))
@click.option("--memory-mib", default=6144, show_default=True, type=int)
@click.option("--api-port", type=click.IntRange(0, 65535), help="Default 3000; 0 is any free one.")
@click.option("--data-port", type=click.IntRange(0, 65535), help="Default 3080; 0 is any free one.")
@click.option(
    "--deadline",
    default=180.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds until it must be up.",
)
@click.option(
    "--lifetime",
    default=14400,
    show_default=True,
    type=click.IntRange(60),
    help="Seconds until it powers off.",
)
@click.option("--store", help="Keep containerd's images on a disk of that key; default: in memory.")
@click.option(
    "--image",
    "images",
    multiple=True,
    help="With --store: have this built image in containerd when the VM starts; repeatable.",
)
@json_option
def dev_up(
    name: str,
    accel: str,
    icount: bool,
    cpus: int,
    memory_mib: int,
    api_port: int | None,
    data_port: int | None,
    deadline: float,
    lifetime: int,
    store: str | None,
    images: tuple[str, ...],
    as_json: bool,
) -> None:
    """Start the dev VM, or say that it is up already."""
    from vmcell_tools import dev_vm
    from vmcell_tools.progress import Progress

    is_default = name == "default"
    request = dev_vm.Request(
        name=name,
        accelerator="icount" if icount else accel,
        cpu_count=cpus,
        memory_mib=memory_mib,
        # Only one VM can have the well-known ports; others take free ones.
        api_port=api_port if api_port is not None else 3000 * is_default,
        data_port=data_port if data_port is not None else 3080 * is_default,
        deadline_s=deadline,
        lifetime_s=lifetime,
        store=store,
        images=images,
    )
    with Progress("vmcell dev") as progress:
        vm, started = dev_vm.up(request, progress)
    if as_json:
        print_json(dev_vm.report(vm))
    else:
        state = "is up" if started else "was up already"
        click.echo(
            f"dev VM {name!r} {state} ({vm.accelerator}): API on 127.0.0.1:{vm.api_port},"
            f" data plane on 127.0.0.1:{vm.data_port}, logs in {vm.out_directory}"
        )


@dev.command("run", context_settings={"ignore_unknown_options": True})
@name_option
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal in any case.")
@click.option("--timeout", type=float, help="Seconds after which it is ended, with status 124.")
@click.option("-C", "--directory", help="Where to run; default: here.")
@click.option("-e", "--env", "variables", multiple=True, metavar="NAME=VALUE")
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def dev_run(
    name: str,
    tty: bool,
    timeout: float | None,
    directory: str | None,
    variables: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    """Run a command in the dev VM: vmcell dev run -- uname -a."""
    from vmcell_tools import dev_run as runner

    pairs = [variable.partition("=") for variable in variables]
    for (key, sign, _), variable in zip(pairs, variables, strict=True):
        if not key or not sign:
            raise click.BadParameter(f"{variable!r} is not NAME=VALUE", param_hint="'--env'")
    command = runner.Command(
        words=words,
        terminal=True if tty else None,
        timeout_s=timeout,
        directory=directory,
        environment={key: value for key, _, value in pairs},
    )
    sys.exit(runner.run(name, command))


@dev.command("down")
@name_option
def dev_down(name: str) -> None:
    """End the dev VM and all its processes."""
    from vmcell_tools import dev_vm

    was_up = dev_vm.down(name)
    click.echo(f"dev VM {name!r} {'is down' if was_up else 'was not up'}")


@dev.command("status")
@name_option
@json_option
def dev_status(name: str, as_json: bool) -> None:
    """Say whether the dev VM is up, and its ports and logs; exit status 1 when it is not."""
    from vmcell_tools import dev_vm

    vm = dev_vm.running_vm(name)
    if as_json:
        print_json(dev_vm.report(vm))
        return
    for key, value in dev_vm.report(vm).items():
        click.echo(f"{key:14} {value}")


@dev.command("containerd")
@json_option
def dev_containerd(as_json: bool) -> None:
    """Build a containerd 2.x and nerdctl for the tests, unless the cache has them."""
    from vmcell_tools import go_programs
    from vmcell_tools.build_cache import BuildCache
    from vmcell_tools.progress import Progress

    cache = BuildCache.default()
    rows = []
    with Progress("vmcell dev") as progress:
        for module in (go_programs.CONTAINERD, go_programs.NERDCTL):
            directory = go_programs.build_programs(module, cache, progress)
            go_programs.drop_old_builds(module, cache)
            rows += [(name, module.version, str(directory / name)) for name in module.commands]
    if as_json:
        print_json([dict(zip(("name", "version", "path"), row, strict=True)) for row in rows])
    else:
        print_table(("name", "version", "path"), rows)
