"""noded keeps a zygote, its own only where there is none, and ends that one alone."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from shim_harness import wait_until
from zygote_harness import Zygote, children, variant

from vmcell_api.config import ApiConfig
from vmcell_api.node import __main__ as noded
from vmcell_api.node import zygote as keeper_module
from vmcell_api.node.zygote import ZygoteKeeper, find_program
from vmcell_protos.errors import HostError
from vmcell_protos.zygote import MalformedMessage


@pytest.fixture
def zygote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Zygote]:
    """Not started; a keeper's own would serve at the same place."""
    monkeypatch.setattr(keeper_module, "PAUSE_S", 0.05)
    with tempfile.TemporaryDirectory(prefix="vmcell-k") as folder:
        named = Zygote(f"{folder}/z")
        monkeypatch.setenv("VMCELL_ZYGOTE", named.path)
        yield named
        named.kill()


@pytest.fixture
def keeper(zygote: Zygote) -> Iterator[ZygoteKeeper]:
    program = variant(Path(zygote.path).parent / keeper_module.PROGRAM)
    kept = ZygoteKeeper(str(program), zygote.path)
    yield kept
    kept.stop()


def serving(zygote: Zygote) -> int:
    """The pid of the zygote at this place; 0 when none listens."""
    try:
        return zygote.hello().number
    except (FileNotFoundError, ConnectionError, MalformedMessage):
        return 0


def test_one_is_started_started_again_and_ended(zygote: Zygote, keeper: ZygoteKeeper) -> None:
    wait_until(lambda: serving(zygote) > 0, "a zygote")
    first = serving(zygote)
    assert first in children(os.getpid())
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: serving(zygote) not in (0, first), "another")
    second = serving(zygote)
    keeper.stop()
    assert serving(zygote) == 0
    assert not Path(f"/proc/{second}").exists()
    keeper.stop()


def test_one_that_is_there_is_respected(zygote: Zygote) -> None:
    zygote.start()
    program = variant(Path(zygote.path).parent / keeper_module.PROGRAM)
    keeper = ZygoteKeeper(str(program), zygote.path)
    wait_until(lambda: keeper._others is not None, "the connection that watches it")
    assert children(os.getpid()) == [zygote.pid]
    keeper.stop()
    assert serving(zygote) == zygote.pid, "it is not the keeper's to end"
    keeper = ZygoteKeeper(str(program), zygote.path)
    wait_until(lambda: keeper._others is not None, "the connection that watches it")
    pid = zygote.pid
    zygote.kill()
    wait_until(lambda: serving(zygote) not in (0, pid), "the keeper's own")
    keeper.stop()
    assert serving(zygote) == 0


@pytest.mark.parametrize("program", ["/bin/false", "/no/such/program"])
def test_a_program_that_is_no_zygote_does_no_harm(
    zygote: Zygote, program: str, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = ZygoteKeeper(program, zygote.path)
    with caplog.at_level(logging.WARNING, "vmcell.noded"):
        wait_until(lambda: "zygote" in caplog.text, "a warning")
    keeper.stop()


def test_a_zygote_that_does_not_end_is_killed(
    zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "STOP_WITHIN_S", 0.1)
    program = Path(zygote.path).parent / "stubborn"
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({zygote.path!r} + '.up').touch()\n"
        "while True: signal.pause()\n"
    )
    program.chmod(0o755)
    keeper = ZygoteKeeper(str(program), zygote.path)
    wait_until(lambda: Path(f"{zygote.path}.up").exists(), "its start")
    keeper.stop()
    assert children(os.getpid()) == []


def test_noded_keeps_one_for_our_runtime_only(
    zygote: Zygote, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(zygote.path).parent
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(HostError, match="vmcell setup"):
        find_program()
    noded.keep_zygote(ApiConfig())()
    assert "no zygote, starts are slower" in caplog.text
    variant(folder / keeper_module.PROGRAM)
    noded.keep_zygote(ApiConfig(runtime="io.containerd.runc.v2"))()
    assert children(os.getpid()) == []
    stop = noded.keep_zygote(ApiConfig())
    wait_until(lambda: serving(zygote) > 0, "a zygote")
    stop()
    assert serving(zygote) == 0
