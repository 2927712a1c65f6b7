"""`/volumes`: HTTP in, one verb on volumes, E2B's JSON out; and `volumeMounts` of a create.

Source: E2B's SDKs 2.63 and cubesandbox 0.7.3, whose `driver` can only be our own.
"""

from __future__ import annotations

import falcon

from vmcell_api.json_body import request_json, text_field
from vmcell_api.store.volume_records import VolumeRecord
from vmcell_api.volume_control import VolumeControl
from vmcell_protos.errors import CallerError

DRIVERS = (None, "", "local")


class Volumes:
    """`/volumes`: create and list."""

    def __init__(self, volumes: VolumeControl, domain: str) -> None:
        self._volumes = volumes
        self._domain = domain

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Makes an empty volume."""
        body = request_json(req)
        if body.get("driver") not in DRIVERS:
            raise CallerError("this server has no volume drivers but 'local'; leave driver out")
        name = text_field(body, "name", max_length=128)
        record = self._volumes.create(req.context.team, name)
        resp.status = 201
        resp.media = _answer(record, self._volumes, self._domain)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """All volumes of the team."""
        resp.media = [
            {"volumeID": record.volume_id, "name": record.name}
            for record in self._volumes.list(req.context.team)
        ]


class Volume:
    """`/volumes/{volume_id}`."""

    def __init__(self, volumes: VolumeControl, domain: str) -> None:
        self._volumes = volumes
        self._domain = domain

    def on_get(self, req: falcon.Request, resp: falcon.Response, volume_id: str) -> None:
        """The volume and its token."""
        record = self._volumes.get(req.context.team, volume_id)
        resp.media = _answer(record, self._volumes, self._domain)

    def on_delete(self, req: falcon.Request, resp: falcon.Response, volume_id: str) -> None:
        """Removes it with its files."""
        self._volumes.delete(req.context.team, volume_id)
        resp.status = 204


def _answer(record: VolumeRecord, volumes: VolumeControl, domain: str) -> dict[str, object]:
    answer: dict[str, object] = {
        "volumeID": record.volume_id,
        "name": record.name,
        "token": volumes.token(record),
    }
    if domain:
        answer["domain"] = domain
    return answer
