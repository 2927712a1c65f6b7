"""A shim as a program of its own, so that its memory and its end are its own too.

argv: a directory with `config.toml`. It serves `shim.sock` there, logs to `shim.log`, publishes to
`events.sock`. FAKE_AGENT names the program that stands where the VMM would be.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path

import fake_vmm
from fake_share import FakeShare
from parent_watch import end_with_parent

from vmcell_shim import guest, sandbox
from vmcell_shim.dispatch import Dispatch
from vmcell_shim.events import EventPublisher
from vmcell_shim.journal import Journal
from vmcell_shim.registry import Registry
from vmcell_shim.server import TtrpcServer


def main() -> None:
    end_with_parent()
    directory = Path(sys.argv[1])
    os.environ["VMCELL_CONFIG"] = str(directory / "config.toml")
    os.environ["FAKE_RECORD"] = str(directory / "record.json")
    fake_vmm.PROGRAM = Path(__file__).with_name(os.environ["FAKE_AGENT"])
    guest.handle.spawn = fake_vmm.spawn  # type: ignore[assignment]  # a fake of the same face
    sandbox.Share = FakeShare  # type: ignore[assignment,misc]  # as above
    journal = Journal("", "test")
    journal.attach(str(directory / "shim.log"))
    journal.catch_bugs()
    events = EventPublisher(
        namespace="test",
        ttrpc_address=str(directory / "events.sock"),
        grpc_address="",
        publish_binary="",
        journal=journal,
    )
    registry = Registry("test", events, journal)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "shim.sock.new"))
    listener.listen()
    os.rename(directory / "shim.sock.new", directory / "shim.sock")
    idle = threading.Event()
    server = TtrpcServer(listener, Dispatch(registry, idle.set).handle, journal)
    server.serve(3600.0, lambda: True)


if __name__ == "__main__":
    main()
