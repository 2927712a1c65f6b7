"""A real envd on this host: pid 1 of its own pid and mount namespace, in a root of its own.

It is started as the agent starts it: everything imported first, then into the container's root,
where an import hook refuses every further import. The root holds this machine's /usr read-only and
its own /etc, /home, /proc, /dev and /tmp; the network is the host's loopback.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEADLINE_SECONDS = 30.0
ENVD_PORT = 49983
SOURCE_ROOT = Path(__file__).resolve().parents[2]
USER_UID = 1000

_PASSWD = """\
root:x:0:0:root:/root:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
user:x:1000:1000:user:/home/user:/bin/bash
"""
_GROUP = """\
root:x:0:
tty:x:5:
staff:x:50:user
user:x:1000:
nogroup:x:65534:
"""

_DRIVER = """
import json, os, subprocess, sys
config = json.loads(sys.argv[1])
sys.path[:0] = config["path"]
from vmcell_agent.envd import serve

root = config["root"]
def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)

mount("--make-rprivate", "/")
mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", root)
for name in ("etc", "home/user", "root", "proc", "dev", "tmp", "usr", "run", "var", "low", "sys"):
    os.makedirs(f"{root}/{name}")
os.chmod(f"{root}/tmp", 0o1777)
os.chmod(f"{root}/root", 0o700)
os.chown(f"{root}/home/user", 1000, 1000)
for name in ("bin", "sbin", "lib", "lib64"):
    os.symlink(f"usr/{name}", f"{root}/{name}")
for name, text in config["etc"].items():
    with open(f"{root}/etc/{name}", "w") as file:
        file.write(text)
mount("--bind", "/usr", f"{root}/usr")
mount("-o", "remount,bind,ro", f"{root}/usr")
mount("-t", "proc", "proc", f"{root}/proc")
mount("-t", "sysfs", "-o", "ro", "sysfs", f"{root}/sys")
mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", f"{root}/dev")
mount("-t", "tmpfs", "-o", f"mode=777,size={config['small_disk_bytes']}", "tmpfs", f"{root}/low")
for name in ("null", "zero", "full", "random", "urandom", "tty"):
    open(f"{root}/dev/{name}", "w").close()
    mount("--bind", f"/dev/{name}", f"{root}/dev/{name}")
os.makedirs(f"{root}/dev/pts")
mount("-t", "devpts", "-o", "newinstance,ptmxmode=666,mode=620,gid=5", "devpts", f"{root}/dev/pts")
os.symlink("pts/ptmx", f"{root}/dev/ptmx")

class NoImports:
    def find_spec(self, name, path=None, target=None):
        os.write(2, f"LATE IMPORT {name}\\n".encode())
        raise ImportError(f"{name} is imported inside the container")

def clock(unix_ns):
    with open("/run/clock", "w") as file:
        file.write(str(unix_ns))

environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "IMAGE_VARIABLE": "from the image"}
os.chroot(root)
os.chdir("/")
sys.meta_path.insert(0, NoImports())
sys.path.clear()
sys.path_importer_cache.clear()

if config["address"]:
    serve._listen_everywhere = lambda port: [
        serve._listen(serve.socket.AF_INET, config["address"], port)
    ]

def ready():
    os.write(config["ready"], b"ready")
    os.close(config["ready"])

serve.run(port=config["port"], ready=ready, environment=environment, clock=clock)
"""


class Envd:
    """A running server: `url`, `pid` of pid 1 as this host sees it, `root` as this host sees it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    @property
    def pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])

    def children(self) -> list[int]:
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    def open_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def path(self, inside: str) -> Path:
        """A path inside the container's root, from outside."""
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    def output(self) -> str:
        return self.log.read_text()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_SECONDS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_envd(
    folder: Path, *, etc: dict[str, str] | None = None, address: str = ""
) -> Iterator[Envd]:
    """Start envd with its files under `folder`; afterwards all of its container is gone.

    With `address`, one of the loopback's own, it listens there on envd's usual port, so that
    several stand beside each other as sandboxes do; else everywhere on a free port.

    What it wrote to stderr must be free of bugs and of late imports; that is asserted here, so
    every test that uses a server is a test of both.
    """
    root = folder / "root"
    root.mkdir(parents=True)
    log = folder / "stderr"
    port = ENVD_PORT if address else free_port()
    read, write = os.pipe()
    config: dict[str, Any] = {
        "root": str(root),
        "port": port,
        "address": address,
        "ready": write,
        "path": [path for path in sys.path if path],
        "etc": {"passwd": _PASSWD, "group": _GROUP, **(etc or {})},
        "small_disk_bytes": 1 << 20,
    }
    driver = [sys.executable, "-c", _DRIVER, json.dumps(config)]
    unshare = ["unshare", "--pid", "--mount", "--fork", "--kill-child=KILL"]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*unshare, *driver],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=[write],
            cwd=SOURCE_ROOT,
        )
    os.close(write)
    try:
        readable, _, _ = select.select([read], [], [], DEADLINE_SECONDS)
        if not readable or os.read(read, 16) != b"ready":
            raise AssertionError(f"envd did not become ready: {log.read_text()}")
        yield Envd(process, port, log)
    finally:
        os.close(read)
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE_SECONDS)
        shutil.rmtree(root)
    noise = log.read_text()
    assert "LATE IMPORT" not in noise, noise
    assert "envd: bug" not in noise, noise


def wait_until(condition: Any, what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    """Poll until `condition()` is true and return it; AssertionError naming `what` otherwise."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds} s in vain for {what}")
