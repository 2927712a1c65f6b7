"""The configuration file: written and read by the same rules."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_protos.errors import HostError
from vmcell_shim.config import ShimConfig, load_config, parse_config, render_config

PATHS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=20).map(
    lambda text: "/" + text
)


@given(PATHS, PATHS, st.integers(1, 600))
def test_what_is_written_is_read_back(kernel: str, log_dir: str, timeout_s: int) -> None:
    config = ShimConfig(
        kernel=kernel, base_image="/base", log_dir=log_dir, boot_timeout_s=timeout_s
    )
    assert parse_config(render_config(config), "config.toml") == config


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("kernel = ", "not TOML"),
        ('kernel = "/k"', "names no base_image"),
        ('kernel = "k"\nbase_image = "/b"', "absolute path"),
        ('kernel = "/k"\nbase_image = "/b"\ncolour = 1', "colour"),
        ('kernel = "/k"\nbase_image = "/b"\ndefault_vcpus = 0', "default_vcpus"),
        ('kernel = "/k"\nbase_image = "/b"\nboot_timeout_s = true', "boot_timeout_s"),
        ('kernel = "/k"\nbase_image = "/b"\nvmm_uid_first = 999', "vmm_uid_first.*1000"),
        ('kernel = "/k"\nbase_image = "/b"\nvmm_uid_count = 147516349', "vmm_uid_count"),
    ],
)
def test_wrong_files_are_named(text: str, named: str) -> None:
    with pytest.raises(HostError, match=named):
        parse_config(text, "config.toml")


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("VMCELL_CONFIG", str(path))
    with pytest.raises(HostError, match="vmcell setup"):
        load_config()
    path.write_text('kernel = "/k"\nbase_image = "/b"\n')
    assert load_config().boot_timeout_s == 60
    monkeypatch.setenv("VMCELL_BOOT_TIMEOUT_S", "240")
    assert load_config().boot_timeout_s == 240
    monkeypatch.setenv("VMCELL_BOOT_TIMEOUT_S", "soon")
    with pytest.raises(HostError, match="soon"):
        load_config()
