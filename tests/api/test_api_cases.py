"""Requests made from the API's own document (schemathesis): no 5xx, and answers as it says.

`VMCELL_API_CASES` says how many; `make test-api-cases` runs 5,000.
"""

from __future__ import annotations

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

from vmcell_api.openapi.document import operations
from vmcell_api.store.api_keys import ApiKeys

CASES = int(os.environ.get("VMCELL_API_CASES", "400"))
ROWS = [row for _, row in operations()]
# A request without a body and a query can be neither wrong nor much varied.
VARIED = [row for row in ROWS if row.body or row.query]
RUNS = [(row.method, row.path, GenerationMode.POSITIVE) for row in ROWS] + [
    (row.method, row.path, GenerationMode.NEGATIVE) for row in VARIED
]
FEW = 4
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiService]:
    folder: Path = tmp_path_factory.mktemp("api")
    with api_service(folder, requests_per_s=100_000) as running:
        yield running


@pytest.fixture(scope="module")
def schema(service: ApiService):
    return schemathesis.openapi.from_wsgi("/openapi.json", service.app)


@pytest.fixture(scope="module")
def counts() -> list[str]:
    """One entry for each case that was run."""
    return []


def _living(service: ApiService) -> dict[str, str]:
    """Values of path parameters that name something, so that not every answer is a 404."""
    if not service.node.running:
        client = testing.TestClient(service.app, headers={"X-API-KEY": service.key})
        client.simulate_post("/v2/sandboxes", json={"templateID": "base"})
    return {
        "sandbox_id": next(iter(service.node.running)),
        "team": "team-one",
        "key_id": ApiKeys(service.store.engine).list()[-1].key_id,
    }


def _one_case(service: ApiService, case: schemathesis.Case, headers: dict, aimed: bool) -> None:
    if aimed:
        living = _living(service)
        for name in case.path_parameters or {}:
            case.path_parameters[name] = living.get(name, case.path_parameters[name])
        if isinstance(case.body, dict) and "templateID" in case.body:
            case.body["templateID"] = "base"
    response = case.call(headers=headers)
    case.validate_response(response, checks=CHECKS, headers=headers)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("method", "path", "mode"), RUNS, ids=lambda value: getattr(value, "value", value).strip("/")
)
def test_answers_are_what_the_document_says(
    service: ApiService,
    schema: BaseSchema,
    counts: list[str],
    method: str,
    path: str,
    mode: GenerationMode,
) -> None:
    is_varied = any((row.method, row.path) == (method, path) for row in VARIED)
    operation = schema[path][method]
    strategy = operation.as_strategy(generation_mode=mode)
    admin = service.new_key(f"team-{method}", "admin")
    keys = (admin, service.key)
    if (method, path) == ("DELETE", "/vmcell/teams/{team}"):
        keys = (service.key,)  # refused: else the other cases would lose their team

    @seed(20260104)
    @settings(
        max_examples=CASES // (2 * len(VARIED)) + 1 if is_varied else FEW,
        phases=(Phase.generate,),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy, key=st.sampled_from(keys), aimed=st.booleans())
    def run(case: schemathesis.Case, key: str, aimed: bool) -> None:
        counts.append(method)
        _one_case(service, case, {"X-API-KEY": key}, aimed)

    run()


def test_there_were_as_many_cases_as_asked_for(counts: list[str]) -> None:
    assert len(counts) >= CASES, "run the whole file"
