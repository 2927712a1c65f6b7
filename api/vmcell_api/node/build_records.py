"""Builds on disk: one folder each, with its log and how it ended.

`<build_dir>/<build id>/` holds `build.json` (the sandbox it uses), `log.jsonl` and, once it has
ended, `result.json`. A folder without a result belongs to a build that is running, or that died
with its noded; nothing else is kept of a build.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from vmcell_api.node.sandbox import unix_ms_now
from vmcell_protos.errors import HostError

WAITING, BUILDING, READY, ERROR = "waiting", "building", "ready", "error"
ENDED = (READY, ERROR)
MAX_ENTRIES = 20_000
MAX_LOG_BYTES = 8 << 20
MAX_MESSAGE_CHARACTERS = 4096
REASON_ENTRIES = 20


@dataclass(frozen=True, kw_only=True)
class LogEntry:
    """One line; `step` is "base", "finalize" or a step's number from 1."""

    at_unix_ms: int
    level: str
    message: str
    step: str


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """How a build ended: an image with its defaults, or why not and in which step."""

    status: str
    image: str = ""
    default_user: str = ""
    default_workdir: str = ""
    reason_message: str = ""
    reason_step: str = ""


class BuildRecord:
    """The folder of one build; thread-safe. Raises HostError when the disk does not take it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._count = 0
        self._bytes = 0
        self._tail: list[LogEntry] = []
        self.started = False

    @property
    def build_id(self) -> str:
        """The build's id."""
        return self.folder.name

    def create(self, sandbox_id: str) -> None:
        """Makes the folder; HostError already_exists when the id was used."""
        try:
            self.folder.mkdir(parents=True, mode=0o700)
            (self.folder / "log.jsonl").touch(mode=0o600)
            _write(self.folder / "build.json", {"sandbox_id": sandbox_id})
        except FileExistsError as error:
            raise HostError(
                f"build {self.build_id} exists already", code="already_exists"
            ) from error
        except OSError as error:
            raise HostError(f"cannot write build {self.build_id}: {error}") from error

    def sandbox_id(self) -> str:
        """The sandbox it uses, "" when the folder was not made whole."""
        return str(_read(self.folder / "build.json").get("sandbox_id", ""))

    def log(self, level: str, message: str, step: str) -> None:
        """Adds a line; beyond 20,000 lines or 8 MiB one says so and the rest is left out."""
        entry = LogEntry(
            at_unix_ms=unix_ms_now(),
            level=level,
            message=message[:MAX_MESSAGE_CHARACTERS],
            step=step,
        )
        with self._lock:
            self._tail = [*self._tail[1 - REASON_ENTRIES :], entry]
            if self._count > MAX_ENTRIES or self._bytes > MAX_LOG_BYTES:
                return
            line = json.dumps(asdict(entry)) + "\n"
            self._count += 1
            self._bytes += len(line)
            if self._count > MAX_ENTRIES or self._bytes > MAX_LOG_BYTES:
                full = LogEntry(
                    at_unix_ms=entry.at_unix_ms,
                    level="warn",
                    message="the log is full: what follows is left out",
                    step=step,
                )
                line = json.dumps(asdict(full)) + "\n"
            try:
                with (self.folder / "log.jsonl").open("a") as file:
                    file.write(line)
            except OSError as error:
                raise HostError(f"cannot write the log of a build: {error}") from error

    def last_of(self, step: str) -> list[LogEntry]:
        """The last lines of a step, for the reason of its failure."""
        with self._lock:
            return [entry for entry in self._tail if entry.step == step]

    def entries(self, offset: int, limit: int) -> list[LogEntry]:
        """At most `limit` lines from the one with number `offset` on."""
        found: list[LogEntry] = []
        try:
            with (self.folder / "log.jsonl").open() as file:
                for number, line in enumerate(file):
                    if number >= offset + limit:
                        break
                    if number >= offset and line.endswith("\n"):
                        found.append(LogEntry(**json.loads(line)))
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            raise HostError(f"cannot read the log of build {self.build_id}: {error}") from error
        return found

    def end(self, result: BuildResult) -> None:
        """Writes how it ended, in one step; the lines of the reason with it."""
        entries = self.last_of(result.reason_step) if result.status == ERROR else []
        table = {**asdict(result), "reason_entries": [asdict(entry) for entry in entries]}
        try:
            _write(self.folder / "result.json", table)
        except OSError as error:
            raise HostError(f"cannot write the result of a build: {error}") from error

    def result(self) -> tuple[BuildResult, list[LogEntry]] | None:
        """How it ended with the lines of the reason, None while it has not."""
        table = _read(self.folder / "result.json")
        if not table:
            return None
        try:
            rows = table.pop("reason_entries")
            entries = [LogEntry(**row) for row in rows]  # type: ignore[attr-defined]  # checked below
            return BuildResult(**table), entries  # type: ignore[arg-type]  # JSON of our own
        except (KeyError, TypeError) as error:
            raise HostError(f"the result of build {self.build_id} is damaged: {error}") from error

    def exists(self) -> bool:
        """Whether the folder is there."""
        return self.folder.is_dir()

    def remove(self) -> None:
        """Removes the folder; a missing one is fine."""
        try:
            shutil.rmtree(self.folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise HostError(f"cannot remove build {self.build_id}: {error}") from error


def unfinished(build_dir: str) -> list[BuildRecord]:
    """The records without a result."""
    folder = Path(build_dir)
    if not folder.is_dir():
        return []
    records = [BuildRecord(entry) for entry in sorted(folder.iterdir()) if entry.is_dir()]
    return [record for record in records if record.result() is None]


def _write(path: Path, table: dict[str, object]) -> None:
    """Whole or not at all: a reader sees the old file or the new one."""
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        json.dump(table, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _read(path: Path) -> dict[str, object]:
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise HostError(f"cannot read {path}: {error}") from error
    return table if isinstance(table, dict) else {}


class LineSplitter:
    """Bytes of an output in, whole lines out; `finish` gives what is left without its end."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Takes what has come; a line that is too long is cut."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._tell(line)
        while len(self._rest) > MAX_MESSAGE_CHARACTERS:
            self._tell(self._rest[:MAX_MESSAGE_CHARACTERS])
            self._rest = self._rest[MAX_MESSAGE_CHARACTERS:]

    def finish(self) -> None:
        """The output has ended."""
        if self._rest:
            self._tell(self._rest)
            self._rest = b""

    def _tell(self, line: bytes) -> None:
        # A progress bar rewrites its line: the last state is the one to keep.
        self._on_line(line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace"))
