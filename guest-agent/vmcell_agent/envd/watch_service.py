"""filesystem.Filesystem: WatchDir (a stream) and CreateWatcher (polled), on one kind of watch."""

from __future__ import annotations

import os
import stat
import time
from collections import deque

from vmcell_protos import envd_filesystem as proto
from vmcell_protos.errors import CallerError

from .entry import entry_info
from .job import file_error
from .loop import Loop
from .paths import resolve_path
from .rpc import Call, Method
from .settings import Settings
from .watch import REMOVE, RENAME, DirectoryWatch, is_network_mount
from .wire.fields import Fields

# Events that wait for a polling client; more are lost, and the client is told once.
MAX_WAITING_EVENTS = 65_536
MAX_WATCHERS = 256
# A stream's client that lags this far behind is cut off.
MAX_UNSENT_BYTES = 8 * 1024 * 1024

Event = dict[str, object]


class _Teller:
    """Turns a watch's events into FilesystemEvents for one client."""

    def __init__(self, settings: Settings, *, with_entry: bool) -> None:
        self._settings = settings
        self._with_entry = with_entry

    def event(self, kind: str, path: str, name: str) -> Event:
        event: Event = {"name": name, "type": kind}
        if self._with_entry and kind not in (REMOVE, RENAME):
            try:
                event["entry"] = entry_info(path, self._settings.accounts)
            except OSError:
                # Gone again; the event itself still happened.
                return event
        return event


