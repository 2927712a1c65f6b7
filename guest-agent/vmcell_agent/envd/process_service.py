"""process.Process: the calls, from message to process and back (E2B process.proto)."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

from vmcell_protos import envd_process as proto
from vmcell_protos.errors import CallerError

from .accounts import Account
from .loop import Timer
from .paths import resolve_path
from .process import Process, ProcessConfig
from .process_event import ProcessEvent
from .process_table import ProcessTable
from .rpc import Call, MessageReader, Method
from .settings import Settings
from .spawn import Launch, SpawnError, TerminalSize
from .wire.fields import Fields

_SIGNALS = {"SIGNAL_UNSPECIFIED": 0, "SIGNAL_SIGKILL": 9, "SIGNAL_SIGTERM": 15}
_DEFAULT_SIZE = TerminalSize(columns=80, rows=24)
# A client stream is read no further while this much of its input waits for the process.
_INPUT_HIGH_BYTES = 256 * 1024
_KEEPALIVE = ProcessEvent({"keepalive": {}})
# The SDKs always run bash; an image without it still has a POSIX shell that knows -l, -i and -c.
_SHELL, _SHELL_INSTEAD = "/bin/bash", "/bin/sh"


class _Subscription:
    """A call listening to a process: keeps the stream alive, ends it, leaves when it is gone."""

    def __init__(self, call: Call, process: Process) -> None:
        self._call = call
        self._process = process
        self._sent_at = time.monotonic()
        self._deadline: Timer | None = None
        self._stopped = False
        self._keepalive = call.loop.after(call.keepalive_s, self._keep_alive)
        call.exchange.on_gone = self._gone
        call.exchange.on_drained = process.balance
        process.listen(self)

    @property
    def unsent_bytes(self) -> int:
        return self._call.exchange.unsent_bytes

    def tell(self, event: ProcessEvent) -> None:
        self._sent_at = time.monotonic()
        self._call.send_frame(event.frame(self._call.codec))

    def finish(self, error: CallerError | None) -> None:
        self._stop()
        if error is None:
            self._call.finish()
        else:
            self._call.fail(error)

    def end_at_deadline(self, deadline: Timer | None) -> None:
        self._deadline = deadline

    def expire(self) -> None:
        """The caller's deadline has passed."""
        self._process.leave(self)
        self.finish(CallerError("context deadline exceeded", code="deadline_exceeded"))

    def _gone(self) -> None:
        self._stop()
        self._process.leave(self)

    def _stop(self) -> None:
        self._stopped = True
        self._keepalive.cancel()
        if self._deadline is not None:
            self._deadline.cancel()

    def _keep_alive(self) -> None:
        quiet_s = time.monotonic() - self._sent_at
        if quiet_s >= self._call.keepalive_s:
            self.tell(_KEEPALIVE)
            quiet_s = 0.0
        self._arm(self._call.keepalive_s - quiet_s)

    def _arm(self, seconds: float) -> None:
        # Sending may have found the client gone.
        if not self._stopped:
            self._keepalive = self._call.loop.after(seconds, self._keep_alive)


def _terminal_size(pty: Fields | None) -> TerminalSize | None:
    if pty is None:
        return None
    size = pty.optional_message("size")
    if size is None:
        return _DEFAULT_SIZE
    return TerminalSize(columns=size.uint32("cols"), rows=size.uint32("rows"))


def _directory(account: Account, asked: str, settings: Settings) -> str:
    path = resolve_path(asked, account.home, settings.default_workdir)
    try:
        os.stat(path)
    except FileNotFoundError:
        if asked or settings.default_workdir:
            raise CallerError(f"cwd '{path}' does not exist") from None
        # A user whose home was never made can still run commands.
        return "/"
    except OSError as error:
        raise CallerError(f"cwd '{path}' cannot be used: {error.strerror}") from None
    return path


def _find_executable(command: str, search_path: str, directory: str) -> str:
    """Where `command` is: with a slash as it is, else by PATH (exec(3)); CallerError if nowhere."""
    if "/" in command:
        full = os.path.join(directory, command)
        if command == _SHELL and not os.path.exists(full) and os.path.exists(_SHELL_INSTEAD):
            return _SHELL_INSTEAD
        return full
    for folder in search_path.split(":"):
        full = os.path.join(directory, folder, command)
        if os.path.isfile(full) and os.access(full, os.X_OK):
            return full
    raise CallerError(
        f"error starting process '{command}': exec: \"{command}\": "
        "executable file not found in $PATH"
    )


