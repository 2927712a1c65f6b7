"""A VM of a size: made, shown another processor, given back."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator

import pytest

from vmcell_protos.errors import CallerError, HostError
from vmcell_runtime import layout, rehearsal
from vmcell_runtime.frame import Frame
from vmcell_runtime.kvm.host_kind import open_kvm
from vmcell_runtime.memory import HUGE_PAGE_BYTES
from vmcell_runtime.rehearsal import rehearse
from vmcell_runtime.size import Size
from vmcell_runtime.spare import make_ready
from vmcell_runtime.vcpu import KICK_SIGNAL, prepare_kicks

pytestmark = pytest.mark.kvm

SIZE = Size(2, 64, False, 4, 3, (HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES))


@pytest.fixture
def kicks() -> Iterator[None]:
    """As in a VMM's process."""
    before = signal.getsignal(KICK_SIGNAL)
    prepare_kicks()
    yield
    signal.signal(KICK_SIGNAL, before)


def count() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_it_has_all_that_the_size_says_and_gives_it_back() -> None:
    before = count()
    frame = Frame(SIZE, open_kvm())
    assert len(frame.vcpus) == 2
    first = layout.first_pmem_gpa(64 << 20)
    assert [(slot.gpa, slot.length_bytes) for slot in frame.images] == [
        (first, HUGE_PAGE_BYTES),
        (first + (1 << 30), 3 * HUGE_PAGE_BYTES),
    ]
    assert [slot.read_only for slot in frame.memory.slots()] == [False, True, True]
    assert frame.windows == layout.virtio_windows(4, 3)
    assert set(frame.irqs) == {layout.SERIAL_GSI, *(gsi for _, gsi in frame.windows)}
    with tempfile.TemporaryFile() as image:
        image.truncate(5000)
        frame.memory.lay_file(frame.images[0].number, image.fileno())
    frame.close()
    frame.close()
    assert count() == before


def test_the_guest_may_be_shown_the_processor_it_knows() -> None:
    frame = Frame(SIZE, open_kvm())
    try:
        host = frame.processor
        assert frame.show(host.cpuid, tsc_deadline=host.tsc_deadline) == host
        fewer = tuple(entry for entry in host.cpuid if entry.function != 0x40000001)
        assert fewer != host.cpuid
        shown = frame.show(fewer, tsc_deadline=False)
        assert (shown.cpuid, shown.tsc_deadline, shown.msrs) == (fewer, False, host.msrs)
    finally:
        frame.close()


def test_two_of_one_host_show_the_same_processor() -> None:
    """Whichever CPU made them."""
    cpus = sorted(os.sched_getaffinity(0))
    found = []
    for cpu in (cpus[0], cpus[-1]):
        os.sched_setaffinity(0, {cpu})
        try:
            frame = Frame(SIZE, open_kvm())
        finally:
            os.sched_setaffinity(0, cpus)
        found.append(frame.processor)
        frame.close()
    assert found[0] == found[1]


def test_memory_beyond_the_processors_reach_is_refused() -> None:
    before = count()
    too_long = SIZE._replace(pmem_bytes=(1 << 44,) * 8)
    with pytest.raises((CallerError, HostError), match=r"address bits|mapping"):
        Frame(too_long, open_kvm())
    assert count() == before


def test_what_is_no_kvm_is_refused_and_closed() -> None:
    before = count()
    with pytest.raises(HostError, match="KVM_GET_API_VERSION"):
        Frame(SIZE, os.open(os.devnull, os.O_RDWR))
    assert count() == before


@pytest.mark.usefixtures("kicks")
def test_a_rehearsal_leaves_nothing() -> None:
    before = count()
    rehearse()
    assert (count(), threading.active_count()) == (before, 1)


@pytest.mark.usefixtures("kicks")
def test_a_rehearsed_guest_that_ends_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = count()
    monkeypatch.setattr(rehearsal, "_ENDS_WITHIN_NS", 50_000_000)
    monkeypatch.setattr(rehearsal, "_KERNEL", rehearsal._elf(b"\xeb\xfe"))
    with pytest.raises(HostError, match="ended otherwise: vmm_error: it took too long"):
        rehearse()
    assert count() == before


def test_a_process_makes_itself_ready() -> None:
    """In a child, for it leaves the network."""
    pid = os.fork()
    if not pid:
        try:
            frame = make_ready(SIZE)
            os._exit(0 if frame.size == SIZE else 1)
        except BaseException:  # noqa: BLE001  whatever it was, the parent is told
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
