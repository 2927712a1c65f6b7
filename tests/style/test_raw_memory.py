"""Raw memory, ioctl and code from data stay where their rules are; and that the checker sees them.

ctypes for calling libc with integers and byte strings is not raw memory; taking addresses, casting
pointers and mapping structures over foreign bytes is (safety rules MS3, MS5, MS15).
"""

from __future__ import annotations

import ast

import pytest
import raw_access
from raw_access import Finding, findings, uses
from source_tree import Module, modules

ELSEWHERE = "vmcell_runtime.virtio.blk"
RAW, IOCTL, CODE, RING = "raw memory", "ioctl", "code from data", "bytes of a ring"


@pytest.fixture(scope="module")
def product() -> list[Module]:
    return modules(generated=True)


def test_only_named_modules_touch_memory_ioctl_and_code(product: list[Module]) -> None:
    wrong = [
        f"{module.relative_path}:{finding.line} {finding.rule}: {finding.what}"
        for module in product
        for finding in findings(".".join(module.parts), module.tree)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("listed", "what"),
    [
        (raw_access.CTYPES_MODULES, "ctypes"),
        (raw_access.IOCTL_MODULES, "ioctl"),
        (raw_access.MMAP_MODULES, "mmap"),
        (raw_access.CAST_MODULES, "cast"),
    ],
    ids=["ctypes", "ioctl", "mmap", "cast"],
)
def test_no_exception_outlives_its_reason(
    product: list[Module], listed: dict[str, str], what: str
) -> None:
    trees = {".".join(module.parts): module.tree for module in product}
    stale = [name for name in listed if name not in trees or not uses(trees[name], what)]
    assert not stale, f"these need no exception for {what} any more: {stale}"


def found(source: str, module: str = ELSEWHERE) -> list[tuple[str, str]]:
    return [(one.rule, one.what) for one in findings(module, ast.parse(source))]


@pytest.mark.parametrize(
    "line",
    [
        "ctypes.cast(x, ctypes.c_char_p)",
        "ctypes.POINTER(ctypes.c_int)",
        "ctypes.pointer(x)",
        "ctypes.byref(x)",
        "ctypes.addressof(x)",
        "ctypes.memmove(a, b, 4)",
        "ctypes.memset(a, 0, 4)",
        "ctypes.string_at(address, 4)",
        "ctypes.wstring_at(address)",
        "ctypes.c_void_p(5)",
        "ctypes.c_int.from_address(5)",
        "ctypes.c_int.from_buffer(data)",
        "ctypes.pythonapi.PyObject_GetBuffer",
        "ctypes.py_object(x)",
        "ctypes.PyDLL(None)",
        "ctypes.CFUNCTYPE(None)",
        "ctypes.resize(x, 100)",
        "ctypes.create_string_buffer(10)",
        "ctypes.util.find_library('c')",
    ],
)
def test_ctypes_beyond_integers_and_strings(line: str) -> None:
    assert (RAW, line.partition("(")[0]) in found(f"import ctypes\n{line}")


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import ctypes as c\nc.cast(x, y)", "ctypes.cast"),
        ("from ctypes import cast as turn\nturn(x, y)", "ctypes.cast"),
        ("from ctypes import *\n", "ctypes.*"),
        ("import mmap\n", "mmap"),
        ("def f():\n    import mmap", "mmap"),
        ("from mmap import mmap as m", "mmap.mmap"),
        ("import cffi", "cffi"),
        ("import _ctypes", "_ctypes"),
        ("import numpy as np", "numpy"),
        ("kind.from_address(5)", "kind.from_address"),
        ("f().from_buffer(x)", "from_buffer"),
        ("view.cast('H')", "view.cast"),
        ("memoryview(x).cast('H')", "cast"),
        ("array.buffer_info()", "array.buffer_info"),
        ("import ctypes\nf.restype = ctypes.POINTER(x)", "ctypes.POINTER"),
        ("import ctypes\nf.restype = ctypes.c_char_p", "restype = ctypes.c_char_p"),
        ("import ctypes\nf.a, f.restype = 1, ctypes.c_char_p", "restype = ctypes.c_char_p"),
        ("import ctypes\nf.restype = kind", "restype = kind"),
    ],
)
def test_raw_memory_by_any_other_name(source: str, what: str) -> None:
    assert (RAW, what) in found(source)


