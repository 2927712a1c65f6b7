"""Names and tags of templates, image names, bodies of the template routes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_api import template_bodies
from vmcell_api.node.image_pull import full_reference
from vmcell_api.template_names import TemplateName, namespace_of, parse_name, parse_tags
from vmcell_protos.errors import CallerError

PART = st.from_regex(r"[a-z0-9_-]{1,20}", fullmatch=True)
TAG = st.from_regex(r"[a-z0-9_.-]{1,20}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(name=PART, namespace=st.just("") | PART, tag=st.just("") | TAG)
def test_names_come_back_as_they_were(name: str, namespace: str, tag: str) -> None:
    wanted = TemplateName(name=name, namespace=namespace, tag=tag)
    assert parse_name(str(wanted)) == wanted
    assert parse_name(str(wanted).upper()) == wanted


@given(st.text(max_size=40))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    try:
        found = parse_name(text)
    except CallerError:
        return
    assert str(found) == text.lower()


@pytest.mark.parametrize("text", ["", "a b", "a/b/c", "/a", "a/", "a:", ":b", "a:b:c", "ä", "a\n"])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(CallerError, match="no template name"):
        parse_name(text)


def test_tags() -> None:
    assert parse_tags(["V1", "v1", "a.b"]) == ["v1", "a.b"]
    assert parse_tags(None) == []
    for wrong in (["a b"], "v1", [1], [""], ["x"] * 33, {"a": 1}):
        with pytest.raises(CallerError):
            parse_tags(wrong)


@given(st.text(min_size=1, max_size=64))
def test_every_team_has_a_namespace_that_is_a_name(team: str) -> None:
    assert parse_name(namespace_of(team)).name == namespace_of(team)


@pytest.mark.parametrize(
    ("given_", "wanted"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.13-slim", "docker.io/library/python:3.13-slim"),
        ("me/app", "docker.io/me/app:latest"),
        ("ghcr.io/me/app:1", "ghcr.io/me/app:1"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("localhost/app:2", "localhost/app:2"),
        ("docker.io/vmcell/small:latest", "docker.io/vmcell/small:latest"),
        ("a@sha256:" + "0" * 64, "docker.io/library/a@sha256:" + "0" * 64),
        ("e2bdev/base", "docker.io/vmcell/base:latest"),
    ],
)
def test_images_have_their_full_names(given_: str, wanted: str) -> None:
    assert full_reference(given_) == wanted


@pytest.mark.parametrize(
    "text", ["", " ", "--help", "a b", "UPPER", "vmcell.local/build/x", "a:b:c", "a\n", "x" * 600]
)
def test_what_is_no_image_never_reaches_ctr(text: str) -> None:
    with pytest.raises(CallerError):
        full_reference(text)


@given(st.dictionaries(
    st.sampled_from(
        ("name", "alias", "tags", "cpuCount", "memoryMB", "fromImage", "fromTemplate", "steps",
         "force", "startCmd", "readyCmd", "fromImageRegistry", "target", "public", "minFreeDiskMb")
    ),
    JSON,
))  # fmt: skip
def test_any_body_is_taken_or_refused_in_words(body: dict[str, object]) -> None:
    for parse in (
        template_bodies.parse_template_request,
        template_bodies.parse_build_start,
        template_bodies.parse_tag_target,
        template_bodies.parse_tag_removal,
        template_bodies.parse_public,
    ):
        with contextlib.suppress(CallerError):
            parse(body)


def test_logins() -> None:
    def login(**table: object) -> tuple[str, str]:
        start = template_bodies.parse_build_start({"fromImage": "a", "fromImageRegistry": table})
        assert "secret" not in repr(start)
        return start.username, start.password

    assert login(type="registry", username="me", password="secret") == ("me", "secret")
    assert login(type="gcp", serviceAccountJson='{ "a":\n "secret" }') == (
        "_json_key",
        '{"a":"secret"}',
    )
    with pytest.raises(CallerError, match="aws ecr get-login-password"):
        login(type="aws", awsAccessKeyId="x", awsSecretAccessKey="y", awsRegion="z")


def test_log_queries() -> None:
    assert template_bodies.parse_log_query("logsOffset=7&limit=1000").limit == 100
    assert template_bodies.parse_log_query("logsOffset=7").offset == 7
    for wrong in ("logsOffset=-1", "limit=x", "level=loud"):
        with pytest.raises(CallerError):
            template_bodies.parse_log_query(wrong)
