"""Raw memory stays where its rules are: one module for guest RAM, one layer for KVM's structs.

ctypes for calling libc with integers and byte strings is not raw memory; taking addresses, casting
pointers and mapping structures over foreign bytes is.
"""

from __future__ import annotations

import ast

from source_tree import modules

ALLOWED = ("vmcell_runtime.memory", "vmcell_runtime.kvm.")
RAW_NAMES = {
    "POINTER",
    "addressof",
    "cast",
    "from_address",
    "from_buffer",
    "memmove",
    "memset",
    "pointer",
    "pythonapi",
    "string_at",
    "wstring_at",
}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "_ctypes", "cffi"}


def _uses_ctypes(tree: ast.Module) -> bool:
    return any(
        (isinstance(node, ast.Import) and any(a.name.startswith("ctypes") for a in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ctypes"))
        for node in ast.walk(tree)
    )


def test_raw_memory_only_in_its_modules() -> None:
    wrong = []
    for module in modules():
        name = ".".join(module.parts)
        if name.startswith(ALLOWED) or name in ALLOWED or not _uses_ctypes(module.tree):
            continue
        for node in ast.walk(module.tree):
            used = (
                node.attr
                if isinstance(node, ast.Attribute)
                else node.id
                if isinstance(node, ast.Name)
                else None
            )
            if used in RAW_NAMES:
                wrong.append(f"{module.relative_path}:{node.lineno} {used}")
    assert not wrong, "\n".join(wrong)


def test_no_deserialiser_that_runs_code() -> None:
    wrong = [
        f"{module.relative_path}:{line} {name}"
        for module in modules()
        for name, line in module.imports()
        if name.split(".")[0] in FORBIDDEN_MODULES
    ]
    assert not wrong, "\n".join(wrong)
