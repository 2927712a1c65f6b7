"""The files a long-lived process has imported, and whether they are still the installed ones.

Taken by file number, size and time of change, which every way of installing changes.
"""

from __future__ import annotations

import os
import sys

import vmcell_protos
import vmcell_runtime
import vmcell_shim

_Stamp = tuple[int, int, int]


class InstalledCode:
    """Made before the imports; `watch` names after them what was imported."""

    def __init__(self, *scripts: str) -> None:
        self._stamps: dict[str, _Stamp | None] = {path: _stamp(path) for path in scripts}
        self._scripts = scripts
        self._vmm_stamps = self._stamps
        for package in (vmcell_protos, vmcell_runtime, vmcell_shim):
            for folder, _, names in os.walk(package.__path__[0]):
                for name in names:
                    if name.endswith(".py"):
                        path = os.path.join(folder, name)
                        self._stamps[path] = _stamp(path)

    def watch_imported(self) -> None:
        """From now on only the scripts and the modules imported so far count."""
        modules = [m for name, m in sys.modules.items() if name.startswith("vmcell_")]
        paths = [str(module.__file__) for module in modules]
        # One that came between the two moments has no stamp: changed.
        self._stamps = {path: self._stamps.get(path) for path in (*self._scripts, *paths)}
        roots = tuple(package.__path__[0] for package in (vmcell_protos, vmcell_runtime))
        self._vmm_stamps = {p: stamp for p, stamp in self._stamps.items() if p.startswith(roots)}

    def has_changed(self, *, for_vmm: bool = False) -> bool:
        """Whether an import now would give something else; `for_vmm`: of what a VMM is made of."""
        stamps = self._vmm_stamps if for_vmm else self._stamps
        return any(stamp != _stamp(path) for path, stamp in stamps.items())


def _stamp(path: str) -> _Stamp | None:
    """None: there is no such file, and none can be imported."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
