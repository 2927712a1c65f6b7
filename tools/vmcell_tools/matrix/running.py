"""All clients of the matrix against one service, one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from vmcell_protos.errors import HostError
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.matrix.clients import Client
from vmcell_tools.matrix.domain_front import DOMAIN, Address, DomainFront, domain_front
from vmcell_tools.matrix.installation import DRIVERS, command, install, missing_tool
from vmcell_tools.progress import Progress

OUTCOMES = ("ok", "refused", "failed", "absent")
TOLD_LINES = 5


@dataclass(frozen=True, kw_only=True)
class Service:
    """Where the API and the data plane are, and a key for them; `patience_s` for one call."""

    api_url: str
    sandbox_url: str
    key: str
    patience_s: int = 60
    client_within_s: int = 600


@dataclass(frozen=True, kw_only=True)
class Result:
    """One call of one client; `outcome` is one of OUTCOMES, `detail` the sentence when not ok."""

    call: str
    outcome: str
    detail: str = ""
    ms: int = 0


@dataclass(kw_only=True)
class Column:
    """One client's results in the order of its calls; `skipped` says why there are none."""

    client: Client
    results: list[Result] = field(default_factory=list)
    skipped: str = ""


def run_matrix(
    clients: Sequence[Client], service: Service, cache: BuildCache, progress: Progress
) -> list[Column]:
    """Runs each client's driver; raises HostError when one could not be installed or run."""
    columns = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmcell-matrix-")))
        front = stack.enter_context(
            domain_front(folder, _address(service.api_url), _address(service.sandbox_url))
        )
        for client in clients:
            skipped = missing_tool(client)
            if skipped is None:
                environment = install(client, cache, progress)
                progress.step(f"calls of {client.column}")
                results = _run_driver(client, environment, service, front, progress)
                columns.append(Column(client=client, results=results))
            else:
                progress.note(f"{client.column} is left out: {skipped}")
                columns.append(Column(client=client, skipped=skipped))
    return columns


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
    client: Client, environment: Path, service: Service, front: DomainFront, progress: Progress
) -> list[Result]:
    words = command(client, environment)
    with tempfile.TemporaryFile("w+") as errors:
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
