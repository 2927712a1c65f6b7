"""OCI archives against the format's own rules, and the layers that go in."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.debian_tree import unpack
from vmcell_tools.image_layers import busybox_layer
from vmcell_tools.oci_image import IMAGES, SMALL, build_oci_image
from vmcell_tools.oci_layout import ImageSettings, write_archive
from vmcell_tools.progress import Progress

QUIET = Progress("test", quiet=True)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0="), min_size=1, max_size=12)


def blobs_of(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {
            member.name: content.read()
            for member in tar
            if (content := tar.extractfile(member)) is not None
        }


def resolved(files: dict[str, bytes], descriptor: dict[str, Any]) -> bytes:
    """The blob of a descriptor, its size and digest checked (OCI descriptor.md)."""
    algorithm, _, value = descriptor["digest"].partition(":")
    blob = files[f"blobs/{algorithm}/{value}"]
    assert len(blob) == descriptor["size"]
    assert hashlib.new(algorithm, blob).hexdigest() == value
    return blob


@given(
    layer=st.binary(max_size=2000),
    environment=st.dictionaries(WORDS, WORDS, max_size=3),
    command=st.lists(WORDS, max_size=3),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_every_blob_is_what_its_descriptor_says(
    tmp_path: Path, layer: bytes, environment: dict[str, str], command: list[str]
) -> None:
    source, archive = tmp_path / "layer.tar", tmp_path / "image.tar"
    source.write_bytes(layer)
    image = ImageSettings(
        reference="docker.io/vmcell/x:latest",
        environment=environment,
        command=tuple(command),
        directory="/",
        comment="a test",
    )
    digest = write_archive(archive, source, image)
    files = blobs_of(archive)
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads(files["index.json"])["manifests"]
    assert entry["digest"] == digest
    assert entry["annotations"]["io.containerd.image.name"] == "docker.io/vmcell/x:latest"
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "latest"
    manifest = json.loads(resolved(files, entry))
    config = json.loads(resolved(files, manifest["config"]))
    (described,) = manifest["layers"]
    assert resolved(files, described) == layer
    # the media type says plain tar, so what is unpacked is the layer itself
    assert described["mediaType"].endswith(".layer.v1.tar")
    assert config["rootfs"]["diff_ids"] == [described["digest"]]
    assert dict(pair.split("=", 1) for pair in config["config"]["Env"]) == environment
    assert config["config"]["Cmd"] == command
    assert len(files) == 5


def test_the_same_layer_gives_the_same_archive(tmp_path: Path) -> None:
    layer = tmp_path / "layer.tar"
    layer.write_bytes(b"layer")
    write_archive(tmp_path / "one", layer, SMALL)
    os.utime(layer, (1, 1))
    write_archive(tmp_path / "two", layer, SMALL)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def debian_package(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """A package of `files`, made by dpkg-deb."""
    tree = folder / name
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n"
    )
    for path, content in files.items():
        target = tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(0o755)
    archive = folder / f"{name}.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, archive],
        check=True,
        timeout=60,
        stdout=subprocess.DEVNULL,
    )
    return archive


def test_unpacked_packages_share_one_usr(tmp_path: Path) -> None:
    one = debian_package(tmp_path, "one", {"lib/x/a": b"a", "bin/tool": b"t"})
    two = debian_package(tmp_path, "two", {"usr/lib/x/b": b"b", "lib64/ld": b"l"})
    tree = tmp_path / "tree"
    unpack([one, two], tree)
    assert (tree / "lib").readlink() == Path("usr/lib")
    assert {path.name for path in (tree / "usr/lib/x").iterdir()} == {"a", "b"}
    assert (tree / "bin/tool").read_bytes() == b"t"
    assert (tree / "usr/lib64/ld").exists()
    assert (tree / "sbin").is_symlink()


def test_a_damaged_package_is_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "broken.deb"
    broken.write_bytes(b"!<arch>\nno")
    with pytest.raises(HostError, match="dpkg-deb failed"):
        unpack([broken], tmp_path / "tree")


@pytest.fixture
def small_layer(tmp_path: Path) -> dict[str, tarfile.TarInfo]:
    """The busybox layer of the host's own busybox, by name."""
    program = Path("/usr/bin/busybox").read_bytes()
    package = debian_package(tmp_path, "busybox-static", {"bin/busybox": program})
    layer = tmp_path / "layer.tar"
    busybox_layer(layer, [package])
    with tarfile.open(fileobj=io.BytesIO(layer.read_bytes())) as tar:
        return {member.name: member for member in tar}


def test_the_busybox_layer_is_a_root_file_system(small_layer: dict[str, tarfile.TarInfo]) -> None:
    assert small_layer["bin/sh"].linkname == "/bin/busybox"
    assert small_layer["bin/busybox"].mode == 0o755
    assert small_layer["tmp"].mode == 0o1777
    assert (small_layer["home/user"].uid, small_layer["home/user"].gid) == (1000, 1000)
    owners = {(entry.uid, entry.gid) for name, entry in small_layer.items() if name != "home/user"}
    assert owners == {(0, 0)}
    assert {"etc/passwd", "etc/group", "proc", "sys", "dev"} <= set(small_layer)
    for name, entry in small_layer.items():
        assert not entry.isdev()
        assert entry.mtime == 0
        # a parent stands before its children, as unpackers may rely on
        parent = name.rpartition("/")[0]
        assert not parent or small_layer[parent].isdir()


def test_an_unknown_image_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match=r"no image 'huge'; build one of base, small, code-"):
        build_oci_image("huge", BuildCache(tmp_path), QUIET)
    assert not list(tmp_path.iterdir())
    assert set(IMAGES) == {"base", "small", "code-interpreter-v1", "desktop"}
