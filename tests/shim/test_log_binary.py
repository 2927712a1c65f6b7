"""Logging programs behind `binary://`: what they get, when they are ready, how they end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fifo_client import Reader
from shim_harness import DEADLINE_S, Shim, running_shim, wait_until

from vmcell_protos import task
from vmcell_protos.errors import CallerError, VmcellError
from vmcell_shim import log_binary
from vmcell_shim.log_binary import LogBinary, command_of

LOGGER = """#!{python} -IS
import json, os, sys, threading
fds = []
for name in os.listdir("/proc/self/fd"):
    try:
        os.fstat(int(name))
        fds.append(int(name))
    except OSError:
        pass
place = {directory!r} + "/"
with open("/proc/self/environ") as file:
    environ = file.read().rstrip("\\0").split("\\0")
row = dict(argv=sys.argv[1:], environ=sorted(environ), fds=sorted(fds), pid=os.getpid())
with open(place + "row." + str(os.getpid()), "w") as file:
    json.dump(row, file)
os.write(5, b"r")
os.close(5)
def copy(fd, name):
    with open(fd, "rb", buffering=0) as source, open(place + name, "ab", buffering=0) as sink:
        while data := source.read(1 << 16):
            sink.write(data)
threads = [threading.Thread(target=copy, args=row) for row in ((3, "out"), (4, "err"))]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.fixture
def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shim]:
    with running_shim(tmp_path, monkeypatch) as running:
        yield running
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def script(directory: Path, text: str) -> str:
    """A program below `directory`."""
    path = directory / "logger"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def logger(directory: Path) -> str:
    """A well-behaved logging program that says what it got."""
    return script(directory, LOGGER.format(python=sys.executable, directory=str(directory)))


def rows(directory: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("row.*"))]


def pipes() -> set[str]:
    """The pipes this process has; its other descriptors come and go with the publisher."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return {link for link in found if link.startswith("pipe:")}


def inherited() -> set[int]:
    """What this test run was started with; a shim closes such descriptors when it begins."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.get_inheritable(int(name)):
                found.add(int(name))
    return found


@pytest.mark.parametrize("scheme", ["binary", "binary-v2"])
def test_one_program_takes_both_streams(shim: Shim, scheme: str) -> None:
    place = shim.directory
    uri = f"{scheme}://{logger(place)}?key=a%20value&flag&second=2"
    shim.create("/bin/sh", "-c", "echo out; echo err >&2; exit 7", stdout=uri, stderr=uri)
    shim.start()
    assert shim.wait() == 7
    shim.delete()
    (row,) = rows(place)
    assert row["argv"] == ["key", "a value", "flag", "", "second", "2"]
    assert row["environ"] == ["CONTAINER_ID=c1", "CONTAINER_NAMESPACE=test"]
    assert row["fds"] == sorted({0, 1, 2, 3, 4, 5} | inherited())
    assert ((place / "out").read_text(), (place / "err").read_text()) == ("out\n", "err\n")
    assert not Path(f"/proc/{row['pid']}").exists()


def test_everything_arrives(shim: Shim) -> None:
    place = shim.directory
    uri = f"binary://{logger(place)}"
    shim.create("/bin/sh", "-c", "head -c 20000000 /dev/zero", stdout=uri, stderr=uri)
    shim.start()
    assert shim.wait() == 0
    shim.delete()
    assert (place / "out").stat().st_size == 20_000_000


def test_one_stream_with_a_program_the_other_without(shim: Shim) -> None:
    place = shim.directory
    err = Reader(shim.fifo("stderr"))
    uri = f"binary://{logger(place)}"
    shim.create("/bin/sh", "-c", "echo out; echo err >&2", stdout=uri, stderr=shim.fifo("stderr"))
    shim.start()
    assert shim.wait() == 0
    shim.delete()
    assert ((place / "out").read_text(), (place / "err").read_text()) == ("out\n", "")
    assert err.to_end() == b"err\n"


def test_two_uris_are_two_programs(shim: Shim) -> None:
    place = shim.directory
    uri = f"binary://{logger(place)}"
    shim.create(
        "/bin/sh", "-c", "echo out; echo err >&2", stdout=f"{uri}?of=out", stderr=f"{uri}?of=err"
    )
    shim.start()
    assert shim.wait() == 0
    shim.delete()
    assert sorted(str(row["argv"]) for row in rows(place)) == ["['of', 'err']", "['of', 'out']"]
    assert ((place / "out").read_text(), (place / "err").read_text()) == ("out\n", "err\n")


def test_terminal_and_exec(shim: Shim) -> None:
    place = shim.directory
    uri = f"binary://{logger(place)}"
    shim.create("/bin/sh", "-c", "tty; exec sleep 600", stdout=uri, terminal=True)
    shim.start()
    shim.add_exec("e1", "/bin/echo", "of the exec", stdout=uri)
    shim.start("e1")
    assert shim.wait("e1") == 0
    shim.delete("e1")
    assert len(rows(place)) == 2
    shim.kill()
    assert shim.wait() == 137
    shim.delete()
    text = (place / "out").read_text()
    assert "/dev/pts/" in text
    assert "of the exec\n" in text


READY = {"by a byte": "printf r >&5", "by closing": "exec 5>&-"}


@pytest.mark.parametrize("how", READY)
def test_ready(shim: Shim, how: str) -> None:
    place = shim.directory
    path = script(place, f"#!/bin/sh\n{READY[how]}\nwhile read line; do :; done <&3\n")
    shim.create("/bin/true", stdout=f"binary://{path}")
    shim.delete()


