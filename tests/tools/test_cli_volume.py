"""`vmcell volume` against the API with a fake node."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_service import ApiService, api_service, listening
from click.testing import CliRunner

from vmcell_tools.cli import main


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiService]:
    with api_service(tmp_path) as running, listening(running.app) as address:
        monkeypatch.setenv("E2B_API_URL", f"http://{address}")
        monkeypatch.setenv("E2B_API_KEY", running.key)
        yield running


def _vmcell(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, words)
    return result.exit_code, result.stdout, result.stderr


def test_create_list_rm(service: ApiService) -> None:
    code, out, _ = _vmcell("volume", "create", "one", "--json")
    made = json.loads(out)
    assert (code, set(made)) == (0, {"volumeID", "name", "token"})
    code, out, _ = _vmcell("volume", "create", "two")
    assert code == 0
    assert "vol_" not in out, "no token where nobody asked for it"
    code, out, _ = _vmcell("volume", "list", "--json")
    assert [row["name"] for row in json.loads(out)] == ["one", "two"]
    code, out, _ = _vmcell("volume", "list")
    assert out.splitlines()[0].split() == ["name", "id"]
    assert made["volumeID"] in out
    code, out, err = _vmcell("volume", "rm", made["volumeID"], "two", "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    assert "removing two" in err
    assert os.listdir(Path(service.config.volumes_dir, "data")) == []


def test_errors_are_one_sentence(service: ApiService, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = _vmcell("volume", "rm", "missing")
    assert (code, err.count("\n")) == (1, 2)
    assert "there is no volume 'missing'" in err
    code, _, err = _vmcell("volume", "create", "a/b")
    assert code == 1
    assert "is no volume name" in err
    monkeypatch.setenv("E2B_API_KEY", "e2b_" + "0" * 40)
    assert "API key is not valid" in _vmcell("volume", "list")[2]
    monkeypatch.delenv("E2B_API_KEY")
    assert "E2B_API_KEY is not set" in _vmcell("volume", "list")[2]
    monkeypatch.setenv("E2B_API_KEY", service.key)
    monkeypatch.setenv("E2B_API_URL", "http://127.0.0.1:9")
    assert "vmcell serve" in _vmcell("volume", "list")[2]
