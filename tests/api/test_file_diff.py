"""What differs between two trees of files, and answers of a guest that are none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcell_api.node import file_diff
from vmcell_api.node.file_diff import FileChange, compare
from vmcell_protos.errors import GuestError

FILE, DIRECTORY = "FILE_TYPE_FILE", "FILE_TYPE_DIRECTORY"


def _row(kind: str = FILE, size: str = "1", mode: int = 0o644, time: str = "t") -> tuple:
    return (kind, size, mode, "root", "root", time, None)


def test_added_removed_and_modified() -> None:
    before = {"/a": _row(), "/gone": _row(size="7"), "/same": _row(), "/d": _row(DIRECTORY)}
    after = {
        "/a": _row(size="9"),
        "/new": _row(size="3"),
        "/same": _row(),
        "/d": _row(DIRECTORY, size="4096", time="later"),
    }
    assert compare(before, after) == [
        FileChange(path="/a", what="modified", size_before=1, size_after=9),
        FileChange(path="/gone", what="removed", size_before=7, size_after=0),
        FileChange(path="/new", what="added", size_before=0, size_after=3),
    ]


@pytest.mark.parametrize(
    "other", [_row(mode=0o600), _row(time="later"), _row(DIRECTORY), _row(size="x")]
)
def test_every_compared_field_counts(other: tuple) -> None:
    (change,) = compare({"/a": _row()}, {"/a": other})
    assert change.what == "modified"


def test_a_directory_whose_mode_changed_is_told() -> None:
    (change,) = compare({"/d": _row(DIRECTORY, mode=0o755)}, {"/d": _row(DIRECTORY, mode=0o700)})
    assert change.path == "/d"


_TREES = st.dictionaries(
    st.text("ab/", min_size=1, max_size=4).map(lambda text: f"/{text}"),
    st.builds(_row, size=st.sampled_from(("1", "2", "", "-1", "9" * 30))),
)


@given(_TREES, _TREES)
def test_a_comparison_the_other_way_round_says_the_opposite(one: dict, two: dict) -> None:
    opposite = {"added": "removed", "removed": "added", "modified": "modified"}
    forth, back = compare(one, two), compare(two, one)
    assert [(row.path, opposite[row.what]) for row in forth] == [(r.path, r.what) for r in back]
    assert [(row.size_before, row.size_after) for row in forth] == [
        (row.size_after, row.size_before) for row in back
    ]
    assert compare(one, one) == []


def test_the_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_diff, "MOST_CHANGES", 3)
    assert len(compare({}, {f"/{number}": _row() for number in range(9)})) == 3


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b'{"entries": 5}',
        b'{"entries": [{}]}',
        b'{"entries": ["x"]}',
        b'{"entries": [{"path": 5}]}',
        b'{"entries": [{"path": "relative"}]}',
        json.dumps({"entries": [{"path": "/" + "x" * 5000}]}).encode(),
        b"[" * 100_000,
        b'{"entries": [{"path": "/\\ud800"}]}',
        b'{"entries": [{"path": "/a", "size": [[]]}]}',
        b'{"entries": [{"path": "/a", "owner": {}}]}',
    ],
)
def test_a_guest_that_lists_nonsense(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_diff, "ask", lambda *arguments, **options: answer)
    with pytest.raises(GuestError, match=r"lists a file|no list of files"):
        file_diff.read_tree("10.0.0.1", "")
