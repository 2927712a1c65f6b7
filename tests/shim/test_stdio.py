"""Standard streams over real FIFOs, through the whole shim and a fake guest's real processes."""

from __future__ import annotations

import hashlib
import os
import random
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_harness import DEADLINE_S, Shim, running_shim, wait_until

from vmcell_protos import task
from vmcell_protos.errors import CallerError, VmcellError
from vmcell_protos.wellknown import Empty
from vmcell_shim.fifo import OutputFifo, StdinFifo, check_stdin, open_output, open_stdin


@pytest.fixture
def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shim]:
    with running_shim(tmp_path, monkeypatch) as running:
        yield running


class Reader:
    """A client's end of an output FIFO: reads to the end in a thread of its own."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.data = bytearray()
        self._arrived = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with open(self._path, "rb", buffering=0) as file:
            while chunk := file.read(1 << 16):
                with self._arrived:
                    self.data += chunk
                    self._arrived.notify_all()

    def wait_for(self, text: bytes) -> None:
        with self._arrived:
            assert self._arrived.wait_for(lambda: text in self.data, DEADLINE_S), bytes(self.data)

    def to_end(self) -> bytes:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the stream has not ended"
        return bytes(self.data)


def feed(path: str, data: bytes) -> threading.Thread:
    """A client's end of stdin, in a thread: the whole of `data`, then its end."""

    def run() -> None:
        with open(path, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def close_io(shim: Shim, exec_id: str = "") -> None:
    shim.call("CloseIO", task.CloseIORequest(id="c1", exec_id=exec_id, stdin=True), Empty)


def test_stdout_and_stderr_apart(shim: Shim) -> None:
    out, err = Reader(shim.fifo("out")), Reader(shim.fifo("err"))
    shim.create(
        "/bin/sh", "-c", "echo to out; echo to err >&2", stdout=shim.fifo("out"),
        stderr=shim.fifo("err"),
    )  # fmt: skip
    shim.start()
    assert shim.wait() == 0
    assert (out.to_end(), err.to_end()) == (b"to out\n", b"to err\n")


def test_a_hundred_megabytes_both_ways(shim: Shim) -> None:
    data = random.Random(7).randbytes(100_000_000)
    out = Reader(shim.fifo("out"))
    writer = feed(shim.fifo("in"), data)
    shim.create("/bin/cat", stdin=shim.fifo("in"), stdout=shim.fifo("out"))
    shim.start()
    writer.join(60)
    close_io(shim)
    assert shim.wait() == 0
    assert hashlib.sha256(out.to_end()).digest() == hashlib.sha256(data).digest()


def test_input_ends_only_with_close_io(shim: Shim) -> None:
    """A client that goes away is no end of input; CloseIO is, and may come twice."""
    out = Reader(shim.fifo("out"))
    shim.create("/bin/cat", stdin=shim.fifo("in"), stdout=shim.fifo("out"))
    shim.start()
    feed(shim.fifo("in"), b"first ").join(DEADLINE_S)
    out.wait_for(b"first ")
    feed(shim.fifo("in"), b"second").join(DEADLINE_S)
    out.wait_for(b"second")
    close_io(shim)
    close_io(shim)
    assert shim.wait() == 0
    assert out.to_end() == b"first second"


def test_close_io_right_after_create(shim: Shim) -> None:
    out = Reader(shim.fifo("out"))
    shim.create("/bin/cat", stdin=shim.fifo("in"), stdout=shim.fifo("out"))
    close_io(shim)
    shim.start()
    assert shim.wait() == 0
    assert out.to_end() == b""


def test_input_that_ends_while_create_runs_is_not_forgotten(shim: Shim) -> None:
    """ctr says CloseIO only when its input ends after Create: so it must not end before."""
    written = feed(shim.fifo("in"), b"early")
    shim.create("/bin/cat", stdin=shim.fifo("in"), stdout=shim.fifo("out"))
    out = Reader(shim.fifo("out"))
    assert written.is_alive()
    shim.start()
    written.join(DEADLINE_S)
    close_io(shim)
    assert shim.wait() == 0
    assert out.to_end() == b"early"


def test_close_io_without_stdin(shim: Shim) -> None:
    shim.create("/bin/cat")
    close_io(shim)
    shim.start()
    assert shim.wait() == 0


def test_no_stdin_is_an_immediate_end(shim: Shim) -> None:
    out = Reader(shim.fifo("out"))
    shim.create("/bin/sh", "-c", "cat; echo end", stdout=shim.fifo("out"))
    shim.start()
    assert shim.wait() == 0
    assert out.to_end() == b"end\n"


def test_process_that_stops_reading(shim: Shim) -> None:
    """`yes | head -1`: the writer gets EPIPE as from any process."""
    broken = threading.Event()
    path = shim.fifo("in")

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"y\n" * 1000)
            except BrokenPipeError:
                broken.set()

    out = Reader(shim.fifo("out"))
    threading.Thread(target=write, daemon=True).start()
    shim.create("/usr/bin/head", "-1", stdin=path, stdout=shim.fifo("out"))
    shim.start()
    assert shim.wait() == 0
    assert out.to_end() == b"y\n"
    assert broken.wait(DEADLINE_S)


