"""Who may import whom, and that reading order is import order (docs/architecture.md)."""

from __future__ import annotations

import re
import sys

import pytest
from source_tree import Module, modules, packages

MAY_IMPORT = {
    "vmcell_protos": set(),
    "vmcell_runtime": {"vmcell_protos"},
    "vmcell_shim": {"vmcell_protos", "vmcell_runtime"},
    "vmcell_agent": {"vmcell_protos"},
    # an image has it, without the rest of us
    "vmcell_interpreter": set(),
    "vmcell_api": {"vmcell_protos"},
    "vmcell_tools": {
        "vmcell_protos",
        "vmcell_runtime",
        "vmcell_shim",
        "vmcell_agent",
        "vmcell_api",
    },
}
STANDARD_LIBRARY_ONLY = {"vmcell_protos", "vmcell_runtime", "vmcell_shim", "vmcell_agent"}
THIRD_PARTY_EXCEPTIONS = {("vmcell_agent", "envd"): {"h11"}}

MODULES = modules()
ALL_PARTS = {module.parts for module in MODULES}


def _third_party_allowed(module: Module) -> set[str]:
    return {
        name
        for prefix, names in THIRD_PARTY_EXCEPTIONS.items()
        if module.parts[: len(prefix)] == prefix
        for name in names
    }


def test_every_package_has_a_rule() -> None:
    assert set(packages()) == set(MAY_IMPORT)


def test_import_direction() -> None:
    wrong = [
        f"{module.relative_path}:{line} imports {name}"
        for module in MODULES
        for name, line in module.imports()
        if (top := name.split(".")[0]).startswith("vmcell_")
        and top != module.parts[0]
        and top not in MAY_IMPORT[module.parts[0]]
    ]
    assert not wrong, "\n".join(wrong)


def test_standard_library_only() -> None:
    wrong = [
        f"{module.relative_path}:{line} imports {name}"
        for module in MODULES
        if module.parts[0] in STANDARD_LIBRARY_ONLY
        for name, line in module.imports()
        if not (top := name.split(".")[0]).startswith("vmcell_")
        and top not in sys.stdlib_module_names
        and top not in _third_party_allowed(module)
    ]
    assert not wrong, "\n".join(wrong)


def _reading_order(package: Module) -> list[str]:
    import ast

    docstring = ast.get_docstring(package.tree) or ""
    _, _, section = docstring.partition("Reading order:")
    return [
        match.group(1)
        for line in section.strip().splitlines()
        if (match := re.match(r"\s*(\w+)\s{2,}\S", line))
    ]


PACKAGES = [module for module in MODULES if module.is_package]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda m: ".".join(m.parts))
def test_reading_order_lists_every_module(package: Module) -> None:
    depth = len(package.parts)
    children = {
        parts[depth] for parts in ALL_PARTS if parts[:depth] == package.parts and parts[depth:]
    } | {
        entry.name
        for entry in package.path.parent.iterdir()
        if entry.is_dir() and (entry / "__init__.py").exists()
    }
    order = _reading_order(package)
    assert sorted(order) == sorted(children)
    assert len(order) == len(set(order))


def test_modules_import_only_what_stands_above_them() -> None:
    order = {package.parts: _reading_order(package) for package in PACKAGES}
    wrong = []
    for module in MODULES:
        for name, line in module.imports():
            target = tuple(name.split("."))
            while target and target not in ALL_PARTS:
                target = target[:-1]
            if not target or target[0] != module.parts[0] or target == module.parts:
                continue
            common = 0
            while (
                common < min(len(target), len(module.parts))
                and target[common] == module.parts[common]
            ):
                common += 1
            if common in (len(target), len(module.parts)):
                continue
            names = order[target[:common]]
            if names.index(target[common]) > names.index(module.parts[common]):
                wrong.append(f"{module.relative_path}:{line} reads ahead: {name}")
    assert not wrong, "\n".join(wrong)


def test_package_files_hold_no_code() -> None:
    import ast

    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    wrong = [
        f"{package.relative_path}:{node.lineno}"
        for package in PACKAGES
        for node in package.tree.body
        if not isinstance(node, allowed)
    ]
    assert not wrong, "\n".join(wrong)
