"""Who may do what: access token, /init, signed URLs, users."""

from __future__ import annotations

import os
import time

import httpx
import pytest
from e2b.exceptions import AuthenticationException
from envd_client import Stream, request, shell, unary
from envd_harness import Envd, running_envd

pytestmark = pytest.mark.root

ROOT_HOME = "/root"
SECRET = f"{ROOT_HOME}/secret"

TOKEN = "tok-1234567890"
# Microseconds are what Python's datetime keeps.
EXPECTED_CLOCK_NS = 1_935_817_689_123_456_000
UNAUTHORISED = (
    "unauthorized access, please provide a valid access token or method signing if supported"
)


def init(envd: Envd, message: object, token: str | None = None) -> int:
    headers = {} if token is None else {"X-Access-Token": token}
    return unary(envd, "init", message, headers).status


@pytest.fixture
def secured(fresh_envd: Envd) -> Envd:
    assert (
        init(fresh_envd, {"accessToken": TOKEN, "envVars": {"A": "b", "E2B_SANDBOX_ID": "i1"}})
        == 204
    )
    return fresh_envd


@pytest.mark.parametrize("given", [None, "", "wrong", TOKEN[:-1], TOKEN + " x", "\u00e9"])
@pytest.mark.parametrize(
    "path",
    [
        "/process.Process/Start",
        "/filesystem.Filesystem/Stat",
        "/envs",
        "/metrics",
        "/nothing",
        "/init/",
        "/health/x",
    ],
)
def test_every_path_is_closed_without_the_token(path: str, given: str | None, closed: Envd) -> None:
    headers = {"Content-Type": "application/json"}
    if given is not None:
        headers["X-Access-Token"] = given
    method = "GET" if path in ("/envs", "/metrics") else "POST"
    encoded = {name: value.encode("utf-8").decode("latin-1") for name, value in headers.items()}
    answer = request(closed, method, path, b"{}" if method == "POST" else None, encoded)
    assert answer.status == 401
    assert answer.json() == {"code": 401, "message": UNAUTHORISED}


@pytest.fixture(scope="module")
def closed(envd: Envd) -> Envd:
    assert init(envd, {"accessToken": TOKEN}) == 204
    return envd


def test_health_and_preflight_stay_open(closed: Envd) -> None:
    assert request(closed, "GET", "/health").status == 204
    assert request(closed, "POST", "/health").status == 401
    headers = {"Origin": "https://x", "Access-Control-Request-Method": "POST"}
    assert request(closed, "OPTIONS", "/envs", headers=headers).status == 204


def test_the_sdk_with_and_without_the_token(secured: Envd, sandbox_for) -> None:  # type: ignore[no-untyped-def]
    mine = sandbox_for(secured, TOKEN)
    assert mine.commands.run("echo $A $E2B_SANDBOX_ID").stdout == "b i1\n"
    mine.files.write("/tmp/x", "text")
    other = sandbox_for(secured, "wrong")
    for action in (
        lambda: other.commands.run("true"),
        lambda: other.files.list("/"),
        lambda: other.files.read("/tmp/x"),
        lambda: other.files.write("/tmp/y", "x"),
        lambda: sandbox_for(secured).files.read("/tmp/x"),
    ):
        with pytest.raises(AuthenticationException):
            action()
    assert not secured.path("/tmp/y").exists()


