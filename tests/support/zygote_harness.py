"""A zygote of one's own, the binary beside it, bundles for both, and what is to be seen of them."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from shim_harness import wait_until

from vmcell_protos.bootstrap import BootstrapParams
from vmcell_protos.zygote import (
    HELLO,
    MAX_DATAGRAM_BYTES,
    Answer,
    Request,
    decode_answer,
    encode_request,
)
from vmcell_shim.spares import SPARE_NAME

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = [str(ROOT / name) for name in ("protos", "runtime", "shim")]
BINARY = ROOT / "shim/containerd-shim-vmcell-v2"
NO_ZYGOTE_STATUS = 99
READY_WITHIN_S = 60
_PEER = struct.Struct("iII")

_VARIANT = """#!{python} -ISB
import sys
sys.path[:0] = {roots!r}
from vmcell_shim import bootstrap
{change}
sys.exit(bootstrap.main(sys.argv))
"""
# A binary that can do nothing by itself: what it answers, the zygote has done.
ONLY_BY_ZYGOTE = f"bootstrap._act_directly = lambda argv, stdin: {NO_ZYGOTE_STATUS}"


def variant(path: Path, change: str = "", more_roots: tuple[str, ...] = ()) -> Path:
    """The binary at `path`, with `change` made to it before its main."""
    roots = [*SOURCE_ROOTS, *more_roots]
    path.write_text(_VARIANT.format(python=sys.executable, roots=roots, change=change))
    path.chmod(0o755)
    return path


class Zygote:
    """One zygote at `path`, its log beside it."""

    def __init__(self, path: str, binary: Path = BINARY) -> None:
        self.path = path
        self.log = Path(f"{path}.log")
        # Spares are children too, which most tests do not expect.
        self.environment = {**os.environ, "VMCELL_ZYGOTE": path, "VMCELL_SPARES": "0"}
        self._command = [sys.executable, "-ISB", str(binary), "zygote"]
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True, environment: Mapping[str, str] | None = None) -> None:
        """Returns when it serves, or (`wait` False) at once."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self.log.open("ab") as log:
            ready.bind("")  # an abstract name of the kernel's choice
            ready.settimeout(READY_WITHIN_S)
            name = "@" + ready.getsockname()[1:].decode()
            self._popen = subprocess.Popen(
                self._command,
                env={**(environment or self.environment), "NOTIFY_SOCKET": name if wait else ""},
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
            if wait:
                assert ready.recv(4096) == b"READY=1", self.log.read_text()
                self.hello()

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def wait(self, timeout_s: float = 20) -> int:
        """Its exit status."""
        assert self._popen is not None
        return self._popen.wait(timeout_s)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; gone when this returns. No error if it was."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait(20)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It does not run meanwhile, as if it hung."""
        self.signal(signal.SIGSTOP)
        wait_until(lambda: state(self.pid) == "T", "the stop")
        try:
            yield
        finally:
            if self._popen is not None and self._popen.poll() is None:
                self.signal(signal.SIGCONT)

    def spares(self) -> list[int]:
        """Those that have said to be ready."""
        return [pid for pid in children(self.pid) if name(pid) == SPARE_NAME]

    def wait_for_spares(self, count: int) -> list[int]:
        """So many are ready, and the next to ask may have one."""
        wait_until(lambda: len(self.spares()) == count, f"{count} spares")
        self.hello()  # it has heard of them then
        return self.spares()

    def hello(self) -> Answer:
        """What it says of itself."""
        with self.connect() as sock:
            sock.send(encode_request(Request(HELLO, b"")))
            answer = decode_answer(sock.recv(MAX_DATAGRAM_BYTES))
            assert sock.recv(1) == b"", "it has closed its end"
            return answer

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(20)
        try:
            sock.connect(self.path)
        except OSError:
            sock.close()
            raise
        return sock

    def run(
        self, bundle: Path, *words: str, stdin: bytes = b"", binary: Path = BINARY
    ) -> subprocess.CompletedProcess[bytes]:
        """The binary with these words, as containerd runs it in `bundle`."""
        return subprocess.run(
            [sys.executable, "-ISB", str(binary), *words],
            cwd=bundle,
            env=self.environment,
            input=stdin,
            capture_output=True,
            timeout=60,
            check=False,
        )

    def descriptors(self) -> list[str]:
        return descriptors(self.pid)


class Background:
    """A call in a thread of its own; `result` waits for it."""

    def __init__(self, zygote: Zygote, *arguments: object, **options: object) -> None:
        self._done: list[subprocess.CompletedProcess[bytes]] = []
        self._thread = threading.Thread(
            target=lambda: self._done.append(zygote.run(*arguments, **options))  # type: ignore[arg-type]  # passed on as it came
        )
        self._thread.start()

    def result(self) -> subprocess.CompletedProcess[bytes]:
        self._thread.join(60)
        return self._done[0]


def descriptors(pid: int) -> list[str]:
    """What its open descriptors lead to; one that is closed meanwhile is left out."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except FileNotFoundError:
            continue
    return sorted(found)


def state(pid: int) -> str:
    """One letter (proc(5)), "" when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return text[text.rindex(")") + 2]


def end(pid: int) -> None:
    """SIGKILL; nothing of it is left open when this returns, whichever thread held it."""
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    readable, _, _ = select.select([pidfd], [], [], 20)
    os.close(pidfd)
    assert readable


def name(pid: int) -> str:
    """What ps calls it; "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def parent(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[1])


def children(pid: int) -> list[int]:
    """Of any state, zombies too."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and parent(int(entry.name)) == pid:
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def server_pid(address: str) -> int:
    """Which process made the socket at `address` listen: a zygote's child is the server itself,
    on the direct path it is the binary, which has ended."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(address.removeprefix("unix://"))
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(data)[0])


def in_folder(folder: Path) -> list[int]:
    """The living processes that work there."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder):
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return [pid for pid in found if state(pid) not in ("", "Z")]


def shims(bundle: Path) -> list[int]:
    """Those that work in `bundle` and lead a session: its servers."""
    return [pid for pid in in_folder(bundle) if session(pid) == pid]


def session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def make_bundle(folder: Path, name: str) -> Path:
    made = folder / name
    made.mkdir()
    (made / "config.json").write_text("{}")
    os.mkfifo(made / "log")
    return made


def start_words(bundle: Path, container_id: str = "c1") -> list[str]:
    return [
        *("-namespace", "default", "-address", f"{bundle}/containerd.sock"),
        *("-publish-binary", "/bin/false", "-id", container_id, "start"),
    ]


def delete_words(bundle: Path) -> list[str]:
    return ["-namespace", "default", "-id", "c1", "-bundle", str(bundle), "delete"]


def bootstrap(bundle: Path) -> bytes:
    """BootstrapParams, as containerd 2.3 sends them: the socket stands in the bundle."""
    params = BootstrapParams(instance_id="c1", namespace="default", socket_dir=str(bundle / "s"))
    return params.encode()


def start(zygote: Zygote, bundle: Path, binary: Path = BINARY) -> str:
    """The address after a start that went well."""
    done = zygote.run(bundle, *start_words(bundle), stdin=bootstrap(bundle), binary=binary)
    return address_of(done)


def address_of(done: subprocess.CompletedProcess[bytes]) -> str:
    assert (done.returncode, done.stderr) == (0, b"")
    answer = json.loads(done.stdout)
    assert answer["version"] == 3
    return str(answer["address"])


def only_server(bundle: Path, address: str) -> int:
    """The one server of the bundle, which listens at `address`; children about to end may end."""
    wait_until(lambda: len(shims(bundle)) == 1, "one server")
    (pid,) = shims(bundle)
    assert os.path.exists(address.removeprefix("unix://"))
    assert os.listdir(bundle / "s") == [os.path.basename(address)]
    assert (bundle / "address").read_text() == address
    return pid


def sockets(bundle: Path) -> list[str]:
    """Those that listen in the bundle."""
    folder = bundle / "s"
    return [name for name in os.listdir(folder) if name[0] != "."] if folder.exists() else []


def traits(pid: int) -> dict[str, object]:
    """All that a process has from its parent, as far as /proc shows it."""
    folder = Path(f"/proc/{pid}")
    rows = [line.partition(":") for line in (folder / "status").read_text().splitlines()]
    status = {name: value.split() for name, _, value in rows}
    names = (
        *("Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "SigCgt", "CapEff", "NoNewPrivs"),
        *("Seccomp", "Cpus_allowed", "Threads"),
    )
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    line = (folder / "cmdline").read_text().rstrip("\0").split("\0")
    return {
        **{name: status.get(name) for name in names},
        "limits": (folder / "limits").read_text(),
        "cgroup": (folder / "cgroup").read_text(),
        "oom_score_adj": (folder / "oom_score_adj").read_text(),
        "nice": fields[16],
        "leads its session and group": (int(fields[2]), int(fields[3])) == (pid, pid),
        "cwd": os.readlink(folder / "cwd"),
        "descriptors": [name.partition(":")[0] for name in descriptors(pid)],
        "command line": line,
        "name": (folder / "comm").read_text(),
    }


def settled_traits(pid: int) -> dict[str, object]:
    """As they are when the server catches SIGTERM, its last step before it serves, and nobody is
    connected to it."""
    rest = [*(["/dev/null"] * 3), "anon_inode", "socket"]
    seen: list[dict[str, object]] = []

    def rests() -> bool:
        seen.append(traits(pid))
        (caught,) = cast("list[str]", seen[-1]["SigCgt"])
        serves = int(caught, 16) >> (signal.SIGTERM - 1) & 1
        return bool(serves) and (seen[-1]["descriptors"], seen[-1]["Threads"]) == (rest, ["2"])

    wait_until(rests, "the server's rest")
    return seen[-1]


def memory_kib(pid: int) -> dict[str, int]:
    """The rows of /proc/PID/smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}
