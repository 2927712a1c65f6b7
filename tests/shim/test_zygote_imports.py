"""The zygote has imported all that its children may need: they import nothing after their birth."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

from source_tree import Module, modules
from zygote_harness import SOURCE_ROOTS

PACKAGES = ("vmcell_protos", "vmcell_runtime", "vmcell_shim")
PROGRAM = f"""
import sys
sys.path[:0] = {SOURCE_ROOTS!r}
import importlib, json, threading
from vmcell_shim import zygote
for name in zygote._EVERYTHING:
    importlib.import_module(name)
import vmcell_shim.zygote_loop
print(json.dumps([threading.active_count(), sorted(sys.modules)]))
"""


def warm() -> tuple[int, set[str]]:
    """How many threads a process warmed up like the zygote has, and its modules."""
    command = [sys.executable, "-ISB", "-c", PROGRAM]
    threads, names = json.loads(subprocess.check_output(command, timeout=60))
    return threads, set(names)


def late_imports(module: Module) -> set[str]:
    """What its functions import, as dotted names of modules or of things in them."""
    found = set()
    for function in ast.walk(module.tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
    return found


def test_what_functions_import_is_there_already() -> None:
    threads, present = warm()
    assert threads == 1
    missing = [
        f"{module.relative_path} imports {name}"
        for module in modules()
        if ".".join(module.parts) in present and module.parts[0] in PACKAGES
        for name in late_imports(module)
        if name not in present and name not in sys.builtin_module_names
    ]
    assert not missing, "\n".join(missing)


def test_all_of_shim_and_runtime_is_there() -> None:
    _, present = warm()
    # bootstrap is the main of the process already.
    names = {".".join(module.parts) for module in modules()} - {"vmcell_shim.bootstrap"}
    ours = {name for name in names if name.startswith(("vmcell_shim", "vmcell_runtime"))}
    assert ours <= present, sorted(ours - present)


def test_nothing_heavy_is_there() -> None:
    """Each of these costs milliseconds and megabytes, and no child needs it."""
    _, present = warm()
    heavy = {"asyncio", "subprocess", "logging", "argparse", "email", "http", "ssl", "google"}
    assert not heavy & present
