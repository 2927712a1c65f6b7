"""E2B's volume routes; the content of volumes has a server of its own."""

from __future__ import annotations

from vmcell_api.openapi.operation import TEXT, Operation, array, one_of, record, ref

TAG = "volumes"

_VOLUME = {"volumeID": TEXT, "name": TEXT}

SCHEMAS = {
    "NewVolume": record(
        {"name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,128}$"}},
        {"driver": one_of("", "local")},
    ),
    "Volume": record(_VOLUME),
    "VolumeAndToken": record({**_VOLUME, "token": TEXT}, {"domain": TEXT}),
}

OPERATIONS = (
    Operation(
        method="GET",
        path="/volumes",
        summary="The team's volumes.",
        answers={200: array(ref("Volume"))},
    ),
    Operation(
        method="POST",
        path="/volumes",
        summary="Makes an empty volume.",
        body=ref("NewVolume"),
        body_required=True,
        answers={201: ref("VolumeAndToken")},
        errors=(409, 413, 504),
    ),
    Operation(
        method="GET",
        path="/volumes/{volume_id}",
        summary="A volume and its token.",
        answers={200: ref("VolumeAndToken")},
        errors=(404,),
    ),
    Operation(
        method="DELETE",
        path="/volumes/{volume_id}",
        summary="Removes a volume with its files.",
        answers={204: None},
        errors=(404, 409, 504),
    ),
)
