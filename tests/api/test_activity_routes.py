"""Metrics and logs as the API answers them, with a fake node."""

from __future__ import annotations

import json

import pytest
from api_service import ApiService
from control_client import Client, assert_error
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcell_api.metric_sample import MetricSample
from vmcell_api.sandbox_logs import MOST_ENTRIES, parse_entries, parse_log_query, select
from vmcell_protos.errors import CallerError, GuestError

FAST = settings(max_examples=150, deadline=None)
START_MS = 1_800_000_000_000
UNKNOWN = "i" + "0" * 19


@pytest.fixture
def client(service: ApiService) -> Client:
    return Client(service)


def _sample(second: int) -> MetricSample:
    return MetricSample(
        unix_ms=START_MS + second * 1000 + 250,
        cpu_count=2,
        cpu_used_pct=12.5,
        mem_used_bytes=1 << 40,
        mem_total_bytes=1 << 41,
        mem_cache_bytes=3,
        disk_used_bytes=4,
        disk_total_bytes=5,
    )


def test_metrics_of_a_time(service: ApiService, client: Client) -> None:
    sandbox_id = client.create()["sandboxID"]
    path = f"/sandboxes/{sandbox_id}/metrics"
    assert client("GET", path).json == []
    service.node.samples[sandbox_id] = [_sample(second) for second in range(0, 50, 5)]
    first = client("GET", path).json[0]
    assert first == {
        "timestamp": "2027-01-15T08:00:00.250Z",
        "timestampUnix": 1_800_000_000,
        "cpuCount": 2,
        "cpuUsedPct": 12.5,
        "memUsed": 1 << 40,
        "memTotal": 1 << 41,
        "memCache": 3,
        "diskUsed": 4,
        "diskTotal": 5,
    }
    start = START_MS // 1000
    query = f"start={start + 10}&end={start + 20}"
    found = [row["timestampUnix"] - start for row in client("GET", path, query_string=query).json]
    assert found == [10, 15, 20], "the end's whole second is included"
    assert len(client("GET", path, query_string=f"start={start + 40}").json) == 2
    assert len(client("GET", path, query_string=f"end={start + 5}").json) == 2
    assert_error(client("GET", f"/sandboxes/{UNKNOWN}/metrics"), 404)
    stranger = Client(service, service.new_key("team-two"))
    assert_error(stranger("GET", path), 404)
    service.node.running.clear()
    assert_error(client("GET", path), 404, "was not found")


@pytest.mark.parametrize("query", ["start=x", "end=-1", "start=5&end=4", "end=99999999999999"])
def test_bad_times(client: Client, query: str) -> None:
    sandbox_id = client.create()["sandboxID"]
    assert_error(client("GET", f"/sandboxes/{sandbox_id}/metrics", query_string=query), 400)


def test_the_newest_metrics_of_several(service: ApiService, client: Client) -> None:
    one, two, silent = (client.create()["sandboxID"] for _ in range(3))
    stranger = Client(service, service.new_key("team-two"))
    foreign = stranger.create()["sandboxID"]
    for sandbox_id in (one, two, foreign):
        service.node.samples[sandbox_id] = [_sample(0), _sample(5)]
    query = f"sandbox_ids={one},{two},{silent},{foreign},{UNKNOWN}"
    answer = client("GET", "/sandboxes/metrics", query_string=query).json
    assert set(answer["sandboxes"]) == {one, two}
    assert answer["sandboxes"][one]["timestampUnix"] == START_MS // 1000 + 5
    repeated = f"sandbox_ids={one}&sandbox_ids={two}-client"
    answer = client("GET", "/sandboxes/metrics", query_string=repeated).json
    assert set(answer["sandboxes"]) == {one, two}


@pytest.mark.parametrize(
    "query", ["", "sandbox_ids=", "sandbox_ids=../x", "sandbox_ids=" + ",".join([UNKNOWN] * 101)]
)
def test_bad_ids(client: Client, query: str) -> None:
    assert_error(client("GET", "/sandboxes/metrics", query_string=query), 400, "sandbox_ids")


def _entry(ms: int, message: str, level: str = "info") -> dict[str, object]:
    fields = {"event": "process_output", "pid": "7"}
    return {"unix_ms": START_MS + ms, "level": level, "message": message, "fields": fields}


