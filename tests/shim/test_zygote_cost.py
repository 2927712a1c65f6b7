"""What a start, a delete and an idle shim cost, with the zygote and without; printed with `-s`.

docs/architecture.md has the figures of one machine. Here the zygote only has to be worth it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from zygote_harness import (
    Zygote,
    address_of,
    bootstrap,
    delete_words,
    end,
    make_bundle,
    memory_kib,
    settled_traits,
    shims,
    start_words,
)

pytestmark = pytest.mark.root

COUNT = 20


def median_ms(action: Callable[[int], object]) -> float:
    times = []
    for number in range(COUNT):
        began = time.perf_counter()
        action(number)
        times.append((time.perf_counter() - began) * 1000)
    return sorted(times)[COUNT // 2]


def test_the_zygote_is_worth_it(zygote: Zygote, folder: Path) -> None:
    direct = Zygote("")
    costs: dict[str, dict[str, float]] = {}
    for name, way in (("direct", direct), ("zygote", zygote)):
        bundles = [make_bundle(folder, f"{name}{number}") for number in range(COUNT)]

        def start(number: int, way: Zygote = way, bundles: list[Path] = bundles) -> None:
            bundle = bundles[number]
            address_of(way.run(bundle, *start_words(bundle), stdin=bootstrap(bundle)))

        def delete(number: int, way: Zygote = way, bundles: list[Path] = bundles) -> None:
            bundle = bundles[number]
            assert way.run(bundle, *delete_words(bundle)).returncode == 0

        costs[name] = {"start p50 ms": median_ms(start)}
        pids = [pid for bundle in bundles for pid in shims(bundle)]
        for pid in pids:
            settled_traits(pid)
        for row in ("Private_Dirty", "Pss"):
            sizes = sorted(memory_kib(pid)[row] for pid in pids)
            costs[name][f"shim {row} KiB"] = sizes[len(sizes) // 2]
        for pid in pids:
            end(pid)
        costs[name]["delete p50 ms"] = median_ms(delete)
    sys.stdout.write(f"\n{costs}, n = {COUNT}, {os.cpu_count()} CPUs\n")
    for what in ("start p50 ms", "delete p50 ms", "shim Private_Dirty KiB", "shim Pss KiB"):
        assert costs["zygote"][what] < costs["direct"][what], what
