"""Standard streams over real FIFOs, through the whole shim and a fake guest's real processes."""

from __future__ import annotations

import hashlib
import os
import random
import re
import select
import threading
import time
from pathlib import Path

import pytest
from fifo_client import Reader, feed
from shim_harness import DEADLINE_S, Shim, wait_until

from vmcell_protos import task
from vmcell_protos.errors import CallerError, VmcellError
from vmcell_protos.wellknown import Empty
from vmcell_shim.fifo import OutputFifo, StdinFifo, check_stdin, open_output, open_stdin


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
    close_io(shim)
    assert shim.wait() == 0
    close_io(shim)


def test_close_io_after_the_exit(shim: Shim) -> None:
    """Also while nobody has ever written, and twice; the streams' paths can be used anew."""
    for _ in range(2):
        shim.create("/bin/true", stdin=shim.fifo("in"))
        shim.start()
        assert shim.wait() == 0
        close_io(shim)
        close_io(shim)
        shim.delete()


def test_close_io_does_not_disturb_the_output(shim: Shim) -> None:
    """Half-closed: everything comes after the end of the input (kata #13643)."""
    out = Reader(shim.fifo("out"))
    script = "cat >/dev/null; head -c 1000000 /dev/zero; echo end"
    shim.create("/bin/sh", "-c", script, stdin=shim.fifo("in"), stdout=shim.fifo("out"))
    shim.start()
    feed(shim.fifo("in"), b"some").join(DEADLINE_S)
    close_io(shim)
    assert shim.wait() == 0
    assert out.to_end() == bytes(1_000_000) + b"end\n"


def test_process_that_closes_its_input_goes_on(shim: Shim) -> None:
    """The writer gets EPIPE, the output flows, and CloseIO still is no error."""
    out = Reader(shim.fifo("out"))
    script = "exec 0</dev/null; echo closed; exec sleep 600"
    shim.create("/bin/sh", "-c", script, stdin=shim.fifo("in"), stdout=shim.fifo("out"))
    shim.start()
    out.wait_for(b"closed\n")
    with open(shim.fifo("in"), "wb", buffering=0) as file, pytest.raises(BrokenPipeError):
        # More than all buffers take.
        file.writelines([bytes(4096)] * 10_000)
    close_io(shim)
    shim.kill(9)
    assert shim.wait() == 137


def test_input_larger_than_all_buffers_waits_for_the_process(shim: Shim) -> None:
    """CloseIO while most of the input is still on its way to a process that does not read yet."""
    data = random.Random(11).randbytes(3_000_000)
    out = Reader(shim.fifo("out"))
    script = "echo ready; read go <" + shim.fifo("go") + "; cat"
    shim.create("/bin/sh", "-c", script, stdin=shim.fifo("in"), stdout=shim.fifo("out"))
    shim.start()
    out.wait_for(b"ready\n")
    # Open before CloseIO, which would else be the end of an input that nobody writes.
    held = os.open(shim.fifo("in"), os.O_WRONLY)
    writer = feed(shim.fifo("in"), data)
    close_io(shim)
    feed(shim.fifo("go"), b"go\n").join(DEADLINE_S)
    writer.join(DEADLINE_S)
    os.close(held)
    assert shim.wait() == 0
    assert out.to_end() == b"ready\n" + data


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


def test_output_of_an_ended_process_waits_for_its_reader(shim: Shim) -> None:
    """containerd is away: the exit is told at once, nothing that was written is lost."""
    data = random.Random(5).randbytes(60_000)
    (shim.directory / "data").write_bytes(data)
    shim.create("/bin/cat", str(shim.directory / "data"), stdout=shim.fifo("out"))
    shim.start()
    began = time.monotonic()
    assert shim.wait() == 0
    assert time.monotonic() - began < 1.0
    assert Reader(shim.fifo("out")).to_end() == data


def test_more_than_a_full_pipe_waits_for_its_reader(shim: Shim) -> None:
    data = random.Random(6).randbytes(150_000)
    (shim.directory / "data").write_bytes(data)
    shim.create("/bin/cat", str(shim.directory / "data"), stdout=shim.fifo("out"))
    shim.start()
    began = time.monotonic()
    assert shim.wait() == 0
    assert time.monotonic() - began < 5
    assert Reader(shim.fifo("out")).to_end() == data


def test_absent_reader_stops_its_stream_only(shim: Shim) -> None:
    """From the beginning; buffers are bounded, so the writer stands still until somebody reads."""
    err = Reader(shim.fifo("err"))
    script = "head -c 3000000 /dev/zero & echo started >&2; wait; echo written >&2"
    shim.create("/bin/sh", "-c", script, stdout=shim.fifo("out"), stderr=shim.fifo("err"))
    shim.start()
    err.wait_for(b"started\n")
    assert b"written" not in err.data
    out = Reader(shim.fifo("out"))
    assert shim.wait() == 0
    assert (len(out.to_end()), err.to_end()) == (3_000_000, b"started\nwritten\n")


