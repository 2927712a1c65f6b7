"""The image `code-interpreter-v1`: Debian with Python and Node, packages from PyPI, our server.

What it has from PyPI is `code_interpreter/requirements.txt`. Its labels name the command that noded
runs in every sandbox of it, and the one that says when it serves.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from vmcell_protos.errors import HostError
from vmcell_tools.oci_layout import ImageSettings

NAME = "code-interpreter-v1"
FOLDER = Path(__file__).with_name("code_interpreter")
LOCK = FOLDER / "requirements.txt"
START = FOLDER / "start.sh"
START_PATH = "/usr/local/sbin/vmcell-code-interpreter"
SITE = "usr/local/lib/python3.11/dist-packages"
PACKAGE = "vmcell_interpreter"
PACKAGE_FILES = ("*.py", "*.js")
# node-typescript takes the types off; acorn, which imports are found with, comes with nodejs.
DEBIAN_PACKAGES = ("nodejs", "node-typescript")
# Test suites and sample data, two fifths of what pandas and matplotlib bring.
LEFT_OUT = (
    *("pandas/tests", "matplotlib/tests", "mpl_toolkits/*/tests"),
    *(
        "matplotlib/mpl-data/sample_data",
        "tornado/test",
        "zmq/tests",
        "jedi/third_party/django-stubs",
    ),
)
READY = (
    "exec 3<>/dev/tcp/127.0.0.1/49999 && printf 'GET /health HTTP/1.0\\r\\n\\r\\n' >&3 && "
    "read -r -t 5 line <&3 && [[ $line == *' 200 '* ]]"
)
# Programs for editors that each have all of the compiler in them; the library and tsc stay.
TYPESCRIPT_LEFT_OUT = ("tsserver", "tsserverlibrary", "typescriptServices", "typingsInstaller")
PIP_SETTINGS = "[global]\nbreak-system-packages = true\nroot-user-action = ignore\n"


def settings(environment: dict[str, str]) -> ImageSettings:
    """What the image says of itself; `environment` is that of all Debian images."""
    return ImageSettings(
        reference=f"docker.io/vmcell/{NAME}:latest",
        environment=environment,
        command=("/bin/bash",),
        directory="/home/user",
        comment="Debian with Python, Node and E2B's code interpreter",
        labels={"io.vmcell.start": START_PATH, "io.vmcell.ready": READY},
    )


def server_files() -> Iterator[tuple[str, Path]]:
    """Path below the image's packages, and source, of each file of the server."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise HostError(f"the Python package {PACKAGE} is not installed; run: make venv")
    folder = Path(spec.submodule_search_locations[0])
    for pattern in PACKAGE_FILES:
        for source in sorted(folder.rglob(pattern)):
            yield f"{PACKAGE}/{source.relative_to(folder)}", source


def inputs() -> list[str | bytes]:
    """All that the image is made of, beside Debian's packages."""
    files: list[str | bytes] = [LOCK.read_bytes(), START.read_bytes(), *LEFT_OUT, PIP_SETTINGS]
    files += [*TYPESCRIPT_LEFT_OUT, START_PATH, READY]
    for target, source in server_files():
        files += [target, source.read_bytes()]
    return files


def hooks(work: Path, wheels: tuple[Path, ...]) -> tuple[str, ...]:
    """mmdebstrap's customize hooks, "$1" being the new system; `work` is a folder for our files."""
    staged = work / "interpreter"
    for target, source in server_files():
        copy = staged / target
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    (staged / "pip.conf").write_text(PIP_SETTINGS)
    quoted = " ".join(shlex.quote(str(wheel)) for wheel in wheels)
    (pip,) = (wheel.name for wheel in wheels if wheel.name.startswith("pip-"))
    install = (
        f"python3 /tmp/wheels/{pip}/pip install --quiet --no-index --no-deps --no-compile "
        "--disable-pip-version-check /tmp/wheels/*.whl"
    )
    return (
        f'install -m 644 {shlex.quote(str(staged / "pip.conf"))} "$1/etc/pip.conf"',
        f'mkdir "$1/tmp/wheels" && cp {quoted} "$1/tmp/wheels/"',
        f'chroot "$1" sh -c {shlex.quote(install)}',
        'rm -r "$1/tmp/wheels"',
        *(f'rm -rf "$1/{SITE}"/{name}' for name in LEFT_OUT),
        *(f'rm -f "$1/usr/share/nodejs/typescript/lib/{name}.js"' for name in TYPESCRIPT_LEFT_OUT),
        f'cp -r {shlex.quote(str(staged / PACKAGE))} "$1/{SITE}/"',
        f'install -m 755 {shlex.quote(str(START))} "$1{START_PATH}"',
        # checked by content and not by time: what mmdebstrap writes has one time for all
        f'chroot "$1" python3 -m compileall -q --invalidation-mode checked-hash /{SITE}',
        # matplotlib looks at every font once, which takes a minute on a slow machine
        'chroot "$1" env HOME=/root python3 -c "import matplotlib.font_manager"',
    )
