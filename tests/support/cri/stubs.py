"""The generated modules of cri.proto, made by grpcio-tools in a folder that goes with the run."""

from __future__ import annotations

import atexit
import importlib
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent


@cache
def compiled() -> tuple[ModuleType, ModuleType]:
    """(messages, services)."""
    folder = tempfile.mkdtemp(prefix="vmcell-cri-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    outputs = (f"--python_out={folder}", f"--grpc_python_out={folder}")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}", *outputs, "cri.proto"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("cri_pb2"), importlib.import_module("cri_pb2_grpc")
    finally:
        sys.path.remove(folder)