def test_client_may_go_away_and_come_back(shim: Shim) -> None:
    """Without a reader the workload is neither killed nor loses what it wrote (64 KiB)."""
    first = os.open(shim.fifo("out"), os.O_RDONLY | os.O_NONBLOCK)
    script = "echo one; read line; echo two; read line; exit 8"
    shim.create("/bin/sh", "-c", script, stdin=shim.fifo("in"), stdout=shim.fifo("out"))
    shim.start()
    poll = select.poll()
    poll.register(first, select.POLLIN)
    assert poll.poll(DEADLINE_S * 1000)
    assert os.read(first, 100) == b"one\n"
    os.close(first)
    feed(shim.fifo("in"), b"go\n").join(DEADLINE_S)
    second = Reader(shim.fifo("out"))
    second.wait_for(b"two\n")
    feed(shim.fifo("in"), b"end\n").join(DEADLINE_S)
    assert shim.wait() == 8
    assert second.to_end() == b"two\n"


def test_child_in_the_background_does_not_hold_the_exit(shim: Shim) -> None:
    out = Reader(shim.fifo("out"))
    shim.create("/bin/sh", "-c", "sleep 600 & echo left", stdout=shim.fifo("out"))
    shim.start()
    began = time.monotonic()
    assert shim.wait() == 0
    assert time.monotonic() - began < 5
    assert out.to_end() == b"left\n"


def test_dead_client_does_not_hold_the_exit(shim: Shim) -> None:
    shim.create("/bin/sh", "-c", "head -c 200000 /dev/zero & exit 6", stdout=shim.fifo("out"))
    shim.start()
    began = time.monotonic()
    assert shim.wait() == 6
    assert time.monotonic() - began < 5


def test_client_that_opens_late_gets_everything(shim: Shim) -> None:
    """A process may be over before its client has opened the FIFO."""
    shim.create("/bin/echo", "short", stdout=shim.fifo("out"))
    shim.start()
    readable = os.open(shim.fifo("out"), os.O_RDONLY | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(readable, select.POLLIN)
    assert poll.poll(DEADLINE_S * 1000)
    assert os.read(readable, 100) == b"short\n"
    os.close(readable)
    assert shim.wait() == 0


def test_output_nobody_reads_is_kept_for_a_moment(tmp_path: Path) -> None:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    output = OutputFifo(path)
    os.write(output.fd, b"late")
    began = time.monotonic()
    reader = Reader(path)
    output.wait_reader(DEADLINE_S)
    assert time.monotonic() - began < DEADLINE_S / 2
    output.close()
    assert reader.to_end() == b"late"


def test_terminal(shim: Shim) -> None:
    out = Reader(shim.fifo("out"))
    shim.create(
        "/bin/sh", "-c", "read line; tty; stty size; exit 3", stdin=shim.fifo("in"),
        stdout=shim.fifo("out"), terminal=True,
    )  # fmt: skip
    resize = task.ResizePtyRequest(id="c1", width=101, height=42)
    shim.call("ResizePty", resize, Empty)
    shim.start()
    feed(shim.fifo("in"), b"go\n").join(DEADLINE_S)
    assert shim.wait() == 3
    assert b"/dev/pts/" in out.to_end()
    assert b"42 101" in out.to_end()


def test_exec_has_streams_of_its_own(shim: Shim) -> None:
    shim.create("/bin/sleep", "600")
    shim.start()
    out = Reader(shim.fifo("exec-out"))
    writer = feed(shim.fifo("exec-in"), b"for the exec")
    shim.add_exec("e1", "/bin/cat", stdin=shim.fifo("exec-in"), stdout=shim.fifo("exec-out"))
    shim.start("e1")
    writer.join(DEADLINE_S)
    close_io(shim, "e1")
    assert shim.wait("e1") == 0
    assert out.to_end() == b"for the exec"


def test_log_file_takes_both_streams(shim: Shim) -> None:
    log = shim.directory / "logs" / "c1.log"
    shim.create(
        "/bin/sh", "-c", "echo out; echo err >&2", stdout=f"file://{log}", stderr=f"file://{log}"
    )
    shim.start()
    assert shim.wait() == 0
    assert sorted(log.read_text().split()) == ["err", "out"]


def test_logging_binary_is_refused_by_name(shim: Shim) -> None:
    with pytest.raises(VmcellError, match="binary://"):
        shim.create("/bin/true", stdout="binary:///usr/bin/logger")
    assert not shim.registry.in_use


def test_nothing_stays_open(shim: Shim) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        out = Reader(shim.fifo("out"))
        shim.create("/bin/cat", stdin=shim.fifo("in"), stdout=shim.fifo("out"))
        close_io(shim)
        shim.start()
        assert shim.wait() == 0
        shim.delete()
        out.to_end()
    # The publisher's connection may have been opened meanwhile, and shim.log stays until the end.
    wait_until(lambda: count() <= before + 3, f"descriptors back to {before}")


def test_bad_paths_are_named(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    for path in (plain, tmp_path / "absent"):
        with pytest.raises(CallerError, match=str(path)):
            check_stdin(str(path))
        with pytest.raises(CallerError, match=str(path)):
            open_stdin(str(path))
        with pytest.raises(CallerError, match=str(path)):
            open_output("stdout", str(path))
    assert open_stdin("") is None
    assert open_output("stdout", "") is None


def test_fifo_ends(tmp_path: Path) -> None:
    """The rules of fifo.py on a bare FIFO: no blocking open, kept ends, end of input."""
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    stdin = StdinFifo(path)
    with pytest.raises(BlockingIOError):
        os.read(stdin.fd, 1)
    stdin.end_input()
    assert os.read(stdin.fd, 1) == b""
    stdin.close()
    stdin.close()
    output = OutputFifo(path)
    assert os.write(output.fd, b"kept") == 4
    output.forget_reader()
    with pytest.raises(BrokenPipeError):
        os.write(output.fd, b"gone")
    output.close()
