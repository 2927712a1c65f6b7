"""What a C compiler makes of the kernel's headers: values of expressions, layouts of structs."""

from __future__ import annotations

import ast
import inspect
import re
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

MISSING = -(1 << 62)
"""Of a macro that these headers do not have yet."""


def values(
    headers: Sequence[str], expressions: Sequence[str], folder: Path, *, newer: Sequence[str] = ()
) -> dict[str, int]:
    """Each expression's value; MISSING for those of `newer` that are no macro here."""
    lines = ["#define _GNU_SOURCE", *(f"#include <{h}>" for h in ("stddef.h", "stdio.h", *headers))]
    lines.append("int main(void) {")
    for expression in expressions:
        print_it = f'printf("%lld\\n", (long long)({expression}));'
        if expression in newer:
            lines += [f"#ifdef {expression}", print_it, "#else"]
            lines += [f'printf("%lld\\n", {MISSING}LL);', "#endif"]
        else:
            lines.append(print_it)
    source = folder / "probe.c"
    source.write_text("\n".join([*lines, "return 0; }\n"]))
    program = folder / "probe"
    built = subprocess.run(
        ["cc", "-o", program, source], check=False, timeout=60, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    output = subprocess.run([program], check=True, timeout=10, capture_output=True, text=True)
    return dict(zip(expressions, map(int, output.stdout.split()), strict=True))


def layout(layout_of: struct.Struct | str, name: str, fields: Sequence[str]) -> dict[str, int]:
    """`sizeof` and `offsetof` of each field of C's struct `name` → what our format says.

    `fields` are C's names in the order of the format's values.
    """
    text = layout_of if isinstance(layout_of, str) else layout_of.format
    order, codes = text[0], re.findall(r"(\d*)([a-zA-Z])", text[1:])
    assert order in "<=", f"{text} has native alignment"
    places: list[tuple[int, int]] = []
    end = 0
    for count, code in codes:
        items = 1 if code == "s" or not count else int(count)
        size = struct.calcsize(f"{order}{count if code == 's' else ''}{code}")
        for _ in range(items):
            if code != "x":
                places.append((end, size))
            end += size
    found: dict[str, int] = {}
    for field, (offset, size) in zip(fields, places, strict=True):
        found[f"offsetof({name}, {field})"] = offset
        found[f"sizeof((({name} *)0)->{field})"] = size
    return found


def declared_in(module: ModuleType) -> set[str]:
    """Names that the module itself gives to numbers and to formats of structs."""
    names: set[str] = set()
    for node in ast.parse(inspect.getsource(module)).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            names.update(part.id for part in parts if isinstance(part, ast.Name))
    values = vars(module)
    return {name for name in names if type(values[name]) is int or _is_struct(values[name])}


def _is_struct(value: object) -> bool:
    return isinstance(value, struct.Struct)
