"""`/volumes`, volumeMounts and `/volumecontent` over HTTP: a fake node, real directories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from api_service import ApiService, api_service
from falcon import testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmcell_api.node_channel import NodeUnreachable
from vmcell_protos.errors import HostError


def _ask(
    service: ApiService, method: str, path: str, key: str = "", **options: object
) -> testing.Result:
    headers = {"X-API-KEY": key or service.key}
    return testing.TestClient(service.app).simulate_request(
        method, path, headers=headers, **options
    )


def _make(service: ApiService, name: str = "data") -> dict:
    made = _ask(service, "POST", "/volumes", json={"name": name})
    assert made.status_code == 201, made.text
    return made.json


def _content(
    service: ApiService, volume: dict, method: str, kind: str, **options: object
) -> testing.Result:
    headers = {"Authorization": f"Bearer {volume['token']}", **options.pop("headers", {})}  # type: ignore[dict-item]  # test values
    path = f"/volumecontent/{volume['volumeID']}/{kind}"
    return testing.TestClient(service.content_app).simulate_request(
        method, path, headers=headers, **options
    )


def test_make_list_get_delete(service: ApiService) -> None:
    made = _make(service)
    assert set(made) == {"volumeID", "name", "token"}
    assert _ask(service, "GET", "/volumes").json == [{"volumeID": made["volumeID"], "name": "data"}]
    assert _ask(service, "GET", f"/volumes/{made['volumeID']}").json == made, "the token stays"
    folder = Path(service.config.volumes_dir, "data", made["volumeID"])
    (folder / "file").touch()
    assert _ask(service, "DELETE", f"/volumes/{made['volumeID']}").status_code == 204
    assert not folder.exists()
    assert _ask(service, "DELETE", f"/volumes/{made['volumeID']}").status_code == 404
    assert _ask(service, "GET", f"/volumes/{made['volumeID']}").status_code == 404
    assert _ask(service, "GET", "/volumes").json == []
    assert _content(service, made, "GET", "path", params={"path": "/"}).status_code == 404


def test_the_domain_is_told(tmp_path: Path) -> None:
    with api_service(tmp_path, domain="sbx.example.org") as service:
        assert _make(service)["domain"] == "sbx.example.org"


@pytest.mark.parametrize(
    "body",
    [
        *({}, {"name": ""}, {"name": "a/b"}, {"name": ".."}, {"name": "é"}, {"name": "x" * 129}),
        *({"name": 7}, {"name": None}, {"name": ["a"]}, {"name": "a", "driver": "nfs"}),
    ],
)
def test_bad_creates(service: ApiService, body: object) -> None:
    answer = _ask(service, "POST", "/volumes", json=body)
    assert (answer.status_code, answer.json["code"]) == (400, 400)
    assert os.listdir(Path(service.config.volumes_dir, "data")) == []


def test_a_name_is_a_teams_own_and_once(service: ApiService) -> None:
    made = _make(service)
    again = _ask(service, "POST", "/volumes", json={"name": "data"})
    assert (again.status_code, again.json["code"]) == (400, 400)
    assert "already exists" in again.json["message"]
    other = service.new_key("team-two")
    assert _ask(service, "POST", "/volumes", other, json={"name": "data"}).status_code == 201
    for method in ("GET", "DELETE"):
        answer = _ask(service, method, f"/volumes/{made['volumeID']}", other)
        assert answer.status_code == 404
    assert Path(service.config.volumes_dir, "data", made["volumeID"]).is_dir()
    assert _ask(service, "DELETE", "/volumes/non-existent-id").status_code == 404
    assert testing.TestClient(service.app).simulate_get("/volumes").status_code == 401


def test_a_teams_number_of_volumes(tmp_path: Path) -> None:
    with api_service(tmp_path, volumes_per_team=2) as service:
        _make(service, "one")
        two = _make(service, "two")
        answer = _ask(service, "POST", "/volumes", json={"name": "three"})
        assert (answer.status_code, answer.headers["should-retry"]) == (429, "false")
        assert _ask(service, "DELETE", f"/volumes/{two['volumeID']}").status_code == 204
        _make(service, "three")


def test_a_create_that_was_cut_off_is_finished_by_the_next(service: ApiService) -> None:
    service.node.fail_next = NodeUnreachable("noded does not answer")
    answer = _ask(service, "POST", "/volumes", json={"name": "data"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert _ask(service, "GET", "/volumes").json == []
    made = _make(service)
    service.node.fail_next = HostError("the disk is full", code="internal")
    assert _ask(service, "POST", "/volumes", json={"name": "more"}).status_code == 500
    assert _ask(service, "GET", "/volumes").json == [{"volumeID": made["volumeID"], "name": "data"}]
    assert os.listdir(Path(service.config.volumes_dir, "data")) == [made["volumeID"]]


def test_creates_of_one_name_at_once(service: ApiService) -> None:
    """The other create, while this one waits for the node: it finishes, or it fails."""
    folder = Path(service.config.volumes_dir, "data")
    make = service.node.volumes.make
    others: list[testing.Result] = []

    def other_finishes(volume_id: str) -> None:
        service.node.volumes.make = make  # type: ignore[method-assign]  # for one call only
        others.append(_ask(service, "POST", "/volumes", json={"name": "data"}))
        raise HostError("the disk is full", code="internal")

    service.node.volumes.make = other_finishes  # type: ignore[method-assign]  # for one call only
    assert _ask(service, "POST", "/volumes", json={"name": "data"}).status_code == 500
    assert others[0].status_code == 201
    assert [row["name"] for row in _ask(service, "GET", "/volumes").json] == ["data"]

    def other_fails(volume_id: str) -> None:
        service.node.volumes.make = make  # type: ignore[method-assign]  # for one call only
        service.node.fail_next = HostError("the disk is full", code="internal")
        others.append(_ask(service, "POST", "/volumes", json={"name": "more"}))
        make(volume_id)

    service.node.volumes.make = other_fails  # type: ignore[method-assign]  # for one call only
    assert _ask(service, "POST", "/volumes", json={"name": "more"}).status_code == 503
    assert others[1].status_code == 500
    assert os.listdir(folder) == [others[0].json["volumeID"]], "no directory without an owner"


def test_a_sandbox_has_its_volumes(service: ApiService) -> None:
    one, two = _make(service, "one"), _make(service, "two")
    mounts = [{"name": "one", "path": "/mnt/a/"}, {"name": "two", "path": "/mnt/b"}]
    body = {"templateID": "base", "volumeMounts": mounts}
    made = _ask(service, "POST", "/v2/sandboxes", json=body)
    assert made.status_code == 201, made.text
    sandbox_id = made.json["sandboxID"]
    (order,) = service.node.orders
    assert [(row.volume_id, row.path) for row in order.volume_mounts] == [
        (one["volumeID"], "/mnt/a"),
        (two["volumeID"], "/mnt/b"),
    ]
    shown = [{"name": "one", "path": "/mnt/a"}, {"name": "two", "path": "/mnt/b"}]
    assert _ask(service, "GET", f"/sandboxes/{sandbox_id}").json["volumeMounts"] == shown
    assert _ask(service, "GET", "/v2/sandboxes").json[0]["volumeMounts"] == shown
    answer = _ask(service, "DELETE", f"/volumes/{one['volumeID']}")
    assert (answer.status_code, answer.json["code"]) == (409, 409)
    assert sandbox_id in answer.json["message"]
    assert _ask(service, "GET", f"/volumes/{one['volumeID']}").status_code == 200
    assert _ask(service, "DELETE", f"/sandboxes/{sandbox_id}").status_code == 204
    assert _ask(service, "DELETE", f"/volumes/{one['volumeID']}").status_code == 204


@pytest.mark.parametrize(
    ("mounts", "status", "words"),
    [
        ([{"name": "no", "path": "/mnt"}, {"name": "nor", "path": "/b"}], 404, "volume no, nor"),
        ([{"name": "data", "path": "/proc"}], 400, "/proc"),
        ([{"name": "data", "path": "mnt"}], 400, "absolute"),
        ([{"name": "data", "path": "/a/../b"}], 400, ".."),
        ([{"name": "data", "path": "/a"}, {"name": "data", "path": "/a/"}], 400, "apart"),
        ([{"name": "data", "path": "/a"}, {"name": "data", "path": "/a/b"}], 400, "apart"),
        ([{"name": "data"}], 400, "path"),
        ([{"path": "/mnt"}], 400, "name"),
        ([{"name": "a/b", "path": "/mnt"}], 400, "volume name"),
        ([{"name": "data", "path": f"/{n}"} for n in range(17)], 400, "at most 16"),
        (["data"], 400, "list of objects"),
        ({"name": "data", "path": "/mnt"}, 400, "list of objects"),
    ],
)
def test_mounts_that_are_refused(
    service: ApiService, mounts: object, status: int, words: str
) -> None:
    _make(service)
    body = {"templateID": "base", "volumeMounts": mounts}
    answer = _ask(service, "POST", "/v2/sandboxes", json=body)
    assert (answer.status_code, answer.json["code"]) == (status, status)
    assert words in answer.json["message"]
    assert service.node.orders == []
    assert service.store.sandboxes(team_id=service.store.ensure_team("team-one").team_id) == {}


def test_anothers_volume_is_none(service: ApiService) -> None:
    _make(service)
    body = {"templateID": "base", "volumeMounts": [{"name": "data", "path": "/mnt"}]}
    answer = _ask(service, "POST", "/v2/sandboxes", service.new_key("team-two"), json=body)
    assert answer.status_code == 404
    assert service.node.orders == []


def test_content_wants_the_volumes_own_token(service: ApiService) -> None:
    one, two = _make(service, "one"), _make(service, "two")
    for kind in ("path", "dir", "file"):
        for token in ("", two["token"], service.key, "vol_" + "0" * 64):
            volume = {**one, "token": token}
            answer = _content(service, volume, "GET", kind, params={"path": "/"})
            assert (answer.status_code, answer.json["code"]) == (401, "unauthenticated")
            assert one["token"] not in answer.text
    mixed = {"volumeID": "v" + "0" * 19, "token": one["token"]}
    assert _content(service, mixed, "GET", "dir", params={"path": "/"}).status_code == 401


def test_ranges(service: ApiService) -> None:
    volume = _make(service)
    put = _content(service, volume, "PUT", "file", params={"path": "f"}, body=b"0123456789")
    assert put.status_code == 201

    def get(header: str) -> testing.Result:
        headers = {"Range": header}
        return _content(service, volume, "GET", "file", params={"path": "f"}, headers=headers)

    assert (get("bytes=2-4").status_code, get("bytes=2-4").content) == (206, b"234")
    assert get("bytes=2-4").headers["content-range"] == "bytes 2-4/10"
    assert get("bytes=7-").content == b"789"
    assert get("bytes=7-99").content == b"789"
    assert get("bytes=-3").content == b"789"
    assert get("bytes=-99").content == b"0123456789"
    for ignored in ("bytes=4-2", "lines=1-2", "bytes=1-2,4-5", "bytes=-", "nonsense"):
        assert (get(ignored).status_code, get(ignored).content) == (200, b"0123456789")
    for beyond in ("bytes=10-", "bytes=99-100", "bytes=-0"):
        answer = get(beyond)
        assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */10")


@pytest.mark.parametrize(
    ("method", "kind", "params", "status"),
    [
        ("GET", "path", {}, 400),
        ("GET", "path", {"path": "a/../../b"}, 400),
        ("GET", "path", {"path": "no"}, 404),
        ("GET", "path", {"path": "x" * 256}, 400),
        ("GET", "path", {"path": "x/" * 4000}, 400),
        ("GET", "dir", {"path": "/", "depth": "-1"}, 400),
        ("GET", "dir", {"path": "/", "depth": "65"}, 400),
        ("GET", "dir", {"path": "/", "depth": "two"}, 400),
        ("GET", "dir", {"path": "no"}, 404),
        ("GET", "file", {"path": "/"}, 400),
        ("GET", "file", {"path": "no"}, 404),
        ("POST", "dir", {"path": "d", "mode": "0o755"}, 400),
        ("POST", "dir", {"path": "d", "mode": str(0o4755)}, 400),
        ("POST", "dir", {"path": "d", "uid": "4294967295"}, 400),
        ("POST", "dir", {"path": "d", "uid": "0000000000004294967295"}, 400),
        ("POST", "dir", {"path": "d", "uid": "0" * 5000}, 400),
        ("POST", "dir", {"path": "d", "force": "perhaps"}, 400),
        ("POST", "dir", {"path": "no/d"}, 404),
        ("POST", "dir", {"path": "/"}, 409),
        ("PUT", "file", {"path": "/"}, 400),
        ("PUT", "file", {"path": "no/f"}, 404),
        ("DELETE", "path", {"path": "/"}, 400),
        ("DELETE", "path", {"path": "no"}, 404),
        ("DELETE", "file", {"path": "no"}, 405),
        ("GET", "other", {"path": "no"}, 404),
    ],
)
def test_bad_content_requests(
    service: ApiService, method: str, kind: str, params: dict, status: int
) -> None:
    volume = _make(service)
    answer = _content(service, volume, method, kind, params=params)
    assert answer.status_code == status, answer.text
    assert isinstance(answer.json["code"], str)
    assert isinstance(answer.json["message"], str)
    assert os.listdir(Path(service.config.volumes_dir, "data", volume["volumeID"])) == []


def test_bad_changes(service: ApiService) -> None:
    volume = _make(service)
    _content(service, volume, "PUT", "file", params={"path": "f"}, body=b"x")
    for body in (b"[]", b"nonsense", b'{"mode": "0644"}', b'{"mode": 2048}', b'{"uid": -1}'):
        answer = _content(service, volume, "PATCH", "path", params={"path": "f"}, body=body)
        assert (answer.status_code, answer.json["code"]) == (400, "invalid_argument")
    answer = _content(service, volume, "PATCH", "path", params={"path": "f"}, json={"mode": 0o600})
    assert (answer.status_code, answer.json["mode"]) == (200, 0o600)


def test_a_body_that_breaks_off(service: ApiService) -> None:
    volume = _make(service)
    _content(service, volume, "PUT", "file", params={"path": "f"}, body=b"old")
    answer = _content(
        service,
        volume,
        "PUT",
        "file",
        params={"path": "f", "force": "true"},
        body=b"half",
        headers={"Content-Length": "8"},
    )
    assert (answer.status_code, "broke off" in answer.json["message"]) == (400, True)
    assert _content(service, volume, "GET", "file", params={"path": "f"}).content == b"old"
    assert os.listdir(Path(service.config.volumes_dir, "uploads")) == []


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE"]),
    kind=st.sampled_from(["path", "dir", "file"]),
    params=st.dictionaries(
        st.sampled_from(["path", "depth", "uid", "gid", "mode", "force"]),
        st.text(st.characters(codec="utf-8"), max_size=12),
    ),
    body=st.binary(max_size=40),
)
def test_no_request_breaks_the_server(
    service: ApiService, method: str, kind: str, params: dict, body: bytes
) -> None:
    volume = _ask(service, "GET", "/volumes").json or [_make(service)]
    told = _ask(service, "GET", f"/volumes/{volume[0]['volumeID']}").json
    query = {name: value for name, value in params.items() if name not in ("uid", "gid")}
    answer = _content(service, told, method, kind, params=query, body=body)
    assert answer.status_code < 500, answer.text
