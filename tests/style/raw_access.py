"""What only a few modules may do, found in syntax trees: raw memory, ioctl, code from data.

Names are followed through imports and their aliases, so `from ctypes import cast as c` is seen as
well as `ctypes.cast`. What is left to a reader: a module object that is passed around. Getting one
by a computed name is a finding itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

RAW_MEMORY = "vmcell_runtime.memory"

# ctypes outside of it: calling libc with integers and byte strings, and layouts of structs.
SAFE_CTYPES = {
    *("CDLL", "get_errno", "sizeof", "Structure", "Union"),
    *("c_int", "c_long", "c_ulong", "c_int64", "c_size_t", "c_char_p"),
    *("c_uint8", "c_uint16", "c_uint32", "c_int32", "c_uint64"),
}
CTYPES_MODULES = {
    "vmcell_runtime.kvm.layouts": "structs",
    "vmcell_runtime.kvm.abi": "structs",
    "vmcell_runtime.kvm.vcpu": "one number whose address KVM is told",
    "vmcell_runtime.kvm.vcpu_state": "sizes of structs",
    "vmcell_runtime.kvm.ioctl": "ioctl with an argument beyond an int",
    "vmcell_runtime.jail": "system calls that os lacks",
    "vmcell_runtime.spare": "malloc_trim",
    "vmcell_runtime.virtio.blk": "fallocate",
    "vmcell_shim.mount_calls": "mount calls",
    "vmcell_shim.netns": "setns and mount",
    "vmcell_shim.refresh": "inotify",
    "vmcell_api.volumes.syscalls": "mount, capset, openat2",
    "vmcell_api.child_processes": "prctl",
    "vmcell_agent.syscalls": "system calls that os lacks",
    "vmcell_agent.envd.inotify": "inotify",
}
EXTRA_CTYPES = {
    "vmcell_runtime.kvm.abi": {"Array"},  # of structs, in annotations
    "vmcell_runtime.kvm.vcpu": {"addressof"},  # of its own eight bytes, KVM_VCPU_TSC_OFFSET
    "vmcell_runtime.jail": {"byref", "c_ushort"},  # of a filter program, for seccomp(2)
    "vmcell_agent.syscalls": {"create_string_buffer"},  # as long as the struct the kernel fills
}
INTEGER_RESULTS = {"ctypes.c_int", "ctypes.c_long", "ctypes.c_ssize_t", "None"}

IOCTL_MODULES = {
    "vmcell_runtime.kvm.ioctl": "KVM, sizes checked",
    "vmcell_runtime.kvm.vcpu": "KVM_RUN, which takes no argument",
    "vmcell_runtime.virtio.host_ioctl": "TAP and vhost, sizes checked",
    "vmcell_shim.sparse": "FICLONE",
    "vmcell_shim.tap": "TUNSETIFF",
    "vmcell_shim.fifo": "FIONREAD",
    "vmcell_shim.netns": "NS_GET_NSTYPE",
    "vmcell_agent.terminal": "terminals",
    "vmcell_agent.pump": "FIONREAD",
    "vmcell_agent.machine": "RNDADDENTROPY",
    "vmcell_agent.envd.spawn": "terminals",
    "vmcell_tools.doctor": "FICLONE",
    "vmcell_tools.bench.restore": "TUNSETIFF",
}
MMAP_MODULES = {
    RAW_MEMORY: "guest RAM and images",
}
# memoryview.cast: words of guest memory are loaded and stored through such views only.
CAST_MODULES = {
    RAW_MEMORY: "words of guest memory",
    "vmcell_runtime.kvm.ioctl": "a length in bytes",
}

# Reaches memory by an address, or an object's memory from outside, whatever it is called on.
RAW_ATTRIBUTES = {
    *("from_address", "from_buffer", "from_buffer_copy", "from_param", "in_dll"),
    *("addressof", "memmove", "memset", "string_at", "wstring_at", "buffer_info", "_as_parameter_"),
}
FOREIGN_MODULES = {"cffi", "_ctypes", "_cffi_backend", "numpy"}
DESERIALISERS = {
    *("pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle"),
    *("yaml", "ruamel", "multiprocessing", "runpy", "code", "codeop", "joblib"),
}
CODE_FROM_DATA = {
    *("eval", "exec", "compile", "__import__"),
    *("importlib.import_module", "importlib.__import__", "types.FunctionType", "types.CodeType"),
}
CODE_MODULES = {
    "vmcell_shim.zygote": "imports modules of its own by a list in its source",
    "vmcell_tools.template_source": "runs the template.py that who builds it has written",
}
RING_MODULES = ("vmcell_runtime.virtio.", RAW_MEMORY)
BYTEWISE = {"pack_into", "readinto"}


@dataclass(frozen=True)
class Finding:
    rule: str
    line: int
    what: str


def findings(module: str, tree: ast.Module) -> list[Finding]:
    """Everything in the module of this dotted name that it may not do, by line."""
    names = _imported(tree)
    found = [*_imports(module, tree)]
    for node in ast.walk(tree):
        found += _names(module, node, names)
        if isinstance(node, ast.Call):
            found += _calls(module, node, names)
        elif isinstance(node, ast.Assign):
            found += _result_types(module, node, names)
    return sorted(set(found), key=lambda finding: (finding.line, finding.rule, finding.what))


def uses(tree: ast.Module, what: str) -> bool:
    """If it still does what a list above lets it: no list may outlive its reason."""
    names = _imported(tree)
    dotted = {_dotted(node, names) for node in ast.walk(tree)}
    match what:
        case "ctypes" | "mmap" | "importlib" | "runpy":
            return any(name.split(".")[0] == what for name in dotted if name)
        case "ioctl":
            return any(name.rpartition(".")[2] == what for name in dotted if name)
    return any(isinstance(n, ast.Attribute) and n.attr == what for n in ast.walk(tree))


def _imported(tree: ast.Module) -> dict[str, str]:
    """Local name → what it stands for, of every import anywhere in the module."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                names[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`c.cast` as "ctypes.cast" where c is ctypes; "" for what is no plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    if isinstance(node, ast.Constant) and node.value is None:
        return "None"
    return ""


