"""nginx's configuration on this host: written from api.toml, tried by nginx before it is used.

`python -m vmcell_api.nginx_files` prints the text that `vmcell serve` and `vmcell setup` write.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from vmcell_api.config import ApiConfig, load_config
from vmcell_api.nginx import NginxPlan, Tls, render
from vmcell_protos.errors import CallerError, HostError, VmcellError

DEADLINE_S = 30
# Debian keeps it where only root's PATH looks.
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"


def nginx_program() -> str:
    """nginx's path; HostError when there is none."""
    found = shutil.which("nginx") or shutil.which("nginx", path=SEARCH_PATH)
    if found is None:
        raise HostError("nginx is not installed; install the package nginx-light")
    return found


def nginx_version(program: str) -> tuple[int, ...]:
    """Its version as numbers; HostError when it does not tell one."""
    done = _run([program, "-v"])
    match = re.search(r"nginx/(\d+)\.(\d+)\.(\d+)", done.stderr)
    if match is None:
        raise HostError(f"{program} -v says {done.stderr.strip()[:80]!r}, which names no version")
    return tuple(int(part) for part in match.groups())


def plan_for(config: ApiConfig, version: tuple[int, ...]) -> NginxPlan:
    """What the settings ask of nginx."""
    address, _, port = config.api_bind.rpartition(":")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(address, address)
    tls = None
    if config.tls_certificate:
        tls = Tls(listen=config.tls_bind, certificate=config.tls_certificate, key=config.tls_key)
    return NginxPlan(
        listen=config.data_bind,
        route_socket=config.route_socket,
        folder=config.nginx_dir,
        user=config.nginx_user,
        domain=config.domain.partition(":")[0],
        api=f"{host}:{port}",
        tls=tls,
        version=version,
    )


def write_configuration(config: ApiConfig) -> list[str]:
    """Writes the folder and configuration for this nginx; answers the command that runs it.

    Raises HostError when nginx is missing or refuses the text, with its own words.
    """
    program = nginx_program()
    path = Path(config.nginx_dir, "nginx.conf")
    text = render(plan_for(config, nginx_version(program)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error}") from error
    check(program, path)
    return [program, "-p", config.nginx_dir, "-c", str(path)]


def check(program: str, path: Path) -> None:
    """Raises CallerError, in nginx's own words, unless it would take the file."""
    done = _run([program, "-t", "-q", "-p", str(path.parent), "-c", str(path)])
    if done.returncode:
        words = " ".join(done.stderr.split())[:600]
        raise CallerError(f"nginx does not take {path}: {words}; correct api.toml")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{command[0]} did not run: {error}") from error


def main() -> int:
    """The command; answers its exit status."""
    try:
        sys.stdout.write(render(plan_for(load_config(), nginx_version(nginx_program()))))
    except VmcellError as error:
        sys.stderr.write(f"vmcell_api.nginx_files: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
