"""Layers and images that a build writes, on a real containerd; run and checked by its own tools."""

from __future__ import annotations

import http.server
import io
import json
import subprocess
import tarfile
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from real_containerd import RealContainerd, real_containerd, write_image

from vmcell_api.node import image_pull
from vmcell_api.node.build_images import BuildImages
from vmcell_api.node.containerd import Containerd
from vmcell_api.node.image_json import ImageState
from vmcell_api.node.image_pull import RegistryLogin
from vmcell_protos.errors import CallerError, HostError

pytestmark = pytest.mark.root
IMAGE = "docker.io/test/plain:1"
FILES = {
    "etc/gone": (b"below", 0o644),
    "etc/passwd": (b"root:x:0:0:root:/:/bin/sh\n", 0o644),
    "etc/group": (b"root:x:0:\n", 0o644),
}
TEAM = "11111111-2222-3333-4444-555555555555"


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealContainerd]:
    with real_containerd(Path(tempfile.mkdtemp(prefix="vmc"))) as running:
        archive = running.folder / "image.tar"
        busybox = Path("/bin/busybox").read_bytes()
        write_image(archive, IMAGE, FILES | {"bin/sh": (busybox, 0o755)})
        running.ctr("images", "import", "--no-unpack", str(archive))
        yield running


@pytest.fixture
def images(daemon: RealContainerd) -> Iterator[BuildImages]:
    containerd = Containerd(daemon.socket, namespace="vmcell", snapshotter="overlayfs")
    containerd.ensure_namespace()
    yield BuildImages(containerd, daemon.socket, cache_limit=3)
    containerd.close()
    assert daemon.ctr("leases", "list", "-q").split() == []
    assert not [row for row in daemon.traces()["snapshots"] if "unpack" in row]


