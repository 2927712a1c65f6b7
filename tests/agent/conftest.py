"""Agents for the tests of this folder: an image once a session, an agent for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_harness import AgentUnderTest, make_busybox_tree, make_erofs, running_agent
from guest_interfaces import two_interfaces


@pytest.fixture(scope="session")
def busybox_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EROFS image of busybox."""
    directory = tmp_path_factory.mktemp("image")
    make_busybox_tree(directory / "tree")
    return make_erofs(directory / "tree", directory / "busybox.erofs")


@pytest.fixture
def agent(busybox_image: Path) -> Iterator[AgentUnderTest]:
    """An agent with the busybox image as pmem1 and a fresh disk as vda."""
    with running_agent() as running:
        running.attach_lower(busybox_image)
        running.attach_upper()
        yield running


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with two interfaces of addresses MAC and MAC_2, their peers up."""
    with two_interfaces() as name:
        yield name
