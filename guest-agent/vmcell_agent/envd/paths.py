"""Which absolute path a client means (E2B: `~`, relative to the home, empty)."""

from __future__ import annotations

import posixpath

from vmcell_protos.errors import CallerError


def resolve_path(path: str, home: str, default_directory: str = "") -> str:
    """The absolute path, cleaned as Go's filepath.Clean does; no link is followed.

    Empty: `default_directory`, else the home. `~`, `~/x` and `x` lie in the home. Raises
    CallerError for `~name` and for NUL.
    """
    if "\0" in path:
        raise CallerError(f"path {path!r} contains a NUL character")
    if not path:
        path = default_directory or home
    if path == "~" or path.startswith("~/"):
        path = posixpath.join(home, path[1:].lstrip("/"))
    elif path.startswith("~"):
        raise CallerError(f"cannot resolve path {path!r}: a user's home by name is not supported")
    elif not path.startswith("/"):
        path = posixpath.join(home, path)
    # Two leading slashes are one on Linux; normpath keeps them (POSIX 4.13).
    return posixpath.normpath("/" + path.lstrip("/"))
