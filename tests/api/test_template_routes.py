"""The template routes by themselves: encoded ids, teams, pages, refusals; the builder is a fake."""

from __future__ import annotations

import io
import os
import re
import time
import uuid
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest
from api_service import ApiService, api_service
from e2b.api.client.models import Template, TemplateWithBuilds
from falcon import testing

from vmcell_api.node.upload_files import open_upload
from vmcell_api.upload_store import UploadStore
from vmcell_protos.errors import CallerError, HostError

HASH = "ab" * 32


class Client:
    """One team's requests; `encoded` paths go in as gunicorn would hand them over."""

    def __init__(self, service: ApiService, key: str | None = None) -> None:
        self._client = testing.TestClient(service.app)
        self._key = key or service.key

    def ask(
        self, method: str, target: str, body: object = None, **options: object
    ) -> testing.Result:
        path, _, query = target.partition("?")
        return self._client.simulate_request(
            method,
            unquote(path),
            json=body,
            query_string=query,
            headers={"X-API-Key": self._key},
            extras={"RAW_URI": target},
            **options,
        )

    def built(self, name: str, *commands: str, **start: object) -> tuple[str, str]:
        """(template id, build id) of a build that was asked for and started."""
        asked = self.ask("POST", "/v3/templates", {"name": name})
        assert asked.status_code == 202, asked.text
        template, build = asked.json["templateID"], asked.json["buildID"]
        body = {"fromImage": "small", "steps": [_run(command) for command in commands], **start}
        started = self.ask("POST", f"/v2/templates/{template}/builds/{build}", body)
        assert started.status_code == 202, started.text
        return template, build


def _run(command: str) -> dict[str, object]:
    return {"type": "RUN", "args": [command], "force": False}


@pytest.fixture
def client(service: ApiService) -> Client:
    return Client(service)


def test_an_id_may_be_a_name_with_encoded_slashes(service: ApiService, client: Client) -> None:
    template, build = client.built("shop", "make")
    client.ask("GET", f"/templates/{template}/builds/{build}/status")
    for name in ("shop", "team-one/shop", "team-one/shop:default", template, f"{template}:default"):
        encoded = quote(name, safe="")
        assert client.ask("GET", f"/templates/{encoded}").json["templateID"] == template
        assert client.ask("GET", f"/templates/aliases/{encoded}").json == {
            "templateID": template,
            "public": False,
        }
        assert [row["tag"] for row in client.ask("GET", f"/templates/{encoded}/tags").json] == [
            "default"
        ]
    encoded = quote("team-one/shop", safe="")
    assert client.ask("PATCH", f"/v2/templates/{encoded}", {"public": True}).json == {
        "names": ["team-one/shop"]
    }
    assert client.ask("PATCH", f"/templates/{encoded}", {"public": False}).json == {}
    assert client.ask("DELETE", f"/templates/{encoded}").status_code == 204
    assert client.ask("DELETE", f"/templates/{encoded}").status_code == 404
    assert service.builder.removed == [build]


def test_every_field_that_clients_want_is_listed(client: Client) -> None:
    template, build = client.built("shop", "make")
    (row, *installed) = client.ask("GET", "/templates").json
    assert row["templateID"] == template
    assert row["buildID"] == build
    assert (row["buildStatus"], row["buildCount"], row["spawnCount"]) == ("ready", 1, 0)
    assert [entry["aliases"] for entry in installed] == [
        ["base"],
        ["code-interpreter-v1"],
        ["desktop"],
        ["small"],
    ]
    for entry in (row, *installed):
        Template.from_dict(dict(entry))
    details = TemplateWithBuilds.from_dict(client.ask("GET", f"/templates/{template}").json)
    assert [str(found.build_id) for found in details.builds] == [build]
    assert details.builds[0].finished_at
    made = client.ask("POST", "/v2/sandboxes", {"templateID": "shop"})
    assert made.status_code == 201
    for named in ("shop", quote("team-one/shop", safe=""), template):
        (listed,) = client.ask("GET", f"/v2/sandboxes?template={named}").json
        assert listed["sandboxID"] == made.json["sandboxID"]
    assert client.ask("GET", "/v2/sandboxes?template=base").json == []
    (row, *_) = client.ask("GET", "/templates").json
    assert row["spawnCount"] == 1
    assert row["lastSpawnedAt"]


