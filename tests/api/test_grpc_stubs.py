"""The committed gRPC stubs are what the `.proto` files say, under containerd's own names."""

from __future__ import annotations

import importlib

import pytest

from vmcell_tools import grpc_stubs


def test_committed_stubs_are_up_to_date() -> None:
    folder = grpc_stubs.proto_folder()
    generated = grpc_stubs.generate(folder)
    committed = {
        str(path.relative_to(folder / "pb")): path.read_text()
        for path in (folder / "pb").rglob("*_pb2*.py*")
        if "__pycache__" not in path.parts
    }
    assert generated == committed


def test_services_keep_the_daemons_names_and_messages_have_their_own_package() -> None:
    folder = grpc_stubs.proto_folder()
    for source in folder.glob("containerd/*.proto"):
        messages = importlib.import_module(f"vmcell_protos.pb.containerd.{source.stem}_pb2")
        assert messages.DESCRIPTOR.package.startswith("vmcell.containerd.")
        assert messages.DESCRIPTOR.name == f"vmcell_protos/pb/containerd/{source.name}"
        for service in messages.DESCRIPTOR.services_by_name.values():
            text = (folder / "pb/containerd" / f"{source.stem}_pb2_grpc.py").read_text()
            for method in service.methods_by_name:
                path = f"'/{service.full_name.removeprefix('vmcell.')}/{method}'"
                assert path in text


def test_a_broken_proto_file_is_one_sentence(tmp_path: object) -> None:
    from pathlib import Path

    from vmcell_protos.errors import HostError

    folder = Path(str(tmp_path))
    (folder / "containerd").mkdir()
    (folder / "node.proto").write_text('syntax = "proto3"; message {')
    with pytest.raises(HostError, match="protoc failed with status 1"):
        grpc_stubs.generate(folder)
