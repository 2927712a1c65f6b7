"""Writes the seeds of every target to corpus/<target>/; run it after a message or format changed.

python tests/fuzz/make_corpus.py
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

from fuzz_targets import CORPUS, load, target_names  # noqa: E402 # they lie beside this program


def main() -> None:
    for name in target_names():
        folder = CORPUS / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for seed, data in load(name).seeds().items():
            (folder / seed).write_bytes(data)


if __name__ == "__main__":
    main()