def test_pages_hold_every_template_once(client: Client) -> None:
    for number in range(5):
        client.built(f"t{number}")
    found, token = [], ""
    while True:
        query = f"limit=2&nextToken={token}" if token else "limit=2"
        page = client.ask("GET", f"/v2/templates?{query}")
        found += [row["aliases"][0] for row in page.json]
        token = page.headers.get("x-next-token", "")
        if not token:
            break
    installed = ["base", "code-interpreter-v1", "desktop", "small"]
    assert sorted(found) == [*installed, "t0", "t1", "t2", "t3", "t4"]
    assert client.ask("GET", "/v2/templates?nextToken=nonsense").status_code == 400


def test_other_teams_see_public_templates_only(service: ApiService, client: Client) -> None:
    template, build = client.built("shop", "make")
    other = Client(service, service.new_key("other"))
    named = quote("team-one/shop", safe="")
    assert other.ask("GET", f"/templates/{template}").status_code == 404
    assert other.ask("GET", f"/templates/aliases/{named}").status_code == 403
    assert other.ask("GET", "/templates/aliases/shop").status_code == 404
    assert other.ask("POST", "/v2/sandboxes", {"templateID": "team-one/shop"}).status_code == 404
    status = f"/templates/{template}/builds/{build}/status"
    assert other.ask("GET", status).status_code == 404
    client.ask("PATCH", f"/v2/templates/{template}", {"public": True})
    assert other.ask("GET", f"/templates/aliases/{named}").json["public"] is True
    assert other.ask("POST", "/v2/sandboxes", {"templateID": "team-one/shop"}).status_code == 201
    for method, path, body in (
        ("DELETE", f"/templates/{template}", None),
        ("PATCH", f"/v2/templates/{template}", {"public": False}),
        ("POST", "/templates/tags", {"target": "team-one/shop", "tags": ["x"]}),
        ("DELETE", "/templates/tags", {"name": "team-one/shop", "tags": ["default"]}),
        ("GET", f"/templates/{template}/files/{HASH}", None),
        ("GET", status, None),
    ):
        assert other.ask(method, path, body).status_code == 403, path
    image = service.node.orders[-1].image
    assert other.ask("POST", "/v2/sandboxes", {"templateID": image}).status_code == 404
    asked = other.ask("POST", "/v3/templates", {"name": "mine"}).json
    start = f"/v2/templates/{asked['templateID']}/builds/{asked['buildID']}"
    assert other.ask("POST", start, {"fromImage": image}).status_code == 400
    assert other.ask("POST", start, {"fromTemplate": "team-one/shop"}).status_code == 202
    assert service.builder.orders[-1].from_image == image


def test_the_installations_templates_are_nobodys(client: Client) -> None:
    assert client.ask("GET", "/templates/aliases/base").json == {
        "templateID": "base",
        "public": True,
    }
    assert client.ask("DELETE", "/templates/base").status_code == 403
    assert client.ask("PATCH", "/v2/templates/base", {"public": False}).status_code == 403
    assert client.ask("GET", "/templates/base/tags").json == []
    assert client.ask("POST", "/v2/sandboxes", {"templateID": "base:default"}).status_code == 201


def test_a_build_is_started_once(service: ApiService, client: Client) -> None:
    asked = client.ask("POST", "/v3/templates", {"name": "shop"}).json
    start = f"/v2/templates/{asked['templateID']}/builds/{asked['buildID']}"
    status = f"/templates/{asked['templateID']}/builds/{asked['buildID']}/status"
    assert client.ask("GET", status).json["status"] == "waiting"
    service.builder.fail_next = HostError("noded is ending")
    assert client.ask("POST", start, {"fromImage": "small"}).status_code == 503
    assert client.ask("GET", status).json["status"] == "waiting", "the node did not take it"
    assert client.ask("POST", start, {"fromImage": "small"}).status_code == 202
    again = client.ask("POST", start, {"fromImage": "small"})
    assert (again.status_code, "started before" in again.json["message"]) == (400, True)
    wrong = f"/v2/templates/{asked['templateID']}/builds/{uuid.uuid4()}"
    assert client.ask("POST", wrong, {"fromImage": "small"}).status_code == 404


