"""The SDKs with E2B_DOMAIN alone: API and a real envd behind nginx, TLS and a local CA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cubesandbox
import envd_harness
import httpx
import js_clients
import pytest
import sdk_domain_mode
from api_service import api_service
from data_plane import PATIENCE_S, DataPlane, data_plane
from envd_harness import running_envd
from own_netns import own_netns

from vmcell_api.node_client import NewSandbox
from vmcell_tools.local_ca import ensure_certificate

pytestmark = pytest.mark.root

TLS_PORT = 8443
DOMAIN = f"sbx.localhost:{TLS_PORT}"


@pytest.fixture(scope="module")
def javascript() -> str:
    """Why there is no JavaScript SDK, "" when there is one."""
    return js_clients.install()


@pytest.fixture(scope="module")
def network(javascript: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataPlane]:
    """nginx, API and router in a network of their own, where envd's port is free."""
    folder = tmp_path_factory.mktemp("domain")
    files, _ = ensure_certificate(folder / "tls", DOMAIN.partition(":")[0])
    with (
        own_netns(),
        pytest.MonkeyPatch.context() as patch,
        api_service(folder, domain=DOMAIN) as service,
        data_plane(service, 49983, folder / "nginx", tls=files, tls_port=TLS_PORT) as running,
    ):
        patch.setattr(envd_harness, "free_port", lambda: 49983)
        for name in ("E2B_API_URL", "E2B_SANDBOX_URL", "E2B_DEBUG"):
            patch.delenv(name, raising=False)
        patch.setenv("E2B_DOMAIN", DOMAIN)
        patch.setenv("E2B_API_KEY", service.key)
        patch.setenv("SSL_CERT_FILE", str(files.authority))
        yield running


@pytest.fixture
def plane(network: DataPlane, tmp_path: Path) -> Iterator[DataPlane]:
    """Every sandbox of the fake node is the one envd of the test, at its usual port."""
    with running_envd(tmp_path / "envd") as envd:
        network.service.node.on_create = _Initialiser(envd.url)
        yield network


class _Initialiser:
    """What noded tells envd. One envd serves all sandboxes of a test."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._token = ""

    def __call__(self, order: NewSandbox) -> None:
        body = {
            "accessToken": order.access_token,
            "envVars": order.environment,
            "defaultUser": order.default_user,
        }
        headers = {"X-Access-Token": self._token}
        answer = httpx.post(f"{self._url}/init", json=body, headers=headers, timeout=PATIENCE_S)
        assert answer.status_code == 204, answer.text
        self._token = order.access_token


@pytest.mark.parametrize("http_version", ["2", "1.1"])
def test_python_needs_the_domain_alone(plane: DataPlane, http_version: str) -> None:
    with subprocess.Popen(
        [sys.executable, sdk_domain_mode.__file__],
        env={**os.environ, "E2B_HTTP_VERSION": http_version},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        told = json.loads(program.stdout.readline())
        assert told["host"] == f"8080-{told['id']}.{DOMAIN}"
        assert told["stdout"] == "from python\nuser\n"
        assert told["read"] == "content é"
        assert told["streamed"].split() == [str(number) for number in range(1, 301)]
        assert told["id"] in told["listed"]
        assert told["was_running"] is True
        assert _fetch(plane, told["download"]) == (200, "content é")
        status, text = _fetch(plane, f"https://{told['host']}/")
        assert (status, "port is not open" in text) == (502, True)
        told = json.loads(program.communicate("\n", timeout=PATIENCE_S)[0])
    assert (told["killed"], told["running"]) == (True, False)
    assert "not found" in told["error"]


def _fetch(plane: DataPlane, url: str) -> tuple[int, str]:
    """As a browser would, but for the resolver."""
    parts = httpx.URL(url)
    with httpx.Client(verify=plane.tls_context(), timeout=PATIENCE_S) as client:
        answer = client.get(
            parts.copy_with(host="127.0.0.1"),
            headers={"Host": parts.netloc.decode()},
            extensions={"sni_hostname": parts.host},
        )
    return answer.status_code, answer.text


@pytest.mark.timeout(400)
def test_javascript_needs_the_domain_alone(javascript: str, plane: DataPlane) -> None:
    if javascript == js_clients.NO_NPM:
        pytest.skip(javascript)
    assert not javascript
    told = js_clients.run("domain_mode.mjs", NODE_EXTRA_CA_CERTS=str(plane.authority))
    assert told["host"] == f"8080-{told['id']}.{DOMAIN}"
    assert told["stdout"] == "from js\nuser\n"
    assert told["read"] == told["signed"] == "content é"
    assert told["streamed"] == "1\n2\n3\n"
    assert told["id"] in told["listed"]
    assert told["killed"] is True
    assert told["running"] is False
    assert told["error"].startswith("SandboxNotFoundError: ")


def test_cubesandbox_goes_by_the_host_name_on_the_plain_port(plane: DataPlane) -> None:
    """That client sends no routing headers, and its API key to the data plane too."""
    config = cubesandbox.Config(
        api_url=plane.api_url,
        api_key=plane.service.key,
        proxy_node_ip="127.0.0.1",
        proxy_port=plane.port,
    )
    with cubesandbox.Sandbox.create(
        template="base", envs={"WHO": "cube"}, config=config
    ) as sandbox:
        done = sandbox.commands.run("echo from $WHO; id -un; exit 3")
        assert (done.stdout, done.exit_code) == ("from cube\nroot\n", 3)
        sandbox.files.write("/tmp/c d", "content é")
        assert sandbox.files.read("/tmp/c d") == "content é"
        assert sandbox.get_host(80) == f"80-{sandbox.sandbox_id}.{DOMAIN}"
