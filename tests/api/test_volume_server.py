"""The server of volume files as it runs: confined, over gunicorn, with the SDK's own streams."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2b import Volume
from e2b.exceptions import NotFoundException, VolumeException

from vmcell_api.volumes.confinement import KEPT
from vmcell_api.volumes.folders import VolumeFolders
from vmcell_api.volumes.names import new_volume_id
from vmcell_api.volumes.token import load_tokens

pytestmark = pytest.mark.root

PATIENCE_S = 30


@dataclass(frozen=True, kw_only=True)
class Running:
    """The process, a volume by the SDK, and its directory."""

    process: subprocess.Popen[bytes]
    volume: Volume
    folder: Path
    top: Path
    port: int

    @property
    def worker(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (pid,) = children.read_text().split()
        return int(pid)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    top = tmp_path / "volumes"
    config = tmp_path / "api.toml"
    config.write_text(f'volumes_dir = "{top}"\nvolume_bind = "127.0.0.1:{port}"\n')
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vmcell_api.volume_server"],
            env={**os.environ, "VMCELL_API_CONFIG": str(config)},
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _answers(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        folders = VolumeFolders(str(top))
        volume_id = new_volume_id()
        folders.make(volume_id)
        token = load_tokens(folders.key_path).mint(volume_id)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("E2B_VOLUME_API_URL", f"http://127.0.0.1:{port}")
            volume = Volume(volume_id=volume_id, name="data", token=token)
            folder = Path(folders.path(volume_id))
            yield Running(process=process, volume=volume, folder=folder, top=top, port=port)
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_the_worker_sees_the_volumes_and_nothing_else(running: Running) -> None:
    pid = running.worker
    status = _status(pid)
    assert status["Uid"].split() == ["99002"] * 4
    assert status["Gid"].split() == ["99002"] * 4
    assert status["Groups"] == ""
    for name in ("CapEff", "CapPrm", "CapBnd"):
        assert int(status[name], 16) == KEPT, name
    for name in ("CapInh", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    for kind in ("mnt", "net", "ipc"):
        ours, theirs = (os.readlink(f"/proc/{who}/ns/{kind}") for who in ("self", pid))
        assert ours != theirs, kind
    assert sorted(os.listdir(f"/proc/{pid}/root")) == ["data", "token.key", "trash", "uploads"]
    (mounted,) = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    assert {"nosuid", "nodev", "noexec"} <= set(mounted.split()[5].split(","))
    kinds = {_kind(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    assert not {kind for kind in kinds if kind.startswith("/") and "log" not in kind} - {
        *(f"/{name}" for name in ("data", "trash", "uploads")),
        "/dev/null",
    }, kinds


def _kind(path: Path) -> str:
    target = os.readlink(path)
    return "" if "wgunicorn" in target or "(deleted)" in target else target


def test_owners_and_modes(running: Running) -> None:
    volume = running.volume
    made = volume.write_file("/plain", "x")
    assert (made.uid, made.gid, made.mode) == (1000, 1000, 0o644)
    made = volume.write_file("/owned", "x", uid=0, gid=5, mode=0o600)
    assert (made.uid, made.gid, made.mode) == (0, 5, 0o600)
    assert volume.read_file("/owned") == "x", "whoever has the token reads all"
    made = volume.make_dir("/dir/below", uid=1001, gid=1002, mode=0o711, force=True)
    assert (made.uid, made.gid, made.mode) == (1001, 1002, 0o711)
    assert volume.get_info("/dir").uid == 1001
    changed = volume.update_metadata("/plain", uid=1001, gid=1001, mode=0o755)
    assert (changed.uid, changed.gid, changed.mode) == (1001, 1001, 0o755)
    changed = volume.update_metadata("/plain", gid=7)
    assert (changed.uid, changed.gid, changed.mode) == (1001, 7, 0o755)
    # as guest root leaves it: closed to everybody, and full
    secret = running.folder / "closed"
    secret.mkdir(mode=0o700)
    (secret / "file").write_text("inside")
    (secret / "file").chmod(0)
    assert volume.read_file("/closed/file") == "inside"
    volume.write_file("/closed/file", "new", force=True)
    volume.remove("/closed")
    assert not secret.exists()


def test_streams_of_fifty_megabytes(running: Running) -> None:
    content = os.urandom(1 << 20) * 50
    written = running.volume.write_file("/big", io.BytesIO(content))
    assert written.size == len(content)
    digest = hashlib.sha256()
    for part in running.volume.read_file("/big", format="stream"):
        digest.update(part)
    assert digest.digest() == hashlib.sha256(content).digest()
    running.volume.write_file("/text", io.StringIO("ä" * 100_000))
    assert running.volume.read_file("/text") == "ä" * 100_000
    assert os.listdir(running.top / "uploads") == []


def test_hostile_entries(running: Running) -> None:
    volume, folder = running.volume, running.folder
    os.mknod(folder / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to("/token.key")
    (folder / "up").symlink_to("../../token.key")
    (folder / "trash").symlink_to("/trash")
    neighbour = folder.parent / new_volume_id()
    neighbour.mkdir()
    (neighbour / "file").write_text("another team's")
    (folder / "neighbour").symlink_to(f"../{neighbour.name}")
    shown = {entry.name: entry.type.value for entry in volume.list("/", depth=3)}
    links = dict.fromkeys(("link", "up", "trash", "neighbour"), "symlink")
    assert shown == {"null": "unknown", "fifo": "unknown", **links}
    for path in (*shown, "neighbour/file"):
        with pytest.raises(VolumeException):
            volume.read_file(path)
        with pytest.raises(VolumeException):
            volume.write_file(path, "x", force=True)
        with pytest.raises(VolumeException):
            volume.update_metadata(path, mode=0o777)
        with pytest.raises(VolumeException):
            volume.list(path)
    for path in shown:
        volume.remove(path)
    assert os.listdir(folder) == []
    assert (neighbour / "file").read_text() == "another team's"
    for path in ("../token.key", "/../../etc/passwd", "a/../../b"):
        with pytest.raises(VolumeException):
            volume.read_file(path)
    with pytest.raises(NotFoundException):
        volume.read_file("/etc/passwd")


def test_a_client_that_goes_away_leaves_nothing(running: Running) -> None:
    """Half a body, then the end of the connection; the old file stays."""
    running.volume.write_file("/kept", "old")
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE_S) as client:
        client.sendall(
            f"PUT /volumecontent/{running.volume.volume_id}/file?path=kept&force=true HTTP/1.1\r\n"
            f"Host: x\r\nAuthorization: Bearer {running.volume.token}\r\n"
            "Content-Length: 1000000\r\n\r\nhalf".encode()
        )
        deadline = time.monotonic() + PATIENCE_S
        while not os.listdir(running.top / "uploads"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    while os.listdir(running.top / "uploads"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert running.volume.read_file("/kept") == "old"


def test_a_chunked_body_and_a_bad_one(running: Running) -> None:
    def put(body: bytes) -> tuple[int, dict]:
        with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE_S) as client:
            client.sendall(
                f"PUT /volumecontent/{running.volume.volume_id}/file?path=c&force=true HTTP/1.1\r\n"
                f"Host: x\r\nAuthorization: Bearer {running.volume.token}\r\n"
                "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
                + body
            )
            client.shutdown(socket.SHUT_WR)
            answer = http.client.HTTPResponse(client)
            answer.begin()
            return answer.status, json.loads(answer.read())

    status, entry = put(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    assert (status, entry["size"]) == (201, 5)
    status, body = put(b"5\r\nabc")
    assert (status, body["code"]) == (400, "invalid_argument")
    assert running.volume.read_file("/c") == "abcde"


def test_it_does_not_serve_unconfined(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "api.toml"
    config.write_text(f'volumes_dir = "{tmp_path}/v"\nvolume_bind = "127.0.0.1:{port}"\n')
    without = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    done = subprocess.run(
        [*without, sys.executable, "-m", "vmcell_api.volume_server"],
        env={**os.environ, "VMCELL_API_CONFIG": str(config)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode != 0
    assert "cannot confine the server of volume files" in done.stderr, done.stderr
