"""The API's snapshot routes for the command line."""

from __future__ import annotations

import re
from urllib.parse import urlencode

from vmcell_protos.errors import CallerError
from vmcell_tools.api_client import ApiClient, Json, segment
from vmcell_tools.sandbox_client import (
    SLOW_WITHIN_S,
    SandboxClient,
    sandbox_segment,
    with_next_step,
)

_ID = re.compile(r"[a-z]+-[a-z0-9]{20}")
_DIFFERENCE = (
    *("older", "newer", "changed", "unchanged"),
    *("allocatedBytesOlder", "allocatedBytesNewer"),
)


class SnapshotClient:
    """Every call raises what `ApiClient` does."""

    def __init__(self, api: ApiClient) -> None:
        self._api = api
        self._sandboxes = SandboxClient(api)

    def find(self, *, sandbox_id: str = "", name: str = "") -> list[Json]:
        """`snapshotID` and `names` of each, newest first; "" is any."""
        query = {"sandboxID": sandbox_id, "name": name}
        return self._api.pages("/snapshots", query, needs=("snapshotID", "names"))

    def create(self, sandbox_id: str, name: str) -> Json:
        """A snapshot of a running sandbox, which goes on."""
        try:
            return self._api.ask_object(
                "POST",
                f"/sandboxes/{sandbox_segment(sandbox_id)}/snapshots",
                {"name": name} if name else {},
                needs=("snapshotID", "names"),
                within_s=SLOW_WITHIN_S,
            )
        except CallerError as error:
            raise with_next_step(error) from error

    def delete(self, text: str) -> str:
        """Deletes the snapshot of that id or name; its id. Never a template, which has the route
        in common with it."""
        snapshot_id = self._id_of(text)
        if snapshot_id not in {row["snapshotID"] for row in self.find()}:
            raise CallerError(f"there is no snapshot {text!r}; see: vmcell snapshot list")
        self._api.ask("DELETE", f"/templates/{segment(snapshot_id)}", within_s=SLOW_WITHIN_S)
        return snapshot_id

    def difference(self, older: str, newer: str, *, sandbox_id: str, by_file: bool) -> Json:
        """What differs between two snapshots of one sandbox, which is looked for when it is ""."""
        first, second = self._id_of(older), self._id_of(newer)
        sandbox_id = sandbox_id or self._sandbox_of(first, second)
        query = {"older": first, "newer": second, "files": "true" if by_file else "false"}
        path = f"/vmcell/sandboxes/{sandbox_segment(sandbox_id)}/diff?{urlencode(query)}"
        needs = (*_DIFFERENCE, "files") if by_file else _DIFFERENCE
        try:
            return self._api.ask_object("GET", path, needs=needs, within_s=SLOW_WITHIN_S)
        except CallerError as error:
            raise with_next_step(error) from error

    def _id_of(self, text: str) -> str:
        if _ID.fullmatch(text):
            return text
        rows = self.find(name=text) if text else []
        if not rows:
            raise CallerError(f"there is no snapshot {text!r}; see: vmcell snapshot list")
        return str(rows[0]["snapshotID"])

    def _sandbox_of(self, older: str, newer: str) -> str:
        """The API tells the sandbox's snapshots, not the snapshot's sandbox."""
        for row in self._sandboxes.find(state="", metadata={}, template=""):
            sandbox_id = str(row["sandboxID"])
            present = self._present(sandbox_id)
            if {older, newer} <= present:
                return sandbox_id
            if present & {older, newer}:
                missing = newer if older in present else older
                raise CallerError(
                    f"snapshot {missing} is none of sandbox {sandbox_id}, which the other is of; "
                    f"see: vmcell sandbox history {sandbox_id}"
                )
        raise CallerError(
            f"no sandbox has the snapshots {older} and {newer}; those of a sandbox that has ended "
            "cannot be compared"
        )

    def _present(self, sandbox_id: str) -> set[str]:
        try:
            return {row["snapshotID"] for row in self._sandboxes.history(sandbox_id)}
        except CallerError as error:
            if error.code == "not_found":  # it has ended since it was listed
                return set()
            raise
