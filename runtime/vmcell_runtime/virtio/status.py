"""Device status as a table (virtio 1.2 § 2.1, § 3.1.1): which values may follow which.

A driver may only add one bit at a time, in this order, give up (FAILED) or reset:

    RESET -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK

Anything else a guest writes is ignored, so no other order can reach a device. NEEDS_RESET is ours
to set; it stays until the reset.
"""

from __future__ import annotations

from vmcell_runtime.virtio import abi

RESET = abi.STATUS_RESET
ACKNOWLEDGED = abi.STATUS_ACKNOWLEDGE
DRIVER = ACKNOWLEDGED | abi.STATUS_DRIVER
FEATURES_OK = DRIVER | abi.STATUS_FEATURES_OK
RUNNING = FEATURES_OK | abi.STATUS_DRIVER_OK

FOLLOWERS: dict[int, int] = {
    RESET: ACKNOWLEDGED,
    ACKNOWLEDGED: DRIVER,
    DRIVER: FEATURES_OK,
    FEATURES_OK: RUNNING,
}


def next_status(current: int, written: int) -> int | None:
    """What `written` makes of `current`, or None if it may not follow and is to be ignored."""
    if written == RESET:
        return RESET
    if current & (abi.STATUS_NEEDS_RESET | abi.STATUS_FAILED):
        return None
    if written == current | abi.STATUS_FAILED:
        return written
    return written if FOLLOWERS.get(current) == written else None