def test_slow_reader_of_one_stream(shim: Shim) -> None:
    """A client that has opened stdout and does not read holds up neither stderr nor an exec."""
    reader = os.open(shim.fifo("out"), os.O_RDONLY | os.O_NONBLOCK)
    err = Reader(shim.fifo("err"))
    script = "head -c 3000000 /dev/zero & head -c 5000000 /dev/zero >&2; echo all >&2; wait"
    shim.create("/bin/sh", "-c", script, stdout=shim.fifo("out"), stderr=shim.fifo("err"))
    shim.start()
    err.wait_for(b"all\n")
    exec_out = Reader(shim.fifo("exec-out"))
    shim.add_exec("e1", "/bin/echo", "of the exec", stdout=shim.fifo("exec-out"))
    shim.start("e1")
    assert shim.wait("e1") == 0
    assert exec_out.to_end() == b"of the exec\n"
    os.set_blocking(reader, True)
    with open(reader, "rb") as file:
        assert len(file.read()) == 3_000_000
    assert shim.wait() == 0


def test_delete_ends_what_waits_for_a_reader(shim: Shim) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for script in ("echo short", "head -c 150000 /dev/zero"):
        shim.create("/bin/sh", "-c", script, stdout=shim.fifo("out"))
        shim.start()
        assert shim.wait() == 0
        began = time.monotonic()
        shim.delete()
        assert time.monotonic() - began < 1.0
    assert "stdout" not in {thread.name for thread in threading.enumerate()}
    # The publisher's connection may have been opened meanwhile, and shim.log stays until the end.
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 3, "the end of descriptors")


def test_output_fifo_is_held_for_a_reader(tmp_path: Path) -> None:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    output = OutputFifo(path)
    os.write(output.fd, b"late")
    assert not output.let_go()
    holding = threading.Thread(target=output.linger)
    holding.start()
    assert Reader(path).to_end() == b"late"
    holding.join(DEADLINE_S)
    assert output.fd == -1


@pytest.mark.parametrize("early", [False, True])
def test_output_fifo_can_be_given_up(tmp_path: Path, early: bool) -> None:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    output = OutputFifo(path)
    os.write(output.fd, b"lost")
    assert not output.let_go()
    os.unlink(path)
    if early:
        output.give_up()
    holding = threading.Thread(target=output.linger)
    holding.start()
    if not early:
        output.give_up()
    holding.join(DEADLINE_S)
    assert not holding.is_alive()
    assert output.fd == -1


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


def test_exec_whose_input_ends_before_its_start(shim: Shim) -> None:
    """CloseIO right after Exec (nerdctl #5042); the init's input stays as it is."""
    init_out = Reader(shim.fifo("out"))
    shim.create("/bin/cat", stdin=shim.fifo("in"), stdout=shim.fifo("out"))
    shim.start()
    out = Reader(shim.fifo("exec-out"))
    shim.add_exec("e1", "/bin/cat", stdin=shim.fifo("exec-in"), stdout=shim.fifo("exec-out"))
    close_io(shim, "e1")
    shim.start("e1")
    assert shim.wait("e1") == 0
    assert out.to_end() == b""
    feed(shim.fifo("in"), b"still open").join(DEADLINE_S)
    init_out.wait_for(b"still open")


def test_output_of_an_ended_exec_waits_for_its_reader(shim: Shim) -> None:
    shim.create("/bin/sleep", "600")
    shim.start()
    shim.add_exec("e1", "/bin/sh", "-c", "echo kept; exit 4", stdout=shim.fifo("exec-out"))
    shim.start("e1")
    assert shim.wait("e1") == 4
    assert Reader(shim.fifo("exec-out")).to_end() == b"kept\n"
    shim.delete("e1")


def test_log_file_takes_both_streams(shim: Shim) -> None:
    log = shim.directory / "logs" / "c1.log"
    shim.create(
        "/bin/sh", "-c", "echo out; echo err >&2", stdout=f"file://{log}", stderr=f"file://{log}"
    )
    shim.start()
    assert shim.wait() == 0
    assert sorted(log.read_text().split()) == ["err", "out"]


def test_log_file_of_a_full_disk_does_not_stop_the_process(shim: Shim) -> None:
    shim.create("/bin/sh", "-c", "head -c 3000000 /dev/zero; exit 3", stdout="file:///dev/full")
    shim.start()
    assert shim.wait() == 3


def test_log_file_with_a_path_to_decode(tmp_path: Path) -> None:
    output = open_output("stdout", f"file://{tmp_path}/a%20b/c?ignored=1")
    assert output is not None
    os.write(output.fd, b"line")
    output.close()
    assert (tmp_path / "a b/c").read_bytes() == b"line"


@pytest.mark.parametrize("uri", ["ttrpc+unix:///run/x?streaming_id=1", "journald://x", "://x"])
def test_unknown_scheme_is_refused_by_name(shim: Shim, uri: str) -> None:
    with pytest.raises(VmcellError, match=re.escape(uri.partition(":")[0] + "://")):
        shim.create("/bin/true", stdout=uri)
    assert not shim.registry.in_use


@pytest.mark.parametrize("uri", ["file://relative/path", "file://", "file:///a%00b"])
def test_uri_without_an_absolute_path_is_refused(uri: str) -> None:
    with pytest.raises(CallerError, match=re.escape(uri)):
        open_output("stdout", uri)


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
    output.close()
    output.close()
