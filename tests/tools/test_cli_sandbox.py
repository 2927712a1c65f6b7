"""`vmcell sandbox` against the API with a fake node, over loopback."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_service import ApiService, api_service, listening
from click.testing import CliRunner, Result

from vmcell_api.metric_sample import MetricSample
from vmcell_protos.errors import HostError
from vmcell_tools.api_client import client_of_environment
from vmcell_tools.cli import main

UNKNOWN = "i" + "0" * 19


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiService]:
    with api_service(tmp_path) as running, listening(running.app) as address:
        monkeypatch.setenv("E2B_API_URL", f"http://{address}")
        monkeypatch.setenv("E2B_API_KEY", running.key)
        yield running


def _run(*words: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["sandbox", *words])
    assert result.exit_code == status, result.output
    return result


def _json(*words: str) -> object:
    return json.loads(_run(*words, "--json").stdout)


def _made(*words: str) -> str:
    return _run("create", *words).stdout.strip()


def test_create_says_its_options_to_the_node(service: ApiService) -> None:
    result = _run(
        *("create", "small", "--timeout", "60", "--metadata", "who=me", "--metadata", "a b=c=d&é"),
        *("-e", "COLOUR=red", "--on-timeout", "pause", "--auto-resume", "--no-internet"),
    )
    sandbox_id = result.stdout.strip()
    assert result.stdout == f"{sandbox_id}\n", "the id alone, for a shell's $(…)"
    assert "creating one of small" in result.stderr
    (order,) = service.node.orders
    assert (order.sandbox_id, order.template_id, order.timeout_s) == (sandbox_id, "small", 60)
    assert order.environment == {"COLOUR": "red"}
    assert (order.pause_on_timeout, order.auto_resume) == (True, True)
    assert not order.egress.allow_internet
    found = _json("show", sandbox_id)
    assert found["metadata"] == {"who": "me", "a b": "c=d&é"}
    made = _json("create", "base")
    assert made["sandboxID"] == service.node.orders[1].sandbox_id
    assert service.node.orders[1].timeout_s == 300


def test_list_filters_and_reads_every_page(
    service: ApiService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmcell_api.sandbox_bodies.MAX_PAGE", 2)
    monkeypatch.setattr("fake_node.SLOTS", 100)
    ids = [_made("base", "--metadata", f"n={number % 2}") for number in range(5)]
    assert client_of_environment().ask("GET", "/v2/sandboxes").next_token
    assert [row["sandboxID"] for row in _json("list")] == ids[::-1]
    _run("pause", ids[0])
    assert [row["sandboxID"] for row in _json("list", "--state", "paused")] == [ids[0]]
    assert [row["sandboxID"] for row in _json("list", "--state", "running")] == ids[:0:-1]
    assert [row["sandboxID"] for row in _json("list", "--metadata", "n=1")] == [ids[3], ids[1]]
    assert _json("list", "--metadata", "n=1", "--metadata", "other=1") == []
    assert _json("list", "--template", "small") == []
    lines = _run("list").stdout.splitlines()
    assert lines[0].split() == [
        *("id", "template", "state", "started", "ends", "in", "CPUs", "MiB", "metadata"),
    ]
    assert len(lines) == 6
    assert lines[5].split()[:3] == [ids[0], "base", "paused"]
    assert lines[5].split()[5:] == ["-", "1", "512", "n=0"]
    assert lines[1].split()[2] == "running"
    assert lines[1].split()[5:7] == ["4", "min"] or lines[1].split()[5:7] == ["5", "min"]


def test_what_callers_wrote_stays_text(service: ApiService) -> None:
    _made("base", "--metadata", "x=[red]:smile:\x1b[2J")
    assert r"x=[red]:smile:\x1b[2J" in _run("list").stdout
    assert r"x=[red]:smile:\x1b[2J" in _run("show", service.node.orders[0].sandbox_id).stdout


def test_show(service: ApiService) -> None:
    sandbox_id = _made("base", "--timeout", "7200", "--volume", f"{_volume()}:/data")
    found = _json("show", sandbox_id)
    token = found["envdAccessToken"]
    assert (found["state"], found["newestMetrics"]) == ("running", None)
    service.node.samples[sandbox_id] = [
        MetricSample(
            unix_ms=1,
            cpu_count=1,
            cpu_used_pct=12.6,
            mem_used_bytes=3 << 20,
            mem_total_bytes=512 << 20,
            mem_cache_bytes=0,
            disk_used_bytes=5 << 20,
            disk_total_bytes=1 << 30,
        )
    ]
    assert _json("show", sandbox_id)["newestMetrics"]["cpuUsedPct"] == 12.6
    shown = _run("show", sandbox_id).stdout
    facts = dict(line.split("  ", 1) for line in shown.splitlines()[1:])
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["id"] == sandbox_id
    assert facts["template"] == "base"
    assert facts["CPUs"] == "1, 13 % in use"
    assert facts["memory"] == "512 MiB, 3.0 MiB in use"
    assert facts["disk"] == "1024 MiB, 5.0 MiB in use"
    assert facts["ends"].endswith(("in 119 min", "in 2 h"))
    assert facts["at its end"] == "kill"
    assert facts["volume"] == "one at /data"
    assert token not in shown
    paused_id = _made()
    _run("pause", paused_id)
    assert "ends" not in _run("show", paused_id).stdout


def _volume() -> str:
    result = CliRunner().invoke(main, ["volume", "create", "one"])
    assert result.exit_code == 0, result.output
    return "one"


def test_kill_tries_each(service: ApiService) -> None:
    ids = [_made() for _ in range(3)]
    assert _run("kill", ids[0]).stdout == f"killed {ids[0]}\n"
    failed = _run("kill", ids[1], UNKNOWN, ids[2], status=1)
    assert f"killed {ids[1]}, {ids[2]}" in failed.stdout
    assert f"1 of 3 failed: sandbox '{UNKNOWN}' was not found" in failed.stderr
    assert service.node.running == {}
    last = _made()
    assert _json("kill", last) == {"killed": [last]}


def test_pause_resume_timeout(service: ApiService) -> None:
    sandbox_id = _made()
    assert f"vmcell sandbox resume {sandbox_id}" in _run("pause", sandbox_id).stdout
    assert "paused already" in _run("pause", sandbox_id, status=1).stderr
    assert _run("resume", sandbox_id, "--timeout", "900").stdout == f"{sandbox_id} goes on\n"
    assert service.node.resumes == [sandbox_id]
    assert "was running already" in _run("resume", sandbox_id).stdout
    assert _json("resume", sandbox_id)["wasPaused"] is False
    assert _json("pause", sandbox_id) == {"sandboxID": sandbox_id, "state": "paused"}
    assert _json("resume", sandbox_id)["wasPaused"] is True
    before = service.node.running[sandbox_id].end_at_unix_ms
    assert _run("timeout", sandbox_id, "3600").stdout == f"{sandbox_id} ends in 3600 s\n"
    assert service.node.running[sandbox_id].end_at_unix_ms > before + 2_000_000
    assert _json("timeout", sandbox_id, "60") == {"sandboxID": sandbox_id, "timeout": 60}
    assert "ended, or paused" in _run("timeout", sandbox_id, "0").stdout
    assert "timeout is 100000" in _run("timeout", sandbox_id, "100000", status=1).stderr


def test_logs(service: ApiService) -> None:
    sandbox_id = _made()
    assert _run("logs", sandbox_id).stdout == ""
    entries = [
        {"unix_ms": 1000 * n, "level": level, "message": message, "fields": {"pid": str(n)}}
        for n, level, message in (
            (1, "debug", "one"),
            (2, "error", "\x1b]0;title\x07two\n[red]"),
            (3, "info", "three"),
        )
    ]
    service.node.logs = json.dumps({"entries": entries}).encode()
    lines = _run("logs", sandbox_id).stdout.splitlines()
    assert [line.split(None, 2)[2] for line in lines] == [
        "debug one pid=1",
        r"error \x1b]0;title\x07two\n[red] pid=2",
        "info  three pid=3",
    ]
    assert [row["message"] for row in _json("logs", sandbox_id, "--level", "info")] == [
        *(entries[1]["message"], "three"),
    ]
    assert [row["message"] for row in _json("logs", sandbox_id, "--limit", "1")] == ["three"]
    assert [row["message"] for row in _json("logs", sandbox_id, "--search", "on")] == ["one"]
    _run("pause", sandbox_id)
    assert "resume it to read its log" in _run("logs", sandbox_id, status=1).stderr


def test_memory(service: ApiService, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox_id = _made()
    words = ("rss", "pss", "sharedClean", "sharedDirty", "privateClean", "privateDirty", "swap")

    def numbers(factor: int) -> dict[str, int]:
        return {f"{word}Bytes": factor * (n + 1) << 20 for n, word in enumerate(words)}

    answer = {
        "guestMemoryBytes": 512 << 20,
        "processes": [
            {"name": "shim", "pid": 7, "own": numbers(1), "guestRam": numbers(0)},
            {"name": "vmm", "pid": 8, "own": numbers(10), "guestRam": numbers(100)},
        ],
    }
    monkeypatch.setattr(service.node, "memory", lambda sandbox_id: answer)
    told = _json("memory", sandbox_id)
    assert told["processes"] == answer["processes"]
    assert told["overhead"] == numbers(11)
    assert told["guestRam"] == numbers(100)
    rows = [line.split("  ") for line in _run("memory", sandbox_id).stdout.splitlines()]
    cells = [[text.strip() for text in row if text.strip()] for row in rows]
    assert cells == [
        ["what", "PSS", "shared", "private", "of it dirty", "RSS", "swap"],
        _megabytes("shim (pid 7)", 2, 7, 11, 6, 1, 7),
        _megabytes("vmm (pid 8)", 20, 70, 110, 60, 10, 70),
        _megabytes("overhead", 22, 77, 121, 66, 11, 77),
        _megabytes("guest RAM, of 512.0 MiB", 200, 700, 1100, 600, 100, 700),
    ]


def _megabytes(title: str, *numbers: int) -> list[str]:
    return [title, *(f"{number}.0 MiB" for number in numbers)]


def test_history_rollback_undo(service: ApiService) -> None:
    sandbox_id = _made()
    assert _json("history", sandbox_id) == []
    ids = [_snapshot(sandbox_id, name) for name in ("first", "")]
    result = _run("rollback", sandbox_id, "first")
    assert f"{sandbox_id} is back at first; until " in result.stdout
    assert f"vmcell sandbox undo {sandbox_id}" in result.stdout
    assert f"taking {sandbox_id} back to first" in result.stderr
    undo = dataclasses.replace(
        service.node.saved.pop("undo-" + "2".rjust(20, "0")), snapshot_id="undo-" + "a" * 20
    )
    service.node.saved[undo.snapshot_id] = undo
    rows = _json("history", sandbox_id)
    assert [row["snapshotID"] for row in rows] == [*ids, undo.snapshot_id]
    lines = _run("history", sandbox_id).stdout.splitlines()
    assert lines[1].split()[:3] == [ids[0], "first", "snapshot"]
    assert lines[2].split()[:3] == [ids[1], "snapshot", ids[0]]
    assert lines[3].split()[:3] == [undo.snapshot_id, "undo", "point"]
    assert _json("rollback", sandbox_id, ids[1])["undo"]["isUndoPoint"] is True
    assert "is as it was before" in _run("undo", sandbox_id).stdout
    assert _json("undo", sandbox_id)["sandboxID"] == sandbox_id
    other = _made()
    assert "nothing to undo" in _run("undo", other, status=1).stderr
    missing = "snap-" + "0" * 20
    refused = _run("rollback", other, missing, status=1).stderr
    assert f"snapshot {missing} was not found" in refused
    assert "vmcell sandbox history ID" in refused
    assert "of another sandbox" in _run("rollback", other, ids[0], status=1).stderr


def _snapshot(sandbox_id: str, name: str) -> str:
    words = ["snapshot", "create", sandbox_id, *(("--name", name) if name else ())]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_fork(service: ApiService) -> None:
    sandbox_id = _made("base", "--metadata", "who=me")
    result = _run("fork", sandbox_id, "--count", "3", "--timeout", "60")
    ids = result.stdout.split()
    assert len(set(ids)) == 3
    assert set(ids) == set(service.node.running) - {sandbox_id}
    assert "3 times" in result.stderr
    (copy,) = _json("fork", sandbox_id)
    assert copy["sandbox"]["sandboxID"] in service.node.running
    assert (
        "room for 3 sandboxes, not for 4"
        in _run("fork", sandbox_id, "--count", "4", status=1).stderr
    )
    assert _run("fork", sandbox_id, "--count", "21", status=2).exit_code == 2


def test_a_copy_that_fails_is_told(service: ApiService) -> None:
    sandbox_id = _made()

    def fail(order: object) -> None:
        if len(service.node.orders) == 1:
            service.node.orders.append(order)  # type: ignore[arg-type]  # only counted
            raise HostError("the disk is full")

    service.node.on_create = fail
    result = _run("fork", sandbox_id, "--count", "2", status=1)
    assert len(result.stdout.split()) == 1
    assert "1 of 2 copies were not made: " in result.stderr
    assert "the disk is full" in result.stderr
    assert len(service.node.running) == 2


@pytest.mark.parametrize(
    "words",
    [
        *(("show",), ("kill",), ("pause",), ("resume",), ("logs",), ("memory",), ("history",)),
        *(("undo",), ("fork",)),
    ],
)
def test_an_unknown_id_says_where_to_look(service: ApiService, words: tuple[str, ...]) -> None:
    for sandbox_id in (UNKNOWN, f"{UNKNOWN}-client", "short"):
        error = _run(*words, sandbox_id, status=1).stderr
        assert f"sandbox {sandbox_id!r} was not found; see: vmcell sandbox list" in error
    for sandbox_id in ("", "..", "no/such id", "\x1b[2J"):
        error = _run(*words, sandbox_id, status=1).stderr
        assert f"{sandbox_id!r} is no sandbox id; see: vmcell sandbox list" in error


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("create", "nosuch"), 1, "template 'nosuch' does not exist"),
        (("create", "--metadata", "nosign"), 2, "'nosign' is no NAME=VALUE"),
        (("create", "--env", "=x"), 2, "'=x' is no NAME=VALUE"),
        (("create", "--timeout", "0"), 2, "0 is not in the range"),
        (("create", "--timeout", "100000000"), 1, "timeout is 100000000"),
        (("create", "--volume", "nopath"), 1, "--volume is 'nopath'"),
        (("create", "--volume", "no:/x"), 1, "no"),
        (("list", "--state", "gone"), 2, "'gone' is not one of"),
        (("list", "--metadata", "x"), 2, "'x' is no NAME=VALUE"),
        (("kill",), 2, "Missing argument"),
        (("kill", "\udc80"), 2, "is not UTF-8"),
        (("list", "--metadata", "a=\udc80"), 2, "is not UTF-8"),
        (("timeout", UNKNOWN, "-1"), 2, "-1"),
        (("timeout", UNKNOWN, "soon"), 2, "'soon' is not a valid integer"),
        (("timeout", UNKNOWN, "5"), 1, "vmcell sandbox list"),
        (("logs", UNKNOWN, "--limit", "1001"), 2, "1001 is not in the range"),
        (("rollback", UNKNOWN, "x"), 1, "vmcell sandbox list"),
    ],
)
def test_bad_input(service: ApiService, words: tuple[str, ...], status: int, sentence: str) -> None:
    result = _run(*words, status=status)
    assert sentence in result.stderr
    assert "Traceback" not in result.output
    assert service.node.running == {}


def test_a_node_that_fails_is_said(service: ApiService) -> None:
    service.node.fail_next = HostError("noded's disk is full")
    assert "noded's disk is full" in _run("list", status=1).stderr
