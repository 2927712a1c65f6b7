"""The volumes of a team, asked of a running API as a client would."""

from __future__ import annotations

from vmcell_protos.errors import CallerError
from vmcell_tools.api_client import ApiClient, Json, segment

REMOVE_WITHIN_S = 630  # a volume may have millions of files


class VolumeClient:
    """Every call raises what `ApiClient` does."""

    def __init__(self, api: ApiClient) -> None:
        self._api = api

    def list(self) -> list[Json]:
        """`volumeID` and `name` of each."""
        return self._api.ask_list("GET", "/volumes", needs=("volumeID", "name"))

    def create(self, name: str) -> Json:
        """`volumeID`, `name` and `token` of a new one."""
        return self._api.ask_object(
            "POST", "/volumes", {"name": name}, needs=("volumeID", "name", "token")
        )

    def remove(self, name_or_id: str) -> str:
        """Removes a volume with its files; its id."""
        rows = self.list()
        found = [row for row in rows if name_or_id == row["name"]]
        found = found or [row for row in rows if name_or_id == row["volumeID"]]
        if not found:
            raise CallerError(f"there is no volume {name_or_id!r}; see: vmcell volume list")
        volume_id = str(found[0]["volumeID"])
        self._api.ask("DELETE", f"/volumes/{segment(volume_id)}", within_s=REMOVE_WITHIN_S)
        return volume_id
