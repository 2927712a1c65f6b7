"""Files that noded writes for a sandbox and that the shim copies into the guest.

They live in `<state_dir>/.noded/<id>/`: the leading dot keeps the folder apart from containerd's
namespaces, whose names begin with a letter or digit.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vmcell_protos.errors import HostError

FOLDER = ".noded"


def write(
    state_dir: str, sandbox_id: str, *, address: str, nameservers: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Writes resolv.conf, hosts and hostname; answers (path in the guest, path here) pairs."""
    folder = Path(state_dir, FOLDER, sandbox_id)
    hosts = f"127.0.0.1 localhost\n::1 localhost ip6-localhost\n{address} {sandbox_id}\n"
    contents = {
        "resolv.conf": "".join(f"nameserver {server}\n" for server in nameservers),
        "hosts": hosts,
        "hostname": f"{sandbox_id}\n",
    }
    try:
        folder.mkdir(parents=True, mode=0o755)
        for name, text in contents.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise HostError(f"cannot write the files of sandbox {sandbox_id}: {error}") from error
    return tuple((f"/etc/{name}", str(folder / name)) for name in contents)


def remove(state_dir: str, sandbox_id: str) -> None:
    """Removes the folder; a missing one is fine."""
    try:
        shutil.rmtree(Path(state_dir, FOLDER, sandbox_id))
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot remove the files of sandbox {sandbox_id}: {error}") from error


def present(state_dir: str) -> list[str]:
    """The sandbox ids that have files."""
    folder = Path(state_dir, FOLDER)
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