def test_version_2_needs_the_byte(shim: Shim) -> None:
    path = script(shim.directory, "#!/bin/sh\nexit 3\n")
    with pytest.raises(VmcellError, match=f"{path} closed descriptor 5 and was not ready"):
        shim.create("/bin/true", stdout=f"binary-v2://{path}")
    assert not shim.registry.in_use
    assert shim.left_behind() == []


def test_program_that_is_never_ready(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task can be asked meanwhile; afterwards nothing of it is left."""
    monkeypatch.setattr(log_binary, "READY_S", 1.0)
    path = script(shim.directory, "#!/bin/sh\nexec sleep 600\n")
    errors: list[VmcellError] = []

    def create() -> None:
        try:
            shim.create("/bin/true", stdout=f"binary://{path}")
        except VmcellError as error:
            errors.append(error)

    creating = threading.Thread(target=create)
    creating.start()
    wait_until(lambda: shim.registry.in_use, "the creation")
    began = time.monotonic()
    assert shim.state().status == task.TaskStatus_CREATED
    assert time.monotonic() - began < 0.5
    creating.join(DEADLINE_S)
    assert "not ready within 1 s" in str(errors[0])
    assert errors[0].code == "deadline_exceeded"
    assert not shim.registry.in_use
    assert shim.left_behind() == []


def test_exec_whose_program_is_not_ready_can_be_added_again(shim: Shim) -> None:
    path = script(shim.directory, "#!/bin/sh\nexit 3\n")
    shim.create("/bin/sleep", "600")
    shim.start()
    with pytest.raises(VmcellError, match="not ready"):
        shim.add_exec("e1", "/bin/true", stdout=f"binary-v2://{path}")
    shim.add_exec("e1", "/bin/true")


@pytest.mark.parametrize("uri", ["binary:///no/such/logger", "binary:///etc/passwd"])
def test_program_that_cannot_run_is_named(shim: Shim, uri: str) -> None:
    before = pipes()
    with pytest.raises(VmcellError, match=uri.removeprefix("binary://")):
        shim.create("/bin/true", stdout=uri, stderr=uri)
    assert not shim.registry.in_use
    assert pipes() <= before


@pytest.mark.parametrize("uri", ["binary://nerdctl?x=y", "binary://", "binary:///x?a=%00"])
def test_bad_uri_is_named(uri: str) -> None:
    with pytest.raises(CallerError, match="log URI"):
        command_of(uri)


def test_the_first_value_of_a_key_counts() -> None:
    assert command_of("binary:///bin/x%20y?a=1&b=&a=2") == ("/bin/x y", ["a", "1", "b", ""])


def started(path: str, told: list[str]) -> LogBinary:
    made = LogBinary(
        f"binary://{path}",
        ("stdout", "stderr"),
        container_id="c1",
        namespace="test",
        warn=told.append,
    )
    made.wait_ready()
    return made


def test_end_of_input_ends_it_without_a_signal(tmp_path: Path) -> None:
    told: list[str] = []
    text = f"#!/bin/sh\ntrap 'echo term >{tmp_path}/term' TERM\nexec 5>&-\ncat <&3 >/dev/null\n"
    started(script(tmp_path, text), told).close()
    assert not (tmp_path / "term").exists()
    assert told == []


def test_sigterm_for_one_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_binary, "EOF_S", 0.1)
    told: list[str] = []
    program = started(script(tmp_path, "#!/bin/sh\nexec 5>&-\nexec sleep 600\n"), told)
    program.close()
    program.close()
    assert told == []
    with pytest.raises(ProcessLookupError):
        os.kill(program.pid, 0)


def test_sigkill_for_one_that_ignores_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_binary, "EOF_S", 0.1)
    monkeypatch.setattr(log_binary, "TERM_S", 0.2)
    told: list[str] = []
    text = "#!/bin/sh\ntrap '' TERM\nexec 5>&-\nexec sleep 600\n"
    started(script(tmp_path, text), told).close()
    assert told == [f"the logging binary {tmp_path}/logger ended with signal 9"]


def test_program_that_dies_does_not_stop_the_process(shim: Shim) -> None:
    """Its output is dropped from then on; the process neither dies nor stands still."""
    path = script(shim.directory, f"#!/bin/sh\necho $$ >{shim.directory}/pid\nexec 5>&-\ncat <&3\n")
    out = Reader(shim.fifo("err"))
    command = "echo begun >&2; head -c 3000000 /dev/zero; echo through >&2; exit 3"
    shim.create("/bin/sh", "-c", command, stdout=f"binary://{path}", stderr=shim.fifo("err"))
    os.kill(int((shim.directory / "pid").read_text()), signal.SIGKILL)
    shim.start()
    assert shim.wait() == 3
    assert out.to_end() == b"begun\nthrough\n"
    shim.delete()


def test_program_that_does_not_read_holds_neither_exit_nor_delete(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_binary, "EOF_S", 0.1)
    path = script(shim.directory, "#!/bin/sh\nexec 5>&-\nexec sleep 600\n")
    shim.create("/bin/sh", "-c", "head -c 150000 /dev/zero", stdout=f"binary://{path}")
    shim.start()
    began = time.monotonic()
    assert shim.wait() == 0
    shim.delete()
    assert time.monotonic() - began < 6


def test_no_descriptor_is_kept(shim: Shim) -> None:
    uri = f"binary://{logger(shim.directory)}"
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        shim.create("/bin/true", stdout=uri, stderr=uri)
        shim.start()
        assert shim.wait() == 0
        shim.delete()
    # The publisher's connection may have been opened meanwhile, and shim.log stays until the end.
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 3, "the end of descriptors")
