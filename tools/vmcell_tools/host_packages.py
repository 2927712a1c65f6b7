"""Debian packages that each part of the work needs, and their installation with apt-get.

Standard library only: `tools/install-packages` runs this before there is a virtual environment.
No service is started: while packages are configured a policy-rc.d says no, unless the host has one
of its own, which then decides.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vmcell_protos.errors import CallerError, HostError

PACKAGES: dict[str, tuple[str, ...]] = {
    # make and the virtual environment.
    "project": ("make", "python3-venv", "git", "ca-certificates"),
    # The guest kernel and the images.
    "build": (
        *("linux-source-6.12", "gcc", "libc6-dev", "make", "binutils", "bc", "bison", "flex"),
        *("libelf-dev", "xz-utils", "kmod", "erofs-utils", "e2fsprogs", "mmdebstrap"),
    ),
    # Running containers, on this host or in the dev VM, which has this host's files.
    "run": (
        *("containerd", "runc", "erofs-utils", "e2fsprogs", "nftables", "iproute2"),
        *("nginx-light", "openssl", "procps"),
        # virtiofsd, which every pod needs.
        "qemu-system-common",
    ),
    "devvm": (
        *("qemu-system-x86", "qemu-system-common", "busybox-static", "kmod"),
        *("dropbear-bin", "openssh-client"),
    ),
    # CNI plugins give pods their network in the dev VM, and ports by iptables; systemd for
    # systemd-analyze alone, which reads the unit that setup writes; tests of the store start a
    # PostgreSQL of their own; a compiler and the kernel's headers say what our numbers must be.
    "test": (
        *("bsdutils", "containernetworking-plugins", "iptables", "systemd", "postgresql"),
        *("nodejs", "node-acorn", "node-typescript"),
        *("gcc", "libc6-dev", "linux-libc-dev"),
    ),
}
POLICY = Path("/usr/sbin/policy-rc.d")
POLICY_TEXT = "#!/bin/sh\n# Written while vmcell installs packages, then removed.\nexit 101\n"
APT_DEADLINE_S = 1800
LOCK_WAIT_S = 300
TOLD_EVERY_S = 5.0


def packages_for(purposes: Iterable[str]) -> tuple[str, ...]:
    """All packages of `purposes`, each once, in order; CallerError for an unknown purpose."""
    names: dict[str, None] = {}
    for purpose in purposes:
        if purpose not in PACKAGES:
            raise CallerError(f"no packages are listed for {purpose!r}; use {', '.join(PACKAGES)}")
        names.update(dict.fromkeys(PACKAGES[purpose]))
    return tuple(names)


def missing_packages(names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that dpkg does not have installed."""
    try:
        shown = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=60,
            check=False,
        )
    except FileNotFoundError as error:
        raise HostError("dpkg-query is missing; this needs Debian 12 or a relative") from error
    states = (line.split() for line in shown.stdout.splitlines())
    installed = {state[0] for state in states if state[-1] == "installed"}
    return tuple(name for name in names if name not in installed)


def install(names: Sequence[str]) -> None:
    """Install `names`, telling on standard output what goes on; HostError with apt's last words."""
    if os.geteuid() != 0:
        raise CallerError(f"installing {' '.join(names)} needs root; run it with sudo")
    _say(f"installing {' '.join(names)}")
    with _no_services_started():
        _apt_get(["update"])
        _apt_get(["install", "--yes", "--no-install-recommends", *names])
    still = missing_packages(names)
    if still:
        raise HostError(f"apt-get did not install {' '.join(still)}; try it by hand")
    _say("packages are installed")


@contextmanager
def _no_services_started() -> Iterator[None]:
    """A policy-rc.d that denies all, for as long as this lasts; never over one that is there."""
    try:
        descriptor = os.open(POLICY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755)
    except FileExistsError:
        yield
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(POLICY_TEXT)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            POLICY.unlink()


def _apt_get(words: Sequence[str]) -> None:
    """apt-get with its progress told now and then (APT::Status-Fd, apt's README.progress).

    The progress has a pipe of its own: dpkg closes that descriptor for maintainer scripts, and one
    whose standard output is closed fails at its first echo.
    """
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    status, told_by_apt = os.pipe()
    with tempfile.TemporaryFile("w+") as log, open(status) as progress:
        try:
            process = subprocess.Popen(
                [
                    "apt-get",
                    *("-q", "-o", f"APT::Status-Fd={told_by_apt}", "-o", "Dpkg::Use-Pty=0"),
                    *("-o", f"DPkg::Lock::Timeout={LOCK_WAIT_S}"),
                    *("-o", "Dpkg::Options::=--force-confold"),
                    *words,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=(told_by_apt,),
            )
        finally:
            os.close(told_by_apt)
        with process:
            _tell_progress(process, progress, words[0])
        if process.returncode:
            log.seek(0)
            raise HostError(f"apt-get {words[0]} failed: {log.read().strip()[-1500:]}")


def _tell_progress(process: subprocess.Popen[bytes], progress: Iterable[str], verb: str) -> None:
    """Reads apt's progress to its end."""
    started = told = time.monotonic()
    for line in progress:
        kind, *fields = line.rstrip("\n").split(":", 3)
        if kind not in ("pmstatus", "dlstatus") or len(fields) < 3:
            continue
        now = time.monotonic()
        if now - told >= TOLD_EVERY_S:
            told = now
            _say(f"apt-get {verb}: {float(fields[1]):.0f} % {fields[2]}")
        if now - started > APT_DEADLINE_S:
            process.terminate()
            raise HostError(f"apt-get {verb} took longer than {APT_DEADLINE_S} s; try it by hand")


def _say(text: str) -> None:
    sys.stdout.write(f"packages: {text}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """`install-packages [PURPOSE...]`: all purposes by default; silent when nothing is missing."""
    try:
        missing = missing_packages(packages_for(arguments or PACKAGES))
        if missing:
            install(missing)
    except (CallerError, HostError) as error:
        sys.stderr.write(f"packages: {error}\n")
        return 1
    return 0
