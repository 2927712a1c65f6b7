"""What /dev/kvm is good for, on hosts made of a few files."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmcell_protos.errors import HostError
from vmcell_runtime.kvm.host_kind import host_kind, open_kvm, require_linux_host


def host(root: Path, *, kvm: bool = True, pvm: bool = False, flags: str = "fpu svm") -> str:
    for folder in ("dev", "proc", "sys/module/kvm"):
        (root / folder).mkdir(parents=True)
    if kvm:
        (root / "dev/kvm").touch()
    if pvm:
        (root / "sys/module/kvm_pvm").mkdir()
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    return str(root)


@pytest.mark.parametrize("flag", ["vmx", "svm"])
def test_hardware_runs_linux(tmp_path: Path, flag: str) -> None:
    root = host(tmp_path, flags=f"fpu {flag} sse")
    found = host_kind(root)
    assert (found.kind, found.runs_linux) == ("hardware", True)
    assert flag in found.reason
    require_linux_host(root)


@pytest.mark.parametrize(
    ("kind", "made_of", "word"),
    [
        ("pvm", {"pvm": True}, "kvm_pvm"),
        ("no-hardware", {"flags": "fpu svm_lock vmxy"}, "neither vmx nor svm"),
        ("missing", {"kvm": False}, "does not exist"),
    ],
)
def test_other_hosts_do_not_and_say_why(
    tmp_path: Path, kind: str, made_of: dict[str, object], word: str
) -> None:
    root = host(tmp_path, **made_of)  # type: ignore[arg-type]
    found = host_kind(root)
    assert (found.kind, found.runs_linux) == (kind, False)
    with pytest.raises(HostError, match=f"{word}.*vmcell doctor") as raised:
        require_linux_host(root)
    assert "\n" not in str(raised.value)
    assert raised.value.code == "failed_precondition"


def test_opening_a_missing_kvm_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"does not exist.*vmcell doctor"):
        open_kvm(host(tmp_path, kvm=False))


def test_a_host_without_cpuinfo_is_an_error_not_a_guess(tmp_path: Path) -> None:
    root = host(tmp_path)
    (tmp_path / "proc/cpuinfo").unlink()
    with pytest.raises(HostError, match="cpuinfo"):
        host_kind(root)
