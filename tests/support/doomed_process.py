"""noded or the API as a process that dies at one point of `kill_points`; a program.

argv: "noded" or "api", the point's name. The settings are VMCELL_API_CONFIG's. The API says its
port on standard output.
"""

from __future__ import annotations

import sys

from api_service import app_of, listening
from checkpoint_double import CheckpointDouble
from kill_points import (
    API_POINTS,
    API_VERBS,
    NODED_POINTS,
    NODED_VERBS,
    SAVING_API_POINTS,
    SAVING_API_VERBS,
    SAVING_POINTS,
    arm,
)

from vmcell_api.config import load_config
from vmcell_api.node.__main__ import serve


def main() -> int:
    what, point = sys.argv[1:]
    config = load_config()
    if what == "noded":
        if point in SAVING_POINTS and config.runtime == "io.containerd.runc.v2":
            CheckpointDouble(config).install()
        arm((NODED_POINTS | SAVING_POINTS)[point], NODED_VERBS)
        return serve(config)
    arm((API_POINTS | SAVING_API_POINTS)[point], API_VERBS | SAVING_API_VERBS)
    with listening(app_of(config)) as address:
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
