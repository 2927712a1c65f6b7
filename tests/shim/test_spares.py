"""Which spares the zygote has forked, hands over and lets go; the forks are the test's."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from vmcell_protos.errors import CallerError
from vmcell_runtime.size import Size
from vmcell_shim import spares as spares_module
from vmcell_shim.spares import (
    COUNT_VARIABLE,
    MAX_SIZES,
    READY,
    SIZES_VARIABLE,
    Spares,
    count_and_sizes,
    sizes_from_text,
    sizes_text,
)

ONE, TWO, THREE = (Size(1, mib, False, 3, 0, (2 << 20,)) for mib in (64, 128, 256))


class Node:
    """Spares with forks that only keep their socket, on a clock that the test moves."""

    def __init__(self, count: int = 1, sizes: list[Size] | None = None) -> None:
        self.now = 100.0
        self.forked: list[tuple[Size, socket.socket]] = []
        self.works = True
        self.poll = select.poll()
        self.spares = Spares(self._fork, self.poll, count, sizes or [])

    def monotonic(self) -> float:
        return self.now

    def _fork(self, size: Size, control: socket.socket) -> bool:
        if self.works:
            self.forked.append((size, control.dup()))
        return self.works

    def quiet(self) -> None:
        """Nothing happens for so long that spares are forked."""
        self.now += spares_module.QUIET_S
        while self.spares.wait_s() == 0:
            self.spares.fill()

    def hear(self) -> None:
        for fd, _ in self.poll.poll(0):
            self.spares.hear(fd)

    def make_ready(self) -> None:
        for _, control in self.forked:
            control.send(READY)
        self.hear()

    def is_dropped(self, number: int) -> bool:
        """Whether the zygote has closed that spare's socket."""
        control = self.forked[number][1]
        control.setblocking(False)
        try:
            return control.recv(1) == b""
        except BlockingIOError:
            return False

    def close(self) -> None:
        self.spares.drop()
        for _, control in self.forked:
            control.close()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Node]]:
    made: list[Node] = []
    monkeypatch.setattr(spares_module.time, "monotonic", lambda: made[-1].now if made else 100.0)
    yield made
    for node in made:
        node.close()


@pytest.fixture
def node(nodes: list[Node]) -> Node:
    nodes.append(Node())
    return nodes[-1]


def test_nobody_has_asked_and_none_is_forked(node: Node) -> None:
    assert node.spares.wait_s() is None
    node.quiet()
    assert node.forked == []


def test_asked_for_it_is_forked_when_it_is_quiet_and_handed_over_once(node: Node) -> None:
    assert node.spares.take(ONE) is None
    node.spares.busy()
    assert node.spares.wait_s() == pytest.approx(spares_module.QUIET_S)
    node.spares.fill()
    assert node.forked == [], "not yet"
    node.quiet()
    assert [size for size, _ in node.forked] == [ONE]
    assert node.spares.wait_s() is None
    assert node.spares.take(ONE) is None, "it is not ready"
    node.make_ready()
    control = node.spares.take(ONE)
    assert control is not None
    with control:
        control.send(b"for you")
        assert node.forked[0][1].recv(9) == b"for you"
    assert node.spares.take(ONE) is None
    node.quiet()
    assert [size for size, _ in node.forked] == [ONE, ONE], "another one in its place"


def test_a_burst_puts_it_off(node: Node) -> None:
    for _ in range(10):
        node.spares.take(ONE)
        node.spares.busy()
        node.now += 0.9 * spares_module.QUIET_S
        node.spares.fill()
    assert node.forked == []
    node.quiet()
    assert len(node.forked) == 1


def test_one_of_another_size_is_not_taken(node: Node) -> None:
    node.spares.take(ONE)
    node.quiet()
    node.make_ready()
    assert node.spares.take(TWO) is None
    taken = node.spares.take(ONE)
    assert taken is not None
    taken.close()


def test_only_the_sizes_asked_for_last_are_kept(node: Node) -> None:
    assert MAX_SIZES == 2
    for size in (ONE, TWO):
        node.spares.take(size)
    node.quiet()
    assert {size for size, _ in node.forked} == {ONE, TWO}
    node.make_ready()
    first = [size for size, _ in node.forked].index(ONE)
    node.spares.take(THREE)
    assert (node.is_dropped(first), node.is_dropped(1 - first)) == (True, False)
    assert node.spares.sizes == [TWO, THREE]
    node.quiet()
    assert [size for size, _ in node.forked][2:] == [THREE]


def test_one_that_ends_is_not_forked_again_and_again(node: Node) -> None:
    node.spares.take(ONE)
    node.quiet()
    node.forked[0][1].close()
    node.hear()
    node.quiet()
    assert len(node.forked) == 1
    assert node.spares.descriptors == []
    node.spares.take(ONE)
    node.quiet()
    assert len(node.forked) == 2, "asked for, it is tried once more"


def test_a_fork_that_fails_is_not_tried_again_and_again(node: Node) -> None:
    node.works = False
    node.spares.take(ONE)
    node.quiet()
    assert node.spares.wait_s() is None
    assert node.spares.descriptors == []


def test_one_that_talks_nonsense_is_let_go(node: Node) -> None:
    node.spares.take(ONE)
    node.quiet()
    node.forked[0][1].send(b"nonsense")
    node.hear()
    assert node.is_dropped(0)


def test_one_that_ends_ready_is_forgotten(node: Node) -> None:
    node.spares.take(ONE)
    node.quiet()
    node.make_ready()
    node.forked[0][1].close()
    node.hear()
    assert node.spares.take(ONE) is None


def test_all_go_at_once(node: Node) -> None:
    for size in (ONE, TWO):
        node.spares.take(size)
    node.quiet()
    node.spares.drop()
    assert [node.is_dropped(number) for number in (0, 1)] == [True, True]
    assert node.poll.poll(0) == []


def test_a_stand_in_keeps_none(node: Node) -> None:
    node.spares.keep_none()
    assert node.spares.take(ONE) is None
    assert node.spares.wait_s() is None


def test_as_many_as_are_wanted(nodes: list[Node]) -> None:
    nodes.append(Node(count=3))
    nodes[0].spares.take(ONE)
    nodes[0].quiet()
    assert [size for size, _ in nodes[0].forked] == [ONE] * 3


def test_a_renewed_zygote_knows_what_was_asked_for(nodes: list[Node]) -> None:
    nodes.append(Node(sizes=sizes_from_text(sizes_text([ONE, TWO, THREE]))))
    assert nodes[0].spares.sizes == [TWO, THREE]
    nodes[0].quiet()
    assert {size for size, _ in nodes[0].forked} == {TWO, THREE}


def test_count_and_sizes_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COUNT_VARIABLE, raising=False)
    assert count_and_sizes() == (1, [])
    monkeypatch.setenv(COUNT_VARIABLE, "0")
    monkeypatch.setenv(SIZES_VARIABLE, sizes_text([ONE]))
    assert count_and_sizes() == (0, [ONE])
    assert count_and_sizes() == (0, []), "told once"


@pytest.mark.parametrize("text", ["", "-1", "17", "one", "1 ", "\u00b2", "0001"])
def test_a_count_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COUNT_VARIABLE, text)
    with pytest.raises(CallerError, match=r"VMCELL_SPARES is .*give 0 to 16"):
        count_and_sizes()


@pytest.mark.parametrize("text", ["1", "1,512,0,9,0;x", "\udcff"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(CallerError, match="size"):
        sizes_from_text(text)
