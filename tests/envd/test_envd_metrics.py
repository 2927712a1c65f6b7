"""noded's metrics, asked of the real envd."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from envd_client import request
from envd_harness import Envd

from vmcell_api.node import sandbox_files
from vmcell_api.node.metrics import MetricSampler
from vmcell_api.node.sandbox import Sandbox

pytestmark = pytest.mark.root

SANDBOX_ID = "i" + "m" * 19


def test_samples_with_the_token_and_none_without(fresh_envd: Envd, tmp_path: Path) -> None:
    token = json.dumps({"accessToken": "t0ken"}).encode()
    assert request(fresh_envd, "POST", "/init", token).status == 204
    sandbox = Sandbox(
        sandbox_id=SANDBOX_ID,
        template_id="t",
        image="i",
        vcpus=1,
        memory_mib=1,
        slot_number=1,
        address="127.0.0.1",
    )
    for name, given, count in (("with", "t0ken", 2), ("without", "", 0)):
        folder = str(tmp_path / name)
        sandbox_files.write(
            folder, SANDBOX_ID, address="127.0.0.1", nameservers=(), access_token=given
        )
        sampler = MetricSampler(lambda: [sandbox], folder, interval_s=0, port=fresh_envd.port)
        sampler.ask_all()
        sampler.ask_all()
        found = sampler.read([SANDBOX_ID], start_unix_ms=0, end_unix_ms=0, newest_only=False)
        assert len(found[SANDBOX_ID]) == count, name
        for sample in found[SANDBOX_ID]:
            assert 0 < sample.mem_used_bytes < sample.mem_total_bytes
            assert 0 <= sample.disk_used_bytes <= sample.disk_total_bytes
            assert sample.cpu_count >= 1
            assert 0 <= sample.cpu_used_pct <= 100
