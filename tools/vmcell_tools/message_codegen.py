"""Writes a `wire.Message` module for each `.proto` file of `protos/vmcell_protos`.

What this is for: one declaration per wire. protoc (from grpcio-tools) parses the `.proto` files,
this module turns the descriptors into Python classes that import nothing but `vmcell_protos.wire`.
`python -m vmcell_tools.message_codegen` rewrites the files; a test checks they are up to date.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

from vmcell_protos.errors import HostError

STEMS = (
    "wellknown",
    "ttrpc_messages",
    "agent",
    "task",
    "sandbox",
    "events",
    "metrics",
    "bootstrap",
    "envd_process",
    "envd_filesystem",
)
LINE_LENGTH = 100

_KINDS = {
    FieldDescriptorProto.TYPE_STRING: ("string", "str", '""'),
    FieldDescriptorProto.TYPE_BYTES: ("bytes", "bytes", 'b""'),
    FieldDescriptorProto.TYPE_BOOL: ("bool", "bool", "False"),
    FieldDescriptorProto.TYPE_UINT32: ("uint32", "int", "0"),
    FieldDescriptorProto.TYPE_UINT64: ("uint64", "int", "0"),
    FieldDescriptorProto.TYPE_INT32: ("int32", "int", "0"),
    FieldDescriptorProto.TYPE_INT64: ("int64", "int", "0"),
    FieldDescriptorProto.TYPE_SINT32: ("sint32", "int", "0"),
    FieldDescriptorProto.TYPE_SINT64: ("sint64", "int", "0"),
    FieldDescriptorProto.TYPE_ENUM: ("int32", "int", "0"),
    FieldDescriptorProto.TYPE_MESSAGE: ("message", "", "None"),
}


def proto_folder() -> Path:
    """The folder of the `.proto` files and of what is generated from them."""
    import vmcell_protos

    return Path(next(iter(vmcell_protos.__path__)))


def compile_protos(folder: Path, stems: tuple[str, ...]) -> FileDescriptorSet:
    """The descriptors of `folder`/<stem>.proto; raises HostError when protoc refuses them."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "descriptors"
        arguments = ["protoc", f"-I{folder}", f"--descriptor_set_out={output}"]
        if protoc.main([*arguments, *(f"{stem}.proto" for stem in stems)]) != 0:
            raise HostError(f"protoc refused the .proto files in {folder}; its message is above")
        return FileDescriptorSet.FromString(output.read_bytes())


def flat_name(type_name: str, package: str) -> str:
    """The class of a (nested) message: the parts of its name behind the package, joined."""
    prefix = f".{package}."
    return type_name.removeprefix(prefix).replace(".", "")


def _messages(
    messages: list[DescriptorProto], outer: str = ""
) -> Iterator[tuple[str, DescriptorProto]]:
    for message in messages:
        if message.options.map_entry:
            continue
        yield from _messages(list(message.nested_type), outer + message.name)
        yield outer + message.name, message


