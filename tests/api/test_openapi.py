"""The API's document against the application, both ways, and against the E2B SDK's own client."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import e2b
import e2b.api.client.api as sdk_api
import pytest
from api_service import ApiService
from falcon import inspect as falcon_inspect
from falcon import testing

from vmcell_api.openapi.document import RESOURCES, build_document, operations
from vmcell_api.openapi.operation import Operation
from vmcell_tools import openapi_file

ANY_PARAMETER = re.compile(r"\{[^/]*?\}")
# What the SDK calls and this server does not have yet; a route that comes takes its row away.
NOT_SERVED: set[tuple[str, str]] = set()


def _plain(path: str) -> str:
    return ANY_PARAMETER.sub("{}", path)


def _documented() -> set[tuple[str, str]]:
    return {(row.method, _plain(row.path)) for _, row in operations()}


def test_every_route_is_documented_and_nothing_else(service: ApiService) -> None:
    routes = {
        (method.method, re.sub(r"\{(\w+):[^}]*\}", r"{\1}", route.path))
        for route in falcon_inspect.inspect_routes(service.app)
        for method in route.methods
        if not method.internal
    }
    documented = {(row.method, row.path) for _, row in operations()}
    missing, extra = sorted(routes - documented), sorted(documented - routes)
    assert not missing, (
        f"no entry for {missing}: add an Operation to the resource's module in "
        "api/vmcell_api/openapi/ (a new module also to document.RESOURCES), then run "
        "`python -m vmcell_tools.openapi_file`"
    )
    assert not extra, f"the application has no route for {extra}: take the entry away"


def test_the_file_in_the_repository_is_the_document() -> None:
    assert openapi_file.PATH.read_text() == openapi_file.render(), (
        "docs/openapi.json is old: run `python -m vmcell_tools.openapi_file`"
    )


def test_the_served_document_needs_no_key(service: ApiService) -> None:
    answer = testing.TestClient(service.app).simulate_get("/openapi.json")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == json.loads(json.dumps(build_document()))


def test_every_schema_is_used_and_every_reference_leads_somewhere() -> None:
    text = json.dumps(build_document())
    used = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert used == {name for resource in RESOURCES for name in resource.SCHEMAS}


def test_the_document_says_which_scope_a_call_needs() -> None:
    paths = build_document()["paths"]
    assert paths["/v2/sandboxes"]["post"]["x-vmcell-scope"] == "sandboxes:write"
    assert "security" not in paths["/health"]["get"]


@pytest.mark.parametrize("row", [row for _, row in operations()], ids=lambda row: row.path)
def test_a_call_needs_a_key_unless_the_document_says_it_is_open(
    service: ApiService, row: Operation
) -> None:
    path = ANY_PARAMETER.sub("x", row.path)
    answer = testing.TestClient(service.app).simulate_request(row.method, path)
    assert (answer.status_code != 401) is row.is_open


class _Body:
    """Whatever the generated client wants to send."""

    def to_dict(self) -> dict[str, object]:
        return {}


def _modules() -> dict[str, ModuleType]:
    found = pkgutil.walk_packages(sdk_api.__path__, f"{sdk_api.__name__}.")
    names = [row.name for row in found if not row.ispkg]
    return {name.rpartition(".")[2]: importlib.import_module(name) for name in names}


def _called() -> set[str]:
    """The modules of the generated client that the SDK itself imports."""
    root = Path(e2b.__file__).parent
    found: set[str] = set()
    pattern = re.compile(r"from e2b\.api\.client\.api\.\w+ import (\([^)]*\)|[^\n]*)")
    for path in root.rglob("*.py"):
        if root / "api" / "client" not in path.parents:
            for names in pattern.findall(path.read_text()):
                found |= set(re.findall(r"\w+", names))
    return found


def _call_of(module: ModuleType) -> tuple[str, str]:
    """Method and path that the generated function would ask for."""
    arguments = {
        name: _Body() if name == "body" else f"{{{name}}}"
        for name, parameter in inspect.signature(module._get_kwargs).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    kwargs = module._get_kwargs(**arguments)
    return kwargs["method"].upper(), _plain(kwargs["url"].replace("%7B", "{").replace("%7D", "}"))


def test_every_call_of_the_sdk_is_documented_or_named_as_missing() -> None:
    modules = _modules()
    called = {_call_of(modules[name]) for name in _called() & modules.keys()}
    assert len(called) > 25, "the SDK's client is laid out otherwise; look again"
    documented = _documented()
    assert called - documented == NOT_SERVED & called, "a call of the SDK has no entry"
    assert not NOT_SERVED & documented, "served now: take the row out of NOT_SERVED"
    assert not NOT_SERVED - called, "no call of the SDK: take the row out of NOT_SERVED"


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda module: module.TAG)
def test_what_an_operation_says_is_consistent(resource: ModuleType) -> None:
    for row in resource.OPERATIONS:
        is_refused = row.summary.startswith("Refused with ")
        assert bool(row.answers) is not is_refused, row.path
        assert is_refused or 501 not in row.errors, row.path
        assert all(200 <= status < 300 for status in row.answers), row.path
        assert all(400 <= status < 600 for status in row.errors), row.path
        assert row.summary.endswith("."), row.path
        if row.body is not None:
            assert 413 in row.errors, f"{row.path}: a body may be too large"
