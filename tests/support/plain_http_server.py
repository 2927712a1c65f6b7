"""What envd's throughput is compared with: Python's own http.server, with uploads added.

`python plain_http_server.py FOLDER ADDRESS PORT` serves FOLDER: GET as http.server does it, POST
writes the body to the file that the path names.
"""

from __future__ import annotations

import functools
import os
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

PIECE_BYTES = 64 * 1024


class Handler(SimpleHTTPRequestHandler):
    """GET, and POST with a Content-Length."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        left = int(self.headers["Content-Length"])
        with open(self.translate_path(self.path), "wb") as file:
            while left:
                piece = self.rfile.read(min(left, PIECE_BYTES))
                if not piece:
                    break
                file.write(piece)
                left -= len(piece)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


def main() -> None:
    folder, address, port = sys.argv[1:]
    handler = functools.partial(Handler, directory=folder)
    with ThreadingHTTPServer((address, int(port)), handler) as server:
        os.write(1, b"ready\n")
        server.serve_forever()


if __name__ == "__main__":
    main()
