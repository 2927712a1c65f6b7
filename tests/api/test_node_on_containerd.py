"""noded's verbs on a real containerd; the runtime is runc and envd a stand-in.

What runs in the sandbox does not matter here: the order of containerd's calls, the labels, what is
left behind and what a second noded makes of it do.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from own_netns import own_netns
from real_containerd import RealContainerd, real_containerd
from stand_in_images import BROKEN, GOOD, REFUSES, SILENT, STARTS, import_stand_ins

from vmcell_api.config import ApiConfig
from vmcell_api.egress import CLOSED, OPEN, Egress
from vmcell_api.identifiers import new_sandbox_id
from vmcell_api.node import door
from vmcell_api.node import node as node_module
from vmcell_api.node.__main__ import build_node
from vmcell_api.node.build import SandboxRequest
from vmcell_api.node.node import Node
from vmcell_api.node.sandbox import END_LABEL, STATE_LABEL
from vmcell_api.node_channel import NodeUnreachable
from vmcell_api.node_client import NewSandbox, NodeClient
from vmcell_api.volumes.names import VolumeMount, new_volume_id
from vmcell_protos.errors import CallerError, HostError, VmcellError

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def containerd() -> Iterator[RealContainerd]:
    folder = Path(tempfile.mkdtemp(prefix="vmc"))
    with own_netns(), real_containerd(folder) as running:
        for number in range(1, 4):
            subprocess.run(
                f"ip addr add 10.88.0.{2 * number + 1}/32 dev lo", shell=True, check=True
            )
        import_stand_ins(running)
        yield running


@pytest.fixture
def config(containerd: RealContainerd, tmp_path: Path) -> ApiConfig:
    return ApiConfig(
        containerd_socket=containerd.socket,
        runtime="io.containerd.runc.v2",
        state_dir=str(tmp_path / "run"),
        volumes_dir=str(tmp_path / "volumes"),
        snapshot_dir=str(tmp_path / "snapshots"),
        template_snapshots=0,
        node_socket=str(tmp_path / "noded.sock"),
        slot_count=3,
        start_timeout_s=30,
        api_uid=os.geteuid(),
    )


@pytest.fixture
def node(config: ApiConfig, containerd: RealContainerd) -> Iterator[Node]:
    """An opened node; whatever the test left is killed and must leave nothing."""
    opened = build_node(config)
    opened.open()
    try:
        yield opened
        for sandbox in opened.list():
            opened.kill(sandbox.sandbox_id)
        _nothing_left(opened, containerd, config)
    finally:
        opened.close()
        opened.slots.close_all()


def _nothing_left(node: Node, containerd: RealContainerd, config: ApiConfig) -> None:
    assert not any(containerd.traces().values()), containerd.traces()
    assert node.slots.free_count == 3
    folder = Path(config.state_dir, ".noded")
    assert not folder.exists() or not list(folder.iterdir())


def _request(**options: object) -> SandboxRequest:
    values = {
        "sandbox_id": new_sandbox_id(),
        "template_id": "good",
        "image": GOOD,
        "vcpus": 1,
        "memory_mib": 128,
        "timeout_ms": 60_000,
        "environment": {"COLOUR": "red"},
        "access_token": "secret-token",
        "default_user": "user",
    }
    return SandboxRequest(**{**values, **options})  # type: ignore[arg-type]  # test values


def _wait_until(what: object, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():  # type: ignore[operator]  # a callable
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.02)


def test_create_list_kill(node: Node, containerd: RealContainerd, config: ApiConfig) -> None:
    request = _request()
    sandbox = node.create(request)
    assert sandbox.address == "10.88.0.3"
    assert node.list() == [sandbox]
    assert node.get(request.sandbox_id) == sandbox
    assert containerd.traces()["leases"] == []
    info = json.loads(containerd.ctr("containers", "info", request.sandbox_id))
    assert info["Labels"][STATE_LABEL] == "running"
    assert info["Labels"][END_LABEL] == str(sandbox.end_at_unix_ms)
    assert "secret-token" not in json.dumps(info)
    annotations = info["Spec"]["annotations"]
    assert annotations["io.vmcell.net.address"] == "10.88.0.3/31"
    assert annotations["io.vmcell.net.tap"] == "vmc1"
    pid = containerd.ctr("tasks", "list").splitlines()[1].split()[1]
    root = Path("/proc", pid, "root")
    told = json.loads((root / "init.json").read_text())
    assert told["accessToken"] == "secret-token"
    assert told["envVars"]["COLOUR"] == "red"
    assert told["envVars"]["E2B_SANDBOX_ID"] == request.sandbox_id
    assert (root / "etc/resolv.conf").read_text() == "nameserver 8.8.8.8\nnameserver 1.1.1.1\n"
    assert (root / "etc/hostname").read_text().strip() == request.sandbox_id
    environment = Path("/proc", pid, "environ").read_bytes().split(b"\0")
    assert b"FROM_IMAGE=yes" in environment
    node.kill(request.sandbox_id)
    _nothing_left(node, containerd, config)
    with pytest.raises(CallerError, match="was not found") as caught:
        node.kill(request.sandbox_id)
    assert caught.value.code == "not_found"


def test_an_unknown_image_says_how_to_get_it(node: Node) -> None:
    with pytest.raises(CallerError, match="import") as caught:
        node.create(_request(image="docker.io/no/such:1"))
    assert caught.value.code == "not_found"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start_command": "serve"}, "template did not start"),
        ({"ready_command": "check"}, "template did not start"),
        ({"image": BROKEN}, "envd"),
        ({"image": REFUSES}, "500"),
        ({"runtime": "x.none.v2"}, "none"),
    ],
)
def test_a_failed_create_leaves_nothing(
    containerd: RealContainerd, config: ApiConfig, options: dict[str, str], words: str
) -> None:
    options = dict(options)
    runtime = options.pop("runtime", config.runtime)
    node = build_node(replace(config, runtime=runtime))
    node.open()
    try:
        request = _request(**options)
        with pytest.raises(VmcellError, match=words):
            node.create(request)
        assert node.list() == []
        _nothing_left(node, containerd, config)
        with pytest.raises(CallerError):
            node.get(request.sandbox_id)
    finally:
        node.close()
        node.slots.close_all()


def test_slots_run_out_and_come_back(node: Node) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: _attempt(node), range(4)))
    errors = [result for result in results if isinstance(result, HostError)]
    assert [error.code for error in errors] == ["resource_exhausted"]
    first = node.list()[0]
    node.kill(first.sandbox_id)
    assert node.create(_request()).slot_number == first.slot_number


def _attempt(node: Node) -> object:
    try:
        return node.create(_request())
    except HostError as error:
        return error


def test_two_kills_have_one_winner(node: Node) -> None:
    sandbox_id = node.create(_request()).sandbox_id
    barrier = threading.Barrier(4)

    def kill(_: int) -> str:
        barrier.wait(10)
        try:
            node.kill(sandbox_id)
        except CallerError as error:
            return error.code
        return "killed"

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(kill, range(4))) == ["killed", *["not_found"] * 3]


def test_a_deadline_kills(node: Node) -> None:
    sandbox_id = node.create(_request(timeout_ms=60_000)).sandbox_id
    extended = node.set_deadline(sandbox_id, 1000, only_extend=True)
    assert extended.end_at_unix_ms > time.time() * 1000 + 30_000
    started = time.monotonic()
    node.set_deadline(sandbox_id, 1000, only_extend=False)
    _wait_until(lambda: not node.list())
    assert 0.9 < time.monotonic() - started < 10
    _wait_until(lambda: node.slots.free_count == 3)
    with pytest.raises(CallerError):
        node.set_deadline(sandbox_id, 1000, only_extend=False)


def test_a_timeout_of_nothing_ends_it_at_once(node: Node) -> None:
    sandbox_id = node.create(_request()).sandbox_id
    node.set_deadline(sandbox_id, 0, only_extend=False)
    _wait_until(lambda: not node.list())
    _wait_until(lambda: node.slots.free_count == 3)


def test_a_task_that_dies_is_cleaned_up(node: Node, containerd: RealContainerd) -> None:
    sandbox_id = node.create(_request()).sandbox_id
    containerd.ctr("tasks", "kill", "-s", "SIGKILL", sandbox_id)
    _wait_until(lambda: not node.list())
    _wait_until(lambda: not any(containerd.traces().values()))


def test_a_machine_that_dies_in_a_create_ends_the_create(
    node: Node, containerd: RealContainerd, config: ApiConfig
) -> None:
    """A lost machine says nothing any more: its end must be seen before the 30 s are over."""
    request = _request(image=SILENT)
    with ThreadPoolExecutor(1) as pool:
        creating = pool.submit(node.create, request)
        _wait_until(lambda: "RUNNING" in containerd.ctr("tasks", "list"))
        with _nothing_comes_from("10.88.0.3"):
            containerd.ctr("tasks", "kill", "-s", "SIGKILL", request.sandbox_id)
            with pytest.raises(HostError, match="ended"):
                creating.result(10)
    _nothing_left(node, containerd, config)


@contextlib.contextmanager
def _nothing_comes_from(address: str) -> Iterator[None]:
    rules = "add table ip lost; add chain ip lost out { type filter hook output priority 0; }; "
    subprocess.run(["nft", f"{rules} add rule ip lost out ip saddr {address} drop"], check=True)
    try:
        yield
    finally:
        subprocess.run(["nft", "delete table ip lost"], check=True)


def test_a_stepped_clock_neither_shortens_nor_keeps_from_extending(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox_id = node.create(_request(timeout_ms=600_000)).sandbox_id
    now = node_module.unix_ms_now
    monkeypatch.setattr(node_module, "unix_ms_now", lambda: now() + 3_600_000)
    node.set_deadline(sandbox_id, 1000, only_extend=True)
    monkeypatch.setattr(node_module, "unix_ms_now", lambda: now() - 3_600_000)
    moved = node.set_deadline(sandbox_id, 900_000, only_extend=True)
    assert abs(moved.end_at_unix_ms - (now() - 2_700_000)) < 10_000
    monkeypatch.undo()
    again = node.set_deadline(sandbox_id, 800_000, only_extend=True)
    assert again == moved, "900 s were left: nothing to extend"


def test_a_shim_that_is_slow_to_answer_is_no_dead_sandbox(
    containerd: RealContainerd, config: ApiConfig
) -> None:
    """containerd lists a task whose shim did not answer within 2 s as UNKNOWN."""
    first = build_node(config)
    first.open()
    sandbox_id = first.create(_request()).sandbox_id
    first.close()
    shim = _shim_of(sandbox_id)
    second = build_node(config)
    os.kill(shim, signal.SIGSTOP)
    try:
        second.open()
    finally:
        os.kill(shim, signal.SIGCONT)
    try:
        assert [sandbox.sandbox_id for sandbox in second.list()] == [sandbox_id]
        second.kill(sandbox_id)
        _nothing_left(second, containerd, config)
    finally:
        second.close()
        second.slots.close_all()


def _shim_of(sandbox_id: str) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"shim-runc-v2") and sandbox_id.encode() in words:
                    return int(entry.name)
    raise AssertionError(f"no shim of {sandbox_id}")


def test_rules_are_kept_by_the_next_noded(containerd: RealContainerd, config: ApiConfig) -> None:
    rules = Egress(allow_out=("1.1.1.1",), deny_out=("0.0.0.0/0", "::/0"))
    first = build_node(config)
    first.open()
    made = first.create(_request(egress=CLOSED))
    assert first.set_egress(made.sandbox_id, rules).egress == rules
    first.close()
    second = build_node(config)
    second.open()
    try:
        assert [sandbox.egress for sandbox in second.list()] == [rules]
        table = subprocess.run(
            ["nft", "list", "chain", "inet", "vmcell", "rules_vmc1"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "1.1.1.1" in table
        second.set_egress(made.sandbox_id, OPEN)
        assert second.get(made.sandbox_id).egress == OPEN
        info = json.loads(containerd.ctr("containers", "info", made.sandbox_id))
        assert not info["Labels"].get("io.vmcell.deny-out")
        second.kill(made.sandbox_id)
        with pytest.raises(CallerError, match="was not found"):
            second.set_egress(made.sandbox_id, rules)
        _nothing_left(second, containerd, config)
    finally:
        second.close()
        second.slots.close_all()


def test_rules_that_cannot_be_written_are_not_in_force(
    node: Node, containerd: RealContainerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = node.create(_request(egress=CLOSED))

    def refuse(*_: object) -> None:
        raise HostError("containerd does not take labels")

    with monkeypatch.context() as patch:
        patch.setattr(node.containerd, "set_labels", refuse)
        with pytest.raises(HostError, match="labels"):
            node.set_egress(made.sandbox_id, OPEN)
    assert node.get(made.sandbox_id).egress == CLOSED
    egress = subprocess.run(
        ["nft", "list", "map", "inet", "vmcell", "egress"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert '"vmc1"' not in egress


def test_only_one_noded_of_a_socket(config: ApiConfig) -> None:
    with (
        door.only_one(config.node_socket),
        pytest.raises(HostError, match="another noded"),
        door.only_one(config.node_socket),
    ):
        pass
    with door.only_one(config.node_socket):
        pass


def test_the_same_id_twice(node: Node) -> None:
    request = _request()
    node.create(request)
    with pytest.raises(CallerError) as caught:
        node.create(request)
    assert caught.value.code == "already_exists"
    assert len(node.list()) == 1


def test_a_new_noded_adopts_and_settles(containerd: RealContainerd, config: ApiConfig) -> None:
    """What lives goes on, what expired, died or was half made is removed."""
    node = build_node(config)
    node.open()
    kept, expired, half = (node.create(_request()).sandbox_id for _ in range(3))
    node.close()
    containerd.ctr("containers", "label", expired, f"{END_LABEL}=1000")
    containerd.ctr("containers", "label", half, f"{STATE_LABEL}=creating")
    containerd.ctr("leases", "create", "--id", f"vmcell-create-{new_sandbox_id()}")
    lines = containerd.ctr("snapshots", "list").splitlines()
    chain = next(line.split()[0] for line in lines if line.split()[-1] == "Committed")
    containerd.ctr("snapshots", "prepare", "foreign", chain)
    Path(config.state_dir, ".noded", new_sandbox_id()).mkdir()
    second = build_node(config)
    second.open()
    try:
        assert [sandbox.sandbox_id for sandbox in second.list()] == [kept]
        assert second.slots.free_count == 2
        traces = containerd.traces()
        assert traces["containers"] == [kept]
        assert traces["tasks"] == [kept]
        assert traces["leases"] == []
        assert sorted(line.split()[0] for line in traces["snapshots"]) == sorted([kept, "foreign"])
        containerd.ctr("snapshots", "remove", "foreign")
        second.kill(kept)
        _nothing_left(second, containerd, config)
    finally:
        second.close()
        second.slots.close_all()


def test_a_noded_killed_in_the_middle_of_a_create(
    containerd: RealContainerd, config: ApiConfig, tmp_path: Path
) -> None:
    """envd that never answers holds the create; SIGKILL there, and the next noded cleans up."""
    settings = tmp_path / "api.toml"
    rows = (
        *("containerd_socket", "runtime", "state_dir", "volumes_dir", "node_socket", "slot_count"),
        "api_uid",
    )
    settings.write_text("".join(f"{row} = {json.dumps(getattr(config, row))}\n" for row in rows))
    log = tmp_path / "noded.log"
    with log.open("wb") as output:
        noded = subprocess.Popen(
            [sys.executable, "-m", "vmcell_api.node"],
            env={**os.environ, "VMCELL_API_CONFIG": str(settings)},
            stderr=output,
        )
    client = NodeClient(config.node_socket, create_timeout_s=60)
    try:
        _wait_until(lambda: noded.poll() is not None or os.path.exists(config.node_socket))
        assert noded.poll() is None, log.read_text()
        with ThreadPoolExecutor(1) as pool:
            order = NewSandbox(
                sandbox_id=new_sandbox_id(),
                template_id="t",
                image=SILENT,
                vcpus=1,
                memory_mib=128,
                timeout_s=60,
            )
            creating = pool.submit(client.create, order)
            _wait_until(lambda: "RUNNING" in containerd.ctr("tasks", "list"))
            noded.kill()
            noded.wait(10)
            with pytest.raises(NodeUnreachable):
                creating.result(20)
    finally:
        noded.kill()
        noded.wait(10)
        client.close()
    assert containerd.traces()["containers"] == [order.sandbox_id]
    second = build_node(config)
    second.open()
    try:
        assert second.list() == []
        _nothing_left(second, containerd, config)
    finally:
        second.close()
        second.slots.close_all()


def test_the_door(node: Node, config: ApiConfig) -> None:
    server = door.serve(door.Door(node, disk_mib=77), config.node_socket, owner_uid=config.api_uid)
    client = NodeClient(config.node_socket, create_timeout_s=60)
    try:
        status = os.stat(config.node_socket)
        assert status.st_mode & 0o777 == 0o660
        order = NewSandbox(
            sandbox_id=new_sandbox_id(),
            template_id="good",
            image=GOOD,
            vcpus=2,
            memory_mib=128,
            timeout_s=60,
            egress=CLOSED,
        )
        running = client.create(order)
        assert (running.disk_mib, running.vcpus, running.egress) == (77, 2, CLOSED)
        assert client.list() == [running]
        assert client.get(order.sandbox_id) == running
        moved = client.set_deadline(order.sandbox_id, 600, only_extend=True)
        assert moved.end_at_unix_ms > running.end_at_unix_ms
        for bad in ({"sandbox_id": "../../etc"}, {"vcpus": 0}, {"vcpus": 99}, {"memory_mib": 1},
                    {"environment": {"A=B": "c"}}, {"image": ""}, {"timeout_s": 0}):  # fmt: skip
            with pytest.raises(CallerError) as caught:
                client.create(replace(order, **{"sandbox_id": new_sandbox_id(), **bad}))
            assert caught.value.code == "invalid_argument", bad
        client.kill(order.sandbox_id)
        with pytest.raises(CallerError) as caught:
            client.kill(order.sandbox_id)
        assert caught.value.code == "not_found"
    finally:
        client.close()
        server.stop(0).wait()
    with pytest.raises(NodeUnreachable):
        NodeClient(config.node_socket, create_timeout_s=1).list()


def test_volumes(node: Node, config: ApiConfig, containerd: RealContainerd) -> None:
    server = door.serve(door.Door(node, disk_mib=1), config.node_socket, owner_uid=config.api_uid)
    client = NodeClient(config.node_socket, create_timeout_s=60)
    volume_id = new_volume_id()
    folder = Path(config.volumes_dir, "data", volume_id)
    mounts = tuple(
        VolumeMount(volume_id=volume_id, name="data", path=path) for path in ("/mnt/a b", "/c")
    )
    order = NewSandbox(
        sandbox_id=new_sandbox_id(),
        template_id="good",
        image=GOOD,
        vcpus=1,
        memory_mib=128,
        timeout_s=60,
        volume_mounts=mounts,
    )
    try:
        with pytest.raises(CallerError, match="'data' is not on this node"):
            client.create(order)
        client.make_volume(volume_id)
        (folder / "from-host").write_text("hello")
        assert client.create(order).volume_mounts == mounts
        pid = containerd.ctr("tasks", "list").splitlines()[1].split()[1]
        root = Path("/proc", pid, "root")
        assert (root / "mnt/a b/from-host").read_text() == "hello"
        (root / "c/from-guest").write_text("there")
        assert (folder / "from-guest").read_text() == "there"

        with pytest.raises(CallerError, match=order.sandbox_id) as caught:
            client.remove_volume(volume_id)
        assert caught.value.code == "aborted"
        assert (folder / "from-guest").exists()
        client.kill(order.sandbox_id)
        assert sorted(path.name for path in folder.iterdir()) == ["from-guest", "from-host"]
        client.remove_volume(volume_id)
        client.remove_volume(volume_id)
        assert not folder.exists()
        for bad in ("", "../data", "v" * 21):
            with pytest.raises(CallerError, match="no volume id"):
                client.make_volume(bad)
        for path in ("/proc", "relative", "/a/../b"):
            mount = VolumeMount(volume_id=volume_id, name="data", path=path)
            with pytest.raises(CallerError, match="volumeMounts path"):
                client.create(replace(order, volume_mounts=(mount,)))
    finally:
        client.close()
        server.stop(0).wait()


def test_a_create_that_fails_gives_its_volumes_back(node: Node) -> None:
    volume_id = new_volume_id()
    node.volumes.make(volume_id)
    mount = VolumeMount(volume_id=volume_id, name="data", path="/mnt")
    with pytest.raises(VmcellError):
        node.create(_request(image=BROKEN, volume_mounts=(mount,)))
    node.volumes.remove(volume_id)


def test_a_new_noded_knows_whose_volumes_are_in_use(
    containerd: RealContainerd, config: ApiConfig
) -> None:
    first = build_node(config)
    first.open()
    volume_id = new_volume_id()
    first.volumes.make(volume_id)
    mount = VolumeMount(volume_id=volume_id, name="data", path="/mnt")
    sandbox_id = first.create(_request(volume_mounts=(mount,))).sandbox_id
    first.close()
    second = build_node(config)
    second.open()
    try:
        assert second.get(sandbox_id).volume_mounts == (mount,)
        with pytest.raises(CallerError, match=sandbox_id):
            second.volumes.remove(volume_id)
        second.kill(sandbox_id)
        second.volumes.remove(volume_id)
        _nothing_left(second, containerd, config)
    finally:
        second.close()
        second.slots.close_all()


def test_a_start_command_that_fails_leaves_nothing(
    node: Node, containerd: RealContainerd, config: ApiConfig
) -> None:
    with pytest.raises(HostError, match="the template did not start"):
        node.create(_request(image=STARTS))
    _nothing_left(node, containerd, config)
