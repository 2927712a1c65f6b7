"""The log's lines: JSON or text, one each, with ids and without secrets."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_api import logs

KEY = "e2b_" + "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def _root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    logs.end_request()


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("api", "json")
    logs.begin_request("r1")
    logs.add_to_request(team_id="t1", sandbox_id="i1")
    logging.getLogger("vmcell.api").info("made %s", "it", extra={"details": {"status": 201}})
    logs.end_request()
    logging.getLogger("vmcell.api").warning("two\nlines")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "process": "api",
        "logger": "vmcell.api",
        "message": "made it",
        "request_id": "r1",
        "team_id": "t1",
        "sandbox_id": "i1",
        "status": 201,
    }
    assert second["message"] == "two\nlines"
    assert "request_id" not in second


def test_text_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("noded", "text")
    logs.begin_request("r1")
    logging.getLogger("x").info("two\nlines\\")
    assert capsys.readouterr().err == "noded: INFO two\\nlines\\\\ [request_id=r1]\n"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_shows_its_frames_and_not_its_words(
    capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    logs.set_up("api", log_format)
    try:
        try:
            int("hunter2-in-a-body")
        except ValueError as error:
            raise KeyError("hunter2-again") from error
    except KeyError as error:
        logging.getLogger("x").error("it failed", exc_info=error)
    (line,) = capsys.readouterr().err.splitlines()
    assert "KeyError at " in line
    assert "ValueError at " in line
    assert "test_logs.py" in line
    assert "hunter2" not in line


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("secret", [KEY, "ab" * 32, "v1_" + "aZ0+/" * 8])
def test_what_looks_like_a_secret_is_struck_out(
    capsys: pytest.CaptureFixture[str], log_format: str, secret: str
) -> None:
    logs.set_up("api", log_format)
    logs.begin_request("r1")
    logs.add_to_request(sandbox_id=secret)
    logging.getLogger("x").info("asked for /files/%s", secret, extra={"details": {"a": secret}})
    logging.getLogger("gunicorn.error").warning("Invalid request from ip=1: 'hunter2: %s'", secret)
    output = capsys.readouterr().err
    assert secret not in output
    assert "hunter2" not in output


@given(st.text())
def test_every_record_is_one_line(text: str) -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "%s", (text,), None)
    for formatter in (logs._Formatter("api"), logs._JsonFormatter("api")):
        line = formatter.format(record)
        assert "\n" not in line
        assert "\r" not in line
    assert json.loads(line)["message"] == logs.without_secrets(text)