class TestInit:
    def test_first_wins_and_code_inside_cannot_take_over(self, fresh_envd: Envd) -> None:
        assert init(fresh_envd, {"accessToken": TOKEN}) == 204
        assert init(fresh_envd, {"accessToken": "mine"}) == 401
        assert init(fresh_envd, {}) == 401
        assert init(fresh_envd, {"envVars": {"PATH": "/evil"}}, "wrong") == 401
        inside = Stream(
            fresh_envd,
            "process.Process/Start",
            shell(
                f"exec 3<>/dev/tcp/127.0.0.1/{fresh_envd.port}; printf 'POST /init HTTP/1.1\\r\\n"
                "Host: x\\r\\nContent-Length: 23\\r\\n\\r\\n"
                '{"accessToken":"mine2"}\' >&3; head -n 1 <&3',
                process={"cmd": "/bin/bash"},
            ),
            {"X-Access-Token": TOKEN},
        )
        with inside:
            assert inside.output().startswith(b"HTTP/1.1 401")
        assert request(fresh_envd, "GET", "/envs", headers={"X-Access-Token": TOKEN}).status == 200

    def test_the_present_token_may_change_everything(self, secured: Envd) -> None:
        assert init(secured, {"accessToken": "new", "envVars": {"B": "c"}}, TOKEN) == 204
        assert init(secured, {}, TOKEN) == 401
        assert init(secured, {"accessToken": "new", "defaultUser": "root"}) == 204
        headers = {"X-Access-Token": "new"}
        envs = request(secured, "GET", "/envs", headers=headers).json()
        # what a later call says about the environment replaces it; the last one said nothing
        assert envs == {"E2B_SANDBOX": "true", "B": "c"}
        with Stream(secured, "process.Process/Start", shell("id -u; pwd"), headers) as stream:
            assert stream.output() == b"0\n/root\n"

    def test_an_open_sandbox_never_gets_a_token(self, fresh_envd: Envd) -> None:
        assert init(fresh_envd, {"envVars": {"A": "1"}}) == 204
        assert init(fresh_envd, {"accessToken": "mine"}) == 401
        assert init(fresh_envd, {"envVars": {"A": "2"}}) == 204
        assert request(fresh_envd, "GET", "/envs").json()["A"] == "2"

    def test_defaults_markers_and_clock(self, fresh_envd: Envd) -> None:
        message = {
            "accessToken": None,
            "envVars": {"E2B_SANDBOX_ID": "iabc", "E2B_TEMPLATE_ID": "tabc"},
            "defaultUser": "nobody",
            "defaultWorkdir": "/usr",
            "timestamp": "2031-05-06T07:08:09.123456789Z",
            "hyperloopIP": "10.0.0.1",
        }
        assert init(fresh_envd, message) == 204
        events = request(fresh_envd, "GET", "/envs").json()["E2B_EVENTS_ADDRESS"]
        assert events == "http://10.0.0.1"
        assert fresh_envd.path("/run/e2b/.E2B_SANDBOX").read_text() == "true"
        assert fresh_envd.path("/run/e2b/.E2B_SANDBOX_ID").read_text() == "iabc"
        assert fresh_envd.path("/run/e2b/.E2B_TEMPLATE_ID").read_text() == "tabc"
        assert fresh_envd.path("/run/clock").read_text() == str(EXPECTED_CLOCK_NS)
        with Stream(fresh_envd, "process.Process/Start", shell("id -un; pwd")) as stream:
            assert stream.output() == b"nobody\n/usr\n"

    @pytest.mark.parametrize(
        "message",
        [
            {"envVars": {"A=B": "c"}},
            {"envVars": {"": "c"}},
            {"envVars": {"A": 1}},
            {"envVars": ["A"]},
            {"accessToken": 5},
            {"timestamp": "yesterday"},
            {"timestamp": "2031-05-06T07:08:09"},
            {"volumeMounts": [{"name": "v"}]},
            {"caBundle": "x"},
            {"hyperloopIP": "nowhere"},
        ],
    )
    def test_nonsense_changes_nothing(self, envd_open: Envd, message: object) -> None:
        assert init(envd_open, message) == 400
        assert request(envd_open, "GET", "/envs").json() == {"E2B_SANDBOX": "true"}


