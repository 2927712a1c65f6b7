"""A directory of a volume and what is below it, so many levels deep, in order of names.

Directories are opened one from the other without links, so one that is moved meanwhile shows what
it has and nothing outside. The number of entries is bounded: a guest may make millions.
"""

from __future__ import annotations

import errno
import os
import stat

from vmcell_api.volumes.entries import Entry, look
from vmcell_api.volumes.syscalls import open_beneath
from vmcell_protos.errors import CallerError

MAX_ENTRIES = 20_000
MAX_DEPTH = 64


def list_tree(directory: int, above: tuple[bytes, ...], depth: int) -> list[Entry]:
    """The entries of an open directory at `above`, each before what is below it.

    `depth` 1 is the directory alone. Raises OSError, and CallerError for too many entries.
    """
    found: list[Entry] = []
    _add(directory, above, depth, found)
    return found


def _add(directory: int, above: tuple[bytes, ...], depth: int, found: list[Entry]) -> None:
    for name in _names(directory, MAX_ENTRIES - len(found)):
        try:
            entry = look(directory, name, above)
        except FileNotFoundError:
            continue  # removed since the directory was read
        if len(found) >= MAX_ENTRIES:
            raise _too_many()
        found.append(entry)
        if depth > 1 and stat.S_ISDIR(entry.status.st_mode):
            try:
                lower = open_beneath(directory, name, os.O_RDONLY | os.O_DIRECTORY)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                if error.errno == errno.ELOOP:  # it has become a link
                    continue
                raise
            try:
                _add(lower, entry.parts, depth - 1, found)
            finally:
                os.close(lower)


def _names(directory: int, room: int) -> list[bytes]:
    names: list[bytes] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if len(names) >= room:
                raise _too_many()
            names.append(os.fsencode(entry.name))
    return sorted(names)


def _too_many() -> CallerError:
    return CallerError(
        f"there are more than {MAX_ENTRIES} entries; list its directories one by one, or look from "
        "within a sandbox",
        code="out_of_range",
    )
