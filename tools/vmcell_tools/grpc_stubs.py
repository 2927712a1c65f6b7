"""Writes the gRPC stubs of noded's two wires into `protos/vmcell_protos/pb`.

What this is for: noded speaks gRPC to containerd (`containerd/*.proto`) and serves the API
(`node.proto`). The stubs are committed, so that an installation needs no protoc;
`python -m vmcell_tools.grpc_stubs` rewrites them and a test checks that they are up to date.

Two things differ from a bare protoc run. The files get virtual import paths under
`vmcell_protos/pb`, so that the generated imports are importable and the names in protobuf's one
descriptor pool are ours. And `vmcell.containerd.` in the method paths becomes `containerd.`: the
messages have a package of their own for the same reason, the daemon's services keep their names.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from vmcell_protos.errors import HostError

VIRTUAL_ROOT = "vmcell_protos/pb"
SERVICE_PREFIX = "vmcell.containerd."


def proto_folder() -> Path:
    """The folder of the `.proto` files; `pb` in it holds what is generated."""
    import vmcell_protos

    return Path(next(iter(vmcell_protos.__path__)))


def generate(folder: Path) -> dict[str, str]:
    """The generated files as text, by their path below `pb`.

    Raises HostError with protoc's own words when a `.proto` file does not compile or grpcio-tools
    is not installed.
    """
    sources = ["node.proto", *sorted(f"containerd/{p.name}" for p in folder.glob("containerd/*"))]
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            f"-I{VIRTUAL_ROOT}/containerd={folder}/containerd",
            f"-I{VIRTUAL_ROOT}={folder}",
            *(f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")),
            *(f"{VIRTUAL_ROOT}/{source}" for source in sources),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise HostError(f"protoc failed with status {done.returncode}: {done.stderr.strip()}")
        root = Path(scratch, VIRTUAL_ROOT)
        return {
            str(path.relative_to(root)): _text(path)
            for path in sorted(root.rglob("*"))
            if path.is_file() and _holds_something(path)
        }


def _holds_something(path: Path) -> bool:
    """False for the `_pb2_grpc.py` of a file without services."""
    return not path.name.endswith("_pb2_grpc.py") or "class " in path.read_text()


def _text(path: Path) -> str:
    """The file's text; in stubs, and only there, the services get the daemon's names."""
    text = path.read_text()
    if not path.name.endswith("_pb2_grpc.py"):
        return text
    text = text.replace(f"'/{SERVICE_PREFIX}", "'/containerd.")
    return text.replace(f"'{SERVICE_PREFIX}", "'containerd.")


def main() -> None:
    """Rewrites every generated file and removes those whose source is gone."""
    folder = proto_folder()
    files = generate(folder)
    for old in (folder / "pb").rglob("*_pb2*.py*"):
        if str(old.relative_to(folder / "pb")) not in files and "__pycache__" not in old.parts:
            old.unlink()
    for name, text in files.items():
        target = folder / "pb" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


if __name__ == "__main__":
    main()
