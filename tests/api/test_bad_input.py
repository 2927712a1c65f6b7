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
BUILD = "/templates/x/builds/00000000-0000-0000-0000-000000000000"
BODIED = [
    ("POST", "/sandboxes"),
    ("POST", "/v2/sandboxes"),
    ("POST", f"/sandboxes/{SANDBOX}/timeout"),
    ("POST", f"/sandboxes/{SANDBOX}/connect"),
    ("POST", f"/v2/sandboxes/{SANDBOX}/connect"),
    ("POST", f"/sandboxes/{SANDBOX}/refreshes"),
    ("PUT", f"/sandboxes/{SANDBOX}/network"),
    *(
        ("POST", f"/sandboxes/{SANDBOX}/{name}")
        for name in ("pause", "resume", "snapshots", "fork", "rollback")
    ),
    ("POST", "/v3/templates"),
    ("POST", f"/v2{BUILD}"),
    ("PATCH", "/templates/x"),
    ("PATCH", "/v2/templates/x"),
    ("POST", "/templates/tags"),
    ("DELETE", "/templates/tags"),
    ("POST", "/volumes"),
    ("POST", "/vmcell/teams"),
    ("POST", "/vmcell/teams/team-one/keys"),
    ("POST", "/vmcell/keys/k0/rotate"),
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
    for method, path in BODIED:
        sender.refused(sender.send(method, path, BODIES[name]), 400)


def test_bodies_that_are_too_large(sender: Sender) -> None:
    huge = b'{"x": "' + b"y" * MAX_BODY_BYTES + b'"}'
    for method, path in BODIED:
        sender.refused(sender.send(method, path, huge), 413)
        lying = sender.send(method, path, b"{}", CONTENT_LENGTH=str(1 << 50))
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
    for method, path in BODIED:
        for data in (b"{", b"[1]", b'{"a": 1, "a": 2}'):
            sender.refused(sender.send(method, path, **_chunked(data)), 400)
        endless = b'{"x": "' + b"y" * (2 * MAX_BODY_BYTES)
        sender.refused(sender.send(method, path, **_chunked(endless)), 413)


WRONG = (0, -1, 1.5, 1 << 70, "5", "", "x" * 70_000, True, [], [1], {}, {"a": []}, "\u202e", "../x")
NO_NAMES = (-1, 1.5, True, [1], {"a": 1}, "", "x" * 600, "a b", "../x", "\u202e", "\r\n")
NO_TEXTS = (1, 1.5, True, [1], {"a": 1}, "x" * 70_000)
NO_FLAGS = (0, 1, "true", [], {})
NO_LISTS = (0, "x", True, {}, [1])
NO_STEPS = ([{"type": "X"}], [{"type": ["RUN"]}], [{"type": "RUN", "args": "x"}])
NO_LOGINS = (
    *({"type": "aws"}, {"type": []}, {"type": "registry"}, {"type": "registry", "username": 1}),
    *({"type": "gcp", "serviceAccountJson": text} for text in ("", "{", "[" * 16_000)),
)
FIELDS = {
    f"PUT /sandboxes/{SANDBOX}/network": {
        "allowOut": (*NO_LISTS, ["10.0.0.1"], ["::1"], ["example.com"], ["1.2.3.4/33"], [""]),
        "denyOut": (*NO_LISTS, ["example.com"], ["1.2.3.4"] * 200, ["fe80::1%x"]),
        "allow_internet_access": NO_FLAGS,
        "rules": ([1], {"a": 1}, "x"),
        "allowPublicTraffic": NO_FLAGS,
    },
    f"POST /sandboxes/{SANDBOX}/pause": {"memory": NO_FLAGS, "requireHealthyGuest": NO_FLAGS},
    f"POST /sandboxes/{SANDBOX}/fork": {"count": (21, *WRONG)},
    "POST /v3/templates": {
        "name": (*NO_NAMES, "a/b/c", "a:b:c", "a:", "/a"),
        "tags": (0, "x", True, {}, ["x"] * 33),
        "cpuCount": WRONG,
        "memoryMB": WRONG,
        "minFreeDiskMb": (1, "x", True, [1]),
    },
    f"POST /v2{BUILD}": {
        "fromImage": NO_TEXTS,
        "fromTemplate": NO_TEXTS,
        "fromImageRegistry": (0, "x", True, [], {}, *NO_LOGINS),
        "steps": (*NO_LISTS, *NO_STEPS, [{"type": "RUN", "force": 1}], [{"type": "RUN"}] * 201),
        "startCmd": NO_TEXTS,
        "readyCmd": NO_TEXTS,
        "force": NO_FLAGS,
    },
    "PATCH /v2/templates/x": {"public": (None, *NO_FLAGS)},
    "POST /templates/tags": {"target": NO_NAMES, "tags": (None, 0, "x", True, {}, [], ["x"] * 33)},
    "DELETE /templates/tags": {"name": NO_NAMES, "tags": (None, 0, "x", True, {}, [])},
    "POST /volumes": {"name": (*NO_NAMES, "a/b", "a.b", "é"), "driver": (0, "nfs", True, [1], {})},
    "POST /v2/sandboxes": {
        "volumeMounts": (0, "x", True, {}, [1], [{"name": "a b", "path": "/x"}], [{"name": "a"}]),
        "templateID": (0, -1, 1.5, True, [], {}, "", "x" * 600),
        "timeout": (-2, *(value for value in WRONG if value != -1)),  # -1: no end
        "metadata": (0, "x", True, [1], {"a": 1}, {"a": None}, {"a": {}}, {"a": ["b"]}),
        "envVars": (0, "x", True, [1], {"a": 1}, {"": "x"}, {"A=B": "x"}, {"a": None}),
        "allow_internet_access": (0, 1, "true", [], {}),
        "network": (1, "x", True, [1]),
    },
    f"POST /sandboxes/{SANDBOX}/timeout": {"timeout": WRONG[1:]},
    f"POST /sandboxes/{SANDBOX}/connect": {"timeout": WRONG[1:]},
    f"POST /sandboxes/{SANDBOX}/refreshes": {"duration": WRONG[1:]},
    "POST /vmcell/teams": {
        "name": (*WRONG[:4], *WRONG[5:]),
        "sandboxLimit": WRONG[1:],
        "maxTimeout": WRONG,
        "requestsPerSecond": WRONG,
    },
    "POST /vmcell/teams/team-one/keys": {
        "name": (1, 1.5, True, [1], {"a": 1}, "x" * 70, "a\nb", "a\tb"),
        "scopes": (0, "x", True, [], [1], {}, ["x"], ["*", 5], [[]]),
        "expiresIn": WRONG[1:],
    },
    "POST /vmcell/keys/k0/rotate": {"grace": WRONG[1:]},
}
# What else a body needs, so that it is refused for the field alone.
GOOD = {
    "POST /v2/sandboxes": {"templateID": "base"},
    "POST /vmcell/teams": {"name": "fresh"},
    "POST /v3/templates": {"name": "fresh"},
    f"POST /v2{BUILD}": {"fromImage": "base"},
    "POST /templates/tags": {"target": "fresh", "tags": ["x"]},
    "DELETE /templates/tags": {"name": "fresh", "tags": ["x"]},
    "POST /volumes": {"name": "fresh"},
}


@pytest.mark.parametrize(
    ("call", "field"), [(call, field) for call, fields in FIELDS.items() for field in fields]
)
def test_values_of_the_wrong_kind(sender: Sender, call: str, field: str) -> None:
    method, path = call.split(" ")
    for value in FIELDS[call][field]:
        body = {**GOOD.get(call, {}), field: value}
        answer = sender.send(method, path, json.dumps(body).encode())
        sender.refused(answer, 400)
        message = answer.json["message"]
        assert any(words in message for words in (field, "team name", "template name")), value


@pytest.mark.parametrize("tag", [1, None, True, [], {}, "", "a b", "a/b", "x" * 129, "\u202e"])
def test_tags_that_are_none(sender: Sender, tag: object) -> None:
    for call in ("POST /v3/templates", "POST /templates/tags", "DELETE /templates/tags"):
        body = json.dumps({**GOOD[call], "tags": ["fine", tag]}).encode()
        answer = sender.send(*call.split(" "), body)
        sender.refused(answer, 400)
        assert "is no tag" in answer.json["message"]


PATHS = (
    *("..%2f..%2fetc%2fpasswd", "%2e%2e", "%00", "a%00b", "%ff%fe", "%ed%a0%80", "%", "%zz"),
    *("a" * 6000, "'%20OR%201=1--", "%0d%0aSet-Cookie:x", "*", "~root", "%e2%80%ae", "-", "_"),
    *("I" + "0" * 19, "i" + "0" * 20, "i" + "0" * 18, "i" + "٣" * 19, "{sandbox_id}", "${7*7}"),
)
PLACES = (
    *(("GET", "/sandboxes/{}"), ("DELETE", "/sandboxes/{}"), ("POST", "/sandboxes/{}/timeout")),
    *(("GET", "/vmcell/teams/{}/keys"), ("DELETE", "/vmcell/teams/{}")),
    *(("DELETE", "/vmcell/keys/{}"), ("GET", "/{}"), ("POST", "/v2/{}/connect")),
    *(("GET", "/sandboxes/{}/metrics"), ("GET", "/v2/sandboxes/{}/logs"), ("GET", "/v2/{}/logs")),
    *(("GET", "/templates/{}"), ("DELETE", "/templates/{}"), ("GET", "/templates/{}/tags")),
    *(("GET", "/templates/aliases/{}"), ("GET", "/templates/{}/builds/x/status")),
    *(("GET", "/templates/x/builds/{}/logs"), ("GET", "/templates/x/files/{}")),
    *(("GET", "/volumes/{}"), ("DELETE", "/volumes/{}")),
)


@pytest.mark.parametrize("text", PATHS, ids=lambda text: text[:20])
def test_paths_that_name_nothing(sender: Sender, text: str) -> None:
    for method, place in PLACES:
        body = b'{"timeout": 5}' if method == "POST" else b""
        sender.refused(sender.send(method, place.format(text), body), 400, 404)
    sender.refused(sender.send("PUT", f"/vmcell/uploads/{text}", b"x"), 400, 403, 404)


LONG = "0" * 5000 + "1"  # more digits than Python reads
QUERIES = (
    *("limit=0000000000999", f"limit={LONG}", "limit=0", "limit=+5", "limit= 5", "limit=5_0"),
    *("limit=%00", "limit=1%002", "nextToken=%ff", "state=%00", "limit=٣", "limit=1e3", "limit=-1"),
    *("order=asc%00", "startedAfter=%00", "startedAfter=99999-01-01", "nextToken=" + "A" * 4000),
    *("metadata=%ff", "&".join(f"a{n}=1" for n in range(300)), "limit=5&limit=500"),
)


@pytest.mark.parametrize("query", QUERIES, ids=lambda text: text[:20])
def test_bad_questions(sender: Sender, query: str) -> None:
    sender.refused(sender.send("GET", f"/v2/sandboxes?{query}"), 400)


QUESTIONS = {
    "/sandboxes/metrics": ("", "sandbox_ids=", "sandbox_ids=x", f"sandbox_ids={'x,' * 101}"),
    f"/sandboxes/{SANDBOX}/metrics": ("start=x", "end=-1", "start=5&end=4", f"start={LONG}"),
    f"/sandboxes/{SANDBOX}/logs": ("limit=0", "limit=1001", "start=1e3", f"start={LONG}"),
    f"/v2/sandboxes/{SANDBOX}/logs": ("direction=up", "level=loud", f"search={'x' * 300}"),
    "/snapshots": ("limit=0", "limit=x", "nextToken=x"),
    "/v2/templates": ("limit=0", "nextToken=x", f"limit={LONG}"),
    f"{BUILD}/status": (
        "logsOffset=x",
        "limit=-1",
        "level=loud",
        f"logsOffset={'0' * 12}{'9' * 19}",
    ),
    f"{BUILD}/logs": ("cursor=x", "direction=backward", f"limit={LONG}"),
    "/vmcell/audit": ("limit=0", f"limit={LONG}", "since=x"),
}


@pytest.mark.parametrize("path", QUESTIONS)
def test_bad_questions_elsewhere(sender: Sender, path: str) -> None:
    for query in QUESTIONS[path]:
        sender.refused(sender.send("GET", f"{path}?{query}"), 400)


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
