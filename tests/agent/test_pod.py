"""Several containers in one guest: what they share, what they do not, whole-root disks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_harness import (
    AgentUnderTest,
    Running,
    container_spec,
    make_busybox_tree,
    make_erofs,
    process_spec,
    run,
    running_agent,
)

from vmcell_agent import pod
from vmcell_protos import agent as messages
from vmcell_protos.errors import CallerError, VmcellError

READ_ONLY = messages.Rootfs(lower_devices=["pmem1"])


@pytest.fixture
def crowd(busybox_image: Path) -> Iterator[AgentUnderTest]:
    """An agent with an image that any number of containers may have as their read-only root."""
    with running_agent() as running:
        running.attach_lower(busybox_image)
        yield running


def shell(agent: AgentUnderTest, script: str, *shared: str, **changes: Any) -> Running:
    """A started container that runs `script`."""
    spec = container_spec(process_spec("sh", "-c", script), **changes)
    return agent.create(spec, rootfs=READ_ONLY, shared=list(shared)).start()


def sleeper(agent: AgentUnderTest, *shared: str, **changes: Any) -> Running:
    init = shell(agent, "echo up; exec sleep 1000", *shared, **changes)
    init.read_until(b"up\n")
    return init.become("sleep 1000")


def told(agent: AgentUnderTest, init: Running, script: str, name: str = "look") -> str:
    """What `script`, run beside `init`, says."""
    added = agent.add(init, process_spec("sh", "-c", script), name).start()
    out = added.read() + added.read("stderr")
    added.wait()
    added.delete()
    return out.decode().strip()


def end(*inits: Running) -> None:
    for init in inits:
        init.signal(signal.SIGKILL)
        assert init.wait() == 137
        init.delete()


def shm_mount(**changes: Any) -> dict[str, Any]:
    mount = {
        "destination": "/dev/shm",
        "type": "vmcell-shm",
        "options": ["nosuid", "noexec", "nodev", "size=1m"],
    }
    return {**mount, **changes}


def with_shm(**changes: Any) -> dict[str, Any]:
    """Mounts of a pod's container: /dev/shm is the pod's."""
    mounts = container_spec({})["mounts"]
    return {
        "mounts": [m for m in mounts if m["destination"] != "/dev/shm"] + [shm_mount(**changes)]
    }


@pytest.mark.root
def test_containers_side_by_side_share_the_network_and_nothing_else(crowd: AgentUnderTest) -> None:
    spec = container_spec(
        process_spec("sh", "-c", "mkdir /run/w; echo served >/run/w/x; httpd -f -p 8080 -h /run/w")
    )
    server = crowd.create(spec, rootfs=READ_ONLY).start()
    client = sleeper(crowd, hostname="other")
    get = "for n in $(seq 50); do wget -qO- http://127.0.0.1:8080/x && exit; sleep 0.1; done"
    assert told(crowd, client, get) == "served"
    assert told(crowd, client, "ps -o comm").split() == ["COMMAND", "sleep", "ps"]
    assert told(crowd, client, "ls /run") == ""
    assert told(crowd, server, "hostname") == "box"
    assert told(crowd, client, "hostname") == "other"
    assert told(crowd, client, "touch /dev/shm/mine") == ""
    assert told(crowd, server, "ls /dev/shm") == ""
    end(server, client)
    assert crowd.state_left() == []


@pytest.mark.root
def test_the_hostname_of_a_pod_is_set_once_and_changes_for_all(crowd: AgentUnderTest) -> None:
    first = sleeper(crowd, "uts", hostname="pod")
    second = sleeper(crowd, "uts", hostname="late")
    apart = sleeper(crowd, hostname="apart")
    looks = [told(crowd, init, "hostname") for init in (first, second, apart)]
    assert looks == ["pod", "pod", "apart"]
    crowd.client.call("ConfigureGuest", messages.ConfigureGuestRequest(hostname="renamed"))
    third = sleeper(crowd, "uts", hostname="late")
    looks = [told(crowd, init, "hostname") for init in (first, second, third, apart)]
    assert looks == ["renamed", "renamed", "renamed", "apart"]


@pytest.mark.root
def test_shared_ipc_is_shared_memory_queues_and_sysctls(crowd: AgentUnderTest) -> None:
    changes = with_shm()
    linux = container_spec({})["linux"] | {
        "sysctl": {"kernel.shmmax": "123456", "net.ipv4.ip_unprivileged_port_start": "7"}
    }
    first = sleeper(crowd, "ipc", linux=linux, **changes)
    second = sleeper(crowd, "ipc", **changes)
    apart = sleeper(crowd, **changes)
    told(crowd, first, "echo word >/dev/shm/a; echo x >/dev/mqueue/q; touch /dev/mqueue/q")
    assert told(crowd, second, "cat /dev/shm/a; ls /dev/mqueue") == "word\nq"
    assert told(crowd, apart, "cat /dev/shm/a; ls /dev/mqueue") == "word"
    sysctls = "cat /proc/sys/kernel/shmmax /proc/sys/net/ipv4/ip_unprivileged_port_start"
    assert told(crowd, second, sysctls) == "123456\n7"
    assert told(crowd, apart, sysctls).split()[0] != "123456"
    assert told(crowd, second, "grep /dev/shm /proc/mounts").split()[:1] == ["shm"]
    assert "noexec" in told(crowd, second, "grep /dev/shm /proc/mounts")
    full = told(crowd, second, "dd if=/dev/zero of=/dev/shm/big bs=64k count=32 2>&1 | head -1")
    assert "No space left" in full
    end(first, second)
    again = sleeper(crowd, "ipc", **with_shm(options=["size=9m", "ro"]))
    assert told(crowd, again, "cat /dev/shm/a; touch /dev/shm/b") == (
        "word\ntouch: /dev/shm/b: Read-only file system"
    )


@pytest.mark.root
def test_a_shared_pid_namespace(crowd: AgentUnderTest) -> None:
    first, second = sleeper(crowd, "pid"), sleeper(crowd, "pid")
    apart = sleeper(crowd)
    seen = told(crowd, first, "ps -o pid,comm")
    assert seen.split()[2:4] == ["1", "pause"]
    assert seen.count("sleep") == 2
    assert told(crowd, apart, "ps -o pid,comm").count("sleep") == 1
    pid = told(crowd, second, "ps -o pid,args | grep 'sleep 1000' | head -1").split()[0]
    assert int(pid) > 1
    # an orphan goes to pid 1 of the namespace, which must reap it
    orphan = "sh -c 'sleep 0.1 & echo $!' >/run/pid; read pid </run/pid"
    orphan += (
        "; grep PPid /proc/$pid/status; while [ -e /proc/$pid ]; do sleep 0.05; done; echo gone"
    )
    assert told(crowd, first, orphan).split() == ["PPid:", "1", "gone"]
    # pid 1 is nobody's way out
    look = "(ls /proc/1/root; ls /proc/1/fd; cat /proc/1/environ) 2>/dev/null"
    look += "; kill -9 1; ls -d /proc/1"
    assert told(crowd, first, look) == "/proc/1"
    end(second)
    assert told(crowd, first, "ps -o comm").count("sleep") == 1
    end(first, apart)
    left = Path(f"/proc/{crowd.agent_pid}/task/{crowd.agent_pid}/children").read_text()
    assert left == ""  # the namespace ended with its last container
    anew = sleeper(crowd, "pid")
    assert told(crowd, anew, "ps -o pid,comm").count("sleep") == 1


@pytest.mark.root
def test_root_with_all_capabilities_sees_nothing_through_the_pods_pid_1(
    crowd: AgentUnderTest,
) -> None:
    everything = ["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_DAC_READ_SEARCH", "CAP_DAC_OVERRIDE"]
    sets = {name: everything for name in ("bounding", "effective", "permitted")}
    first = sleeper(crowd, "pid")
    process = process_spec(
        "sh", "-c", "cd /proc/1/root && ls -A | wc -l; ls /proc/1/fd | wc -l", capabilities=sets
    )
    look = crowd.add(first, process, "look").start()
    assert look.read().split() == [b"0", b"0"]


@pytest.mark.root
def test_processes_of_a_container_die_with_its_init_though_it_is_not_pid_1(
    crowd: AgentUnderTest,
) -> None:
    keeper = sleeper(crowd, "pid")
    init = shell(crowd, "sleep 777 & echo up; exec sleep 1000", "pid")
    init.read_until(b"up\n")
    added = crowd.add(init, process_spec("sleep", "777"), "e").start()
    init.signal(signal.SIGKILL)
    assert (init.wait(), added.wait()) == (137, 137)
    assert "777" not in told(
        crowd, keeper, "while ps -o args | grep -q '[7]77'; do sleep 0.1; done"
    )
    init.delete()


@pytest.mark.root
def test_the_end_of_the_agent_ends_the_pods_pid_namespace(crowd: AgentUnderTest) -> None:
    sleeper(crowd, "pid", "ipc", "uts")
    crowd.client.call("Shutdown", messages.Empty())
    assert crowd.process.wait(timeout=10) == 0


@pytest.mark.root
def test_sixteen_containers_and_not_one_more(crowd: AgentUnderTest) -> None:
    inits = [
        crowd.create(container_spec(process_spec("sleep", "1000")), rootfs=READ_ONLY)
        for _ in range(16)
    ]
    with pytest.raises(VmcellError, match="16 containers already") as error:
        crowd.create(container_spec(process_spec("true")), rootfs=READ_ONLY)
    assert error.value.code == "resource_exhausted"
    for init in inits:
        init.delete()
    assert crowd.state_left() == []
    assert [path for path in Path(crowd.cgroup).iterdir() if path.is_dir()] == []


@pytest.mark.root
def test_layers_are_stacked_the_topmost_first(crowd: AgentUnderTest, tmp_path: Path) -> None:
    names = []
    for number in range(2, 26):
        tree = tmp_path / str(number)
        (tree / "etc").mkdir(parents=True)
        (tree / "etc/layer").write_text(f"{number}\n")
        (tree / f"etc/only{number}").write_text("")
        crowd.attach_lower(make_erofs(tree, tmp_path / f"{number}.erofs"), f"pmem{number}")
        names.insert(0, f"pmem{number}")
    rootfs = messages.Rootfs(lower_devices=[*names, "pmem1"])
    spec = container_spec(process_spec("sh", "-c", "cat /etc/layer; ls /etc/only* | wc -l"))
    init = crowd.create(spec, rootfs=rootfs).start()
    assert init.read() == b"25\n24\n"
    assert init.wait() == 0
    init.delete()


@pytest.mark.root
def test_a_disk_that_is_the_whole_root(crowd: AgentUnderTest, tmp_path: Path) -> None:
    make_busybox_tree(tmp_path / "tree")
    crowd.attach_upper("vdb", tmp_path / "tree")
    rootfs = messages.Rootfs(block_device="vdb")
    file = messages.FileCopy(destination="/etc/new", mode=0o644, content=b"copied\n")
    script = "cat /etc/new; echo kept >/etc/kept; grep ' / ' /proc/mounts | cut -d' ' -f3"
    spec = container_spec(process_spec("sh", "-c", script))
    init = crowd.create(spec, rootfs=rootfs, files=[file]).start()
    assert init.read().split() == [b"copied", b"ext4"]
    with pytest.raises(VmcellError, match="in use by another container") as error:
        crowd.create(spec, rootfs=rootfs)
    assert error.value.code == "failed_precondition"
    assert init.wait() == 0
    init.delete()
    spec = container_spec(process_spec("sh", "-c", "cat /etc/kept /etc/new; touch /x || echo ro"))
    spec["root"]["readonly"] = True
    file = messages.FileCopy(destination="/etc/new", mode=0o644, content=b"scratch\n")
    init = crowd.create(spec, rootfs=rootfs, files=[file]).start()
    assert init.read().split() == [b"kept", b"scratch", b"ro"]
    assert init.wait() == 0
    init.delete()
    disk = os.path.realpath(crowd.directory / "devices/vdb")
    assert run("debugfs", "-R", "cat /etc/new", disk) == "copied"  # nothing was written to it
    assert crowd.state_left() == []


@pytest.mark.root
@pytest.mark.parametrize(
    ("rootfs", "words"),
    [
        (messages.Rootfs(), "needs at least one image"),
        (messages.Rootfs(block_device="sda"), "must be vda to vdz"),
        (messages.Rootfs(block_device="vdb", lower_devices=["pmem1"]), "no other device goes"),
        (messages.Rootfs(block_device="vdb", upper_device="vda"), "no other device goes"),
        (messages.Rootfs(lower_devices=["pmem1", "pmem1"]), "one device twice"),
        (messages.Rootfs(lower_devices=["pmem1"], upper_device="vd/a"), "must be vda to vdz"),
        (messages.Rootfs(lower_devices=["pmem1"], upper_device="vdx"), "No such file"),
        (messages.Rootfs(block_device="vdx"), "No such file"),
    ],
)
def test_a_root_that_cannot_be(crowd: AgentUnderTest, rootfs: messages.Rootfs, words: str) -> None:
    with pytest.raises(VmcellError, match=words):
        crowd.create(container_spec(process_spec("true")), rootfs=rootfs)
    assert crowd.state_left() == []
    assert [path for path in Path(crowd.cgroup).iterdir() if path.is_dir()] == []


@pytest.mark.root
@pytest.mark.parametrize(
    ("mount", "words"),
    [
        (shm_mount(options=["size=lots"]), "takes size= and mode= only"),
        (shm_mount(options=["huge=always"]), "takes size= and mode= only"),
        (shm_mount(options=["mode=9"]), "takes size= and mode= only"),
    ],
)
def test_shared_memory_that_cannot_be(
    crowd: AgentUnderTest, mount: dict[str, Any], words: str
) -> None:
    spec = container_spec(process_spec("true"), mounts=[mount])
    with pytest.raises(VmcellError, match=words):
        crowd.create(spec, rootfs=READ_ONLY)


@pytest.mark.parametrize("name", ["net", "network", "mnt", "", "PID", "user"])
def test_a_namespace_that_is_not_shared_by_asking(name: str) -> None:
    with pytest.raises(CallerError, match="shared_namespaces"):
        pod.shared_flags(["ipc", name])
