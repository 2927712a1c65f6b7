"""The server of volume files under gunicorn: `python -m vmcell_api.volume_server`.

A process of its own, because file bodies are large and their paths a guest's: its workers are
confined to the volumes (`vmcell_api.volumes.confinement`) before they see the first request, and
know neither store nor noded. What may be touched is said by the token alone.
"""

from __future__ import annotations

import os
import sys

import falcon

from vmcell_api.config import ApiConfig, load_config
from vmcell_api.volume_content import create_content_app
from vmcell_api.volumes.confinement import confine
from vmcell_api.volumes.files import Volumes
from vmcell_api.volumes.folders import OWNER, VolumeFolders
from vmcell_api.volumes.token import VolumeTokens, load_tokens
from vmcell_api.web_server import WebServer, serve
from vmcell_protos.errors import VmcellError

# Between two parts of a body, in either direction.
STALL_TIMEOUT_S = 60


def make_app(root: str, owner: tuple[int, int], tokens: VolumeTokens) -> falcon.App:
    """The application of one worker; the volumes stay open as long as the process lives."""
    return create_content_app(Volumes(root, owner), tokens)


def serve_volumes(config: ApiConfig) -> int:
    """Serves until a signal ends the process; answers its exit status."""
    directory = config.volumes_dir
    try:
        folders = VolumeFolders(directory)
        folders.prepare()
        folders.drop_uploads()
        tokens = load_tokens(folders.key_path)
    except VmcellError as error:
        sys.stderr.write(f"vmcell_api.volume_server: {error}\n")
        return 1
    confined = os.geteuid() == 0
    server = WebServer(
        name="vmcell-volumes",
        bind=config.volume_bind,
        workers=1,
        threads=config.threads,
        read_timeout_s=STALL_TIMEOUT_S,
        write_timeout_s=STALL_TIMEOUT_S,
        confine=(lambda: confine(directory, config.volume_uid)) if confined else None,
    )
    root = "/" if confined else directory
    # Only root's capabilities let a file be another user's.
    owner = OWNER if confined else (os.geteuid(), os.getegid())
    serve(server, lambda: make_app(root, owner, tokens))
    return 0


def main() -> int:
    """The command; answers its exit status."""
    try:
        return serve_volumes(load_config())
    except VmcellError as error:
        sys.stderr.write(f"vmcell_api.volume_server: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