class _Stream:
    """WatchDir: every event at once, keepalives in silence."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._watch: DirectoryWatch | None = None
        self._teller: _Teller | None = None
        self._sent_at = time.monotonic()
        self._keepalive = call.loop.after(call.keepalive_s, self._keep_alive)
        self._deadline = call.at_deadline(self._late)
        call.exchange.on_gone = self._stop

    def begin(self, watch: DirectoryWatch, teller: _Teller) -> None:
        self._watch, self._teller = watch, teller
        self._call.send({"start": {}})

    def on_event(self, kind: str, path: str, name: str) -> None:
        if self._teller is None:
            return
        if self._call.exchange.unsent_bytes > MAX_UNSENT_BYTES:
            self.fail(CallerError("the client reads too slowly", code="resource_exhausted"))
            return
        self._sent_at = time.monotonic()
        self._call.send({"filesystem": self._teller.event(kind, path, name)})

    def fail(self, error: CallerError) -> None:
        self._stop()
        self._call.fail(error)

    def abandon(self) -> None:
        """The watch could not be made; the error is told by whoever knows it."""
        self._stop()

    def _late(self) -> None:
        self.fail(CallerError("context deadline exceeded", code="deadline_exceeded"))

    def _keep_alive(self) -> None:
        quiet_s = time.monotonic() - self._sent_at
        if quiet_s >= self._call.keepalive_s:
            self._sent_at = time.monotonic()
            quiet_s = 0.0
            self._call.send({"keepalive": {}})
        # Sending may have found the client gone, which cancels the next one too.
        if not self._call.exchange.gone:
            wait_s = self._call.keepalive_s - quiet_s
            self._keepalive = self._call.loop.after(wait_s, self._keep_alive)

    def _stop(self) -> None:
        self._keepalive.cancel()
        if self._deadline is not None:
            self._deadline.cancel()
        if self._watch is not None:
            self._watch.close()


class _Watcher:
    """CreateWatcher: events wait until they are asked for."""

    def __init__(self) -> None:
        self.watch: DirectoryWatch | None = None
        self.teller: _Teller | None = None
        self._events: deque[Event] = deque()
        self._lost: CallerError | None = None

    def on_event(self, kind: str, path: str, name: str) -> None:
        if self.teller is None:
            return
        if len(self._events) >= MAX_WAITING_EVENTS:
            self._events.popleft()
            self.on_lost(
                CallerError(
                    f"events were lost: more than {MAX_WAITING_EVENTS} waited to be asked for",
                    code="data_loss",
                )
            )
        self._events.append(self.teller.event(kind, path, name))

    def on_lost(self, error: CallerError) -> None:
        self._lost = error

    def drain(self) -> list[object]:
        """All events that happened before the call. Raises what `on_lost` was told, once."""
        if self.watch is not None:
            self.watch.poll()
        if self._lost is not None:
            lost, self._lost = self._lost, None
            raise lost
        events: list[object] = list(self._events)
        self._events.clear()
        return events


class WatchService:
    """Its `methods` are served beside those of FilesystemService."""

    def __init__(self, loop: Loop, settings: Settings) -> None:
        self._loop = loop
        self._settings = settings
        self._watchers: dict[str, _Watcher] = {}
        self.methods: dict[str, Method] = {
            "WatchDir": Method(
                proto.WatchDirRequest, proto.WatchDirResponse, server_stream=self._watch_dir
            ),
            "CreateWatcher": Method(
                proto.CreateWatcherRequest, proto.CreateWatcherResponse, unary=self._create
            ),
            "GetWatcherEvents": Method(
                proto.GetWatcherEventsRequest,
                proto.GetWatcherEventsResponse,
                unary=self._get_events,
            ),
            "RemoveWatcher": Method(
                proto.RemoveWatcherRequest, proto.RemoveWatcherResponse, unary=self._remove
            ),
        }

    def _open(self, call: Call, message: Fields, client: _Stream | _Watcher) -> DirectoryWatch:
        path = resolve_path(message.text("path"), call.account.home, self._settings.default_workdir)
        recursive = message.boolean("recursive")
        network_allowed = message.boolean("allowNetworkMounts")
        try:
            is_directory = stat.S_ISDIR(os.stat(path).st_mode)
            if not is_directory:
                raise CallerError(f"path '{path}' is not a directory")
            if not network_allowed and is_network_mount(path):
                raise CallerError(f"path '{path}' lies on a network mount: events would be missed")
            on_lost = client.fail if isinstance(client, _Stream) else client.on_lost
            return DirectoryWatch(
                self._loop,
                path,
                recursive=recursive,
                on_event=client.on_event,
                on_lost=on_lost,
            )
        except (FileNotFoundError, NotADirectoryError):
            raise CallerError(f"path '{path}' does not exist", code="not_found") from None
        except OSError as error:
            raise file_error(f"watch '{path}'", error) from None

    def _teller(self, message: Fields) -> _Teller:
        return _Teller(self._settings, with_entry=message.boolean("includeEntry"))

    def _watch_dir(self, call: Call, message: Fields) -> None:
        teller = self._teller(message)
        stream = _Stream(call)
        try:
            watch = self._open(call, message, stream)
        except CallerError:
            stream.abandon()
            raise
        stream.begin(watch, teller)

    def _create(self, call: Call, message: Fields) -> None:
        if len(self._watchers) >= MAX_WATCHERS:
            raise CallerError(
                f"{MAX_WATCHERS} watchers exist already: remove some", code="resource_exhausted"
            )
        watcher = _Watcher()
        watcher.teller = self._teller(message)
        watcher.watch = self._open(call, message, watcher)
        number = os.urandom(12).hex()
        self._watchers[number] = watcher
        call.reply({"watcherId": number})

    def _find(self, message: Fields) -> tuple[str, _Watcher]:
        number = message.text("watcherId")
        watcher = self._watchers.get(number)
        if watcher is None:
            raise CallerError(f"watcher with id {number} not found", code="not_found")
        return number, watcher

    def _get_events(self, call: Call, message: Fields) -> None:
        call.reply({"events": self._find(message)[1].drain()})

    def _remove(self, call: Call, message: Fields) -> None:
        number, watcher = self._find(message)
        del self._watchers[number]
        if watcher.watch is not None:
            watcher.watch.close()
        call.reply({})
