"""setup.cfg names every package there is, and no file of the project names its author's machine."""

from __future__ import annotations

import configparser
import subprocess

from source_tree import ROOT, packages


def test_setup_lists_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    present = {
        ".".join((name, *path.parent.relative_to(folder).parts))
        for name, folder in packages().items()
        for path in folder.rglob("__init__.py")
    }
    assert listed == present


def test_no_path_of_a_build_machine() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    needles = ["/ro" + "ot/", "/wo" + "rk/", "deb" + ".debian.org"]
    wrong = [
        f"{name}: {needle}"
        for name in tracked
        if name and (ROOT / name).is_file()
        for needle in needles
        if needle in (ROOT / name).read_text(errors="replace")
    ]
    assert not wrong, "\n".join(wrong)