def _input(message: Fields) -> tuple[str, bytes]:
    input_fields = message.message("input")
    kind = input_fields.which(("stdin", "pty"))
    if kind is None:
        raise CallerError("the input is neither stdin nor pty", code="unimplemented")
    return kind, input_fields.octets(kind)


class _InputStream:
    """A client's stream of input: `start` names the process, `data` follows.

    It is read no faster than the process reads, and acknowledged when all of it is written.
    """

    def __init__(self, call: Call, select: Callable[[Fields], Process]) -> None:
        self._call = call
        self._select = select
        self._process: Process | None = None
        self._waiting = 0
        self._complete = False
        self._deadline = call.at_deadline(self._late)
        call.exchange.on_gone = self._stop

    def feed(self, message: Fields) -> None:
        which = message.which(("start", "data", "keepalive"))
        if which == "start":
            if self._process is not None:
                raise CallerError("the input stream was started twice")
            self._process = self._select(message.message("start"))
        elif which == "data":
            if self._process is None:
                raise CallerError("the input stream's first message must be start")
            kind, data = _input(message.message("data"))
            self._waiting += 1
            self._process.write_input(kind, data, self._written)
            self._balance()
        elif which is None:
            raise CallerError("the message is neither start, data nor keepalive")

    def finish(self) -> None:
        self._complete = True
        self._acknowledge()

    def _written(self, error: CallerError | None) -> None:
        self._waiting -= 1
        if error is not None:
            self._stop()
            self._call.fail(error)
            return
        self._balance()
        self._acknowledge()

    def _balance(self) -> None:
        stdin = self._process.stdin if self._process is not None else None
        self._call.exchange.hold_body(stdin is not None and stdin.waiting_bytes > _INPUT_HIGH_BYTES)

    def _acknowledge(self) -> None:
        if self._complete and not self._waiting and not self._call.exchange.ended:
            self._stop()
            self._call.send({})
            self._call.finish()

    def _late(self) -> None:
        self._call.exchange.hold_body(False)
        self._call.fail(CallerError("context deadline exceeded", code="deadline_exceeded"))

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()


