"""`vmcell setup` as an operator runs it, in a mount namespace with copies of /etc and others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

PLACES = ("/etc", "/usr/local/bin", "/run", "/var/lib")
SCRIPT = """\
set -eu
mount -t tmpfs tmpfs "$1"
shift
for place in {places}; do
  layer="$PWD/layers$place"
  mkdir -p "$layer/upper" "$layer/work"
  mount -t overlay -o "lowerdir=$place,upperdir=$layer/upper,workdir=$layer/work" overlay "$place"
done
exec "$@"
"""


def _in_a_copy(folder: Path, script: str) -> str:
    """Standard output of a shell script that may change this host's configuration."""
    command = ["unshare", "--mount", "sh", "-c", SCRIPT.format(places=" ".join(PLACES)), "sh"]
    done = subprocess.run(
        [*command, str(folder), "sh", "-euc", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_setup_with_a_domain_and_back(tmp_path: Path) -> None:
    vmcell = f"{sys.executable} -m vmcell_tools"
    setup = f"{vmcell} setup --kernel /bin/true --base-image /bin/true --tls-domain sbx.test:8443"
    told = _in_a_copy(
        tmp_path,
        f"""
        rm -f /run/containerd/containerd.sock
        {setup} --without-code-interpreter --json
        echo ----
        {setup} --without-templates --json
        echo ----
        openssl verify -CAfile /etc/vmcell/tls/ca.pem /etc/vmcell/tls/server.pem
        mkdir -p /run/vmcell/nginx
        $(command -v nginx || echo /usr/sbin/nginx) -t -c /etc/vmcell/nginx.conf 2>&1
        cat /etc/systemd/system/vmcell.service
        echo ----
        {vmcell} setup --uninstall --json
        ls /etc/vmcell
        """,
    )
    first, second, checks, uninstalled = told.split("----\n")
    lines = json.loads(first)
    for name in ("nginx.conf", "vmcell.service", "vmcell-nginx.service", "api.toml", "ca.pem"):
        assert any(line.startswith(("wrote", "made")) and name in line for line in lines), name
    (template,) = (line for line in lines if line.startswith("template"))
    assert template.startswith("template base: ")
    assert template.endswith("start it, then run: vmcell image import base")
    assert any("E2B_DOMAIN=sbx.test:8443" in line for line in lines)
    again = ("wrote", "made", "template")
    assert not [line for line in json.loads(second) if line.startswith(again)]
    assert "server.pem: OK" in checks
    assert "test is successful" in checks
    assert "-m vmcell_api.serve --no-nginx" in checks
    assert uninstalled.endswith("api.toml\ntls\n"), "the operator's"
