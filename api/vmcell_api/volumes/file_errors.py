"""What the kernel says about a path, as our errors: whose fault it was and what to do."""

from __future__ import annotations

import errno

from vmcell_protos.errors import CallerError, HostError, VmcellError

_CALLERS = {
    errno.ENOENT: ("not_found", "there is no such path in the volume"),
    errno.EEXIST: ("already_exists", "it exists already"),
    errno.ENOTDIR: ("invalid_argument", "a part of the path is not a directory"),
    errno.EISDIR: ("invalid_argument", "it is a directory"),
    errno.ENOTEMPTY: ("already_exists", "it is a directory that is not empty"),
    errno.ELOOP: (
        "invalid_argument",
        "the path goes through a symbolic link, and those are followed in a sandbox only",
    ),
    errno.EXDEV: ("invalid_argument", "the path leaves the volume"),
    errno.ENAMETOOLONG: ("invalid_argument", "a name has more than 255 bytes"),
    errno.EINVAL: ("invalid_argument", "the file system does not take this name or value"),
    errno.ENXIO: ("invalid_argument", "it is neither a file nor a directory"),
    errno.ETXTBSY: ("aborted", "it is being executed"),
    errno.EMLINK: ("invalid_argument", "the directory has as many entries as it can have"),
}
_FULL = (errno.ENOSPC, errno.EDQUOT)


class VolumeFull(HostError):
    """The disk that holds the volumes has no room; answered with 507."""

    default_code = "resource_exhausted"


def translate(error: OSError, shown: str) -> VmcellError:
    """The error that stands for `error`; `shown` is the path the client gave, for the sentence."""
    if error.errno in _FULL:
        return VolumeFull(f"{shown}: the disk of the volumes is full; remove something first")
    if error.errno in _CALLERS:
        code, words = _CALLERS[error.errno]
        return CallerError(f"{shown}: {words}", code=code)
    return HostError(f"{shown}: {error.strerror or error}", code="internal")
