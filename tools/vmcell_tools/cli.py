"""The `vmcell` command: its groups; each command imports what it runs only when it is run."""

from __future__ import annotations

import os
import sys

import click

from vmcell_tools.cli_audit import audit
from vmcell_tools.cli_bench import bench
from vmcell_tools.cli_build import image, kernel
from vmcell_tools.cli_cache import cache
from vmcell_tools.cli_dev import dev
from vmcell_tools.cli_host import doctor, setup
from vmcell_tools.cli_key import key
from vmcell_tools.cli_matrix import matrix
from vmcell_tools.cli_output import OneSentenceGroup
from vmcell_tools.cli_sandbox import sandbox
from vmcell_tools.cli_snapshot import snapshot
from vmcell_tools.cli_team import migrate, team
from vmcell_tools.cli_template import template
from vmcell_tools.cli_volume import volume


@click.group(cls=OneSentenceGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vmcell")
def main() -> None:
    """One microVM per container: setup, checks, images and the dev VM."""


COMMANDS = (
    *(setup, doctor, kernel, image, template, sandbox, snapshot, volume, cache),
    *(team, key, audit, migrate),
    *(bench, matrix, dev),
)
for command in COMMANDS:
    main.add_command(command)


@main.command()
def serve() -> None:
    """Run noded, the API and nginx on this host, in the foreground."""
    os.execv(sys.executable, [sys.executable, "-m", "vmcell_api.serve"])


@main.command()
def zygote() -> None:
    """Run this host's zygote in the foreground; systemd does that by vmcell-zygote.service."""
    from vmcell_tools.setup_host import installed_shim

    shim = str(installed_shim())
    os.execv(shim, [shim, "zygote"])


@main.command()
def demo() -> None:
    """Drive a real microVM with the E2B SDK, in the dev VM."""
    from vmcell_tools.demo import run_demo

    run_demo()
