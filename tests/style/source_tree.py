"""The project's own source as syntax trees, for the tests beside this file."""

from __future__ import annotations

import ast
import configparser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("protos/vmcell_protos/pb/",)


def packages() -> dict[str, Path]:
    """Top-level package → its folder, as setup.cfg maps them."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["package_dir"].strip().splitlines()
    pairs = (line.split("=") for line in lines)
    return {name.strip(): ROOT / folder.strip() for name, folder in pairs}


@dataclass(frozen=True, kw_only=True)
class Module:
    """One source file; `parts` is its dotted name, cut ("vmcell_runtime", "kvm", "ioctl")."""

    path: Path
    parts: tuple[str, ...]
    is_package: bool
    tree: ast.Module

    @property
    def relative_path(self) -> str:
        return str(self.path.relative_to(ROOT))

    def imports(self) -> Iterator[tuple[str, int]]:
        """Dotted names this module imports, anywhere in it, with the line."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, node.lineno
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    kept = len(self.parts) - node.level + self.is_package
                    base = ".".join((*self.parts[:kept], *filter(None, [base])))
                for alias in node.names:
                    yield f"{base}.{alias.name}", node.lineno


def modules(*, generated: bool = False) -> list[Module]:
    """Every module of every package; generated gRPC stubs only when asked for."""
    found = []
    for name, folder in packages().items():
        for path in sorted(folder.rglob("*.py")):
            relative = str(path.relative_to(ROOT))
            if not generated and relative.startswith(GENERATED):
                continue
            inner = path.relative_to(folder).with_suffix("").parts
            is_package = inner[-1] == "__init__"
            parts = (name, *(inner[:-1] if is_package else inner))
            tree = ast.parse(path.read_text(), filename=relative)
            found.append(Module(path=path, parts=parts, is_package=is_package, tree=tree))
    return found


def python_files() -> list[Path]:
    """Every Python file of the project, tests included, generated ones left out."""
    folders = [*packages().values(), ROOT / "tests"]
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        if not str(path.relative_to(ROOT)).startswith(GENERATED)
    ]