ENTRIES = [
    _entry(0, "process 7 started: bash"),
    _entry(10, "hello"),
    _entry(10, "world", "debug"),
    _entry(20, "process 7 ended: exit status 1", "warn"),
]


@pytest.fixture
def logged(service: ApiService, client: Client) -> str:
    service.node.logs = json.dumps({"entries": ENTRIES}).encode()
    return client.create()["sandboxID"]


def test_logs_of_version_1(client: Client, logged: str) -> None:
    answer = client("GET", f"/sandboxes/{logged}/logs").json
    assert [row["message"] for row in answer["logEntries"]] == [row["message"] for row in ENTRIES]
    assert answer["logEntries"][1] == {
        "timestamp": "2027-01-15T08:00:00.010Z",
        "message": "hello",
        "level": "info",
        "fields": {"event": "process_output", "pid": "7", "logger": "envd"},
    }
    line = answer["logs"][3]
    assert line["timestamp"] == "2027-01-15T08:00:00.020Z"
    told = json.loads(line["line"])
    assert (told["level"], told["logger"]) == ("warn", "envd")
    assert told["message"].endswith("exit status 1")
    query = f"start={START_MS + 11}&limit=1"
    late = client("GET", f"/sandboxes/{logged}/logs", query_string=query).json
    assert [row["level"] for row in late["logEntries"]] == ["warn"]


def test_logs_of_version_2(client: Client, logged: str) -> None:
    def messages(query: str) -> list[str]:
        answer = client("GET", f"/v2/sandboxes/{logged}/logs", query_string=query)
        return [row["message"].split()[0] for row in answer.json["logs"]]

    assert messages("") == ["process", "hello", "world", "process"]
    assert messages("direction=backward") == ["process", "world", "hello", "process"]
    assert messages("direction=backward&limit=1") == ["process"]
    assert messages(f"cursor={START_MS + 10}") == ["hello", "world", "process"]
    assert messages(f"cursor={START_MS + 10}&direction=backward") == ["world", "hello", "process"]
    assert messages("level=info") == ["process", "hello", "process"]
    assert messages("level=error") == []
    assert messages("search=wor") == ["world"]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "cursor=x", "direction=up", "level=loud", "search=" + "x" * 300],
)
def test_bad_log_queries(client: Client, logged: str, query: str) -> None:
    answer = client("GET", f"/v2/sandboxes/{logged}/logs", query_string=query)
    assert_error(answer, 400, query.partition("=")[0])


def test_logs_of_unknown_sandboxes(service: ApiService, client: Client, logged: str) -> None:
    stranger = Client(service, service.new_key("team-two"))
    for version in ("", "/v2"):
        assert_error(client("GET", f"{version}/sandboxes/{UNKNOWN}/logs"), 404)
        assert_error(stranger("GET", f"{version}/sandboxes/{logged}/logs"), 404)


def test_a_guest_that_answers_nonsense(service: ApiService, client: Client, logged: str) -> None:
    service.node.logs = b"no JSON"
    answer = client("GET", f"/sandboxes/{logged}/logs")
    assert_error(answer, 502, "JSON")
    assert answer.headers["should-retry"] == "false"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
ROW = st.fixed_dictionaries(
    {
        "unix_ms": JSON | st.integers(0, 10**13),
        "level": JSON | st.sampled_from(["debug", "info", "warn", "error"]),
        "message": JSON | st.text(max_size=9),
        "fields": JSON,
    }
)


@FAST
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_answer_of_a_guest_is_read_or_refused(body: bytes) -> None:
    try:
        entries = parse_entries(body)
    except GuestError:
        return
    assert isinstance(entries, list)


@FAST
@given(st.lists(ROW, max_size=6), st.text(max_size=40))
def test_whatever_a_guest_logs_can_be_answered(rows: list[object], query_string: str) -> None:
    from vmcell_api.sandbox_logs import first_answer

    entries = parse_entries(json.dumps({"entries": rows}).encode())
    assert len(entries) <= len(rows)
    try:
        query = parse_log_query(query_string, version=2)
    except CallerError:
        return
    found = select(entries, query)
    assert len(found) <= min(query.limit, MOST_ENTRIES)
    json.dumps(first_answer(found))
