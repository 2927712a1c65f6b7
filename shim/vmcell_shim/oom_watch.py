"""What a guest's OOM killer did in one container: told to containerd once for each news of it.

The guest may invent as many kills as it likes, so it is asked once in PACE_S at most: news that
come meanwhile are one.
"""

from __future__ import annotations

import threading

from vmcell_protos.agent import WaitOomRequest, WaitOomResponse
from vmcell_protos.errors import VmcellError
from vmcell_protos.events import TaskOOM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmcell_shim.events import EventPublisher
    from vmcell_shim.guest import Guest
    from vmcell_shim.journal import Journal


PACE_S = 1.0


class OomWatch:
    """Owns nothing; its thread ends with the container, or with the VM."""

    def __init__(
        self, container_id: str, guest: Guest, events: EventPublisher, journal: Journal
    ) -> None:
        self._id = container_id
        self._guest = guest
        self._events = events
        self._journal = journal
        self._lock = threading.Lock()
        self._kills = 0

    def start(self) -> None:
        """From here on the guest is asked, in a thread."""
        threading.Thread(target=self._watch, name="oom", daemon=True).start()

    def tell(self, kills: int) -> None:
        """The guest says how many there were so far."""
        with self._lock:
            news, self._kills = kills > self._kills, max(kills, self._kills)
            if news:
                # Under the lock: an exit that carries the same number stands behind it.
                self._events.publish(TaskOOM(container_id=self._id))

    def _watch(self) -> None:
        try:
            while True:
                request = WaitOomRequest(container_id=self._id, seen=self._kills)
                answer = self._guest.call("WaitOom", request, WaitOomResponse, None)
                self.tell(answer.oom_kills)
                self._guest.ended.wait(PACE_S)
        except VmcellError as error:
            # The container has been removed, or the VM has ended.
            self._journal.info(f"no more OOM reports of {self._id}: {error}")
