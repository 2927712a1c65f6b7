"""Fuzzes one target with atheris for some seconds, or repeats one input.

  python tests/fuzz/run_fuzz.py TARGET... --seconds 20    two at a time; "all": all of them
  python tests/fuzz/run_fuzz.py TARGET --input FILE       without atheris, with a plain traceback

The status is 1 after a finding; its input lies in build/fuzz/ then, and the command that repeats it
has been printed. Every run begins with the target's corpus and its former findings. With --keep,
inputs that brought new coverage stay in build/fuzz/corpus/TARGET and the next run begins with them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tests" / "support")]

from fuzz_targets import (  # noqa: E402 # they lie beside this program, not on its path
    CORPUS,
    MAX_INPUT_BYTES,
    REGRESSIONS,
    load,
    run_one,
    stored_inputs,
    target_names,
)

OUT = ROOT / "build" / "fuzz"
COVERED = [
    *("vmcell_protos", "vmcell_runtime", "vmcell_shim", "vmcell_agent", "vmcell_api"),
    *("h11", "http"),
]
# Importing under instrumentation, reading the corpus, and a machine with other work to do.
START_S = 150
HANG_S = 20
RSS_LIMIT_MIB = 1024
AT_ONCE = 2
_RUNS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERAGE = re.compile(r"cov: (\d+)")
_FINDING_MARKS = ("=== Uncaught Python exception", "ERROR: libFuzzer")
_WORD = re.compile(rb"[A-Za-z_][A-Za-z0-9_.-]{2,40}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one run went. `found` is the input of a finding, `text` what was printed about it."""

    target: str
    runs: int
    coverage: int
    found: Path | None
    text: str

    @property
    def ok(self) -> bool:
        return not self.text

    def summary(self) -> str:
        return f"{self.target}: {self.runs} inputs, coverage {self.coverage}"


def fuzz(
    target: str, seconds: int, *, seed: int = 0, out: Path = OUT, keep: bool = False
) -> Outcome:
    """Runs one target in a process of its own; `seed` 0 is another one each time."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vmcell-fuzz-") as scratch:
        # Each run writes its artifacts where no other run does.
        artifacts = Path(scratch, "found")
        artifacts.mkdir()
        grown = out / "corpus" / target if keep else Path(scratch, "corpus")
        grown.mkdir(parents=True, exist_ok=True)
        stored = [
            str(folder / target) for folder in (CORPUS, REGRESSIONS) if (folder / target).is_dir()
        ]
        words = Path(scratch, "words")
        words.write_text(_dictionary(target))
        command = [
            *(
                sys.executable,
                str(Path(__file__).resolve()),
                target,
                "--child",
                str(grown),
                *stored,
            ),
            *(f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", f"-seed={seed}"),
            *(f"-timeout={HANG_S}", f"-rss_limit_mb={RSS_LIMIT_MIB}", "-print_final_stats=1"),
            *(f"-artifact_prefix={artifacts}/", f"-dict={words}"),
        ]
        code, text = _run(command, seconds + START_S)
        found = [_keep_input(path, target, out) for path in sorted(artifacts.iterdir())]
    runs, coverage = _RUNS.search(text), _COVERAGE.findall(text)
    return Outcome(
        target=target,
        runs=int(runs[1]) if runs else 0,
        coverage=int(coverage[-1]) if coverage else 0,
        found=found[0] if found else None,
        text="" if code == 0 and not found else _finding_text(target, code, text, found),
    )


def _dictionary(target: str) -> str:
    """The words of the stored inputs, for libFuzzer to put together anew."""
    words = {word for path in stored_inputs(target) for word in _WORD.findall(path.read_bytes())}
    return "".join(f'"{word.decode()}"\n' for word in sorted(words)) or "# no words\n"


def _run(command: list[str], deadline_s: int) -> tuple[int, str]:
    """Exit status and output; 124 for one that had to be killed."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = 124
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _keep_input(artifact: Path, target: str, out: Path) -> Path:
    kept = out / f"{target}-{artifact.name}"
    kept.write_bytes(artifact.read_bytes())
    return kept


def _finding_text(target: str, code: int, text: str, found: list[Path]) -> str:
    found_at = [text.find(mark) for mark in _FINDING_MARKS if mark in text]
    lines = text[min(found_at) :].splitlines() if found_at else text.splitlines()[-60:]
    said = "\n".join(line[:300] for line in lines[:60])
    repeats = [
        f"repeat it: {sys.executable} {_short(Path(__file__))} {target} --input {_short(path)}"
        for path in found
    ]
    return "\n".join([f"{target}: exit status {code}", said, *repeats])


def _short(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _child(target_name: str, fuzzer_arguments: list[str]) -> None:
    """The fuzzing process: instruments what the target imports, and never comes back."""
    import atheris

    with atheris.instrument_imports(include=[*COVERED, f"target_{target_name}", target_name]):
        target = load(target_name)

    def one(data: bytes) -> None:
        run_one(target, data)

    atheris.Setup([sys.argv[0], *fuzzer_arguments], one)
    atheris.Fuzz()


def _repeat(target_name: str, path: Path) -> int:
    taken = run_one(load(target_name), path.read_bytes())
    print(f"{target_name} {'took' if taken else 'refused'} {path}, as it may")  # noqa: T201 # a program
    return 0


def main() -> int:
    if "--child" in sys.argv:
        at = sys.argv.index("--child")
        _child(sys.argv[1], sys.argv[at + 1 :])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "targets", nargs="+", metavar="TARGET", help=f"all, or {', '.join(target_names())}"
    )
    parser.add_argument("--seconds", type=int, default=20, help="of each target (default 20)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the fuzzer; 0: another one each time"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where findings go")
    parser.add_argument("--keep", action="store_true", help="go on with the corpus of earlier runs")
    parser.add_argument("--input", type=Path, help="repeat this input once")
    arguments = parser.parse_args()
    names = target_names() if arguments.targets == ["all"] else arguments.targets
    if arguments.input:
        return _repeat(names[0], arguments.input)
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        rows = [
            pool.submit(
                *(fuzz, name, arguments.seconds),
                seed=arguments.seed,
                out=arguments.out.resolve(),
                keep=arguments.keep,
            )
            for name in names
        ]
        outcomes = []
        for row in rows:
            outcomes.append(row.result())
            print(outcomes[-1].text or outcomes[-1].summary(), flush=True)  # noqa: T201 # a program
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
