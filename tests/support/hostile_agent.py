"""A guest's agent that lies, floods, falls silent and talks out of turn; started like `fake_agent`.

Every choice follows from the seed in its behaviour, and `"boots": true` makes it answer truly until
the container has started, so that the lies reach what comes after. The lies it told are in the file
`lies` beside FAKE_RECORD. Killing it is what killing a VMM is.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import sys
import threading
import time

from parent_watch import end_with_parent

from vmcell_protos import agent
from vmcell_protos.ttrpc import (
    DATA,
    MAX_DATA_BYTES,
    REQUEST,
    RESPONSE,
    Call,
    ServerConnection,
    encode_frame,
)
from vmcell_protos.ttrpc_messages import Response, Status
from vmcell_protos.wire import Message, encode_varint

MOST = (1 << 64) - 1
GARBAGE = (
    "\x1b]0;owned\x07\x1b[2J\x1b[31m",
    "\r\nlevel=error msg=forged\n",
    "\u202e\u2066\u200b\ufeff\u0000",
    "'; rm -rf / #$(reboot)`id`",
    "\U0001f4a9" * 300,
)
# What a shim asks while a container comes to be.
BOOT = (
    "Hello",
    "ConfigureGuest",
    "CreateContainer",
    "AdoptContainer",
    "StartProcess",
    "ResumeGuest",
)
LONG_CALLS = ("WaitProcess", "WaitOom")
# After these the shim listens no more; the others are told more often.
ENDING_LIES = ("wrong_stream", "twice", "four_gigabytes", "not_an_answer", "hang_up")
LIES = (
    *("nonsense", "absurd", "refuse", "half_a_frame", "many_items", "silence", "out_of_order"),
    "empty",
)


class HostileAgent:
    """One control connection and the streams that the shim dials."""

    def __init__(self, control: socket.socket, listener: socket.socket, seed: int, *, boots: bool):
        self.control = control
        self.listener = listener
        self.rng = random.Random(seed)
        self.habits = random.Random(seed)
        self.boots = boots
        self.sending = threading.Lock()
        self.protocol = ServerConnection()
        self.kept: list[bytes] = []
        self.open_waits: list[Call] = []
        self.lies = [getattr(self, name) for name in (*ENDING_LIES, *LIES, *LIES, *LIES)]

    def send(self, data: bytes) -> None:
        with self.sending, contextlib.suppress(OSError):
            self.control.sendall(data)

    def serve(self) -> None:
        threading.Thread(target=self.accept_streams, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := self.control.recv(1 << 16):
                calls, answers = self.protocol.receive(data)
                self.send(answers)
                for call in calls:
                    self.answer(call)
        # As a VM whose agent has gone: it lives on until somebody kills it.
        threading.Event().wait()

    def answer(self, call: Call) -> None:
        if self.boots and call.method in BOOT:
            self.tell_truth(call)
        elif self.boots and call.method in LONG_CALLS and self.rng.random() < 0.7:
            self.open_waits.append(call)
        elif self.rng.random() < 0.25:
            self.tell_truth(call)
        else:
            self.lie(call)
        if self.open_waits and self.rng.random() < 0.3:
            self.lie(self.open_waits.pop())

    def lie(self, call: Call) -> None:
        lie = self.rng.choice(self.lies)
        with open(os.path.join(os.path.dirname(os.environ["FAKE_RECORD"]), "lies"), "a") as file:
            file.write(f"{lie.__name__} {call.method}\n")
        lie(call)

    def tell_truth(self, call: Call) -> None:
        message: Message | None = {
            "Hello": agent.HelloResponse(agent_version="fake", kernel_release="6.12-fake"),
            "StartProcess": agent.StartProcessResponse(guest_pid=1),
            "AdoptContainer": agent.AdoptContainerResponse(guest_pid=1, running=True),
            "WaitProcess": agent.WaitProcessResponse(exit_status=3),
        }.get(call.method)
        self.send(self.protocol.respond(call.stream_id, message.encode() if message else b""))

    # ---- lies -----------------------------------------------------------------------------

    def wrong_stream(self, call: Call) -> None:
        stream_id = self.rng.choice([0, 2, call.stream_id + 1, call.stream_id + 2, 2**32 - 1])
        self.send(encode_frame(stream_id, RESPONSE, Response(payload=b"x").encode()))

    def twice(self, call: Call) -> None:
        frame = self.protocol.respond(call.stream_id, b"")
        self.send(frame * self.rng.choice([2, 3, 5000]))

    def nonsense(self, call: Call) -> None:
        data = self.rng.randbytes(self.rng.choice([1, 7, 300, 70_000]))
        if self.rng.random() < 0.5:
            data = Response(payload=data).encode()
        self.send(encode_frame(call.stream_id, RESPONSE, data))

    def absurd(self, call: Call) -> None:
        """A well-formed answer that cannot be true."""
        words = self.rng.choice(GARBAGE)
        numbers = {f"{name}{words}": MOST for name in ("usage_usec", "anon", "oom")}
        numbers |= dict.fromkeys(("usage_usec", "user_usec", "anon", "file", "oom", "high"), MOST)
        message: Message | None = {
            "Hello": agent.HelloResponse(agent_version=words * 50, kernel_release=words),
            "WaitProcess": agent.WaitProcessResponse(
                exit_status=self.rng.choice([256, 2**31, 2**32 - 1]),
                exited_at_unix_ns=-(2**63),
                oom_kills=MOST,
            ),
            "WaitOom": agent.WaitOomResponse(oom_kills=self.rng.choice([0, MOST])),
            "StartProcess": agent.StartProcessResponse(guest_pid=2**32 - 1),
            "AttachDevice": agent.AttachDeviceResponse(name=words),
            "ReadFile": agent.ReadFileResponse(content=b"A" * (3 << 20), mode=0o777),
            "AdoptContainer": agent.AdoptContainerResponse(guest_pid=2**32 - 1, user_frozen=True),
            "ContainerStats": agent.ContainerStatsResponse(
                cpu=numbers,
                memory=numbers,
                memory_events=numbers,
                memory_usage_bytes=MOST,
                memory_limit_bytes=MOST,
                pids_current=MOST,
            ),
        }.get(call.method)
        self.send(
            self.protocol.respond(call.stream_id, message.encode() if message else b"\x08\x01")
        )

    def refuse(self, call: Call) -> None:
        words = self.rng.choice(GARBAGE) * self.rng.choice([1, 1, 2000])
        code = self.rng.choice([*range(1, 17), 99, -5])
        status = Response(status=Status(code=code, message=words))
        self.send(encode_frame(call.stream_id, RESPONSE, status.encode()))

    def four_gigabytes(self, call: Call) -> None:
        self.send(struct.pack(">IIBB", 2**32 - 1, call.stream_id, RESPONSE, 0))
        threading.Thread(target=self.pour, args=(self.control,), daemon=True).start()

    def half_a_frame(self, call: Call) -> None:
        announced = self.rng.choice([100, 1 << 20, MAX_DATA_BYTES])
        self.send(struct.pack(">IIBB", announced, call.stream_id, RESPONSE, 0) + bytes(99))

    def many_items(self, call: Call) -> None:
        """As many empty messages as go into one frame: two bytes each, here."""
        details = b"\x1a\x00" * self.rng.choice([500_000, 2_000_000])
        body = b"\x0a" + encode_varint(len(details)) + details
        self.send(encode_frame(call.stream_id, RESPONSE, body))

    def silence(self, _: Call) -> None:
        return

    def not_an_answer(self, call: Call) -> None:
        kind = self.rng.choice([REQUEST, DATA, 0, 200])
        self.send(encode_frame(call.stream_id, kind, b"x" * self.rng.choice([0, 1000])) * 50)

    def out_of_order(self, call: Call) -> None:
        self.kept.append(self.protocol.respond(call.stream_id, b""))
        if len(self.kept) > 1:
            self.send(b"".join(reversed(self.kept)))
            self.kept.clear()

    def hang_up(self, _: Call) -> None:
        with contextlib.suppress(OSError):
            self.control.shutdown(self.rng.choice([socket.SHUT_RDWR, socket.SHUT_WR]))

    def empty(self, call: Call) -> None:
        self.send(encode_frame(call.stream_id, RESPONSE, b""))

    # ---- streams --------------------------------------------------------------------------

    def accept_streams(self) -> None:
        while True:
            stream, _ = self.listener.accept()
            habit = self.habits.choice(
                [self.pour, self.close_at_once, self.end_and_go_on, self.deaf]
            )
            threading.Thread(target=habit, args=(stream,), daemon=True).start()

    def pour(self, stream: socket.socket) -> None:
        words = "".join(GARBAGE).encode(errors="replace") * 20
        with contextlib.suppress(OSError):
            while True:
                stream.sendall(words)

    def close_at_once(self, stream: socket.socket) -> None:
        stream.close()

    def end_and_go_on(self, stream: socket.socket) -> None:
        with contextlib.suppress(OSError):
            stream.sendall(b"\x1b[31mlast words\n")
            stream.shutdown(socket.SHUT_WR)
            while True:
                stream.sendall(b"and more\n")

    def deaf(self, stream: socket.socket) -> None:
        """It takes nothing and says nothing, and stays."""
        time.sleep(3600)
        stream.close()


def main() -> None:
    """argv: the control socket's descriptor, the listener's descriptor, the behaviour."""
    end_with_parent()
    behaviour = json.loads(sys.argv[3])
    listener = socket.socket(fileno=int(sys.argv[2]))
    directory = os.path.dirname(listener.getsockname())
    with open(os.path.join(directory, "container.json"), "w") as file:
        json.dump({"container_id": "c1", "process": {"args": ["x"]}}, file)
    control = socket.socket(fileno=int(sys.argv[1]))
    HostileAgent(control, listener, behaviour["seed"], boots=behaviour["boots"]).serve()


if __name__ == "__main__":
    main()
