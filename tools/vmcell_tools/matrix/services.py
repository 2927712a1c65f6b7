"""The service that clients are run against, and whether the machine it is on was lost meanwhile."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmcell_tools.dev_faults import faults, panics
from vmcell_tools.dev_service import (
    NAME,
    VMCELL,
    ServiceInVm,
    bring_up_service,
    stop_service,
)
from vmcell_tools.dev_state import load
from vmcell_tools.progress import Progress

# An emulated CPU takes about twenty times as long.
DEV_VM_PATIENCE_S = 300
DEV_VM_CLIENT_WITHIN_S = 1500
DOWN_WITHIN_S = 120


@dataclass(frozen=True, kw_only=True)
class Service:
    """Where the API, the data plane and the files of volumes are ("": nowhere), and a key for
    them; `patience_s` for one call."""

    api_url: str
    sandbox_url: str
    key: str
    volume_url: str = ""
    patience_s: int = 60
    client_within_s: int = 600


class Services(Protocol):
    """One service, which may have to be made anew."""

    def get(self) -> Service:
        """The service, brought up unless it is there; raises HostError when it cannot be."""

    def lost(self) -> str:
        """Why what was seen since `get` says nothing about the service; empty when it does."""


@dataclass(frozen=True, kw_only=True)
class OneService:
    """A service that somebody else keeps."""

    service: Service

    def get(self) -> Service:
        """The service."""
        return self.service

    def lost(self) -> str:
        """Nothing is known of its machine."""
        return ""


class DevVmServices:
    """The service in the dev VM, which is made anew when its own kernel has panicked."""

    def __init__(self, images: tuple[str, ...], progress: Progress) -> None:
        self._images = images
        self._progress = progress
        self._found: ServiceInVm | None = None
        self._known: set[tuple[str, str]] = set()

    def get(self) -> Service:
        """The service, with a fresh key whenever it is brought up; raises HostError."""
        if self._found is None:
            self._found = bring_up_service("matrix", self._images, self._progress)
        self._known = faults(self._out())
        return Service(
            api_url=self._found.api_url,
            sandbox_url=self._found.sandbox_url,
            volume_url=self._found.volume_url,
            key=self._found.key,
            patience_s=DEV_VM_PATIENCE_S,
            client_within_s=DEV_VM_CLIENT_WITHIN_S,
        )

    def lost(self) -> str:
        """After a panic the VM is taken down, and the next `get` makes it anew."""
        vm = load(NAME)
        if vm is None:
            return ""
        if panics(vm.out_directory) or not vm.qemu.alive():
            self._found = None
            # A QEMU that is there still would be taken for a living one.
            down = [*VMCELL, "dev", "down"]
            subprocess.run(down, check=True, timeout=DOWN_WITHIN_S, capture_output=True)
            return "the dev VM's own kernel panicked"
        if vm.accelerator != "kvm" and faults(vm.out_directory) - self._known:
            return "the software CPU lost a microVM by a triple fault"
        return ""

    def close(self) -> None:
        """Ends the service; the VM stays up. Idempotent."""
        if self._found is not None and not self.lost():
            stop_service()
        self._found = None

    def _out(self) -> Path:
        vm = load(NAME)
        assert vm is not None, "it has just come up"
        return vm.out_directory
