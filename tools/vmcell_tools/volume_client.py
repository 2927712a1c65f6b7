"""The volumes of a team, asked of a running API as a client would."""

from __future__ import annotations

import urllib.parse

from vmcell_protos.errors import CallerError
from vmcell_tools.api_client import Api, api_of_environment

REMOVE_WITHIN_S = 630  # a volume may have millions of files


class VolumeClient:
    """Every call raises CallerError with the API's own sentence, or HostError without an API."""

    def __init__(self, api: Api | None = None) -> None:
        """The API that the environment names unless one is given. CallerError."""
        self._api = api or api_of_environment()

    def list(self) -> list[dict[str, str]]:
        """`volumeID` and `name` of each."""
        rows = self._api.rows("/volumes", "volumeID", "name")
        return [{key: str(value) for key, value in row.items()} for row in rows]

    def create(self, name: str) -> dict[str, str]:
        """`volumeID`, `name` and `token` of a new one."""
        made = self._api.ask("POST", "/volumes", {"name": name})
        if not isinstance(made, dict) or not made.keys() >= {"volumeID", "name"}:
            raise self._api.strange("POST /volumes")
        return made

    def remove(self, name_or_id: str) -> str:
        """Removes a volume with its files; its id."""
        rows = self.list()
        found = [row for row in rows if name_or_id == row["name"]]
        found = found or [row for row in rows if name_or_id == row["volumeID"]]
        if not found:
            raise CallerError(f"there is no volume {name_or_id!r}; see: vmcell volume list")
        volume_id = found[0]["volumeID"]
        path = f"/volumes/{urllib.parse.quote(volume_id)}"
        self._api.ask("DELETE", path, within_s=REMOVE_WITHIN_S)
        return volume_id
