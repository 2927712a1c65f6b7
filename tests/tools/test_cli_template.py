"""`vmcell template` against the API with a fake builder, over loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_service import ApiService, api_service, listening
from click.testing import CliRunner, Result

from vmcell_tools.cli import main

DOCKERFILE = """\
FROM docker.io/vmcell/small:latest
COPY app.py /app/
ENV COLOUR=red
RUN make $COLOUR
WORKDIR /app
"""


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiService]:
    with api_service(tmp_path / "api") as running, listening(running.app) as address:
        monkeypatch.setenv("E2B_API_URL", f"http://{address}")
        monkeypatch.setenv("E2B_API_KEY", running.key)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    context = tmp_path / "context"
    context.mkdir()
    (context / "app.py").write_text("print(1)\n")
    (context / "Dockerfile").write_text(DOCKERFILE)
    return context


def _run(*words: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["template", *words])
    assert result.exit_code == status, result.output
    return result


def test_build_list_watch_remove(service: ApiService, folder: Path) -> None:
    result = _run("build", str(folder), "--name", "shop:v1", "--cpus", "2", "--start", "serve")
    assert "shop:v1 is ready" in result.stdout
    assert "RUN make red" in result.stderr or "RUN make $COLOUR" in result.stderr
    (order,) = service.builder.orders
    assert order.vcpus == 2
    assert (order.start_command, order.ready_command) == ("serve", "true")
    assert [step.type for step in order.steps if step.type in ("COPY", "ENV", "RUN")] == [
        *("COPY", "ENV", "RUN"),
    ]
    rows = json.loads(_run("list", "--json").stdout)
    assert [row["names"][0] for row in rows] == [
        *("team-one/shop", "base", "code-interpreter-v1", "desktop", "small"),
    ]
    assert {row["buildStatus"] for row in rows} == {"ready"}
    table = _run("list").stdout
    assert "team-one/shop" in table
    watched = json.loads(_run("watch", "shop", "--json").stdout)
    assert watched["status"] == "ready"
    assert watched["buildID"] == order.build_id
    _run("rm", "shop")
    assert service.builder.removed == [order.build_id]
    assert "was not found" in _run("rm", "shop", status=1).stderr
    assert "installation" in _run("rm", "base", status=1).stderr


def test_an_e2b_folder_names_itself(service: ApiService, folder: Path) -> None:
    (folder / "Dockerfile").rename(folder / "e2b.Dockerfile")
    (folder / "e2b.toml").write_text(
        'template_name = "named"\nstart_cmd = "serve"\nready_cmd = "check"\nmemory_mb = 1024\n'
        'dockerfile = "e2b.Dockerfile"\n'
    )
    built = json.loads(_run("build", str(folder), "--tag", "stable", "--json").stdout)
    assert (built["name"], built["tags"]) == ("named", ["stable"])
    (order,) = service.builder.orders
    assert (order.start_command, order.ready_command) == ("serve", "check")
    assert order.memory_mib == 1024


def test_a_program_is_a_template_too(service: ApiService, folder: Path) -> None:
    (folder / "template.py").write_text(
        "from e2b import Template\n"
        "template = Template().from_image('small').run_cmd('echo from the program')\n"
    )
    _run("build", str(folder), "--name", "programmed", "--no-cache")
    (order,) = service.builder.orders
    assert order.steps[0].args == ["echo from the program"]
    assert order.force


def test_a_failing_build_is_one_sentence_with_the_output(service: ApiService, folder: Path) -> None:
    (folder / "Dockerfile").write_text("FROM small\nRUN exit 3\n")
    result = _run("build", str(folder), "--name", "broken", status=1)
    assert "it went wrong" in result.stderr
    assert isinstance(result.exception, SystemExit)
    sentence = result.stderr[result.stderr.index("Error: ") :]
    assert sentence.startswith("Error: template broken was not built: ")
    assert "exit status 3" in sentence
    watched = _run("watch", "broken", status=1)
    assert "exit status 3" in watched.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("build", "nowhere", "--name", "x"), "does not exist"),
        (("build", ".", "--name", "x"), "none of template.py"),
        (("watch", "nosuch"), "was not found"),
        (("watch", "base"), "part of the installation"),
    ],
)
def test_what_is_wrong_is_said(
    service: ApiService,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in _run(*words, status=1).stderr


def test_a_build_without_an_api(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2B_API_KEY", "e2b_0")
    monkeypatch.setenv("E2B_API_URL", "http://127.0.0.1:9")
    last = _run("build", str(folder), "--name", "x", status=1).stderr.splitlines()[-1]
    assert last.startswith("Error: the API does not answer at http://127.0.0.1:9: ")
    assert last.endswith("; start it with `vmcell serve`, or set E2B_API_URL")


def test_a_build_with_a_wrong_key(
    service: ApiService, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2B_API_KEY", "e2b_" + "0" * 40)
    last = _run("build", str(folder), "--name", "x", status=1).stderr.splitlines()[-1]
    assert last.startswith("Error: template x was not built: ")
    assert "API key is not valid" in last


def test_without_a_key_or_an_api(service: ApiService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2B_API_URL", "http://127.0.0.1:9")
    assert "vmcell serve" in _run("list", status=1).stderr
    monkeypatch.delenv("E2B_API_KEY")
    assert "E2B_API_KEY is not set" in _run("list", status=1).stderr
