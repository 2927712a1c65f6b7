"""`vmcell serve` around a real containerd with runc, in a network namespace of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from own_netns import own_netns
from real_containerd import RealContainerd, real_containerd
from stand_in_images import import_stand_ins

PATIENCE_S = 60
API_PORT, DATA_PORT = 3000, 3080


@dataclass(frozen=True, kw_only=True)
class WholeService:
    """The first sandboxes have the addresses 10.88.0.3, .5, …, which stand on the loopback."""

    process: subprocess.Popen[bytes]
    containerd: RealContainerd
    environment: dict[str, str]
    log: Path
    folder: Path
    systemd: socket.socket

    def new_key(self, *options: str, team: str = "one") -> str:
        """A fresh API key; `options` as `vmcell key create` takes them."""
        command = [sys.executable, "-m", "vmcell_tools", "key", "create", "--team", team, *options]
        done = subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=60
        )
        return done.stdout.split()[-1]

    def pid_of(self, part: str) -> int:
        """The process of "noded", "the API", "the router" or "nginx", the last that was told."""
        return int(re.findall(rf"{part} is process (\d+)", self.log.read_text())[-1])


def _write_config(
    folder: Path, containerd: RealContainerd, *, slot_count: int, workers: int
) -> Path:
    settings = {
        "database_url": f"sqlite:///{folder}/db/api.sqlite",
        "node_socket": f"{folder}/noded.sock",
        "route_socket": f"{folder}/route.sock",
        "nginx_dir": f"{folder}/nginx",
        "log_format": "json",
        "state_dir": f"{folder}/run",
        "metrics_dir": f"{folder}/metrics",
        "volumes_dir": f"{folder}/volumes",
        "upload_dir": f"{folder}/uploads",
        "build_dir": f"{folder}/builds",
        "containerd_socket": containerd.socket,
        "runtime": "io.containerd.runc.v2",
        "domain": "sbx.localhost",
        "slot_count": slot_count,
        "snapshot_dir": f"{folder}/snapshots",
        "template_snapshots": 0,  # runc saves nothing
        "workers": workers,
    }
    config = folder / "api.toml"
    config.write_text("".join(f"{key} = {json.dumps(v)}\n" for key, v in settings.items()))
    return config


@contextlib.contextmanager
def whole_service(*, slot_count: int = 1, workers: int = 1) -> Iterator[WholeService]:
    """Everything listens; afterwards all of it is gone, the network too."""
    with (
        tempfile.TemporaryDirectory(prefix="vms") as name,
        own_netns(),
        real_containerd(Path(name, "c")) as containerd,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
    ):
        folder = Path(name)
        # Its mode stays 0700, as `vmcell setup` makes /run/vmcell: noded opens the way.
        for number in range(1, slot_count + 1):
            command = ["ip", "addr", "add", f"10.88.0.{2 * number + 1}/32", "dev", "lo"]
            subprocess.run(command, check=True)
        import_stand_ins(containerd)
        config = _write_config(folder, containerd, slot_count=slot_count, workers=workers)
        systemd.bind(f"{folder}/notify")
        systemd.settimeout(PATIENCE_S)
        environment = {
            **os.environ,
            "VMCELL_API_CONFIG": str(config),
            "NOTIFY_SOCKET": f"{folder}/notify",
        }
        log = folder / "serve.log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", "vmcell_api.serve"]
            process = subprocess.Popen(command, env=environment, stderr=output, stdout=output)
        running = WholeService(
            process=process,
            containerd=containerd,
            environment=environment,
            log=log,
            folder=folder,
            systemd=systemd,
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            while "API on" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield running
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
            command = [sys.executable, "-m", "vmcell_api.node", "--teardown"]
            subprocess.run(command, env=environment, check=True, timeout=PATIENCE_S)


def ask(port: int, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
    """Status and JSON body; underscores in names of `headers` become dashes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, body=data, headers=named)
        answer = connection.getresponse()
        text = answer.read()
        if answer.headers.get_content_type() == "text/plain":
            return answer.status, {"text": text.decode()}
        return answer.status, json.loads(text) if text else {}
    finally:
        connection.close()


def children_of(pid: int) -> list[int]:
    """All descendants of a process that are there now."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid:
                    found += [int(entry.name), *children_of(int(entry.name))]
    return found
