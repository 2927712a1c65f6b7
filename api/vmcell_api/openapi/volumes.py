"""Volumes of a team. Their files are served by another process: see `vmcell_api.volume_content`."""

from __future__ import annotations

from vmcell_api.openapi.operation import TEXT, Operation, array, nullable, one_of, record, ref
from vmcell_api.volumes.names import NAME

TAG = "volumes"

SCHEMAS = {
    "NewVolume": record(
        {"name": {"type": "string", "pattern": f"^{NAME.pattern}$"}},
        {"driver": nullable(one_of("", "local"))},
    ),
    "Volume": record({"volumeID": TEXT, "name": TEXT}),
    "VolumeWithToken": record(
        {"volumeID": TEXT, "name": TEXT, "token": {**TEXT, "description": "Opens its files."}},
        {"domain": TEXT},
    ),
}

OPERATIONS = (
    Operation(
        method="GET",
        path="/volumes",
        summary="The team's volumes, oldest first.",
        answers={200: array(ref("Volume"))},
    ),
    Operation(
        method="POST",
        path="/volumes",
        summary="Makes an empty volume; 429 when the team has as many as it may.",
        body=ref("NewVolume"),
        body_required=True,
        answers={201: ref("VolumeWithToken")},
        errors=(413, 504),
    ),
    Operation(
        method="GET",
        path="/volumes/{volume_id}",
        summary="A volume and its token.",
        answers={200: ref("VolumeWithToken")},
        errors=(404,),
    ),
    Operation(
        method="DELETE",
        path="/volumes/{volume_id}",
        summary="Removes a volume with its files; 409 while a sandbox has it.",
        answers={204: None},
        errors=(404, 409, 504),
    ),
)