def test_a_module_of_no_list_has_no_ctypes_at_all() -> None:
    assert found("import ctypes", "vmcell_runtime.virtio.net") == [(RAW, "ctypes")]
    assert found("from ctypes import c_int", "vmcell_shim.task") == [(RAW, "ctypes.c_int")]


@pytest.mark.parametrize(
    "source",
    [
        "import fcntl\nfcntl.ioctl(fd, 1)",
        "import fcntl as f\nf.ioctl(fd, 1)",
        "from fcntl import ioctl\nioctl(fd, 1)",
        "from fcntl import ioctl as i\ni(fd, 1)",
        "import ctypes\n_libc = ctypes.CDLL(None)\n_libc.ioctl(1, 2)",
        "call = __import__('x').ioctl",
    ],
)
def test_ioctl_elsewhere(source: str) -> None:
    assert IOCTL in [rule for rule, _ in found(source)]


@pytest.mark.parametrize(
    "name",
    [
        *("pickle", "_pickle", "marshal", "shelve", "yaml", "dill", "cloudpickle", "jsonpickle"),
        *("ruamel.yaml", "multiprocessing.managers", "runpy", "code", "codeop"),
    ],
)
def test_deserialisers(name: str) -> None:
    assert (CODE, name) in found(f"import {name}")
    assert (CODE, name) in found(f"def f():\n    import {name} as harmless")
    assert CODE in [rule for rule, _ in found(f"from {name} import load")]


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("compile(text, '', 'exec')", "compile"),
        ("run = eval", "eval"),
        ("import builtins\nbuiltins.exec(text)", "builtins.exec"),
        ("__import__(name)", "__import__"),
        ("import importlib\nimportlib.import_module(name)", "importlib.import_module"),
        ("from importlib import import_module as i\ni(name)", "importlib.import_module"),
        ("import types\ntypes.CodeType(1)", "types.CodeType"),
        ("import builtins\ngetattr(builtins, 'ev' + 'al')", "getattr(builtins, …)"),
        ("import ctypes\ngetattr(ctypes, name)", "getattr(ctypes, …)"),
        ("import ctypes\nvars(ctypes)", "vars(ctypes, …)"),
    ],
)
def test_code_from_data(source: str, what: str) -> None:
    assert (CODE, what) in found(source)


def test_words_of_a_ring_by_bytes() -> None:
    source = "import struct\nstruct.pack_into('<H', view, 2, 5)"
    assert (RING, "struct.pack_into") in found(source)
    assert (RING, "struct.pack_into") in found(source, "vmcell_runtime.memory")
    assert found(source, "vmcell_runtime.boot.params") == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import ctypes\n_libc = ctypes.CDLL(None)\n_libc.f(ctypes.c_long(1))", ELSEWHERE),
        ("import ctypes\nf.restype = ctypes.c_int\nctypes.get_errno()", ELSEWHERE),
        ("f.restype = None", ELSEWHERE),
        ("import re\nre.compile('a')", ELSEWHERE),
        ("import ast\nast.literal_eval('1')", ELSEWHERE),
        ("self.exec(request)", ELSEWHERE),
        ("def exec(self): ...", ELSEWHERE),
        ("from typing import cast\ncast(int, x)", ELSEWHERE),
        ("import fcntl\nfcntl.fcntl(fd, 1)", ELSEWHERE),
        ("import ctypes, mmap\nctypes.cast(x, y)\nv.cast('H')", raw_access.RAW_MEMORY),
        ("import fcntl\nfcntl.ioctl(fd, 1)", "vmcell_runtime.virtio.host_ioctl"),
        ("import json\njson.loads('1')", ELSEWHERE),
    ],
)
def test_what_is_allowed(source: str, module: str) -> None:
    assert found(source, module) == []


def test_findings_are_in_the_order_of_the_source() -> None:
    source = "import pickle\nimport mmap\neval('1')"
    assert findings(ELSEWHERE, ast.parse(source)) == [
        Finding(CODE, 1, "pickle"),
        Finding(RAW, 2, "mmap"),
        Finding(CODE, 3, "eval"),
    ]
