"""The dev VM's containerd configuration, as containerd itself reads it."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

from vmcell_tools import dev_containerd


def test_containerd_takes_every_setting(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(dev_containerd.CONFIG)
    dumped = subprocess.run(
        ["containerd", "--config", str(path), "config", "dump"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert_contains(tomllib.loads(dumped.stdout), tomllib.loads(dev_containerd.CONFIG))


def assert_contains(whole: object, part: object) -> None:
    """Every value of `part` stands at the same place of `whole`: a misspelt key would not."""
    if not isinstance(part, dict):
        assert whole == part
        return
    assert isinstance(whole, dict)
    for key, value in part.items():
        assert key in whole
        assert_contains(whole[key], value)


def test_pods_get_addresses_of_their_subnet() -> None:
    (network,) = json.loads(dev_containerd.files()[dev_containerd.CNI_PATH])["plugins"]
    assert network["ipam"]["ranges"] == [[{"subnet": dev_containerd.POD_SUBNET}]]
    assert network["type"] == "ptp"
