"""The E2B service under systemd: the text of vmcell.service and vmcell-nginx.service.

Two units, because the streams of sandboxes go through nginx alone: noded, API and router may be
restarted and replaced while nginx, and with it every running command of a client, goes on.
`vmcell.service` restarts its own processes and tells systemd when all of them listen. It ends what
it started by itself; KillMode=process keeps systemd from what was forked for containerd.
"""

from __future__ import annotations

SERVICE_PATH = "/etc/systemd/system/vmcell.service"
NGINX_PATH = "/etc/systemd/system/vmcell-nginx.service"

_SERVICE = """\
# Written by `vmcell setup`. Enable it with: systemctl enable --now vmcell vmcell-nginx
[Unit]
Description=vmcell: noded, the E2B API and the sandbox router
After=containerd.service network.target
Wants=containerd.service vmcell-nginx.service

[Service]
Type=notify
ExecStart={python} -m vmcell_api.serve --no-nginx
Restart=always
RestartSec=2s
KillMode=process
TimeoutStopSec=90s

[Install]
WantedBy=multi-user.target
"""

_NGINX = """\
# Written by `vmcell setup`, as {config} is; reload it after a change or a new certificate.
[Unit]
Description=vmcell: nginx in front of sandboxes and the E2B API
After=network.target

[Service]
Type=exec
RuntimeDirectory={runtime_directory}
RuntimeDirectoryPreserve=yes
ExecStartPre={nginx} -t -q -c {config}
ExecStart={nginx} -c {config}
ExecReload={nginx} -t -q -c {config}
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=1s
LimitNOFILE=32768
KillMode=mixed
TimeoutStopSec=10s

[Install]
WantedBy=multi-user.target
"""


def service_unit(python: str) -> str:
    """The unit that runs the service with the interpreter at `python`."""
    return _SERVICE.format(python=python)


def nginx_unit(nginx: str, *, config: str, folder: str) -> str:
    """The unit that runs `nginx` with `config`; `folder` is that configuration's, below /run."""
    runtime_directory = folder.removeprefix("/run/")
    return _NGINX.format(nginx=nginx, config=config, runtime_directory=runtime_directory)
