"""One client of the matrix against a service."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from vmcell_protos.errors import HostError
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.matrix.clients import Client
from vmcell_tools.matrix.domain_front import DOMAIN, Address, DomainFront, domain_front
from vmcell_tools.matrix.installation import DRIVERS, command, install, missing_tool
from vmcell_tools.matrix.services import Service, Services
from vmcell_tools.progress import Progress

OUTCOMES = ("ok", "refused", "failed", "absent")
TOLD_LINES = 5


@dataclass(frozen=True, kw_only=True)
class Result:
    """One call of one client; `outcome` is one of OUTCOMES, `detail` the sentence when not ok."""

    call: str
    outcome: str
    detail: str = ""
    ms: int = 0


@dataclass(kw_only=True)
class Column:
    """One client's results in the order of its calls; `skipped` says why there are none, `again`
    why it was run twice, `day` is that of the run (2026-01-31)."""

    client: Client
    results: list[Result] = field(default_factory=list)
    skipped: str = ""
    again: str = ""
    day: str = ""


def run_client(client: Client, services: Services, cache: BuildCache, progress: Progress) -> Column:
    """Makes a client's calls; raises HostError when it could not be installed or run.

    Calls that failed while the service's machine was lost are made once more, all of them.
    """
    skipped = missing_tool(client)
    if skipped is not None:
        progress.note(f"{client.column} is left out: {skipped}")
        return Column(client=client, skipped=skipped)
    environment = install(client, cache, progress)
    again = ""
    while True:
        service = services.get()
        progress.step(f"calls of {client.column}")
        try:
            results = _run_driver(client, environment, service, progress)
        except HostError:
            lost = services.lost()
            if again or not lost:
                raise
        else:
            lost = services.lost()
            failed = any(result.outcome == "failed" for result in results)
            if again or not (lost and failed):
                day = datetime.date.today().isoformat()
                return Column(client=client, results=results, again=again, day=day)
        again = lost
        progress.note(f"{client.column} is run again: {lost}")


def _address(url: str) -> Address:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise HostError(f"{url!r} is no http:// address of a service")
    return parts.hostname, parts.port or 80


def _variables(
    client: Client, environment: Path, service: Service, front: DomainFront
) -> dict[str, str]:
    """What the driver sees: the service as this client finds it, and nothing of another one."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("E2B_", "CUBE_", "PYTHON"))
    }
    variables = {
        "E2B_API_KEY": service.key,
        "VMCELL_MATRIX_PATIENCE_S": str(service.patience_s),
        "VMCELL_MATRIX_ENVIRONMENT": str(environment),
        "PYTHONPATH": str(DRIVERS),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if client.finds_by == "urls":
        variables |= {"E2B_API_URL": service.api_url, "E2B_SANDBOX_URL": service.sandbox_url}
        if service.volume_url:
            variables["E2B_VOLUME_API_URL"] = service.volume_url
    elif client.finds_by == "domain":
        variables |= {
            "E2B_DOMAIN": front.domain,
            "SSL_CERT_FILE": str(front.authority),
            "NODE_EXTRA_CA_CERTS": str(front.authority),
        }
    else:
        host, port = _address(service.sandbox_url)
        variables |= {
            "CUBE_API_URL": service.api_url,
            "CUBE_API_KEY": service.key,
            "CUBE_PROXY_NODE_IP": host,
            "CUBE_PROXY_PORT_HTTP": str(port),
            "CUBE_SANDBOX_DOMAIN": DOMAIN,
        }
    return {**kept, **variables}


def _run_driver(
    client: Client, environment: Path, service: Service, progress: Progress
) -> list[Result]:
    words = command(client, environment)
    with (
        tempfile.TemporaryDirectory(prefix="vmcell-matrix-") as folder,
        domain_front(
            Path(folder), _address(service.api_url), _address(service.sandbox_url)
        ) as front,
        tempfile.TemporaryFile("w+") as errors,
    ):
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_variables(client, environment, service, front),
        )
        try:
            output, _ = process.communicate(timeout=service.client_within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            progress.note(f"{client.column} was ended after {service.client_within_s} s")
        errors.seek(0)
        said = errors.read()
    results = [_result(line) for line in output.splitlines() if line.startswith("{")]
    if not results:
        tail = "\n".join(said.splitlines()[-TOLD_LINES:])
        raise HostError(f"the driver of {client.column} made no call:\n{tail}")
    return results


def _result(line: str) -> Result:
    found = Result(**json.loads(line))
    if found.outcome not in OUTCOMES:
        raise HostError(f"a driver printed the outcome {found.outcome!r}; known: {OUTCOMES}")
    return found
