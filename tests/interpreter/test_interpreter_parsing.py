"""Bodies, lines and MIME bundles, with whatever may come."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_interpreter.languages import NoKernel, language_named
from vmcell_interpreter.lines import encode, output
from vmcell_interpreter.mime import FIELDS, result, without_quotes
from vmcell_interpreter.requests import (
    ContextRequest,
    ExecuteRequest,
    RequestError,
    check_for_shell,
    parse_context,
    parse_execute,
)
from vmcell_interpreter.shell_words import quoted

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELD_NAMES = ("code", "context_id", "language", "env_vars", "cwd")


@given(body=st.binary() | st.dictionaries(st.sampled_from(FIELD_NAMES), JSON).map(json.dumps))
def test_any_body_is_a_request_or_a_sentence(body: bytes | str) -> None:
    raw = body if isinstance(body, bytes) else body.encode()
    for parse, kind in ((parse_execute, ExecuteRequest), (parse_context, ContextRequest)):
        answer = _answer(parse, raw)
        assert isinstance(answer, kind) or (answer.status == 400 and answer.text)


def _answer(parse: Callable[[bytes], object], raw: bytes) -> Any:
    try:
        return parse(raw)
    except RequestError as error:
        return error


@given(
    code=st.text(st.characters(codec="utf-8")),
    environment=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="=\0"), min_size=1),
        st.text(st.characters(codec="utf-8", exclude_characters="\0")),
        max_size=4,
    ),
)
def test_a_request_is_read_as_it_was_written(code: str, environment: dict[str, str]) -> None:
    body = {"code": code, "context_id": None, "language": "js", "env_vars": environment}
    request = parse_execute(json.dumps(body).encode())
    assert (request.code, request.language) == (code, "js")
    assert request.environment == environment


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "takes an object"),
        (b"{}", "'code' is missing"),
        (b'{"code": 1}', "takes a string"),
        (b'{"code": "\\ud800"}', "not Unicode"),
        (b'{"code": "", "context_id": "a", "language": "js"}', "only one of"),
        (b'{"code": "", "env_vars": []}', "takes an object"),
        (b'{"code": "", "env_vars": {"A=": ""}}', "no name"),
        (b'{"code": "", "env_vars": {"A": null}}', "takes a string"),
        (b'{"code": "", "env_vars": {"A": "\\u0000"}}', "NUL"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse_execute(body)


def test_bash_is_not_told_what_its_terminal_would_swallow() -> None:
    check_for_shell(ExecuteRequest(code="x" * 4095 + "\n", environment={"A_1": "é" * 200}))
    for request in (
        ExecuteRequest(code="true\n" + "é" * 2048),
        ExecuteRequest(code="", environment={"A.B": ""}),
        ExecuteRequest(code="", environment={"A": "x" * 1100}),
    ):
        with pytest.raises(RequestError, match="bash"):
            check_for_shell(request)


@given(line=st.dictionaries(st.text(), JSON))
def test_a_line_is_one_line_of_json(line: dict[str, object]) -> None:
    raw = encode(line)
    assert raw.isascii()
    assert raw.decode().splitlines(keepends=True) == [raw.decode()]
    assert json.loads(raw, parse_constant=pytest.fail) == _without_special_numbers(line)


def _without_special_numbers(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_special_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_special_numbers(item) for item in value]
    return value


@given(text=st.text())
def test_output_arrives_whole(text: str) -> None:
    assert json.loads(encode(output("stdout", text, "now")))["text"] == text


@given(
    bundle=st.dictionaries(st.sampled_from([*FIELDS, "x/y", "application/geo+json"]), JSON),
    is_main=st.booleans(),
)
def test_every_form_of_a_value_has_its_field(bundle: dict[str, object], is_main: bool) -> None:
    line = dict(result(bundle, is_main=is_main))
    assert line.pop("type") == "result"
    assert line.pop("is_main_result") is is_main
    extra = line.pop("extra", {})
    assert set(extra) == set(bundle) - set(FIELDS)
    assert set(line) == {FIELDS[kind] for kind in bundle if kind in FIELDS}
    assert all(extra[kind] is bundle[kind] for kind in extra)


def test_texts_of_several_lines_are_joined() -> None:
    assert result({"text/html": ["<a>", "</a>"]}, is_main=False)["html"] == "<a></a>"
    assert result({"e2b/data": ["a"]}, is_main=False)["data"] == ["a"]


@given(text=st.text())
def test_one_pair_of_quotes_is_taken_off(text: str) -> None:
    assert without_quotes(f"'{text}'") == text
    assert without_quotes(f'"{text}"') == text
    assert without_quotes(f"({text})") == f"({text})"


def test_languages_and_what_is_left_out() -> None:
    names = (None, "Python", "py", "js", "JavaScript", "ts", "typescript", "bash")
    found = [language_named(name) for name in names]
    assert found == ["python"] * 3 + ["javascript"] * 2 + ["typescript"] * 2 + ["bash"]
    for name, words in (("r", "R is not installed"), ("java", "Java is not"), ("x", "No kernel")):
        with pytest.raises(NoKernel, match=words):
            language_named(name)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60))
def test_bash_reads_a_quoted_word_as_it_was(text: str) -> None:
    word = quoted(text)
    assert "\n" not in word
    shown = subprocess.run(
        ["bash", "-c", f"printf %s {word}"],
        capture_output=True,
        check=True,
        env={"LC_ALL": "C.UTF-8"},
    )
    assert shown.stdout.decode() == text
