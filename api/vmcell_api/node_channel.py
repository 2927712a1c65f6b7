"""One gRPC channel to noded's socket, and what its faults mean.

A channel does not survive a fork, so it is made at the first call, in the worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc

from vmcell_protos.errors import CODE_NAMES, CallerError, HostError, VmcellError

CALL_TIMEOUT_S = 30.0
# 10,000 files with paths of 4 KiB are the most that one holds.
MAX_ANSWER_BYTES = 64 << 20
CALLERS_CODES = (
    *("invalid_argument", "not_found", "already_exists", "failed_precondition", "out_of_range"),
    *("permission_denied", "unimplemented", "aborted"),
)


class NodeUnreachable(HostError):
    """noded does not answer; asking again soon may help."""


class NodeChannel:
    """The verbs of one of noded's services by name; thread-safe, `close()` is idempotent."""

    def __init__(self, socket_path: str, service: Callable[[grpc.Channel], object]) -> None:
        """`service` is the stub's class."""
        self._socket_path = socket_path
        self._service = service
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._stub: object = None

    def close(self) -> None:
        """Ends the connection."""
        with self._lock:
            if self._channel is not None:
                self._channel.close()
            self._channel = self._stub = None

    def call(self, verb: str, request: object, timeout_s: float = CALL_TIMEOUT_S):  # type: ignore[no-untyped-def]  # stubs are untyped
        """The answer; raises CallerError or HostError."""
        method: Callable = getattr(self._connected(), verb)
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def _connected(self) -> object:
        with self._lock:
            if self._channel is None:
                self._channel = grpc.insecure_channel(
                    f"unix://{self._socket_path}",
                    options=[
                        ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
                        ("grpc.initial_reconnect_backoff_ms", 100),
                        ("grpc.max_reconnect_backoff_ms", 1000),
                    ],
                )
                self._stub = self._service(self._channel)
            return self._stub

    def _translated(self, error: grpc.RpcError) -> VmcellError:
        """Our error for one of gRPC's; noded marks its own answers in the trailing metadata."""
        spoken = any(key == "vmcell-fault" for key, _ in error.trailing_metadata() or ())
        code = CODE_NAMES.get(error.code().value[0], "unknown")
        if not spoken and code == "unavailable":
            return NodeUnreachable(
                f"noded does not answer on {self._socket_path}; start `vmcell serve`, then try "
                "again"
            )
        kind = CallerError if code in CALLERS_CODES else HostError
        return kind(error.details() or code, code=code)


def is_undone(error: VmcellError) -> bool:
    """Whether a verb that failed so is known to have left nothing."""
    return not isinstance(error, NodeUnreachable) and error.code != "deadline_exceeded"
