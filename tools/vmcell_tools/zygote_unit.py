"""The zygote under systemd: the text of vmcell-zygote.service.

Its children are no part of the unit: they join the cgroup of the containerd that asked, and live on
when it ends. It needs containerd's own namespaces and rights; with any `Private...=` or
`Protect...=` of systemd's here its children would refuse, and all starts go direct.
"""

from __future__ import annotations

UNIT_PATH = "/etc/systemd/system/vmcell-zygote.service"

_UNIT = """\
# Written by `vmcell setup`. Enable it with: systemctl enable --now vmcell-zygote
[Unit]
Description=vmcell zygote, from which shims and microVM monitors are forked
Before=containerd.service

[Service]
Type=notify
ExecStart={shim} zygote
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=100ms
KillMode=process
OOMScoreAdjust=-900

[Install]
WantedBy=multi-user.target
"""


def zygote_unit(shim: str) -> str:
    """The unit that runs the shim's executable at `shim`."""
    return _UNIT.format(shim=shim)
