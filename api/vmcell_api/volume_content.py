"""The files of volumes over HTTP: `/volumecontent/{volume id}/path|dir|file`.

Source: the clients of E2B's SDKs (2.63), which parse 200, 201 and 204 exactly and take 404 as "no
such path". Error bodies here are `{"code": <word>, "message": <sentence>}`, unlike the control
plane's. Bodies are streamed both ways; nothing holds a whole file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re

import falcon

from vmcell_api.json_body import int_field, request_json
from vmcell_api.query_numbers import query_number
from vmcell_api.volumes.file_errors import VolumeFull
from vmcell_api.volumes.files import MAX_PATH_BYTES, Ownership, Volumes, parse_path
from vmcell_api.volumes.listing import MAX_DEPTH
from vmcell_api.volumes.token import VolumeTokens
from vmcell_api.volumes.upload import Upload
from vmcell_protos.errors import CODES, CallerError, VmcellError

log = logging.getLogger("vmcell.volumes")

CHUNK_BYTES = 1 << 18
IDS = range(0xFFFFFFFF)  # the last one means "unchanged" to chown(2)
# Without setuid and setgid: they have no effect in a sandbox's volume.
MODES = range(0o2000)
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class RangeBeyondEnd(CallerError):
    """No byte of the range is there; answered with 416."""

    default_code = "out_of_range"


class TokenCheck:
    """Falcon middleware: the token of the volume that the path names, or 401."""

    def __init__(self, tokens: VolumeTokens) -> None:
        self._tokens = tokens

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, str]
    ) -> None:
        """Checks every request that has a volume but preflights."""
        if req.method == "OPTIONS" or "volume_id" not in params:
            return
        scheme, _, token = (req.get_header("Authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise CallerError(
                "no volume token: send the one that GET /volumes/{id} answers as a bearer token",
                code="unauthenticated",
            )
        if not self._tokens.admits(token.strip(), params["volume_id"]):
            raise CallerError("the token is not this volume's", code="unauthenticated")


class PathResource:
    """`…/path`: what is there, its owner and mode, its end."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    def on_get(self, req: falcon.Request, resp: falcon.Response, volume_id: str) -> None:
        """Looks, without following a link."""
        with self._volumes.volume(volume_id) as files:
            resp.media = files.look(_path(req)).json()

    def on_patch(self, req: falcon.Request, resp: falcon.Response, volume_id: str) -> None:
        """Sets owner and mode."""
        body = request_json(req)
        wanted = Ownership(
            uid=_optional(body, "uid", IDS),
            gid=_optional(body, "gid", IDS),
            mode=_optional(body, "mode", MODES),
        )
        with self._volumes.volume(volume_id) as files:
            resp.media = files.change(_path(req), wanted).json()

    def on_delete(self, req: falcon.Request, resp: falcon.Response, volume_id: str) -> None:
        """Removes a file, a link or a whole directory."""
        with self._volumes.volume(volume_id) as files:
            files.remove(_path(req))
        resp.status = 204


class DirectoryResource:
    """`…/dir`: lists and makes directories."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    def on_get(self, req: falcon.Request, resp: falcon.Response, volume_id: str) -> None:
        """The entries below, `depth` levels of them; 0 is taken as 1, as envd does."""
        depth = _number(req, "depth", range(MAX_DEPTH + 1))
        with self._volumes.volume(volume_id) as files:
            entries = files.list(_path(req), max(1, 1 if depth is None else depth))
        resp.content_type = falcon.MEDIA_JSON
        resp.data = json.dumps([entry.json() for entry in entries]).encode()

    def on_post(self, req: falcon.Request, resp: falcon.Response, volume_id: str) -> None:
        """Makes one, with `force` its parents too."""
        with self._volumes.volume(volume_id) as files:
            entry = files.make_directory(_path(req), _ownership(req), force=_force(req))
        resp.status = 201
        resp.media = entry.json()


class FileResource:
    """`…/file`: contents."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    def on_get(self, req: falcon.Request, resp: falcon.Response, volume_id: str) -> None:
        """The bytes, or one range of them."""
        with contextlib.ExitStack() as stack:
            files = stack.enter_context(self._volumes.volume(volume_id))
            fd, status = stack.enter_context(files.open_file(_path(req)))
            size = status.st_size
            span = _span(req.get_header("Range") or "", size)
            resp.content_type = "application/octet-stream"
            resp.set_header("Accept-Ranges", "bytes")
            resp.set_header("X-Content-Type-Options", "nosniff")
            if span is None:
                span = range(size)
            elif not span:
                resp.set_header("Content-Range", f"bytes */{size}")
                raise RangeBeyondEnd(f"Range: the file has {size} bytes")
            else:
                resp.status = 206
                resp.set_header("Content-Range", f"bytes {span[0]}-{span[-1]}/{size}")
            resp.content_length = len(span)
            # The server closes the stream, and by it file and volume.
            resp.stream = FileBody(fd, span, stack.pop_all())

    def on_put(self, req: falcon.Request, resp: falcon.Response, volume_id: str) -> None:
        """Makes a file, with `force` also its parents and in place of another file."""
        parts, wanted, force = _path(req), _ownership(req), _force(req)
        with self._volumes.volume(volume_id) as files:
            files.check_writable(parts, force=force)
            with files.upload() as upload:
                _receive(req, upload)
                entry = files.put(upload, parts, wanted, force=force)
        resp.status = 201
        resp.media = entry.json()


class Health:
    """`GET /health`."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Says that the server answers."""
        resp.media = {"status": "ok"}


