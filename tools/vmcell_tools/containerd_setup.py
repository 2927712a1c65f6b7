"""vmcell's part of containerd's configuration on this host: written beside it, merged when asked.

`root` is the root of the host's tree, another directory in tests. config.toml is replaced in one
step, after containerd itself has read the new text, and with a backup of the old one beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools.containerd_config import (
    HANDLER,
    SNIPPETS,
    Snippet,
    cri_is_disabled,
    fitting_snippet,
    merged,
    parse_version,
    runtimes_of,
    without_block,
)

CONFIG = "/etc/containerd/config.toml"
SNIPPET_DIRECTORY = "/etc/vmcell/containerd"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RESTART = "restart containerd: systemctl restart containerd"
_DEADLINE_S = 20


def snippet_files() -> dict[str, str]:
    """Path → text of every snippet."""
    return {f"{SNIPPET_DIRECTORY}/{row.file}": row.text for row in SNIPPETS}


def installed_version(path: str = SYSTEM_PATH) -> tuple[int, int] | None:
    """That of the containerd on `path`; None when there is none that says so."""
    output = _containerd(path, "--version")
    return parse_version(output) if output is not None else None


def read_config(root: Path) -> str | None:
    """containerd's configuration, None when there is none; HostError when it cannot be read."""
    path = _config_path(root)
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(f"cannot read {path}: {error}") from error


def advice(root: Path, path: str = SYSTEM_PATH) -> str:
    """One line: which snippet fits this host, and whether it is in place."""
    version = installed_version(path)
    if version is None:
        return "containerd is not installed; ctr, nerdctl and Kubernetes need it"
    name = f"containerd {version[0]}.{version[1]}"
    try:
        config = read_config(root)
        snippet = fitting_snippet(version, config)
        present = config is not None and HANDLER in runtimes_of(config)
        disabled = config is not None and cri_is_disabled(config)
    except HostError as error:
        return f"{name}: {error}"
    if disabled:
        return f"{name}: {CONFIG} disables CRI, so Kubernetes cannot use it; ctr and nerdctl can"
    if present:
        return f"{name}: {CONFIG} has the runtime {HANDLER}"
    return (
        f"{name}: ctr and nerdctl need nothing more; for Kubernetes append "
        f"{SNIPPET_DIRECTORY}/{snippet.file} to {CONFIG}, or run: vmcell setup --containerd"
    )


def merge(root: Path, path: str = SYSTEM_PATH) -> list[str]:
    """Puts the fitting snippet into config.toml; returns one line per thing done.

    Raises CallerError without a containerd, HostError when the configuration cannot take it; the
    file is then as it was.
    """
    version = installed_version(path)
    if version is None:
        raise CallerError("containerd is not installed; run: apt-get install containerd runc")
    config = read_config(root)
    snippet: Snippet = fitting_snippet(version, config)
    after = merged(config, snippet)
    if after == config:
        return []
    return [*_replace(root, path, config, after), RESTART]


def unmerge(root: Path, path: str = SYSTEM_PATH) -> list[str]:
    """Takes out what `merge` put in; nothing where it did not."""
    config = read_config(root)
    if config is None:
        return []
    after = without_block(config)
    return [] if after == config else [*_replace(root, path, config, after), RESTART]


def _replace(root: Path, path: str, before: str | None, after: str) -> list[str]:
    target = _config_path(root)
    fresh = target.with_name(f".{target.name}.vmcell")
    done = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(after)
        _check(path, fresh)
        if before is not None:
            shutil.copymode(target, fresh)
            backup = _backup_path(target)
            shutil.copy2(target, backup)
            done.append(f"kept {target} as {backup}")
        os.replace(fresh, target)
    except OSError as error:
        raise HostError(f"cannot write {target}: {error.strerror}; run it as root") from error
    finally:
        fresh.unlink(missing_ok=True)
    return [*done, f"wrote {target}"]


def _check(path: str, config: Path) -> None:
    """containerd reads the new configuration before it is put in place."""
    if shutil.which("containerd", path=path) is None:
        return
    if _containerd(path, "--config", str(config), "config", "dump") is None:
        raise HostError(f"containerd does not take the new {CONFIG}; merge the snippet by hand")


def _backup_path(target: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = target.with_name(f"{target.name}.{stamp}")
    number = 1
    while path.exists():
        number += 1
        path = target.with_name(f"{target.name}.{stamp}-{number}")
    return path


def _config_path(root: Path) -> Path:
    return root / CONFIG.lstrip("/")


def _containerd(path: str, *words: str) -> str | None:
    """Its standard output; None when it is missing, fails or hangs."""
    program = shutil.which("containerd", path=path)
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *words], capture_output=True, text=True, timeout=_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None
