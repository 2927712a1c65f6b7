"""Images that containerd has not: pulled by `ctr`, which comes with every containerd.

A password is typed at ctr's prompt through a terminal of its own, so no list of processes shows it.
Source: ctr's `images pull --user NAME`, which asks for the password on its console.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vmcell_protos.errors import CallerError, HostError

# Names of images that builds make; no client may use them as an image.
OWN_REGISTRY = "vmcell.local/"
# What E2B's Template() starts from when nothing is said, and what stands for it here.
STANDARD_BASES = ("e2bdev/base", "e2bdev/base:latest")
STANDARD_BASE = "docker.io/vmcell/base:latest"
PULL_TIMEOUT_S = 1800.0
# A line typed at a terminal holds no more (N_TTY_BUF_SIZE).
MAX_PASSWORD_BYTES = 4000
_REFERENCE = re.compile(
    r"(?P<host>[A-Za-z0-9.-]+(:\d{1,5})?/)?"
    r"(?P<path>[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*)"
    r"(?P<end>(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?)"
)


@dataclass(frozen=True, kw_only=True)
class RegistryLogin:
    """Who pulls; the password is never shown."""

    username: str
    password: str = field(repr=False)


def full_reference(image: str) -> str:
    """`python:3` as containerd names it: docker.io/library/python:3. Raises CallerError.

    Source: the rules of the distribution project, reference.md: a first part with a dot, a colon
    or "localhost" is a host; without one the image is Docker Hub's, and the tag is latest.
    """
    if image in STANDARD_BASES:
        return STANDARD_BASE
    first, slash, rest = image.partition("/")
    is_host = bool(slash) and ("." in first or ":" in first or first == "localhost")
    host, path = (first, rest) if is_host else ("docker.io", image)
    if host == "docker.io" and "/" not in path:
        path = f"library/{path}"
    match = _REFERENCE.fullmatch(f"{host}/{path}")
    if match is None or len(image) > 512:
        raise CallerError(f"{image[:80]!r} is no image name; give one like python:3.13")
    reference = match.group()
    if reference.startswith(OWN_REGISTRY):
        raise CallerError(f"{image[:80]!r} belongs to a template; name the template instead")
    return reference if match["end"] else f"{reference}:latest"


def pull(
    reference: str,
    login: RegistryLogin | None,
    *,
    socket_path: str,
    namespace: str,
    snapshotter: str,
    cancelled: Callable[[], bool],
) -> None:
    """Pulls and unpacks an image; raises CallerError with the last of ctr's words.

    `cancelled` is asked twice a second; then the pull ends with CallerError canceled.
    """
    command = ["ctr", "--address", socket_path, "--namespace", namespace]
    command += ["images", "pull", "--snapshotter", snapshotter, "--platform", "linux/amd64"]
    if login is not None:
        if len(login.password.encode()) > MAX_PASSWORD_BYTES or "\n" in login.password:
            raise CallerError(f"the registry password is over {MAX_PASSWORD_BYTES} bytes long")
        # A colon would put what follows it into the command line as the password.
        if ":" in login.username or not login.username or not login.password:
            raise CallerError("fromImageRegistry needs a username without ':' and a password")
        command += ["--user", login.username]
    status, words = _run([*command, reference], login, cancelled)
    if status:
        raise CallerError(
            f"image {reference} could not be pulled: {words}", code="failed_precondition"
        )


def _run(
    command: list[str], login: RegistryLogin | None, cancelled: Callable[[], bool]
) -> tuple[int, str]:
    master, slave = pty.openpty()
    try:
        _do_not_echo(slave)
        try:
            child = subprocess.Popen(
                command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
            )
        except FileNotFoundError as error:
            raise HostError("ctr is not installed; it comes with containerd") from error
        finally:
            os.close(slave)
        if login is not None:
            os.write(master, f"{login.password}\n".encode())
        try:
            output = _follow(child, master, cancelled)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            status = child.wait()
        secret = login.password if login is not None else ""
        return status, _last_words(output, secret)
    finally:
        os.close(master)


def _do_not_echo(slave: int) -> None:
    """Before the password is typed: ctr turns the echo off only when it has got that far."""
    settings = termios.tcgetattr(slave)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(slave, termios.TCSANOW, settings)


def _follow(child: subprocess.Popen[bytes], master: int, cancelled: Callable[[], bool]) -> bytes:
    """The last of what it prints, until it ends."""
    deadline = time.monotonic() + PULL_TIMEOUT_S
    output = b""
    while True:
        if cancelled():
            raise CallerError("the build was cancelled", code="canceled")
        if time.monotonic() > deadline:
            raise HostError(f"the image was not pulled within {PULL_TIMEOUT_S:.0f} s")
        readable, _, _ = select.select([master], [], [], 0.5)
        if readable:
            try:
                piece = os.read(master, 65536)
            except OSError:  # EIO: the last holder of the other end has gone
                return output
            output = (output + piece)[-8192:]
        elif child.poll() is not None:
            return output


def _last_words(output: bytes, secret: str) -> str:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode("utf-8", "replace"))
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    words = lines[-1] if lines else "ctr said nothing"
    return (words.replace(secret, "***") if secret else words)[-600:]
