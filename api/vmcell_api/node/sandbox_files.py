"""Files that noded keeps for a sandbox's container: three that the shim copies into the guest, two
with what envd was told.

They live in `<state_dir>/.noded/<id>/`: the leading dot keeps the folder apart from containerd's
namespaces, whose names begin with a letter or digit; `<id>` is the container's. Token and
environment are for root only; a noded that starts anew asks envd with the one, and a machine that
is restored from a snapshot gets the other again.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from vmcell_protos.errors import HostError

FOLDER = ".noded"
TOKEN_FILE = "access-token"
ENVIRONMENT_FILE = "environment.json"


def folder_of(state_dir: str, sandbox_id: str) -> Path:
    """The sandbox's folder; `write` makes it."""
    return Path(state_dir, FOLDER, sandbox_id)


def write(
    state_dir: str,
    sandbox_id: str,
    *,
    address: str,
    nameservers: tuple[str, ...],
    access_token: str = "",
    environment: dict[str, str] | None = None,
    hostname: str = "",
) -> tuple[tuple[str, str], ...]:
    """Writes resolv.conf, hosts, hostname (the id unless given), token and environment, anew.

    Answers (path in the guest, path here) pairs of what is for the guest.
    """
    folder = folder_of(state_dir, sandbox_id)
    hosts = (
        f"127.0.0.1 localhost\n::1 localhost ip6-localhost\n{address} {hostname or sandbox_id}\n"
    )
    contents = {
        "resolv.conf": "".join(f"nameserver {server}\n" for server in nameservers),
        "hosts": hosts,
        "hostname": f"{hostname or sandbox_id}\n",
    }
    try:
        folder.mkdir(parents=True, mode=0o755, exist_ok=True)
        for name, text in contents.items():
            (folder / name).write_text(text)
        _write_secret(folder / TOKEN_FILE, access_token)
        _write_secret(folder / ENVIRONMENT_FILE, json.dumps(environment or {}))
    except OSError as error:
        raise HostError(f"cannot write the files of sandbox {sandbox_id}: {error}") from error
    return tuple((f"/etc/{name}", str(folder / name)) for name in contents)


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def access_token(state_dir: str, sandbox_id: str) -> str:
    """envd's token, "" where it asks for none; FileNotFoundError when the sandbox is gone."""
    return (folder_of(state_dir, sandbox_id) / TOKEN_FILE).read_text()


def environment(state_dir: str, sandbox_id: str) -> dict[str, str]:
    """What the create gave to every command; empty where an earlier version made the sandbox."""
    try:
        return json.loads((folder_of(state_dir, sandbox_id) / ENVIRONMENT_FILE).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise HostError(f"cannot read the environment of sandbox {sandbox_id}: {error}") from error


def remove(state_dir: str, sandbox_id: str) -> None:
    """Removes the folder; a missing one is fine."""
    try:
        shutil.rmtree(folder_of(state_dir, sandbox_id))
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot remove the files of sandbox {sandbox_id}: {error}") from error


def present(state_dir: str) -> list[str]:
    """The sandbox ids that have files."""
    folder = Path(state_dir, FOLDER)
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
