"""The desktop's image before it is built: what its clients look for, its hooks, its settings."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vmcell_tools import desktop_image
from vmcell_tools.image_layers import CUSTOMIZE
from vmcell_tools.oci_image import BASE, DESKTOP, IMAGES


def test_it_is_an_image_like_the_others() -> None:
    assert IMAGES["desktop"] is DESKTOP
    assert DESKTOP.reference == "docker.io/vmcell/desktop:latest"
    assert DESKTOP.environment == BASE.environment
    # the clients start everything themselves
    assert DESKTOP.labels == {}


def _package(folder: Path) -> Path:
    """A package of one file, made as Debian's are."""
    tree = folder / "novnc"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: novnc\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: x\n"
    )
    proxy = tree / "usr/share/novnc/utils/novnc_proxy"
    proxy.parent.mkdir(parents=True)
    proxy.write_text("#!/bin/sh\n")
    proxy.chmod(0o755)
    archive = folder / "no vnc.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", tree, archive],
        check=True,
        timeout=60,
        stdout=subprocess.DEVNULL,
    )
    return archive


def test_the_hooks_put_novnc_where_the_clients_run_it(tmp_path: Path) -> None:
    system = tmp_path / "system"
    for name in ("etc", "var/lib/dbus"):
        (system / name).mkdir(parents=True)
    (system / "var/lib/dbus/machine-id").write_text("made by dbus when it was installed\n")
    for hook in desktop_image.hooks(_package(tmp_path)):
        subprocess.run(["sh", "-ec", hook, "hook", system], check=True, timeout=60)
    assert (system / "opt/noVNC").readlink() == Path("/usr/share/novnc")
    assert (system / "usr/share/novnc/utils/novnc_proxy").stat().st_mode & 0o111
    assert bytes.fromhex((system / "etc/machine-id").read_text()) != bytes(16)
    assert (system / "var/lib/dbus/machine-id").readlink() == Path("/etc/machine-id")


@pytest.mark.parametrize("hook", [*desktop_image.hooks(Path("/a b/novnc.deb")), *CUSTOMIZE])
def test_hooks_are_shell(hook: str) -> None:
    subprocess.run(["sh", "-n", "-c", hook], check=True, timeout=10)
