"""Requests made from the API's own document (schemathesis): no 5xx, and answers as it says.

The one 5xx that may come is 501, where the document has it: what vmcell does not have yet.

`VMCELL_API_CASES` says how many; `make test-api-cases` runs 5,000.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from api_service import ApiService, api_service
from falcon import testing
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from vmcell_api.metric_sample import MetricSample
from vmcell_api.openapi.document import operations
from vmcell_api.scopes import ADMIN, needed_scope
from vmcell_api.store.api_keys import ApiKeys

JSON = "application/json"
CASES = int(os.environ.get("VMCELL_API_CASES", "400"))
ROWS = [row for _, row in operations()]
# A request without a body and a query can be neither wrong nor much varied.
VARIED = [row for row in ROWS if row.body or row.query]
# No bytes are wrong for a body of bytes.
WRONGED = [row for row in VARIED if row.body_media_type == JSON]
RUNS = [(row.method, row.path, GenerationMode.POSITIVE) for row in ROWS] + [
    (row.method, row.path, GenerationMode.NEGATIVE) for row in WRONGED
]
FEW = 4
CONFORMANCE = (status_code_conformance, content_type_conformance, response_schema_conformance)
NAME = "living"
HASH = "ab" * 32
SAMPLE = MetricSample(
    unix_ms=1,
    cpu_count=2,
    cpu_used_pct=12.5,
    mem_used_bytes=1 << 40,
    mem_total_bytes=1 << 41,
    mem_cache_bytes=3,
    disk_used_bytes=4,
    disk_total_bytes=5,
)
ENTRY = {"unix_ms": 1, "level": "info", "message": "one", "fields": {"pid": "5"}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiService]:
    folder: Path = tmp_path_factory.mktemp("api")
    with api_service(folder, requests_per_s=100_000) as running:
        yield running


@pytest.fixture(scope="module")
def schema(service: ApiService):
    return schemathesis.openapi.from_wsgi("/openapi.json", service.app)


@pytest.fixture(scope="module")
def counts() -> list[tuple[str, str, int]]:
    """Method, path and answered status of each case that was run."""
    return []


def _living(service: ApiService, method: str, path: str) -> dict[str, str]:
    """Values of path parameters that name something, so that not every answer is a 404."""
    client = testing.TestClient(service.app, headers={"X-API-KEY": service.key})
    living = {"sandbox_id": _living_sandbox(service, client)}
    _set_stage(service, path, living["sandbox_id"])
    if "snapshot" in path or path.endswith(("/rollback", "/undo", "/diff")):
        living["snapshotID"] = _living_snapshot(service, living["sandbox_id"])
    if "/vmcell/teams" in path or "/vmcell/keys" in path:
        living |= _living_team(service)
    if "templates" in path or "uploads" in path:
        is_start = method == "POST" and path.endswith("{build_id}")
        living |= _living_template(client, is_started=not is_start)
    if "volumes" in path:
        client.simulate_post("/volumes", json={"name": NAME})  # refused when it is there
        living["volume_id"] = client.simulate_get("/volumes").json[0]["volumeID"]
    return living


def _set_stage(service: ApiService, path: str, sandbox_id: str) -> None:
    """In the state that the call is for, and with room beside it."""
    if path.endswith("/resume"):
        if service.node.running[sandbox_id].state != "paused":
            service.node.pause(sandbox_id)
    else:
        service.node.resume(sandbox_id, 0)
    if path.endswith("/fork"):
        for other in set(service.node.running) - {sandbox_id}:
            service.node.kill(other)


def _living_snapshot(service: ApiService, sandbox_id: str) -> str:
    """One of that sandbox, with an undo point beside it."""
    for name in (f"snap-{'0' * 20}", f"undo-{'0' * 20}"):
        if name not in service.node.saved:
            service.node.make_snapshot(sandbox_id, name)
    return name


def _living_team(service: ApiService) -> dict[str, str]:
    """One that no other case needs, so it may lose its key, its limits and its life."""
    service.new_key(NAME)
    team = service.store.ensure_team(NAME)
    return {"team": NAME, "key_id": ApiKeys(service.store.engine).list(team.team_id)[-1].key_id}


def _living_sandbox(service: ApiService, client: testing.TestClient) -> str:
    """One with metrics and a log."""
    if not service.node.running:
        client.simulate_post("/v2/sandboxes", json={"templateID": "base"})
    sandbox_id = next(iter(service.node.running))
    service.node.samples[sandbox_id] = [SAMPLE]
    service.node.logs = json.dumps({"entries": [ENTRY]}).encode()
    return sandbox_id


def _living_template(client: testing.TestClient, *, is_started: bool) -> dict[str, str]:
    """One with a build, which waits or is ready, and with a link for uploads."""
    made = client.simulate_post("/v3/templates", json={"name": NAME}).json
    template_id, build_id = made["templateID"], made["buildID"]
    if is_started:
        start = f"/v2/templates/{template_id}/builds/{build_id}"
        client.simulate_post(start, json={"fromImage": "small"})
    link = client.simulate_get(f"/templates/{template_id}/files/{HASH}").json["url"]
    return {
        "template_id": template_id,
        "build_id": build_id,
        "alias": NAME,
        "files_hash": HASH,
        "token": link.rpartition("/")[2],
    }


def _one_case(service: ApiService, case: schemathesis.Case, headers: dict, aimed: bool) -> int:
    if aimed:
        living = _living(service, case.method, case.path)
        for name in case.path_parameters or {}:
            case.path_parameters[name] = living.get(name, case.path_parameters[name])
        if "sandbox_ids" in (case.query or {}):
            case.query["sandbox_ids"] = living["sandbox_id"]
        if {"older", "newer"} <= (case.query or {}).keys():
            case.query |= {"older": living["snapshotID"], "newer": living["snapshotID"]}
        if isinstance(case.body, dict):
            named = {"templateID": "base", "target": NAME}
            if "snapshotID" in living:
                named["snapshotID"] = living["snapshotID"]
            if case.path == "/templates/tags":
                named["name"] = NAME
            case.body |= {field: named[field] for field in named.keys() & case.body.keys()}
    response = case.call(headers=headers)
    is_refused = response.status_code == 501  # as documented: a check sees to that
    checks = CONFORMANCE if is_refused else (not_a_server_error, *CONFORMANCE)
    case.validate_response(response, checks=checks, headers=headers)
    return response.status_code


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("method", "path", "mode"), RUNS, ids=lambda value: getattr(value, "value", value).strip("/")
)
def test_answers_are_what_the_document_says(
    service: ApiService,
    schema: BaseSchema,
    counts: list[tuple[str, str, int]],
    method: str,
    path: str,
    mode: GenerationMode,
) -> None:
    is_varied = any((row.method, row.path) == (method, path) for row in VARIED)
    operation = schema[path][method]
    strategy = operation.as_strategy(generation_mode=mode)
    admin = service.new_key(f"team-{method}", "admin")
    # Hypothesis begins with the first: one that may, and at what is there.
    keys = (admin, service.key) if needed_scope(method, path) == ADMIN else (service.key, admin)

    @seed(20260104)
    @settings(
        max_examples=CASES // (len(VARIED) + len(WRONGED)) + 1 if is_varied else FEW,
        phases=(Phase.generate,),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy, key=st.sampled_from(keys), aimed=st.sampled_from((True, False)))
    def run(case: schemathesis.Case, key: str, aimed: bool) -> None:
        counts.append((method, path, _one_case(service, case, {"X-API-KEY": key}, aimed)))

    run()


def test_there_were_as_many_cases_as_asked_for(counts: list[tuple[str, str, int]]) -> None:
    assert len(counts) >= CASES, "run the whole file"


def test_every_operation_was_also_answered_well(counts: list[tuple[str, str, int]]) -> None:
    """Else its good answers would not have been compared with anything."""
    seen = {(method, path) for method, path, status in counts if status < 300}
    wanted = {(row.method, row.path) for row in ROWS if row.answers}
    assert wanted <= seen
