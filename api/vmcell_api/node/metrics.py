"""What the node's sandboxes used over time: asked of each envd every few seconds, kept bounded.

A history is a file in the sandbox's folder, so it outlives noded and goes with the sandbox. It has
at most MOST_SAMPLES records; when it is full, older ones are thinned out, never the newest.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vmcell_api.guest_http import ENVD_PORT, fetch
from vmcell_api.metric_sample import (
    RECORD_BYTES,
    MetricSample,
    parse_envd_metrics,
    thinned,
    unpack,
)
from vmcell_api.node import sandbox_files
from vmcell_api.node.sandbox import Sandbox, unix_ms_now
from vmcell_protos.errors import VmcellError

log = logging.getLogger("vmcell.noded")

MOST_SAMPLES = 720
ASK_TIMEOUT_S = 3.0
ANSWER_BYTES = 4096
AT_ONCE = 4


class History:
    """The samples of one sandbox, oldest first; `path` may hold those of an earlier noded.

    A folder that is gone is not made again: its sandbox has ended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: list[bytes] = []
        try:
            data = path.read_bytes()
        except OSError:
            data = b""
        whole = len(data) - len(data) % RECORD_BYTES  # noded may have died in a write
        self._records = [data[at : at + RECORD_BYTES] for at in range(0, whole, RECORD_BYTES)]
        if whole < len(data) or len(self._records) > MOST_SAMPLES:
            self._records = self._records[-MOST_SAMPLES:]
            self._rewrite()

    def add(self, sample: MetricSample) -> None:
        """Appends; raises OSError when it cannot be written."""
        if len(self._records) >= MOST_SAMPLES:
            self._records = [*thinned(self._records), sample.pack()]
            self._rewrite()
            return
        self._records.append(sample.pack())
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, self._records[-1])
        finally:
            os.close(descriptor)

    def between(self, start_unix_ms: int, end_unix_ms: int) -> list[MetricSample]:
        """The samples of that time, both ends included; `end_unix_ms` 0: until now."""
        samples = [unpack(record) for record in tuple(self._records)]
        last = end_unix_ms or (1 << 62)
        return [sample for sample in samples if start_unix_ms <= sample.unix_ms <= last]

    def newest(self) -> list[MetricSample]:
        """The last sample, or none."""
        return [unpack(record) for record in self._records[-1:]]

    def _rewrite(self) -> None:
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(b"".join(self._records))
        fresh.replace(self._path)


class MetricSampler:
    """A thread of noded that asks the sandboxes of `running()`; `interval_s` 0: never.

    Thread-safe. `start()` first; `stop()` is idempotent.
    """

    def __init__(
        self,
        running: Callable[[], list[Sandbox]],
        state_dir: str,
        *,
        interval_s: float,
        port: int = ENVD_PORT,
    ) -> None:
        self._running = running
        self._state_dir = state_dir
        self._interval_s = interval_s
        self._port = port
        self._histories: dict[str, History] = {}
        self._lock = threading.Lock()
        self._silent: set[str] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        if self._interval_s > 0:
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread; histories stay in their files."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def read(
        self, sandbox_ids: Sequence[str], *, start_unix_ms: int, end_unix_ms: int, newest_only: bool
    ) -> dict[str, Sequence[MetricSample]]:
        """The samples of those of `sandbox_ids` that run."""
        running = {sandbox.sandbox_id: sandbox.container for sandbox in self._running()}
        histories = {name: self._history(running[name]) for name in sandbox_ids if name in running}
        return {
            name: history.newest() if newest_only else history.between(start_unix_ms, end_unix_ms)
            for name, history in histories.items()
        }

    def ask_all(self) -> None:
        """One round: a sample of every sandbox that answers."""
        sandboxes = self._running()
        ids = {sandbox.container for sandbox in sandboxes}
        with self._lock:
            self._histories = {key: row for key, row in self._histories.items() if key in ids}
        self._silent &= ids
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="metrics") as pool:
            list(pool.map(self._ask, sandboxes))

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self.ask_all()

    def _ask(self, sandbox: Sandbox) -> None:
        try:
            body = fetch(
                sandbox.address,
                "/metrics",
                access_token=sandbox_files.access_token(self._state_dir, sandbox.container),
                limit_bytes=ANSWER_BYTES,
                timeout_s=ASK_TIMEOUT_S,
                port=self._port,
            )
            self._history(sandbox.container).add(parse_envd_metrics(body, unix_ms_now()))
        except FileNotFoundError:
            return  # the sandbox ended meanwhile, its folder with it
        except (VmcellError, OSError) as error:
            if sandbox.container not in self._silent:
                self._silent.add(sandbox.container)
                log.warning("no metrics of sandbox %s: %s", sandbox.sandbox_id, error)
        else:
            self._silent.discard(sandbox.container)

    def _history(self, container_id: str) -> History:
        with self._lock:
            if container_id not in self._histories:
                path = sandbox_files.folder_of(self._state_dir, container_id) / "metrics"
                self._histories[container_id] = History(path)
            return self._histories[container_id]
