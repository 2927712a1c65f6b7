"""One version of one client in an environment of its own, kept in the build cache."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.build_cache import BuildCache, input_digest
from vmcell_tools.build_step import run_step
from vmcell_tools.matrix.clients import Client
from vmcell_tools.progress import Progress

INSTALL_WITHIN_S = 600.0
LOWEST_NODE = 20
DRIVERS = Path(__file__).with_name("drivers")


def missing_tool(client: Client) -> str | None:
    """Why this machine cannot run the client at all; None when it can."""
    if client.language == "python":
        return None
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed; install Node.js {LOWEST_NODE} or later"
    version = run_step(["node", "--version"], deadline_s=30).strip()
    if int(version.removeprefix("v").partition(".")[0]) < LOWEST_NODE:
        return f"Node.js is {version}; install {LOWEST_NODE} or later"
    return None


def install(client: Client, cache: BuildCache, progress: Progress) -> Path:
    """The environment's directory, made when the cache has it not. Raises HostError."""
    interpreter = sys.version.split()[0] if client.language == "python" else ""
    digest = input_digest(client.language, interpreter, *client.requirements)

    def fill(directory: Path) -> None:
        progress.step(f"installing {client.column}")
        if client.language == "python":
            _fill_venv(directory, client)
        else:
            _fill_node_modules(directory, client)

    return cache.build("clients", digest, fill, progress)


def command(client: Client, environment: Path) -> list[str]:
    """What runs the client's driver. The copy of it beside node_modules is made anew each time."""
    if client.language == "python":
        return [str(environment / "bin" / "python"), str(DRIVERS / client.driver)]
    if client.driver.endswith(".py"):
        return [sys.executable, str(DRIVERS / client.driver)]
    # An ES module finds its packages by where it lies, and by nothing else.
    copies = environment / "drivers"
    shutil.copytree(DRIVERS, copies, dirs_exist_ok=True)
    preload = ["--require", str(DRIVERS / "wildcard_dns.cjs")]
    return ["node", *preload, str(copies / client.driver)]


def _fill_venv(directory: Path, client: Client) -> None:
    base: str = getattr(sys, "_base_executable", None) or sys.executable
    run_step([base, "-m", "venv", directory], deadline_s=INSTALL_WITHIN_S)
    pip: list[str | Path] = [
        directory / "bin" / "python",
        "-m",
        "pip",
        "--disable-pip-version-check",
    ]
    run_step([*pip, "install", "--quiet", *client.requirements], deadline_s=INSTALL_WITHIN_S)


def _fill_node_modules(directory: Path, client: Client) -> None:
    (directory / "package.json").write_text(json.dumps({"private": True}))
    words = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"]
    run_step([*words, *client.requirements], deadline_s=INSTALL_WITHIN_S, directory=directory)
    if not (directory / "node_modules").is_dir():
        raise HostError(f"npm installed nothing for {client.column}")
