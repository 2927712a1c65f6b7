"""Results of the matrix as tables: for a terminal, for the docs, as JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.matrix.running import Column, Result

MARKS = ("<!-- {}: begin -->", "<!-- {}: end -->")
_SANDBOX_ID = re.compile(r"\bi[a-z0-9]{19,20}\b")
WORDS = {"ok": "ok", "refused": "refused", "failed": "FAILED", "absent": "–"}


def groups_of(columns: Sequence[Column]) -> dict[str, list[Column]]:
    """The columns of each table, in order."""
    groups: dict[str, list[Column]] = {}
    for column in columns:
        groups.setdefault(column.client.group, []).append(column)
    return groups


def calls_of(columns: Sequence[Column]) -> list[str]:
    """The rows of a table: every call any of its clients made, each where its driver has it."""
    calls: list[str] = []
    for column in columns:
        at = 0
        for result in column.results:
            if result.call in calls:
                at = calls.index(result.call) + 1
            else:
                calls.insert(at, result.call)
                at += 1
    return calls


def cell(column: Column, call: str, *, marked: dict[str, int] | None = None) -> str:
    """One word, with the number of its sentence when `marked` gathers these."""
    if column.skipped:
        return "not run"
    found = next((result for result in column.results if result.call == call), None)
    if found is None:
        return "–"
    word = WORDS[found.outcome]
    if marked is None or found.outcome not in ("refused", "failed"):
        return word
    number = marked.setdefault(_sentence(found), len(marked) + 1)
    return f"{word} [{number}]"


def _sentence(result: Result) -> str:
    """The first line, without what differs from run to run."""
    first = result.detail.splitlines()[0] if result.detail else "no sentence"
    first = _SANDBOX_ID.sub("<id>", first)
    return first.replace("|", "\\|").replace("<", "&lt;")


def markdown(columns: Sequence[Column], where: str) -> str:
    """The tables and, below them, what the service or the client said; `where` names the run."""
    parts = [f"Last run: {where}.", *_repetitions(columns)]
    marked: dict[str, int] = {}
    for group, members in groups_of(columns).items():
        titles = [group, *(short_name(column) for column in members)]
        lines = [
            "| " + " | ".join(titles) + " |",
            "|" + "---|" * len(titles),
        ]
        for call in calls_of(members):
            cells = [call, *(cell(column, call, marked=marked) for column in members)]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    if marked:
        parts.append("\n".join(f"{number}. {text}" for text, number in marked.items()))
    return "\n\n".join(parts) + "\n"


def _repetitions(columns: Sequence[Column]) -> list[str]:
    """One paragraph for the clients that were run twice, none without any."""
    names = [f"{column.client.column}: {column.again}" for column in columns if column.again]
    return [f"Run twice: {'; '.join(names)}."] if names else []


def days(columns: Sequence[Column]) -> str:
    """That of the run, or the first and the last one."""
    found = sorted({column.day for column in columns if column.day})
    return " to ".join(dict.fromkeys((found[0], found[-1]))) if found else "never"


def short_name(column: Column) -> str:
    """A column's title: language and version."""
    return f"{column.client.language} {column.client.version}"


def totals(columns: Sequence[Column]) -> dict[str, int]:
    """How many calls had each outcome."""
    counted = dict.fromkeys(WORDS, 0)
    for column in columns:
        for result in column.results:
            counted[result.outcome] += 1
    return counted


def as_json(columns: Sequence[Column]) -> list[dict[str, object]]:
    """Everything, one object per client."""
    return [
        {
            **asdict(column.client),
            "skipped": column.skipped,
            "again": column.again,
            "day": column.day,
            "results": [asdict(result) for result in column.results],
        }
        for column in columns
    ]


def summary(columns: Sequence[Column], where: str) -> str:
    """One row per client: how many of its calls had each outcome."""
    lines = [
        f"Last run: {where}.",
        *_repetitions(columns),
        "",
        "| client | ok | refused by name | failed | not in this version |",
        "|---|---|---|---|---|",
    ]
    for column in columns:
        counted = totals([column])
        cells = [str(counted[outcome]) for outcome in ("ok", "refused", "failed", "absent")]
        if column.skipped:
            cells = ["not run"] * 4
        name = f"{column.client.column} ({column.client.language})"
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def write_page(page: Path, columns: Sequence[Column], where: str) -> None:
    """Puts the tables, or the summary, or both, between their marks; HostError without any."""
    texts = {"matrix": markdown(columns, where), "matrix summary": summary(columns, where)}
    content = page.read_text()
    present = {name: text for name, text in texts.items() if MARKS[0].format(name) in content}
    if not present:
        wanted = " or ".join(MARKS[0].format(name) for name in texts)
        raise HostError(f"{page} has no line {wanted} to write behind")
    for name, text in present.items():
        content = _between_marks(page, content, name, text)
    page.write_text(content)


def _between_marks(page: Path, content: str, name: str, text: str) -> str:
    begin, end = (mark.format(name) for mark in MARKS)
    before, _, rest = content.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise HostError(f"{page} has {begin} and no {end}; add it where the table is to end")
    return f"{before}{begin}\n{text}{end}{after}"
