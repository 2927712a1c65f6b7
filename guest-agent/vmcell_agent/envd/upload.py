"""`POST /files`: bytes straight to disk, from multipart/form-data or one raw body.

Files are written in place, as E2B's envd does: inode, links and watchers stay. When an upload
fails half-way a file it made is removed again; a file that was there keeps the bytes that came.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress

from vmcell_protos.errors import CallerError

from .accounts import Account
from .download import open_error
from .entry import METADATA_PREFIX
from .exchange import Exchange, HttpError, Octets
from .file_access import authorise, file_path, file_user
from .settings import Settings
from .tree import make_directories
from .wire.compression import CompressionError, Gunzip
from .wire.multipart import (
    MultipartError,
    MultipartParser,
    PartBegin,
    PartData,
    PartEnd,
    boundary_of,
)

_METADATA_HEADER = "x-metadata-"
_METADATA_KEY = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,200}")
_PART_NAME = "file"


class _Target:
    """One file being written: opened, given to the user, then filled through the descriptor."""

    def __init__(self, path: str, account: Account, metadata: dict[str, str]) -> None:
        self.path = path
        self._account = account
        self._metadata = metadata
        self._made = False
        self._descriptor = -1
        try:
            make_directories(posixpath.dirname(path), account)
            self._open()
        except OSError as error:
            self.discard()
            raise open_error(path, error) from None
        except CallerError as error:
            raise HttpError(400, str(error)) from None
        except HttpError:
            self.discard()
            raise

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        try:
            self._descriptor = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o644)
            self._made = True
        except FileExistsError:
            self._descriptor = self._open_existing(flags)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise HttpError(400, f"path '{self.path}' is not a regular file")
        if not self._made:
            os.ftruncate(self._descriptor, 0)
        # Also when nothing changes by it: clients that watch count the event (E2B does the same).
        os.fchown(self._descriptor, self._account.uid, self._account.gid)
        self._set_metadata()

    def _open_existing(self, flags: int) -> int:
        """Without O_CREAT, by which fs.protected_regular would refuse another user's file in /tmp
        (kernel's sysctl/fs.rst); with it only for a link that leads to nothing yet."""
        try:
            return os.open(self.path, flags)
        except FileNotFoundError:
            return os.open(self.path, flags | os.O_CREAT, 0o644)

    def _set_metadata(self) -> None:
        """Replace the whole set; a file system without xattrs is an error only if one is asked."""
        old: list[str] = []
        with suppress(OSError):
            old = [n for n in os.listxattr(self._descriptor) if n.startswith(METADATA_PREFIX)]
        for name in old:
            os.removexattr(self._descriptor, name)
        for key, value in self._metadata.items():
            try:
                os.setxattr(self._descriptor, METADATA_PREFIX + key, value.encode("ascii"))
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.E2BIG, errno.ERANGE, errno.ENOSPC):
                    raise
                raise HttpError(400, f"cannot store metadata {key!r}: {error.strerror}") from None

    def write(self, data: Octets) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise open_error(self.path, error) from None

    def complete(self) -> dict[str, object]:
        os.close(self._descriptor)
        self._descriptor = -1
        info: dict[str, object] = {
            "path": self.path,
            "name": posixpath.basename(self.path),
            "type": "file",
        }
        if self._metadata:
            info["metadata"] = self._metadata
        return info

    def discard(self) -> None:
        """Close; remove the file when this upload made it. Idempotent."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        if self._made:
            with suppress(OSError):
                os.unlink(self.path)


class Upload:
    """A BodyReader that writes what it reads and answers with what it wrote."""

    def __init__(self, exchange: Exchange, settings: Settings) -> None:
        request = exchange.request
        authorise(request, settings, "write")
        self._exchange = exchange
        self._settings = settings
        self._account = file_user(request, settings)
        self._metadata = _metadata(request.headers)
        self._path = request.query.get("path", "")
        self._target: _Target | None = None
        self._paths: set[str] = set()
        self._written: list[dict[str, object]] = []
        self._take, self._end = self._body_format(request.headers.get("content-type", ""))
        exchange.on_gone = self._discard
        exchange.expects_much = True
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding == "gzip":
            self._unpack: Gunzip | None = Gunzip()
        elif encoding in ("", "identity"):
            self._unpack = None
        else:
            raise HttpError(415, f"content encoding {encoding!r} is not supported: use gzip")

    def _body_format(
        self, content_type: str
    ) -> tuple[Callable[[Octets], None], Callable[[], None]]:
        media_type = content_type.partition(";")[0].strip().lower()
        if media_type == "multipart/form-data":
            try:
                self._parser = MultipartParser(boundary_of(content_type.strip()))
            except MultipartError as error:
                raise HttpError(400, str(error)) from None
            return self._take_multipart, self._end_multipart
        if media_type == "application/octet-stream":
            return self._take_raw, self._end_raw
        raise HttpError(
            400, f"content type {content_type!r} is neither multipart/form-data nor octet-stream"
        )

    def feed(self, chunk: Octets) -> None:
        try:
            if self._unpack is None:
                self._take(chunk)
            else:
                for piece in self._unpack.feed(chunk):
                    self._take(piece)
        except CompressionError as error:
            self._discard()
            raise HttpError(400, str(error)) from None
        except BaseException:
            self._discard()
            raise

    def finish(self) -> None:
        try:
            if self._unpack is not None:
                self._unpack.finish()
            self._end()
        except CompressionError as error:
            self._discard()
            raise HttpError(400, str(error)) from None
        except BaseException:
            self._discard()
            raise
        self._exchange.reply_json(200, self._written)

    def _begin(self, text: str) -> None:
        path = file_path(text, self._account, self._settings)
        if path in self._paths:
            raise HttpError(400, f"you cannot upload multiple files to the same path '{path}'")
        self._target = _Target(path, self._account, self._metadata)
        self._paths.add(path)

    def _complete(self) -> None:
        if self._target is not None:
            self._written.append(self._target.complete())
            self._target = None

    def _discard(self) -> None:
        if self._target is not None:
            self._target.discard()
            self._target = None

    # One raw body.

    def _take_raw(self, chunk: Octets) -> None:
        if self._target is None:
            self._begin(self._path)
        assert self._target is not None
        self._target.write(chunk)

    def _end_raw(self) -> None:
        if self._target is None:
            self._begin(self._path)
        self._complete()

    # multipart/form-data.

    def _take_multipart(self, chunk: Octets) -> None:
        try:
            events = self._parser.feed(chunk)
        except MultipartError as error:
            raise HttpError(400, f"cannot read the multipart body: {error}") from None
        for event in events:
            if isinstance(event, PartBegin):
                if event.name == _PART_NAME:
                    self._begin(self._path or event.filename or "")
            elif isinstance(event, PartData):
                if self._target is not None:
                    self._target.write(event.data)
            elif isinstance(event, PartEnd):
                self._complete()

    def _end_multipart(self) -> None:
        try:
            self._parser.finish()
        except MultipartError as error:
            raise HttpError(400, f"cannot read the multipart body: {error}") from None


def _metadata(headers: Mapping[str, str]) -> dict[str, str]:
    """`X-Metadata-<key>: value` headers; keys are lower case, values printable ASCII."""
    found = {}
    for name, value in headers.items():
        if not name.startswith(_METADATA_HEADER):
            continue
        key = name[len(_METADATA_HEADER) :]
        if not _METADATA_KEY.fullmatch(key) or not value.isascii() or not value.isprintable():
            raise HttpError(400, f"invalid metadata {key!r}: keys and values are printable ASCII")
        found[key] = value
    return found
