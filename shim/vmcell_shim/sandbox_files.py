"""The files of one sandbox on the host, and their removal by whoever is left.

<state_dir>/<namespace>/<id>/ holds `state.json` (which processes live: shim, VMM and helpers; which
files elsewhere are the sandbox's own; its cgroup, and how to undo its network) and the logs of
console, shim and VMM. A pod's member has such a directory too, without processes, and names its
pod's (`sandbox`), where a link leads back to it: containerd 2.x runs `delete` for a pod alone, and
not for its members. The bundle's link `vmcell` leads there, so that `delete` finds everything
without the host's configuration. Every removal is idempotent.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress

from vmcell_protos.errors import HostError
from vmcell_shim.living import Living, kill_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.oci_json import Json

BUNDLE_LINK = "vmcell"
_MAKE_TRIES = 100
_MEMBER_PREFIX = "member-"
_LOGS = ("console.log", "shim.log", "vmm.log")


class SandboxFiles:
    """The state directory of one sandbox. Created by the shim, removed by the shim or `delete`."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.shim: Living | None = None
        self.vmm: Living | None = None
        self.helpers: list[Living] = []
        self.owned: list[str] = []
        self.drafts: list[str] = []
        self.sandbox = ""
        self.network: Json = {}
        self.poststop: Json = {}
        self.cgroup = ""
        self.log_dir = ""

    @property
    def namespace(self) -> str:
        """Where the network namespace stands that was made for this sandbox alone."""
        return os.path.join(self.directory, "netns")

    @property
    def console_log(self) -> str:
        return os.path.join(self.directory, "console.log")

    @property
    def vmm_log(self) -> str:
        return os.path.join(self.directory, "vmm.log")

    @property
    def shim_log(self) -> str:
        return os.path.join(self.directory, "shim.log")

    def create(self, bundle: str = "") -> None:
        """The directory, a state file, and with `bundle` the link by which `delete` finds them: it
        is that of who takes the directory along. Raises HostError."""
        try:
            make_directory(self.directory)
            self.save()
            if not bundle:
                return
            link = os.path.join(bundle, BUNDLE_LINK)
            if os.path.islink(link):
                os.unlink(link)
            os.symlink(self.directory, link)
        except OSError as error:
            raise HostError(f"cannot make the state directory {self.directory}: {error}") from error

    def add_member(self, name: str, directory: str) -> None:
        """Notes a member's directory. Before this one is there nothing is: it is that of a group
        without a sandbox of its own, of which each member has its `delete`. Raises HostError."""
        try:
            os.symlink(directory, os.path.join(self.directory, _MEMBER_PREFIX + name))
        except (FileNotFoundError, FileExistsError):
            return
        except OSError as error:
            raise HostError(f"cannot note {name} in {self.directory}: {error}") from error

    def drop_member(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.directory, _MEMBER_PREFIX + name))

    def members(self) -> list[str]:
        """The directories of members that are still noted."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        paths = (os.path.join(self.directory, name) for name in names)
        return [os.readlink(path) for path in paths if os.path.islink(path)]

    def add_draft(self, path: str) -> None:
        """Notes what this process is writing and sees to itself: `delete` removes it when the
        process is dead. Raises HostError."""
        self.drafts.append(path)
        try:
            self.save()
        except OSError as error:
            raise HostError(f"cannot note {path} in {self.directory}: {error}") from error

    def drop_draft(self, path: str) -> None:
        """It has gone or has another name now; state.json says so when it is written next."""
        self.drafts.remove(path)

    def save(self) -> None:
        """Writes state.json anew; a reader sees the old or the new one, never half."""
        state = {
            "version": 1,
            "shim": self.shim,
            "vmm": self.vmm,
            "helpers": self.helpers,
            "owned": [*self.owned, *self.drafts],
            "sandbox": self.sandbox,
            "network": self.network,
            "poststop": self.poststop,
            "cgroup": self.cgroup,
            "log_dir": self.log_dir,
        }
        path = os.path.join(self.directory, "state.json")
        with open(path + ".new", "w", encoding="utf-8") as file:
            json.dump(state, file)
        os.rename(path + ".new", path)

    def remove(self) -> None:
        """The sandbox's own files, then its directory; logs are kept in log_dir when that is set.

        Raises HostError when something cannot be removed (after removing the rest).
        """
        failures: list[str] = []
        if self.log_dir:
            self._keep_logs(failures)
        for path in [*self.owned, self.directory]:
            _remove(path, failures)
        for parent in {os.path.dirname(path) for path in [*self.owned, self.directory]}:
            _remove_if_empty(parent)
        if failures:
            raise HostError(f"sandbox files are left behind: {'; '.join(failures)}")

    def _keep_logs(self, failures: list[str]) -> None:
        name = "-".join(self.directory.split("/")[-2:])
        try:
            os.makedirs(self.log_dir, mode=0o700, exist_ok=True)
            for log in _LOGS:
                source = os.path.join(self.directory, log)
                if os.path.exists(source):
                    shutil.copyfile(source, os.path.join(self.log_dir, f"{name}.{log}"))
        except OSError as error:
            failures.append(f"logs not kept in {self.log_dir}: {error}")


def make_directory(directory: str) -> None:
    """A private directory of one sandbox, with its parents. Raises OSError.

    The end of a namespace's last sandbox takes the parent away, maybe before this has gone down.
    """
    for _ in range(_MAKE_TRIES):
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            return
        except FileNotFoundError:
            continue
    os.makedirs(directory, mode=0o700, exist_ok=True)


def load(directory: str) -> SandboxFiles:
    """What state.json in `directory` says; without one nothing is alive. HostError for a damaged
    one."""
    files = SandboxFiles(directory)
    try:
        with open(os.path.join(directory, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
        files.shim = Living(*state["shim"]) if state["shim"] else None
        files.vmm = Living(*state["vmm"]) if state["vmm"] else None
        files.helpers = [Living(*helper) for helper in state["helpers"]]
        files.owned = [str(path) for path in state["owned"]]
        files.sandbox = str(state["sandbox"])
        files.network = dict(state["network"])
        files.poststop = dict(state["poststop"])
        files.cgroup = str(state["cgroup"])
        files.log_dir = str(state["log_dir"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise HostError(f"{directory}/state.json is damaged: {error!r}") from error
    return files


def kill_survivors(files: SandboxFiles, timeout_s: float) -> int:
    """SIGKILL for VMM, shim and helpers where they still live; the VMM's pid, 0 if never known.

    Mounts need no undoing: those of virtiofsd end with it.
    """
    processes = [files.vmm, files.shim, *files.helpers]
    kill_all([row for row in processes if row is not None and row.pid != os.getpid()], timeout_s)
    return files.vmm.pid if files.vmm else 0


def _remove(path: str, failures: list[str]) -> None:
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        failures.append(str(error))


def _remove_if_empty(directory: str) -> None:
    try:
        os.rmdir(directory)
    except OSError:
        # Another sandbox lives in it, or it is the root of all: both stay.
        return
