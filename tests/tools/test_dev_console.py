"""What `vmcell dev up` reads off the VM's console while it boots."""

from __future__ import annotations

from pathlib import Path

from vmcell_tools.dev_vm import console_steps


def test_a_line_counts_when_it_is_whole(tmp_path: Path) -> None:
    """`ready` seen as `read` once left `up` waiting for its deadline."""
    log = tmp_path / "console.log"
    assert console_steps(log) == []
    text = b"[ 0.1] noise\r\nvmcell-dev: starting ssh\r\n[ 3.2] vmcell-dev: ready\r\n"
    expected: list[list[str]] = []
    for end in range(len(text) + 1):
        log.write_bytes(text[:end])
        steps = console_steps(log)
        if steps not in expected:
            expected.append(steps)
    assert expected == [[], ["starting ssh"], ["starting ssh", "ready"]]
