"""gunicorn as it is set up for both applications."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_S = 30
SERVER = """
import sys
import falcon
from vmcell_api.resources import Health
from vmcell_api.web_server import WebServer, serve

def make_app():
    app = falcon.App()
    app.add_route("/health", Health())
    return app

serve(WebServer(name="t", bind=sys.argv[1], workers=1, threads=2, read_timeout_s=1), make_app)
"""


def test_clients_that_stop_in_a_request_do_not_hold_the_threads(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SERVER, f"127.0.0.1:{port}"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stderr=log, stdout=log)
    stalled: list[socket.socket] = []
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _is_well(port):
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
        for _ in range(4):
            stalled.append(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S))
            stalled[-1].send(b"GET /health HT")
        for connection in stalled:
            assert b"200" not in connection.recv(1000), "closed, or told so"
        assert _is_well(port)
    finally:
        for connection in stalled:
            connection.close()
        server.terminate()
        server.wait(PATIENCE_S)


def _is_well(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except ConnectionRefusedError:
        return False
    finally:
        connection.close()
