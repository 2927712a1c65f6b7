"""docs/kubernetes.md and the RuntimeClass say what the code does."""

from __future__ import annotations

import re

from source_tree import ROOT

from vmcell_shim.cgroup_limits import HOST_MEMORY_MIB, HOST_TASKS
from vmcell_shim.config import CACHE_LIMIT_MIB
from vmcell_shim.info import NAME
from vmcell_shim.rootfs import MAX_LOWERS
from vmcell_shim.sizing import OVERHEAD_MIB
from vmcell_tools.containerd_config import BEGIN, END, HANDLER, POD_ANNOTATIONS, SNIPPETS

GUIDE = (ROOT / "docs/kubernetes.md").read_text()
MANIFEST = (ROOT / "deploy/kubernetes/runtimeclass.yaml").read_text()


def manifest() -> dict[str, str]:
    """The values of the manifest by dotted path: blocks of two blanks, plain or quoted scalars."""
    values: dict[str, str] = {}
    names: list[str] = []
    for line in MANIFEST.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r'((?:  )*)([\w./-]+):(?: (?:"([^"]*)"|(\S+)))?', line)
        assert match, line
        depth = len(match[1]) // 2
        assert depth <= len(names), line
        names = [*names[:depth], match[2]]
        if match[3] or match[4]:
            values[".".join(names)] = match[3] or match[4]
    return values


def test_the_runtime_class() -> None:
    values = manifest()
    assert values["apiVersion"] == "node.k8s.io/v1"
    assert values["kind"] == "RuntimeClass"
    assert values["handler"] == values["metadata.name"] == HANDLER
    assert values["overhead.podFixed.memory"] == f"{OVERHEAD_MIB + HOST_MEMORY_MIB}Mi"
    label = "io.vmcell/ready"
    assert values[f"scheduling.nodeSelector.{label}"] == "true"
    assert f"kubectl label node NODE {label}=true" in GUIDE
    assert "deploy/kubernetes/runtimeclass.yaml" in GUIDE


def test_numbers_and_names_of_the_guide() -> None:
    text = " ".join(GUIDE.split())
    for part in (
        f"charges {OVERHEAD_MIB + HOST_MEMORY_MIB} MiB of memory",
        f"the limit plus {OVERHEAD_MIB} MiB",
        f"plus {HOST_MEMORY_MIB} MiB plus a 128th",
        f"{HOST_TASKS} tasks",
        f"up to {MAX_LOWERS};",
        f"({CACHE_LIMIT_MIB >> 10} GiB)",
        f"`{BEGIN}`",
        f"`{END}`",
        f"runtimeClassName: {HANDLER}",
        f"`{NAME}`",
        *(f"`{name}`" for name in POD_ANNOTATIONS),
        *(f"| `{row.file}` |" for row in SNIPPETS),
    ):
        assert part in text, part
    for row in SNIPPETS:
        assert row.plugin in GUIDE
