"""Devices that come after boot, against a sysfs made of plain files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from agent_harness import AgentUnderTest, container_spec, process_spec
from hypothesis import given
from hypothesis import strategies as st

from vmcell_agent import windows
from vmcell_agent.errand import Errands
from vmcell_agent.eventloop import Loop
from vmcell_agent.windows import Windows
from vmcell_protos import agent as messages
from vmcell_protos.errors import CallerError, HostError, VmcellError

BLOCK, PMEM, VSOCK = "0x0002\n", "0x001b\n", "0x0013\n"
PMEM_PATH = "ndbus0/region0/namespace0.0/block/pmem2"


class FakeSysfs:
    """`/sys` and `/dev` in `directory`, with window 3 there and without a driver."""

    def __init__(self, directory: Path) -> None:
        self.sys = directory / "sys"
        self.dev = directory / "devices"
        self.platform = self.sys / "devices/virtio-mmio-cmdline/virtio-mmio.3"
        self.driver = self.sys / "bus/platform/drivers/virtio-mmio"
        for path in (self.platform, self.driver, self.sys / "bus/platform/devices", self.dev):
            path.mkdir(parents=True, exist_ok=True)
        (self.driver / "bind").touch()
        (self.driver / "unbind").touch()
        (self.sys / "bus/platform/devices/virtio-mmio.3").symlink_to(self.platform)

    def appear(self, kind: str, path: str, *, node: bool = True) -> None:
        """What the kernel makes of a bound window: a virtio device of `kind`, a disk at `path`."""
        virtio = self.platform / "virtio5"
        (virtio / path).mkdir(parents=True)
        (virtio / "device").write_text(kind)
        (self.platform / "driver").symlink_to(self.driver)
        if node:
            self.make_node(os.path.basename(path))

    def make_node(self, name: str) -> None:
        (self.dev / name).touch()

    def said(self, file: str) -> str:
        return (self.driver / file).read_text()


class Bench:
    """A loop, its children reaped by the test, and the answers so far."""

    def __init__(self, sysfs: FakeSysfs) -> None:
        self.loop = Loop()
        self.sysfs = sysfs
        self.pids: list[int] = []
        self.windows = Windows(
            self.loop,
            Errands(self.loop, self),  # type: ignore[arg-type]
            str(sysfs.sys),
            str(sysfs.dev),
        )
        self.answers: list[str | VmcellError | None] = []

    def expect(self, pid: int, ended: Callable[[int], None]) -> None:
        self.pids.append(pid)

    def take(self, answer: str | VmcellError | None) -> None:
        self.answers.append(answer)
        self.loop.stop()

    def turn(self) -> str | VmcellError | None:
        """Run until the next answer."""
        before = len(self.answers)
        deadline = self.loop.call_later(10, self.loop.stop)
        self.loop.run()
        deadline.cancel()
        assert len(self.answers) == before + 1
        return self.answers[-1]

    def close(self) -> None:
        for pid in self.pids:
            os.waitpid(pid, 0)
        self.loop.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(FakeSysfs(tmp_path))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("kind", "path", "name"),
    [(BLOCK, "block/vdb", "vdb"), (BLOCK, "block/vdaa", "vdaa"), (PMEM, PMEM_PATH, "pmem2")],
)
def test_the_name_comes_from_below_the_platform_device(
    bench: Bench, kind: str, path: str, name: str
) -> None:
    other = bench.sysfs.platform.parent / "virtio-mmio.2/virtio4/block/vda"
    other.mkdir(parents=True)
    bench.windows.attach(3, bench.take)
    bench.loop.call_later(0.05, lambda: bench.sysfs.appear(kind, path, node=False))
    bench.loop.call_later(0.1, lambda: bench.sysfs.make_node(name))
    start = time.monotonic()
    assert bench.turn() == name
    assert time.monotonic() - start >= 0.1  # its node is waited for
    assert bench.sysfs.said("bind") == "virtio-mmio.3"


def test_pmem_comes_in_steps(bench: Bench) -> None:
    virtio = bench.sysfs.platform / "virtio5"
    steps = PMEM_PATH.split("/")
    for number in range(len(steps)):
        step = virtio.joinpath(*steps[: number + 1])
        bench.loop.call_later(0.02 * number, lambda step=step: step.mkdir(parents=True))  # type: ignore[misc]
    for other in ("btt0.0", "pfn0.0", "dax0.0"):
        path = virtio / "ndbus0/region0" / other / "block/pmem7"
        bench.loop.call_later(0.05, lambda path=path: path.mkdir(parents=True))  # type: ignore[misc]
    bench.sysfs.make_node("pmem2")
    bench.sysfs.make_node("pmem7")
    bench.windows.attach(3, bench.take)
    assert bench.turn() == "pmem2"


def test_a_device_that_never_appears_leaves_no_driver(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "APPEAR_SECONDS", 0.1)
    bench.sysfs.appear(VSOCK, "nothing", node=False)
    bench.windows.attach(3, bench.take)
    error = bench.turn()
    assert isinstance(error, HostError)
    assert str(error) == "window 3: no disk appeared within 0.1 s; there is virtio5"
    assert error.code == "deadline_exceeded"
    assert bench.sysfs.said("unbind") == "virtio-mmio.3"
    bench.windows.attach(3, bench.take)  # it can be asked for again
    bench.turn()


def test_the_loop_goes_on_while_a_driver_hangs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "DRIVER_SECONDS", 0.3)
    (bench.sysfs.driver / "bind").unlink()
    os.mkfifo(bench.sysfs.driver / "bind")  # who writes waits for a reader, as for a device
    turns: list[float] = []

    def turn() -> None:
        turns.append(time.monotonic())
        bench.loop.call_later(0.01, turn)

    turn()
    bench.windows.attach(3, bench.take)
    with pytest.raises(CallerError, match="window 3 is being attached or detached"):
        bench.windows.attach(3, bench.take)
    with pytest.raises(CallerError, match="window 3 is being attached or detached"):
        bench.windows.detach(3, bench.take)
    error = bench.turn()
    assert str(error) == "bind window 3: not done within 0.3 s"
    assert len(turns) > 10


def test_what_cannot_be_attached(bench: Bench) -> None:
    for window in (4, 0, 256, (1 << 32) - 1):
        for call in (bench.windows.attach, bench.windows.detach):
            with pytest.raises(CallerError, match=f"no virtio-mmio window {window}") as error:
                call(window, bench.take)
            assert error.value.code == "not_found"
    bench.sysfs.appear(BLOCK, "block/vdb")
    with pytest.raises(CallerError, match="has its driver already: it is vdb") as error:
        bench.windows.attach(3, bench.take)
    assert error.value.code == "already_exists"


def test_a_kernel_that_refuses_is_quoted(bench: Bench) -> None:
    (bench.sysfs.driver / "bind").unlink()
    bench.windows.attach(3, bench.take)
    error = bench.turn()
    assert isinstance(error, HostError)
    assert str(error).endswith("drivers/virtio-mmio/bind: No such file or directory")


def test_detach_takes_the_driver_off_a_disk(bench: Bench) -> None:
    bench.windows.detach(3, bench.take)
    assert bench.turn() is None
    assert bench.sysfs.said("unbind") == ""  # there was no driver
    bench.sysfs.appear(PMEM, PMEM_PATH)
    bench.windows.detach(3, bench.take)
    assert bench.turn() is None
    assert bench.sysfs.said("unbind") == "virtio-mmio.3"


def test_only_disks_are_detached(bench: Bench) -> None:
    bench.sysfs.appear(VSOCK, "nothing", node=False)
    bench.windows.detach(3, bench.take)
    assert str(bench.turn()) == "window 3 holds a virtio device of type 19; only disks are detached"
    assert bench.sysfs.said("unbind") == ""


@given(
    st.dictionaries(
        st.sampled_from(
            ["virtio5/block", "virtio5/block/vdb", "virtio5/device", "virtio5", "virtio5/block/sda",
             "virtio6/ndbus1/region1/namespace1.0/block/pmem1", "driver", "virtio6/device"]
        ),
        st.binary(max_size=8),
        max_size=4,
    )
)  # fmt: skip
def test_a_strange_tree_is_refused_or_named(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    sysfs = FakeSysfs(tmp_path_factory.mktemp("sysfs"))
    for path, content in files.items():
        place = sysfs.platform / path
        if not place.exists() and not any(parent.is_file() for parent in place.parents):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    names = windows._disks(str(sysfs.platform))
    assert set(names) <= {"vdb", "pmem1"}
    bus = f"{sysfs.sys}/bus/platform"
    with suppress(VmcellError, ValueError):  # a child's ValueError is told as "internal"
        assert windows._release(bus, str(sysfs.platform), str(sysfs.dev), 3) == b""


@pytest.mark.root
def test_a_mounted_disk_is_not_detached(agent: AgentUnderTest) -> None:
    sysfs = FakeSysfs(agent.directory)
    sysfs.appear(BLOCK, "block/vda", node=False)  # its node is the loop device of the container
    request = messages.DetachDeviceRequest(window=3)
    init = agent.create(container_spec(process_spec("sleep", "1000"))).start()
    with pytest.raises(VmcellError, match=r"vda is mounted \(EBUSY\); remove the cont") as error:
        agent.client.call("DetachDevice", request)
    assert error.value.code == "failed_precondition"
    assert sysfs.said("unbind") == ""
    init.signal(9)
    init.wait()
    with pytest.raises(VmcellError, match="EBUSY"):  # the ended container still has its root
        agent.client.call("DetachDevice", request)
    init.delete()
    agent.client.call("DetachDevice", request)
    assert sysfs.said("unbind") == "virtio-mmio.3"


@pytest.mark.root
def test_attach_through_the_agent(agent: AgentUnderTest) -> None:
    sysfs = FakeSysfs(agent.directory)
    agent.client.call("Hello", messages.HelloRequest())
    call = agent.client.begin("AttachDevice", messages.AttachDeviceRequest(window=3))
    assert not agent.client.answered(call, 0.1)
    sysfs.appear(BLOCK, "block/vda")
    payload = agent.client.finish(call)
    assert messages.AttachDeviceResponse.decode(payload).name == "vda"
    with pytest.raises(VmcellError, match="no virtio-mmio window 9"):
        agent.client.call("AttachDevice", messages.AttachDeviceRequest(window=9))
