"""`GET /logs`: what happened in the sandbox, bounded, without environments."""

from __future__ import annotations

import json

import pytest
from e2b import CommandExitException, Sandbox
from envd_client import Stream, request
from envd_harness import Envd
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcell_agent.envd.journal import MOST_CHARACTERS, MOST_ENTRIES, OUTPUT_BYTES, Journal
from vmcell_api.guest_http import fetch
from vmcell_api.sandbox_logs import parse_entries

root = pytest.mark.root


@root
def test_starts_output_and_ends(envd: Envd, sandbox: Sandbox) -> None:
    sandbox.commands.run("echo out; echo err >&2", envs={"SECRET": "do not tell"})
    with pytest.raises(CommandExitException):
        sandbox.commands.run("exit 7")
    # The API's own way in, from its request to its parser.
    body = fetch(
        "127.0.0.1", "/logs", access_token="", limit_bytes=1 << 22, timeout_s=30, port=envd.port
    )
    entries = parse_entries(body)
    assert b"do not tell" not in body
    start = next(entry for entry in entries if "echo out" in entry.message)
    pid = start.fields["pid"]
    told = [entry for entry in entries if entry.fields.get("pid") == pid]
    assert told[0] == start
    assert start.fields["event"] == "process_start"
    assert {(entry.fields["stream"], entry.message) for entry in told[1:-1]} == {
        ("stdout", "out\n"),
        ("stderr", "err\n"),
    }
    assert (told[-1].fields["event"], told[-1].level) == ("process_end", "info")
    failed = entries[-1]
    assert (failed.level, failed.fields["exit_code"]) == ("warn", "7")
    assert failed.message.endswith("exit status 7")


@root
def test_a_command_that_cannot_start(envd: Envd) -> None:
    process = {"cmd": "/etc/passwd", "args": ["x"]}
    with Stream(envd, "process.Process/Start", {"process": process}) as stream:
        list(stream)
    entries = json.loads(request(envd, "GET", "/logs").body)["entries"]
    refused = [row for row in entries if row["fields"]["event"] == "process_refused"]
    assert refused
    assert refused[-1]["level"] == "error"
    assert "/etc/passwd x" in refused[-1]["message"]


@root
def test_logs_need_the_token(fresh_envd: Envd) -> None:
    body = json.dumps({"accessToken": "t0ken"}).encode()
    assert request(fresh_envd, "POST", "/init", body).status == 204
    assert request(fresh_envd, "GET", "/logs").status == 401
    known = {"X-Access-Token": "t0ken"}
    assert request(fresh_envd, "GET", "/logs", headers=known).json() == {"entries": []}
    assert request(fresh_envd, "POST", "/logs", headers=known).status == 405


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=3 * OUTPUT_BYTES), max_size=30), st.integers(1, 60))
def test_it_is_bounded_and_keeps_the_newest(pieces: list[bytes], times: int) -> None:
    journal = Journal()
    for _ in range(times):
        for number, piece in enumerate(pieces):
            journal.output(number, "stdout", piece)
    journal.ended(1, 0, "exit status 0")
    entries = journal.read()["entries"]
    assert isinstance(entries, list)
    assert len(entries) <= MOST_ENTRIES
    assert sum(len(entry["message"]) for entry in entries) <= MOST_CHARACTERS
    assert entries[-1]["message"].endswith("exit status 0")
    assert len(json.dumps(entries)) < 4 << 20, "more than the API reads"
