"""`vmcell setup` and `vmcell doctor`: the words and options for this host."""

from __future__ import annotations

import sys

import click

from vmcell_tools.cli_output import json_option, print_json, print_table

DOCTOR_MARKS = {
    "ok": "[green]ok[/green]",
    "warn": "[yellow]warn[/yellow]",
    "fail": "[red]fail[/red]",
}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check this host; exit status 1 when something needed is missing."""
    from dataclasses import asdict

    from vmcell_tools.doctor import Host, examine

    rows = examine(Host())
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        print_table(
            ("", "what", "found", "what to do"),
            [(DOCTOR_MARKS[row.status], row.what, row.found, row.advice) for row in rows],
        )
    sys.exit(any(row.status == "fail" for row in rows))


@click.command()
@click.option(
    "--kernel",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True),
    help="The guest's kernel; default: the newest build.",
)
@click.option(
    "--base-image",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True),
    help="The guest's base image; default: the newest build.",
)
@click.option("--vcpus", type=click.IntRange(1, 8), help="Default of a container.")
@click.option("--memory-mib", type=click.IntRange(64, 262144), help="Default of a container.")
@click.option("--packages", is_flag=True, help="Also install the Debian packages to run on.")
@click.option(
    "--containerd", is_flag=True, help="Also put the runtime into /etc/containerd/config.toml."
)
@click.option(
    "--tls-domain",
    metavar="NAME[:PORT]",
    help="Also make a local CA and serve https://api.NAME and https://<port>-<id>.NAME.",
)
@click.option(
    "--without-code-interpreter",
    is_flag=True,
    help="Leave out the template code-interpreter-v1, half a gigabyte.",
)
@click.option("--without-templates", is_flag=True, help="Leave out the template base as well.")
@click.option("--uninstall", is_flag=True, help="Remove what setup wrote.")
@json_option
def setup(
    kernel: str | None,
    base_image: str | None,
    vcpus: int | None,
    memory_mib: int | None,
    packages: bool,
    containerd: bool,
    tls_domain: str | None,
    without_code_interpreter: bool,
    without_templates: bool,
    uninstall: bool,
    as_json: bool,
) -> None:
    """Write /etc/vmcell/config.toml, put the shim on containerd's PATH, write units and nginx's
    configuration for the E2B service (none of them is started), and make the templates base and
    code-interpreter-v1: their images are built unless they are, and imported.

    What Kubernetes needs in containerd's configuration is written to /etc/vmcell/containerd; only
    --containerd changes /etc/containerd/config.toml, and keeps a backup.
    """
    from pathlib import Path

    from vmcell_tools import containerd_setup, ingress_setup, setup_host, setup_templates
    from vmcell_tools.build_cache import BuildCache
    from vmcell_tools.progress import Progress

    root = Path("/")
    if uninstall:
        done = setup_host.uninstall(root) + ingress_setup.uninstall(root)
    else:
        if packages:
            from vmcell_tools import host_packages

            missing = host_packages.missing_packages(host_packages.packages_for(["run"]))
            if missing:
                host_packages.install(missing)
        with Progress("vmcell setup") as progress:
            artifacts = setup_host.chosen_artifacts(kernel, base_image, progress)
        done = setup_host.install(root, artifacts, vcpus=vcpus, memory_mib=memory_mib)
        if containerd:
            done += containerd_setup.merge(root)
        if tls_domain is not None:
            done += ingress_setup.set_up_tls(root, tls_domain)
        done += ingress_setup.install(root)
        if tls_domain is not None:
            done += ingress_setup.trust_advice(root, tls_domain)
        left_out = 2 if without_templates else 1 if without_code_interpreter else 0
        templates = setup_templates.TEMPLATES[: len(setup_templates.TEMPLATES) - left_out]
        with Progress("vmcell setup") as progress:
            done += setup_templates.install_templates(templates, BuildCache.default(), progress)
        done = [*(done or ["nothing to do"]), containerd_setup.advice(root)]
    if as_json:
        print_json(done)
    else:
        for line in done or ["nothing to do"]:
            click.echo(line)
