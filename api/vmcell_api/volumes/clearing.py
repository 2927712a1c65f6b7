"""Removing a tree that a guest has made, whatever its depth and whoever still writes into it.

What is to go is moved into the trash, a directory beside the volumes, in one step; there it is
taken apart. Each directory found in it is moved up into the trash, so any depth costs one
descriptor and no recursion, and no path grows.
"""

from __future__ import annotations

import errno
import os
import secrets

from vmcell_api.volumes.syscalls import open_beneath
from vmcell_protos.errors import HostError

# A guest that has such a directory open may go on making files in it for a while.
PATIENCE = 64


def throw_away(parent: int, name: str, trash: int) -> str:
    """Takes `name` out of the directory `parent` at once; its name in the trash. OSError."""
    thrown = secrets.token_hex(12)
    os.rename(name, thrown, src_dir_fd=parent, dst_dir_fd=trash)
    return thrown


def empty(trash: int) -> None:
    """Removes all that is in the trash; raises OSError or HostError."""
    for name in os.listdir(trash):
        clear(trash, name)


def clear(trash: int, name: str) -> None:
    """Removes what was thrown away as `name`; raises OSError.

    HostError when a guest goes on filling it: then it stays in the trash, for the next `empty`.
    """
    pending = [name]
    refusals = 0
    while pending:
        current = pending.pop()
        try:
            os.unlink(current, dir_fd=trash)
        except FileNotFoundError:
            continue  # somebody else empties the trash too
        except (IsADirectoryError, PermissionError):  # POSIX lets unlink say EPERM for one
            pending += _flatten(trash, current)
            try:
                os.rmdir(current, dir_fd=trash)
            except FileNotFoundError:
                continue
            except OSError as error:
                refusals += 1
                if error.errno != errno.ENOTEMPTY:
                    raise
                if refusals > PATIENCE:
                    raise HostError(
                        "what was removed is still being filled by a sandbox; its space is freed "
                        "when noded starts next"
                    ) from error
                pending.append(current)


def _flatten(trash: int, name: str) -> list[str]:
    """Removes the files of a directory of the trash and moves its directories up; their names."""
    moved = []
    try:
        directory = open_beneath(trash, os.fsencode(name), os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        upper = secrets.token_hex(12)
                        os.rename(entry.name, upper, src_dir_fd=directory, dst_dir_fd=trash)
                        moved.append(upper)
                    else:
                        os.unlink(entry.name, dir_fd=directory)
                except FileNotFoundError:
                    continue
                except IsADirectoryError:
                    continue  # replaced meanwhile: the directory is not empty and comes again
    finally:
        os.close(directory)
    return moved
