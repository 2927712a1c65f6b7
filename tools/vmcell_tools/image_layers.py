"""The root file systems of our images, each one plain tar with fixed times.

`debian_layer` is a Debian of its own made by mmdebstrap (it runs maintainer scripts in a chroot and
so needs root); `busybox_layer` is one static program and a handful of files.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmcell_protos.errors import CallerError, HostError
from vmcell_tools.build_step import run_step
from vmcell_tools.debian_tree import unpack

USER_NAME = "user"
USER_ID = 1000
DEBOOTSTRAP_DEADLINE_S = 1200.0
# Documentation and translations are two fifths of a small system and of no use in a sandbox.
PATH_OPTIONS = (
    *(f"path-exclude=/usr/share/{name}/*" for name in ("man", "info", "doc", "locale")),
    *(f"path-exclude=/usr/share/{name}/*" for name in ("lintian", "bug", "bash-completion")),
    # licences have to stay with what they cover
    "path-include=/usr/share/doc/*/copyright",
    "path-include=/usr/share/locale/locale.alias",
)
# Traces of the machine that builds, and files that only say when they were written.
CUSTOMIZE = (
    f'chroot "$1" useradd --create-home --uid {USER_ID} --shell /bin/bash {USER_NAME}',
    'rm -f "$1/etc/hostname" "$1/etc/resolv.conf"',
    'rm -f "$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/*-old "$1"/etc/*-',
    'find "$1/var/log" -type f -delete',
    # our own cleaning: mmdebstrap's leaves directories whose owner differs from run to run
    'rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*',
)


def debian_sources() -> str:
    """sources.list lines of the Debian archive that this host's apt is set up with."""
    shown = run_step(
        [
            *("apt-get", "indextargets", "--format", "deb $(REPO_URI) $(RELEASE) $(COMPONENT)"),
            *("Created-By: Packages", "Origin: Debian"),
        ],
        deadline_s=60,
    )
    if not shown.strip():
        raise HostError("apt knows no Debian archive; add one to its sources, run apt-get update")
    return shown


def _suite(sources: str) -> str:
    """The first suite named: the release itself stands before its updates in apt's list."""
    return sources.split()[2]


def debian_layer(
    layer: Path,
    packages: Sequence[str],
    sources: str,
    hooks: Sequence[str] = (),
    *,
    uncleaned: Sequence[str] = (),
) -> None:
    """A minimal Debian with `packages` and the user 1000, as the tar `layer`.

    `hooks` are shell commands for the installed system, whose directory is their "$1"; `uncleaned`
    names what mmdebstrap leaves of its own cleaning after them.
    It takes the very versions that the host's apt lists name: the lists are copied in, not renewed.
    """
    if os.geteuid() != 0:
        raise CallerError("building a Debian image needs root; run it with sudo")
    work = layer.parent
    source_list = work / "sources.list"
    source_list.write_text(sources)
    merged_usr = Path("/usr/share/mmdebstrap/hooks/merged-usr")
    run_step(
        [
            *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar"),
            f"--skip={','.join(('output/dev', 'update', 'cleanup/apt', *uncleaned))}",
            f"--hook-dir={merged_usr}",
            '--setup-hook=cp -r /var/lib/apt/lists/. "$1/var/lib/apt/lists/"',
            *(f"--dpkgopt={option}" for option in PATH_OPTIONS),
            *(f"--customize-hook={hook}" for hook in (*hooks, *CUSTOMIZE)),
            f"--include={','.join(packages)}",
            *(_suite(sources), layer, source_list),
        ],
        environment={"SOURCE_DATE_EPOCH": "1", "TMPDIR": str(work)},
        deadline_s=DEBOOTSTRAP_DEADLINE_S,
    )
    # device nodes are left out, and with them their directory, where the runtime mounts its own
    with tarfile.open(layer, "a") as tar:
        tar.addfile(_entry("./dev", tarfile.DIRTYPE, 0o755))


def busybox_layer(layer: Path, archives: Sequence[Path]) -> None:
    """Every applet of busybox-static as a link to it, two users, as the tar `layer`."""
    tree = layer.parent / "busybox"
    unpack(archives, tree)
    program = tree / "usr/bin/busybox"
    listed = run_step([program, "--list-full"], deadline_s=60).split()
    # linuxrc, alone in the root directory, is for initial ram disks
    applets = [applet for applet in listed if "/" in applet]
    with tarfile.open(layer, "w", format=tarfile.USTAR_FORMAT) as tar:
        for entry, content in _busybox_entries(program.read_bytes(), applets):
            tar.addfile(entry, io.BytesIO(content))


def _busybox_entries(
    program: bytes, applets: Sequence[str]
) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    directories = "bin sbin usr usr/bin usr/sbin etc dev proc sys run mnt home var var/tmp tmp root"
    for name in directories.split():
        mode = 0o1777 if name.endswith("tmp") else 0o700 if name == "root" else 0o755
        yield _entry(name, tarfile.DIRTYPE, mode), b""
    home = _entry(f"home/{USER_NAME}", tarfile.DIRTYPE, 0o755)
    home.uid = home.gid = USER_ID
    yield home, b""
    yield _file("bin/busybox", program, 0o755)
    for applet in sorted(set(applets) - {"bin/busybox"}):
        link = _entry(applet, tarfile.SYMTYPE, 0o777)
        link.linkname = "/bin/busybox"
        yield link, b""
    yield _file(
        "etc/passwd",
        b"root:x:0:0:root:/root:/bin/sh\n"
        b"nobody:x:65534:65534:nobody:/:/bin/false\n"
        + f"{USER_NAME}:x:{USER_ID}:{USER_ID}::/home/{USER_NAME}:/bin/sh\n".encode(),
    )
    yield _file("etc/group", f"root:x:0:\nnogroup:x:65534:\n{USER_NAME}:x:{USER_ID}:\n".encode())


def _entry(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    entry.mode = mode
    return entry


def _file(name: str, content: bytes, mode: int = 0o644) -> tuple[tarfile.TarInfo, bytes]:
    entry = _entry(name, tarfile.REGTYPE, mode)
    entry.size = len(content)
    return entry, content