def test_a_build_can_be_cancelled_and_lost(service: ApiService, client: Client) -> None:
    service.builder.hold = True
    template, build = client.built("shop", "make")
    status = f"/templates/{template}/builds/{build}/status"
    assert client.ask("GET", status).json["status"] == "building"
    assert client.ask("DELETE", f"/v2/templates/{template}/builds/{build}").status_code == 204
    ended = client.ask("GET", status).json
    assert (ended["status"], ended["reason"]["message"]) == ("error", "the build was cancelled")
    template, build = client.built("shop", "make")
    service.builder.forget_everything()
    lost = client.ask("GET", f"/templates/{template}/builds/{build}/status").json
    assert (lost["status"], "node" in lost["reason"]["message"]) == ("error", True)
    assert client.ask("POST", "/v2/sandboxes", {"templateID": "shop"}).status_code == 404


def test_logs_by_level_and_page(client: Client) -> None:
    template, build = client.built("shop", "one", "exit 3")
    path = f"/templates/{template}/builds/{build}"
    body = client.ask("GET", f"{path}/status?level=error").json
    assert [row["message"] for row in body["logEntries"]] == ["it went wrong"]
    assert body["reason"]["step"] == "2"
    assert body["reason"]["logEntries"][0]["level"] == "error"
    logs = client.ask("GET", f"{path}/logs?cursor=1&limit=1").json["logs"]
    assert [row["message"] for row in logs] == ["RUN one"]
    assert re.fullmatch(r"\d{4}-.*Z", logs[0]["timestamp"])
    assert client.ask("GET", f"{path}/status?logsOffset=x").status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "no good"},
        {"name": "a", "tags": "v1"},
        {"name": "a", "cpuCount": 0},
        {"name": "a", "memoryMB": 1},
        {"name": "a", "minFreeDiskMb": 5},
        {"name": ["a"]},
    ],
)
def test_a_wrong_request_leaves_nothing(client: Client, body: dict[str, object]) -> None:
    before = client.ask("GET", "/templates").json
    answer = client.ask("POST", "/v3/templates", body)
    assert answer.status_code == 400
    assert answer.json["code"] == 400
    assert client.ask("GET", "/templates").json == before


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"fromImage": "a", "fromTemplate": "b"},
        {"fromImage": "a", "steps": {}},
        {"fromImage": "a", "steps": ["RUN"]},
        {"fromImage": "a", "steps": [{"type": "ADD", "args": []}]},
        {"fromImage": "a", "steps": [{"type": "RUN", "args": [1]}]},
        {"fromImage": "a", "fromImageRegistry": {"type": "aws"}},
        {"fromImage": "a", "startCmd": 5},
        {"fromTemplate": "nosuch"},
    ],
)
def test_a_wrong_start_can_be_made_right(client: Client, body: dict[str, object]) -> None:
    asked = client.ask("POST", "/v3/templates", {"name": "shop"}).json
    start = f"/v2/templates/{asked['templateID']}/builds/{asked['buildID']}"
    answer = client.ask("POST", start, body)
    assert answer.status_code in (400, 404)
    assert answer.json["code"] == answer.status_code
    assert client.ask("POST", start, {"fromImage": "small"}).status_code == 202


# Uploads.


def _link(client: Client, files_hash: str = HASH) -> tuple[bool, str]:
    template = client.ask("POST", "/v3/templates", {"name": "shop"}).json["templateID"]
    answer = client.ask("GET", f"/templates/{template}/files/{files_hash}")
    assert answer.status_code == 201, answer.text
    return answer.json["present"], urlsplit(answer.json["url"]).path