def _imports(module: str, tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in imported:
            top = name.split(".")[0]
            if top in DESERIALISERS and module not in CODE_MODULES:
                yield Finding("code from data", node.lineno, name)
            if top in FOREIGN_MODULES:
                yield Finding("raw memory", node.lineno, name)
            if top == "mmap" and module not in MMAP_MODULES:
                yield Finding("raw memory", node.lineno, name)
            if top == "ctypes" and module not in CTYPES_MODULES and module != RAW_MEMORY:
                yield Finding("raw memory", node.lineno, name)
            if name in ("ctypes.*", "fcntl.*", "mmap.*", "importlib.*"):
                yield Finding("raw memory", node.lineno, name)


def _names(module: str, node: ast.AST, names: dict[str, str]) -> Iterator[Finding]:
    if not isinstance(node, ast.Name | ast.Attribute):
        return
    name = _dotted(node, names)
    last = node.attr if isinstance(node, ast.Attribute) else name
    if module != RAW_MEMORY:
        if name.startswith("ctypes."):
            safe = SAFE_CTYPES | EXTRA_CTYPES.get(module, set())
            if name.split(".")[1] not in safe:
                yield Finding("raw memory", node.lineno, name)
        allowed = EXTRA_CTYPES.get(module, set())
        if last in RAW_ATTRIBUTES and last not in allowed:
            yield Finding("raw memory", node.lineno, name or last)
    if (name.rpartition(".")[2] == "ioctl" or last == "ioctl") and module not in IOCTL_MODULES:
        yield Finding("ioctl", node.lineno, name or last)
    if isinstance(node, ast.Attribute) and last == "cast" and module not in CAST_MODULES:
        yield Finding("raw memory", node.lineno, name or last)
    if name.removeprefix("builtins.") in CODE_FROM_DATA and module not in CODE_MODULES:
        yield Finding("code from data", node.lineno, name)
    if last in BYTEWISE and module.startswith(RING_MODULES):
        yield Finding("bytes of a ring", node.lineno, name or last)


def _calls(module: str, node: ast.Call, names: dict[str, str]) -> Iterator[Finding]:
    called = _dotted(node.func, names)
    if called in ("getattr", "vars", "setattr") and node.args:
        subject = _dotted(node.args[0], names)
        if subject.split(".")[0] in ("ctypes", "mmap", "builtins", "fcntl", "importlib"):
            yield Finding("code from data", node.lineno, f"{called}({subject}, …)")


def _result_types(module: str, node: ast.Assign, names: dict[str, str]) -> Iterator[Finding]:
    """A foreign function that returns a pointer gives its caller memory to read."""
    if module == RAW_MEMORY:
        return
    for target in node.targets:
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=True))
        for one, value in pairs:
            if isinstance(one, ast.Attribute) and one.attr == "restype":
                kind = _dotted(value, names)
                if kind not in INTEGER_RESULTS:
                    yield Finding("raw memory", node.lineno, f"restype = {kind or '…'}")
