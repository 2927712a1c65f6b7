"""What this host's /dev/kvm is good for: hardware virtualisation, or something that only looks so.

`kvm_pvm` offers the whole KVM interface without virtualisation hardware. It runs guest user code at
full speed and everything else in KVM's instruction emulator, which lacks instructions a Linux
kernel needs, so an unmodified Linux guest cannot run there. Without a vmx or svm flag no other
/dev/kvm can run it either.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from vmcell_protos.errors import HostError

_ADVICE = "run `vmcell doctor` for what to do"


class HostKind(NamedTuple):
    """`kind` is hardware, pvm, no-hardware, missing or forbidden; `reason` is a full sentence."""

    kind: str
    runs_linux: bool
    reason: str


def host_kind(root: str = "/") -> HostKind:
    """Looks at `dev/kvm`, `sys/module` and `proc/cpuinfo` under `root`; opens nothing else."""
    device = os.path.join(root, "dev/kvm")
    if not os.path.exists(device):
        return HostKind("missing", False, f"{device} does not exist, so no guest can run")
    if not os.access(device, os.R_OK | os.W_OK):
        return HostKind("forbidden", False, f"{device} may not be opened by uid {os.getuid()}")
    if os.path.isdir(os.path.join(root, "sys/module/kvm_pvm")):
        return HostKind(
            "pvm", False, f"{device} is served by kvm_pvm, which cannot run an unmodified Linux"
        )
    flag = _virtualisation_flag(os.path.join(root, "proc/cpuinfo"))
    if flag is None:
        return HostKind(
            "no-hardware", False, "the processor shows neither vmx nor svm, so no Linux can run"
        )
    return HostKind("hardware", True, f"{device} uses the processor's {flag}")


def require_linux_host(root: str = "/") -> None:
    """HostError with one sentence unless a Linux guest can run here."""
    found = host_kind(root)
    if not found.runs_linux:
        raise HostError(f"{found.reason}; {_ADVICE}", code="failed_precondition")


def open_kvm(root: str = "/") -> int:
    """A descriptor of /dev/kvm, the caller's to close."""
    path = os.path.join(root, "dev/kvm")
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise HostError(
                f"{path} does not exist, so no guest can run; {_ADVICE}",
                code="failed_precondition",
            ) from error
        raise HostError(f"opening {path} failed: {error.strerror}; {_ADVICE}") from error


def _virtualisation_flag(path: str) -> str | None:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("flags"):
                    flags = line.split()
                    return next((flag for flag in ("vmx", "svm") if flag in flags), None)
    except OSError as error:
        raise HostError(f"reading {path} failed: {error.strerror}") from error
    return None
