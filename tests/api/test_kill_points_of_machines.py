"""noded killed (SIGKILL) where a machine is there, or comes or goes, with our own shim.

The guest is a fake; what is looked at is whether shim, monitor and their files are gone as well.
The other points are test_kill_points.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dying_node import add_guest_addresses, noded_dies, order_of, wait_until, write_config
from kill_points import NODED_POINTS
from own_netns import own_netns
from private_containerd import IMAGE as LAYERS
from private_containerd import PrivateContainerd
from real_containerd import RealContainerd

pytestmark = pytest.mark.root

# Answers whatever it is asked; in the place of envd, which the fake guest runs here.
STAND_IN_ENVD = """#!{python} -ISB
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Envd(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(204)
        self.end_headers()

    do_GET = do_POST

ThreadingHTTPServer(("0.0.0.0", 49983), Envd).serve_forever()
"""

# /sys tells the interfaces of the namespace it was mounted in; the shim looks for its TAP there.
OWN_SYSFS = """
mount -t sysfs own /mnt
mount --bind /mnt/devices/virtual/net /sys/devices/virtual/net
mount --bind /mnt/class/net /sys/class/net
exec "$0" "$@"
"""


@pytest.fixture(scope="module")
def shimmed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateContainerd]:
    """A containerd with our own shim and a fake guest."""
    with own_netns():
        add_guest_addresses()
        daemon = PrivateContainerd(tmp_path_factory.mktemp("shimmed"), fake_guest=True)
        daemon.command = ["unshare", "--mount", "sh", "-ec", OWN_SYSFS, *daemon.command]
        envd = daemon.directory / "bin/envd"
        envd.write_text(STAND_IN_ENVD.format(python=sys.executable))
        envd.chmod(0o755)
        daemon.start()
        try:
            assert daemon.ctr("namespaces", "create", "vmcell").returncode == 0
            daemon.import_image("vmcell")
            yield daemon
        finally:
            daemon.kill()


# Where a machine is there, or comes or goes: the shim and its monitor must be gone as well.
SHIM_POINTS = [
    name for name, point in NODED_POINTS.items() if point.call.endswith(("_task", "initialise"))
]


@pytest.mark.parametrize("name", SHIM_POINTS)
def test_noded_killed_with_our_shim(name: str, shimmed: PrivateContainerd, tmp_path: Path) -> None:
    containerd = RealContainerd(
        folder=shimmed.directory, socket=str(shimmed.socket), log=shimmed.log
    )
    config = write_config(containerd.socket, "io.containerd.vmcell.v2", tmp_path)
    noded_dies(name, containerd, config, tmp_path, order_of(LAYERS))
    wait_until(lambda: not shimmed.leftovers(), f"{shimmed.leftovers()}")
