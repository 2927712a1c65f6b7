"""The shim's own settings: /etc/vmcell/config.toml, or the file VMCELL_CONFIG names.

`vmcell setup` writes the file with `render_config`, so writer and reader cannot drift apart.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime.vmm_uid import DEFAULT_RANGE, UidRange

DEFAULT_PATH = "/etc/vmcell/config.toml"
# Room for some dozens of images of a few hundred MB each.
CACHE_LIMIT_MIB = 20480


@dataclass(frozen=True, kw_only=True)
class ShimConfig:
    """Paths are absolute. `log_dir` "": logs end with their sandbox.

    `writable_mib` is the size of a container's sparse disk; only what is written takes space.
    `cache_limit_mib` bounds the images in `cache_dir` that no container uses.
    """

    kernel: str
    base_image: str
    state_dir: str = "/run/vmcell"
    cache_dir: str = "/var/lib/vmcell"
    snapshot_dir: str = "/var/lib/vmcell/snapshots"
    cache_limit_mib: int = CACHE_LIMIT_MIB
    log_dir: str = ""
    default_vcpus: int = 1
    default_memory_mib: int = 512
    writable_mib: int = 10240
    boot_timeout_s: int = 60
    vmm_uid_first: int = DEFAULT_RANGE.first
    vmm_uid_count: int = DEFAULT_RANGE.size

    @property
    def vmm_uids(self) -> UidRange:
        """Whom VMMs run as: one of these each, as uid and gid."""
        return UidRange(self.vmm_uid_first, self.vmm_uid_count)


def load_config() -> ShimConfig:
    """The settings of this host; raises HostError. VMCELL_BOOT_TIMEOUT_S overrides its key."""
    path = os.environ.get("VMCELL_CONFIG") or DEFAULT_PATH
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        words = getattr(error, "strerror", None) or error
        raise HostError(f"cannot read {path}: {words}; run `vmcell setup` to write it") from error
    config = parse_config(text, path)
    override = os.environ.get("VMCELL_BOOT_TIMEOUT_S")
    if override is None:
        return config
    good = override.isascii() and override.isdigit() and len(override) <= 9
    if not good or not int(override):
        raise HostError(f"VMCELL_BOOT_TIMEOUT_S is {override!r}; give whole seconds above 0")
    values = {row.name: getattr(config, row.name) for row in fields(config)}
    return ShimConfig(**{**values, "boot_timeout_s": int(override)})


def parse_config(text: str, path: str) -> ShimConfig:
    """The settings in `text`; `path` is for the error. Raises HostError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise HostError(f"{path} is not TOML: {error}; run `vmcell setup` again") from error
    known = {row.name: row for row in fields(ShimConfig)}
    for name, value in table.items():
        if name not in known:
            raise HostError(f"{path}: key {name!r} is not known; known are {', '.join(known)}")
        _check_value(path, name, value, is_number=known[name].type == "int")
    for name in ("kernel", "base_image"):
        if not table.get(name):
            raise HostError(f"{path} names no {name}; run `vmcell setup` to write it")
    config = ShimConfig(**table)
    try:
        config.vmm_uids.check()
    except CallerError as error:
        raise HostError(f"{path}: vmm_uid_first and vmm_uid_count: {error}") from error
    return config


def _check_value(path: str, name: str, value: object, *, is_number: bool) -> None:
    if is_number:
        if type(value) is not int or value < 1:
            raise HostError(f"{path}: {name} is {value!r}; it takes a whole number above 0")
    elif not isinstance(value, str) or (value and not value.startswith("/")):
        raise HostError(f"{path}: {name} is {value!r}; it takes an absolute path")


def render_config(config: ShimConfig) -> str:
    """TOML text that `parse_config` reads back to an equal object."""
    lines = []
    for row in fields(config):
        value = getattr(config, row.name)
        if isinstance(value, str):
            value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        lines.append(f"{row.name} = {value}\n")
    return "".join(lines)
