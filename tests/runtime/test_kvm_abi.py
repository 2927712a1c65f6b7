"""Our declarations against the kernel's own headers, through a C compiler (safety rule MS4)."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from vmcell_runtime.kvm import abi, vcpu

# Header's names where ours differ: the run page's exit is an unnamed union there.
RUN_EXITS = {"io": "io", "mmio": "mmio", "internal": "internal", "system_event": "system_event"}
HEADERLESS = {"identity_map_address", "kvm_run_exit", "kvm_run"} | {
    f"kvm_run_{name}" for name in ("io", "mmio", "internal", "system_event", "fail_entry")
}

STRUCTS = {
    name: kind
    for name, kind in vars(abi).items()
    if isinstance(kind, type) and issubclass(kind, ctypes.Structure) and name not in HEADERLESS
}
CONSTANTS = {
    name: value
    for name, value in vars(abi).items()
    if name.startswith("KVM_") and isinstance(value, int)
}


def expectations() -> dict[str, int]:
    """C expression → what we believe its value is."""
    wanted = dict(CONSTANTS)
    for name, kind in STRUCTS.items():
        wanted[f"sizeof(struct {name})"] = ctypes.sizeof(kind)
        for field, *_ in kind._fields_:
            wanted[f"offsetof(struct {name}, {field})"] = getattr(kind, field).offset
            wanted[f"sizeof(((struct {name} *)0)->{field})"] = getattr(kind, field).size
    exit_offset = abi.kvm_run.exit.offset
    for field, *_ in abi.kvm_run._fields_:
        if field != "exit":
            wanted[f"offsetof(struct kvm_run, {field})"] = getattr(abi.kvm_run, field).offset
    for member in (*RUN_EXITS, "fail_entry"):
        kind = getattr(abi, f"kvm_run_{member}")
        for field, *_ in kind._fields_:
            path = f"offsetof(struct kvm_run, {member}.{field})"
            wanted[path] = exit_offset + getattr(kind, field).offset
    wanted["offsetof(struct kvm_run, kvm_valid_regs)"] = ctypes.sizeof(abi.kvm_run)
    return wanted


def test_every_number_size_and_offset_is_the_headers(tmp_path: Path) -> None:
    wanted = expectations()
    lines = "".join(f'  printf("%llu\\n", (unsigned long long)({text}));\n' for text in wanted)
    source = tmp_path / "probe.c"
    source.write_text(
        "#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f"int main(void) {{\n{lines}  return 0;\n}}\n"
    )
    program = tmp_path / "probe"
    subprocess.run(["gcc", "-o", program, source], check=True, timeout=60)
    output = subprocess.run([program], check=True, capture_output=True, text=True, timeout=10)
    found = dict(zip(wanted, map(int, output.stdout.split()), strict=True))
    assert found == wanted
    assert len(wanted) > 150


def test_the_formats_of_the_run_page_are_the_structs() -> None:
    # is_write is the last field; the compiler's padding behind it is not read.
    assert vcpu._IO.size == ctypes.sizeof(abi.kvm_run_io)
    assert vcpu._MMIO.size == abi.kvm_run_mmio.is_write.offset + 1
    assert vcpu._INTERNAL.size == ctypes.sizeof(abi.kvm_run_internal)


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_request_sizes_come_from_structs(name: str) -> None:
    sizes = {abi.request_size(value) for value in abi.REQUEST_NAMES}
    size = ctypes.sizeof(STRUCTS[name])
    parts = {"kvm_segment", "kvm_dtable", "kvm_msr_entry", "kvm_cpuid_entry2"}
    assert size in sizes or name in parts
