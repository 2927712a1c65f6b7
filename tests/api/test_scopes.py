"""What scopes allow, and that the table of routes covers the application."""

from __future__ import annotations

import pytest
from api_service import ApiService
from falcon import inspect
from hypothesis import given
from hypothesis import strategies as st

from vmcell_api.access import OPEN_PATHS, OPEN_PREFIX
from vmcell_api.scopes import ROUTES, SCOPES, allows, needed_scope, parse_scopes, resource_of
from vmcell_protos.errors import CallerError

ADMINS_ALONE = ("/vmcell/teams", "/vmcell/keys", "/vmcell/audit", "/metrics")


def test_every_route_has_its_row(service: ApiService) -> None:
    """A route that no row of scopes.ROUTES covers would be the operator's alone, by accident."""
    for route in inspect.inspect_routes(service.app):
        if route.path in OPEN_PATHS or route.path.startswith(OPEN_PREFIX):
            continue
        covered = any(route.path == path or route.path.startswith(f"{path}/") for path, _ in ROUTES)
        assert covered, f"add a row for {route.path} to vmcell_api.scopes.ROUTES"
        is_admins = route.path.startswith(ADMINS_ALONE)
        assert (resource_of(route.path) == "admin") is is_admins, route.path


@pytest.mark.parametrize(
    ("method", "route", "scope"),
    [
        ("GET", "/v2/sandboxes", "sandboxes:read"),
        ("POST", "/v2/sandboxes", "sandboxes:write"),
        ("DELETE", "/sandboxes/{sandbox_id}", "sandboxes:write"),
        ("GET", "/snapshots", "sandboxes:read"),
        ("POST", "/v3/templates", "templates:write"),
        ("GET", "/templates/{template_id}/builds/{build_id}/status", "templates:read"),
        ("GET", "/templates/{template_id}/files/{digest}", "templates:write"),
        ("DELETE", "/volumes/{volume_id}", "volumes:write"),
        ("GET", "/teams", "team:read"),
        ("POST", "/vmcell/sandboxes/{sandbox_id}/fork", "sandboxes:write"),
        ("GET", "/vmcell/teams", "admin"),
        ("GET", "/metrics", "admin"),
        ("GET", "/sandboxes-of-others", "admin"),
        ("GET", "/what/is/this", "admin"),
    ],
)
def test_what_a_route_needs(method: str, route: str, scope: str) -> None:
    assert needed_scope(method, route) == scope


@pytest.mark.parametrize(
    ("granted", "needed", "answer"),
    [
        ("*", "sandboxes:write", True),
        ("*", "admin", False),
        ("admin", "admin", True),
        ("admin", "volumes:read", True),
        ("sandboxes:*", "sandboxes:read", True),
        ("sandboxes:*", "templates:read", False),
        ("sandboxes:read", "sandboxes:read", True),
        ("sandboxes:read", "sandboxes:write", False),
        ("sandboxes:write", "sandboxes:read", False),
    ],
)
def test_what_a_scope_allows(granted: str, needed: str, answer: bool) -> None:
    assert allows(parse_scopes([granted]), needed) is answer


@given(st.lists(st.sampled_from(SCOPES), min_size=1), st.sampled_from(SCOPES))
def test_more_scopes_never_allow_less(words: list[str], needed: str) -> None:
    granted = parse_scopes(words)
    assert list(granted) == sorted(set(words))
    each = any(allows((word,), needed) for word in granted)
    assert allows(granted, needed) is each


@given(st.text())
def test_other_words_are_refused_by_name(word: str) -> None:
    if word.strip() in SCOPES:
        return
    with pytest.raises(CallerError, match="known are"):
        parse_scopes([word])
