"""Sandboxes, snapshots and memory as tables: the API's JSON in, titles and cells out."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from vmcell_tools.cli_output import cell, plain

Json = Mapping[str, Any]
Row = tuple[str, ...]
STATE_MARKS = {"running": "[green]running[/]", "paused": "[yellow]paused[/]"}
CHANGE_MARKS = {
    "added": "[green]added[/]",
    "removed": "[red]removed[/]",
    "modified": "[yellow]modified[/]",
}
SANDBOX_TITLES = ("id", "template", "state", "started", "ends in", "CPUs", "MiB", "metadata")
MEMORY_TITLES = ("what", "PSS", "shared", "private", "of it dirty", "RSS", "swap")
HISTORY_TITLES = ("id", "name", "what", "parent", "made", "ends in", "MiB", "on disk")
SUM_WORDS = ("rss", "pss", "sharedClean", "sharedDirty", "privateClean", "privateDirty", "swap")


def sandbox_row(row: Json, now: float) -> Row:
    """`now` in unix seconds."""
    return (
        cell(row["sandboxID"]),
        cell(row["templateID"]),
        _state(row),
        moment(row["startedAt"]),
        _ends_in(row, now),
        cell(row["cpuCount"]),
        cell(row["memoryMB"]),
        _pairs(row["metadata"]),
    )


def sandbox_facts(row: Json, sample: Json | None, now: float) -> list[Row]:
    """Everything of one sandbox, (what, value) a row; no secrets."""
    lifecycle = row.get("lifecycle") or {}
    facts: list[Row] = [
        ("id", cell(row["sandboxID"])),
        ("template", cell(row["templateID"])),
        ("state", _state(row)),
        ("started", moment(row["startedAt"])),
    ]
    if row["state"] == "running":
        facts.append(("ends", f"{moment(row['endAt'])}, in {_ends_in(row, now)}"))
    facts += [
        ("at its end", cell(lifecycle.get("onTimeout", "kill"))),
        ("wakes by requests", "yes" if lifecycle.get("autoResume") else "no"),
        ("CPUs", cell(row["cpuCount"]) + _used(sample, "cpuUsedPct", "{:.0f} % in use")),
        ("memory", f"{row['memoryMB']} MiB{_used(sample, 'memUsed', '{} in use')}"),
        ("disk", f"{row['diskSizeMB']} MiB{_used(sample, 'diskUsed', '{} in use')}"),
        ("internet", "yes" if row.get("allowInternetAccess", True) else "no"),
    ]
    network = row.get("network") or {}
    for title, name in (("allowed out", "allowOut"), ("denied out", "denyOut")):
        if network.get(name):
            facts.append((title, cell(", ".join(map(str, network[name])))))
    if network.get("allowPublicTraffic") is False:
        facts.append(("ports", "with a traffic token only"))
    for mount in row.get("volumeMounts") or ():
        facts.append(("volume", cell(f"{mount['name']} at {mount['path']}")))
    if row["metadata"]:
        facts.append(("metadata", _pairs(row["metadata"])))
    return facts


def log_line(row: Json) -> str:
    """When, level, message with the event's own fields: one line, whatever a guest wrote."""
    own = {name: text for name, text in row["fields"].items() if name != "logger"}
    words = [str(row["message"]), *(f"{name}={text}" for name, text in own.items())]
    return f"{moment(row['timestamp'])} {plain(row['level']):5} {plain(' '.join(words))}"


def memory_sums(answer: Json) -> dict[str, dict[str, int]]:
    """`overhead`, the two processes without guest RAM, and `guestRam`: bytes by kind."""
    return {
        title: {
            f"{word}Bytes": sum(row[part][f"{word}Bytes"] for row in answer["processes"])
            for word in SUM_WORDS
        }
        for title, part in (("overhead", "own"), ("guestRam", "guestRam"))
    }


def memory_rows(answer: Json) -> list[Row]:
    """A row for each process, their sum, and guest RAM."""
    sums = memory_sums(answer)
    rows = [
        _memory_row(f"{row['name']} (pid {row['pid']})", row["own"]) for row in answer["processes"]
    ]
    rows.append(_memory_row("overhead", sums["overhead"]))
    size = mib(answer["guestMemoryBytes"])
    rows.append(_memory_row(f"guest RAM, of {size}", sums["guestRam"]))
    return rows


def _memory_row(title: str, found: Mapping[str, int]) -> Row:
    shared = found["sharedCleanBytes"] + found["sharedDirtyBytes"]
    private = found["privateCleanBytes"] + found["privateDirtyBytes"]
    numbers = (found["pssBytes"], shared, private, found["privateDirtyBytes"])
    return cell(title), *map(mib, (*numbers, found["rssBytes"], found["swapBytes"]))


def history_row(row: Json, now: float) -> Row:
    """A snapshot, or what a rollback can be undone with."""
    return (
        cell(row["snapshotID"]),
        cell(", ".join(map(str, row["names"]))),
        "undo point" if row["isUndoPoint"] else "snapshot",
        cell(row["parent"] or "-"),
        moment(row["createdAt"]),
        _in(row["expiresAt"], now) if row["expiresAt"] else "-",
        f"{row['bytes'] / (1 << 20):.1f}",
        f"{row['allocatedBytes'] / (1 << 20):.1f}",
    )


def file_change_rows(rows: Sequence[Json]) -> list[Row]:
    """Changed files of a guest."""
    return [
        (
            CHANGE_MARKS.get(row["change"], cell(row["change"])),
            _size(row.get("sizeBefore")),
            _size(row.get("sizeAfter")),
            cell(row["path"]),
        )
        for row in rows
    ]


def moment(text: object) -> str:
    """An RFC 3339 time in this host's time, to the second."""
    try:
        found = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return cell(text)
    return found.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def span(seconds: float) -> str:
    """`45 s`, `12 min`, `5 h`, `3 d`: the largest unit of which there are two or more."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def mib(count: float) -> str:
    """Bytes as MiB."""
    return f"{count / (1 << 20):.1f} MiB"


def _in(text: object, now: float) -> str:
    try:
        return span(datetime.datetime.fromisoformat(str(text)).timestamp() - now)
    except ValueError:
        return cell(text)


def _ends_in(row: Json, now: float) -> str:
    return _in(row["endAt"], now) if row["state"] == "running" else "-"


def _state(row: Json) -> str:
    return STATE_MARKS.get(row["state"], cell(row["state"]))


def _pairs(found: Mapping[str, object]) -> str:
    return " ".join(cell(f"{name}={value}") for name, value in found.items())


def _size(count: object) -> str:
    return cell("-" if count is None else count)


def _used(sample: Json | None, name: str, form: str) -> str:
    value = None if sample is None else sample.get(name)
    if value is None:
        return ""
    return ", " + form.format(value if name.endswith("Pct") else mib(value))
