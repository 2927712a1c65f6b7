"""Task events for containerd: one queue, strict order, delivered also across its restarts.

Sent by ttrpc `Forward` (0.2 ms; the publish binary costs 20 ms and is only the last resort).
Source: containerd pkg/shim/publisher.go, services/events; reference: shim-contract 1.7. An event
stays at the head of the queue until it is delivered; when containerd is away for long, the queue is
bounded and the oldest give way.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque

from vmcell_protos.errors import VmcellError
from vmcell_protos.events import Envelope, ForwardRequest
from vmcell_protos.wellknown import Any, Empty, Timestamp
from vmcell_shim.client import TtrpcClient
from vmcell_shim.spawn import run_program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_protos.wire import Message
    from vmcell_shim.journal import Journal

SERVICE = "containerd.services.events.ttrpc.v1.Events"
QUEUE_LIMIT = 2048
_FORWARD_TIMEOUT_S = 5.0
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.05, 5.0
# How often Forward is tried before the publish binary is, for the same event.
_FORWARD_TRIES = 4
_TOPICS = {
    "TaskCreate": "/tasks/create",
    "TaskStart": "/tasks/start",
    "TaskExit": "/tasks/exit",
    "TaskDelete": "/tasks/delete",
    "TaskOOM": "/tasks/oom",
    "TaskPaused": "/tasks/paused",
    "TaskResumed": "/tasks/resumed",
    "TaskExecAdded": "/tasks/exec-added",
    "TaskExecStarted": "/tasks/exec-started",
}


def timestamp(unix_ns: int) -> Timestamp:
    """Nanoseconds since 1970 as containerd's messages carry them."""
    return Timestamp(seconds=unix_ns // 10**9, nanos=unix_ns % 10**9)


class EventPublisher:
    """publish() never waits; one thread delivers. Owns its connection until close()."""

    def __init__(
        self,
        *,
        namespace: str,
        ttrpc_address: str,
        grpc_address: str,
        publish_binary: str,
        journal: Journal,
    ) -> None:
        self._namespace = namespace
        self._ttrpc_path = ttrpc_address.removeprefix("unix://")
        self._grpc_address = grpc_address
        self._publish_binary = publish_binary
        self._journal = journal
        self._queue: deque[Envelope] = deque()
        self._condition = threading.Condition()
        self._client: TtrpcClient | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._deliver, name="events", daemon=True)
        self._thread.start()

    def publish(self, event: Message) -> None:
        """Queues one of containerd's task events; its class names topic and type."""
        name = type(event).__name__
        envelope = Envelope(
            timestamp=timestamp(time.time_ns()),
            namespace=self._namespace,
            topic=_TOPICS[name],
            event=Any(type_url=f"containerd.events.{name}", value=event.encode()),
        )
        with self._condition:
            if len(self._queue) >= QUEUE_LIMIT:
                lost = self._queue.popleft()
                self._journal.error(f"event queue is full; {lost.topic} is lost")
            self._queue.append(envelope)
            self._condition.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """True once everything published so far has been delivered."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._queue, timeout_s)

    def close(self) -> None:
        """What has not been delivered is lost, with a line in the log. Idempotent."""
        with self._condition:
            self._closing = True
            if self._queue:
                self._journal.error(f"{len(self._queue)} events could not be delivered")
                self._queue.clear()
            self._condition.notify_all()
        self._thread.join(_FORWARD_TIMEOUT_S)
        if self._client is not None:
            self._client.close()
            self._client = None

    def _deliver(self) -> None:
        delay_s, tries = _FIRST_DELAY_S, 0
        while (envelope := self._head()) is not None:
            tries += 1
            if self._forward(envelope) or (tries >= _FORWARD_TRIES and self._run_binary(envelope)):
                self._drop(envelope)
                delay_s, tries = _FIRST_DELAY_S, 0
                continue
            with self._condition:
                self._condition.wait_for(lambda: self._closing, delay_s)
            delay_s = min(delay_s * 2, _LONGEST_DELAY_S)

    def _head(self) -> Envelope | None:
        with self._condition:
            self._condition.wait_for(lambda: self._queue or self._closing)
            return self._queue[0] if self._queue else None

    def _drop(self, envelope: Envelope) -> None:
        with self._condition:
            # publish() may have given this one up meanwhile.
            if self._queue and self._queue[0] is envelope:
                self._queue.popleft()
            self._condition.notify_all()

    def _forward(self, envelope: Envelope) -> bool:
        try:
            if self._client is None:
                self._client = TtrpcClient(_connect(self._ttrpc_path), "containerd")
            request = ForwardRequest(envelope=envelope)
            self._client.call(SERVICE, "Forward", request, Empty, _FORWARD_TIMEOUT_S)
        except (OSError, VmcellError) as error:
            self._journal.warning(f"event {envelope.topic} not forwarded yet: {error}")
            if self._client is not None:
                self._client.close()
                self._client = None
            return False
        return True

    def _run_binary(self, envelope: Envelope) -> bool:
        event = envelope.event
        if not self._publish_binary or event is None:
            return False
        command = [
            *(self._publish_binary, "--address", self._grpc_address, "publish"),
            *("--topic", envelope.topic, "--namespace", self._namespace),
        ]
        try:
            code, output = run_program(command, timeout_s=10, stdin=event.encode())
        except OSError as error:
            code, output = 127, str(error)
        if code:
            self._journal.warning(f"event {envelope.topic} not published either: {output}")
        return not code


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_FORWARD_TIMEOUT_S)
        sock.connect(path)
        sock.settimeout(None)
    except OSError:
        sock.close()
        raise
    return sock
