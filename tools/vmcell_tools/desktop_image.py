"""The image `desktop`: Debian with Xvfb, Xfce, noVNC and what E2B's desktop clients run in it.

They start everything by commands of their own (Xvfb, startxfce4, x11vnc, `novnc_proxy` below
/opt/noVNC), so the image has no start command; what they look for is what this module names. No
browser is in it: a template of this image may add one.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from vmcell_tools.oci_layout import ImageSettings

NAME = "desktop"
DEBIAN_PACKAGES = (
    *("xvfb", "x11vnc", "websockify"),
    # the clients wait until xfce4-session, xfwm4 and xfdesktop run
    *("xfce4-session", "xfwm4", "xfdesktop4", "xfce4-panel", "xfce4-settings", "xfce4-terminal"),
    *("dbus-x11", "adwaita-icon-theme", "fonts-dejavu-core"),
    # netstat, xdpyinfo, xrandr, gtk-launch and xdg-open are called by name
    *("xdotool", "scrot", "net-tools", "x11-utils", "x11-xserver-utils"),
    *("libgtk-3-bin", "xdg-utils"),
)
# Only its files are wanted: the package asks for all of Node, which serves no page of it.
NOVNC_PACKAGES = ("novnc",)
NOVNC_PATH = "/opt/noVNC"
# Without one dbus starts no session. It is the image's own until a restore renews it.
MACHINE_ID = "76d63ff1c0de4e5bb0a3c1de5c70b000"
# It would empty /etc/machine-id; what else it removes, the hooks here and of all images do.
UNCLEANED = ("cleanup/reproducible",)


def settings(environment: dict[str, str]) -> ImageSettings:
    """What the image says of itself; `environment` is that of all Debian images."""
    return ImageSettings(
        reference=f"docker.io/vmcell/{NAME}:latest",
        environment=environment,
        command=("/bin/bash",),
        directory="/home/user",
        comment="Debian with Xfce on a virtual screen, for E2B's desktop clients",
    )


def hooks(novnc: Path) -> tuple[str, ...]:
    """mmdebstrap's customize hooks, "$1" being the new system; `novnc` is that package's file."""
    return (
        f'dpkg-deb --extract {shlex.quote(str(novnc))} "$1"',
        f'mkdir -p "$1/opt" && ln -s /usr/share/novnc "$1{NOVNC_PATH}"',
        f'echo {MACHINE_ID} >"$1/etc/machine-id"',
        'ln -sf /etc/machine-id "$1/var/lib/dbus/machine-id"',
        'rm -f "$1/var/cache/ldconfig/aux-cache"',
    )
