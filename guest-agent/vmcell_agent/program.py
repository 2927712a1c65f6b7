"""Finds a program as runc does and becomes it: PATH of the process's own environment."""

from __future__ import annotations

import os

from vmcell_protos.errors import CallerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def find(name: str, env: dict[str, str]) -> str:
    """The path to run for `name`; raises CallerError with runc's words."""
    if "/" in name:
        try:
            os.stat(name)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise CallerError(f'exec: "{name}": stat {name}: {reason}') from error
        if os.path.isdir(name):
            raise CallerError(f'exec: "{name}": is a directory')
        if not os.access(name, os.X_OK):
            raise CallerError(f'exec: "{name}": permission denied', code="permission_denied")
        return name
    refused = False
    search_path = env.get("PATH", "")
    for directory in search_path.split(":") if search_path else ():
        path = f"{directory or '.'}/{name}"
        if os.path.isfile(path):
            if os.access(path, os.X_OK):
                return path
            refused = True
    if refused:
        raise CallerError(f'exec: "{name}": permission denied', code="permission_denied")
    raise CallerError(f'exec: "{name}": executable file not found in $PATH')


def become(args: tuple[str, ...], env: dict[str, str]) -> NoReturn:
    """execve(2); returns only by raising CallerError."""
    path = find(args[0], env)
    try:
        os.execve(path, list(args), env)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CallerError(f'exec: "{args[0]}": {reason}') from error