class ProcessService:
    """Its `methods` are what the router serves under /process.Process/."""

    def __init__(self, table: ProcessTable, settings: Settings) -> None:
        self._table = table
        self._settings = settings
        self.methods: dict[str, Method] = {
            "List": Method(proto.ListRequest, proto.ListResponse, unary=self._list),
            "Start": Method(proto.StartRequest, proto.StartResponse, server_stream=self._start),
            "Connect": Method(
                proto.ConnectRequest, proto.ConnectResponse, server_stream=self._connect
            ),
            "Update": Method(proto.UpdateRequest, proto.UpdateResponse, unary=self._update),
            "SendInput": Method(
                proto.SendInputRequest, proto.SendInputResponse, unary=self._send_input
            ),
            "StreamInput": Method(
                proto.StreamInputRequest,
                proto.StreamInputResponse,
                client_stream=self._stream_input,
            ),
            "SendSignal": Method(
                proto.SendSignalRequest, proto.SendSignalResponse, unary=self._send_signal
            ),
            "CloseStdin": Method(
                proto.CloseStdinRequest, proto.CloseStdinResponse, unary=self._close_stdin
            ),
        }

    def _select(self, message: Fields, *, ended: bool = False) -> Process:
        selector = message.message("process")
        which = selector.which(("pid", "tag"))
        if which is None:
            raise CallerError("the process is not named: set process.pid or process.tag")
        return self._table.find(
            pid=selector.optional_uint32("pid"), tag=selector.optional_text("tag"), ended=ended
        )

    def _list(self, call: Call, message: Fields) -> None:
        processes: list[object] = []
        for process in self._table.live():
            config: dict[str, object] = {
                "cmd": process.config.command,
                "args": list(process.config.arguments),
                "envs": dict(process.config.environment),
            }
            if process.config.directory is not None:
                config["cwd"] = process.config.directory
            info: dict[str, object] = {"config": config, "pid": process.pid}
            if process.config.tag is not None:
                info["tag"] = process.config.tag
            processes.append(info)
        call.reply({"processes": processes})

    def _start(self, call: Call, message: Fields) -> None:
        wanted = message.message("process")
        config = ProcessConfig(
            command=wanted.text("cmd"),
            arguments=tuple(wanted.texts("args")),
            environment=wanted.text_map("envs"),
            directory=wanted.optional_text("cwd"),
            tag=message.optional_text("tag"),
        )
        # Old clients know no flag and expect an open stdin.
        stdin = message.optional_boolean("stdin")
        terminal = _terminal_size(message.optional_message("pty"))
        launch = self._launch(call.account, config, terminal, stdin=stdin is not False)
        try:
            process = self._table.start(launch, config)
        except SpawnError as error:
            code = "invalid_argument" if error.step in ("chdir", "exec") else "internal"
            if error.error_number in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE):
                code = "resource_exhausted"
            raise CallerError(
                f"error starting process '{config.command}': "
                f"{error.step if error.step == 'chdir' else 'fork/exec'} "
                f"{launch.directory if error.step == 'chdir' else launch.executable}: {error}",
                code=code,
            ) from None
        subscription = _Subscription(call, process)
        # The deadline is the command's own: it holds even after this client has left.
        process.deadline = call.at_deadline(lambda: self._out_of_time(process, subscription))

    @staticmethod
    def _out_of_time(process: Process, subscription: _Subscription) -> None:
        if process.end is None:
            subscription.expire()
            process.signal(_SIGNALS["SIGNAL_SIGKILL"])

    def _launch(
        self, account: Account, config: ProcessConfig, terminal: TerminalSize | None, *, stdin: bool
    ) -> Launch:
        if not config.command:
            raise CallerError("field process.cmd must not be empty")
        environment = {
            **self._settings.image_environment,
            "HOME": account.home,
            "USER": account.name,
            "LOGNAME": account.name,
            **self._settings.global_environment,
            **config.environment,
        }
        for name in environment:
            if not name or "=" in name:
                raise CallerError(f"{name!r} is no name of an environment variable")
        directory = _directory(account, config.directory or "", self._settings)
        executable = _find_executable(config.command, environment.get("PATH", ""), directory)
        # A busybox that is called bash knows no such applet.
        name = executable if config.command == _SHELL else config.command
        return Launch(
            executable=executable,
            argv=(name, *config.arguments),
            environment=environment,
            directory=directory,
            account=account,
            terminal=terminal,
            stdin=stdin or terminal is not None,
        )

    def _connect(self, call: Call, message: Fields) -> None:
        process = self._select(message, ended=True)
        if process.end is not None:
            call.send_frame(process.start.frame(call.codec))
            call.send_frame(process.end.frame(call.codec))
            call.finish()
            return
        subscription = _Subscription(call, process)
        subscription.end_at_deadline(call.at_deadline(subscription.expire))

    def _update(self, call: Call, message: Fields) -> None:
        process = self._select(message)
        size = _terminal_size(message.optional_message("pty"))
        if size is not None:
            process.resize(size)
        call.reply({})

    def _send_input(self, call: Call, message: Fields) -> None:
        process = self._select(message)
        kind, data = _input(message)

        def written(error: CallerError | None) -> None:
            if deadline is not None:
                deadline.cancel()
            if error is None:
                call.reply({})
            else:
                call.fail(error)

        def late() -> None:
            call.fail(CallerError("context deadline exceeded", code="deadline_exceeded"))

        deadline = call.at_deadline(late)
        process.write_input(kind, data, written)

    def _stream_input(self, call: Call) -> MessageReader:
        return _InputStream(call, self._select)

    def _send_signal(self, call: Call, message: Fields) -> None:
        process = self._select(message)
        number = message.enum("signal", _SIGNALS)
        if number not in (9, 15):
            raise CallerError(f"signal {number} is not supported", code="unimplemented")
        process.signal(number)
        call.reply({})

    def _close_stdin(self, call: Call, message: Fields) -> None:
        self._select(message).close_input()
        call.reply({})
