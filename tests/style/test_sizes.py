"""A file is one idea, a function one thought; and names say what things are."""

from __future__ import annotations

import ast
import re

from source_tree import ROOT, modules, python_files

FILE_LINES = 600
FUNCTION_LINES = 60
VAGUE_NAMES = re.compile(
    r"^(utils?|common|helpers?|managers?|misc|lib)$|_(utils?|helpers?|manager)$"
)


def test_files_stay_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in python_files()
        if (lines := len(path.read_text().splitlines())) > FILE_LINES
    ]
    assert not long, "\n".join(long)


def test_functions_stay_short() -> None:
    long = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines}")
    assert not long, "\n".join(long)


def test_modules_have_telling_names_and_a_docstring() -> None:
    wrong = [
        module.relative_path
        for module in modules()
        if VAGUE_NAMES.search(module.parts[-1]) or not ast.get_docstring(module.tree)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_type_ignore_names_a_code_and_a_reason() -> None:
    pattern = re.compile(r"# type: ignore\[[a-z-]+(,\s*[a-z-]+)*\]  # \S+")
    wrong = [
        f"{module.relative_path}:{number}"
        for module in modules()
        for number, line in enumerate(module.path.read_text().splitlines(), 1)
        if "# type: ignore" in line and not pattern.search(line)
    ]
    assert not wrong, "\n".join(wrong)
