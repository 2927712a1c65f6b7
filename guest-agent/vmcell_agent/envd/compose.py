"""`POST /files/compose`: several files become one, and are gone afterwards (E2B's envd).

The destination is replaced at the very end by rename(2), so that a failure leaves it, and all
sources, as they were.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Generator
from contextlib import ExitStack, suppress

from vmcell_protos.errors import CallerError

from .accounts import Account
from .download import open_error
from .exchange import Exchange, HttpError, WholeBody
from .file_access import file_path
from .job import run_job
from .loop import Loop
from .settings import Settings
from .tree import Steps, copy_bytes, make_directories
from .wire.fields import Fields, parse_message

_MAX_BODY_BYTES = 4 * 1024 * 1024


def compose_reader(exchange: Exchange, loop: Loop, settings: Settings) -> WholeBody:
    """What reads the body `{source_paths, destination, username}`."""

    def done(body: bytes) -> None:
        request = _Composition(parse_message(body), settings)

        def succeeded(result: None) -> None:
            exchange.reply_json(
                200,
                {
                    "path": request.destination,
                    "name": posixpath.basename(request.destination),
                    "type": "file",
                },
            )

        def failed(error: OSError | CallerError) -> None:
            if isinstance(error, OSError):
                exchange.fail(open_error(error.filename or request.destination, error))
            else:
                exchange.fail(error)

        run_job(loop, request.steps(), succeeded, failed)

    return WholeBody(_MAX_BODY_BYTES, done)


class _Composition:
    """One request, checked; `steps` does it. HttpError 400, 401 and 404 for what cannot be done."""

    def __init__(self, message: Fields, settings: Settings) -> None:
        self._account = _account(message.text("username"), settings)
        sources = message.texts("sourcePaths")
        if not sources:
            raise HttpError(400, "source_paths must not be empty")
        if not message.text("destination"):
            raise HttpError(400, "destination is required")
        self.destination = file_path(message.text("destination"), self._account, settings)
        self._sources = [file_path(source, self._account, settings) for source in sources]
        for source in self._sources:
            self._check(source)
        if os.path.isdir(self.destination):
            raise HttpError(400, f"path '{self.destination}' is a directory")

    def _check(self, source: str) -> None:
        if source == self.destination:
            raise HttpError(400, f"source path '{source}' cannot be the same as destination")
        try:
            status = os.stat(source)
        except OSError as error:
            raise open_error(source, error) from None
        if not stat.S_ISREG(status.st_mode):
            raise HttpError(400, f"source path '{source}' is not a regular file")

    def steps(self) -> Steps:
        folder = posixpath.dirname(self.destination)
        make_directories(folder, self._account)
        staging = posixpath.join(folder, f".compose-{os.urandom(8).hex()}")
        try:
            yield from self._write(staging)
            os.rename(staging, self.destination)
        except BaseException:
            with suppress(OSError):
                os.unlink(staging)
            raise
        for source in self._sources:
            # The same source twice is removed once.
            with suppress(FileNotFoundError):
                os.unlink(source)

    def _write(self, staging: str) -> Generator[None, None, None]:
        with ExitStack() as stack:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            writing = os.open(staging, flags, 0o644)
            stack.callback(os.close, writing)
            os.fchown(writing, self._account.uid, self._account.gid)
            for source in self._sources:
                reading = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    yield from copy_bytes(reading, writing)
                finally:
                    os.close(reading)


def _account(name: str, settings: Settings) -> Account:
    try:
        return settings.account(name or None)
    except CallerError:
        raise HttpError(401, f"error looking up user '{name}'") from None
