"""Bad input by the hundred, on both databases: right status, E2B's error body, no trace left."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from api_service import ApiService, api_service
from falcon import testing

from vmcell_api.json_body import MAX_BODY_BYTES
from vmcell_api.store.tables import Base

# The audit keeps what was refused, and a key its last use; both are meant to.
KEPT = ("audit",)
SANDBOX = "i" + "0" * 19
POSTS = [
    "/sandboxes",
    "/v2/sandboxes",
    f"/sandboxes/{SANDBOX}/timeout",
    f"/sandboxes/{SANDBOX}/connect",
    f"/v2/sandboxes/{SANDBOX}/connect",
    f"/sandboxes/{SANDBOX}/refreshes",
    "/vmcell/teams",
    "/vmcell/teams/team-one/keys",
    "/vmcell/keys/k0/rotate",
]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiService]:
    folder: Path = tmp_path_factory.mktemp("api")
    settings: dict[str, object] = {"requests_per_s": 100_000}
    if request.param == "postgresql":
        settings["database_url"] = request.getfixturevalue("postgres").database()
    with api_service(folder, **settings) as running:
        yield running


class Sender:
    """Sends bytes with the admin's key, and looks at what the store holds."""

    def __init__(self, service: ApiService) -> None:
        self.service = service
        self._key = service.new_key("team-one", "admin")
        self.send("GET", "/v2/sandboxes")  # notes the key's use
        self.before = self.rows()

    def send(self, method: str, path: str, body: bytes = b"", **environ: object) -> testing.Result:
        """Through WSGI, so that nothing is tidied up on the way."""
        made = testing.create_environ(
            path="/", method=method, headers={"X-API-KEY": self._key}, body=body
        )
        raw, _, query = path.partition("?")
        made.update({"RAW_URI": path, "QUERY_STRING": query, **environ})
        made["PATH_INFO"] = testing.create_environ(path=raw)["PATH_INFO"]
        start = testing.StartResponseMock()
        chunks = self.service.app(made, start)
        return testing.Result(chunks, start.status, start.headers)

    def rows(self) -> dict[str, list[object]]:
        """Every row of every table that bad input may not touch."""
        tables = [table for table in Base.metadata.sorted_tables if table.name not in KEPT]
        with self.service.store.engine.connect() as connection:
            return {
                table.name: sorted(map(str, connection.execute(sa.select(table)).all()))
                for table in tables
            }

    def refused(self, answer: testing.Result, *statuses: int) -> None:
        """The answer is an error of that status, in E2B's form."""
        assert answer.status_code in statuses, answer.text
        assert answer.json["code"] == answer.status_code
        assert 0 < len(answer.json["message"]) < 700


@pytest.fixture(scope="module")
def module_sender(service: ApiService) -> Sender:
    return Sender(service)


@pytest.fixture
def sender(module_sender: Sender) -> Iterator[Sender]:
    """Whatever a test sends, the store holds the same after it."""
    yield module_sender
    assert module_sender.rows() == module_sender.before
    assert not module_sender.service.node.orders


