"""What the pages name is there: links, commands and options, tests, files, modules, settings.

A page is a Markdown file at the root, in docs/ or in kernel/. What they say of figures and of
behaviour is held by the tests that they name.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path

import click
import pytest
from source_tree import ROOT, packages

from vmcell_api.config import ApiConfig
from vmcell_api.scopes import RESOURCES, ROUTES
from vmcell_runtime.control import END_REASONS
from vmcell_shim.config import ShimConfig
from vmcell_tools.cli import main

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernel/*.md")])
SOURCES = ("protos", "runtime", "shim", "guest-agent", "api", "tools", "tests", "Makefile")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))

LINK = re.compile(r"\]\(([^)\s]+)\)")
# In a line of a code block, or between backticks.
COMMAND = re.compile(
    r"(?:`|^ {4,}(?:.*&& )?|-- )(?:\.venv/bin/)?vmcell ((?:[^`\n\\]|\\\n)+)", re.MULTILINE
)
TARGET = re.compile(r"(?:`|^ {4,})make ((?:[a-zA-Z][\w=-]*[ \n]?)+)", re.MULTILINE)
TEST = re.compile(r"(?:([\w/]+)/)?(test_\w+\.py)?(?:\[[\w.-]+\])?(?:::)?(test_\w+)?(?=[`\[ ])")
VARIABLE = re.compile(r"\bVMCELL_[A-Z_]+\b")
DOTTED = re.compile(r"\b(vmcell_[a-z]+)((?:\.\w+)+)")
PLACE = re.compile(r"`((?:docs|tests|tools|examples|deploy|kernel)/[\w./-]+)")
SETTING = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]+) \|", re.MULTILINE)


@cache
def source() -> str:
    """All Python, shell and make of the project in one string."""
    return "\n".join(
        path.read_text(errors="replace")
        for name in SOURCES
        for path in ([ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*")))
        if path.is_file() and (path.suffix in (".py", ".sh", "") or path.name == "Makefile")
    )


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", text)) for text in headings)
    return {text.strip().lower().replace(" ", "-") for text in words}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_readme_leads_to_every_page() -> None:
    linked = set(LINK.findall((ROOT / "README.md").read_text()))
    pages = {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md", "CHANGELOG.md"}
    assert pages <= {target.partition("#")[0] for target in linked}


def check_command(line: str) -> None:
    """Every group, command and long option in the words after `vmcell` exists."""
    try:
        words = shlex.split(line.replace("\\\n", " "), comments=True)
    except ValueError:  # a quotation mark of the sentence around it
        words = line.split()
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        first, words = words[0], words[1:]
        for name in first.split("|"):
            assert name in command.commands, f"vmcell {line}"
        command = command.commands[first.split("|")[0]]
    known = {"--help", *(option for each in command.params for option in each.opts)}
    for word in words[: words.index("--") if "--" in words else None]:
        assert not word.startswith("--") or word.partition("=")[0] in known, f"vmcell {line}"


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    fenced = re.compile(r"^```\w*$(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = fenced.sub(lambda block: block[1].replace("\n", "\n    "), page.read_text())
    for line in COMMAND.findall(text):
        if re.match(r"[a-z-]", line) and "…" not in line:
            check_command(line)


def test_wrong_commands_are_seen() -> None:
    text = (
        "    .venv/bin/vmcell setup --now\nsee `vmcell dance`, or what\n"
        "vmcell does not do:\n    a && vmcell dev up --stoer x\n"
    )
    lines = COMMAND.findall(text)
    assert lines == ["setup --now", "dance", "dev up --stoer x"]
    for line in lines:
        with pytest.raises(AssertionError, match=line):
            check_command(line)


@each_page
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in TARGET.findall(page.read_text()):
        named = [word for word in words.split() if "=" not in word]
        assert named[:1] == [] or named[0] in targets, words


@each_page
def test_tests_exist(page: Path) -> None:
    files: dict[str, list[Path]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        files.setdefault(path.name, []).append(path)
    for folder, file, function in TEST.findall(page.read_text()):
        if file:
            found = [path for path in files.get(file, []) if str(path.parent).endswith(folder)]
            assert found, f"{folder}/{file}"
            text = "\n".join(path.read_text() for path in found)
            assert not function or f"def {function}(" in text, f"{file}::{function}"
        elif function:
            assert f"def {function}(" in source(), function


@each_page
def test_modules_places_and_variables_exist(page: Path) -> None:
    text = page.read_text()
    for name in set(VARIABLE.findall(text)):
        assert name in source(), name
    for name in PLACE.findall(text):
        assert name.endswith("_") or (ROOT / name).exists(), name  # `target_<name>.py` ends there
    for package, dotted in DOTTED.findall(text):
        if package not in packages():
            continue  # a log's name, as `vmcell_forward`, or a metric's
        place, names = packages()[package], dotted[1:].split(".")
        while names and (place / names[0]).is_dir():
            place /= names.pop(0)
        module = place / f"{names[0]}.py" if names else place
        assert module.exists(), package + dotted
        for name in names[1:]:
            assert re.search(rf"\b{name}\b", module.read_text()), package + dotted


def test_scopes_are_listed_with_their_routes() -> None:
    page = (ROOT / "docs/operators.md").read_text()
    for path, resource in ROUTES:
        rows = [line for line in page.splitlines() if re.match(rf"\| .*`{resource}\b", line)]
        assert any(f"`{path}" in row for row in rows), path
    assert {resource for _, resource in ROUTES} == {*RESOURCES, "admin"}


def test_troubleshooting_quotes_what_is_said() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    for words in (
        *(
            "cannot start the microVM",
            "which cannot run an unmodified Linux",
            "opening /dev/kvm failed",
        ),
        *("which shares live directories, is at none of", "has not answered", "port is not open"),
        *(
            "was made with another version of the base image",
            "sandbox slots of this node are in use",
        ),
    ):
        assert words in page, words
        assert words.removeprefix("opening /dev/kvm ") in source(), words
    for reason in END_REASONS:
        assert reason == "guest_shutdown" or f"`{reason}`" in page, reason


@pytest.mark.parametrize(
    ("kind", "title"),
    [(ShimConfig, "## The runtime"), (ApiConfig, "## The E2B service")],
)
def test_settings_are_all_listed_with_their_defaults(
    kind: type[ShimConfig] | type[ApiConfig], title: str
) -> None:
    page = (ROOT / "docs/settings.md").read_text()
    part = page[page.index(title) :].partition("\n## ")[0]
    listed = {}
    for names, defaults in SETTING.findall(part):
        keys = re.findall(r"`(\w+)`", names)
        values = defaults.strip().split(", ") if len(keys) > 1 else [defaults.strip()]
        listed.update(zip(keys, values * (len(keys) // len(values)), strict=True))
    assert listed == {row.name: _shown(row.default) for row in fields(kind)}


def _shown(value: object) -> str:
    """A default as the page writes it."""
    if value is MISSING:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(value) or "[]"
    return f"`{value}`" if value and isinstance(value, str) else str(value) or '""'
