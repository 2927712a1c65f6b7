"""`GET /files`: a file's bytes, whole or in part, at the client's pace."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
import zlib
from collections.abc import Mapping

from .exchange import Exchange, FilePart, HttpError, Octets
from .file_access import authorise, file_path, file_user
from .settings import Settings
from .wire.compression import GZIP_WINDOW_BITS
from .wire.headers import (
    ByteRange,
    NotAcceptable,
    RangeNotSatisfiable,
    content_type_of,
    http_date,
    inline_disposition,
    parse_http_date,
    parse_range,
    wants_gzip,
)

PIECE_BYTES = 256 * 1024
_CONDITIONS = (
    "range",
    "if-modified-since",
    "if-unmodified-since",
    "if-match",
    "if-none-match",
    "if-range",
)


class Download:
    """A BodyReader that ignores the request's body, then sends the file."""

    def __init__(self, exchange: Exchange, settings: Settings) -> None:
        self._exchange = exchange
        authorise(exchange.request, settings, "read")
        account = file_user(exchange.request, settings)
        self._path = file_path(exchange.request.query.get("path", ""), account, settings)

    def feed(self, chunk: Octets) -> None:
        """A body of a GET has no meaning (RFC 9110 section 9.3.1)."""

    def finish(self) -> None:
        descriptor, status = _open(self._path)
        sender = _Sender(self._exchange, descriptor)
        try:
            self._answer(sender, status)
        except BaseException:
            sender.close()
            raise

    def _answer(self, sender: _Sender, status: os.stat_result) -> None:
        exchange, headers = self._exchange, self._exchange.request.headers
        name = posixpath.basename(self._path)
        describing = [
            ("Content-Type", content_type_of(name)),
            ("Content-Disposition", inline_disposition(name)),
            ("Last-Modified", http_date(status.st_mtime)),
            ("Vary", "Accept-Encoding"),
        ]
        if any(key in headers for key in _CONDITIONS):
            verdict = _check_conditions(headers, int(status.st_mtime))
            if verdict is not None:
                sender.close()
                exchange.reply(verdict, describing[2:])
                return
        elif _wants_gzip(headers):
            sender.compress()
            exchange.begin(200, [*describing, ("Content-Encoding", "gzip")])
            sender.start()
            return
        if status.st_size == 0:
            # Files of /proc say 0 and hold more; only their end tells how much.
            exchange.begin(200, describing)
            sender.start()
            return
        self._send_part(sender, status, describing)

    def _send_part(
        self, sender: _Sender, status: os.stat_result, describing: list[tuple[str, str]]
    ) -> None:
        size = status.st_size
        headers = self._exchange.request.headers
        wanted = None if _range_is_stale(headers, int(status.st_mtime)) else headers.get("range")
        try:
            part = parse_range(wanted, size)
        except RangeNotSatisfiable as error:
            raise HttpError(416, str(error), [("Content-Range", f"bytes */{size}")]) from None
        describing.append(("Accept-Ranges", "bytes"))
        if part is None and size <= PIECE_BYTES:
            # sysfs says a page and holds a line; what is there at once needs no promise.
            body = sender.read_once()
            self._exchange.reply(200, describing, body)
            return
        if part is None:
            part, code = ByteRange(0, size), 200
        else:
            code = 206
            describing.append(("Content-Range", f"bytes {part.start}-{part.end - 1}/{size}"))
        describing.append(("Content-Length", str(part.end - part.start)))
        self._exchange.begin(code, describing)
        sender.send(part)


class _Sender:
    """Owns the open file until all of it has been handed on, or the client is gone."""

    def __init__(self, exchange: Exchange, descriptor: int) -> None:
        self._exchange = exchange
        self._descriptor = descriptor
        self._compressor: zlib._Compress | None = None
        exchange.on_gone = self.close

    def read_once(self) -> bytes:
        """All of a file of at most PIECE_BYTES, and closes it. HttpError 500."""
        try:
            return self._read()
        finally:
            self.close()

    def send(self, part: ByteRange) -> None:
        """A part of known length, by the kernel."""
        if self._exchange.request.method == "HEAD":
            self._end()
        else:
            length = part.end - part.start
            self._exchange.send_file(FilePart(self._descriptor, part.start, length, self._end))

    def compress(self) -> None:
        self._compressor = zlib.compressobj(1, zlib.DEFLATED, GZIP_WINDOW_BITS)

    def start(self) -> None:
        """Whatever the file holds, piece by piece, to its end."""
        if self._exchange.request.method == "HEAD":
            self._end()
        else:
            self._exchange.stream_from(self._next)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _end(self) -> None:
        self.close()
        self._exchange.end()

    def _next(self) -> bytes | None:
        while self._descriptor >= 0:
            piece = self._read()
            if self._compressor is None:
                if not piece:
                    self.close()
                return piece or None
            if piece:
                packed = self._compressor.compress(piece)
                if packed:
                    return packed
            else:
                self.close()
                return self._compressor.flush()
        return None

    def _read(self) -> bytes:
        try:
            return os.read(self._descriptor, PIECE_BYTES)
        except BlockingIOError:
            return b""
        except OSError as error:
            self.close()
            raise HttpError(500, f"reading the file failed: {error.strerror}") from None


def _open(path: str) -> tuple[int, os.stat_result]:
    """The file opened for reading; never waits for a fifo's other end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise open_error(path, error) from None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        return descriptor, status
    os.close(descriptor)
    kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
    raise HttpError(400, f"path '{path}' is {kind}")


def open_error(path: str, error: OSError) -> HttpError:
    """What a failed open(2), mkdir(2) or write(2) on `path` is as an answer."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return HttpError(404, f"path '{path}' does not exist")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HttpError(507, f"not enough disk space available for '{path}'")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return HttpError(403, f"path '{path}': {(error.strerror or '').lower()}")
    if error.errno == errno.EISDIR:
        return HttpError(400, f"path '{path}' is a directory")
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ETXTBSY):
        return HttpError(400, f"path '{path}': {(error.strerror or '').lower()}")
    return HttpError(500, f"path '{path}': {(error.strerror or str(error)).lower()}")


def _wants_gzip(headers: Mapping[str, str]) -> bool:
    try:
        return wants_gzip(headers.get("accept-encoding"))
    except NotAcceptable as error:
        raise HttpError(406, str(error)) from None


def _check_conditions(headers: Mapping[str, str], modified_s: int) -> int | None:
    """304 or 412 when the conditions say so (RFC 9110 section 13.2.2); files have no entity tag."""
    if "if-match" in headers:
        if headers["if-match"].strip() != "*":
            return 412
    else:
        unchanged_since = parse_http_date(headers.get("if-unmodified-since"))
        if unchanged_since is not None and modified_s > unchanged_since:
            return 412
    if "if-none-match" in headers:
        return 304 if headers["if-none-match"].strip() == "*" else None
    changed_since = parse_http_date(headers.get("if-modified-since"))
    if changed_since is not None and modified_s <= changed_since:
        return 304
    return None


def _range_is_stale(headers: Mapping[str, str], modified_s: int) -> bool:
    if "if-range" not in headers:
        return False
    return parse_http_date(headers["if-range"]) != modified_s
