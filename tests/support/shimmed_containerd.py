"""A containerd with our own shim, a fake guest and a stand-in for envd, for tests of noded."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from dying_node import add_guest_addresses
from own_netns import own_netns
from private_containerd import PrivateContainerd

# Answers whatever it is asked; in the place of envd, which the fake guest runs here.
STAND_IN_ENVD = """#!{python} -ISB
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Envd(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lists = self.path.endswith("/ListDir")
        self.send_response(200 if lists else 204)
        self.end_headers()
        if lists:
            self.wfile.write(b'{{"entries": []}}')

    do_GET = do_POST

# All sandboxes of the test share one network, so any of them may get a request.
ThreadingHTTPServer.allow_reuse_port = True
ThreadingHTTPServer(("0.0.0.0", 49983), Envd).serve_forever()
"""

# /sys tells the interfaces of the namespace it was mounted in; the shim looks for its TAP there.
OWN_SYSFS = """
mount -t sysfs own /mnt
mount --bind /mnt/devices/virtual/net /sys/devices/virtual/net
mount --bind /mnt/class/net /sys/class/net
exec "$0" "$@"
"""


@contextlib.contextmanager
def shimmed_containerd(folder: Path) -> Iterator[PrivateContainerd]:
    """The daemon, in a network namespace of this process's own."""
    with own_netns():
        add_guest_addresses()
        daemon = PrivateContainerd(folder, fake_guest=True)
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
