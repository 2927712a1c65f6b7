"""Removing a sandbox, however much of it there is.

One path serves a kill, a failed create, an expired or dead sandbox and what an earlier noded left
behind: every step is fine with finding nothing, so the whole may be repeated until it succeeds.
"""

from __future__ import annotations

import grpc

from vmcell_api.node import sandbox_files
from vmcell_api.node.containerd import Containerd, translate
from vmcell_api.node.slots import SlotPool
from vmcell_protos.errors import HostError

LEASE_PREFIX = "vmcell-create-"
END_TIMEOUT_S = 15.0


def tear_down(
    containerd: Containerd,
    slots: SlotPool,
    state_dir: str,
    *,
    container_id: str,
    slot_number: int | None,
) -> None:
    """Kills and removes in the order that containerd wants: task, container, snapshot, the rest.

    Raises HostError or CallerError at the first step that fails; what was removed stays removed.
    """
    _end_task(containerd, container_id)
    if slot_number is not None:
        slots.cut(slot_number)  # clients' streams end now, not when all the rest is gone
    containerd.delete_task(container_id)
    containerd.delete_container(container_id)
    containerd.remove_snapshot(container_id)
    containerd.delete_lease(LEASE_PREFIX + container_id)
    sandbox_files.remove(state_dir, container_id)
    if slot_number is not None:
        slots.release(slot_number)


def end_machine(
    containerd: Containerd, slots: SlotPool, *, container_id: str, slot_number: int | None
) -> None:
    """Kills and removes the task alone, and frees its slot; the container stays.

    Raises HostError or CallerError at the first step that fails.
    """
    _end_task(containerd, container_id)
    if slot_number is not None:
        slots.cut(slot_number)
    containerd.delete_task(container_id)
    if slot_number is not None:
        slots.release(slot_number)


def _end_task(containerd: Containerd, container_id: str) -> None:
    """Kills the task and waits for its end."""
    ended = containerd.wait_task(container_id)
    try:
        containerd.kill_task(container_id)
        ended.result(timeout=END_TIMEOUT_S)
    except grpc.FutureTimeoutError as error:
        raise HostError(
            f"the task of sandbox {container_id} did not end within {END_TIMEOUT_S:.0f} s of "
            "SIGKILL"
        ) from error
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise translate(error, f"waiting for the end of sandbox {container_id}") from error
    finally:
        ended.cancel()
