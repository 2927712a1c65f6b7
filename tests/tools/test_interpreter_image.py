"""The code interpreter's image before it is built: its lock, its server, its labels."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest

from vmcell_api.node.oci_image import parse_config
from vmcell_protos.errors import HostError
from vmcell_tools import interpreter_image
from vmcell_tools.build_cache import BuildCache
from vmcell_tools.image_layers import CUSTOMIZE
from vmcell_tools.oci_image import BASE, INTERPRETER
from vmcell_tools.oci_layout import write_archive
from vmcell_tools.progress import Progress
from vmcell_tools.python_wheels import locked_names, wheels

LOCK = interpreter_image.LOCK.read_text()
QUIET = Progress("test", quiet=True)


def test_the_lock_has_what_is_wanted_each_with_hashes() -> None:
    names = {row.partition("==")[0] for row in locked_names(LOCK)}
    wanted = (interpreter_image.FOLDER / "requirements.in").read_text().splitlines()
    assert names >= {row for row in wanted if row and not row.startswith("#")}
    entries = re.split(r"\n(?=\w)", LOCK)
    assert len(entries) == len(names)
    assert all("--hash=sha256:" in entry for entry in entries)


def test_a_package_that_is_not_what_the_lock_says_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.txt"
    lock.write_text(f"six==1.17.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(HostError, match=r"failed with status"):
        wheels(lock, BuildCache(tmp_path / "cache"), QUIET)
    assert not list((tmp_path / "cache").glob("python-wheels/[!.]*"))


def test_noded_reads_the_labels_that_the_archive_has(tmp_path: Path) -> None:
    layer, archive = tmp_path / "layer.tar", tmp_path / "image.tar"
    layer.write_bytes(b"layer")
    write_archive(archive, layer, INTERPRETER)
    with tarfile.open(archive) as tar:
        blobs = {member.name: tar.extractfile(member) for member in tar}
        contents = [file.read() for name, file in blobs.items() if file and "blobs/" in name]
    (config,) = (raw for raw in contents if raw.startswith(b"{") and b"rootfs" in raw)
    parsed = parse_config(config, "x")
    assert parsed.start_command == interpreter_image.START_PATH
    assert parsed.ready_command == interpreter_image.READY
    assert parsed.working_directory == "/home/user"
    assert "Labels" in json.loads(config)["config"]
    # what names the builds of images without labels is as it was
    assert "labels" not in repr(BASE)


def test_all_of_the_server_goes_in(tmp_path: Path) -> None:
    targets = {target for target, _ in interpreter_image.server_files()}
    assert {
        "vmcell_interpreter/__main__.py",
        "vmcell_interpreter/javascript_kernel/driver.js",
        "vmcell_interpreter/python_kernel/extension.py",
    } <= targets
    hooks = interpreter_image.hooks(tmp_path, (Path("/a b/pip-1-py3-none-any.whl"),))
    for hook in (*hooks, *CUSTOMIZE):
        subprocess.run(["sh", "-n", "-c", hook], check=True, timeout=10)
    assert shlex.quote("/a b/pip-1-py3-none-any.whl") in hooks[1]


def test_scripts_are_shell() -> None:
    subprocess.run(["sh", "-n", interpreter_image.START], check=True, timeout=10)
    subprocess.run(["bash", "-n", "-c", interpreter_image.READY], check=True, timeout=10)