class FileBody:
    """The bytes `span` of an open file, as WSGI wants them; `close` frees what `owned` holds.

    A file that got shorter meanwhile ends the connection: its length has been told already.
    """

    def __init__(self, fd: int, span: range, owned: contextlib.ExitStack) -> None:
        self._fd = fd
        self._at, self._end = (span[0], span[-1] + 1) if span else (0, 0)
        self._owned = owned

    def __iter__(self) -> FileBody:
        return self

    def __next__(self) -> bytes:
        if self._at >= self._end:
            raise StopIteration
        data = os.pread(self._fd, min(CHUNK_BYTES, self._end - self._at), self._at)
        if not data:
            raise ConnectionAbortedError("the file was cut while it was read")
        self._at += len(data)
        return data

    def close(self) -> None:
        """Idempotent."""
        self._owned.close()


def create_content_app(volumes: Volumes, tokens: VolumeTokens) -> falcon.App:
    """The application; `volumes` stays the caller's."""
    app: falcon.App = falcon.App()
    app.add_middleware(falcon.CORSMiddleware(allow_origins="*", expose_headers=["Content-Range"]))
    app.add_middleware(TokenCheck(tokens))
    app.req_options.strip_url_path_trailing_slash = True
    app.add_error_handler(Exception, _on_bug)
    app.add_error_handler(falcon.HTTPError, _on_http_error)
    app.add_error_handler(VmcellError, _on_vmcell_error)
    app.add_route("/health", Health())
    app.add_route("/volumecontent/{volume_id}/path", PathResource(volumes))
    app.add_route("/volumecontent/{volume_id}/dir", DirectoryResource(volumes))
    app.add_route("/volumecontent/{volume_id}/file", FileResource(volumes))
    return app


def _receive(req: falcon.Request, upload: Upload) -> None:
    """The body into the file; CallerError when it breaks off."""
    expected = req.content_length
    terminated = expected is None and req.env.get("wsgi.input_terminated")
    stream = req.stream if terminated else req.bounded_stream
    received = 0
    while True:
        try:
            data = stream.read(CHUNK_BYTES)
        except OSError as error:
            raise CallerError(f"the body broke off after {received} bytes: {error}") from error
        if not data:
            break
        received += len(data)
        _write(upload, data)
    if expected is not None and received != expected:
        raise CallerError(f"the body broke off after {received} of {expected} bytes")


def _write(upload: Upload, data: bytes) -> None:
    try:
        upload.write(data)
    except OSError as error:
        raise VolumeFull(f"the disk of the volumes does not take more: {error.strerror}") from error


def _path(req: falcon.Request) -> tuple[bytes, ...]:
    text = req.get_param("path")
    if text is None:
        raise CallerError("path is absent; give it in the query, from the volume's root on")
    if len(text) > MAX_PATH_BYTES:
        raise CallerError(f"path has {len(text)} characters; at most {MAX_PATH_BYTES} bytes")
    return parse_path(text)


def _ownership(req: falcon.Request) -> Ownership:
    return Ownership(
        uid=_number(req, "uid", IDS),
        gid=_number(req, "gid", IDS),
        mode=_number(req, "mode", MODES),
    )


def _number(req: falcon.Request, name: str, bounds: range) -> int | None:
    text = req.get_param(name)
    return None if text is None else query_number(name, text, bounds)


def _optional(body: dict[str, object], name: str, bounds: range) -> int | None:
    if body.get(name) is None:
        return None
    return int_field(body, name, default=0, bounds=bounds)


def _force(req: falcon.Request) -> bool:
    text = (req.get_param("force") or "false").lower()
    if text not in ("true", "false"):
        raise CallerError(f"force is {text[:20]!r}; it takes true or false")
    return text == "true"


def _span(header: str, size: int) -> range | None:
    """The bytes that a Range header asks for (RFC 9110 § 14.2): None for all of them, an empty
    range for none that there are. What is not one plain range is ignored, as the RFC has it."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        return range(max(0, size - int(match[2])), size)
    first = int(match[1])
    last = int(match[2]) if match[2] else size
    if last < first:
        return None
    return range(first, min(last + 1, size))


def _write_error(resp: falcon.Response, status: int, code: str, message: str) -> None:
    resp.status = status
    resp.content_type = falcon.MEDIA_JSON
    resp.data = json.dumps({"code": code, "message": message}).encode()
    if status >= 500:
        resp.set_header("Should-Retry", "false")


def _on_vmcell_error(
    req: falcon.Request, resp: falcon.Response, error: VmcellError, params: object
) -> None:
    status, code = CODES[error.code].http, error.code
    if isinstance(error, VolumeFull):
        status, code = 507, "no_space"
    elif isinstance(error, RangeBeyondEnd):
        status = 416
    if status >= 500:
        log.error("%s %s: %s", req.method, req.path, error)
    _write_error(resp, status, code, str(error))


def _on_http_error(
    req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, params: object
) -> None:
    words = {404: f"no route {req.path}", 405: f"{req.method} is not allowed on {req.path}"}
    message = words.get(error.status_code) or error.description or error.title or "refused"
    code = {404: "not_found", 405: "unimplemented"}.get(error.status_code, "invalid_argument")
    _write_error(resp, error.status_code, code, message)


def _on_bug(req: falcon.Request, resp: falcon.Response, error: Exception, params: object) -> None:
    log.error("%s %s failed", req.method, req.path, exc_info=error)
    _write_error(resp, 500, "internal", "the server failed; its log has the trace")