@pytest.fixture(scope="module")
def envd_open(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with running_envd(tmp_path_factory.mktemp("open")) as server:
        yield server


class TestSignedUrls:
    def test_download_and_upload(self, secured: Envd, sandbox_for) -> None:  # type: ignore[no-untyped-def]
        sandbox = sandbox_for(secured, TOKEN)
        name = "/tmp/a b+c \u00e9.txt"
        up = sandbox.upload_url(name)
        answer = httpx.post(up, files={"file": ("ignored", b"signed")})
        assert answer.status_code == 200, answer.text
        assert httpx.get(sandbox.download_url(name)).text == "signed"
        timed = sandbox.download_url(name, user="root", use_signature_expiration=100)
        assert httpx.get(timed).text == "signed"
        # A signature for one thing is good for nothing else.
        assert httpx.post(sandbox.download_url(name), files={"file": b"x"}).status_code == 401
        assert httpx.get(up).json() == {"code": 401, "message": "invalid signature"}
        moved = timed.replace("username=root", "username=user")
        assert httpx.get(moved).json()["message"] == "invalid signature"
        assert httpx.get(sandbox.download_url("")).status_code == 400

    def test_expired(self, secured: Envd, sandbox_for) -> None:  # type: ignore[no-untyped-def]
        url = sandbox_for(secured, TOKEN).download_url("/tmp/x", use_signature_expiration=-10)
        assert int(url.rpartition("=")[2]) < time.time()
        assert httpx.get(url).json() == {"code": 401, "message": "signature is already expired"}

    def test_missing_and_header(self, secured: Envd) -> None:
        secured.path("/tmp/x").write_text("x")
        target = "/files?path=/tmp/x"
        assert request(secured, "GET", target).json() == {
            "code": 401,
            "message": "missing signature query parameter",
        }
        wrong = request(secured, "GET", target, headers={"X-Access-Token": "no"})
        assert wrong.json()["message"] == "access token present in header but does not match"
        right = request(secured, "GET", target, headers={"X-Access-Token": TOKEN})
        assert right.body == b"x"


def test_files_are_touched_as_root_and_given_to_the_user(envd_open: Envd) -> None:
    """As E2B's envd does: `files.write("/app/x")` works for a user who may not make `/app`."""
    secret = envd_open.path(SECRET)
    secret.write_text("secret")
    os.symlink(SECRET, envd_open.path("/home/user/link"))
    for query in ("", "&username=nobody", "&username=root"):
        answer = request(envd_open, "GET", "/files?path=/home/user/link" + query)
        assert (answer.status, answer.body) == (200, b"secret")
    octets = {"Content-Type": "application/octet-stream"}
    envd_open.path("/etc/mine").write_text("root's own")
    for path in ("/app/new/file", f"{ROOT_HOME}/new", "/etc/mine"):
        answer = request(envd_open, "POST", f"/files?path={path}", b"x", octets)
        assert answer.status == 200, path
        status = envd_open.path(path).stat()
        assert (status.st_uid, status.st_gid, status.st_size) == (1000, 1000, 1), path
    for path in ("/app", "/app/new"):
        status = envd_open.path(path).stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1000, 1000, 0o755)
    assert envd_open.path(ROOT_HOME).stat().st_uid == 0
    made = unary(envd_open, "filesystem.Filesystem/MakeDir", {"path": "/srv/a/b"})
    assert made.json()["entry"]["owner"] == "user"
    moved = unary(
        envd_open,
        "filesystem.Filesystem/Move",
        {"source": f"{ROOT_HOME}/secret", "destination": "/opt/d/secret"},
    )
    assert (moved.status, moved.json()["entry"]["owner"]) == (200, "root")
    owners = [envd_open.path(path).stat().st_uid for path in ("/srv", "/srv/a", "/opt", "/opt/d")]
    assert owners == [1000] * 4
    assert unary(envd_open, "filesystem.Filesystem/Remove", {"path": "/opt"}).status == 200
    # What no root may do is still told as such.
    answer = request(envd_open, "POST", "/files?path=/usr/new", b"x", octets)
    assert answer.status == 403


def test_a_file_of_another_user_in_tmp_is_written_in_place(envd_open: Envd) -> None:
    octets = {"Content-Type": "application/octet-stream"}
    path = envd_open.path("/tmp/theirs")
    path.write_text("theirs")
    os.chown(path, 65534, 65534)
    os.symlink("/tmp/target", envd_open.path("/tmp/dangling"))
    for name in ("theirs", "dangling"):
        answer = request(envd_open, "POST", f"/files?path=/tmp/{name}", b"x", octets)
        assert answer.status == 200, answer.body
    assert envd_open.path("/tmp/target").read_text() == path.read_text() == "x"


def test_accounts_that_appear_later_and_images_without_any(tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("bare")
    with running_envd(folder, etc={"passwd": "", "group": ""}) as bare:
        with Stream(bare, "process.Process/Start", shell("echo $USER $HOME; id -u")) as stream:
            assert stream.output() == b"root /root\n0\n"
        assert init(bare, {"defaultUser": "user"}) == 204
        with Stream(bare, "process.Process/Start", shell("id -u")) as stream:
            assert stream.output() == b"0\n"
        headers = {"Authorization": "Basic dXNlcjo="}
        with Stream(bare, "process.Process/Start", shell("id -u"), headers) as stream:
            assert list(stream) == []
            assert stream.end["error"]["code"] == "unauthenticated"
        bare.path("/etc/passwd").write_text("late:x:7:7::/tmp:/bin/sh\n")
        headers = {"Authorization": "Basic bGF0ZTo="}
        with Stream(bare, "process.Process/Start", shell("id -u; pwd"), headers) as stream:
            assert stream.output() == b"7\n/tmp\n"


@pytest.mark.parametrize("number", ["4294967295", "9999999999"])
def test_a_number_that_is_no_user_makes_no_account(number: str, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    passwd = f"root:x:0:0::/:/bin/sh\nodd:x:{number}:0::/tmp:/bin/sh\n"
    with running_envd(tmp_path_factory.mktemp("odd"), etc={"passwd": passwd, "group": ""}) as odd:
        octets = {"Content-Type": "application/octet-stream"}
        answer = request(odd, "POST", "/files?path=/tmp/d/x&username=odd", b"x", octets)
        assert answer.status == 401
        assert not odd.path("/tmp/d").exists()
        headers = {"Authorization": "Basic b2RkOg=="}
        with Stream(odd, "process.Process/Start", shell("id -u"), headers) as stream:
            assert list(stream) == []
            assert stream.end["error"]["code"] == "unauthenticated"
