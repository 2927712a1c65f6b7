"""Test lanes beside each other, for `make test`: `run_lanes.py FOLDER NAME=COMMAND…`.

Each lane writes to FOLDER/NAME.log, which is printed whole when the lane ends; until then a line
every half minute says how far each is. The exit status is 1 when a lane failed; none is ended by
another's failure. ^C and SIGTERM end them all: SIGINT to each, SIGKILL after a minute.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

SAY_EVERY_S = 30.0
LOOK_EVERY_S = 0.2
END_WITHIN_S = 60.0
TAIL_BYTES = 4096
WIDTH = 100
SUMMARY = re.compile(r"^=+ (.* in [0-9.]+s.*?) =+$", re.MULTILINE)


class Interrupted(Exception):
    """Somebody wants the lanes to end; the signal's number."""


@dataclass(kw_only=True)
class Lane:
    """One command, in a session of its own so that a signal reaches all of it."""

    name: str
    log: Path
    process: subprocess.Popen[bytes]
    began: float
    status: int | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def last_line(self) -> str:
        """Of the log so far, cut to a terminal's width."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")[-WIDTH:]

    def verdict(self) -> str:
        """How it ended, with what pytest says last of each of its runs."""
        text = self.log.read_text(errors="replace")
        told = SUMMARY.findall(text) or [self.last_line()]
        how = "passed" if self.status == 0 else f"FAILED with status {self.status}"
        return f"{how}: {'; '.join(told)}"

    def signal(self, number: int) -> None:
        """To the whole session, what the command has left behind included."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return


def start(name: str, command: str, folder: Path) -> Lane:
    """The lane, running; its log holds both of its streams in the order they were written."""
    log = folder / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    return Lane(name=name, log=log, process=process, began=time.monotonic())


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def tell_end(lane: Lane) -> None:
    """The lane's log, whole, between two lines that name it."""
    say(f"======== {lane.name} lane, {lane.seconds:.0f} s, status {lane.status} ========")
    sys.stdout.flush()
    with lane.log.open("rb") as file:
        while piece := file.read(1 << 16):
            sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()
    say(f"======== end of the {lane.name} lane ========")


def watch(lanes: list[Lane]) -> None:
    """Returns when all have ended; tells of each when it does."""
    said = time.monotonic()
    while running := [lane for lane in lanes if lane.status is None]:
        for lane in running:
            lane.status = lane.process.poll()
            if lane.status is not None:
                tell_end(lane)
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            for lane in running:
                if lane.status is None:
                    say(f"{lane.name} lane, {lane.seconds:.0f} s: {lane.last_line()}")
        time.sleep(LOOK_EVERY_S)


def end_all(lanes: list[Lane]) -> None:
    """Every lane is gone afterwards; those that had to be ended show their logs."""
    running = [lane for lane in lanes if lane.status is None]
    for lane in running:
        lane.signal(signal.SIGINT)
    deadline = time.monotonic() + END_WITHIN_S
    for lane in running:
        try:
            lane.status = lane.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            say(f"the {lane.name} lane did not end within {END_WITHIN_S:.0f} s and is killed")
            lane.signal(signal.SIGKILL)
            lane.status = lane.process.wait()
        # A shell's background commands do not hear SIGINT.
        lane.signal(signal.SIGKILL)
        tell_end(lane)


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


def run(folder: Path, commands: dict[str, str]) -> int:
    """0, 1 when a lane failed, 128 + n after signal n."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    lanes: list[Lane] = []
    result = 0
    try:
        for name, command in commands.items():
            lanes.append(start(name, command, folder))
            say(f"{name} lane: started; its log is {lanes[-1].log}")
        watch(lanes)
    except Interrupted as interrupted:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        result = 128 + int(interrupted.args[0])
        say("interrupted; the lanes are ended")
        end_all(lanes)
    for lane in lanes:
        say(f"{lane.name} lane: {lane.verdict()}")
    return result or int(any(lane.status for lane in lanes))


def main(words: list[str]) -> int:
    """The command."""
    commands = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    if len(words) < 2 or len(commands) != len(words) - 1:
        say(f"usage: {Path(__file__).name} FOLDER NAME=COMMAND… with names that differ")
        return 2
    return run(Path(words[0]), commands)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