BODIES = {
    "not JSON": b"{",
    "two values": b"{}{}",
    "a list": b"[1]",
    "a text": b'"x"',
    "null": b"null",
    "a number": b"1",
    "single quotes": b"{'a': 1}",
    "a comment": b"{/**/}",
    "a comma too many": b'{"a": 1,}',
    "NaN": b'{"timeout": NaN}',
    "Infinity": b'{"timeout": Infinity}',
    "minus Infinity": b'{"timeout": -Infinity}',
    "a number that is too large": b'{"timeout": 1e999}',
    "a number of 5,000 digits": b'{"timeout": ' + b"9" * 5000 + b"}",
    "a name twice": b'{"timeout": 1, "timeout": 2}',
    "a name twice, deep": b'{"metadata": {"a": "b", "a": "c"}}',
    "no UTF-8": b'{"name": "\xff\xfe"}',
    "half a character": b'{"name": "\xe2\x82"}',
    "UTF-16": '{"name": "x"}'.encode("utf-16"),
    "UTF-32": '{"name": "x"}'.encode("utf-32"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "half a surrogate pair": b'{"name": "\\ud800"}',
    "NUL in a text": b'{"name": "a\\u0000b"}',
    "NUL in a name": b'{"a\\u0000b": 1}',
    "a raw NUL": b'{"a": "\x00"}',
    "deep lists": b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}",
    "deeper than the stack": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 40 + b"1" + b"}" * 40,
    "10,000 keys": json.dumps({"metadata": {f"k{n}": "v" for n in range(10_000)}}).encode(),
    "10,000 names": json.dumps({f"k{n}": "v" for n in range(10_000)}).encode(),
    "a form": b"templateID=base&timeout=5",
    "XML": b"<?xml version='1.0'?><a/>",
    "gzip": bytes.fromhex("1f8b0800000000000003"),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00.",
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_none(sender: Sender, name: str) -> None:
    for path in POSTS:
        sender.refused(sender.send("POST", path, BODIES[name]), 400)


def test_bodies_that_are_too_large(sender: Sender) -> None:
    huge = b'{"x": "' + b"y" * MAX_BODY_BYTES + b'"}'
    for path in POSTS:
        sender.refused(sender.send("POST", path, huge), 413)
        lying = sender.send("POST", path, b"{}", CONTENT_LENGTH=str(1 << 50))
        sender.refused(lying, 413)


def _chunked(data: bytes) -> dict[str, object]:
    """As gunicorn hands a chunked body over: no length, and the stream ends by itself."""
    return {
        "CONTENT_LENGTH": "",
        "wsgi.input": io.BytesIO(data),
        "wsgi.input_terminated": True,
        "HTTP_TRANSFER_ENCODING": "chunked",
    }


def test_chunked_bodies_have_the_same_bounds(sender: Sender) -> None:
    for path in POSTS:
        for data in (b"{", b"[1]", b'{"a": 1, "a": 2}'):
            sender.refused(sender.send("POST", path, **_chunked(data)), 400)
        endless = b'{"x": "' + b"y" * (2 * MAX_BODY_BYTES)
        sender.refused(sender.send("POST", path, **_chunked(endless)), 413)


WRONG = (0, -1, 1.5, 1 << 70, "5", "", "x" * 70_000, True, [], [1], {}, {"a": []}, "\u202e", "../x")
FIELDS = {
    "/v2/sandboxes": {
        "templateID": (0, -1, 1.5, True, [], {}, "", "x" * 600),
        "timeout": tuple(value for value in WRONG if value is not True and value != -1),
        "metadata": (0, "x", True, [1], {"a": 1}, {"a": None}, {"a": {}}, {"a": ["b"]}),
        "envVars": (0, "x", True, [1], {"a": 1}, {"": "x"}, {"A=B": "x"}, {"a": None}),
        "allow_internet_access": (0, 1, "true", [], {}),
        "network": (1, "x", True, [1]),
    },
    f"/sandboxes/{SANDBOX}/timeout": {"timeout": WRONG[1:]},
    f"/sandboxes/{SANDBOX}/connect": {"timeout": WRONG[1:]},
    f"/sandboxes/{SANDBOX}/refreshes": {"duration": WRONG[1:]},
    "/vmcell/teams": {
        "name": (*WRONG[:4], *WRONG[5:]),
        "sandboxLimit": WRONG[1:],
        "maxTimeout": WRONG,
        "requestsPerSecond": WRONG,
    },
    "/vmcell/teams/team-one/keys": {
        "name": (1, 1.5, True, [1], {"a": 1}, "x" * 70, "a\nb", "a\tb"),
        "scopes": (0, "x", True, [], [1], {}, ["x"], ["*", 5], [[]]),
        "expiresIn": WRONG[1:],
    },
    "/vmcell/keys/k0/rotate": {"grace": WRONG[1:]},
}
FIELD_CASES = [
    (path, field, value)
    for path, fields in FIELDS.items()
    for field, values in fields.items()
    for value in values
]


@pytest.mark.parametrize(("path", "field"), sorted({case[:2] for case in FIELD_CASES}))
def test_values_of_the_wrong_kind(sender: Sender, path: str, field: str) -> None:
    good = {"/v2/sandboxes": {"templateID": "base"}, "/vmcell/teams": {"name": "fresh"}}
    for value in [row[2] for row in FIELD_CASES if row[:2] == (path, field)]:
        body = {**good.get(path, {}), field: value}
        answer = sender.send("POST", path, json.dumps(body).encode())
        sender.refused(answer, 400)
        assert field in answer.json["message"] or "team name" in answer.json["message"]


PATHS = (
    *("..%2f..%2fetc%2fpasswd", "%2e%2e", "%00", "a%00b", "%ff%fe", "%ed%a0%80", "%", "%zz"),
    *("a" * 6000, "'%20OR%201=1--", "%0d%0aSet-Cookie:x", "*", "~root", "%e2%80%ae", "-", "_"),
    *("I" + "0" * 19, "i" + "0" * 20, "i" + "0" * 18, "i" + "٣" * 19, "{sandbox_id}", "${7*7}"),
)
PLACES = (
    *(("GET", "/sandboxes/{}"), ("DELETE", "/sandboxes/{}"), ("POST", "/sandboxes/{}/timeout")),
    *(("GET", "/vmcell/teams/{}/keys"), ("DELETE", "/vmcell/teams/{}")),
    *(("DELETE", "/vmcell/keys/{}"), ("GET", "/{}"), ("POST", "/v2/{}/connect")),
)


@pytest.mark.parametrize("text", PATHS, ids=lambda text: text[:20])
def test_paths_that_name_nothing(sender: Sender, text: str) -> None:
    for method, place in PLACES:
        body = b'{"timeout": 5}' if method == "POST" else b""
        sender.refused(sender.send(method, place.format(text), body), 400, 404)


QUERIES = (
    *("limit=%00", "limit=1%002", "nextToken=%ff", "state=%00", "limit=٣", "limit=1e3", "limit=-1"),
    *("order=asc%00", "startedAfter=%00", "startedAfter=99999-01-01", "nextToken=" + "A" * 4000),
    *("metadata=%ff", "&".join(f"a{n}=1" for n in range(300)), "limit=5&limit=500"),
)


@pytest.mark.parametrize("query", QUERIES, ids=lambda text: text[:20])
def test_bad_questions(sender: Sender, query: str) -> None:
    sender.refused(sender.send("GET", f"/v2/sandboxes?{query}"), 400)


@pytest.mark.parametrize("query", ["action=%25", "action=%5C", "target='--", "teamID=%e2%80%ae"])
def test_odd_questions_that_are_fine(sender: Sender, query: str) -> None:
    answer = sender.send("GET", f"/vmcell/audit?{query}")
    assert answer.status_code == 200
    assert answer.json == []


def test_methods_and_keys(sender: Sender) -> None:
    for method, path in itertools.product(("PUT", "PATCH", "TRACE"), ("/v2/sandboxes", "/health")):
        sender.refused(sender.send(method, path), 405)
    for key in ("", "x", "e2b_", "e2b_" + "0" * 40, "e2b_" + "0" * 4000, "é", "\x00", "null"):
        sender.refused(sender.send("GET", "/v2/sandboxes", HTTP_X_API_KEY=key), 401)
    for header in ("Bearer", "Bearer ", "Basic eDp5", "bearer e2b_" + "0" * 40, "x" * 5000):
        answer = sender.send("GET", "/teams", HTTP_X_API_KEY="", HTTP_AUTHORIZATION=header)
        sender.refused(answer, 401)
    for length in ("-1", "x", "1.5", "0x10"):
        sender.refused(sender.send("POST", "/v2/sandboxes", b"{}", CONTENT_LENGTH=length), 400)