class ModuleWriter:
    """Renders one file; `packages` maps each package to the module stem that holds it."""

    def __init__(self, file: FileDescriptorProto, packages: dict[str, str]) -> None:
        self.file = file
        self.packages = packages
        self.imports: dict[str, set[str]] = {}

    def class_of(self, type_name: str) -> str:
        """The Python name of a message type, its import noted."""
        package = max(
            (p for p in self.packages if type_name.startswith(f".{p}.")), key=len, default=""
        )
        name = flat_name(type_name, package)
        if package != self.file.package:
            self.imports.setdefault(self.packages[package], set()).add(name)
        return name

    def field(self, message: DescriptorProto, field: FieldDescriptorProto) -> tuple[str, str, str]:
        """(constructor parameter, assignment, table row) of one field."""
        kind, python, default = _KINDS[field.type]
        entry = next(
            (
                nested
                for nested in message.nested_type
                if nested.options.map_entry and field.type_name.endswith(f".{nested.name}")
            ),
            None,
        )
        if entry is not None:
            return self._map_field(field, entry)
        nested_class = self.class_of(field.type_name) if kind == "message" else ""
        python = python or nested_class
        row = f'Field({field.number}, "{field.name}", "{kind}"'
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            row += ', "repeated"' + (f", {nested_class}" if nested_class else "") + ")"
            return (
                f"{field.name}: list[{python}] | None = None",
                f"self.{field.name}: list[{python}] = {field.name} or []",
                row,
            )
        if kind == "message" or field.proto3_optional:
            label = "optional" if field.proto3_optional else "one"
            row += f', "{label}", {nested_class})' if nested_class else f', "{label}")'
            annotation, default = f"{python} | None", "None"
        else:
            row += ")"
            annotation = python
        return (
            f"{field.name}: {annotation} = {default}",
            f"self.{field.name}: {annotation} = {field.name}",
            row,
        )

    def _map_field(
        self, field: FieldDescriptorProto, entry: DescriptorProto
    ) -> tuple[str, str, str]:
        key_kind, key_python, _ = _KINDS[entry.field[0].type]
        kind, python, _ = _KINDS[entry.field[1].type]
        nested = self.class_of(entry.field[1].type_name) if kind == "message" else ""
        annotation = f"dict[{key_python}, {python or nested}]"
        row = (
            f'Field({field.number}, "{field.name}", "{kind}", "map", '
            f'{nested or "None"}, key="{key_kind}")'
        )
        return (
            f"{field.name}: {annotation} | None = None",
            f"self.{field.name}: {annotation} = {field.name} or {{}}",
            row,
        )

    def message(self, name: str, message: DescriptorProto) -> str:
        """The class of one message."""
        if not message.field:
            return f"class {name}(Message):\n    __slots__ = ()\n"
        fields = [self.field(message, field) for field in message.field]
        names = ", ".join(f'"{n}"' for n in sorted(f.name for f in message.field))
        comma = "," if len(message.field) == 1 else ""
        lines = [f"class {name}(Message):", f"    __slots__ = ({names}{comma})", "    FIELDS = ("]
        lines += [f"        {row}," for _, _, row in fields]
        lines += ["    )", "", "    def __init__(", "        self,", "        *,"]
        lines += [f"        {parameter}," for parameter, _, _ in fields]
        lines += ["    ) -> None:"]
        lines += [f"        {assignment}" for _, assignment, _ in fields]
        return "\n".join(lines) + "\n"

    def render(self) -> str:
        """The module's source."""
        body = [
            self.message(name, message) for name, message in _messages(list(self.file.message_type))
        ]
        constants = [
            f"{enum.name}_{value.name} = {value.number}"
            for enum in self.file.enum_type
            for value in enum.value
        ]
        head = [
            f'"""Messages of {self.file.name}; generated by vmcell_tools.message_codegen."""',
            "",
            "from __future__ import annotations",
            "",
        ]
        for stem in sorted(self.imports):
            names = ", ".join(sorted(self.imports[stem]))
            head.append(f"from vmcell_protos.{stem} import {names}")
        head.append("from vmcell_protos.wire import Field, Message")
        if constants:
            head += ["", *constants]
        return "\n".join(head) + "\n\n\n" + "\n\n".join(body)


def render_modules(folder: Path) -> dict[str, str]:
    """stem → source of its module."""
    files = compile_protos(folder, STEMS).file
    packages = {file.package: Path(file.name).stem for file in files}
    return {
        Path(file.name).stem: _formatted(ModuleWriter(file, packages).render()) for file in files
    }


def _formatted(source: str) -> str:
    """`source` as the project's formatter writes it, so that a diff shows real changes only."""
    command = [sys.executable, "-m", "ruff", "format", "--line-length", str(LINE_LENGTH), "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Rewrites the generated modules in place."""
    folder = proto_folder()
    for stem, source in render_modules(folder).items():
        (folder / f"{stem}.py").write_text(source)
        sys.stdout.write(f"{stem}.py\n")


if __name__ == "__main__":
    main()