def _layer(files: dict[str, bytes]) -> list[bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            tar.addfile(info, io.BytesIO(content))
    data = buffer.getvalue()
    return [data[start : start + 1000] for start in range(0, len(data), 1000)]


def _built(images: BuildImages, build_id: str, files: dict[str, bytes]) -> str:
    with images.lease(build_id) as lease:
        _, state = images.base(IMAGE, None, lambda: False)
        state = images.add_layer(state, iter(_layer(files)), f"{lease}-1", lease, 1 << 20)
        state = replace(state, environment={"COLOUR": "red"}, user="root", workdir="/etc")
        return images.publish(build_id, state, lease)


def test_a_layer_becomes_an_image_that_outlives_its_lease(
    daemon: RealContainerd, images: BuildImages
) -> None:
    build_id = str(uuid.uuid4())
    name = _built(images, build_id, {"etc/new": b"above\n", "etc/.wh.gone": b""})
    assert name == f"vmcell.local/build/{build_id}"
    # A collection runs after each removal with sync; what is not referred to goes.
    daemon.ctr("content", "prune", "references")
    assert "complete" in daemon.ctr("images", "check", f"name=={name}")
    script = "cat new; [ -e gone ] || echo gone; echo $COLOUR; pwd"
    output = daemon.ctr(
        "run", "--rm", "--net-host", name, f"t{build_id[:8]}", "/bin/sh", "-c", script
    )
    assert output.split() == ["above", "gone", "red", "/etc"]
    images.forget(build_id)
    images.forget(build_id)
    assert name not in daemon.ctr("images", "list", "-q")


def test_the_same_layer_twice_and_an_empty_one(images: BuildImages) -> None:
    with images.lease("twice") as lease:
        _, state = images.base(IMAGE, None, lambda: False)
        pieces = _layer({"etc/same": b"same"})
        first = images.add_layer(state, iter(pieces), f"{lease}-a", lease, 1 << 20)
        second = images.add_layer(state, iter(pieces), f"{lease}-b", lease, 1 << 20)
        assert first == second
        assert images.add_layer(state, iter([bytes(1024)]), f"{lease}-c", lease, 1 << 20) == state


def test_a_layer_that_is_too_large_or_breaks_off_leaves_nothing(
    daemon: RealContainerd, images: BuildImages
) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(4096)
        raise HostError("the layer broke off")

    before = set(daemon.ctr("content", "list", "-q").split())
    with images.lease("broken") as lease:
        _, state = images.base(IMAGE, None, lambda: False)
        with pytest.raises(CallerError, match="more than 1 MiB") as caught:
            images.add_layer(state, iter([bytes(2 << 20)]), f"{lease}-a", lease, 1 << 20)
        assert caught.value.code == "resource_exhausted"
        with pytest.raises(HostError, match="broke off"):
            images.add_layer(state, broken(), f"{lease}-b", lease, 1 << 20)
    assert set(daemon.ctr("content", "list", "-q").split()) <= before
    assert "vmcell-build" not in daemon.ctr("content", "active")


def test_what_is_no_tar_is_refused_by_containerd(images: BuildImages) -> None:
    with images.lease("nonsense") as lease:
        _, state = images.base(IMAGE, None, lambda: False)
        bad = images.add_layer(state, iter([b"\x01" * 4096]), f"{lease}-a", lease, 1 << 20)
        with pytest.raises((CallerError, HostError), match="layer"):
            images.unpack(bad, lease)


def test_the_cache_forgets_the_least_recently_used(
    daemon: RealContainerd, images: BuildImages
) -> None:
    with images.lease("cache") as lease:
        _, state = images.base(IMAGE, None, lambda: False)
        kept: dict[str, ImageState] = {}
        for number in range(5):
            kept[f"{number}" * 64] = replace(state, environment={"N": str(number)})
            images.keep(f"{number}" * 64, TEAM, kept[f"{number}" * 64], lease)
        assert images.cached("0" * 64) == kept["0" * 64]
        assert images.prune() == 2
    found = {key[0] for key in kept if images.cached(key) is not None}
    assert found == {"0", "3", "4"}
    assert images.cached("f" * 64) is None
    for key in kept:
        daemon.ctr("images", "rm", f"vmcell.local/cache/{key}")


@pytest.fixture
def registry(daemon: RealContainerd) -> Iterator[tuple[str, list[str]]]:
    """A registry on the loopback with one image, for user `me` with password `pass word$`."""
    archive = daemon.folder / "pulled.tar"
    write_image(archive, "x", {"etc/pulled": (b"yes", 0o644)})
    with tarfile.open(archive) as tar:
        blobs = {
            member.name: tar.extractfile(member).read()  # type: ignore[union-attr]  # files only
            for member in tar.getmembers()
        }
    manifest = json.loads(blobs["index.json"])["manifests"][0]["digest"]
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.headers.get("Authorization") != "Basic bWU6cGFzcyB3b3JkJA==":
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="test"')
                self.end_headers()
                return
            digest = manifest if self.path.endswith("/1") else self.path.rpartition("/")[2]
            data = blobs.get(f"blobs/sha256/{digest[7:]}")
            self.send_response(200 if data is not None else 404)
            if digest == manifest:
                self.send_header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
                self.send_header("Docker-Content-Digest", manifest)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data or b"")

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join(10)
    server.server_close()


def test_an_image_is_pulled_with_a_login_that_nobody_sees(
    daemon: RealContainerd,
    images: BuildImages,
    registry: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, _ = registry
    commands = []
    start = subprocess.Popen

    def spy(command: list[str], **options: object) -> object:
        commands.append(command)
        return start(command, **options)  # type: ignore[call-overload]  # passed on as it came

    monkeypatch.setattr(image_pull.subprocess, "Popen", spy)
    reference = image_pull.full_reference(f"{host}/some/image:1")
    with pytest.raises(CallerError, match="could not be pulled"):
        images.base(reference, RegistryLogin(username="me", password="wrong"), lambda: False)
    with pytest.raises(CallerError, match="could not be pulled"):
        images.base(reference, None, lambda: False)
    login = RegistryLogin(username="me", password="pass word$")
    digest, state = images.base(reference, login, lambda: False)
    assert digest.startswith("sha256:")
    assert len(state.layers) == 1
    assert not any("pass" in word for command in commands for word in command)
    assert images.base(reference, None, lambda: False)[0] == digest, "it is here now"
    daemon.ctr("images", "rm", reference)


def test_a_pull_can_be_cancelled(images: BuildImages) -> None:
    with pytest.raises(CallerError, match="cancelled") as caught:
        images.base("127.0.0.1:1/no/such:1", None, lambda: True)
    assert caught.value.code == "canceled"
