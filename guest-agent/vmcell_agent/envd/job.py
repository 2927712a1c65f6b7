"""Long work on files in slices: a generator that yields often, run between other events."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Generator
from typing import TypeVar

from vmcell_protos.errors import CallerError

from .loop import Loop, report_bug

# How long one slice may keep the others waiting.
SLICE_SECONDS = 0.005

T = TypeVar("T")

_CODES = {
    errno.ENOENT: "not_found",
    errno.EEXIST: "already_exists",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.EROFS: "permission_denied",
    errno.ENOSPC: "resource_exhausted",
    errno.EDQUOT: "resource_exhausted",
    errno.EMFILE: "resource_exhausted",
    errno.ENFILE: "resource_exhausted",
    errno.ENOTDIR: "invalid_argument",
    errno.EISDIR: "invalid_argument",
    errno.EINVAL: "invalid_argument",
    errno.ELOOP: "invalid_argument",
    errno.ENAMETOOLONG: "invalid_argument",
    errno.EBUSY: "failed_precondition",
    errno.ENOTEMPTY: "failed_precondition",
}


def file_error(what: str, error: OSError) -> CallerError:
    """`cannot WHAT: no such file or directory`, with the code that fits errno."""
    text = (error.strerror or str(error)).lower()
    return CallerError(f"cannot {what}: {text}", code=_CODES.get(error.errno or 0, "internal"))


def run_job(
    loop: Loop,
    steps: Generator[None, None, T],
    done: Callable[[T], None],
    failed: Callable[[OSError | CallerError], None],
) -> None:
    """Run `steps`, the first slice at once; then `done` or `failed`."""
    until = time.monotonic() + SLICE_SECONDS
    try:
        while time.monotonic() < until:
            next(steps)
    except StopIteration as stop:
        done(stop.value)
    except (OSError, CallerError) as error:
        failed(error)
    except RecursionError:
        failed(CallerError("the directories are nested too deeply"))
    except Exception as error:  # noqa: BLE001 - the caller must get an answer all the same
        report_bug("a job on files", error)
        failed(CallerError("envd failed to serve this request", code="internal"))
    else:
        loop.soon(lambda: run_job(loop, steps, done, failed))
