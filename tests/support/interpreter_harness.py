"""The code interpreter on this host, with the very packages that its image has.

They live in a virtual environment of their own in the build cache, named by the lock file.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from envd_harness import free_port

from vmcell_tools.build_cache import BuildCache
from vmcell_tools.build_step import run_step
from vmcell_tools.interpreter_image import LOCK
from vmcell_tools.progress import Progress
from vmcell_tools.python_wheels import PYTHON_VERSION, wheels, wheels_digest

KIND = "interpreter-venv"
SOURCE_ROOT = Path(__file__).resolve().parents[2]
READY_WITHIN_S = 60.0


def interpreter_python() -> Path:
    """A Python of the image's version with the image's packages; made once."""
    cache = BuildCache.default()
    base = shutil.which(f"python{PYTHON_VERSION}", path=f"/usr/bin:{os.environ['PATH']}")
    assert base is not None, f"needs python{PYTHON_VERSION}, which Debian 12 has"

    def fill(directory: Path) -> None:
        files = wheels(LOCK, cache, progress)
        progress.step("making a virtual environment for the code interpreter")
        python = directory / "venv/bin/python"
        run_step([base, "-m", "venv", "--without-pip", directory / "venv"], deadline_s=120)
        (pip,) = (file for file in files if file.name.startswith("pip-"))
        words = ["install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
        run_step([python, f"{pip}/pip", *words, *files], deadline_s=600)

    with Progress("tests") as progress:
        made = cache.build(KIND, wheels_digest(LOCK), fill, progress)
        cache.keep_newest(KIND, 2)
    return made / "venv/bin/python"


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """A running server; `cwd` is the directory of its default contexts."""

    url: str
    process: subprocess.Popen[bytes]
    cwd: Path
    log: Path

    def kernels(self) -> list[int]:
        """Process ids of the kernels: the server's children."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in task.read_text().split()] if task.exists() else []

    def zombies(self) -> list[int]:
        """Children that have ended and that the server has not noticed."""
        return [pid for pid in self.kernels() if not _alive(pid)]


@contextmanager
def running_interpreter(folder: Path) -> Iterator[Interpreter]:
    """Starts the server; afterwards it and its kernels are gone, which is asserted."""
    cwd, home = folder / "cwd", folder / "home"
    cwd.mkdir()
    home.mkdir()
    port = free_port()
    log = folder / "server.log"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(SOURCE_ROOT / "guest-agent"),
        "FROM_SERVER": "kept",
        # a cache of fonts takes seconds to make
        "MPLCONFIGDIR": str(BuildCache.default().root / KIND / "matplotlib"),
    }
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        if name in os.environ:
            environment[name] = os.environ[name]
    words = [interpreter_python(), "-m", "vmcell_interpreter", "--port", str(port)]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*words, "--cwd", cwd],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env=environment,
        )
    interpreter = Interpreter(url=f"http://127.0.0.1:{port}", process=process, cwd=cwd, log=log)
    try:
        _await_ready(interpreter)
        yield interpreter
    finally:
        kernels = interpreter.kernels()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()  # or other tests find a child that is not theirs
            raise
    left = [pid for pid in kernels if _alive(pid)]
    assert not left, f"kernels outlive their server: {left}"
    text = log.read_text()
    assert not re.search(r"Traceback|ERROR", text), text


def _await_ready(interpreter: Interpreter) -> None:
    until = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(f"{interpreter.url}/health", timeout=5) as answer:
                assert answer.read() == b'"OK"'
                return
        except urllib.error.URLError as error:
            if interpreter.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"not ready: {interpreter.log.read_text()}") from error
            time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
