"""OCI hooks: what is run, what it is told, and what comes of one that fails."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from vmcell_protos.errors import CallerError, HostError
from vmcell_shim.hooks import (
    CREATE_RUNTIME,
    POSTSTART,
    POSTSTOP,
    PRESTART,
    Hook,
    HookState,
    hook_state,
    parse_hooks,
    poststop_record,
    run_hooks,
    run_poststop,
)
from vmcell_shim.netns import NERDCTL_ANNOTATION

STATE = HookState(
    oci_version="1.0.2", id="c1", bundle="/run/bundle", annotations={"nerdctl/name": "box"}
)


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """script(text) → the path of an executable of that text; $OUT is the test's directory."""
    count = iter(range(100))

    def write(text: str) -> str:
        path = tmp_path / f"hook{next(count)}"
        path.write_text(f"#!/bin/sh\nOUT={tmp_path}\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


def hooks(point: str, *paths: str, **more: Any) -> dict[str, tuple[Hook, ...]]:
    return parse_hooks({"hooks": {point: [{"path": path, **more} for path in paths]}})


def test_the_state_on_stdin_with_arguments_and_nothing_else_in_the_environment(
    script: Any, tmp_path: Path
) -> None:
    path = script('cat > $OUT/stdin; echo "$0 $*" > $OUT/args; /usr/bin/env > $OUT/env')
    found = hooks(CREATE_RUNTIME, path, args=["name", "internal", "oci-hook"], env=["A=b=c"])
    run_hooks(CREATE_RUNTIME, found, STATE, pid=77)
    assert json.loads((tmp_path / "stdin").read_text()) == {
        "ociVersion": "1.0.2",
        "id": "c1",
        "status": "creating",
        "pid": 77,
        "bundle": "/run/bundle",
        "annotations": {"nerdctl/name": "box"},
    }
    assert (tmp_path / "args").read_text().split() == [path, "internal", "oci-hook"]
    variables = dict(
        line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if line
    )
    assert variables["A"] == "b=c"
    assert "HOME" not in variables


@pytest.mark.parametrize(
    ("point", "pid", "status"),
    [(PRESTART, 0, "creating"), (POSTSTART, 5, "running"), (POSTSTOP, 0, "stopped")],
)
def test_the_status_of_each_point(
    script: Any, tmp_path: Path, point: str, pid: int, status: str
) -> None:
    run_hooks(point, hooks(point, script("cat > $OUT/stdin")), STATE, pid=pid)
    told = json.loads((tmp_path / "stdin").read_text())
    assert told["status"] == status
    assert told.get("pid", 0) == pid


def test_a_large_state_and_a_hook_that_does_not_read_it(script: Any, tmp_path: Path) -> None:
    large = HookState(oci_version="1", id="c", bundle="/b", annotations={"a": "x" * 500_000})
    run_hooks(PRESTART, hooks(PRESTART, script("true"), script("wc -c > $OUT/n")), large, pid=0)
    assert int((tmp_path / "n").read_text()) > 500_000


def test_in_order_and_no_further_than_the_first_failure(script: Any, tmp_path: Path) -> None:
    paths = [
        script("echo 1 >> $OUT/log"),
        script("echo 2 >> $OUT/log; echo no bridge >&2; printf 'a\\tb'; exit 3"),
        script("echo 3 >> $OUT/log"),
    ]
    with pytest.raises(HostError) as caught:
        run_hooks(CREATE_RUNTIME, hooks(CREATE_RUNTIME, *paths), STATE, pid=0)
    assert (tmp_path / "log").read_text().split() == ["1", "2"]
    assert str(caught.value) == (
        f"hook createRuntime[1] {paths[1]} failed with status 3: no bridge a b"
    )


def test_a_hook_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be run: No such file"):
        run_hooks(PRESTART, hooks(PRESTART, f"{tmp_path}/none"), STATE, pid=0)


def test_a_hook_that_hangs_is_killed_with_its_children(script: Any, tmp_path: Path) -> None:
    path = script("sleep 600 & echo $! > $OUT/pid; echo waiting; wait")
    started = time.monotonic()
    with pytest.raises(HostError, match=r"did not end within 1 s and was killed: waiting"):
        run_hooks(PRESTART, hooks(PRESTART, path, timeout=1), STATE, pid=0)
    assert 1 <= time.monotonic() - started < 20
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_hook_leaves_running_is_not_waited_for(script: Any, tmp_path: Path) -> None:
    """nerdctl's leaves a process that keeps a port; it has the hook's stdout still."""
    path = script("mkfifo $OUT/end; (read line < $OUT/end) & echo started")
    run_hooks(PRESTART, hooks(PRESTART, path, timeout=60), STATE, pid=0)
    (tmp_path / "end").write_text("line\n")  # would wait for ever if nobody read it


def test_poststop_by_its_record_runs_them_all(script: Any, tmp_path: Path) -> None:
    paths = [
        script("echo 1 >> $OUT/log; exit 1"),
        script("echo 2 >> $OUT/log; cat > $OUT/stdin"),
        script("sleep 600"),
        script("echo 4 >> $OUT/log"),
    ]
    record = json.loads(json.dumps(poststop_record(hooks(POSTSTOP, *paths), STATE)))
    failures = run_poststop(record, within_s=2)
    assert (tmp_path / "log").read_text().split()[:2] == ["1", "2"]
    assert json.loads((tmp_path / "stdin").read_text())["status"] == "stopped"
    assert "poststop[0]" in failures[0]
    assert "poststop[2]" in failures[1]
    assert "did not end within" in failures[1]


def test_no_poststop_no_record() -> None:
    assert poststop_record(hooks(PRESTART, "/bin/true"), STATE) == {}
    assert run_poststop({}, within_s=1) == []


@pytest.mark.parametrize(
    "record", [{"hooks": []}, {"state": {}, "hooks": []}, {"state": 5}, {"hooks": [{"path": "/"}]}]
)
def test_a_damaged_record(record: dict[str, Any]) -> None:
    with pytest.raises(HostError, match="is damaged"):
        run_poststop(record, within_s=1)


def test_the_state_has_all_annotations_and_the_namespace() -> None:
    spec = {"ociVersion": "1.1.0", "annotations": {"nerdctl/ports": "[]", "other": "kept"}}
    state = hook_state(spec, "c1", "/b", "/run/netns/x")
    assert state.annotations == {
        "nerdctl/ports": "[]",
        "other": "kept",
        NERDCTL_ANNOTATION: "/run/netns/x",
    }
    assert hook_state(spec, "c1", "/b", "").annotations == spec["annotations"]
    assert (state.oci_version, state.id, state.bundle) == ("1.1.0", "c1", "/b")


def test_hooks_without_arguments_and_with_defaults() -> None:
    [hook] = hooks(PRESTART, "/bin/true")[PRESTART]
    assert hook == Hook(path="/bin/true", args=("/bin/true",), env=(), timeout_s=30)
    assert parse_hooks({}) == {}
    assert parse_hooks({"hooks": {"createContainer": [], "prestart": None}}) == {
        "createContainer": (),
        "prestart": (),
    }


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"createContainer": [{"path": "/bin/true"}]}, "hooks.createContainer"),
        ({"startContainer": [{"path": "/bin/true"}]}, "hooks.startContainer"),
        ({"prestart": [{"path": "true"}]}, r"hooks.prestart\[0\].path is 'true'"),
        ({"prestart": [{}]}, "absolute path"),
        ({"prestart": [{"path": "/x", "env": ["A"]}]}, "no NAME=value"),
        ({"prestart": [{"path": "/x", "env": ["=b"]}]}, "no NAME=value"),
        ({"prestart": [{"path": "/x", "timeout": 0}]}, "timeout is 0"),
        ({"prestart": [{"path": "/x", "timeout": True}]}, "whole number"),
        ({"prestart": [{"path": "/x", "args": [1]}]}, "hold strings"),
        ({"prestart": ["/x"]}, "hold objects"),
        ({"prestart": {}}, "a list"),
        ([], "an object"),
    ],
)
def test_hooks_that_cannot_be(value: Any, words: str) -> None:
    with pytest.raises(CallerError, match=words):
        parse_hooks({"hooks": value})


def test_no_descriptor_of_ours_reaches_a_hook(script: Any, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    try:
        path = script("ls /proc/$$/fd > $OUT/fds")
        run_hooks(PRESTART, hooks(PRESTART, path, env=["PATH=/bin:/usr/bin"]), STATE, pid=0)
        assert str(write_end) not in (tmp_path / "fds").read_text().split()
    finally:
        os.close(read_end)
        os.close(write_end)
