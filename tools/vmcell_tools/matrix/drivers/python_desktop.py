"""Core calls of the PyPI package `e2b-desktop`."""

from __future__ import annotations

import base64
import http.client
import os
from urllib.parse import urlsplit

from e2b import CommandExitException
from e2b_desktop import Sandbox
from report import PATIENCE_S, OneSandbox, expect, run_calls, wait_for

TEMPLATE = os.environ.get("VMCELL_MATRIX_DESKTOP_TEMPLATE", "desktop")
STREAM_PORT = 6080
SCREEN = (1024, 768)


class Calls(OneSandbox):
    """The calls, on one sandbox of the desktop's template."""

    def create(self):
        make = getattr(Sandbox, "create", None) or Sandbox
        self._made = make(template=TEMPLATE, timeout=1800, request_timeout=PATIENCE_S)

    def command(self):
        expect(self.sandbox.commands.run("echo hi", timeout=PATIENCE_S).stdout, "hi\n")

    def screen_size(self):
        expect(self.sandbox.get_screen_size(), SCREEN)

    def screenshot(self):
        picture = bytes(self.sandbox.screenshot())
        assert picture[:4] == b"\x89PNG"
        expect(tuple(int.from_bytes(picture[at : at + 4], "big") for at in (16, 20)), SCREEN)

    def pointer(self):
        self.sandbox.move_mouse(10, 20)
        expect(tuple(self.sandbox.get_cursor_position()), (10, 20))

    def buttons(self):
        self.sandbox.left_click(500, 300)
        self.sandbox.double_click()
        self.sandbox.middle_click()
        self.sandbox.scroll("down", 2)
        self.sandbox.drag((500, 300), (520, 310))
        expect(tuple(self.sandbox.get_cursor_position()), (520, 310))

    def launch(self):
        self.sandbox.launch("xfce4-terminal")
        (window,) = wait_for(self._terminals, "a terminal's window")
        assert "Terminal" in self.sandbox.get_window_title(window)
        wait_for(lambda: self.sandbox.get_current_window_id() == window, "its focus")

    def _terminals(self):
        try:
            found = self.sandbox.get_application_windows("xfce4-terminal")
        except CommandExitException as error:
            if error.exit_code != 1:  # what xdotool says when it finds none
                raise
            return []
        return [window for window in found if window]

    def keyboard(self):
        """What was typed in the terminal is what its shell has done."""
        self.sandbox.write("echo a-B_1 > /tmp/typed")
        self.sandbox.press("enter")
        wait_for(lambda: self.sandbox.files.exists("/tmp/typed"), "the typed command's file")
        wait_for(lambda: self.sandbox.files.read("/tmp/typed") == "a-B_1\n", "what it wrote")
        self.sandbox.press(["ctrl", "d"])
        wait_for(lambda: not self._terminals(), "the terminal's end")

    def stream(self):
        stream = self.sandbox.stream
        stream.start(require_auth=True)
        address = urlsplit(stream.get_url(auth_key=stream.get_auth_key()))
        expect((address.scheme, address.path), ("https", "/vnc.html"))
        assert address.netloc.startswith(f"{STREAM_PORT}-{self.sandbox.sandbox_id}."), address
        status, page = self._ask(f"{address.path}?{address.query}")
        expect(status, 200)
        assert b"noVNC" in page, page[:200]
        # The first frame of the WebSocket is the VNC server's greeting.
        greeting = b"RFB 003.008\n"
        expect(self._socket_begins(2 + len(greeting))[2:], greeting)
        stream.stop()

    def _connection(self):
        service = urlsplit(os.environ["E2B_SANDBOX_URL"])
        return http.client.HTTPConnection(service.hostname, service.port, timeout=PATIENCE_S)

    def _named(self):
        return {
            "E2b-Sandbox-Id": self.sandbox.sandbox_id,
            "E2b-Sandbox-Port": str(STREAM_PORT),
            "E2b-Traffic-Access-Token": self.sandbox.traffic_access_token or "",
        }

    def _ask(self, path):
        connection = self._connection()
        try:
            connection.request("GET", path, headers=self._named())
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def _socket_begins(self, count):
        """The first `count` bytes after the handshake."""
        connection = self._connection()
        wanted = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        }
        try:
            connection.request("GET", "/websockify", headers={**self._named(), **wanted})
            answer = connection.getresponse()
            expect(answer.status, 101)
            return answer.fp.read(count)
        finally:
            connection.close()

    def kill(self):
        expect(self.sandbox.kill(), True)


def main():
    c = Calls()
    run_calls(
        [
            ("Sandbox.create", c.create),
            ("commands.run", c.command),
            ("get_screen_size", c.screen_size),
            ("screenshot", c.screenshot),
            ("move_mouse, get_cursor_position", c.pointer),
            ("clicks, scroll, drag", c.buttons),
            ("launch, windows", c.launch),
            ("write, press", c.keyboard),
            ("stream", c.stream),
            ("kill", c.kill),
        ]
    )


if __name__ == "__main__":
    main()