def test_a_link_takes_files_without_a_key(service: ApiService, client: Client) -> None:
    present, path = _link(client)
    assert present is False
    anybody = testing.TestClient(service.app)
    assert anybody.simulate_put(path, body=b"tar").status_code == 200
    assert _link(client)[0] is True
    other = Client(service, service.new_key("other"))
    assert _link(other)[0] is False, "teams share no uploads"
    assert anybody.simulate_put(path + "x", body=b"tar").status_code == 403
    assert anybody.simulate_put("/vmcell/uploads/..", body=b"tar").status_code in (403, 404)
    assert anybody.simulate_get(path).status_code == 405
    template = client.ask("POST", "/v3/templates", {"name": "shop"}).json["templateID"]
    for wrong in ("zz", "AB" * 32, quote("../../etc", safe="")):
        assert client.ask("GET", f"/templates/{template}/files/{wrong}").status_code == 400


def test_an_upload_is_whole_or_not_there(tmp_path: Path) -> None:
    with api_service(tmp_path, max_upload_mib=1) as service:
        client = Client(service)
        _, path = _link(client)
        anybody = testing.TestClient(service.app)
        large = anybody.simulate_put(path, body=bytes((1 << 20) + 1))
        assert (large.status_code, large.json["code"]) == (413, 413)
        short = anybody.simulate_put(path, body=b"x", headers={"Content-Length": "5"})
        assert short.status_code == 400
        chunked = anybody.simulate_put(
            path,
            body=bytes((1 << 20) + 1),
            headers={"Content-Length": ""},
            extras={"wsgi.input_terminated": True},
        )
        assert chunked.status_code in (400, 413)
        assert _link(client)[0] is False
        files = [found for found in Path(service.config.upload_dir).rglob("*") if found.is_file()]
        assert files == []


def test_a_client_that_stops_is_told_so(tmp_path: Path) -> None:
    class Stalled:
        def __init__(self) -> None:
            self.pieces = [b"some"]

        def read(self, size: int = -1, /) -> bytes:
            if self.pieces:
                return self.pieces.pop()
            raise TimeoutError("timed out")

    store = UploadStore(str(tmp_path), limit_mib=1)
    with pytest.raises(CallerError, match="stopped after 4 bytes"):
        store.receive("team", HASH, Stalled(), 10)
    assert [path.name for path in tmp_path.rglob("*")] == ["team"]
    old = tmp_path / "team" / ".partial-of-a-dead-worker"
    old.touch()
    os.utime(old, (0, 0))
    assert store.receive("team", HASH, io.BytesIO(b"whole"), None) == 5
    assert [path.name for path in (tmp_path / "team").iterdir()] == [HASH]


@pytest.fixture
def uploads(tmp_path: Path) -> tuple[str, str, Path]:
    team = str(uuid.uuid4())
    folder = tmp_path / "uploads" / team
    folder.mkdir(parents=True)
    return str(tmp_path / "uploads"), team, folder


def test_noded_opens_uploads_and_nothing_else(uploads: tuple[str, str, Path]) -> None:
    upload_dir, team, folder = uploads
    uid = os.geteuid()
    (folder / HASH).write_bytes(b"\x1f\x8brest")
    found = open_upload(upload_dir, team, HASH, owner_uid=uid)
    with found.file:
        assert (found.file.read(), found.size, found.packed) == (b"\x1f\x8brest", 6, True)
    with pytest.raises(CallerError, match="no upload"):
        open_upload(upload_dir, "../..", HASH, owner_uid=uid)
    with pytest.raises(CallerError, match="no upload"):
        open_upload(upload_dir, team, "../" + HASH, owner_uid=uid)
    with pytest.raises(CallerError, match="not uploaded"):
        open_upload(upload_dir, team, "cd" * 32, owner_uid=uid)
    with pytest.raises(CallerError, match="is not a file of uid"):
        open_upload(upload_dir, team, HASH, owner_uid=uid + 1)
    (folder / ("01" * 32)).symlink_to("/etc/passwd")
    with pytest.raises(CallerError, match="not uploaded"):
        open_upload(upload_dir, team, "01" * 32, owner_uid=uid)
    os.mkfifo(folder / ("02" * 32))
    with pytest.raises(CallerError, match="is not a file"):
        open_upload(upload_dir, team, "02" * 32, owner_uid=uid)
    (folder / ("03" * 32)).mkdir()
    began = time.monotonic()
    with pytest.raises(CallerError):
        open_upload(upload_dir, team, "03" * 32, owner_uid=uid)
    assert time.monotonic() - began < 5
