"""The builds of a node: queue, log, cancel, what a restart makes of them, and the door to them."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_build import FakeGuest, FakeImages

from vmcell_api.build_client import BuildClient, NewBuild, NewStep
from vmcell_api.node import build_service, door
from vmcell_api.node.build import SandboxRequest
from vmcell_api.node.build_door import BuildDoor
from vmcell_api.node.build_records import BuildRecord
from vmcell_api.node.build_run import BuildRequest
from vmcell_api.node.build_service import BuildService, BuildSettings
from vmcell_api.node.build_steps import Step
from vmcell_protos.errors import CallerError, HostError
from vmcell_protos.pb import node_pb2_grpc

TEAM = str(uuid.uuid4())


@dataclass
class FakeSandboxes:
    """The part of `Node` that builds use; `guest` is behind every sandbox."""

    guest: FakeGuest
    alive: dict[str, SandboxRequest] = field(default_factory=dict)
    killed: list[str] = field(default_factory=list)
    prepared: list[SandboxRequest] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    saves_templates: bool = True

    def create(self, request: SandboxRequest) -> object:
        self.alive[request.sandbox_id] = request
        return SimpleNamespace(address="10.0.0.1")

    def prepare_template(self, request: SandboxRequest) -> None:
        self.prepared.append(request)

    def forget_template(self, image: str) -> None:
        self.forgotten.append(image)

    def kill(self, sandbox_id: str) -> None:
        self.killed.append(sandbox_id)
        if self.alive.pop(sandbox_id, None) is None:
            raise CallerError("was not found", code="not_found")
        self.guest.end()


@dataclass
class Bench:
    service: BuildService
    sandboxes: FakeSandboxes
    images: FakeImages
    guest: FakeGuest
    folder: Path

    def state(self, build_id: str) -> str:
        return self.service.get(build_id, 0, 1000).status

    def ended(self, build_id: str) -> str:
        """How it ended, waited for."""
        _wait_until(lambda: self.state(build_id) in ("ready", "error"))
        return self.state(build_id)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.01)


def _settings(folder: Path) -> BuildSettings:
    return BuildSettings(
        build_dir=str(folder / "builds"),
        upload_dir=str(folder / "uploads"),
        upload_uid=os.geteuid(),
        places=1,
        timeout_s=60,
        layer_limit_mib=1,
    )


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    guest, images = FakeGuest(), FakeImages()
    sandboxes = FakeSandboxes(guest)
    monkeypatch.setattr(build_service, "GuestProcesses", lambda address, token: guest)
    service = BuildService(sandboxes, images, _settings(tmp_path))  # type: ignore[arg-type]  # fakes
    service.open()
    yield Bench(service, sandboxes, images, guest, tmp_path)
    service.close()
    assert sandboxes.alive == {}
    assert images.leases == []


def _request(*commands: str) -> BuildRequest:
    return BuildRequest(
        build_id=str(uuid.uuid4()),
        team_id=TEAM,
        template_id="t" * 20,
        from_image="debian:12",
        steps=tuple(Step(type="RUN", args=(command,)) for command in commands),
    )


def test_a_build_runs_in_a_builders_sandbox_and_is_kept(bench: Bench) -> None:
    request = _request("make")
    bench.service.start(request)
    assert bench.ended(request.build_id) == "ready"
    view = bench.service.get(request.build_id, 1, 1)
    assert view.result is not None
    assert view.result.image == f"vmcell.local/build/{request.build_id}"
    assert len(view.entries) == 1
    (killed,) = set(bench.sandboxes.killed)
    assert len(killed) == 20
    with pytest.raises(HostError, match="exists"):
        bench.service.start(request)
    (prepared,) = bench.sandboxes.prepared
    assert prepared.image == view.result.image
    assert (prepared.default_user, prepared.start_command) == (view.result.default_user, "")
    bench.service.remove(request.build_id)
    bench.service.remove(request.build_id)
    assert bench.sandboxes.forgotten[0] == view.result.image
    with pytest.raises(CallerError, match="was not found"):
        bench.service.get(request.build_id, 0, 1)
    assert bench.images.published == {}


def test_a_template_that_cannot_be_saved_is_ready_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: SandboxRequest) -> None:
        raise HostError("all slots are in use")

    monkeypatch.setattr(bench.sandboxes, "prepare_template", fail)
    request = _request("make")
    bench.service.start(request)
    assert bench.ended(request.build_id) == "ready"


def test_what_cannot_be_built_leaves_nothing(bench: Bench) -> None:
    for wrong in (
        replace(_request("make"), from_image="--help me"),
        replace(_request("make"), from_image="vmcell.local/cache/x"),
        replace(_request(""), team_id=TEAM),
    ):
        with pytest.raises(CallerError):
            bench.service.start(wrong)
    assert not (bench.folder / "builds").exists()


def test_builds_wait_for_a_place_and_can_be_cancelled(bench: Bench) -> None:
    first, second = _request("hang"), _request("make")
    bench.service.start(first)
    assert bench.guest.running.wait(30)
    bench.service.start(second)
    assert bench.state(first.build_id) == "building"
    assert bench.state(second.build_id) == "waiting"
    bench.service.cancel(second.build_id)
    bench.service.cancel(first.build_id)
    for request in (first, second):
        assert bench.ended(request.build_id) == "error"
        result = bench.service.get(request.build_id, 0, 0).result
        assert result is not None
        assert result.reason_message == "the build was cancelled"
    bench.service.cancel(first.build_id)


def test_the_queue_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_service, "MAX_LIVE", 1)
    bench.service.start(_request("hang"))
    with pytest.raises(CallerError, match="1 builds") as caught:
        bench.service.start(_request("make"))
    assert caught.value.code == "resource_exhausted"


def test_removing_a_template_ends_its_build(bench: Bench) -> None:
    request = _request("hang")
    bench.service.start(request)
    assert bench.guest.running.wait(30)
    bench.service.remove(request.build_id)
    assert bench.sandboxes.alive == {}
    with pytest.raises(CallerError):
        bench.service.get(request.build_id, 0, 1)


def test_an_end_of_noded_ends_builds_with_a_word(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = _request("hang")
    bench.service.start(request)
    assert bench.guest.running.wait(30)
    bench.service.close()
    record = BuildRecord(bench.folder / "builds" / request.build_id)
    result, _ = record.result() or pytest.fail("no result")
    assert result.reason_message == "the build was cancelled"
    with pytest.raises(HostError, match="ending"):
        bench.service.start(_request("make"))


def test_a_build_that_died_with_noded_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "builds"
    dead = str(uuid.uuid4())
    BuildRecord(folder / dead).create("idead000000000000000")
    (folder / str(uuid.uuid4())).mkdir()  # died before its first file was there
    sandboxes, images = FakeSandboxes(FakeGuest()), FakeImages()
    sandboxes.alive["idead000000000000000"] = SimpleNamespace()  # type: ignore[assignment]  # any
    images.leases = ["of-a-dead-build"]
    service = BuildService(sandboxes, images, _settings(tmp_path))  # type: ignore[arg-type]  # fakes
    service.open()
    view = service.get(dead, 0, 10)
    assert view.status == "error"
    assert "restarted" in view.entries[-1].message
    assert sandboxes.alive == {}
    assert images.leases == []
    service.close()


def test_the_door_carries_a_build_there_and_back(bench: Bench, tmp_path: Path) -> None:
    socket_path = str(tmp_path / "noded.sock")
    server = door.serve(
        node_pb2_grpc.NodeServicer(),
        socket_path,
        owner_uid=os.geteuid(),
        builds=BuildDoor(bench.service),
    )
    client = BuildClient(socket_path)
    try:
        bench.guest.answers["make"] = (2, "no rule\n")
        build = NewBuild(
            build_id=str(uuid.uuid4()),
            team_id=TEAM,
            template_id="t" * 20,
            from_image="debian:12",
            steps=[NewStep(type="RUN", args=["make"])],
        )
        client.start(build)
        assert bench.ended(build.build_id) == "error"
        state = client.get(build.build_id, offset=0, limit=100)
        assert (state.status, state.reason_step) == ("error", "1")
        assert "no rule" in state.reason_message
        assert state.reason_entries[-1].step == "1"
        assert client.cancel(build.build_id).status == "error"
        client.remove(build.build_id)
        with pytest.raises(CallerError) as caught:
            client.get(build.build_id, offset=0, limit=1)
        assert caught.value.code == "not_found"
        for wrong in ({"build_id": "../x"}, {"team_id": "x"}, {"vcpus": 99}, {"from_image": ""}):
            with pytest.raises(CallerError):
                client.start(replace(build, **wrong))  # type: ignore[arg-type]  # wrong on purpose
    finally:
        client.close()
        server.stop(0).wait()
