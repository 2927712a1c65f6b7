"""Asking a guest's envd one thing: bounded in bytes and in time, because guests are strangers."""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import Mapping

from vmcell_protos.errors import GuestError, HostError

ENVD_PORT = 49983
HEADERS_BYTES = 16384
_PART_BYTES = 65536


class _Received:
    """Bytes in the place of a socket, for http.client's parser."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def fetch(
    address: str,
    path: str,
    *,
    access_token: str,
    limit_bytes: int,
    timeout_s: float,
    port: int = ENVD_PORT,
) -> bytes:
    """The body of envd's 200 to `GET path`, at most `limit_bytes` long.

    Raises HostError when nothing whole came in time, GuestError for an answer that is none.
    """
    headers = {"X-Access-Token": access_token} if access_token else {}
    return ask(
        address,
        path,
        None,
        headers=headers,
        limit_bytes=limit_bytes,
        timeout_s=timeout_s,
        port=port,
    )


def ask(
    address: str,
    path: str,
    body: bytes | None,
    *,
    headers: Mapping[str, str],
    limit_bytes: int,
    timeout_s: float,
    port: int = ENVD_PORT,
) -> bytes:
    """The same for `POST path` with a body, or a GET without; `headers` are the caller's own."""
    method = "GET" if body is None else "POST"
    rows = {"Host": address, **headers, "Connection": "close"}
    if body is not None:
        rows["Content-Length"] = str(len(body))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in rows.items())]
    request = "\r\n".join([*lines, "", ""]).encode() + (body or b"")
    try:
        data = _exchange((address, port), request, limit_bytes + HEADERS_BYTES, timeout_s)
    except OSError as error:
        words = str(error) or type(error).__name__
        raise HostError(f"envd at {address} did not answer {method} {path}: {words}") from error
    try:
        status, answer = parse_answer(data, limit_bytes)
    except GuestError as error:
        raise GuestError(
            f"envd at {address} gave no valid answer to {method} {path}: {error}"
        ) from error
    if status != 200 or len(answer) > limit_bytes:
        raise GuestError(
            f"envd at {address} answered {method} {path} with {status} and {len(answer)} bytes"
        )
    return answer


def parse_answer(data: bytes, limit_bytes: int) -> tuple[int, bytes]:
    """Status and body of an HTTP answer, of the body at most one byte more than `limit_bytes`.

    Raises GuestError for bytes that are none.
    """
    answer = http.client.HTTPResponse(_Received(data))  # type: ignore[arg-type]  # makefile is all
    try:
        answer.begin()
        return answer.status, answer.read(limit_bytes + 1)
    except (http.client.HTTPException, OSError) as error:
        raise GuestError(str(error) or type(error).__name__) from error
    finally:
        answer.close()


def _exchange(
    address: tuple[str, int], request: bytes, limit_bytes: int, timeout_s: float
) -> bytes:
    """Everything until the end, or `limit_bytes`; the whole within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    data = bytearray()
    with socket.create_connection(address, timeout=timeout_s) as connection:
        connection.sendall(request)
        while len(data) <= limit_bytes:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("it was too slow")
            connection.settimeout(left_s)
            part = connection.recv(_PART_BYTES)
            if not part:
                break
            data += part
    return bytes(data)
